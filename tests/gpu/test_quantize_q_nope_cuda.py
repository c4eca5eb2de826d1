"""What quantize_q_nope does on a GPU beyond what test_quantize_q_nope.py asks of every device."""

import pytest
import torch
from cases import OPS
from helpers import POISON, assert_same_bits, assert_untouched_outside, contiguous_strides, randn, strided

from mla_fp8 import reference

pytestmark = pytest.mark.gpu
quantize_q_nope = OPS.quantize_q_nope
HEADS = (1, 16, 128)
ROPE_DIM = 64


def assert_matches_reference(q_nope, **options):
    val, scale = quantize_q_nope(q_nope, **options)
    want_val, want_scale = reference.quantize_q_nope(q_nope, **options)
    assert_same_bits(scale, want_scale, "q_scale")
    assert_same_bits(val, want_val, "q_val")


def test_quantize_q_nope_cuda_reference_agrees_with_cpu(rng, dtype):
    """The reference is the same function on both devices, so that either may be compared with."""
    q_nope = randn(rng, 65, 3, 256, dtype=dtype) * torch.logspace(-20, 20, 65, base=2)[:, None, None].to(dtype)
    for got, want in zip(reference.quantize_q_nope(q_nope.cuda()), reference.quantize_q_nope(q_nope), strict=True):
        assert_same_bits(got.cpu(), want)


@pytest.mark.parametrize("h", HEADS)
@pytest.mark.parametrize("s", [0, 1, 7, 255, 256, 257, 4097])
def test_quantize_q_nope_cuda_matches_reference_on_views_of_q(rng, dtype, s, h):
    q = torch.randn(s, h, 128 + ROPE_DIM, device="cuda").to(dtype)
    assert_matches_reference(q[..., :128])
    assert_matches_reference(q[..., ROPE_DIM:])
    assert_matches_reference(q[..., 1:129])  # only 2-byte aligned


@pytest.mark.parametrize("h", HEADS)
def test_quantize_q_nope_cuda_matches_reference_for_wide_rows(rng, dtype, h):
    assert_matches_reference(torch.randn(257, h, 512, device="cuda").to(dtype))


