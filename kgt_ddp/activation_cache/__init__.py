"""Outputs of the frozen prefix, kept by sample, so that its forward is not run again. See docs/activation-cache.md."""
