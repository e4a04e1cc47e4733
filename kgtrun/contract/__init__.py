"""What the three packages agree on: environment names, run-directory layout, event records.

A leaf: standard library only, imported by `kgtrun`, `launcher` and `kgt_ddp`, importing none of them.
"""
