"""The command line: `python -m mla_fp8 info`, `check`, `bench`, `explain` and `convert`; each has --help."""

import argparse
import sys
from collections.abc import Sequence

INTERRUPTED = 130  # as a shell reports it


def parser() -> argparse.ArgumentParser:
    from mla_fp8.cli import bench, check, convert, explain, info

    top = argparse.ArgumentParser(prog="python -m mla_fp8", description="FP8 projections around MLA attention.")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in (info, check, bench, explain, convert):
        command.add(commands).set_defaults(run=command.run)
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    try:
        given = parser().parse_args(arguments)
    except ModuleNotFoundError as error:  # rich, where the package was installed without what it depends on
        print(f"error: the command line needs {error.name}: pip install {error.name}", file=sys.stderr)
        return 1
    try:
        status: int = given.run(given)
    except KeyboardInterrupt:
        status = INTERRUPTED
    return status


if __name__ == "__main__":
    sys.exit(main())
