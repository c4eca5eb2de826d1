"""`info`: what runs here, on which devices, with which kernels."""

import argparse
import itertools
import json
from collections.abc import Sequence
from typing import Any

from mla_fp8 import devices
from mla_fp8.cli import EXIT_OK, Commands, ranges_text
from mla_fp8.cli.terminal import Terminal
from mla_fp8.text import table, wrap

INDENT = "  "


def add(commands: Commands) -> argparse.ArgumentParser:
    command = commands.add_parser(
        "info",
        help="print versions, devices, kernels, and which path each op takes here",
        description="Print versions, devices, which kernels are embedded in the library, what the JIT cache holds, and "
        "which path each op takes on each device here, and why. Compiles nothing.",
    )
    command.add_argument("--json", action="store_true", help="print the values as JSON")
    return command


def run(given: argparse.Namespace) -> int:
    from mla_fp8.cli import facts  # loads torch, which --help does not need

    values = facts.collect()
    if given.json:
        print(json.dumps(values, indent=2))
    else:
        show(values, Terminal())
    return EXIT_OK


def show(values: dict[str, Any], terminal: Terminal) -> None:
    versions, jit = values["versions"], values["jit"]
    first = "mla_fp8 {mla_fp8}, torch {torch}, Python {python}, {platform}".format(**versions)
    terminal.print_lines(wrap(first, terminal.width), "bold")
    terminal.print(values["library"], "dim")

    _heading(terminal, "Devices")
    found = [(device["device"], f"{device['name']}, {_details(device)}", "") for device in values["devices"]]
    found += [("cuda", f"none: {values['no_cuda']}", "yellow")] * bool(values["no_cuda"])
    _table(terminal, [cells for *cells, _ in found], styles=[style for *_, style in found])

    _heading(terminal, f"Kernels for compute capability {devices.SUPPORTED} in the library")
    images: list[Sequence[str]] = [
        (image["image"], f"{image['kernels']} tiles", f"{image['bytes']:,} bytes") for image in values["embedded"]
    ]
    _table(terminal, images or [("none: built without nvcc, so NVRTC compiles at first use",)])

    _heading(terminal, "JIT cache, for kernels that are not embedded or that the driver refuses")
    terminal.print(INDENT + jit["cache"])
    files: list[Sequence[str]] = [
        (file["file"], f"{file['bytes']:,} bytes", "current" if file["current"] else "of other sources")
        for file in jit["files"]
    ]
    _table(terminal, files or [("holds no kernels",)])
    if jit["nvrtc"]:
        _text(terminal, f"NVRTC {jit['nvrtc']} is here to compile them")
    elif any(row["path"] == "embedded" for row in values["paths"]):
        _text(terminal, "NVRTC is not here, and not needed: the GPU runs the embedded kernels")
    elif values["embedded"] and not any(row["path"] == "error" for row in values["paths"]):
        _text(terminal, f"NVRTC is not here; a GPU that runs the embedded kernels needs none. {jit['problem']}")
    else:
        _text(terminal, jit["problem"], "yellow")

    _heading(terminal, "What a call runs")
    _paths(terminal, values["paths"])

    _heading(terminal, "Other packages")
    there = [f"{name} {version}" for name, version in values["packages"].items() if version]
    missing = [name for name, version in values["packages"].items() if not version]
    _text(terminal, f"{', '.join(there) or 'none'}; not installed: {', '.join(missing) or 'none'}")


def _heading(terminal: Terminal, text: str) -> None:
    terminal.print(f"\n{text}", "bold")


def _text(terminal: Terminal, text: str, style: str = "") -> None:
    terminal.print_lines(wrap(text, terminal.width, INDENT), style)


def _table(terminal: Terminal, rows: Sequence[Sequence[str]], styles: Sequence[str] = ()) -> None:
    """Rows, each in its style, whose last cells wrap."""
    last = len(rows[0]) - 1
    lines = table(rows, align="<" * len(rows[0]), width=terminal.width, flexible=last, indent=INDENT)
    for row, style in itertools.zip_longest(lines, styles, fillvalue=""):
        terminal.print_lines(row, style)


def _paths(terminal: Terminal, paths: list[dict[str, str]]) -> None:
    rows = []
    for op in dict.fromkeys(row["op"] for row in paths):
        merged = _merged([row for row in paths if row["op"] == op])
        rows += [("" if index else op, *row) for index, row in enumerate(merged)]
    _table(terminal, rows, styles=["red" if path == "error" else "" for _, _, path, _ in rows])


def _details(device: dict[str, Any]) -> str:
    if device["device"] == "cpu":
        return (
            f"{device['threads']} threads, {device['instruction_set']} kernels (torch: {device['capability_of_torch']})"
        )
    memory = f"{device['memory_bytes'] / 2**30:.0f} GiB"
    return f"compute capability {device['capability']}, {device['sms']} SMs, {memory}"


def _merged(rows: list[dict[str, str]]) -> list[tuple[str, str, str]]:
    """Devices on which an op takes the same path for the same reason share a line."""
    merged: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        merged.setdefault((row["path"], row["why"]), []).append(row["device"])
    return [(_names(devices), path, why) for (path, why), devices in merged.items()]


def _names(devices: list[str]) -> str:
    """cpu; cuda:0-7"""
    indices = [int(device.removeprefix("cuda:")) for device in devices if device != "cpu"]
    return ", ".join(["cpu"] * ("cpu" in devices) + [f"cuda:{ranges_text(indices)}"] * bool(indices))
