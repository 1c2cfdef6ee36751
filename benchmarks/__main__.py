"""Command line of the benchmarks: `python -m benchmarks NAME [options]`."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

NAMES = sorted(file.stem for file in Path(__file__).parent.glob("*.py") if not file.stem.startswith("_"))


def main() -> None:
    """Runs the benchmark named by the first argument with the remaining arguments."""
    if len(sys.argv) < 2 or sys.argv[1] not in NAMES:
        print("usage: python -m benchmarks NAME [--help]\n")
        for name in NAMES:
            print(f"  {name:<16} {(import_module(f'benchmarks.{name}').__doc__ or '').splitlines()[0]}")
        sys.exit(0 if "--help" in sys.argv[1:] else 2)
    import_module(f"benchmarks.{sys.argv[1]}").main(sys.argv[2:])


if __name__ == "__main__":
    main()
