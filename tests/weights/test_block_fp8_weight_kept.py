"""BlockFp8Weight moved, copied, stored and written: the parts stay whole, and no write is lost in silence."""

import copy
import io
import pickle
import re

import numpy as np
import pytest
import torch
from block_weights import HEADS, make, token_major
from helpers import assert_same_bits, random_weight
from torch import nn

from mla_fp8 import BlockFp8Weight
from mla_fp8.weights.block_fp8_weight import counts, reset_counts


@pytest.fixture(autouse=True)
def from_zero():
    reset_counts()


def assert_same_parts(got, want):
    assert type(got) is BlockFp8Weight and got.shape == want.shape and got.dtype == want.dtype
    assert_same_bits(got.weight, want.weight, "weight")
    assert_same_bits(got.scale, want.scale, "scale")
    assert counts().dequantizations == 0


def addresses(weight):
    return weight.weight.data_ptr(), weight.scale.data_ptr()


def saved(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer)


def in_module(weight, kind):
    module = nn.Module()
    if kind == "parameter":
        module.w = nn.Parameter(weight, requires_grad=False)
    elif kind == "buffer":
        module.register_buffer("w", weight)
    else:
        module.__dict__["w"] = weight
    return module


ROUND_TRIPS = {
    "clone": lambda w: w.clone(),
    "deepcopy": copy.deepcopy,
    "pickle": lambda w: pickle.loads(pickle.dumps(w)),
    "pickle_2": lambda w: pickle.loads(pickle.dumps(w, protocol=2)),
    "torch_save": saved,
    "in_a_dict": lambda w: saved({"w": w})["w"],
    "copied_into": lambda w: w.clone().update_(torch.zeros_like(w.weight), w.scale).copy_(w),
    "updated": lambda w: make(torch.Generator()).update_(w.weight, w.scale),
    "module": lambda w: copy.deepcopy(in_module(w, "attribute")).w,
    "module_to": lambda w: copy.deepcopy(in_module(w, "parameter")).to("cpu", torch.bfloat16).w,
    "state_dict": lambda w: saved(in_module(w, "buffer").state_dict())["w"],
}
SAME_MEMORY = {
    "detach": lambda w: w.detach(),
    "alias": torch.ops.aten.alias.default,
    "copy": copy.copy,
    "data": lambda w: w.data,
    "to_own_dtype": lambda w: w.to(torch.bfloat16),
    "to_own_device": lambda w: w.to("cpu"),
    "cpu": lambda w: w.cpu(),
    "parameter": lambda w: nn.Parameter(w, requires_grad=False),
    "transposed_twice": lambda w: w.transpose(1, 2).transpose(2, 1),
    "mT": lambda w: w.mT.mT,
    "permuted_twice": lambda w: w.permute(0, 2, 1).permute(0, -1, -2),
    "all_heads": lambda w: w[:],
    "view_of_same_shape": lambda w: w.view(w.shape).expand(-1, -1, -1),
}


@pytest.mark.parametrize("inference", [False, True], ids=["", "inference"])
@pytest.mark.parametrize("trip", ROUND_TRIPS)
def test_copy_has_the_parts_and_memory_of_its_own(rng, trip, inference):
    weight = make(rng)
    with torch.inference_mode(inference):
        got = ROUND_TRIPS[trip](weight)
    assert_same_parts(got, weight)
    assert not {*addresses(got)} & {*addresses(weight)}


@pytest.mark.parametrize("inference", [False, True], ids=["", "inference"])
@pytest.mark.parametrize("view", SAME_MEMORY)
def test_view_has_the_parts_and_their_memory(rng, view, inference):
    weight = make(rng)
    with torch.inference_mode(inference):
        got = SAME_MEMORY[view](weight)
    assert_same_parts(got, weight)
    assert addresses(got) == addresses(weight)


