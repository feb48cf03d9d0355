"""What a model is compared with when its speed is measured: ways to write exactly so many tokens from the same prompts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel
from transformers.generation.candidate_generator import CandidateGenerator

from .few_rows import few_row_linears
from .lossless import drafting_by, num_equal, slm_inputs
from .prompt import one_to_one_view
from .speed import Decoding, spread, step_bytes, times_in_rounds

if TYPE_CHECKING:
    from .exported import LLM2SLMExportedModel
    from .modeling_llm2slm import LLM2SLMForConditionalGeneration
    from .processing_llm2slm import LLM2SLMProcessor

LLM, SLM, HYBRID, LOOKUP, LOSSLESS = "LLM", "SLM alone", "hybrid", "prompt lookup", "lossless"
# Tokens that prompt lookup proposes at most; transformers' documentation has the same.
LOOKUP_TOKENS = 10
FIRST, TOTAL, ENCODE, PROJECT = "first token", "total", "encode", "project"

# What `encode_prompt` takes, and more tensors by name.
Prompts = Mapping[str, Any]
Spread = dict[str, float]
Seconds = Mapping[str, Mapping[str, list[float]]]


# Conditions --------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Conditions:
    """
    What is written, and from what.

    Args:
        prompt_length (`int`): Tokens of a prompt, for the LLM.
        new_tokens (`int`): Tokens of a response; every one is written, whatever they are.
        batch_size (`int`): Prompts at a time.
        num_beams (`int`): Beams; 1 is greedy.
    """

    prompt_length: int = 128
    new_tokens: int = 128
    batch_size: int = 1
    num_beams: int = 1

    def __str__(self) -> str:
        return (
            f"prompt {self.prompt_length}, output {self.new_tokens}, batch {self.batch_size}, beams {self.num_beams}"
        )

    @property
    def one_at_a_time(self) -> bool:
        """Whether the ways of decoding that take one prompt and no beams can take part."""
        return self.batch_size == 1 and self.num_beams == 1

    def arguments(self, new_tokens: int) -> dict[str, Any]:
        """Arguments of `generate` for exactly so many tokens, without sampling."""
        return {
            "min_new_tokens": new_tokens,
            "max_new_tokens": new_tokens,
            "eos_token_id": None,
            "pad_token_id": 0,
            "num_beams": self.num_beams,
            "do_sample": False,
        }


def random_prompts(
    model: LLM2SLMForConditionalGeneration, conditions: Conditions, seed: int = 1
) -> dict[str, torch.Tensor]:
    """Random tokens as prompts, in the form that the model's `encode_prompt` takes; without padding."""
    generator = torch.Generator().manual_seed(seed)
    shape = (conditions.batch_size, conditions.prompt_length)

    def tokens(part: PreTrainedModel) -> torch.Tensor:
        return torch.randint(3, part.get_input_embeddings().weight.shape[0], shape, generator=generator)

    inputs = {"input_ids": tokens(model.llm), "attention_mask": torch.ones(shape, dtype=torch.long)}
    if model.config.fusion == "align":
        inputs |= one_to_one_view(tokens(model.slm), inputs["attention_mask"])
    return {name: tensor.to(model.device) for name, tensor in inputs.items()}


def text_prompts(processor: LLM2SLMProcessor, texts: Sequence[str], conditions: Conditions) -> dict[str, torch.Tensor]:
    """
    Prompts of texts, joined and cut so that each is as many LLM tokens long as the conditions say.

    Raises:
        ValueError: if the texts are too short for that.
    """
    prompts: list[str] = []
    rest = list(texts)
    while len(prompts) < conditions.batch_size:
        prompt, length = "", 0
        while rest and length < conditions.prompt_length:
            prompt += rest.pop(0) + "\n"
            length = len(processor(text=[prompt])["input_ids"][0])
        if length < conditions.prompt_length:
            raise ValueError(
                f"The {len(texts)} text(s) give {len(prompts)} prompt(s) of {conditions.prompt_length} tokens, but the batch "
                f"takes {conditions.batch_size}. Give more texts, or measure shorter prompts."
            )
        prompts.append(prompt)
    cut: dict[str, Any] = {"truncation": True, "max_length": conditions.prompt_length}
    return dict(processor(text=prompts, padding=True, return_tensors="pt", **cut))


# Contestants -------------------------------------------------------------------------------------------------------------
@dataclass
class Drafts:
    """Tokens that were drafted, up to the first wrong one of each draft, and those of them that were accepted."""

    drafted: int = 0
    accepted: int = 0

    @property
    def acceptance_rate(self) -> float | None:
        return self.accepted / self.drafted if self.drafted else None


