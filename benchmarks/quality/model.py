"""A small character model with DeepSeek-V3's MLA dims, trained on the standard library's sources
and kept in a cache.

Characters are bytes. Whole files are held out, chosen by their name, so that no text is seen in
training.
"""

import dataclasses
import hashlib
import json
import math
import os
import sysconfig
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from mla_fp8.jit import cache_directory

MLA_DIMS = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
VOCABULARY = 256
# Not code that a person wrote, or not in every installation: tests, tables, the text of the manual,
# other packages.
LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "encodings", "pydoc_data", "__pycache__"}
HELD_OUT_ONE_IN = 10  # files
MAX_GRADIENT_NORM = 1.0


@dataclass(frozen=True)
class Recipe:
    """All that decides the weights, beside the text."""

    hidden: int = 192
    layers: int = 2
    heads: int = 4
    intermediate: int = 512
    context: int = 256  # characters
    batch: int = 8
    steps: int = 1200
    warmup: int = 40  # steps
    matrix_rate: float = 5e-3  # learning rate of Muon, for the matrices inside the layers
    other_rate: float = 5e-3  # of AdamW, for embeddings, head and norms
    seed: int = 0


@dataclass(frozen=True)
class Corpus:
    train: Tensor  # uint8
    held_out: Tensor  # uint8

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.train.numpy().tobytes() + b"|" + self.held_out.numpy().tobytes()).hexdigest()


def standard_library() -> Corpus:
    root = Path(sysconfig.get_path("stdlib"))
    files = (path.relative_to(root) for path in root.rglob("*.py"))
    names = sorted(path.as_posix() for path in files if LEFT_OUT.isdisjoint(path.parts))
    parts: dict[bool, list[bytes]] = {False: [], True: []}
    for name in names:
        held_out = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % HELD_OUT_ONE_IN == 0
        parts[held_out].append((root / name).read_bytes())
    train, test = (torch.frombuffer(bytearray(b"\0".join(parts[key])), dtype=torch.uint8) for key in (False, True))
    return Corpus(train, test)


def build(recipe: Recipe) -> Any:
    """The untrained model, fp32."""
    torch.manual_seed(recipe.seed)
    config: Any = DeepseekV3Config(
        **MLA_DIMS,  # type: ignore[arg-type]
        hidden_size=recipe.hidden,
        intermediate_size=recipe.intermediate,
        num_hidden_layers=recipe.layers,
        first_k_dense_replace=recipe.layers,  # no experts: a router may send a token elsewhere for the least noise
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.heads,
        q_lora_rank=None,
        vocab_size=VOCABULARY,
        max_position_embeddings=recipe.context,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    return DeepseekV3ForCausalLM(config)


def batches(recipe: Recipe, text: Tensor) -> Iterator[Tensor]:
    """int64 [batch, context + 1] for every step, drawn with the recipe's seed."""
    generator = torch.Generator().manual_seed(recipe.seed)
    span = torch.arange(recipe.context + 1)
    for _ in range(recipe.steps):
        begin = torch.randint(len(text) - recipe.context, (recipe.batch, 1), generator=generator)
        yield text[begin + span].long()


def train(recipe: Recipe, text: Tensor, tick: Callable[[float], object] = lambda loss: None) -> Any:
    """Muon and AdamW, fp32: a linear warm-up, a constant rate, a linear decay in the second half."""
    model = build(recipe)
    inside = {name: p for name, p in model.model.layers.named_parameters() if p.dim() == 2}
    others = [p for p in model.parameters() if all(p is not q for q in inside.values())]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(inside.values(), lr=recipe.matrix_rate, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=recipe.other_rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]

    def share(step: int) -> float:
        return min(1.0, (step + 1) / recipe.warmup, 2 * (recipe.steps - step) / recipe.steps)

    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, share) for optimizer in optimizers]
    for batch in batches(recipe, text):
        logits = model(batch[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRADIENT_NORM)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        tick(loss.item())
    return model.eval()


def cache_key(recipe: Recipe, corpus: Corpus) -> str:
    """Of all that decides the weights but the machine, torch's version and its order of sums."""
    facts = {"recipe": dataclasses.asdict(recipe), "mla": MLA_DIMS, "text": corpus.digest}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def trained(
    recipe: Recipe, corpus: Corpus, tick: Callable[[float], object] = lambda loss: None, cache: Path | None = None
) -> tuple[Any, dict[str, float]]:
    """The trained model, from the cache or trained now, and the seconds that its training took.

    They are "seconds", and "processor_seconds" of all threads: on a busy machine the first say how
    busy it was.
    """
    path = (cache or cache_directory() / "quality") / f"{cache_key(recipe, corpus)}.safetensors"
    model = build(recipe).eval()
    if not path.exists():
        begin, begin_processor = time.monotonic(), time.process_time()
        model = train(recipe, corpus.train, tick)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}")  # a run that is cut off leaves no half a file under the name
        took = time.monotonic() - begin, time.process_time() - begin_processor
        save_file(model.state_dict(), part, dict(zip(("seconds", "processor_seconds"), map(str, took), strict=True)))
        part.replace(path)
    with safe_open(path, "pt") as file:
        model.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
        return model, {name: float(value) for name, value in file.metadata().items()}


def weights_digest(model: Any) -> str:
    """Two machines whose sums differ in order train two models: this tells them apart."""
    digest = hashlib.sha256()
    for _, tensor in sorted(model.state_dict().items()):
        digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def ngram_nll(corpus: Corpus, order: int) -> float:
    """Held-out NLL in nats per character of counts: 1 looks at no character before, 2 at one."""
    shape = (VOCABULARY,) * order
    places = [VOCABULARY**i for i in reversed(range(order))]

    def cells(text: Tensor) -> Tensor:
        return sum(
            (text[i : len(text) - order + 1 + i].long() * place for i, place in enumerate(places)),
            start=torch.zeros(len(text) - order + 1, dtype=torch.long),
        )

    counts = torch.bincount(cells(corpus.train), minlength=math.prod(shape)).view(shape).double() + 1 / VOCABULARY
    log_p = (counts / counts.sum(-1, keepdim=True)).log()
    return float(-log_p.flatten()[cells(corpus.held_out)].mean())
