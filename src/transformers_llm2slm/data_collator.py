"""Collator: rows of prompt and completion to a batch, padded by length, never by looking for the pad token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .modeling_llm2slm import LLM2SLMForConditionalGeneration
from .processing_llm2slm import LLM2SLMProcessor


class LLM2SLMDataCollator:
    """
    Makes a batch of rows with a `"prompt"` and a `"completion"` (TRL's prompt-completion format).

    Args:
        processor ([`LLM2SLMProcessor`]): The processor of the model.
        max_prompt_length (`int`, *optional*): Prompts are cut to so many LLM tokens; by default to what the models take.
        max_response_length (`int`, *optional*): Completions are cut to so many SLM tokens, end token included.
        model ([`LLM2SLMForConditionalGeneration`], *optional*): If given, batches hold `decoder_input_ids` too, for
            trainers that take the labels out of them (label smoothing).
        pad_to_max_length (`bool`, defaults to `False`): Pad every batch to these lengths, for static shapes.

    The `Trainer` drops columns that the model's `forward` doesn't name: set `remove_unused_columns=False`.
    """

    def __init__(
        self,
        processor: LLM2SLMProcessor,
        max_prompt_length: int | None = None,
        max_response_length: int | None = None,
        model: LLM2SLMForConditionalGeneration | None = None,
        pad_to_max_length: bool = False,
    ):
        if not isinstance(processor, LLM2SLMProcessor):
            raise TypeError(f"`processor` must be an LLM2SLMProcessor, got {type(processor).__name__}.")
        if pad_to_max_length and None in (max_prompt_length, max_response_length):
            raise ValueError("`pad_to_max_length=True` needs `max_prompt_length` and `max_response_length`.")
        self.processor = processor
        self.max_prompt_length = max_prompt_length
        self.max_response_length = max_response_length
        self.model = model
        self.padding: bool | str = "max_length" if pad_to_max_length else True

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """
        Args:
            rows (`Sequence[Mapping]`): Each with `"prompt"` and `"completion"`, both `str`.

        Returns:
            The processor's batch of tensors, with `labels`.

        Raises:
            ValueError: for a row without prompt or completion; it names the columns that there are.
        """
        for index, row in enumerate(rows):
            for name in ("prompt", "completion"):
                if not isinstance(row.get(name), str):
                    raise ValueError(
                        f"Row {index} of the batch has no text in column {name!r}; its columns are {sorted(row)}. Rename "
                        'your columns to "prompt" and "completion", and set `remove_unused_columns=False` in the '
                        "training arguments, or the Trainer drops them."
                    )
        batch = self.processor(
            text=[row["prompt"] for row in rows],
            text_target=[row["completion"] for row in rows],
            padding=self.padding,
            truncation=True,
            max_length=self.max_prompt_length,
            max_target_length=self.max_response_length,
            return_tensors="pt",
        )
        batch = dict(batch)
        if self.model is not None:
            batch["decoder_input_ids"] = self.model.prepare_decoder_input_ids_from_labels(batch["labels"])
        return batch


__all__ = ["LLM2SLMDataCollator"]
