"""Evaluate: `tempolora evaluate` for launchers that want a file."""

import sys

from tempolora.cli import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
