"""The tables of what stands around the ops: a decode step, its GPUs, a prefill, SGLang's hook."""

from collections.abc import Mapping
from typing import Any

from tabular import Rows, markdown, microseconds, where_from


def decode_step(rows: Rows) -> str:
    """Per H, batch and context: µs of each part, every backend's attention among them, and the shares."""
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
    origin = where_from(rows[0])
    note = f"µs, median, weights and cache cold; **fastest** attention, of which the shares are. {origin}.\n"
    header = ["H, batch, context", "absorb_q", *backends, "v_up", "share: absorb_q / attention / v_up", "in one graph"]
    return markdown(header, lines) + "\n" + note + "".join(f"{problem}\n" for problem in sorted(problems))


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
    note = (
        f"µs a step, median of the slowest rank, {shape}; in brackets, one GPU's time over it. {where_from(first)}.\n"
    )
    return markdown(["GPUs", *(f"batch {batch}" for batch in batches)], lines) + "\n" + note


def prefill(rows: Rows) -> str:
    """Per H and tokens: from how many queries on the expanded way is faster, and from how many enable() takes it."""
    queries = {(row["heads"], row["tokens"], row["launched"]): row["queries"] for row in rows}
    rules = {(row["heads"], row["tokens"]): row["rule"] for row in rows}
    lines = [
        [str(heads), str(tokens), *(str(queries[heads, tokens, how]) for how in ("graph", "eager")), str(rule)]
        for (heads, tokens), rule in rules.items()
    ]
    note = f"Queries from which the expanded way is faster, and from which `enable` takes it. {where_from(rows[0])}.\n"
    return markdown(["H", "tokens in the cache", "in a CUDA graph", "eager", "rule"], lines) + "\n" + note


def sglang_hook(rows: Rows) -> str:
    """Per K and S: µs of the hook and of the stand-in on the device, and on the host."""
    lines = []
    for row in rows:
        ratio = f"{row['stand_in_us'] / row['us']:.2f}x"
        times = (microseconds(row[name]) for name in ("us", "stand_in_us", "host_us", "stand_in_host_us"))
        lines.append([str(row["k"]), str(row["s"]), *times, ratio])
    header = ["K", "S", "mla_fp8", "stand-in", "mla_fp8, host", "stand-in, host", "stand-in over mla_fp8"]
    return markdown(header, lines) + "\n" + f"µs, H = {rows[0]['heads']}. {where_from(rows[0])}.\n"
