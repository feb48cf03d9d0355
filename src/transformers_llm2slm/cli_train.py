"""What `llm2slm train` does: checks of folders and arguments, and `Seq2SeqTrainer`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from .data_collator import LLM2SLMDataCollator

if TYPE_CHECKING:
    from datasets import Dataset

    from .modeling_llm2slm import LLM2SLMForConditionalGeneration
    from .processing_llm2slm import LLM2SLMProcessor


def checkpoint_to_resume(output_dir: Path, model: str, resume: bool) -> str | None:
    """
    The last checkpoint of an interrupted run in `output_dir`; `None` to start from the beginning.

    Raises:
        ValueError: if the run would mix with another or write over the model that it starts from.
    """
    if output_dir.resolve() == Path(model).resolve():
        raise ValueError("`--output-dir` must be another folder than that of the model to train, or it is lost.")
    last = get_last_checkpoint(str(output_dir)) if output_dir.is_dir() else None
    if last is not None and not resume:
        raise ValueError(
            f"{str(output_dir)!r} holds an earlier run: go on from {Path(last).name} with `--resume`, or choose another "
            "`--output-dir`."
        )
    return last


def training_arguments(output_dir: Path, settings: Sequence[str], **options: Any) -> Seq2SeqTrainingArguments:
    """
    The trainer's arguments.

    Args:
        output_dir (`Path`): Where checkpoints and results go.
        settings (`Sequence[str]`): More fields as `NAME=VALUE`, with values in JSON (or plain text); they come last.
        options: Fields; those that are `None` are left at the trainer's defaults.

    Raises:
        ValueError: for a setting that is no field.
    """
    fields = {field.name for field in dataclasses.fields(Seq2SeqTrainingArguments) if field.init}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals or name not in fields:
            raise ValueError(
                f"`--set` takes NAME=VALUE with a field of Seq2SeqTrainingArguments, such as warmup_steps=100, got "
                f"{setting!r}."
            )
        try:
            options[name] = json.loads(value)
        except ValueError:
            options[name] = value
    defaults = {"remove_unused_columns": False, "report_to": "none", "save_total_limit": 2}
    if options.get("eval_steps") is not None:
        defaults["eval_strategy"] = "steps"
    options = defaults | {name: value for name, value in options.items() if value is not None}
    return Seq2SeqTrainingArguments(output_dir=str(output_dir), **options)


def train(
    model: LLM2SLMForConditionalGeneration,
    processor: LLM2SLMProcessor,
    arguments: Seq2SeqTrainingArguments,
    rows: Dataset,
    validation_rows: Dataset | None = None,
    max_prompt_length: int | None = None,
    max_response_length: int | None = None,
    resume_from: str | None = None,
) -> dict[str, float]:
    """
    Train projector and SLM, and save model, processor, `train_results.json` and, with validation rows,
    `eval_results.json` in the output folder.

    Returns:
        `dict[str, float]`: The trainer's metrics of training and evaluation.
    """
    trainer = Seq2SeqTrainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        eval_dataset=validation_rows,
        data_collator=LLM2SLMDataCollator(processor, max_prompt_length, max_response_length),
        processing_class=processor,
    )
    metrics = trainer.train(resume_from_checkpoint=resume_from).metrics
    trainer.save_model()
    trainer.save_metrics("train", metrics)
    trainer.save_state()
    if validation_rows is not None:
        evaluated = trainer.evaluate()
        trainer.save_metrics("eval", evaluated)
        metrics = metrics | evaluated
    return metrics
