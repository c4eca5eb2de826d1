"""The tables of layers/, and the tables and the sentence that results/quality.json becomes."""

from collections.abc import Mapping
from typing import Any

from .report import Rows, markdown, microseconds, note

OURS = "block FP8 weights, exact activations: mla_fp8"
OURS_FP8 = "block FP8 weights and activations: mla_fp8"
REFERENCE = "HF, fp32"
ALONE = ", all else fp32"
COLUMNS = ("NLL", "over HF fp32, 1e-4", "KL, 1e-4", "KL from the checkpoint, 1e-4", "same top-1")


def decode_step(rows: Rows) -> str:
    """Per H, batch and context: µs of each part, attention by every backend, and the shares."""
    backends = list(dict.fromkeys(row["backend"] for row in rows if row["part"] == "attention"))
    shapes = list(dict.fromkeys((row["heads"], row["batch"], row["context"]) for row in rows))
    lines = []
    for shape in shapes:
        case = {
            (row["part"], row["backend"]): row for row in rows if (row["heads"], row["batch"], row["context"]) == shape
        }
        own = [case["absorb_q", "mla_fp8"], case["v_up", "mla_fp8"]]
        attentions = [case.get(("attention", backend)) for backend in backends]
        fastest = next((row for row in attentions if row and row.get("share")), None)
        shares = " / ".join(
            f"{row['share']:.0%}" if row and row.get("share") else "?" for row in (own[0], fastest, own[1])
        )
        step = next((_part(row) for (part, _), row in case.items() if part == "step"), "")
        cells = [_part(own[0]), *(_part(row, row is fastest) for row in attentions), _part(own[1]), shares, step]
        lines.append(["{}, {}, {}".format(*shape), *cells])
    problems = {f"{row['backend']}: {row['status']}: {row['reason']}" for row in rows if row["status"] != "ok"}
    told = note("µs, median, weights and cache cold; **fastest** attention, of which the shares are", rows[0])
    header = ["H, batch, context", "absorb_q", *backends, "v_up", "share: absorb_q / attention / v_up", "in one graph"]
    return markdown(header, lines) + told + "".join(f"{problem}\n" for problem in sorted(problems))


def _part(row: Mapping[str, Any] | None, bold: bool = False) -> str:
    if row is None or row.get("us") is None:
        return "" if row is None else row["status"]
    return f"**{microseconds(row['us'])}**" if bold else microseconds(row["us"])


def tensor_parallel(rows: Rows) -> str:
    """Per number of ranks: µs a step for each batch; in brackets, one rank's time over it."""
    batches = list(dict.fromkeys(row["batch"] for row in rows))
    us = {(row["ranks"], row["batch"]): row["us"] for row in rows}
    lines = []
    for ranks in sorted({row["ranks"] for row in rows}):
        cells = [f"{microseconds(us[ranks, batch])} ({us[1, batch] / us[ranks, batch]:.2f}x)" for batch in batches]
        lines.append([str(ranks), *cells])
    first = rows[0]
    shape = f"{first['heads']} heads, hidden size {first['hidden']}, context {first['context']}"
    told = note(f"µs a step, median of the slowest rank, {shape}; in brackets, one GPU's time over it", first)
    return markdown(["GPUs", *(f"batch {batch}" for batch in batches)], lines) + told


def engine(rows: Rows) -> str:
    """Per H, context and batch of decode steps in an engine: from q_b_proj to o_proj, and a whole step."""
    cases = {
        label: {
            (row["measure"], row["heads"], row["context"], row["batch"]): row
            for row in rows
            if row.get("label") == label and row["measure"] in ("timeline", "step")
        }
        for label in ("stock", "plugin")
    }
    lines = []
    for case, stock in cases["stock"].items():
        plugin = cases["plugin"][case]
        if case[0] == "timeline":
            times = [f"{row['us']:.1f}" for row in (stock, plugin)]
            cells = ["q_b_proj to o_proj, µs", *case[1:], *times, f"{stock['us'] - plugin['us']:+.1f}"]
        else:
            times = [f"{row['ms']:.2f} ({row['ms_min']:.2f} to {row['ms_max']:.2f})" for row in (stock, plugin)]
            cells = ["a step, ms", *case[1:], *times, f"{stock['ms'] - plugin['ms']:+.2f}"]
        lines.append(list(map(str, cells)))
    first = rows[0]
    told = note(
        f"Medians, {first['engine']}, {first['layers']} layers, all sequences decoding; in brackets the range", first
    )
    header = ["", "H", "context", "batch", "stock", "with mla_fp8", "less"]
    return markdown(header, lines) + told


def engine_bars(rows: Rows) -> str:
    """Memory, counts and accuracy, as compare.py judged them; the times stand in the table above."""
    lines = [
        [
            str(row["heads"]),
            row["bar"],
            row["found"],
            "not measured" if row["kept"] is None else "yes" if row["kept"] else "no",
        ]
        for row in rows
        if row["measure"] == "verdict"
        and not row["bar"].startswith(("batch 1,", "batch 8,", "batch 32,", "batch 128,"))
    ]
    return markdown(["H", "bar", "found", "kept"], lines) + note(
        f"{rows[0]['engine']}, {rows[0]['layers']} layers", rows[0]
    )


