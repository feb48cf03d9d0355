"""Evaluation: texts for many prompts with their timing, and scores of texts against references."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from .modeling_llm2slm import LLM2SLMForConditionalGeneration
    from .processing_llm2slm import LLM2SLMProcessor
    from .prompt import LLM2SLMPrompt

ROUGE_TYPES = ("rouge1", "rouge2", "rougeL", "rougeLsum")


def require_extra(extra: str, *modules: str) -> None:
    """Raise an `ImportError` that names the extra to install, if one of its modules can't be found."""
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        raise ImportError(
            f"This needs {' and '.join(missing)}, which the extra {extra!r} brings: "
            f'pip install "transformers-llm2slm[{extra}]".'
        )


def text_scores(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """
    Scores of texts against one reference each, all in percent.

    ROUGE is that of `rouge-score` with stemming, the mean of the F-measures of all pairs; `rougeLsum` takes lines as
    sentences. BLEU and chrF are those of a whole corpus, by `sacrebleu` with its defaults. Exact match leaves white space
    at the ends out.

    Args:
        predictions, references (`Sequence[str]`): Texts, in the same order.

    Returns:
        `dict[str, float]`: `rouge1`, `rouge2`, `rougeL`, `rougeLsum`, `bleu`, `chrf` and `exact_match`, in [0, 100].

    Raises:
        ImportError: without the extra `eval`.
        ValueError: if there is nothing to score, or the two are not of one length.
    """
    require_extra("eval", "rouge_score", "sacrebleu")
    if len(predictions) != len(references) or not predictions:
        raise ValueError(
            f"Scores take one reference for each prediction, at least one: got {len(predictions)} prediction(s) and "
            f"{len(references)} reference(s)."
        )
    import sacrebleu
    from rouge_score.rouge_scorer import RougeScorer

    count = len(predictions)
    scores = dict.fromkeys(ROUGE_TYPES, 0.0)
    scorer = RougeScorer(list(ROUGE_TYPES), use_stemmer=True)
    for prediction, reference in zip(predictions, references, strict=True):
        for name, score in scorer.score(reference, prediction).items():
            scores[name] += 100 * score.fmeasure / count
    equal = sum(p.strip() == r.strip() for p, r in zip(predictions, references, strict=True))
    return scores | {
        # `force` only silences the advice against scoring text that looks tokenized.
        "bleu": sacrebleu.corpus_bleu(predictions, [references], force=True).score,
        "chrf": sacrebleu.corpus_chrf(predictions, [references]).score,
        "exact_match": 100 * equal / count,
    }


@dataclass
class GeneratedTexts:
    """
    Args:
        texts (`list[str]`): A text for each prompt, in the order of the prompts, without special tokens. With
            `num_return_sequences=n`, n of them for each, one after another, as `generate` returns them.
        seconds (`float`): Time of reading the prompts and writing the responses, without tokenizing and decoding.
        new_tokens (`int`): Tokens written, end tokens included, padding not.
    """

    texts: list[str]
    seconds: float
    new_tokens: int

    @property
    def tokens_per_second(self) -> float:
        return self.new_tokens / self.seconds if self.seconds > 0 else 0.0


def generate_batches(
    model: LLM2SLMForConditionalGeneration,
    batches: Iterable[Mapping[str, Any]],
    *,
    overlap: bool = False,
    **generate_kwargs: Any,
) -> Iterator[Any]:
    """
    Generate for one batch of prompts after another.

    Args:
        model: The model, with its LLM.
        batches (`Iterable[Mapping[str, torch.Tensor]]`): Prompts as the processor returns them. With `overlap` they are taken
            one ahead, in the LLM's thread, where an iterator may tokenize them.
        overlap (`bool`, defaults to `False`): While the SLM writes for a batch, let the LLM read the next one in a thread of
            its own. The output is the same. It can pay where reading is a good part of the work and the SLM leaves some of the
            hardware idle, or the LLM has hardware of its own. The thread does not see the caller's autocast.
        generate_kwargs: Arguments of `generate`, the same for all batches.

    Yields:
        What `generate` returns, for each batch.
    """
    if not overlap:
        for batch in batches:
            yield model.generate(**batch, **generate_kwargs)
        return
    upcoming = iter(batches)

    @torch.no_grad()  # which holds for one thread only, so that of `generate` does not do
    def read() -> LLM2SLMPrompt | None:
        batch = next(upcoming, None)
        return None if batch is None else model.encode_prompt(**batch)

    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="llm") as reader:
        reading = reader.submit(read)
        while (prompt := reading.result()) is not None:
            reading = reader.submit(read)
            yield model.generate(prompt=prompt, **generate_kwargs)


