"""`info`: what runs here, on which devices, with which kernels."""

import argparse
import json
from typing import Any

from rich.console import Console, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from mla_fp8 import devices
from mla_fp8.cli import EXIT_OK, Commands, ranges_text, table_console


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
        show(values, table_console())
    return EXIT_OK


def show(values: dict[str, Any], console: Console) -> None:
    versions, jit = values["versions"], values["jit"]
    console.print("[bold]mla_fp8 {mla_fp8}[/], torch {torch}, Python {python}, {platform}".format(**versions))
    console.print(values["library"], style="dim", markup=False, soft_wrap=True)

    _heading(console, "Devices")
    rows = _table()
    for device in values["devices"]:
        rows.add_row(device["device"], f"{device['name']}, {_details(device)}")
    if values["no_cuda"]:
        rows.add_row("cuda", f"none: {values['no_cuda']}", style="yellow")
    _print(console, rows)

    _heading(console, f"Kernels for compute capability {devices.SUPPORTED} in the library")
    kernels = _table()
    for image in values["embedded"]:
        kernels.add_row(image["op"], f"{image['kernels']} tiles", f"{image['bytes']:,} bytes")
    _print(console, kernels if values["embedded"] else "none: built without nvcc, so NVRTC compiles at first use")

    _heading(console, "JIT cache, for kernels that are not embedded or that the driver refuses")
    console.print(f"  {jit['cache']}", markup=False, soft_wrap=True)
    files = _table()
    for file in jit["files"]:
        files.add_row(file["file"], f"{file['bytes']:,} bytes", "current" if file["current"] else "of other sources")
    _print(console, files if jit["files"] else "holds no kernels")
    would = f"NVRTC {jit['nvrtc']} is here to compile them"
    _print(console, would if jit["nvrtc"] else Text(jit["problem"], style="yellow"))

    _heading(console, "What a call runs")
    paths = _table()
    for op in dict.fromkeys(row["op"] for row in values["paths"]):
        for index, (names, path, why) in enumerate(_merged([row for row in values["paths"] if row["op"] == op])):
            paths.add_row("" if index else op, names, path, why, style="red" if path == "error" else None)
    _print(console, paths)

    _heading(console, "Other packages")
    found = [f"{name} {version}" for name, version in values["packages"].items() if version]
    missing = [name for name, version in values["packages"].items() if not version]
    _print(console, f"{', '.join(found) or 'none'}; not installed: {', '.join(missing) or 'none'}")


def _heading(console: Console, text: str) -> None:
    console.print(f"\n[bold]{text}[/]")


def _print(console: Console, content: RenderableType) -> None:
    console.print(Padding(content, (0, 0, 0, 2), expand=False))


def _table() -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    return table


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
