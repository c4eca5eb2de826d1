"""FlashMLA's and FlashInfer's documented contracts in fp64 PyTorch: each checks what it is given, and attends."""

import itertools
import types

import torch


def on_pages(q, pages, numbers, length, scale):
    """q [S, H, 576] over the first `length` tokens of a cache [pages, page, 576], by one sequence's page numbers."""
    keys = pages[numbers.long()].flatten(0, 1)[:length].double()
    return (((q.double() @ keys.T) * scale).softmax(-1) @ keys[:, :512]).to(q.dtype)


class FakeFlashMLA(types.ModuleType):
    """flash_mla.flash_mla_with_kvcache, dense."""

    plans = 0

    def get_mla_metadata(self, cache_seqlens, num_q_tokens_per_head_k, num_heads_k):
        self.plans += 1
        self.rows = num_q_tokens_per_head_k
        assert num_heads_k == 1
        return "schedule", None

    def flash_mla_with_kvcache(
        self, q, k_cache, block_table, cache_seqlens, head_dim_v, tile_scheduler_metadata, num_splits=None,
        softmax_scale=None, causal=False, is_fp8_kvcache=None, use_legacy=False,
    ):  # fmt: skip
        assert use_legacy and not causal and (tile_scheduler_metadata, num_splits) == ("schedule", None)
        assert q.is_contiguous() and k_cache.shape[1:] == (64, 1, 576) and head_dim_v == 512
        assert self.rows == q.shape[1] * q.shape[2]
        assert block_table.dtype == cache_seqlens.dtype == torch.int32 and block_table.is_contiguous()
        sequences = zip(q, block_table, cache_seqlens, strict=True)
        out = [on_pages(one, k_cache[:, :, 0], numbers, length, softmax_scale) for one, numbers, length in sequences]
        return torch.stack(out), None


class FakeFlashInfer(types.ModuleType):
    """flashinfer.mla.BatchMLAPagedAttentionWrapper."""

    plans = 0

    def BatchMLAPagedAttentionWrapper(self, float_workspace_buffer):  # noqa: N802  a class there
        assert float_workspace_buffer.numel() == 128 << 20
        return _Wrapper(self)


class _Wrapper:
    def __init__(self, module):
        self.module = module

    def plan(
        self, qo_indptr, kv_indptr, kv_indices, kv_len_arr, num_heads, head_dim_ckv, head_dim_kpe, page_size, causal,
        sm_scale, q_data_type, kv_data_type,
    ):  # fmt: skip
        self.module.plans += 1
        assert (head_dim_ckv, head_dim_kpe, causal) == (512, 64, False)
        assert q_data_type == kv_data_type == torch.bfloat16
        assert {x.dtype for x in (qo_indptr, kv_indptr, kv_indices, kv_len_arr)} == {torch.int32}
        pairs = [list(itertools.pairwise(indptr.tolist())) for indptr in (qo_indptr, kv_indptr)]
        self.sequences = list(zip(*pairs, kv_len_arr.tolist(), strict=True))
        self.indices, self.heads, self.page, self.scale = kv_indices, num_heads, page_size, sm_scale

    def run(self, q_nope, q_pe, ckv_cache, kpe_cache, out=None):
        assert q_nope.shape[1] == self.heads and ckv_cache.shape[1] == kpe_cache.shape[1] == self.page
        q, pages = torch.cat([q_nope, q_pe], -1), torch.cat([ckv_cache, kpe_cache], -1)
        results = [
            on_pages(q[begin:end], pages, self.indices[first:last], length, self.scale)
            for (begin, end), (first, last), length in self.sequences
        ]
        return torch.cat(results)
