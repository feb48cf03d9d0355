"""The command `llm2slm evaluate`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress
from typer import Option

from .shared import (
    DATA,
    CacheDir,
    CompletionColumn,
    Dataset,
    DatasetConfig,
    Device,
    Dtype,
    File,
    LLMDtype,
    LLMNameOrPath,
    LocalFilesOnly,
    MaxNewTokens,
    MaxPromptLength,
    MaxRows,
    Model,
    NumBeams,
    PromptColumn,
    Revision,
    Token,
    hub_arguments,
    load,
    quiet,
    read_rows,
    show_numbers,
    shown_command,
)


def evaluate(
    context: typer.Context,
    model: Model,
    file: File = None,
    dataset: Dataset = None,
    dataset_config: DatasetConfig = None,
    split: Annotated[str, Option(metavar="NAME", rich_help_panel=DATA, help="Its split.")] = "test",
    prompt_column: PromptColumn = "prompt",
    completion_column: CompletionColumn = "completion",
    max_rows: MaxRows = None,
    batch_size: Annotated[int, Option(metavar="N", min=1, help="Prompts at a time.")] = 8,
    max_new_tokens: MaxNewTokens = 128,
    num_beams: NumBeams = 1,
    max_prompt_length: MaxPromptLength = None,
    output: Annotated[Path | None, Option(metavar="FILE", help="Write the results here, as JSON.")] = None,
    predictions: Annotated[
        Path | None, Option(metavar="FILE", help="Write prompts, completions and predictions here, as JSON lines.")
    ] = None,
    record: Annotated[
        bool,
        Option("--record/--no-record", help="Record the results in DIR, for its model card, if it is a local folder."),
    ] = True,
    beside_llm: Annotated[
        bool, Option("--beside-llm", help="Load the whole LLM too, and time both on the median prompt.")
    ] = False,
    timing_tokens: Annotated[int, Option(metavar="N", min=2, help="New tokens for --beside-llm.")] = 64,
    timing_rounds: Annotated[int, Option(metavar="N", min=1, help="Rounds for --beside-llm.")] = 5,
    llm_name_or_path: LLMNameOrPath = None,
    llm_dtype: LLMDtype = None,
    dtype: Dtype = None,
    device: Device = None,
    revision: Revision = None,
    token: Token = None,
    cache_dir: CacheDir = None,
    local_files_only: LocalFilesOnly = False,
) -> None:
    """Generate for rows of prompt and completion; measure quality and speed."""
    from ..checkpoint_files import checkpoint_fingerprint
    from ..evaluation import generate_texts, require_extra, text_scores
    from ..measurements import provenance, read_records, write_record
    from ..speed import speed_beside_llm

    quiet()
    require_extra("eval", "rouge_score", "sacrebleu")
    rows = read_rows(
        file,
        dataset=dataset,
        dataset_config=dataset_config,
        split=split,
        prompt_column=prompt_column,
        completion_column=completion_column,
        max_rows=max_rows,
        token=token,
        cache_dir=cache_dir,
    )
    folder = Path(model) if record and checkpoint_fingerprint(model) is not None else None
    if folder is not None:
        read_records(folder)  # which raises an error for a file that is not ours
        if not os.access(folder, os.W_OK):
            raise ValueError(
                f"{model!r} can't be written to, so the results can't be recorded in it: add `--no-record`."
            )
    for path in (output, predictions):  # a path that can't be written to must not cost an evaluation
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.open("a").close()
    prompts, completions = list(rows["prompt"]), list(rows["completion"])
    hub = hub_arguments(revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only)
    load_llm = "whole" if beside_llm else True
    loaded, processor = load(model, llm_name_or_path, llm_dtype, dtype, device, hub, load_llm)
    generation: dict[str, Any] = {"max_new_tokens": max_new_tokens, "num_beams": num_beams, "do_sample": False}
    console = Console(stderr=True)
    with Progress(*Progress.get_default_columns(), console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("Generating", total=len(prompts))
        generated = generate_texts(
            loaded,
            processor,
            prompts,
            batch_size,
            max_prompt_length=max_prompt_length,
            progress=lambda count: progress.advance(task, count),
            **generation,
        )
    scores = text_scores(generated.texts, completions)
    speed = {
        "rows": len(prompts),
        "seconds": generated.seconds,
        "new_tokens": generated.new_tokens,
        "tokens_per_second": generated.tokens_per_second,
    }
    show_numbers(f"{model} on {file or dataset}", scores | speed)
    records = [quality_record(scores, speed, batch_size, generation, file, dataset, dataset_config, split)]
    if beside_llm:
        prompt = sorted(prompts, key=len)[len(prompts) // 2]
        records.append(speed_beside_llm(loaded, processor, prompt, timing_tokens, timing_rounds))
        for name, figures in records[-1]["figures"].items():
            show_numbers(f"{name}: {timing_tokens} tokens, batch size 1", figures)
    if folder is not None:
        by = provenance(shown_command(context), "rouge-score", "sacrebleu", "datasets")
        for measured in records:
            write_record(folder, measured | by)
    if output is not None:
        settings = {"model": model, "data": str(file or dataset), "batch_size": batch_size, **generation}
        output.write_text(json.dumps(scores | speed | settings, indent=2) + "\n", encoding="utf-8")
    if predictions is not None:
        with predictions.open("w", encoding="utf-8") as lines:
            for row in zip(prompts, completions, generated.texts, strict=True):
                named = dict(zip(("prompt", "completion", "prediction"), row, strict=True))
                lines.write(json.dumps(named, ensure_ascii=False) + "\n")


def quality_record(
    scores: dict[str, float],
    speed: dict[str, float],
    batch_size: int,
    generation: dict[str, Any],
    file: Path | None,
    dataset: str | None,
    dataset_config: str | None,
    split: str,
) -> dict[str, Any]:
    """The record of an evaluation, see [`write_record`]."""
    from ..measurements import QUALITY, without_path

    source: dict[str, Any] = {"name": file.name} if file is not None else {"name": without_path(dataset)}
    if file is None:
        source |= {"config": dataset_config, "split": split}
    data = {name: value for name, value in source.items() if value is not None} | {"rows": speed["rows"]}
    timing = {name: speed[name] for name in ("seconds", "new_tokens", "tokens_per_second")}
    settings = {"batch_size": batch_size, **generation}
    return {"kind": QUALITY, "data": data, "metrics": scores, "generation": settings, "timing": timing}
