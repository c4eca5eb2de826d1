"""`convert`: the kv_b_proj of a DeepSeek-format checkpoint, cut once, to one file of AbsorbedWeights a layer."""

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from mla_fp8.cli import EXIT_FAILED, EXIT_OK, Commands, integer_ranges, ranges_text
from mla_fp8.cli.terminal import Terminal, progress
from mla_fp8.text import size, table, wrap
from mla_fp8.weights import AbsorbedWeights
from mla_fp8.weights.checkpoint import KV_B_PROJ, layers, read_kv_b_proj
from mla_fp8.weights.file import write_weights

SPARE_BYTES = 1 << 20  # of the disk, beside what the files need
HEADINGS = ("layer", "file", "heads", "bytes", "checkpoint", "verified")
DESCRIPTION = """\
Cut kv_b_proj of a DeepSeek-format checkpoint (DeepSeek-V3, R1, Kimi-K2) into
the tensors that absorb_q and v_up read, without loss, one file a layer:
OUT/layer_000.safetensors and so on. A program then maps one and transposes
nothing:

    weights = mla_fp8.AbsorbedWeights.load("OUT/layer_000.safetensors")

Each file is written whole or not at all. At the end all are read again and
compared byte by byte with the checkpoint; a difference gives exit status 1."""


@dataclass(frozen=True)
class Written:
    """What became of one layer; a row of the table and of --json."""

    layer: int
    file: str
    heads: int
    bytes: int  # of the file
    checkpoint: str  # the type of kv_b_proj there
    verified: bool
    difference: str = ""


def add(commands: Commands) -> argparse.ArgumentParser:
    command = commands.add_parser(
        "convert",
        help="cut a checkpoint's kv_b_proj to one file of AbsorbedWeights a layer",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("directory", metavar="DIR", type=Path, help="checkpoint: config.json and *.safetensors")
    command.add_argument("out", metavar="OUT", type=Path, help="directory for the files, made if it is not there")
    command.add_argument("--layers", type=integer_ranges, help="as in 0,3-5; default: all that have a kv_b_proj")
    command.add_argument("--tp-rank", type=int, default=0, help="write this rank's heads only; default %(default)s")
    command.add_argument("--tp-size", type=int, default=1, help="number of ranks; default %(default)s")
    command.add_argument("--name", default=KV_B_PROJ, help="of the tensors, before .weight; default %(default)s")
    command.add_argument("--quantize-bf16", action="store_true", help="take a checkpoint without FP8, with loss")
    command.add_argument("--force", action="store_true", help="overwrite files that are there")
    command.add_argument("--json", action="store_true", help="print the values as JSON")
    return command


def run(given: argparse.Namespace) -> int:
    try:
        rows = convert(given)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_FAILED
    if given.json:
        print(json.dumps([asdict(row) for row in rows], indent=2))
    else:
        show(rows, given.out)
    return EXIT_OK if all(row.verified for row in rows) else EXIT_FAILED


def convert(given: argparse.Namespace) -> list[Written]:
    """Write every layer, then read every file again. Raises ValueError and OSError before it overwrites anything."""
    there = layers(given.directory, given.name)
    wanted = there if given.layers is None else given.layers
    missing = [layer for layer in wanted if layer not in there]
    if missing or not there:
        has = f"layers {ranges_text(there)}" if there else f"no {given.name}.weight"
        raise ValueError(f"convert: --layers must be in the checkpoint, got {missing or 'none'}: it has {has}")
    targets = {layer: given.out / f"layer_{layer:03}.safetensors" for layer in wanted}
    kept = [target.name for target in targets.values() if target.exists()]
    if kept and not given.force:
        raise ValueError(f"convert: OUT must not hold {kept[0]} yet (--force overwrites), got {len(kept)} files there")
    try:
        given.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"convert: OUT must be a directory or a place for one, got {given.out}: {error}") from None
    with progress("write", "verify", total=len(targets)) as advance:
        for number, (layer, target) in enumerate(targets.items()):
            weights = _load(given, layer)
            needed = (len(targets) - number) * weights.memory_bytes + SPARE_BYTES
            free = shutil.disk_usage(given.out).free
            if number == 0 and free < needed:
                raise ValueError(f"convert: OUT must have {size(needed)} of free space, got {size(free)}")
            origin = {"layer": layer, "tp_rank": given.tp_rank, "tp_size": given.tp_size}
            write_weights(target, weights.state_dict(), origin)
            advance("write")
        rows = []
        for layer, target in targets.items():
            rows.append(_verify(given, layer, target))
            advance("verify")
    return rows


def _load(given: argparse.Namespace, layer: int) -> AbsorbedWeights:
    return AbsorbedWeights.from_safetensors(
        given.directory, layer, given.tp_rank, given.tp_size, quantize_bf16=given.quantize_bf16, name=given.name
    )


def _verify(given: argparse.Namespace, layer: int, target: Path) -> Written:
    """Against what the loader makes, and, where the checkpoint is FP8, the weights put together against its rows."""
    source = read_kv_b_proj(given.directory, layer, given.tp_rank, given.tp_size, given.name)
    kind = str(source.weight.dtype).removeprefix("torch.")
    try:
        got, want = AbsorbedWeights.load(target), _load(given, layer)
    except (ValueError, OSError) as error:
        return Written(layer, target.name, source.dims.num_heads, 0, kind, False, str(error))
    pairs = [(name, buffer, getattr(want, name)) for name, buffer in got.named_buffers()]
    if source.weight_scale_inv is not None:
        pairs.append(("kv_b_proj", torch.cat([got.w_uk.mT, got.w_uv], 1).view(source.weight.shape), source.weight))
    difference = next(filter(None, (_difference(*pair) for pair in pairs)), "")
    return Written(layer, target.name, got.num_heads, target.stat().st_size, kind, not difference, difference)


def _difference(name: str, got: Tensor, want: Tensor) -> str:
    """Empty where all bytes are equal; else which the first other one is."""
    if got.shape != want.shape:
        return f"{name} has shape {list(got.shape)}, want {list(want.shape)}"
    got_bytes, want_bytes = (tensor.contiguous().view(torch.uint8) for tensor in (got, want))
    wrong = (got_bytes != want_bytes).nonzero()
    if not len(wrong):
        return ""
    index = tuple(wrong[0].tolist())
    byte, expected = int(got_bytes[index]), int(want_bytes[index])
    return f"{name}: {len(wrong)} bytes differ, the first at {list(index)}: got {byte:#04x}, want {expected:#04x}"


def show(rows: Sequence[Written], out: Path) -> None:
    terminal = Terminal()
    cells = [HEADINGS]
    for row in rows:
        verdict = "PASS" if row.verified else "DIFFERS"
        cells.append((str(row.layer), row.file, str(row.heads), f"{row.bytes:,}", row.checkpoint, verdict))
    styles = ["bold", *("" if row.verified else "bold red" for row in rows)]
    lines = table(cells, align="><>><<", width=terminal.width, flexible=HEADINGS.index("file"))
    for style, row_lines in zip(styles, lines, strict=True):
        terminal.print_lines(row_lines, style)
    for row in rows:
        if row.difference:
            terminal.print_lines(wrap(f"{row.file}: {row.difference}", terminal.width), "red")
    passed = sum(row.verified for row in rows)
    terminal.print(f"\n{len(rows)} files, {size(sum(row.bytes for row in rows))}, in {out}; {passed} verified.")
    terminal.print(f'AbsorbedWeights.load("{out / rows[0].file}") reads one.')
