"""Contestants of `speed.py` beside the package's own: assisted generation at given acceptance rates, CTranslate2."""

from __future__ import annotations

import multiprocessing
import pathlib
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
from transformers import AutoTokenizer, LogitsProcessor, LogitsProcessorList, PreTrainedModel
from transformers.generation.candidate_generator import AssistedCandidateGenerator

from transformers_llm2slm.contestants import (
    Conditions,
    Contestant,
    drafting,
    llm_contestant,
    lookup_contestant,
    read_by_llm,
)
from transformers_llm2slm.lossless import best_draft_length
from transformers_llm2slm.speed import Decoding, seconds_of

# Tokens that a given text takes from the prompt at a time, and that follow which are new.
QUOTED, OWN = 8, 8


# Writing a given text ----------------------------------------------------------------------------------------------------
def given_text(prompt: torch.Tensor, new_tokens: int, vocab_size: int, seed: int = 2) -> torch.Tensor:
    """
    A text of which half is quoted from the prompt, in turn with random tokens; for LLMs with random weights, whose own text
    is one token over and over, which prompt lookup would guess from beginning to end.

    Args:
        prompt (`torch.LongTensor` of shape `(1, prompt_length)`).

    Returns:
        `torch.LongTensor` of shape `(new_tokens,)`.
    """
    generator = torch.Generator().manual_seed(seed)
    pieces: list[torch.Tensor] = []
    while sum(len(piece) for piece in pieces) < new_tokens:
        start = int(torch.randint(max(prompt.shape[1] - QUOTED, 0) + 1, (1,), generator=generator))
        pieces.append(torch.randint(3, vocab_size, (OWN,), generator=generator))
        pieces.append(prompt[0, start : start + QUOTED])
    return torch.cat(pieces)[:new_tokens]


class WriteGivenText(LogitsProcessor):
    """
    Has a model choose given text, whatever its logits.

    Args:
        text (`torch.LongTensor` of shape `(new_tokens,)` or `(batch_size, new_tokens)`).
        before (`int`): Number of tokens before it: the prompt's or the start token.
    """

    def __init__(self, text: torch.Tensor, before: int):
        self.text, self.before = text, before

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        # Drafts may go one token beyond the text, where nobody looks any more.
        place = min(input_ids.shape[1] - self.before, self.text.shape[-1] - 1)
        chosen = self.text[..., place].expand(len(scores))
        return scores.scatter(1, chosen[:, None], torch.finfo(scores.dtype).max)


