"""A batch of an engine's requests of which all decode: nothing is timed while one is in prefill."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from . import timeline
from .texts import prompt_of

PROFILED_STEPS = 12
TIMED_STEPS, ROUNDS, WARM_STEPS = 32, 5, 8
DRAINING_STEPS = 3  # with asynchronous scheduling a step may be under way when its requests are taken back
LEAST_TOKENS = 2  # of each sequence: the first is of its prefill


class Decoding:
    """Steps of an engine, in this process. Nothing is asked for before the end of a request, as `LLM.generate` does."""

    def __init__(self, engine: Any, batch: int) -> None:
        self.engine, self.batch = engine, batch

    def written(self) -> int:
        """Tokens of the sequence that has the fewest."""
        states = self.engine.output_processor.request_states
        if len(states) != self.batch:
            raise RuntimeError(f"decoding: {self.batch} sequences must decode, got {len(states)}: some have ended")
        return min(state.detokenizer.num_output_tokens() for state in states.values())

    def steps(self, count: int) -> float:
        """Seconds a step, of `count` of them."""
        torch.cuda.synchronize()
        before, began = self.written(), time.perf_counter()
        for _ in range(count):
            self.engine.step()
        torch.cuda.synchronize()
        seconds = time.perf_counter() - began
        return seconds / (self.written() - before)


@contextmanager
def decoding(llm: Any, params: Any, batch: int, context: int, vocab_size: int) -> Iterator[Decoding]:
    """In it, `batch` sequences of `context` tokens and a few more decode, and none begins or ends."""
    engine = llm.llm_engine
    left = engine.model_config.max_model_len - context
    running = Decoding(engine, batch)
    names = [f"{batch}x{context}-{index}" for index in range(batch)]
    for index, name in enumerate(names):
        prompt = {"prompt_token_ids": prompt_of(context, index, vocab_size)}
        engine.add_request(name, prompt, params(max_tokens=left))
    try:
        while running.written() < LEAST_TOKENS:
            engine.step()
        yield running
    finally:
        engine.abort_request(names)
        for _ in range(DRAINING_STEPS):
            engine.step()


def timeline_row(llm: Any, params: Any, batch: int, context: int, vocab_size: int) -> dict[str, Any]:
    from torch.profiler import ProfilerActivity, profile

    with decoding(llm, params, batch, context, vocab_size) as running:
        running.steps(WARM_STEPS)
        with profile(activities=[ProfilerActivity.CUDA]) as record:
            running.steps(PROFILED_STEPS)
    found = timeline.summary(timeline.windows(timeline.kernels_of(record)))
    return {"measure": "timeline", "batch": batch, "context": context, **found}


def step_row(llm: Any, params: Any, batch: int, context: int, vocab_size: int) -> dict[str, Any]:
    """Milliseconds a step, the engine's own work on the host included; rounds follow each other."""
    with decoding(llm, params, batch, context, vocab_size) as running:
        running.steps(WARM_STEPS)
        times = sorted(running.steps(TIMED_STEPS) * 1e3 for _ in range(ROUNDS))
    return {
        "measure": "step",
        "batch": batch,
        "context": context,
        "ms": times[len(times) // 2],
        "ms_min": times[0],
        "ms_max": times[-1],
    }
