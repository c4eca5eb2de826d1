"""The command line: `python -m mla_fp8 info`, `check`, `bench`, `explain` and `convert`; each has --help."""

import argparse
import sys
from collections.abc import Sequence

DEPENDENCIES = ("rich", "safetensors")  # of the package, which may have been installed without them
MISSING = 2
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
        status: int = given.run(given)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in DEPENDENCIES:
            raise
        print(f"error: python -m mla_fp8 needs {package}: pip install {package}", file=sys.stderr)
        status = MISSING
    except KeyboardInterrupt:
        status = INTERRUPTED
    return status


if __name__ == "__main__":
    sys.exit(main())
