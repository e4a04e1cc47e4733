"""Benchmarks of the project: `python -m benchmarks.NAME [--quick]`. The protocol is in `benchmarks.harness`."""
