"""Train: `tempolora train` for launchers that want a file (deepspeed, torchrun, python)."""

import sys

from tempolora.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
