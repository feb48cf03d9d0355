"""What a hybrid would gain, before any training: its speed beside the LLM on this machine, break-even, and memory.

Two configurations are all it takes. What the models do is timed on stand-ins (see `stand_in.py`); everything else is
arithmetic on those times, on lengths and on shapes.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig

from .checkpoint import checkpoint_state_dict
from .composition import defaults_of_cut, defaults_of_key_values
from .configuration_llm2slm import LLM2SLMConfig, decoder_text_config, encoder_text_config
from .few_rows import few_row_linears
from .key_values import KeyValueProjector
from .loading import cut_config, llm_position_limit, llm_skeleton
from .modeling_llm2slm import LLM2SLMForConditionalGeneration
from .projector import LLM2SLMProjector
from .prompt import fuse, one_to_one_view
from .speed import seconds_of
from .stand_in import Workload, Writer, skeleton, stand_in, take_times
from .structure import named_dtype, position_limit

THE_LLM, THE_SLM = "the LLM that is compared with", "the SLM"


# What is told --------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Speed:
    """
    How fast one of the three reads and writes.

    Args:
        encode_seconds (`float`): Until the prompts are read: by the encoder, or up to `llm_layer` by the LLM of a hybrid. A
            decoder-only model has the first token when it has read.
        project_seconds (`float`): Of projector and fusion; 0 for LLM and SLM alone.
        first_token_seconds (`float`): Until the first token of every response, reading included.
        further_token_seconds (`float`): For each further token of every response, the mean over the response.
        total_seconds (`float`): For all.
        tokens_per_second (`float`): Tokens of all responses in a second; other beams are not counted.
        times_llm (`float`): How many times as fast as the LLM.
    """

    encode_seconds: float
    project_seconds: float
    first_token_seconds: float
    further_token_seconds: float
    total_seconds: float
    tokens_per_second: float
    times_llm: float


@dataclass(frozen=True)
class BreakEven:
    """
    For which responses the hybrid is faster than the LLM.

    Args:
        from_tokens (`int`, *optional*): The shortest response, in tokens; `None` if it is faster for none.
        to_tokens (`int`, *optional*): The longest; `None` if there is no limit.
        reason (`str`): Why so.
        most_gained (`float`): How many times as fast as the LLM at most, as the response grows: the ratio of their steps.
    """

    from_tokens: int | None
    to_tokens: int | None
    reason: str
    most_gained: float


@dataclass(frozen=True)
class Memory:
    """Bytes of weights, each part in its dtype (0 for a part that is not there), and of the keys and values at the end."""

    llm_bytes: int
    projector_bytes: int
    slm_bytes: int
    cache_bytes: int
    total_bytes: int


@dataclass(frozen=True)
class Estimate:
    """
    What [`estimate`] finds.

    Args:
        workload ([`Workload`]): The lengths, batch size and beams it is for.
        llm_dtype, slm_dtype (`str`): Precisions; the projector is in that of the SLM.
        llm_layer (`int` or `list[int]`), llm_num_layers (`int`), slm_encoder (`str`), slm_layers (`list[int]`, *optional*),
            fusion (`str`): How the hybrid is composed.
        speed (`dict[str, Speed]`): Of `"llm"` and `"slm"`, each alone, and of the `"hybrid"`.
        break_even ([`BreakEven`]): Of the hybrid against the LLM.
        memory (`dict[str, Memory]`): Of the same three.
        checkpoint_bytes (`int`): Weights in a checkpoint on disk: projector and SLM.
        threads (`int`): Threads of torch that it was measured with.
        measuring_seconds (`float`): What measuring took.
    """

    workload: Workload
    llm_dtype: str
    slm_dtype: str
    llm_layer: int | list[int]
    llm_num_layers: int | None
    slm_encoder: str
    slm_layers: list[int] | None
    fusion: str
    speed: dict[str, Speed]
    break_even: BreakEven
    memory: dict[str, Memory]
    checkpoint_bytes: int
    threads: int
    measuring_seconds: float


def estimate(
    llm_config: PreTrainedConfig,
    slm_config: PreTrainedConfig | None = None,
    *,
    prompt_length: int,
    output_length: int,
    batch_size: int = 1,
    num_beams: int = 1,
    slm_layers: int | Sequence[int] | None = None,
    llm_layer: int | list[int] | None = None,
    slm_encoder: str | None = None,
    fusion: str | None = None,
    llm_dtype: str | torch.dtype | None = None,
    slm_dtype: str | torch.dtype | None = None,
    seconds: float = 10.0,
) -> Estimate:
    """
    Estimate how fast a hybrid would be beside the LLM on this machine, and what memory it takes, from their configurations.

    The LLM writes by its own `generate`, the SLM as in a hybrid, greedy or with beams, on the processor, with as many threads as torch has now.
    Prompts are counted as equally long in the tokens of both.

    Args:
        llm_config (`PreTrainedConfig`): Of the LLM, which must be one that writes.
        slm_config (`PreTrainedConfig`, *optional*): Of the SLM; or `None` with `slm_layers`.
        prompt_length, output_length (`int`): Tokens of each prompt and each response.
        batch_size (`int`, defaults to 1), num_beams (`int`, defaults to 1): Prompts at a time, and beams of each.
        slm_layers, llm_layer, slm_encoder, fusion (*optional*): As composing takes them, with the same defaults but for the fusion
            of two models whose tokenizers are not known here: it is `"add"`, which takes as long as `"align"`.
        llm_dtype, slm_dtype (`str` or `torch.dtype`, *optional*): Precisions; else as the configurations say, or float32.
        seconds (`float`, defaults to 10): How long to measure, about.

    Returns:
        [`Estimate`], of plain numbers.

    Raises:
        ValueError: for lengths that are not positive or longer than the models take, and configurations that are no LLM's or
            SLM's, are quantised, or can't be joined.
    """
    workload = Workload(prompt_length, output_length, batch_size, num_beams)
    config = hybrid_config(llm_config, slm_config, slm_layers, llm_layer, slm_encoder, fusion)
    check_lengths(config, workload)
    dtypes = dtype_of(config.llm_config, llm_dtype), dtype_of(config.slm_config, slm_dtype)
    start = time.perf_counter()
    times = measure_times(config, workload, *dtypes, seconds)
    measuring_seconds = time.perf_counter() - start
    speed = speeds(times, workload, config.slm_encoder, config.fusion)
    memory, checkpoint_bytes = memories(config, times, *dtypes)
    return Estimate(
        workload=workload,
        llm_dtype=str(dtypes[0]).removeprefix("torch."),
        slm_dtype=str(dtypes[1]).removeprefix("torch."),
        llm_layer=config.llm_layer,
        llm_num_layers=config.num_llm_layers,
        slm_encoder=config.slm_encoder,
        slm_layers=config.slm_layers,
        fusion=config.fusion,
        speed=speed,
        break_even=break_even(speed["llm"], speed["hybrid"]),
        memory=memory,
        checkpoint_bytes=checkpoint_bytes,
        threads=torch.get_num_threads(),
        measuring_seconds=measuring_seconds,
    )


# What is asked -------------------------------------------------------------------------------------------------------
def hybrid_config(
    llm_config: PreTrainedConfig,
    slm_config: PreTrainedConfig | None = None,
    slm_layers: int | Sequence[int] | None = None,
    llm_layer: int | list[int] | None = None,
    slm_encoder: str | None = None,
    fusion: str | None = None,
) -> LLM2SLMConfig:
    """
    The configuration that composing would give these two. Without tokenizers the fusion of two models can't be told: it is `"add"`,
    or what is the default without.

    Raises:
        ValueError: for models that can't be the LLM or the SLM, are quantised, or can't be joined so.
    """
    if (slm_config is None) == (slm_layers is None):
        raise ValueError("Give either an SLM, or `slm_layers` to cut one from the LLM, and not both.")
    for part, config in (("LLM", llm_config), ("SLM", slm_config)):
        if getattr(config, "quantization_config", None) is not None:
            raise ValueError(
                f"The {part} is quantised, and what that costs is not estimated. Name the repository that it was quantised "
                "from, for an estimate without."
            )
    llm_config = copy.deepcopy(llm_config)
    given = {"llm_layer": llm_layer, "slm_encoder": slm_encoder}
    fields: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    llm = skeleton(llm_config, THE_LLM)
    if slm_layers is not None:
        slm_config, layers = cut_config(llm, slm_layers)
        fields, fusion, _ = defaults_of_cut(llm, fields | {"slm_layers": layers}, fusion, None)
    skeleton(slm_config, THE_SLM)  # which says what is wrong with it, if anything
    if fusion == "kv":
        fields = defaults_of_key_values(llm_config, slm_config, fields)
    fusion = fusion or ("replace" if fields.get("slm_encoder") == "skip" else "add")
    return LLM2SLMConfig(llm_config=llm_config, slm_config=copy.deepcopy(slm_config), fusion=fusion, **fields)


def check_lengths(config: LLM2SLMConfig, workload: Workload) -> None:
    """Raise a `ValueError` if one of the models takes no prompts, or no responses, of such a length."""
    prompt, both = workload.prompt_length, workload.prompt_length + workload.output_length
    checks = [("prompt", prompt, "LLM", llm_position_limit(config.llm_config))]
    for part, model in (("LLM", config.llm_config), ("SLM", config.slm_config)):
        limit = position_limit(decoder_text_config(model))
        if model.is_encoder_decoder:
            checks.append(("prompt", prompt, part, position_limit(encoder_text_config(model))))
            checks.append(("response", workload.output_length, part, limit))
        else:
            checks.append(("prompt with the response", both, part, limit))
    for what, length, part, limit in checks:
        if limit is not None and length > limit:
            raise ValueError(
                f"The {what} is {length} tokens long, but the {part} takes at most {limit}. Choose a smaller "
                "`prompt_length` or `output_length`, or another model."
            )


def dtype_of(config: PreTrainedConfig, dtype: str | torch.dtype | None) -> torch.dtype:
    """The precision that a model is loaded in: what is asked for, else what its configuration says."""
    asked = (dtype, config.dtype, decoder_text_config(config).dtype)
    return next((found for value in asked if (found := named_dtype(value)) is not None), torch.float32)


# What is measured ----------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class WriterTimes:
    """
    What was measured of a model.

    Args:
        encode (`float`): Seconds in which its encoder reads the prompts; 0 if it has none.
        first (`float`): Seconds from there to the first token of every response.
        further (`float`): Seconds for each further token of every response, the mean over the response.
        cache_bytes (`int`): Its keys and values at the end.
    """

    encode: float
    first: float
    further: float
    cache_bytes: int


@dataclass(frozen=True)
class Times:
    """What was measured: `read`, seconds in which the LLM of the hybrid reads the prompts; `project`, those of projector and
    fusion; and what `llm` and `slm` take."""

    read: float
    project: float
    llm: WriterTimes
    slm: WriterTimes


def measure_times(
    config: LLM2SLMConfig, workload: Workload, llm_dtype: torch.dtype, slm_dtype: torch.dtype, seconds: float
) -> Times:
    """Time stand-ins of LLM and SLM for about so many `seconds`, one in turn with the other, and a projector."""
    llm = Writer(stand_in(config.llm_config, llm_dtype), workload)
    slm = Writer(stand_in(config.slm_config, slm_dtype), workload)
    writers = {"llm": llm, "slm": slm}
    timings = {(name, what): timing for name, writer in writers.items() for what, timing in writer.timings().items()}
    if not slm.is_encoder_decoder:
        del timings["slm", "read"]
    with few_row_linears(slm.model):
        take_times(timings.values(), seconds)
    reading = timings["llm", "read"]
    num_layers = len(reading.stack)
    written = {
        name: WriterTimes(
            encode=timings[name, "read"].seconds() if writer.is_encoder_decoder else 0.0,
            first=timings[name, "first"].seconds(),
            # A step takes longer with every token that it looks back on, and all tokens together as long as if all steps
            # were halfway between the first and the last.
            further=(timings[name, "near"].seconds() + timings[name, "far"].seconds()) / 2,
            cache_bytes=writer.cache_bytes(),
        )
        for name, writer in writers.items()
    }
    return Times(
        # For keys and values all layers are run.
        read=reading.seconds(
            num_layers if config.fusion == "kv" else max(layer % (num_layers + 1) for layer in config.llm_layers)
        ),
        project=projecting_seconds(config, slm, llm_dtype, slm_dtype),
        **written,
    )


@torch.no_grad()
def projecting_seconds(config: LLM2SLMConfig, slm: Writer, llm_dtype: torch.dtype, slm_dtype: torch.dtype) -> float:
    """Seconds from the LLM's states to the fused prompts."""
    shape = slm.workload.batch_size, slm.workload.prompt_length
    states = torch.randn(*shape, config.num_llm_states, config.llm_state_size).to(llm_dtype)
    if config.fusion == "kv":
        maps = KeyValueProjector(config).to(slm_dtype)
        return seconds_of(lambda: maps(states), repeats=3)
    projector = LLM2SLMProjector(config).to(slm_dtype)
    input_ids = slm.tokens(*shape)
    mask = torch.ones_like(input_ids)
    view = one_to_one_view(input_ids, mask) if config.fusion == "align" else {}
    return seconds_of(lambda: fuse(config.fusion, slm.model, projector(states), mask, input_ids, **view), repeats=3)