@dataclass
class Contestant:
    """
    A way to write.

    Args:
        write (`Callable[[int], torch.Tensor]`): Reads the prompts and writes exactly so many tokens; returns them, of shape
            `(batch_size, new_tokens)`.
        parts (`dict[str, Callable]`): What of it is timed by itself too.
        drafts (`Drafts`, *optional*): Counts, where something drafts.
        step_bytes (`float`, *optional*): What each of its steps must read at least, see [`step_bytes`].
    """

    write: Callable[[int], torch.Tensor]
    parts: dict[str, Callable[[], Any]] = field(default_factory=dict)
    drafts: Drafts | None = None
    step_bytes: float | None = None


def llm_contestant(llm: PreTrainedModel, inputs: Prompts, conditions: Conditions, **options: Any) -> Contestant:
    """The LLM's own `generate`, from `input_ids` and `attention_mask`; `options` are more arguments of it."""
    prompt = {name: inputs[name].to(llm.device) for name in ("input_ids", "attention_mask")}
    before = 1 if llm.config.is_encoder_decoder else prompt["input_ids"].shape[1]

    def write(new_tokens: int) -> torch.Tensor:
        return llm.generate(**prompt, **conditions.arguments(new_tokens), **options)[:, before:]

    return Contestant(write, step_bytes=least_bytes(llm, read_by_llm(llm, prompt), conditions))


def slm_contestant(
    model: LLM2SLMForConditionalGeneration, inputs: Prompts, conditions: Conditions, **options: Any
) -> Contestant:
    """
    The SLM's own `generate`, with the hybrid's linear layers, on prompts that are encoded already: it reads them as it would read
    its own embeddings of them, by its encoder if it has one.
    """
    prompt = model.model.slm_prompt(model.encode_prompt(**inputs))
    before = 1 if model.slm.config.is_encoder_decoder else 0

    def write(new_tokens: int) -> torch.Tensor:
        # A copy, as `generate` takes out what it has used.
        return model.slm.generate(**dict(prompt), **conditions.arguments(new_tokens), **options)[:, before:]

    contestant = Contestant(write, step_bytes=least_bytes(model.slm, read_by_slm(model, inputs), conditions))
    return with_few_row_linears(contestant, model.slm)


def with_few_row_linears(contestant: Contestant, model: PreTrainedModel) -> Contestant:
    """A contestant whose model has the linear layers that a hybrid writes with."""

    def write(new_tokens: int) -> torch.Tensor:
        with few_row_linears(model):
            return contestant.write(new_tokens)

    return replace(contestant, write=write)


def hybrid_contestant(
    model: LLM2SLMForConditionalGeneration | LLM2SLMExportedModel,
    inputs: Prompts,
    conditions: Conditions,
    step: float | None = None,
) -> Contestant:
    """
    The LLM-to-SLM model, or an export of it. Encoding is timed by itself, and the projector where it can be. `step` is what a
    step reads, in bytes.
    """
    before = 1 if model.slm.config.is_encoder_decoder else 0
    parts: dict[str, Callable[[], Any]] = {ENCODE: torch.no_grad()(lambda: model.encode_prompt(**inputs))}
    if model.llm is not None:
        reader: Any = model.model
        states = reader.llm_states(inputs["input_ids"], inputs["attention_mask"]).to(model.device)
        parts[PROJECT] = torch.no_grad()(lambda: reader.projector(states))

    def write(new_tokens: int) -> torch.Tensor:
        return model.generate(**inputs, **conditions.arguments(new_tokens))[:, before:]

    return Contestant(write, parts, step_bytes=step)


def lookup_contestant(llm: PreTrainedModel, inputs: Prompts, conditions: Conditions, **options: Any) -> Contestant:
    """The LLM with what stands behind the last tokens elsewhere in prompt and response as drafts; transformers' own."""
    contestant = llm_contestant(llm, inputs, conditions, prompt_lookup_num_tokens=LOOKUP_TOKENS, **options)
    return drafting(llm, contestant)


