"""The command `llm2slm train`: checks of folders and arguments, and `Seq2SeqTrainer`."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Option

from .cache import cached_rows
from .shared import (
    DATA,
    CacheDir,
    CompletionColumn,
    Dataset,
    DatasetConfig,
    Dtype,
    LLMDtype,
    LLMNameOrPath,
    LocalFilesOnly,
    MaxPromptLength,
    Model,
    PromptColumn,
    Revision,
    StatesDtype,
    Token,
    hub_arguments,
    load,
    quiet,
    read_rows,
    shown_command,
)

if TYPE_CHECKING:
    from datasets import Dataset as Rows
    from transformers import Seq2SeqTrainingArguments

    from ..modeling_llm2slm import LLM2SLMForConditionalGeneration
    from ..processing_llm2slm import LLM2SLMProcessor


# Help panel of what the optimiser sees.
TRAINING = "Training"


def train(
    context: typer.Context,
    model: Model,
    output_dir: Annotated[
        Path, Option(metavar="DIR", help="Folder for checkpoints, results and the trained model.", show_default=False)
    ],
    train_file: Annotated[
        Path | None, Option(metavar="FILE", rich_help_panel=DATA, help="JSON lines (also .gz), CSV or Parquet.")
    ] = None,
    validation_file: Annotated[
        Path | None, Option(metavar="FILE", rich_help_panel=DATA, help="The same, to evaluate on.")
    ] = None,
    dataset: Dataset = None,
    dataset_config: DatasetConfig = None,
    split: Annotated[
        str,
        Option(
            metavar="NAME", rich_help_panel=DATA, help="Its split to train on; slices, as in train[:1000], are taken."
        ),
    ] = "train",
    validation_split: Annotated[
        str | None, Option(metavar="NAME", rich_help_panel=DATA, help="Its split to evaluate on.")
    ] = None,
    prompt_column: PromptColumn = "prompt",
    completion_column: CompletionColumn = "completion",
    max_prompt_length: MaxPromptLength = None,
    max_response_length: Annotated[
        int | None, Option(metavar="N", rich_help_panel=DATA, min=1, help="Cut responses to so many SLM tokens.")
    ] = None,
    learning_rate: Annotated[
        float, Option(rich_help_panel=TRAINING, metavar="X", help="Highest learning rate.")
    ] = 1e-4,
    num_train_epochs: Annotated[
        float, Option(rich_help_panel=TRAINING, metavar="X", help="Times to go over the rows.")
    ] = 1.0,
    max_steps: Annotated[
        int | None, Option(rich_help_panel=TRAINING, metavar="N", min=1, help="Steps to train, in place of epochs.")
    ] = None,
    per_device_train_batch_size: Annotated[
        int, Option(rich_help_panel=TRAINING, metavar="N", min=1, help="Rows at a time on each device.")
    ] = 8,
    gradient_accumulation_steps: Annotated[
        int, Option(rich_help_panel=TRAINING, metavar="N", min=1, help="Batches to a step.")
    ] = 1,
    gradient_checkpointing: Annotated[
        bool,
        Option(
            "--gradient-checkpointing",
            rich_help_panel=TRAINING,
            help="Compute again what could be kept: less memory, slower.",
        ),
    ] = False,
    cache_llm_states: Annotated[
        Path | None,
        Option(
            metavar="DIR",
            rich_help_panel=TRAINING,
            help="Cache the LLM's states here first (or use what is there), and train without the LLM.",
        ),
    ] = None,
    states_dtype: StatesDtype = "float16",
    bf16: Annotated[bool | None, Option("--bf16/--no-bf16", help="Mixed precision; else where a GPU has it.")] = None,
    logging_steps: Annotated[int, Option(metavar="N", min=1, help="Steps between losses shown.")] = 50,
    save_steps: Annotated[int, Option(metavar="N", min=1, help="Steps between checkpoints.")] = 500,
    eval_steps: Annotated[
        int | None, Option(metavar="N", min=1, help="Steps between evaluations; else at the end only.")
    ] = None,
    seed: Annotated[
        int, Option(rich_help_panel=TRAINING, metavar="N", help="Of the order of rows and of dropout.")
    ] = 42,
    resume: Annotated[bool, Option("--resume", help="Go on from the last checkpoint in the output folder.")] = False,
    settings: Annotated[
        list[str] | None,
        Option("--set", metavar="NAME=VALUE", help="Any other field of Seq2SeqTrainingArguments; repeatable."),
    ] = None,
    llm_name_or_path: LLMNameOrPath = None,
    llm_dtype: LLMDtype = None,
    dtype: Dtype = None,
    revision: Revision = None,
    token: Token = None,
    cache_dir: CacheDir = None,
    local_files_only: LocalFilesOnly = False,
) -> None:
    """Train projector and SLM on rows of prompt and completion."""
    from ..evaluation import require_extra

    require_extra("train", "accelerate", "datasets")

    from transformers.utils import is_torch_bf16_gpu_available

    quiet()
    last = checkpoint_to_resume(output_dir, model, resume)
    if resume:
        typer.echo(
            f"Going on from {last}." if last else f"No checkpoint in {output_dir} yet: starting anew.", err=True
        )
    validates = validation_file is not None or validation_split is not None
    if eval_steps is not None and not validates:
        raise ValueError("`--eval-steps` needs rows to evaluate on: add `--validation-file` or `--validation-split`.")
    arguments = training_arguments(
        output_dir,
        settings or [],
        learning_rate=learning_rate,
        num_train_epochs=num_train_epochs,
        max_steps=max_steps,
        per_device_train_batch_size=per_device_train_batch_size,
        gradient_accumulation_steps=gradient_accumulation_steps,
        gradient_checkpointing=gradient_checkpointing or None,
        bf16=is_torch_bf16_gpu_available() if bf16 is None else bf16,
        logging_steps=logging_steps,
        save_steps=save_steps,
        eval_steps=eval_steps,
        seed=seed,
    )
    hub = hub_arguments(revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only)
    source: dict[str, Any] = {
        "dataset": dataset,
        "dataset_config": dataset_config,
        "token": token,
        "cache_dir": cache_dir,
    }
    columns: dict[str, Any] = {"prompt_column": prompt_column, "completion_column": completion_column}
    rows = read_rows(train_file, split=split, **source, **columns)
    validation_rows = None
    if validation_file is not None:
        validation_rows = read_rows(validation_file, **columns)
    elif validation_split is not None:
        validation_rows = read_rows(split=validation_split, **source, **columns)
    # The trainer chooses the device; the LLM of a cache reads on the best there is.
    device = "cpu" if cache_llm_states is None else None
    loaded, processor = load(model, llm_name_or_path, llm_dtype, dtype, device, hub)
    if cache_llm_states is not None:
        options: dict[str, Any] = {"max_prompt_length": max_prompt_length, "dtype": states_dtype}
        rows = cached_rows(rows, loaded, processor, cache_llm_states, **options)
        if validation_rows is not None:
            validation_rows = cached_rows(validation_rows, loaded, processor, cache_llm_states, **options)
        loaded.model.attach_llm(None)
    validation_data = (
        {"name": validation_file.name} if validation_file else {"name": dataset, "split": validation_split}
    )
    metrics = run_training(
        loaded,
        processor,
        arguments,
        rows,
        validation_rows,
        max_prompt_length,
        max_response_length,
        resume_from=last,
        card={
            "dataset": dataset if train_file is None else train_file.name,
            "evaluation_data": validation_data,
            "command": shown_command(context),
        },
    )
    losses = "".join(f", {name} {metrics[name]:.4f}" for name in ("train_loss", "eval_loss") if name in metrics)
    typer.echo(f"Saved in {output_dir} after {metrics['steps']:,} steps on {len(rows):,} rows{losses}.")


def checkpoint_to_resume(output_dir: Path, model: str, resume: bool) -> str | None:
    """
    The last checkpoint of an interrupted run in `output_dir`; `None` to start from the beginning.

    Raises:
        ValueError: if the run would mix with another or write over the model that it starts from.
    """
    from transformers.trainer_utils import get_last_checkpoint

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
    import torch
    from transformers import Seq2SeqTrainingArguments

    fields = {field.name: field for field in dataclasses.fields(Seq2SeqTrainingArguments) if field.init}
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals or name not in fields:
            raise ValueError(
                f"`--set` takes NAME=VALUE with a field of Seq2SeqTrainingArguments, such as warmup_steps=100, got "
                f"{setting!r}."
            )
        try:
            value = json.loads(text)
        except ValueError:
            value = text
        if isinstance(fields[name].default, (int, float)) and not isinstance(value, (int, float)):
            raise ValueError(f"`--set {name}=` takes a number or true or false, got {text!r}.")
        options[name] = value
    if "activation_checkpointing" in fields:  # its name from transformers 5.23 on, where the old one warns
        options.setdefault("activation_checkpointing", options.pop("gradient_checkpointing", None))
    defaults = {
        "remove_unused_columns": False,
        "report_to": "none",
        "save_total_limit": 2,
        "eval_strategy": "no" if options.get("eval_steps") is None else "steps",
        "disable_tqdm": not sys.stderr.isatty(),
        "dataloader_pin_memory": torch.accelerator.is_available(),
    }
    options = defaults | {name: value for name, value in options.items() if value is not None}
    return Seq2SeqTrainingArguments(output_dir=str(output_dir), **options)


def run_training(
    model: LLM2SLMForConditionalGeneration,
    processor: LLM2SLMProcessor,
    arguments: Seq2SeqTrainingArguments,
    rows: Rows,
    validation_rows: Rows | None = None,
    max_prompt_length: int | None = None,
    max_response_length: int | None = None,
    resume_from: str | None = None,
    card: Mapping[str, Any] | None = None,
) -> dict[str, float]:
    """
    Train projector and SLM, and save model, processor, `train_results.json`, with validation rows `eval_results.json`, and
    the model card in the output folder. `card` has more arguments of `create_model_card`.

    Returns:
        `dict[str, float]`: The trainer's metrics of training and evaluation, and the number of `steps`.
    """
    from transformers import Seq2SeqTrainer

    from ..data_collator import LLM2SLMDataCollator
    from ..trainer_card import LLM2SLMModelCardMixin

    class CardTrainer(LLM2SLMModelCardMixin, Seq2SeqTrainer):
        pass

    trainer = CardTrainer(
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
    trainer.create_model_card(**(card or {}))
    return metrics | {"steps": trainer.state.global_step}
