"""How fast a model writes, beside others, under the same conditions."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from .measurements import SPEED, Record

if TYPE_CHECKING:
    from .modeling_llm2slm import LLM2SLMForConditionalGeneration
    from .processing_llm2slm import LLM2SLMProcessor

LLM, THIS_MODEL = "LLM", "this model"


def measure_speed(
    writers: Mapping[str, Callable[[int], Any]], new_tokens: int, rounds: int = 5
) -> dict[str, dict[str, float]]:
    """
    Time models that write, all one after another in every round, so that a load of the machine meets all of them.

    Args:
        writers (`Mapping[str, Callable[[int], Any]]`): For each model a function that reads one prompt and writes exactly so
            many tokens. The others are compared with the first, which is called the LLM.
        new_tokens (`int`): Tokens to write, at least 2.
        rounds (`int`, defaults to 5): Rounds, after one for warming up.

    Returns:
        For each, medians over the rounds: milliseconds to the first token (reading included) and for each further one,
        seconds in all, the fastest and the slowest round, tokens per second, and the ratio to the first model.

    Raises:
        ValueError: for fewer than 2 tokens or no rounds.
    """
    if new_tokens < 2 or rounds < 1:
        raise ValueError(f"Speed takes at least 2 new tokens and 1 round, got {new_tokens} and {rounds}.")
    times: dict[str, list[list[float]]] = {name: [] for name in writers}
    for _ in range(rounds + 1):
        for name, write in writers.items():
            times[name].append([seconds_of(lambda w=write, n=n: w(n)) for n in (1, new_tokens)])  # type: ignore[misc]
    figures: dict[str, dict[str, float]] = {}
    for name, pairs in times.items():
        first, total = zip(*pairs[1:], strict=True)
        further = [(t - f) / (new_tokens - 1) for f, t in zip(first, total, strict=True)]
        seconds = statistics.median(total)
        compared = next(iter(figures.values()), {"total, s": seconds})["total, s"]
        figures[name] = {
            "first token, ms": 1000 * statistics.median(first),
            "further token, ms": 1000 * statistics.median(further),
            "total, s": seconds,
            "fastest, s": min(total),
            "slowest, s": max(total),
            "tokens/s": new_tokens / seconds,
            "times the LLM": compared / seconds,
        }
    return figures


def seconds_of(function: Callable[[], Any], repeats: int = 1) -> float:
    """The shortest of the times that some calls of `function` take, in seconds."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times)


def speed_beside_llm(
    model: LLM2SLMForConditionalGeneration,
    processor: LLM2SLMProcessor,
    prompt: str,
    new_tokens: int = 64,
    rounds: int = 5,
) -> Record:
    """
    A record of how fast a model and its whole LLM write: batch size 1, greedy, one prompt, exactly `new_tokens` tokens.

    Returns:
        `dict`: `kind`, `settings` (lengths, dtypes, rounds) and the `figures` of [`measure_speed`], for [`write_record`].

    Raises:
        ValueError: if the model was not loaded with `load_llm="whole"`.
    """
    llm = model.model.whole_llm
    if llm is None:
        raise ValueError('The speed beside the LLM takes the whole LLM: load the model with `load_llm="whole"`.')
    inputs = processor(text=[prompt], return_tensors="pt").to(model.device)
    read = processor.llm_tokenizer(prompt, return_tensors="pt").to(llm.device)

    def lengths(count: int) -> dict[str, Any]:
        return {"min_new_tokens": count, "max_new_tokens": count, "do_sample": False, "num_beams": 1}

    names = ("input_ids", "attention_mask")
    writers = {
        LLM: lambda count: llm.generate(**{name: read[name] for name in names}, **lengths(count)),
        THIS_MODEL: lambda count: model.generate(**inputs, **lengths(count)),
    }
    settings = {
        "prompt tokens": inputs["input_ids"].shape[1],
        "new tokens": new_tokens,
        "batch size": 1,
        "decoding": "greedy",
        "LLM in": str(llm.dtype).removeprefix("torch."),
        "SLM in": str(model.slm.dtype).removeprefix("torch."),
        "rounds, of which medians": rounds,
    }
    return {"kind": SPEED, "settings": settings, "figures": measure_speed(writers, new_tokens, rounds)}


__all__ = ["measure_speed", "seconds_of", "speed_beside_llm"]