def prefill(rows: Rows) -> str:
    """Per H and tokens: from how many queries on expanded is faster, and enable() takes it."""
    queries = {(row["heads"], row["tokens"], row["launched"]): row["queries"] for row in rows}
    rules = {(row["heads"], row["tokens"]): row["rule"] for row in rows}
    lines = [
        [str(heads), str(tokens), *(str(queries[heads, tokens, how]) for how in ("graph", "eager")), str(rule)]
        for (heads, tokens), rule in rules.items()
    ]
    told = note("Queries from which the expanded way is faster, and from which `enable` takes it", rows[0])
    return markdown(["H", "tokens in the cache", "in a CUDA graph", "eager", "rule"], lines) + told


def named(rows: Rows, variant: str, octaves: int = 0) -> Mapping[str, Any]:
    (row,) = (row for row in rows if (row["variant"], row["octaves"]) == (variant, octaves))
    return row


def ten_thousandths(value: float) -> str:
    """Three significant digits of value / 1e-4, down to a thousandth."""
    scaled = value * 1e4
    if 0 < scaled < 1e-3:
        return "< 0.001"
    return f"{scaled:.{3 if scaled < 1 else 2 if scaled < 10 else 1 if scaled < 100 else 0}f}"


def quality(rows: Rows) -> str:
    """NLL of what knows less; every variant; the KL of those that the heads' spread changes."""
    known = [[row["variant"], f"{row['nll']:.3f}"] for row in rows if row["part"] != "variant"]
    known.append(["**the model: transformers, fp32**", f"**{named(rows, REFERENCE)['nll']:.3f}**"])
    variants = [row for row in rows if row["part"] == "variant"]
    plain = [row for row in variants if row["octaves"] == 0]
    octaves = sorted({row["octaves"] for row in variants})
    spread = [
        [name, *(_kl(named(rows, name, one)) for one in octaves)]
        for name in dict.fromkeys(row["variant"] for row in variants if row["octaves"])
    ]
    factors = [f"2^{one}" if one else "1" for one in octaves]
    tables = [
        markdown(["", "NLL"], known),
        markdown(["", *COLUMNS], [_line(row) for row in plain if ALONE not in row["variant"]]),
        markdown(["all else in fp32", *COLUMNS], [_line(row) for row in plain if ALONE in row["variant"]]),
        markdown(["KL, 1e-4; head 0's weights over the others'", *factors], spread),
    ]
    return "\n".join([*tables, _trained(rows[0])])


def _line(row: Mapping[str, Any]) -> list[str]:
    delta = f"{row['delta'] * 1e4:+.1f} ± {row['delta_se'] * 1e4:.1f}"
    top = f"{row['agreement']:.2%} ± {row['agreement_se']:.2%}"
    cells = [f"{row['nll']:.4f}", delta, _kl(row), _kl(row, "checkpoint_kl"), top]
    if row["variant"] == REFERENCE:
        cells[1:3] = ["0", "0"]
        cells[-1] = "100%"
    return (
        [f"**{row['variant']}**", *(f"**{cell}**" for cell in cells)]
        if row["variant"] == OURS
        else [row["variant"].removesuffix(ALONE), *cells]
    )


def _kl(row: Mapping[str, Any], which: str = "kl") -> str:
    value = ten_thousandths(row[which])
    return value if value.startswith("<") else f"{value} ± {ten_thousandths(row[f'{which}_se'])}"


def _trained(row: Mapping[str, Any]) -> str:
    characters = row["blocks"] * row["recipe"]["context"]
    return (
        f"Nats per character, ± the standard error over {row['blocks']} blocks, together {characters:,} characters. "
        f"{row['parameters']:,} parameters, trained on {row['read_characters']:,} characters in "
        f"{row['train_seconds']:,} s ({row['train_processor_seconds']:,} s of processor time in "
        f"{row['threads']} threads). {row['cpu']}, {row['capability']}, torch {row['torch']}, "
        f"transformers {row['transformers']}, Python {row['python']}, {row['commit']}, {row['date']}.\n"
    )


def sentence(rows: Rows) -> str:
    """README's claim."""
    shown = {
        "fp32": named(rows, REFERENCE),
        "bf16": named(rows, "absorbed, bf16"),
        "blocks": named(rows, "block FP8 weights"),
        "ours": named(rows, OURS),
        "fp8": named(rows, OURS_FP8),
        "tensor": named(rows, "per-tensor FP8 weights and activations"),
    }
    nll = {name: f"{row['nll']:.4f}" for name, row in shown.items()}
    kl = {name: f"{row['kl']:.1e}" for name, row in shown.items()}
    same = {name: f"{row['agreement']:.1%}" for name, row in shown.items()}
    return (
        f"A small character model with DeepSeek-V3's MLA dims, trained on Python's standard library, has an NLL of "
        f"{nll['fp32']} nats\na character in fp32, {nll['bf16']} in bf16 and {nll['ours']} with `enable(model)`. "
        f"KL from fp32 and equal top-1: {kl['bf16']} and {same['bf16']} in bf16,\n"
        f"{kl['blocks']} and {same['blocks']} on FP8 blocks dequantized to bf16, {kl['ours']} and {same['ours']} with "
        f"`enable(model)`, {kl['fp8']} and {same['fp8']} with FP8\nactivations, {kl['tensor']} and {same['tensor']} "
        "with per-tensor FP8. It is no evaluation of DeepSeek-V3: docs/accuracy.md has the method and the limits.\n"
    )