# What follows from it ------------------------------------------------------------------------------------------------
def speeds(times: Times, workload: Workload, slm_encoder: str = "keep", fusion: str = "add") -> dict[str, Speed]:
    """The speed of `"llm"` and `"slm"`, each alone, and of the `"hybrid"`."""
    llm, slm = times.llm, times.slm
    written = slm.first if slm_encoder == "skip" else slm.encode + slm.first
    if fusion == "kv":  # the first token is one like the others: the SLM reads none but the last of the prompt
        written = slm.further
    # Of each, reading, projecting, the first token with both, and each further token.
    rows = {
        "llm": (llm.encode or llm.first, 0.0, llm.encode + llm.first, llm.further),
        "slm": (slm.encode or slm.first, 0.0, slm.encode + slm.first, slm.further),
        "hybrid": (times.read, times.project, times.read + times.project + written, slm.further),
    }
    totals = {name: first + (workload.output_length - 1) * further for name, (_, _, first, further) in rows.items()}
    tokens = workload.batch_size * workload.output_length
    return {
        name: Speed(*row, totals[name], tokens / totals[name], totals["llm"] / totals[name])
        for name, row in rows.items()
    }


def break_even(llm: Speed, hybrid: Speed) -> BreakEven:
    """The responses for which the hybrid is faster than the LLM, from the seconds that both take to the first token and for
    each further one."""
    later = hybrid.first_token_seconds - llm.first_token_seconds
    gained = llm.further_token_seconds - hybrid.further_token_seconds
    first = f"{_milliseconds(hybrid.first_token_seconds)} to the first token, the LLM {_milliseconds(llm.first_token_seconds)}"
    step = f"{_milliseconds(hybrid.further_token_seconds)} for each further one, the LLM {_milliseconds(llm.further_token_seconds)}"
    from_tokens: int | None = 1
    to_tokens = None
    if later >= 0 and gained <= 0:
        from_tokens = None
    elif later >= 0:
        from_tokens = math.floor(later / gained) + 2
    elif gained < 0:
        to_tokens = math.ceil(later / gained)
    return BreakEven(
        from_tokens,
        to_tokens,
        f"The hybrid takes {first}, and {step}.",
        llm.further_token_seconds / hybrid.further_token_seconds,
    )


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.3g} ms" if seconds < 1 else f"{seconds:,.2f} s"


