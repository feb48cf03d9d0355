"""Timing models without their weights: stand-ins of the real widths, run in as many of their layers as there is time for.

A stand-in is made of a configuration alone. Its layers share the memory of a few, since time does not depend on what the
weights are, only on where they come from: they are more than the processor's caches hold, so they are read from memory as
those of the model itself are. What it runs is transformers' own code, so what the framework costs is timed with the rest.

Where all layers would take too long, some are left out, and the clock at each of those that run tells what the others take.
"""

from __future__ import annotations

import copy
import re
import statistics
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import (
    Cache,
    DynamicCache,
    EncoderDecoderCache,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.initialization import no_init_weights
from transformers.modeling_outputs import BaseModelOutput

from .configuration_llm2slm import decoder_text_config, encoder_text_config
from .loading import slm_auto_class
from .structure import accepts, cache_argument, reader
from .weight_files import building

# Of one list of layers, memory for so many bytes; more than the caches of a processor, or of the part of it that a core reads.
DISTINCT_BYTES = 2**28
# Layers that are run first, to see how many there is time for: the first may do more than the others, the second does not.
FEW_LAYERS = 2
# Steps of writing that are timed at a time.
STEPS = 6
# Of an encoder-decoder model; not every configuration names one.
START_TOKEN = 0


# Models ------------------------------------------------------------------------------------------------------------------
def skeleton(config: PreTrainedConfig, part: str) -> PreTrainedModel:
    """
    The model that writes of this configuration, without memory for its weights.

    Args:
        config (`PreTrainedConfig`): Its configuration.
        part (`str`): What it is, for errors.

    Raises:
        ValueError: if none can be built of it, or none that writes.
    """
    auto_class = slm_auto_class(config, part)
    with building(f"A `{config.model_type}` model for {part}"), torch.device("meta"):
        return auto_class.from_config(copy.deepcopy(config), trust_remote_code=False)


def stand_in(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """A model that writes, of this configuration and in eval mode, with random weights, of which layers have some in common."""
    # What is allocated here and never written to takes no memory.
    with no_init_weights():
        model = slm_auto_class(config).from_config(copy.deepcopy(config), dtype=dtype, trust_remote_code=False)
    model.tie_weights()
    fill_weights(model, DISTINCT_BYTES)
    return model.requires_grad_(False).eval()


def fill_weights(model: nn.Module, distinct_bytes: int) -> None:
    """
    Give a model weights. Matrices at the same place of the layers of a list are in turn the same ones, as soon as the list
    holds `distinct_bytes`.
    """
    noise = torch.randn(2**20) * 0.02
    allocated: dict[str, int] = {}
    alike: dict[tuple[str, torch.Size], list[torch.Tensor]] = {}
    taken: dict[tuple[str, torch.Size], int] = {}
    for name, parameter in model.named_parameters():
        stack = re.split(r"\.\d+\.", name, maxsplit=1)[0]
        kind = (re.sub(r"\.\d+\.", ".*.", name), parameter.shape)
        if kind not in alike or allocated.get(stack, 0) < distinct_bytes:
            # Ones for norms: a signal that dies away would end in numbers that processors are slow with.
            values = torch.ones(parameter.shape) if parameter.dim() < 2 else resized(noise, parameter.shape)
            alike.setdefault(kind, []).append(values.to(parameter.dtype))
            allocated[stack] = allocated.get(stack, 0) + parameter.nbytes
        taken[kind] = taken.get(kind, -1) + 1
        parameter.data = alike[kind][taken[kind] % len(alike[kind])]


def resized(noise: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """`noise` over and over in a new tensor of a shape. Drawing so many random numbers would take seconds."""
    size = shape.numel()
    return noise[:size].repeat(-(-size // len(noise)))[:size].reshape(shape)


class LayerStack:
    """
    The layers of a model's encoder or decoder, to be run in part, with a clock at each.

    Raises:
        ValueError: if it has no list of layers.
    """

    def __init__(self, part: nn.Module):
        lists = {name: module for name, module in part.named_modules() if isinstance(module, nn.ModuleList)}
        # The longest, those inside of layers left out.
        outer = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
        if not outer:
            raise ValueError(
                f"Found no list of layers in a {type(part).__name__}, so what its layers take can't be told."
            )
        parent, _, self.name = max(outer, key=lambda name: len(lists[name])).rpartition(".")
        self.owner = part.get_submodule(parent)
        self.layers = list(getattr(self.owner, self.name))
        self.stamps: list[float] = []
        # Seconds that other things took which are done for each layer that runs, and all at once.
        self.beside: list[float] = []

    def __len__(self) -> int:
        return len(self.layers)

    @contextmanager
    def cut(self, depth: int) -> Iterator[None]:
        """Leave out all but the first `depth` layers for a while; `stamps` has when each began and when the last ended."""

        def stamp(*_: Any) -> None:
            self.stamps.append(time.perf_counter())

        self.stamps.clear()
        self.beside.clear()
        hooks = [layer.register_forward_pre_hook(stamp) for layer in self.layers[:depth]]
        hooks.append(self.layers[depth - 1].register_forward_hook(stamp))
        setattr(self.owner, self.name, nn.ModuleList(self.layers[:depth]))
        try:
            yield
        finally:
            setattr(self.owner, self.name, nn.ModuleList(self.layers))
            for hook in hooks:
                hook.remove()

    def layer_seconds(self, depth: int) -> list[list[float]]:
        """For each pass since the stack was cut to `depth`, the seconds that each layer took."""
        passes = [self.stamps[begin : begin + depth + 1] for begin in range(0, len(self.stamps), depth + 1)]
        return [[end - begin for begin, end in zip(times, times[1:], strict=False)] for times in passes]


# Timing ------------------------------------------------------------------------------------------------------------------
class Timing:
    """
    Times one thing that a model does, in as many of its layers as there is time for.

    Args:
        stack ([`LayerStack`]): The layers that it runs through.
        run (`Callable[[int], list[float]]`): Does it with so many layers, once or a few times; the seconds of each time.
    """

    def __init__(self, stack: LayerStack, run: Callable[[int], list[float]]):
        self.stack, self.run = stack, run
        self.depth = min(FEW_LAYERS, len(stack))
        self.spent = self.last = 0.0
        self.times: list[float] = []
        self.layer_times: list[list[float]] = []
        self.beside: list[float] = []

    def sample(self) -> None:
        """Do it once more."""
        start = time.perf_counter()
        with self.stack.cut(self.depth):
            self.times += self.run(self.depth)
        self.layer_times += self.stack.layer_seconds(self.depth)
        self.beside += self.stack.beside
        self.last = time.perf_counter() - start
        self.spent += self.last

    def choose_depth(self, seconds: float) -> None:
        """Find out how many layers can be run three times within so many `seconds`, and drop what that took to find out."""
        self.sample()
        if self.last > seconds / 3:
            return
        self.forget()  # what is done for the first time takes longer
        self.sample()
        further = (seconds / 3 - self.last) / (len(self.layer_times) * self.layer_seconds())
        depth = max(self.depth, min(len(self.stack), self.depth + int(further)))
        if depth > self.depth:
            self.depth = depth
            self.forget()

    def forget(self) -> None:
        self.times, self.layer_times, self.beside = [], [], []

    def layer_seconds(self) -> float:
        """Seconds that a layer takes: the mean over the layers but the first of their medians, and its part of what is beside."""
        medians = [statistics.median(times) for times in zip(*self.layer_times, strict=True)]
        beside = statistics.median(self.beside) / self.depth if self.beside else 0.0
        return statistics.mean(medians[1:] or medians) + beside

    def seconds(self, num_layers: int | None = None) -> float:
        """Seconds that it takes with all layers, or so many."""
        num_layers = len(self.stack) if num_layers is None else num_layers
        return statistics.median(self.times) + (num_layers - self.depth) * self.layer_seconds()


def take_times(timings: Collection[Timing], seconds: float) -> None:
    """
    Time everything within about so many `seconds`, one after another in every round, so that a load of the machine meets all.
    """
    share = seconds / len(timings)
    for timing in timings:
        timing.choose_depth(share)
    left = list(timings)
    while left:
        left = [timing for timing in left if not timing.times or timing.spent + timing.last <= share]
        for timing in left:
            timing.sample()


# What is timed -----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Workload:
    """
    What is read and written at a time.

    Args:
        prompt_length (`int`): Tokens of each prompt.
        output_length (`int`): Tokens of each response.
        batch_size (`int`): Prompts at a time.
        num_beams (`int`): Beams of each response.
    """

    prompt_length: int
    output_length: int
    batch_size: int = 1
    num_beams: int = 1

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")

    @property
    def rows(self) -> int:
        """Sequences that are written at a time."""
        return self.batch_size * self.num_beams


class StepClock(LogitsProcessor):
    """Looks at the clock whenever the scores of the next token are there, and leaves them as they are."""

    def __init__(self) -> None:
        self.stamps: list[float] = []

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        self.stamps.append(time.perf_counter())
        return scores


class Writer:
    """
    A stand-in that reads and writes, step by step as its `generate` does.

    Args:
        model (`PreTrainedModel`): The stand-in.
        workload ([`Workload`]): What it reads and writes.
    """

    def __init__(self, model: PreTrainedModel, workload: Workload):
        self.model, self.workload = model, workload
        self.is_encoder_decoder = model.config.is_encoder_decoder
        self.reading = LayerStack(reader(model))
        self.writing = LayerStack(model.get_decoder()) if self.is_encoder_decoder else self.reading
        self.vocab_size = decoder_text_config(model.config).vocab_size
        # A cache of one token for each number of layers.
        self.cache_argument = cache_argument(model.forward)
        self.caches: dict[int, Cache] = {}

    def timings(self) -> dict[str, Timing]:
        """What there is to time: to `"read"`, to write the `"first"` token, and steps `"near"` to it and `"far"` from it."""
        # Tokens before the first step.
        prefix = 1 if self.is_encoder_decoder else self.workload.prompt_length
        far = max(prefix + self.workload.output_length - 2 - STEPS, 1)
        near = max(min(prefix - 1, far), 1)
        return {
            "read": Timing(self.reading, self.read),
            "first": Timing(self.writing, self.write_first),
            "near": Timing(self.writing, lambda depth: self.write_further(depth, near)),
            "far": Timing(self.writing, lambda depth: self.write_further(depth, far)),
        }

    def tokens(self, *shape: int) -> torch.Tensor:
        return torch.randint(self.vocab_size, shape)

    def encoder_outputs(self, rows: int, length: int) -> BaseModelOutput:
        width = encoder_text_config(self.model.config).hidden_size
        return BaseModelOutput(last_hidden_state=torch.randn(rows, length, width).to(self.model.dtype))

    def prompt(self, length: int) -> dict[str, Any]:
        """A prompt of so many tokens as `generate` takes it, read already where an encoder does it."""
        w = self.workload
        if self.is_encoder_decoder:
            encoder_outputs = self.encoder_outputs(w.batch_size, w.prompt_length)
            return {
                "encoder_outputs": encoder_outputs,
                "attention_mask": torch.ones(w.batch_size, w.prompt_length, dtype=torch.long),
            }
        input_ids = self.tokens(w.batch_size, length)
        return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}

    @torch.no_grad()
    def read(self, depth: int) -> list[float]:
        """Seconds in which the encoder, or a decoder-only model without its head, reads the prompts."""
        part = reader(self.model)
        input_ids = self.tokens(self.workload.batch_size, self.workload.prompt_length)
        options = {"use_cache": False} if accepts(part.forward, "use_cache") else {}
        start = time.perf_counter()
        part(input_ids=input_ids, attention_mask=torch.ones_like(input_ids), **options)
        return [time.perf_counter() - start]

    def write_first(self, depth: int) -> list[float]:
        """Seconds to the first token: from what an encoder has read, or from the prompts."""
        prompt = self.prompt(self.workload.prompt_length)
        start = time.perf_counter()
        self.generate(prompt, 1)
        return [time.perf_counter() - start]

    def write_further(self, depth: int, length: int) -> list[float]:
        """Seconds of each of a few steps, the first of which comes after `length` tokens and one more."""
        cache = lengthened(self.cache(depth), length, self.workload.prompt_length)
        prompt = self.prompt(length + 1)
        if self.is_encoder_decoder:
            # The first is the one to start from, or `generate` would add it; by the mask it knows that the cache holds the others.
            tokens = torch.full((self.workload.batch_size, length + 1), START_TOKEN)
            prompt |= {"decoder_input_ids": tokens, "decoder_attention_mask": torch.ones_like(tokens)}
        clock = StepClock()
        self.writing.stamps.clear()
        time_reordering(cache, self.writing.beside)
        self.generate(prompt | {self.cache_argument: cache}, STEPS + 1, clock)
        return [end - begin for begin, end in zip(clock.stamps, clock.stamps[1:], strict=False)]

    def generate(self, prompt: Mapping[str, Any], new_tokens: int, *processors: LogitsProcessor) -> None:
        self.model.generate(
            **prompt,
            max_new_tokens=new_tokens,
            num_beams=self.workload.num_beams,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            decoder_start_token_id=START_TOKEN,
            logits_processor=LogitsProcessorList(processors),
        )

    # The cache -----------------------------------------------------------------------------------------------------------
    @torch.no_grad()
    def cache(self, depth: int) -> Cache:
        """The cache that `depth` layers have after one token, of an encoder's states too."""
        if depth not in self.caches:
            cache: Cache = DynamicCache(config=self.model.config.get_text_config(decoder=True))
            tokens = self.tokens(self.workload.rows, 1)
            inputs: dict[str, Any] = {"input_ids": tokens}
            if self.is_encoder_decoder:
                cache = EncoderDecoderCache(cache, DynamicCache())
                outputs = self.encoder_outputs(self.workload.rows, 1)
                inputs = {"encoder_outputs": outputs, "decoder_input_ids": tokens}
            self.model(**inputs, **{self.cache_argument: cache}, use_cache=True)
            self.caches[depth] = cache
        return self.caches[depth]

    def cache_bytes(self) -> int:
        """Bytes of the keys and values when the last token is written."""
        w = self.workload
        depth = max(self.caches)
        cache = self.caches[depth]
        lengths = (
            (w.output_length, w.prompt_length) if self.is_encoder_decoder else (w.prompt_length + w.output_length - 1,)
        )
        size = sum(
            (keys.nbytes + values.nbytes) * min(length, window)
            for part, length in zip(parts(cache), lengths, strict=True)
            for _, keys, values, window in filled_layers(part)
        )
        return int(size * len(self.writing)) // depth


def parts(cache: Cache) -> list[Cache]:
    """The caches in one: of the decoder's own tokens and, behind an encoder, of what that has read."""
    if isinstance(cache, EncoderDecoderCache):
        return [cache.self_attention_cache, cache.cross_attention_cache]
    return [cache]


def filled_layers(cache: Cache) -> Iterator[tuple[int, torch.Tensor, torch.Tensor, float]]:
    """Index, keys, values, and the most tokens it keeps, of each layer that has keys and values."""
    for index, layer in enumerate(cache.layers):
        if isinstance(keys := getattr(layer, "keys", None), torch.Tensor):
            yield index, keys, layer.values, layer.sliding_window - 1 if layer.is_sliding else float("inf")


def time_reordering(cache: Cache, seconds: list[float]) -> None:
    """Note what it takes whenever beams change places in a cache, which copies what all of its layers hold."""
    reorder: Callable[[torch.Tensor], None] = cache.reorder_cache

    def timed(beam_idx: torch.Tensor) -> None:
        start = time.perf_counter()
        reorder(beam_idx)
        seconds.append(time.perf_counter() - start)

    cache.reorder_cache = timed


def lengthened(cache: Cache, length: int, prompt_length: int) -> Cache:
    """A copy of a cache of one token that holds `length` tokens and, behind an encoder, `prompt_length` states of that."""
    cache = copy.deepcopy(cache)
    for part, total in zip(parts(cache), (length, prompt_length), strict=False):
        for index, keys, values, _ in list(filled_layers(part)):
            if total > 1:
                more = (states.expand(-1, -1, total - 1, -1) for states in (keys, values))
                part.update(*more, index)
    return cache