# Assisted generation -----------------------------------------------------------------------------------------------------
class UnreliableCandidates(AssistedCandidateGenerator):
    """
    transformers' own drafts of an assistant that is made to write what the LLM will, with some of its tokens replaced by
    wrong ones. Everything that takes time is done.

    Args:
        rate (`float`): The probability of a token to be left as it is.
        generator (`torch.Generator`): For which ones are.
        kwargs: As for its base.
    """

    def __init__(self, rate: float, generator: torch.Generator, **kwargs: Any):
        super().__init__(**kwargs)
        self.rate, self.generator = rate, generator

    def get_candidates(self, input_ids: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        candidates, scores = super().get_candidates(input_ids, **kwargs)
        draft = candidates[:, input_ids.shape[1] :]
        wrong = torch.rand(draft.shape, generator=self.generator) >= self.rate
        vocab_size = self.assistant_model.get_output_embeddings().weight.shape[0]
        draft = torch.where(wrong, (draft + 1) % vocab_size, draft)
        return torch.cat([input_ids, draft], dim=1), scores


def writes_given_text(llm: PreTrainedModel, inputs: dict[str, Any], conditions: Conditions) -> dict[str, Any]:
    """Arguments of the LLM's `generate` by which it writes a given text."""
    vocab_size = llm.get_output_embeddings().weight.shape[0]
    text = given_text(inputs["input_ids"], conditions.new_tokens, vocab_size)
    before = 1 if llm.config.is_encoder_decoder else inputs["input_ids"].shape[1]
    return {"logits_processor": LogitsProcessorList([WriteGivenText(text, before)])}


def assisted_contestant(
    llm: PreTrainedModel,
    assistant: PreTrainedModel,
    inputs: dict[str, Any],
    conditions: Conditions,
    rate: float,
    num_assistant_tokens: int,
) -> Contestant:
    """
    transformers' assisted generation, with drafts of always so many tokens of which each is right with probability `rate`,
    independent of the others.
    """
    generator = torch.Generator().manual_seed(3)
    writing = llm_contestant(
        llm, inputs, conditions, assistant_model=assistant, **writes_given_text(llm, inputs, conditions)
    )

    def write(new_tokens: int) -> torch.Tensor:
        # Read by transformers when drafting begins. Without a threshold, no draft ends early.
        assistant.generation_config.num_assistant_tokens = num_assistant_tokens
        assistant.generation_config.num_assistant_tokens_schedule = "constant"
        assistant.generation_config.assistant_confidence_threshold = 0.0
        return writing.write(new_tokens)

    def make(**kwargs: Any) -> UnreliableCandidates:
        names = ("input_ids", "assistant_model", "generation_config", "model_kwargs", "inputs_tensor")
        known = {name: kwargs[name] for name in (*names, "logits_processor")}
        return UnreliableCandidates(rate, generator, **known)

    return drafting(llm, Contestant(write), make)


def lookup_of_given_text(llm: PreTrainedModel, inputs: dict[str, Any], conditions: Conditions) -> Contestant:
    """Prompt lookup of an LLM that writes a text of which half is quoted."""
    return lookup_contestant(llm, inputs, conditions, **writes_given_text(llm, inputs, conditions))


def fitting_draft_lengths(
    llm: PreTrainedModel, assistant: Decoding, inputs: dict[str, Any], rates: tuple[float, ...]
) -> dict[float, int]:
    """
    The number of tokens to draft at which assisted generation is fastest, for each acceptance rate, from the times of bare
    steps: of the assistant, of the LLM, and of the LLM over some tokens.
    """
    verifier = Decoding(llm, read_by_llm(llm, inputs))

    def median(decoding: Decoding, count: int) -> float:
        return statistics.median(seconds_of(lambda: decoding.step(count)) for _ in range(7))

    median(verifier, 1)
    alone, several, draft = median(verifier, 1), median(verifier, 4), median(assistant, 1)
    return {rate: best_draft_length(rate, draft / alone, max(several / alone, 1.0), shortest=1) for rate in rates}


# Other runtimes ----------------------------------------------------------------------------------------------------------
def convert_to_ctranslate2(source: pathlib.Path, target: pathlib.Path) -> None:
    """The LLM in int8, with its tokenizer."""
    from ctranslate2.converters import TransformersConverter

    TransformersConverter(str(source), load_as_float16=False).convert(str(target), quantization="int8", force=True)
    AutoTokenizer.from_pretrained(source).save_pretrained(target / "tokenizer")


class CTranslate2:
    """The whole LLM in CTranslate2, weights in int8, on torch's number of threads."""

    def __init__(self, folder: pathlib.Path):
        import ctranslate2

        self.tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
        threads: dict[str, Any] = {"inter_threads": 1, "intra_threads": torch.get_num_threads()}
        options: dict[str, Any] = {"device": "cpu", "compute_type": "int8", **threads}
        translates = not (
            folder / "vocabulary.json"
        ).exists()  # an encoder-decoder has one for each side, or a shared one
        self.generator = None if translates else ctranslate2.Generator(str(folder), **options)
        self.translator = ctranslate2.Translator(str(folder), **options) if translates else None

    def contestant(self, inputs: dict[str, Any], conditions: Conditions, step: float | None) -> Contestant:
        """Writes from `input_ids`. `step` is what a step reads, in bytes."""
        prompts = [self.tokenizer.convert_ids_to_tokens(row) for row in inputs["input_ids"].tolist()]
        beams = {"beam_size": conditions.num_beams}

        def write(new_tokens: int) -> torch.Tensor:
            if self.generator is not None:
                length = {"max_length": new_tokens, "min_length": new_tokens, "include_prompt_in_result": False}
                results = self.generator.generate_batch(prompts, **beams, **length)
                return torch.tensor([result.sequences_ids[0] for result in results])
            length = {"max_decoding_length": new_tokens, "min_decoding_length": new_tokens}
            results = self.translator.translate_batch(prompts, **beams, **length)
            return torch.tensor([self.tokenizer.convert_tokens_to_ids(result.hypotheses[0]) for result in results])

        return Contestant(write, step_bytes=step)


class CTranslate2Process:
    """
    [`CTranslate2`] in a process of its own. Once it has run beside torch, the threads of both are more than there are cores, and
    the OpenMP library that they share has torch's fall asleep between any two products, which takes up to twice as long.
    """

    def __init__(self, folder: pathlib.Path):
        self.pool = ProcessPoolExecutor(
            1, multiprocessing.get_context("spawn"), _load_ctranslate2, (folder, torch.get_num_threads())
        )

    def contestant(self, inputs: dict[str, Any], conditions: Conditions, step: float | None) -> Contestant:
        """Writes from `input_ids`. `step` is what a step reads, in bytes."""
        ids = inputs["input_ids"].tolist()

        def write(new_tokens: int) -> torch.Tensor:
            return torch.tensor(self.pool.submit(_write_by_ctranslate2, ids, conditions, new_tokens).result())

        return Contestant(write, step_bytes=step)


def _load_ctranslate2(folder: pathlib.Path, threads: int) -> None:
    global _loaded
    torch.set_num_threads(threads)
    _loaded = CTranslate2(folder)


def _write_by_ctranslate2(input_ids: list[list[int]], conditions: Conditions, new_tokens: int) -> list[list[int]]:
    inputs = {"input_ids": torch.tensor(input_ids)}
    return _loaded.contestant(inputs, conditions, None).write(new_tokens).tolist()


class StepClock:
    """A streamer for `generate` that notes when each token came."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass

    def step_seconds(self, new_tokens: int) -> float:
        """The median time between tokens. What is put before the first of them is the prompt, if anything."""
        times = self.times[-new_tokens:]
        return statistics.median(b - a for a, b in zip(times, times[1:], strict=False))