def generate_texts(
    model: LLM2SLMForConditionalGeneration,
    processor: LLM2SLMProcessor,
    prompts: Sequence[str],
    batch_size: int = 8,
    *,
    truncation: bool = True,
    max_prompt_length: int | None = None,
    overlap: bool = False,
    progress: Callable[[int], None] | None = None,
    **generate_kwargs: Any,
) -> GeneratedTexts:
    """
    Generate texts for prompts, in batches of prompts of similar length, the longest first. The LLM reads each prompt once.

    Args:
        model, processor: The model, with its LLM, and its processor.
        prompts (`Sequence[str]`): The prompts, in any order.
        batch_size (`int`, defaults to 8): Prompts at a time.
        truncation (`bool`, defaults to `True`): Cut prompts that are too long; `False` makes them an error.
        max_prompt_length (`int`, *optional*): Cut to so many LLM tokens; by default to what the models take.
        overlap (`bool`, defaults to `False`): Let the LLM read the next batch while the SLM writes, see [`generate_batches`].
        progress (`Callable[[int], None]`, *optional*): Called after each batch with the number of its prompts.
        generate_kwargs: Arguments of `generate`, for instance `max_new_tokens`, `num_beams`, `num_return_sequences`.

    Returns:
        [`GeneratedTexts`]: the texts in the order of `prompts`, seconds and number of tokens.

    Raises:
        ValueError: for no prompts, or an empty one.
    """
    if isinstance(prompts, str) or not prompts:
        raise ValueError(f"`prompts` must be a list of at least one text, got {prompts!r:.80}.")
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
    if generate_kwargs.get("stop_strings") is not None:
        generate_kwargs.setdefault("tokenizer", processor.tokenizer)
    cut: dict[str, Any] = {"truncation": truncation, "max_length": max_prompt_length}
    lengths = [len(ids) for ids in processor(text=list(prompts), **cut)["input_ids"]]
    order = sorted(range(len(prompts)), key=lambda index: -lengths[index])
    groups = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    batches = [
        processor(text=[prompts[row] for row in rows], padding=True, return_tensors="pt", **cut).to(model.device)
        for rows in groups
    ]

    written: list[torch.Tensor] = []
    was_training = model.training
    model.eval()
    began = time.perf_counter()
    try:
        outputs = generate_batches(model, batches, overlap=overlap, **generate_kwargs)
        for rows, output in zip(groups, outputs, strict=True):
            sequences = output if isinstance(output, torch.Tensor) else output.sequences
            written.append(sequences.cpu())  # waits for the device
            if progress is not None:
                progress(len(rows))
    finally:
        model.train(was_training)
    seconds = time.perf_counter() - began

    texts: dict[int, list[str]] = {}  # by the prompt's place
    for rows, sequences in zip(groups, written, strict=True):
        decoded = processor.batch_decode(sequences, skip_special_tokens=True)
        count = len(decoded) // len(rows)
        texts |= {row: decoded[place * count :][:count] for place, row in enumerate(rows)}
    new_tokens = sum(sum(_response_lengths(model, sequences, generate_kwargs)) for sequences in written)
    return GeneratedTexts([text for row in range(len(prompts)) for text in texts[row]], seconds, new_tokens)


def _response_lengths(
    model: LLM2SLMForConditionalGeneration, sequences: torch.Tensor, generate_kwargs: dict[str, Any]
) -> list[int]:
    """Tokens that were written in each row, up to the end token and with it, without what stood there before."""
    config = generate_kwargs.get("generation_config") or model.generation_config
    end, pad = (generate_kwargs.get(name, getattr(config, name, None)) for name in ("eos_token_id", "pad_token_id"))
    ends = set(end if isinstance(end, (list, tuple)) else [end])
    lengths = []
    # An encoder-decoder SLM returns the token that it starts from.
    for row in sequences[:, 1:].tolist() if model.slm.config.is_encoder_decoder else sequences.tolist():
        length = next((place + 1 for place, token in enumerate(row) if token in ends), None)
        if length is None:  # ended by a stop string or the length
            length = len(row)
            while length and row[length - 1] == pad:
                length -= 1
        lengths.append(length)
    return lengths


__all__ = ["GeneratedTexts", "generate_batches", "generate_texts", "require_extra", "text_scores"]