def memories(
    config: LLM2SLMConfig, times: Times, llm_dtype: torch.dtype, slm_dtype: torch.dtype
) -> tuple[dict[str, Memory], int]:
    """
    The memory of `"llm"` and `"slm"`, each alone, and of the `"hybrid"`, and the bytes of a checkpoint. The LLM of a hybrid
    is what reads of it; layers above `llm_layer` are held, though they are not run.
    """
    with torch.device("meta"):
        hybrid = LLM2SLMForConditionalGeneration(copy.deepcopy(config))
    parts = {
        "llm": (skeleton(config.llm_config, THE_LLM), None, None),
        "slm": (None, None, skeleton(config.slm_config, THE_SLM)),
        "hybrid": (llm_skeleton(config.llm_config), hybrid.projector, hybrid.slm),
    }
    caches = {"llm": times.llm.cache_bytes, "slm": times.slm.cache_bytes, "hybrid": times.slm.cache_bytes}
    found = {}
    for name, modules in parts.items():
        llm, projector, slm = (
            0 if module is None else dtype.itemsize * sum(parameter.numel() for parameter in module.parameters())
            for module, dtype in zip(modules, (llm_dtype, slm_dtype, slm_dtype), strict=True)
        )
        found[name] = Memory(llm, projector, slm, caches[name], llm + projector + slm + caches[name])
    tensors = checkpoint_state_dict(hybrid, hybrid.to(slm_dtype).state_dict())
    return found, sum(tensor.nbytes for tensor in tensors.values())


__all__ = ["BreakEven", "Estimate", "Memory", "Speed", "Workload", "estimate"]
