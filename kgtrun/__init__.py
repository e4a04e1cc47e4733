"""kgtrun: torchrun that finds converged layers and stops paying for them.

This package is the terminal side: command line, plan, what a trainer runs before the user's script, reports. Importing
it has no side effects and does not import torch. `launcher` owns processes, `kgt_ddp` owns tensors.
"""
