"""Processes, hosts and signals: starts and stops trainer ranks and side-car processes on one node.

Never imports `kgt_ddp`: to the launcher a reference process is an opaque command. Trainers and references never import
this package, because a user's own `launcher.py` may shadow it; what they need arrives by environment.
"""
