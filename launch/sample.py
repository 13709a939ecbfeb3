"""Sample: `tempolora sample` for launchers that want a file."""

import sys

from tempolora.cli import main

if __name__ == "__main__":
    sys.exit(main(["sample", *sys.argv[1:]]))