def lossless_contestant(model: LLM2SLMForConditionalGeneration, inputs: Prompts, conditions: Conditions) -> Contestant:
    """`generate(mode="lossless")`."""
    drafts = Drafts()
    before = 1 if model.model.whole_llm.config.is_encoder_decoder else 0  # type: ignore[union-attr]

    def write(new_tokens: int) -> torch.Tensor:
        arguments = conditions.arguments(new_tokens) | {"return_dict_in_generate": True}
        outputs = model.generate(**inputs, **arguments, mode="lossless")
        drafts.drafted += outputs.num_drafted
        drafts.accepted += outputs.num_accepted
        return outputs.sequences[:, before:]

    return Contestant(write, drafts=drafts)


def drafting(
    llm: PreTrainedModel,
    contestant: Contestant,
    make: Callable[..., CandidateGenerator] | None = None,
    drafts: Drafts | None = None,
) -> Contestant:
    """
    A contestant that counts what is drafted for `llm` while it writes. Its steps have no limit of their own.

    Args:
        make (`Callable`, *optional*): Gives the generator of drafts in place of the LLM's own `_get_candidate_generator`.
        drafts ([`Drafts`], *optional*): Counts to add to, in place of new ones.
    """
    counts, maker = drafts or Drafts(), make or llm._get_candidate_generator

    def write(new_tokens: int) -> torch.Tensor:
        with drafting_by(llm, lambda **kwargs: CountedCandidates(maker(**kwargs), counts)):
            return contestant.write(new_tokens)

    return Contestant(write, contestant.parts, counts)


