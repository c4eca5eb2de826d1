"""Forced decoding in vLLM: every sequence writes a given text, one decode step a token.

`Forced` is a logits processor: at step i of a request it leaves only token i of the request's
`extra_args["forced"]`. vLLM reports raw log-probabilities (`logprobs_mode="raw_logprobs"`, its
default), which are those before any processor, so every decode step tells what the model thinks
of a text that it did not choose. Prompt log-probabilities would come from prefill instead.

It is attached to a running engine and taken off again: given to `LLM(logits_processors=...)`, it
would make every step wait for the tokens of the step before, also those that are timed. While it is
attached, the lm_head keeps its fp32 sums: rounded to bf16, a logit of 8 to 16 is known to 0.06 only.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .texts import Text

ARGUMENT = "forced"
TOP = 2  # log-probabilities a position, for the best token and its margin


class State(NamedTuple):
    forced: list[int]
    written: list[int]  # the engine's own list of the request's tokens, which it extends; unknown ones are -1

    @property
    def token(self) -> int:
        return self.forced[min(len(self.written), len(self.forced) - 1)]


class Forced:
    """What vLLM calls a logits processor; see vllm.v1.sample.logits_processor.LogitsProcessor."""

    def __init__(self) -> None:
        self.states: dict[int, State] = {}  # by row of the batch

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: Any) -> None:
        """`batch_update` tells in this order which rows went, came and moved."""
        if batch_update is None:
            return
        for row in batch_update.removed:
            self.states.pop(row, None)
        for row, params, _, written in batch_update.added:
            self.states.pop(row, None)
            if forced := (params.extra_args or {}).get(ARGUMENT):
                self.states[row] = State(forced, written)
        for source, target, direction in batch_update.moved:
            moved, other = self.states.pop(source, None), self.states.pop(target, None)
            if moved is not None:
                self.states[target] = moved
            if other is not None and direction.name == "SWAP":
                self.states[source] = other

    def apply(self, logits: Tensor) -> Tensor:
        if self.states:
            rows = torch.tensor(list(self.states), device=logits.device)
            tokens = torch.tensor([state.token for state in self.states.values()], device=logits.device)
            logits[rows] = float("-inf")
            logits[rows, tokens] = 0.0
        return logits


@contextmanager
def attached(llm: Any, logits: torch.dtype | None) -> Iterator[None]:
    """In it the engine asks a `Forced`, and its lm_head makes logits of this dtype; None: of its own.

    Only for an engine in this process, with no request under way.
    """
    processor = Forced()
    own: list[tuple[Any, Any]] = []  # modules and the dtype that they had

    def attach(worker: Any) -> None:
        runner = worker.model_runner
        heads = [one for one in runner.get_model().modules() if hasattr(one, "head_dtype")] if logits else []
        if logits and not heads:
            raise ValueError("forced: this engine has no module with head_dtype; run with --logits model")
        runner.input_batch.logitsprocs.non_argmax_invariant.append(processor)
        runner.input_batch.logitsprocs_need_output_token_ids = True
        for head in heads:
            own.append((head, head.head_dtype))
            head.head_dtype = logits

    def detach(worker: Any) -> None:
        batch = worker.model_runner.input_batch
        batch.logitsprocs.non_argmax_invariant.remove(processor)
        batch.logitsprocs_need_output_token_ids = False
        for head, dtype in own:
            head.head_dtype = dtype

    llm.collective_rpc(attach)
    try:
        yield
    finally:
        llm.collective_rpc(detach)


def row(index: int, text: Text, output: Any) -> dict[str, Any]:
    """One text: a list entry a decode step. The first token is left out, for prefill made it."""
    if list(output.token_ids) != text.continuation:
        raise ValueError(f"forced: tokens must be {text.continuation[:4]}..., got {list(output.token_ids)[:4]}...")
    best: list[tuple[int, float]] = []
    second, forced = [], []
    for token, said in list(zip(text.continuation, output.logprobs, strict=True))[1:]:
        ranked = sorted(((one.logprob, -name) for name, one in said.items()), reverse=True)
        best.append((-ranked[0][1], ranked[0][0]))
        second.append(ranked[1][0])
        forced.append(said[token].logprob)
    return {
        "measure": "forced",
        "sequence": index,
        "best": [token for token, _ in best],
        "best_logprob": [logprob for _, logprob in best],
        "second_logprob": second,
        "forced_logprob": forced,
    }


def rows(llm: Any, params: Any, given: list[Text], batch: int, logits: torch.dtype | None) -> list[dict[str, Any]]:
    """All texts, `batch` of them at a time. `params` makes vLLM's SamplingParams."""
    result = []
    with attached(llm, logits):
        for start in range(0, len(given), batch):
            part = given[start : start + batch]
            asked = [
                params(max_tokens=len(text.continuation), logprobs=TOP, extra_args={ARGUMENT: text.continuation})
                for text in part
            ]
            prompts = [{"prompt_token_ids": text.prompt} for text in part]
            for at, answer in enumerate(llm.generate(prompts, asked, use_tqdm=False)):
                result.append({**row(start + at, part[at], answer.outputs[0]), "batch": batch})
    return result
