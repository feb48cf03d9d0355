"""Collator: rows of prompt and completion to a batch, padded by length, never by looking for the pad token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from .processing_llm2slm import LLM2SLMProcessor
from .rows import prompt_and_completion

# The column of a row's cached LLM states.
STATES_COLUMN = "llm_hidden_states"


class LLM2SLMDataCollator:
    """
    Makes a batch of rows with a prompt and a response, for `Trainer`, `Seq2SeqTrainer` and TRL's `SFTTrainer`.

    Rows come in TRL's formats: `"prompt"` and `"completion"` as text, the same as lists of messages, or `"messages"`, of
    which the last is the response and the others are the prompt. Rows of [`cache_llm_states`] bring the LLM's states. Rows that
    the processor has tokenized before, `processor(text=prompts, text_target=responses)`, are padded as they are.

    Args:
        processor ([`LLM2SLMProcessor`]): The processor of the model.
        max_prompt_length (`int`, *optional*): Prompts are cut to so many LLM tokens; by default to what the models take.
        max_response_length (`int`, *optional*): Responses are cut to so many SLM tokens, end token included.
        pad_to_max_length (`bool`, defaults to `False`): Pad every batch to these lengths, for static shapes.

    The `Trainer` drops columns that the model's `forward` doesn't name, text among them: set `remove_unused_columns=False`.
    """

    def __init__(
        self,
        processor: LLM2SLMProcessor,
        max_prompt_length: int | None = None,
        max_response_length: int | None = None,
        pad_to_max_length: bool = False,
    ):
        if not isinstance(processor, LLM2SLMProcessor):
            raise TypeError(f"`processor` must be an LLM2SLMProcessor, got {type(processor).__name__}.")
        if pad_to_max_length and None in (max_prompt_length, max_response_length):
            raise ValueError("`pad_to_max_length=True` needs `max_prompt_length` and `max_response_length`.")
        self.processor = processor
        self.max_prompt_length = max_prompt_length
        self.max_response_length = max_response_length
        self.padding: bool | str = "max_length" if pad_to_max_length else True

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """
        Args:
            rows (`Sequence[Mapping]`): Rows of text or of tokens, as above.

        Returns:
            The processor's batch of tensors, with `labels` of shape `(batch_size, response_length)`; the same as
            `shift_labels`, since ours stand where they are scored (TRL reads them so); `decoder_input_ids`; and
            `llm_hidden_states` of shape `(batch_size, prompt_length, num_llm_states, llm_state_size)` if the rows bring
            them.

        Raises:
            ValueError: for a row without prompt or response; it names the columns that there are. And for one that was tokenized
                beyond the lengths, as tokens are not cut.
        """
        before = any("input_ids" in row and "labels" in row for row in rows)
        batch = dict(self._padded(rows) if before else self._tokenized(rows))
        labels = batch["labels"]
        batch |= {"shift_labels": labels, "decoder_input_ids": self.processor.decoder_input_ids(labels)}
        if any(STATES_COLUMN in row for row in rows):
            batch[STATES_COLUMN] = _padded_states([row.get(STATES_COLUMN) for row in rows], batch["attention_mask"])
        return batch

    def _tokenized(self, rows: Sequence[Mapping[str, Any]]) -> Mapping[str, torch.Tensor]:
        texts = [prompt_and_completion(row, f"Row {index} of the batch") for index, row in enumerate(rows)]
        return self.processor(
            text=[prompt for prompt, _ in texts],
            text_target=[completion for _, completion in texts],
            padding=self.padding,
            truncation=True,
            max_length=self.max_prompt_length,
            max_target_length=self.max_response_length,
            return_tensors="pt",
        )

    def _padded(self, rows: Sequence[Mapping[str, Any]]) -> Mapping[str, torch.Tensor]:
        lengths = {"max_length": self.max_prompt_length, "max_target_length": self.max_response_length}
        batch = self.processor.pad(rows, self.padding, **lengths, return_tensors="pt")
        limits = {"input_ids": self.max_prompt_length, "labels": self.max_response_length}
        if self.processor.fusion == "align" and self.padding == "max_length":
            limits["slm_input_ids"] = self.max_prompt_length
        for name, limit in limits.items():
            if limit is not None and batch[name].shape[1] > limit:
                raise ValueError(
                    f"A row of the batch has {batch[name].shape[1]} {name}, and is to have {limit} at most. It was tokenized "
                    "before; cut it there: `processor(..., truncation=True, max_length=..., max_target_length=...)`."
                )
        return batch


def _padded_states(rows: Sequence[torch.Tensor | None], attention_mask: torch.Tensor) -> torch.Tensor:
    """The rows' states, each of shape `(prompt_length, num_llm_states, llm_state_size)`, where the mask has tokens."""
    states: list[torch.Tensor] = []
    for index, (row, length) in enumerate(zip(rows, attention_mask.sum(dim=1).tolist(), strict=True)):
        if row is None or len(row) != length:
            found = "none" if row is None else f"those of {len(row)} tokens"
            raise ValueError(
                f"Row {index} of the batch needs the LLM's states of {length} prompt tokens, found {found}. The cache was "
                "made with another maximum length or tokenizer: give the collator the `max_prompt_length` of "
                "`cache_llm_states`."
            )
        states.append(torch.as_tensor(row))
    padded = states[0].new_zeros(*attention_mask.shape, *states[0].shape[1:])
    padded[attention_mask.bool()] = torch.cat(states)
    return padded


__all__ = ["LLM2SLMDataCollator"]
