"""docs/troubleshooting.md: every message on it is one that the sources raise, and every error raised is on it."""

import ast
import importlib
import re
from pathlib import Path

import fake_sglang
import pytest
import torch
from cases import CASE
from checkpoints import LAYER, SCALE, WEIGHT, config, kv_b_proj, write_checkpoint
from faults import FAULTS
from test_integration_sglang import NOT_TAKEN
from test_weights_errors import BAD_CALLS, arguments

import mla_fp8
from mla_fp8 import AbsorbedWeights, jit
from mla_fp8 import config as tiles_config
from mla_fp8.integrations import sglang

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text()
OURS, OTHERS = PAGE.split("\n## Said by other programs\n")
ANYTHING = "…"
SOURCES = [*ROOT.glob("mla_fp8/**/*.py"), *ROOT.glob("csrc/**/*.cpp"), *ROOT.glob("csrc/**/*.h"),
           *ROOT.glob("cmake/*"), *ROOT.glob("build_support/*.py"), *ROOT.glob("examples/aoti_runner/*"),
           ROOT / "CMakeLists.txt"]  # fmt: skip
ADJACENT = re.compile(r'"\s*\n\s*f?"')  # parts of one literal
LIBRARY_ERRORS = 8
RAISED = ("ValueError", "RuntimeError", "ImportError", "FileNotFoundError")
# Not for a user: what callers inside the package cannot get wrong, and what argparse or `check` words on their own.
INTERNAL = ("mla_fp8/weights_file.py: write_weights", "mla_fp8/cli/", "mla_fp8/errors.py: ")


def messages(text: str) -> list[str]:
    return [line for block in re.findall(r"```text\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]


MESSAGES = messages(OURS)


def pattern(message: str) -> re.Pattern:
    return re.compile(".*".join(map(re.escape, message.split(ANYTHING))), re.DOTALL)


PATTERNS = {message: pattern(message) for message in MESSAGES}
RULES = [pattern(message.split(", got")[0]) for message in MESSAGES]  # without the value


def said_by(call) -> str:
    with pytest.raises((RuntimeError, ValueError)) as error:
        call()
    lines = str(error.value).removeprefix("Error(s) in loading state_dict for AbsorbedWeights:\n\t").split("\n")
    return lines[0]


def raised_by_ops(rng):
    valid = {name: CASE[name].arguments(rng, 7, 3) for name in {fault.case for fault in FAULTS}}
    for fault in FAULTS:
        given = valid[fault.case]
        wrong = given | {fault.argument: fault.spoil(given.get(fault.argument))}
        yield said_by(lambda case=CASE[fault.case], wrong=wrong: case.functional(**wrong))
    for name in ("absorb_q-pe", "v_up", "bmm", "v_up_quantized"):
        case = CASE[name]
        given = case.arguments(rng, 7, 3)
        views, _ = case.out_views(case.call(given))
        first = next(iter(views))
        for wrong in (views[first].double(), views[first][:1].expand(views[first].shape), views[first].mT,
                      views[first].to("meta")):  # fmt: skip
            yield said_by(
                lambda case=case, given=given, views=views, wrong=wrong, first=first: case.out(
                    **given, **(views | {first: wrong})
                )
            )
    given = CASE["v_up"].arguments(rng, 7, 4)
    memory = given["o_latent"].view(-1)[: 7 * 4 * 128].view(7, 4, 128)
    yield said_by(lambda: CASE["v_up"].out(**given, v_out=memory))
    yield said_by(
        lambda: mla_fp8.quantize_q_nope(torch.zeros(1, 1, 128, dtype=torch.bfloat16).expand(2**31 - 1, 16384, 128))
    )
    between = torch.frombuffer(bytearray(257), dtype=torch.bfloat16, count=128, offset=1).view(1, 1, 128)
    yield said_by(lambda: mla_fp8.quantize_q_nope(between))


def raised_by_weights(rng, directory):
    for change, _ in BAD_CALLS.values():
        yield said_by(lambda change=change: AbsorbedWeights.from_kv_b_proj(**change(arguments(rng))))
    weights = AbsorbedWeights.from_kv_b_proj(*kv_b_proj(rng), 2)
    yield said_by(lambda: AbsorbedWeights(weights.w_uk.half(), weights.w_uk_scale, weights.w_uv, weights.w_uv_scale))
    yield said_by(lambda: weights.load_state_dict({n: b.half() for n, b in weights.named_buffers()}))
    yield said_by(lambda: AbsorbedWeights.from_bf16(torch.full((256, 128), float("nan")), 1))
    tensors = dict(zip((WEIGHT, SCALE), kv_b_proj(rng), strict=True))
    for changes in ({"num_attention_heads": 4}, {"quantization_config": {"weight_block_size": [64, 64]}}):
        write_checkpoint(directory, tensors, config() | changes)
        yield said_by(lambda: AbsorbedWeights.from_safetensors(directory, LAYER))
    yield said_by(lambda: AbsorbedWeights.from_safetensors(directory, LAYER, tp_size=3))
    yield said_by(lambda: AbsorbedWeights.load(next(directory.glob("*.safetensors"))))


def logged(monkeypatch, caplog):
    jit._announce(jit.source_directory() / "kernels" / "bmm.cu", "a directory")
    jit._write(Path("/dev/null/bmm.cubin"), b"")
    monkeypatch.setenv(sglang.SWITCH, "yes")
    sglang.register()
    monkeypatch.setenv(sglang.SWITCH, "1")
    sglang.register()
    fake_sglang.install(monkeypatch, lambda x: x)
    sglang.register()
    assert len(caplog.messages) == 5
    return [*caplog.messages, *(f"f: {reason}: this call runs SGLang's own kernel" for reason in NOT_TAKEN)]


@pytest.fixture
def provoked(rng, tmp_path, monkeypatch, caplog):
    return [*raised_by_ops(rng), *raised_by_weights(rng, tmp_path / "m"), *logged(monkeypatch, caplog)]


def test_every_provoked_message_is_on_the_page(provoked):
    unknown = {text for text in provoked if not any(known.search(text) for known in PATTERNS.values())}
    assert not unknown


def test_every_message_on_the_page_exists(provoked):
    """It was provoked just now, stands in a `raise`, or all of its fixed parts are texts of the sources."""
    said = [*provoked, *(text for _, text in python_errors())]
    literals = "\n".join(ADJACENT.sub("", path.read_text(errors="replace")) for path in SOURCES if path.is_file())
    for message, rule in zip(MESSAGES, RULES, strict=True):
        if any(rule.search(text) for text in said):
            continue
        parts = [part.strip(" ,()") for part in re.split(rf"{ANYTHING}|\bmust\b|, got\b", message)]
        missing = [part for part in parts if part and part not in literals]
        assert not missing, f"{message!r}: no such text in the sources: {missing}"


def python_errors():
    """Path and text of every raise and `require` in the package, with X for what is known only when it runs."""
    for path in sorted((ROOT / "mla_fp8").glob("**/*.py")):
        tree = ast.parse(path.read_text())
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        known = vars(importlib.import_module(module)) if module != "mla_fp8.__main__" else {}
        assigned = [(node.lineno, *pair) for node in ast.walk(tree) if isinstance(node, ast.Assign)
                    for pair in assigned_by(node)]  # fmt: skip
        for node in ast.walk(tree):
            names = known | {name: value for line, name, value in sorted(assigned, key=lambda row: row[0])
                             if line <= getattr(node, "lineno", 0)}  # fmt: skip
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
                if getattr(node.exc.func, "id", "") in RAISED:
                    yield path, text_of(node.exc.args[0], names)
            elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "require":
                where, argument, rule = (text_of(part, names) for part in node.args[1:4])
                yield path, f"{where}: {argument} must {rule}, got X"


def assigned_by(node):
    for target in node.targets:
        pairs = [(target, node.value)]
        if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
            pairs = zip(target.elts, node.value.elts, strict=True)
        yield from ((name.id, value) for name, value in pairs if isinstance(name, ast.Name))


def text_of(node, names) -> str:
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part, names) for part in node.values)
    if isinstance(node, ast.FormattedValue):
        return text_of(node.value, names)
    value = names.get(node.id) if isinstance(node, ast.Name) else None
    if isinstance(value, (str, int, float)):
        return str(value)
    plain = {name: value for name, value in names.items() if isinstance(value, (str, int, float))}
    return text_of(value, plain) if isinstance(value, (ast.Constant, ast.JoinedStr)) else "X"


