"""The command line: `python -m mla_fp8 info`, `check`, `bench`, `explain` and `convert`; each has --help."""

import argparse
import importlib.metadata
import os
import sys
from collections.abc import Sequence

DEPENDENCIES = ("safetensors",)  # of the package, which may have been installed without them
MISSING = 2
NO_COMMAND = 2
INTERRUPTED = 130  # as a shell reports it
PIPE_CLOSED = 141  # likewise


def parser() -> argparse.ArgumentParser:
    from mla_fp8.cli import bench, check, convert, explain, info

    top = argparse.ArgumentParser(prog="python -m mla_fp8", description="FP8 projections around MLA attention.")
    top.add_argument("--version", action="version", version=f"mla_fp8 {importlib.metadata.version('mla_fp8')}")
    commands = top.add_subparsers(dest="command", metavar="COMMAND")
    for command in (info, check, bench, explain, convert):
        command.add(commands).set_defaults(run=command.run)
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    try:
        top = parser()
        given = top.parse_args(arguments)
        if given.command is None:
            top.print_help(sys.stderr)
            return NO_COMMAND
        status: int = given.run(given)
        sys.stdout.flush()
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in DEPENDENCIES:
            raise
        print(f"error: python -m mla_fp8 needs {package}: pip install {package}", file=sys.stderr)
        status = MISSING
    except KeyboardInterrupt:
        status = INTERRUPTED
    except BrokenPipeError:  # of `| head`: nobody reads on, and the interpreter's own flush must not complain
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = PIPE_CLOSED
    return status


if __name__ == "__main__":
    sys.exit(main())
