"""Precompute: `tempolora precompute` for launchers that want a file (torchrun, srun, python)."""

import sys

from tempolora.cli import main

if __name__ == "__main__":
    sys.exit(main(["precompute", *sys.argv[1:]]))
