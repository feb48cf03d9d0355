"""The command `llm2slm cache`."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.logging import RichHandler
from typer import Argument, Option

from .shared import (
    DATA,
    CacheDir,
    Dataset,
    DatasetConfig,
    Device,
    File,
    LLMDtype,
    LLMNameOrPath,
    LocalFilesOnly,
    MaxPromptLength,
    MaxRows,
    Model,
    PromptColumn,
    Revision,
    StatesDtype,
    Token,
    hub_arguments,
    load,
    quiet,
    read_rows,
)

if TYPE_CHECKING:
    from datasets import Dataset as Rows


def cache(
    model: Model,
    out: Annotated[Path, Argument(metavar="OUT", help="Folder of the cache, new or to go on with.")],
    file: File = None,
    dataset: Dataset = None,
    dataset_config: DatasetConfig = None,
    split: Annotated[str, Option(metavar="NAME", rich_help_panel=DATA, help="Its split.")] = "train",
    prompt_column: PromptColumn = "prompt",
    max_prompt_length: MaxPromptLength = None,
    max_rows: MaxRows = None,
    states_dtype: StatesDtype = "float16",
    batch_size: Annotated[int, Option(metavar="N", min=1, help="Prompts at a time.")] = 16,
    num_workers: Annotated[
        int | None, Option(metavar="N", min=1, help="Encode with so many Ray actors, here or on a cluster.")
    ] = None,
    llm_name_or_path: LLMNameOrPath = None,
    llm_dtype: LLMDtype = None,
    device: Device = None,
    revision: Revision = None,
    token: Token = None,
    cache_dir: CacheDir = None,
    local_files_only: LocalFilesOnly = False,
) -> None:
    """Let the LLM read the prompts of a data set once, to train on its states without it."""
    from ..llm_states_cache import cache_error

    quiet()
    rows = read_rows(
        file,
        dataset=dataset,
        dataset_config=dataset_config,
        split=split,
        prompt_column=prompt_column,
        completion_column=None,
        max_rows=max_rows,
        token=token,
        cache_dir=cache_dir,
    )
    hub = hub_arguments(revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only)
    loaded, processor = load(model, llm_name_or_path, llm_dtype, None, device, hub)
    rows = rows.add_column("completion", [""] * len(rows))
    options = {"max_prompt_length": max_prompt_length, "dtype": states_dtype}
    cached_rows(rows, loaded, processor, out, **options, batch_size=batch_size, num_workers=num_workers)
    size = sum(part.stat().st_size for part in out.iterdir())
    error = cache_error(out)
    typer.echo(f"{out} holds the states of these {len(rows):,} rows: {size:,} bytes, relative error {error:.2g}.")


def cached_rows(rows: Rows, *arguments: Any, **options: Any) -> Rows:
    """[`cache_llm_states`], which tells what it is about to do."""
    from ..llm_states_cache import cache_llm_states

    logger = logging.getLogger("transformers_llm2slm.llm_states_cache")
    handler = RichHandler(console=Console(stderr=True), show_time=False, show_level=False, show_path=False)
    logger.addHandler(handler)
    level = logger.level
    logger.setLevel(logging.INFO)
    try:
        return cache_llm_states(rows, *arguments, **options)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
