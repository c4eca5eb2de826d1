"""`convert`: the kv_b_proj of a DeepSeek-format checkpoint, cut once, to one file of AbsorbedWeights a layer."""

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from mla_fp8.cli import EXIT_FAILED, EXIT_OK, Commands, in_shell_words, integer_ranges, ranges_text
from mla_fp8.cli.terminal import Terminal, progress
from mla_fp8.text import size, table, wrap
from mla_fp8.weights import AbsorbedWeights
from mla_fp8.weights.ambient import on_the_cpu
from mla_fp8.weights.checkpoint import KV_B_PROJ, layers, look_up, nearest, read_kv_b_proj, require_rank
from mla_fp8.weights.file import write_weights

SPARE_BYTES = 1 << 20  # of the disk, beside what the files need
HEADINGS = ("layer", "file", "heads", "bytes", "checkpoint", "verified")
DESCRIPTION = """\
Cut kv_b_proj of a DeepSeek-format checkpoint (DeepSeek-V3, R1, Kimi-K2) into
the tensors that absorb_q and v_up read, without loss, one file a layer:
OUT/layer_000.safetensors and so on. A program then maps one and transposes
nothing:

    weights = mla_fp8.AbsorbedWeights.load("OUT/layer_000.safetensors")

All layers are looked at before the first is written. The files are written
beside OUT's, read again and compared byte by byte with the checkpoint, and then
moved to OUT all at once: files that were there stay until all new ones are
whole. A difference gives exit status 1, and OUT is as it was."""
FP8 = "F8_E4M3"  # as safetensors writes it
# Arguments of from_safetensors, by their names here.
OPTIONS = {
    "directory": "DIR",
    "layer": "--layers",
    "tp_rank": "--tp-rank",
    "tp_size": "--tp-size",
    "name": "--name",
}


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
        print(f"error: {in_shell_words(error, 'convert', OPTIONS)}", file=sys.stderr)
        return EXIT_FAILED
    if given.json:
        print(json.dumps([asdict(row) for row in rows], indent=2))
    else:
        show(rows, given.out)
    return EXIT_OK if all(row.verified for row in rows) else EXIT_FAILED


@on_the_cpu()
def convert(given: argparse.Namespace) -> list[Written]:
    """Write every layer beside OUT's files, read each again, and move them there if all are right.

    Raises ValueError and OSError, with OUT's files as they were.
    """
    found = _look_up(given)
    targets = {layer: given.out / f"layer_{layer:03}.safetensors" for layer in found}
    kept = [target.name for target in targets.values() if target.exists()]
    if kept and not given.force:
        raise ValueError(f"convert: OUT must not hold {kept[0]} yet (--force overwrites), got {len(kept)} files there")
    try:
        given.out.mkdir(parents=True, exist_ok=True)
        beside = tempfile.TemporaryDirectory(prefix=".convert-", dir=given.out)
    except OSError as error:
        raise ValueError(f"convert: OUT must be a directory or a place for one, got {given.out}: {error}") from None
    with beside as name, progress("write", "verify", total=len(targets)) as advance:
        new = {layer: Path(name) / target.name for layer, target in targets.items()}
        for number, (layer, path) in enumerate(new.items()):
            weights = _load(given, layer)
            needed = (len(targets) - number) * weights.memory_bytes + SPARE_BYTES
            free = shutil.disk_usage(given.out).free
            if number == 0 and free < needed:
                raise ValueError(f"convert: OUT must have {size(needed)} of free space, got {size(free)}")
            origin = {"layer": layer, "tp_rank": given.tp_rank, "tp_size": given.tp_size}
            write_weights(path, weights.state_dict(), origin)
            advance("write")
        rows = []
        for layer, path in new.items():
            rows.append(_verify(given, layer, path))
            advance("verify")
        if all(row.verified for row in rows):
            for layer, path in new.items():
                path.replace(targets[layer])
    return rows


def _look_up(given: argparse.Namespace) -> list[int]:
    """The layers to write, each of which can be: their names, types and shapes are looked at, not their data."""
    require_rank(given.tp_rank, given.tp_size)
    there = layers(given.directory, given.name)
    wanted = there if given.layers is None else given.layers
    missing = [layer for layer in wanted if layer not in there]
    if missing or not there:
        close = [] if there else nearest(given.directory, given.name + ".weight")
        has = f"layers {ranges_text(there)}" if there else f"no {given.name}.weight"
        has += f"; the nearest names are {', '.join(close)}" if close else ""
        raise ValueError(f"convert: --layers must be in the checkpoint, got {missing or 'none'}: it has {has}")
    kinds = {layer: look_up(given.directory, layer, given.name).weight.kind for layer in wanted}
    plain = [layer for layer, kind in kinds.items() if kind != FP8]
    if plain and not given.quantize_bf16:
        fp8 = [layer for layer in wanted if layer not in plain]
        which = f"layer {plain[0]}" if len(plain) == 1 else f"layers {ranges_text(plain)}"
        hints = "--quantize-bf16 takes others, with loss" + (
            f"; --layers {ranges_text(fp8)} leaves them out" * bool(fp8)
        )
        raise ValueError(f"convert: {which} must be float8_e4m3fn, got {kinds[plain[0]]} ({hints})")
    return wanted


def _load(given: argparse.Namespace, layer: int) -> AbsorbedWeights:
    return AbsorbedWeights.from_safetensors(
        given.directory, layer, given.tp_rank, given.tp_size, quantize_bf16=given.quantize_bf16, name=given.name
    )


def _verify(given: argparse.Namespace, layer: int, path: Path) -> Written:
    """Against what the loader makes, and, where the checkpoint is FP8, the weights put together against its rows."""
    source = read_kv_b_proj(given.directory, layer, given.tp_rank, given.tp_size, given.name)
    kind = str(source.weight.dtype).removeprefix("torch.")
    try:
        got, want = AbsorbedWeights.load(path), _load(given, layer)
    except (ValueError, OSError) as error:
        return Written(layer, path.name, source.dims.num_heads, 0, kind, False, str(error))
    pairs = [(name, buffer, getattr(want, name)) for name, buffer in got.named_buffers()]
    if source.scale is not None:
        rows = torch.cat([got.w_uk.mT.view(torch.uint8), got.w_uv.view(torch.uint8)], 1)
        pairs.append(("kv_b_proj", rows.view(source.weight.shape), source.weight))
    difference = next(filter(None, (_difference(*pair) for pair in pairs)), "")
    return Written(layer, path.name, got.num_heads, path.stat().st_size, kind, not difference, difference)


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
    written = f"\n{len(rows)} files, {size(sum(row.bytes for row in rows))}"
    if passed == len(rows):
        terminal.print(f"{written}, in {out}; {passed} verified.")
        terminal.print(f'AbsorbedWeights.load("{out / rows[0].file}") reads one.')
    else:
        terminal.print(f"{written}; {passed} verified. {out} is as it was.", "bold red")