@pytest.mark.parametrize("offset,row_gap", [(0, 0), (4, 4), (1, 0), (0, 1), (8, 2)])
def test_quantize_q_nope_cuda_writes_unaligned_views(rng, dtype, offset, row_gap):
    s, h, k = 130, 3, 256
    q_nope = randn(rng, s, h, k, dtype=dtype, device="cuda")
    want_val, want_scale = reference.quantize_q_nope(q_nope, m_alignment=1)
    row = k + row_gap
    val, val_buffer = strided((h, s, k), (s * row, row, 1), offset, torch.float8_e4m3fn, "cuda")
    scale, scale_buffer = strided((h, s, k // 128), (3, 3 * h * 2, 3 * h), 1, torch.float32, "cuda")
    quantize_q_nope.out(q_nope, m_alignment=1, val_out=val, scale_out=scale)
    assert_same_bits(val, want_val, "val_out")
    assert_same_bits(scale, want_scale, "scale_out")
    assert_untouched_outside(val_buffer, val)
    assert_untouched_outside(scale_buffer, scale)


@pytest.mark.parametrize("s", [1, 255, 257])
def test_quantize_q_nope_cuda_without_zero_pad_leaves_padding_rows(rng, s):
    q_nope, m = randn(rng, s, 3, 128, dtype=torch.bfloat16, device="cuda"), -(-s // 256) * 256
    val, val_buffer = strided((3, m, 128), contiguous_strides((3, m, 128)), 0, torch.float8_e4m3fn, "cuda")
    scale, scale_buffer = strided((3, m, 1), (m, 1, m), 0, torch.float32, "cuda")
    quantize_q_nope.out(q_nope, zero_pad=False, val_out=val, scale_out=scale)
    want_val, want_scale = reference.quantize_q_nope(q_nope)
    assert_same_bits(val[:, :s], want_val[:, :s], "rows < S of val_out")
    assert_same_bits(scale[:, :s], want_scale[:, :s], "rows < S of scale_out")
    assert_untouched_outside(val_buffer, val[:, :s])
    assert_untouched_outside(scale_buffer, scale[:, :s])
    assert (val.view(torch.uint8)[:, s:] == POISON).all()


def test_quantize_q_nope_cuda_other_stream(rng):
    """On the current stream, after what is there and before what follows."""
    big = torch.randn(4096, 4096, device="cuda")
    source = torch.randn(1024, 16, 128, device="cuda").bfloat16()
    q_nope = torch.full_like(source, float("nan"))
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        for _ in range(20):
            big = big @ big * 1e-4  # keeps the stream busy while the op is issued
        q_nope.copy_(source)
        val, scale = quantize_q_nope(q_nope)
        got = val.clone(), scale.clone()
        q_nope.fill_(float("inf"))
    torch.cuda.synchronize()
    for result, want in zip(got, reference.quantize_q_nope(source), strict=True):
        assert_same_bits(result, want)


def test_quantize_q_nope_cuda_back_to_back_launches_keep_their_order(rng):
    """Programmatic dependent launch starts a kernel early; it must not read or write early."""
    sources = [torch.randn(512, 16, 128, device="cuda").bfloat16() for _ in range(4)]
    q_nope = sources[0].clone()
    results = []
    for i in range(64):
        q_nope.copy_(sources[i % 4])
        results.append(quantize_q_nope(q_nope))
        results[-1] = (*quantize_q_nope(q_nope), *results[-1])
    for i, (val, scale, first_val, first_scale) in enumerate(results):
        want_val, want_scale = reference.quantize_q_nope(sources[i % 4])
        assert_same_bits(val, want_val), assert_same_bits(scale, want_scale)
        assert_same_bits(first_val, want_val), assert_same_bits(first_scale, want_scale)


def test_quantize_q_nope_cuda_deterministic(rng):
    q_nope = torch.randn(1000, 16, 512, device="cuda").bfloat16()
    first = quantize_q_nope(q_nope)
    for _ in range(10):
        for got, want in zip(quantize_q_nope(q_nope), first, strict=True):
            assert_same_bits(got, want)


def test_quantize_q_nope_cuda_graph_capture_may_be_the_first_call(run_python):
    """With embedded kernels. Without them the error names the warm-up, which then makes the capture work."""
    run_python("""
        import torch, mla_fp8
        from mla_fp8 import jit, reference
        q_nope = torch.randn(257, 16, 128, device="cuda").bfloat16()
        torch.cuda.synchronize()

        def capture():
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                results = torch.ops.mla_fp8.quantize_q_nope(q_nope)
            return graph, results

        refused = ""
        try:
            graph, results = capture()
        except RuntimeError as error:
            refused = str(error)
            assert "mla_fp8.jit.warm_up()" in refused, refused
            jit.warm_up()
            graph, results = capture()
        assert bool(refused) == bool(jit._images), "refused exactly where kernels must be compiled"
        for _ in range(3):
            q_nope.copy_(torch.randn_like(q_nope))
            graph.replay()
            for got, want in zip(results, reference.quantize_q_nope(q_nope)):
                assert torch.equal(got.float(), want.float())
    """)


def test_quantize_q_nope_cuda_first_call_in_a_thread_without_a_context(run_python):
    run_python("""
        import threading, torch, mla_fp8
        from mla_fp8 import reference
        q_nope = torch.randn(5, 2, 128).bfloat16().cuda()
        torch.cuda.synchronize()
        results = []
        thread = threading.Thread(target=lambda: results.extend(torch.ops.mla_fp8.quantize_q_nope(q_nope)))
        thread.start(), thread.join()
        for got, want in zip(results, reference.quantize_q_nope(q_nope), strict=True):
            assert torch.equal(got.float(), want.float())
    """)


def test_quantize_q_nope_cuda_many_threads_may_call_first(run_python):
    run_python("""
        import threading, torch, mla_fp8
        from mla_fp8 import reference
        q_nope = torch.randn(300, 4, 128).half().cuda()
        results = [None] * 16
        start = threading.Barrier(len(results))
        def call(i):
            start.wait()
            results[i] = torch.ops.mla_fp8.quantize_q_nope(q_nope)
        threads = [threading.Thread(target=call, args=(i,)) for i in range(len(results))]
        [thread.start() for thread in threads], [thread.join() for thread in threads]
        torch.cuda.synchronize()
        for result in results:
            for got, want in zip(result, reference.quantize_q_nope(q_nope), strict=True):
                assert torch.equal(got.float(), want.float())
    """)


def test_quantize_q_nope_cuda_rejects_outputs_on_another_device(rng):
    q_nope = randn(rng, 8, 2, 128, dtype=torch.bfloat16, device="cuda")
    val, scale = quantize_q_nope(q_nope.cpu(), m_alignment=1)
    with pytest.raises(RuntimeError, match=r"^quantize_q_nope: val_out must .*cuda:0.*got"):
        quantize_q_nope.out(q_nope, m_alignment=1, val_out=val, scale_out=scale.cuda())
    with pytest.raises(RuntimeError, match=r"^quantize_q_nope: scale_out must .*cuda:0.*got"):
        quantize_q_nope.out(q_nope, m_alignment=1, val_out=val.cuda(), scale_out=scale)


@pytest.mark.skipif("torch.cuda.device_count() < 2", reason="needs two GPUs")
def test_quantize_q_nope_cuda_runs_on_its_input_s_device():
    q_nope = torch.randn(300, 4, 128, device="cuda:1").bfloat16()
    assert torch.cuda.current_device() == 0
    assert_matches_reference(q_nope)
    assert torch.cuda.current_device() == 0