def test_every_error_of_the_package_is_on_the_page():
    unknown = []
    for path, text in python_errors():
        name, rule = f"{path.relative_to(ROOT)}: {text}", text.split(", got")[0]
        from_the_caller = rule.endswith((" must X", " must be X", " must hold X", "X (X)")) or rule == "X"
        if not from_the_caller and not name.startswith(INTERNAL) and not any(known.search(rule) for known in RULES):
            unknown.append(name)
    assert not unknown, "\n".join(unknown)


def test_every_error_of_the_library_is_on_the_page():
    """fail(op, ...) and runtime_error(...): the literals of the statement, with X between them."""
    seen = 0
    sources = {*ROOT.glob("csrc/bindings/*.cpp"), *ROOT.glob("csrc/gpu/*.cpp")}
    for path in sources - {ROOT / "csrc" / "bindings" / "checks.cpp"}:  # those of checks.cpp are provoked
        text = ADJACENT.sub("", re.sub(r"^\s*//.*", "", path.read_text(), flags=re.MULTILINE))
        for statement in re.findall(r"(?<!\.)\b(?:fail\(\s*op,|runtime_error\()(.*?);", text, re.DOTALL):
            told = "X".join(re.findall(r'"((?:[^"\\]|\\.)+)"', statement))
            if "must" in told or "failed" in told:
                seen += 1
                assert any(known.search(told) for known in PATTERNS.values()), f"{path.name}: {told}"
    assert seen >= LIBRARY_ERRORS


def test_other_programs_words_are_quoted_whole():
    assert all(len(message) > 10 for message in messages(OTHERS))
    with pytest.raises(AttributeError, match="'_OpNamespace' 'mla_fp8' object has no attribute 'x'"):
        torch.ops.mla_fp8.x  # noqa: B018
    with pytest.raises(ValueError, match=r"forced_tile: symbol must be one of "), tiles_config.forced_tile("x"):
        pass
