"""How fast a model writes, beside others, under the same conditions; and how fast the memory would let it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import EncoderDecoderCache, PreTrainedModel

from .measurements import SPEED, Record
from .outputs import cache_of
from .structure import accepts, cache_argument

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
    tasks = {
        name: {str(n): lambda write=write, n=n: write(n) for n in (1, new_tokens)} for name, write in writers.items()
    }
    times_in_rounds(tasks, 1)
    figures: dict[str, dict[str, float]] = {}
    for name, times in times_in_rounds(tasks, rounds).items():
        first, total = times.values()
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


def times_in_rounds(
    tasks: Mapping[str, Mapping[str, Callable[[], Any]]],
    rounds: int,
    max_seconds: float = float("inf"),
    min_rounds: int = 1,
    pause: float = 0.0,
) -> dict[str, dict[str, list[float]]]:
    """
    Time what several contestants do: every round runs everything of each once, so that a load of the machine meets all.

    Args:
        tasks (`Mapping[str, Mapping[str, Callable[[], Any]]]`): For each contestant its tasks, by name. Nothing is run to warm up.
        rounds (`int`): The most rounds.
        max_seconds (`float`, *optional*): Begin no round after so many seconds, beyond `min_rounds`.
        min_rounds (`int`, defaults to 1): Rounds that are run however long they take.
        pause (`float`, defaults to 0): Seconds to wait before each contestant, as the threads of the one before may still spin.

    Returns:
        Seconds of each task of each contestant, one for every round.
    """
    times: dict[str, dict[str, list[float]]] = {name: {task: [] for task in own} for name, own in tasks.items()}
    began = time.perf_counter()
    for index in range(rounds):
        if index >= min_rounds and time.perf_counter() - began > max_seconds:
            break
        for name, own in tasks.items():
            if pause:
                time.sleep(pause)
            for task, run in own.items():
                times[name][task].append(seconds_of(run))
    return times


def spread(values: Iterable[float]) -> dict[str, float]:
    """`median`, `min` and `max`."""
    values = list(values)
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


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


# The limit ---------------------------------------------------------------------------------------------------------------
def memory_bandwidth(size: int = 512 * 2**20, passes: int = 5) -> float:
    """Bytes per second at which torch's threads read memory: the median of some passes over `size` bytes, after one."""
    block = torch.ones(size // 4, dtype=torch.float32)
    times = [seconds_of(block.sum) for _ in range(passes + 1)]
    return size / statistics.median(times[1:])


class Decoding:
    """
    Steps of a decoder without the loop of `generate`: the model's forward pass over new tokens, behind what it has read.

    Args:
        model (`PreTrainedModel`): A model that writes, or one that behaves so.
        inputs (`Mapping[str, Any]`): The prompt as its `forward` takes it; `encoder_outputs` for an encoder-decoder. None of it
            may be padding.
    """

    def __init__(self, model: PreTrainedModel, inputs: Mapping[str, Any]):
        seq2seq = model.config.is_encoder_decoder
        self.model, self.tokens = model, "decoder_input_ids" if seq2seq else "input_ids"
        self.options: dict[str, Any] = {"use_cache": True, "return_dict": True}
        if accepts(model.forward, "logits_to_keep"):
            self.options["logits_to_keep"] = 1
        batch_size = len(next(value for value in inputs.values() if isinstance(value, torch.Tensor)))
        self.new = torch.zeros((batch_size, 1), dtype=torch.long, device=model.device)  # which ones does not matter
        prompt = dict(inputs) | ({self.tokens: self.new} if seq2seq else {})
        with torch.no_grad():
            outputs = model(**prompt, **self.options)
        self.cache: Any = cache_of(outputs)
        self.options[cache_argument(model.forward)] = self.cache
        if seq2seq:
            self.options |= {name: inputs[name] for name in ("encoder_outputs", "attention_mask")}

    @torch.no_grad()
    def step(self, count: int = 1) -> Any:
        """What a pass over so many new tokens gives."""
        return self.model(**{self.tokens: self.new.expand(-1, count)}, **self.options)

    def cache_bytes(self) -> int:
        """Bytes of the cache, that of the cross-attention included."""
        caches = [self.cache]
        if isinstance(self.cache, EncoderDecoderCache):
            caches = [self.cache.self_attention_cache, self.cache.cross_attention_cache]
        tensors = [value for cache in caches for layer in cache.layers for value in vars(layer).values()]
        return sum(tensor.nbytes for tensor in tensors if isinstance(tensor, torch.Tensor))


def step_bytes(
    model: PreTrainedModel,
    inputs: Mapping[str, Any],
    new_tokens: int,
    dtype: torch.dtype | None = None,
    int8_block: int | None = None,
) -> dict[str, float]:
    """
    What a decoding step must read at least: the weights of every module that it runs (of embeddings it reads a few rows, and
    keys and values of the cross-attention are there already), and the cache.

    Args:
        model, inputs: As for [`Decoding`].
        new_tokens (`int`): Tokens to write. The cache grows; what is told is its mean over the steps after the first token.
        dtype (`torch.dtype`, *optional*): Count weights and cache in this precision; by default in that of the model.
        int8_block (`int`, *optional*): Count matrices as int8, with a float32 scale for so many weights in a row; 0 for one
            scale a row.

    Returns:
        `dict[str, float]`: bytes of `weights`, of the `cache`, and of both, the `total`.
    """
    decoding, used = Decoding(model, inputs), []
    after_first = decoding.cache_bytes()
    hooks = [module.register_forward_hook(lambda it, *_: used.append(it)) for module in model.modules()]
    try:
        decoding.step()
    finally:
        for hook in hooks:
            hook.remove()
    growth = decoding.cache_bytes() - after_first
    read = {
        id(parameter): parameter
        for module in used
        if not isinstance(module, nn.Embedding)
        for parameter in module.parameters(recurse=False)
    }
    weights = 0.0
    for parameter in read.values():
        size: float = (dtype or parameter.dtype).itemsize
        if int8_block is not None and parameter.dim() > 1:
            size = 1 + torch.float32.itemsize / (int8_block or parameter.shape[-1])
        weights += parameter.numel() * size
    cache = (after_first + growth * new_tokens / 2) * (dtype or model.dtype).itemsize / model.dtype.itemsize
    return {"weights": weights, "cache": cache, "total": weights + cache}


__all__ = [
    "Decoding",
    "measure_speed",
    "memory_bandwidth",
    "seconds_of",
    "speed_beside_llm",
    "spread",
    "step_bytes",
    "times_in_rounds",
]