def test_transposed_weight_keeps_that_it_is(rng):
    weight = make(rng)
    for trip in (torch.clone, copy.deepcopy, saved, torch.detach):
        got = trip(weight.mT)
        assert got.shape == (HEADS, 512, 128) and got.stride() == (512 * 128, 128, 1)
        assert_same_parts(got.mT, weight)
        assert_same_bits(got.dequantize(), weight.permute(0, 2, 1).dequantize())
        reset_counts()


HEAD_VIEWS = {
    "slice": lambda t: t[1:3],
    "narrow": lambda t: t.narrow(0, 1, 2),
    "every_other": lambda t: t[::2],
    "and_all_columns": lambda t: t[1:3, :, :],
    "none": lambda t: t[2:2],
}


@pytest.mark.parametrize("view", HEAD_VIEWS)
def test_slice_of_heads_is_a_view_of_parts(rng, device, view):
    weight = make(rng, device=device)
    x = token_major(rng, weight).transpose(0, 1)
    got, want = HEAD_VIEWS[view](weight), HEAD_VIEWS[view](torch.bmm(x, weight))
    assert type(got) is BlockFp8Weight and got.weight.untyped_storage() is not None
    assert got.weight.untyped_storage().data_ptr() == weight.weight.untyped_storage().data_ptr()
    assert_same_bits(torch.bmm(HEAD_VIEWS[view](x), got), want)


def test_saved_view_holds_what_it_shows(rng):
    weight = make(rng, heads=8)
    assert len(pickle.dumps(weight[:1])) < len(pickle.dumps(weight)) / 4
    assert_same_parts(saved(weight[:1]), weight[:1])


def test_saved_weight_loads_in_another_process(rng, run_python, tmp_path):
    weight = make(rng)
    x = token_major(rng, weight).transpose(0, 1)
    torch.save({"w": weight, "x": x, "want": torch.bmm(x, weight)}, tmp_path / "w.pt")
    run_python(f"""
        import torch, mla_fp8
        for mmap in (False, True):
            found = torch.load({str(tmp_path / "w.pt")!r}, mmap=mmap)
            assert type(found["w"]) is mla_fp8.BlockFp8Weight
            assert torch.equal(torch.bmm(found["x"], found["w"]), found["want"])
    """)


@pytest.mark.parametrize("trip", [copy.copy, copy.deepcopy, lambda w: pickle.loads(pickle.dumps(w))],
                         ids=["copy", "deepcopy", "pickle"])  # fmt: skip
def test_copied_parameter_stays_one(rng, trip):
    param = trip(nn.Parameter(make(rng), requires_grad=False))
    assert isinstance(param, nn.Parameter) and isinstance(param, BlockFp8Weight)
    assert not isinstance(trip(make(rng)), nn.Parameter)