class CountedCandidates(CandidateGenerator):
    """What another generator drafts, counted."""

    def __init__(self, generator: CandidateGenerator, drafts: Drafts):
        self.generator, self.drafts = generator, drafts
        self.draft: list[int] = []
        self.begin = 0

    def get_candidates(self, input_ids: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        candidates, scores = self.generator.get_candidates(input_ids, **kwargs)
        self.begin = input_ids.shape[1]
        self.draft = candidates[0, self.begin :].tolist()
        return candidates, scores

    def update_candidate_strategy(self, input_ids: torch.Tensor, scores: torch.Tensor, num_matches: int) -> None:
        accepted = num_equal(self.draft, input_ids[0, self.begin :].tolist())
        self.drafts.accepted += accepted
        self.drafts.drafted += min(accepted + 1, len(self.draft))
        self.generator.update_candidate_strategy(input_ids, scores, num_matches)


def contestants_of(
    model: LLM2SLMForConditionalGeneration,
    inputs: Prompts,
    conditions: Conditions,
    exported: Mapping[str, LLM2SLMExportedModel] | None = None,
) -> dict[str, Contestant]:
    """
    What a model is compared with, by name, the LLM first.

    Args:
        model: A model that was loaded with its whole LLM.
        inputs: Prompts, see [`random_prompts`] and [`text_prompts`].
        conditions: Prompt lookup and lossless mode take part for one prompt at a time, without beams.
        exported (*optional*): Exports of the model, by name.
    """
    llm = model.model.whole_llm
    if llm is None:
        raise ValueError('The speed beside the LLM takes the whole LLM: load the model with `load_llm="whole"`.')
    slm = slm_contestant(model, inputs, conditions)
    found = {LLM: llm_contestant(llm, inputs, conditions), SLM: slm}
    found[HYBRID] = hybrid_contestant(model, inputs, conditions, slm.step_bytes)
    if conditions.one_at_a_time:
        found |= {LOOKUP: lookup_contestant(llm, inputs, conditions)}
        found |= {LOSSLESS: lossless_contestant(model, inputs, conditions)}
    for name, other in (exported or {}).items():
        step = least_bytes(model.slm, read_by_slm(model, inputs), conditions, torch.float32, int8_block_of(other))
        found[name] = hybrid_contestant(other, inputs, conditions, step)
    return found


# The limit ---------------------------------------------------------------------------------------------------------------
def least_bytes(
    model: PreTrainedModel, prompt: Mapping[str, Any], conditions: Conditions, *precision: Any
) -> float | None:
    """What a step must read at least, see [`step_bytes`]; `None` for more than one sequence, as they share the weights."""
    if not conditions.one_at_a_time:
        return None
    return step_bytes(model, prompt, conditions.new_tokens, *precision)["total"]


@torch.no_grad()
def read_by_llm(llm: PreTrainedModel, prompt: Prompts) -> dict[str, Any]:
    """The prompt as the LLM's `forward` takes it to write, its encoder run if it has one; for [`Decoding`]."""
    if not llm.config.is_encoder_decoder:
        return dict(prompt)
    encoded = llm.get_encoder()(**prompt, return_dict=True)
    return {"encoder_outputs": encoded, "attention_mask": prompt["attention_mask"]}


@torch.no_grad()
def read_by_slm(model: LLM2SLMForConditionalGeneration | LLM2SLMExportedModel, inputs: Prompts) -> dict[str, Any]:
    """The encoded prompt as the SLM's `forward` takes it, its encoder run if it has one; for [`Decoding`]."""
    prompt = model.encode_prompt(**inputs)
    return model.model.slm_prompt(prompt) if model.llm is None else slm_inputs(model, prompt)


def int8_block_of(exported: LLM2SLMExportedModel) -> int | None:
    """How many weights of an export share a scale, for [`step_bytes`]: 0 for a row, `None` for one in float32."""
    from .export import INT8_BLOCK

    export: Any = exported.config.export
    if not export["int8"]:
        return None
    return INT8_BLOCK if export["format"] == "onnx" else 0


def export_name(exported: LLM2SLMExportedModel) -> str:
    """What an export is called among contestants: `hybrid, onnx int8`."""
    export: Any = exported.config.export
    return f"{HYBRID}, {export['format']} {'int8' if export['int8'] else 'float32'}"


# Measuring ---------------------------------------------------------------------------------------------------------------
def race(
    contestants: Mapping[str, Contestant],
    conditions: Conditions,
    rounds: int,
    warm_up_tokens: int | None = None,
    **options: Any,
) -> tuple[dict[str, dict[str, list[float]]], dict[str, torch.Tensor]]:
    """
    Let contestants write, all one after another in every round.

    Args:
        contestants (`Mapping[str, Contestant]`): By name.
        conditions ([`Conditions`]): What they were made for.
        rounds (`int`): Rounds, after one to warm up.
        warm_up_tokens (`int`, *optional*): Tokens of the round to warm up; by default as many as in the others.
        options (*optional*): `max_seconds`, `min_rounds` and `pause` of [`times_in_rounds`].

    Returns:
        Seconds of `"first token"`, of `"total"` and of the parts, for each contestant; and what each wrote in the last round.

    Raises:
        RuntimeError: if one does not write as many tokens as it should.
    """
    written: dict[str, torch.Tensor] = {}

    def writing(name: str, new_tokens: int) -> Callable[[], None]:
        def write() -> None:
            written[name] = contestants[name].write(new_tokens)

        return write

    for name, contestant in contestants.items():
        for new_tokens in (1, warm_up_tokens or conditions.new_tokens):
            shape = tuple(contestant.write(new_tokens).shape)
            if shape != (conditions.batch_size, new_tokens):
                raise RuntimeError(
                    f"{name!r} was to write {new_tokens} token(s) for each of {conditions.batch_size} prompt(s), but what it "
                    f"wrote is of shape {shape}. Its speed can't be compared."
                )
        for part in contestant.parts.values():
            part()
    tasks = {
        name: {**contestant.parts, FIRST: writing(name, 1), TOTAL: writing(name, conditions.new_tokens)}
        for name, contestant in contestants.items()
    }
    return times_in_rounds(tasks, rounds, **options), written


def figures_of(seconds: Seconds, conditions: Conditions) -> dict[str, dict[str, Spread]]:
    """
    Figures of a [`race`], each with its median, its least and its greatest value over the rounds.

    Returns:
        For each contestant, in seconds: `"encode, s"` and `"project, s"` where they were timed, `"first token, s"` (reading
        included), `"token, s"` (each further step) and `"total, s"`; `"tokens/s"`, of all prompts together; and
        `"times the first"`: how many times as fast as the first contestant it was in the same round.
    """
    reference = next(iter(seconds.values()))[TOTAL]
    figures = {}
    for name, times in seconds.items():
        row = {f"{part}, s": spread(values) for part, values in times.items()}
        pairs = list(zip(times[FIRST], times[TOTAL], strict=True))
        if conditions.new_tokens > 1:
            row["token, s"] = spread((total - first) / (conditions.new_tokens - 1) for first, total in pairs)
        count = conditions.batch_size * conditions.new_tokens
        row["tokens/s"] = spread(count / total for _, total in pairs)
        row["times the first"] = ratio(reference, times[TOTAL])
        figures[name] = row
    return figures


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> Spread:
    """The spread of the ratios within each round."""
    return spread(one / other for one, other in zip(numerators, denominators, strict=True))


__all__ = [
    "Conditions",
    "Contestant",
    "Decoding",
    "Drafts",
    "contestants_of",
    "figures_of",
    "race",
    "random_prompts",
    "text_prompts",
]
