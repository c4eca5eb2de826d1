"""`explain`: which compiled tile runs a problem, and why. Colours only on a terminal."""

import argparse
import json
import sys
from collections.abc import Sequence

from mla_fp8.cli import EXIT_FAILED, EXIT_OK, Commands, in_shell_words, integer_of
from mla_fp8.cli.terminal import Terminal
from mla_fp8.config import Device, explain
from mla_fp8.explain.device import modelled
from mla_fp8.explain.explanation import lines
from mla_fp8.explain.problem import DEFAULT_EXTENTS, DEFAULT_M_ALIGNMENT, OUT_BYTES
from mla_fp8.formats import MODES

EXTENTS = integer_of(-(2**63), 2**63 - 1)  # the kernels' own bounds come with their reasons
# Arguments of mla_fp8.config.explain, by their names here.
OPTIONS = {name: f"--{name}" for name in ("s", "heads", "n", "k", "pe")} | {
    "m_alignment": "--m-alignment",
    "out_dtype": "--out-dtype",
    "align_bytes": "--align",
}


def add(commands: Commands) -> argparse.ArgumentParser:
    command = commands.add_parser(
        "explain",
        help="print which compiled tile runs a problem, and why",
        description="Print every compiled tile of an op: its modelled cost on this problem, the one that runs it, and "
        "why the others do not. Exits with 1 if no kernel takes the problem.",
    )
    command.add_argument("--op", required=True, choices=DEFAULT_EXTENTS, metavar="OP", help=", ".join(DEFAULT_EXTENTS))
    command.add_argument("--s", required=True, type=EXTENTS, help="tokens (rows of a for bmm)")
    command.add_argument("--heads", type=EXTENTS, default=128, help="heads (batch for bmm); default %(default)s")
    command.add_argument("--n", type=EXTENTS, help="columns of the product; default: DeepSeek-V3's")
    command.add_argument("--k", type=EXTENTS, help="extent that is summed over; default: DeepSeek-V3's")
    command.add_argument("--pe", type=EXTENTS, default=0, help="columns of q_pe for absorb_q; default %(default)s")
    command.add_argument(
        "--m-alignment",
        type=EXTENTS,
        default=DEFAULT_M_ALIGNMENT,
        help="rows that quantize_q_nope pads to; default %(default)s",
    )
    command.add_argument(
        "--activations", choices=MODES, default=MODES[0], help="kept whole or quantized; default %(default)s"
    )
    command.add_argument(
        "--out-dtype",
        choices=OUT_BYTES,
        metavar="DTYPE",
        help=f"{', '.join(OUT_BYTES)}; default: bfloat16 where the op writes it",
    )
    command.add_argument(
        "--align", type=EXTENTS, default=16, help="alignment of activations and output in bytes; default %(default)s"
    )
    command.add_argument(
        "--device",
        action="append",
        default=[],
        type=_setting,
        metavar="GPU",
        help="what to model: h100, or the index of a GPU; default: the GPU here, else h100. NAME=VALUE changes "
        f"a limit or speed: {', '.join(Device._fields)}; may be given again",
    )
    command.add_argument("--json", action="store_true", help="print the values as JSON")
    return command


def _setting(text: str) -> Device | int | tuple[str, float]:
    if text == "h100":
        return Device()
    if text.isdecimal():
        return int(text)
    name, equals, value = text.partition("=")
    if not equals or name not in Device._fields:
        rule = "must be h100, an index or NAME=VALUE, as in num_sms=114 (--help lists NAMEs)"
        raise argparse.ArgumentTypeError(f"{rule}, got {text!r}")
    try:
        return name, type(getattr(Device(), name))(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{name} must be a number, got {value!r}") from None


def _device(settings: Sequence[Device | int | tuple[str, float]]) -> Device | int | None:
    """What `explain` takes: the last GPU that was named, with the changes."""
    changes = dict(setting for setting in settings if isinstance(setting, tuple))
    named = [setting for setting in settings if not isinstance(setting, tuple)]
    base = named[-1] if named else None
    if not changes:
        return base
    limits, _ = modelled(base)
    return Device(**{name: getattr(limits, name) for name in Device._fields} | changes)


def run(given: argparse.Namespace) -> int:
    try:
        explanation = explain(
            given.op,
            given.s,
            given.heads,
            n=given.n,
            k=given.k,
            pe=given.pe,
            m_alignment=given.m_alignment,
            activations=given.activations,
            out_dtype=given.out_dtype,
            align_bytes=given.align,
            device=_device(given.device),
        )
    except (ValueError, TypeError, RuntimeError) as error:
        print(f"error: {in_shell_words(error, 'explain', OPTIONS)}", file=sys.stderr)
        return EXIT_FAILED
    if given.json:
        print(json.dumps(explanation.to_dict(), indent=2))
    else:
        terminal = Terminal()
        for line, style in lines(explanation, terminal.width):
            terminal.print(line, style)
    return EXIT_OK if explanation.winner else EXIT_FAILED
