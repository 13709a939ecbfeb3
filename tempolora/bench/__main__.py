"""`python -m tempolora.bench NAME`: each module beside this one is a measurement with `main`."""

import argparse
import importlib

NAMES = (
    "guidance",
    "kernels",
    "load",
    "loader",
    "memory",
    "plan",
    "precompute",
    "resample",
    "rhythm",
    "scaling",
    "step",
    "traffic",
)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tempolora.bench", description=__doc__)
    parser.add_argument("name", choices=NAMES, help="which measurement")
    parser.add_argument("rest", nargs=argparse.REMAINDER, help="its own options; see NAME --help")
    chosen = parser.parse_args()
    importlib.import_module(f"tempolora.bench.{chosen.name}").main(chosen.rest)


if __name__ == "__main__":
    main()
