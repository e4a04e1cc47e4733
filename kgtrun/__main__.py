"""`python -m kgtrun` and the console command."""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Entry point of the console command."""
    # `python -m` puts the working directory first, where a user's own launcher.py would be taken for ours.
    ours = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    if __name__ == "__main__" and not sys.flags.safe_path and os.path.abspath(sys.path[0]) != ours:
        sys.path.pop(0)
        if ours not in map(os.path.abspath, sys.path):
            sys.path.insert(0, ours)
    from kgtrun.cli import main as command_line

    sys.exit(command_line(sys.argv[1:]))


if __name__ == "__main__":
    main()