@pytest.mark.parametrize("trip", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_parameter_stays_one(rng, trip):
    module = trip(in_module(make(rng), "parameter"))
    assert isinstance(module.w, nn.Parameter) and isinstance(module.w, BlockFp8Weight)
    assert list(module.parameters()) and not module.w.requires_grad


def test_parameter_loads_a_state_dict(rng):
    module, other = in_module(make(rng), "parameter"), in_module(make(rng), "parameter")
    before = addresses(module.w)
    module.load_state_dict(other.state_dict())
    assert_same_parts(module.w.data, other.w.data)
    assert addresses(module.w) == before
    with pytest.raises(RuntimeError, match="update_"):
        module.load_state_dict({"w": torch.zeros(HEADS, 128, 512, dtype=torch.bfloat16)})


def test_move_to_another_device_moves_the_parts(rng):
    weight = make(rng).to("meta")
    assert type(weight) is BlockFp8Weight and {str(p.device) for p in (weight.weight, weight.scale)} == {"meta"}
    assert in_module(make(rng), "parameter").to("meta").w.weight.is_meta
    assert torch.bmm(torch.empty(HEADS, 2, 128, dtype=torch.bfloat16, device="meta"), weight).shape == (HEADS, 2, 512)


@pytest.mark.gpu
def test_move_to_a_gpu_and_back_moves_the_parts(rng):
    weight = make(rng)
    for to in (lambda w: w.cuda(), lambda w: w.to("cuda", torch.bfloat16, non_blocking=True), lambda w: w.to("cuda:0")):
        moved = to(weight)
        assert moved.is_cuda and moved.weight.is_cuda and moved.scale.is_cuda
        assert_same_parts(moved.cpu(), weight)
    assert_same_parts(in_module(weight, "parameter").cuda().w.data.cpu(), weight)
    assert_same_parts(copy.deepcopy(moved).cpu(), weight)
    assert_same_parts(saved(moved).cpu(), weight)


READERS = {
    "float": lambda t: t.float(),
    "half": lambda t: t.half(),
    "contiguous": lambda t: t.contiguous(),
    "head": lambda t: t[1],
    "columns": lambda t: t[..., :100],
    "last_columns": lambda t: t[..., 100:],
    "every_other_row": lambda t: t[:, ::2],
    "flatten": lambda t: t.mT.flatten(1),
    "cat": lambda t: torch.cat((t, t)),
    "sum": lambda t: t.sum(1),
    "add": lambda t: 1 + t,
    "stack": lambda t: torch.stack([t, t]),
    "where": lambda t: torch.where(t > 0, t, 0),
    "copied_from": lambda t: torch.zeros(HEADS, 128, 512, dtype=torch.bfloat16).copy_(t),
    "assigned_from": lambda t: torch.zeros(1, *t.shape, dtype=torch.bfloat16).index_put_((torch.tensor(0),), t),
}


@pytest.mark.parametrize("inference", [False, True], ids=["", "inference"])
@pytest.mark.parametrize("reader", READERS)
def test_any_other_reader_gets_the_numbers(rng, reader, inference):
    weight = make(rng)
    with torch.inference_mode(inference):
        got, want = READERS[reader](weight), READERS[reader](weight.dequantize())
    assert type(got) is torch.Tensor
    assert_same_bits(got, want)
    assert counts().dequantizations >= 2


def test_tensors_made_like_it_read_nothing(rng):
    weight = make(rng)
    for like in (torch.empty_like(weight), torch.zeros_like(weight), weight.new_empty(weight.shape)):
        assert type(like) is torch.Tensor and (like.shape, like.dtype) == (weight.shape, weight.dtype)
    assert torch.empty_like(weight).stride() == weight.stride() and not torch.zeros_like(weight).any()
    assert counts() == (0, 0)


def test_update_keeps_addresses_and_changes_products(rng, device):
    weight, other = make(rng, device=device), make(rng)
    x, before = token_major(rng, weight).transpose(0, 1), addresses(weight)
    assert weight.update_(other.weight, other.scale) is weight
    assert addresses(weight) == before
    assert_same_bits(torch.bmm(x, weight), torch.bmm(x, other.to(device)))


BAD_UPDATES = {
    "weight must be torch.float8_e4m3fn, got torch.bfloat16": lambda w, s: (w.bfloat16(), s),
    "weight must have shape [3, 512, 128], got [2, 512, 128]": lambda w, s: (w[1:], s[1:]),
    "scale must have shape [3, 4, 1], got [3, 1, 4]": lambda w, s: (w, s.mT),
    "scale must be torch.float32, got torch.float64": lambda w, s: (w, s.double()),
    "scale must be a Tensor, got NoneType": lambda w, s: (w, None),
}


@pytest.mark.parametrize("said", BAD_UPDATES)
def test_update_rejects_before_it_writes(rng, said):
    weight = make(rng)
    kept = weight.clone()
    with pytest.raises(ValueError, match=re.escape(f"BlockFp8Weight.update_: {said}")):
        weight.update_(*BAD_UPDATES[said](*random_weight(rng, HEADS, 512, 128)))
    assert_same_parts(weight, kept)


def set_item(weight):
    weight[0] = 0


def set_data(weight):
    nn.Parameter(weight, requires_grad=False).data = weight.dequantize()


WRITES = {
    "copy_": (lambda w: w.copy_(w.dequantize()), TypeError, "source must be a BlockFp8Weight (update_ writes"),
    "copy_transposed": (lambda w: make(torch.Generator(), "square").copy_(make(torch.Generator(), "square").mT),
                        ValueError, "as transposed"),
    "copy_other_shape": (lambda w: w.copy_(w[:1]), ValueError, "must be of shape"),
    "data": (set_data, TypeError, "BlockFp8Weight.data must be a BlockFp8Weight like this one (update_ writes"),
    "item": (set_item, TypeError, "must be written by update_(weight, scale)"),
    "mul_": (lambda w: w.mul_(2), TypeError, "must be written by update_(weight, scale), got aten.mul_"),
    "zero_": (lambda w: w.zero_(), TypeError, "must be written by update_"),
    "init": (lambda w: nn.init.normal_(w), TypeError, "must be written by update_"),
    "out": (lambda w: torch.add(w.dequantize(), 1, out=w), TypeError, "must be written by update_"),
    "foreach": (lambda w: torch._foreach_mul_([w], 2), TypeError, "must be written by update_"),
    "resize_": (lambda w: w.resize_(1), TypeError, "must be written by update_"),
    "set_": (lambda w: w.set_(torch.zeros(1, dtype=torch.bfloat16)), TypeError, "must be written by update_"),
    "requires_grad_": (lambda w: w.requires_grad_(), TypeError, "must not require grad"),
    "parameter": (lambda w: nn.Parameter(w), TypeError, "must not require grad (nn.Parameter(weight, requires_grad=F"),
    "requires_grad": (lambda w: setattr(w, "requires_grad", True), TypeError, "must not require grad"),
}  # fmt: skip
ADDRESSES = {
    "data_ptr": (lambda w: w.data_ptr(), TypeError, "has no 16-bit storage"),
    "Tensor.data_ptr": (lambda w: torch.Tensor.data_ptr(w), RuntimeError, "data pointer"),
    "storage": (lambda w: w.untyped_storage().data_ptr(), RuntimeError, "data pointer"),
    "dlpack": (lambda w: torch.from_dlpack(w), TypeError, "has no 16-bit storage"),
    "to_dlpack": (lambda w: torch.utils.dlpack.to_dlpack(w), RuntimeError, "data pointer"),
    "numpy.from_dlpack": (lambda w: np.from_dlpack(w), TypeError, "has no 16-bit storage"),
    "numpy": (lambda w: w.numpy(), RuntimeError, "not supported"),
}


@pytest.mark.parametrize("write", WRITES | ADDRESSES)
def test_write_or_address_is_refused(rng, write):
    weight = make(rng)
    kept = weight.clone()
    call, error, said = (WRITES | ADDRESSES)[write]
    with pytest.raises(error, match=re.escape(said)):
        call(weight)
    reset_counts()
    assert_same_parts(weight, kept)


def test_extensions_find_no_dlpack_of_it():
    """tvm-ffi asks the class, and would get a null pointer."""
    assert BlockFp8Weight.__dlpack_c_exchange_api__ is None


def test_parameter_data_may_become_another_weight(rng):
    param, other = nn.Parameter(make(rng), requires_grad=False), make(rng)
    param.data = other
    x = token_major(rng, other).transpose(0, 1)
    assert_same_bits(torch.bmm(x, param), torch.bmm(x, other))
    assert addresses(param) == addresses(other)


def test_repr_says_what_it_is_and_reads_nothing(rng):
    want = "BlockFp8Weight(shape=[3, 512, 128], dtype=torch.bfloat16, weight=[3, 512, 128], device=cpu, transposed)"
    assert repr(make(rng).mT) == f"{make(rng).mT}" == want
    assert counts() == (0, 0)
