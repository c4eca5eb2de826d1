"""Models whose ranks share their heads, or their weights."""

import mla_models as models
import pytest
import torch
from ranks import Ranks
from test_integration_transformers import ALL_ABSORBED, BF16_LOGITS, FP8_LOGITS, relative_error

from mla_fp8.integrations.transformers import enable

WAYS = {"fp8": FP8_LOGITS, "unquantized": BF16_LOGITS}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    two = Ranks("cpu", 2, tmp_path_factory.mktemp("ranks"))
    yield two
    two.stop()


def parallel_logits(mesh, weights, checkpoint):
    """On one rank: logits of the model whose layers share their heads, and the heads that this rank holds."""
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    model = models.build(**models.DENSE)
    models.quantize_kv_b_proj(model)
    model = model.bfloat16()
    plan = {"q_b_proj": ColwiseParallel(), "kv_b_proj": ColwiseParallel(), "o_proj": RowwiseParallel()}
    for layer in models.attentions(model):
        parallelize_module(layer, mesh, plan)
    summary = enable(model, weights=weights, checkpoint=checkpoint, prefill_threshold=ALL_ABSORBED)
    held = [layer.mla_fp8.w_uk.float() for layer in models.attentions(model)] if weights == "fp8" else []
    got = models.logits(model, models.prompt())
    with torch.no_grad():  # an in-place update of this rank's part is followed, too
        for layer in models.attentions(model):
            layer.kv_b_proj.weight.mul_(0.5)
    return summary.enabled, held, got, models.logits(model, models.prompt())


@pytest.mark.parametrize("weights, from_checkpoint", [("fp8", False), ("fp8", True), ("unquantized", False)])
def test_a_rank_enables_its_own_heads(ranks, tmp_path, inputs, weights, from_checkpoint):
    exact = models.build(**models.DENSE)
    blocks = models.quantize_kv_b_proj(exact, tmp_path)
    want = models.logits(exact, inputs)
    for layer in models.attentions(exact):
        layer.kv_b_proj.weight.data.mul_(0.5)
    halved = models.logits(exact, inputs)
    for rank, (names, held, got, after) in enumerate(
        ranks.run(parallel_logits, weights, tmp_path if from_checkpoint else None)
    ):
        assert len(names) == models.LAYERS
        assert relative_error(got, want) < (BF16_LOGITS if from_checkpoint else WAYS[weights])
        assert relative_error(after, halved) < WAYS[weights] < relative_error(got, halved)
        for w_uk, (value, _) in zip(held, blocks if from_checkpoint else [], strict=from_checkpoint):
            mine = value.unflatten(0, (models.HEADS, 256)).chunk(2)[rank]
            assert torch.equal(w_uk, mine[:, :128].mT.float())


def colwise_by_transformers(mesh, weights):
    """Logits on one rank of a model that transformers' own tensor parallel shares."""
    from transformers.distributed.tensor_parallel import apply_tensor_parallelism

    model = models.build("DeepseekV2", **models.DENSE)
    models.quantize_kv_b_proj(model)
    model, styles = model.bfloat16(), {"q_b_proj": "colwise", "kv_b_proj": "colwise", "o_proj": "rowwise"}
    for i in range(models.LAYERS):
        plan = {f"model.layers.{i}.self_attn.{name}": style for name, style in styles.items()}
        apply_tensor_parallelism(model, mesh, {**plan, **{f"{name}.weight": style for name, style in plan.items()}})
    enable(model, weights=weights, prefill_threshold=ALL_ABSORBED)
    return models.logits(model, models.prompt())


@pytest.mark.parametrize("weights", WAYS)
def test_transformers_own_tensor_parallel(ranks, inputs, weights):
    pytest.importorskip("transformers.distributed.tensor_parallel", reason="of transformers later than 5.15")
    exact = models.build("DeepseekV2", **models.DENSE)
    models.quantize_kv_b_proj(exact)
    want = models.logits(exact, inputs)
    for got in ranks.run(colwise_by_transformers, weights):
        assert relative_error(got, want) < BF16_LOGITS * 2**0.5  # whose halves are rounded before they are added


def refused_by_fsdp(mesh):
    from torch.distributed.fsdp import fully_shard

    model = models.build(**models.DENSE).bfloat16()
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    with pytest.raises(ValueError, match=r"layers.{0-1}.self_attn: is sharded by FSDP, which gathers kv_b_proj only"):
        enable(model)


def test_fsdp_is_refused_with_its_reason(ranks):
    ranks.run(refused_by_fsdp)
