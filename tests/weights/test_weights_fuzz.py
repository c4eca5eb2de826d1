"""from_safetensors on checkpoints that are damaged, foreign or misleading: weights, or a ValueError that says why."""

import json
import re

import pytest
import torch
from checkpoints import INDEX, LAYER, SCALE, WEIGHT, config, kv_b_proj, write_checkpoint
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mla_fp8 import AbsorbedWeights

SINGLE = "model.safetensors"
LENGTH_BYTES = 8  # a safetensors file: length of the header, little-endian; the header, JSON; the tensors
reuses_files = settings(settings.get_profile("fuzz"), suppress_health_check=[HealthCheck.function_scoped_fixture])
DTYPES = [
    "F8_E4M3",
    "F8_E5M2",
    "F8_E8M0",
    "F4",
    "F6_E2M3",
    "BOOL",
    "U8",
    "I64",
    "F64",
    "F32",
    "F16",
    "BF16",
    "C64",
    "",
    "X",
]
numbers = st.integers(-(2**70), 2**70) | st.sampled_from([0, 1, 2, 128, 512, 2**31, 2**63 - 1, 2**63, 2**64 - 1])
scalars = (
    st.none() | st.booleans() | numbers | st.floats() | st.text(max_size=8) | st.sampled_from(["512", "\0", "ue8m0"])
)
json_values = st.recursive(
    scalars, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=4), v, max_size=3)
)


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """One checkpoint in a single file, and the same in two shards."""
    weight, scale = kv_b_proj(torch.Generator().manual_seed(0), heads=2, lora=128)
    tensors, dims = {WEIGHT: weight, SCALE: scale}, config(heads=2, lora=128)
    root = tmp_path_factory.mktemp("checkpoints")
    return write_checkpoint(root / "single", tensors, dims, 0), write_checkpoint(root / "shards", tensors, dims, 2)


@pytest.fixture
def broken(sound, tmp_path):
    """(a file, its new bytes) -> loads the checkpoint that has them -> its weights, or None if refused."""

    def load(file, content, shards=False, **call):
        source = sound[shards]
        for path in source.iterdir():
            (tmp_path / path.name).write_bytes(content if path.name == file else path.read_bytes())
        try:
            weights = AbsorbedWeights.from_safetensors(tmp_path, LAYER, **call)
        except ValueError as error:
            assert re.fullmatch(r"from_safetensors: .+ must .+, got .+", str(error), re.DOTALL), error
            return None
        assert weights.num_heads >= 1 and all(b.isfinite().all() for b in (weights.w_uk_scale, weights.w_uv_scale))
        return weights

    return load


def content(sound, name=SINGLE):
    return (sound[0 if name == SINGLE else 1] / name).read_bytes()


def split(whole):
    end = LENGTH_BYTES + int.from_bytes(whole[:LENGTH_BYTES], "little")
    return json.loads(whole[LENGTH_BYTES:end]), whole[end:]


def joined(header, data):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(LENGTH_BYTES, "little") + text + data


def test_fuzz_starts_from_checkpoints_that_load(sound, broken):
    whole = content(sound)
    assert broken(SINGLE, whole) is not None and broken(SINGLE, joined(*split(whole))) is not None


@reuses_files
@given(data=st.data())
def test_from_safetensors_survives_changed_bytes(sound, broken, data):
    whole = bytearray(content(sound))
    header_end = LENGTH_BYTES + int.from_bytes(whole[:LENGTH_BYTES], "little")
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, header_end - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.one_of(st.just(len(whole)), st.integers(0, len(whole)), st.integers(0, header_end)))
    broken(SINGLE, bytes(whole[:cut]) + data.draw(st.binary(max_size=9)))


@reuses_files
@given(data=st.data())
def test_from_safetensors_survives_headers_that_mislead(sound, broken, data):
    header, tensors = split(content(sound))
    entry = header[data.draw(st.sampled_from([WEIGHT, SCALE]))]
    values = {
        "dtype": st.sampled_from(DTYPES) | json_values,
        "shape": st.lists(numbers, max_size=4) | st.sampled_from([[512, 128], [128, 512], [512], [4, 1]]) | json_values,
        "data_offsets": st.lists(numbers, max_size=3) | json_values,
    }
    for key in data.draw(st.lists(st.sampled_from(list(values)), min_size=1, max_size=3, unique=True)):
        entry[key] = data.draw(values[key])
    broken(SINGLE, joined(header, tensors))


@reuses_files
@given(data=st.data())
def test_from_safetensors_survives_any_config(sound, broken, data):
    changed = json.loads(content(sound, "config.json"))
    for key in data.draw(st.lists(st.sampled_from(list(changed)), min_size=1, max_size=2)):
        changed[key] = data.draw(json_values)
    if data.draw(st.booleans()):
        key = data.draw(st.sampled_from(["weight_block_size", "scale_fmt", "fmt", "quant_method"]))
        changed["quantization_config"] = {"weight_block_size": [128, 128], key: data.draw(json_values)}
    broken("config.json", json.dumps(changed).encode())


@reuses_files
@given(place=json_values | st.sampled_from(["", ".", "..", "/", "/dev/null", "a\0b", "a/b", "x" * 300, "config.json"]))
def test_from_safetensors_survives_any_index(broken, place):
    assert broken(INDEX, json.dumps({"weight_map": {WEIGHT: place, SCALE: place}}).encode(), shards=True) is None


@settings(reuses_files, max_examples=100)
@given(text=json_values.map(json.dumps).map(str.encode) | st.binary(max_size=40))
@pytest.mark.parametrize("name", ["config.json", INDEX])
def test_from_safetensors_survives_any_json(broken, name, text):
    assert broken(name, text, shards=True) is None


@pytest.mark.parametrize("name", ["config.json", INDEX])
def test_from_safetensors_rejects_json_that_is_nested_too_deeply(broken, name):
    assert broken(name, b"[" * 100_000, shards=True) is None


@pytest.mark.parametrize("header", [b"", b"{}", b"[]", b"null", b'{"a": 1}', b"[" * 100_000, b"\xff", b"{" * 9])
def test_from_safetensors_rejects_foreign_headers(broken, header):
    assert broken(SINGLE, joined(header, b"")) is None


@pytest.mark.parametrize("length", [0, 1, 2**20, 2**31, 2**63 - 1, 2**64 - 1])
def test_from_safetensors_rejects_any_length_of_the_header(sound, broken, length):
    assert broken(SINGLE, length.to_bytes(LENGTH_BYTES, "little") + content(sound)[LENGTH_BYTES:]) is None


@pytest.mark.parametrize(
    "name", ["{", "}", "{}", "{other}", "{layer.x}", "{layer!z}", "{layer:q}", "a{layer[0]}", 7, None]
)
def test_from_safetensors_rejects_a_name_that_is_no_template(sound, broken, name):
    assert broken(SINGLE, content(sound), name=name) is None
