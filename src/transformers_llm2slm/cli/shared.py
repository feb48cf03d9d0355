"""What the commands of `llm2slm` share: options, loading, and how numbers are shown."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Column, Table
from typer import Argument, Option

from ..evaluation import require_extra

if TYPE_CHECKING:
    from datasets import Dataset as Rows

    from ..modeling_llm2slm import LLM2SLMForConditionalGeneration
    from ..processing_llm2slm import LLM2SLMProcessor

# Options -------------------------------------------------------------------------------------------------------------
LOADING, DATA = "Loading", "Data"
Model = Annotated[str, Argument(metavar="DIR", help="Checkpoint: a local folder or a hub id.", show_default=False)]
Models = Annotated[
    list[str],
    Argument(metavar="LLM [SLM]", help="Hub ids or local folders; no SLM with --slm-layers.", show_default=False),
]
LLMLayer = Annotated[
    str | None,
    Option(
        metavar="N|LIST",
        help="Hidden layer of the LLM to read, or several, as in 4,8,-1; else the last, or what a cut had below it.",
    ),
]
SLMEncoder = Annotated[
    str | None, Option(metavar="keep|skip", help="Whether an encoder-decoder SLM keeps its encoder.")
]
Fusion = Annotated[
    str | None,
    Option(
        metavar="NAME",
        help="add, align, replace, llm-embed or kv; else kv for an SLM cut from a decoder-only LLM, and for two models add if "
        "the tokenizers are equal, or align.",
    ),
]
LLMRevision = Annotated[
    str | None, Option(metavar="NAME", rich_help_panel=LOADING, help="Branch, tag or commit of the LLM.")
]
SLMRevision = Annotated[
    str | None, Option(metavar="NAME", rich_help_panel=LOADING, help="Branch, tag or commit of the SLM.")
]
Revision = Annotated[
    str | None, Option(metavar="NAME", rich_help_panel=LOADING, help="Branch, tag or commit of the checkpoint.")
]
Token = Annotated[
    str | None, Option(metavar="TEXT", rich_help_panel=LOADING, help="Hub token, if not that of `hf auth login`.")
]
CacheDir = Annotated[Path | None, Option(metavar="DIR", rich_help_panel=LOADING, help="Where downloads are kept.")]
LocalFilesOnly = Annotated[bool, Option("--local-files-only", rich_help_panel=LOADING, help="Download nothing.")]
LLMNameOrPath = Annotated[
    str | None, Option(metavar="NAME", rich_help_panel=LOADING, help="Another place of the same LLM, as a local copy.")
]
LLMDtype = Annotated[
    str | None,
    Option(metavar="TYPE", rich_help_panel=LOADING, help="float32, bfloat16 or float16; else as the checkpoint says."),
]
Dtype = Annotated[
    str | None, Option(metavar="TYPE", rich_help_panel=LOADING, help="The same for projector and SLM; else as stored.")
]
Device = Annotated[
    str | None,
    Option(metavar="NAME", rich_help_panel=LOADING, help="Such as cpu or cuda:1; else an accelerator if any."),
]
Dataset = Annotated[
    str | None, Option(metavar="NAME", rich_help_panel=DATA, help="Data set of the hub, in place of a file.")
]
DatasetConfig = Annotated[str | None, Option(metavar="NAME", rich_help_panel=DATA, help="Its configuration.")]
PromptColumn = Annotated[
    str, Option(metavar="NAME", rich_help_panel=DATA, help="Column of the prompts; a.b for b inside of a.")
]
CompletionColumn = Annotated[str, Option(metavar="NAME", rich_help_panel=DATA, help="Column of the responses.")]
File = Annotated[
    Path | None, Option(metavar="FILE", rich_help_panel=DATA, help="JSON lines (also .gz), CSV or Parquet.")
]
MaxRows = Annotated[int | None, Option(metavar="N", rich_help_panel=DATA, min=1, help="Only the first rows.")]
MaxPromptLength = Annotated[
    int | None, Option(metavar="N", min=1, rich_help_panel=DATA, help="Cut prompts to so many LLM tokens.")
]
StatesDtype = Annotated[
    str, Option(metavar="TYPE", help="How LLM states are cached: float32, float16, bfloat16 or int8.")
]
MaxNewTokens = Annotated[int, Option(metavar="N", min=1, help="Longest response, in SLM tokens.")]
NumBeams = Annotated[int, Option(metavar="N", min=1, help="Beams; 1 is greedy.")]


# Of a command that others are shown: what is secret, or of no use but on this machine.
_NOT_SHOWN = ("token", "cache_dir", "output", "predictions", "debug")


# Arguments, loading, output ---------------------------------------------------------------------------------------------
def dtype_name(option: str, dtype: str | None) -> str | None:
    """The dtype as given. Raises a `ValueError` for what a model can't be loaded in."""
    names = ("float32", "bfloat16", "float16", "auto")
    if dtype is not None and dtype not in names:
        raise ValueError(f"`--{option}` must be one of {', '.join(names)}, got {dtype!r}.")
    return dtype


def hub_arguments(**arguments: Any) -> dict[str, Any]:
    """Arguments of every loader, without those that are not given."""
    return {name: value for name, value in arguments.items() if value}


def shown_command(context: typer.Context) -> str:
    """The command that is running as it can be shown to others: paths by their last part, and no token."""
    from ..measurements import is_secret, shareable_command

    words = ["llm2slm", context.info_name or ""]
    for parameter in context.command.params:
        value = context.params.get(parameter.name or "")
        if value is None or value == parameter.default or parameter.name in _NOT_SHOWN:
            continue
        items = [str(item) for item in (value if isinstance(value, (list, tuple)) else [value])]
        if parameter.param_type_name == "argument":
            words += items
        elif isinstance(value, bool):
            words.append(parameter.opts[0] if value else (parameter.secondary_opts or parameter.opts)[0])
        else:  # a field of `--set NAME=VALUE` can be secret too
            words += [
                word for item in items if not is_secret(item.partition("=")[0]) for word in (parameter.opts[0], item)
            ]
    return shareable_command(words)


def check_reachable(name_or_path: str, **hub: Any) -> dict[str, Any]:
    """
    What the `config.json` of a checkpoint says, unchecked.

    Raises:
        OSError: if it can't be had. transformers does not always say which of several it was.
    """
    from transformers import PreTrainedConfig

    try:
        return PreTrainedConfig.get_config_dict(name_or_path, **hub)[0]
    except OSError as error:
        if Path(name_or_path).exists():
            raise
        raise OSError(f"{name_or_path!r} is no folder here, and as a hub id it fails: {error}") from error


def check_checkpoint(name_or_path: str, **hub: Any) -> dict[str, Any]:
    """
    What the `config.json` of one of our checkpoints says.

    Raises:
        ValueError: if it is a checkpoint of another kind of model.
        OSError: if it can't be had.
    """
    config = check_reachable(name_or_path, **hub)
    if (kind := config.get("model_type")) != "llm2slm":
        found = f"a model of type {kind!r}" if kind else "no model at all"
        raise ValueError(f"{name_or_path!r} is {found}; expected LLM-to-SLM, which `llm2slm compose` makes.")
    return config


def load(
    model: str,
    llm_name_or_path: str | None,
    llm_dtype: str | None,
    dtype: str | None,
    device: str | None,
    hub: dict[str, Any],
    load_llm: bool | str = True,
) -> tuple[LLM2SLMForConditionalGeneration, LLM2SLMProcessor]:
    """The model on its device, and its processor."""
    import torch

    from ..exported import LLM2SLMExportedModel
    from ..modeling_llm2slm import LLM2SLMForConditionalGeneration
    from ..processing_llm2slm import LLM2SLMProcessor
    from ..reference import pin_revision

    options: dict[str, Any] = {
        "llm_name_or_path": llm_name_or_path,
        "llm_dtype": dtype_name("llm-dtype", llm_dtype),
        "dtype": dtype_name("dtype", dtype),
    }
    options = {name: value for name, value in options.items() if value is not None}
    pin_revision(model, hub)
    config = check_checkpoint(model, **hub)
    processor = LLM2SLMProcessor.from_pretrained(model, **hub)
    if config.get("export") is not None:
        if options or load_llm == "whole":
            raise ValueError(
                f"{model!r} is an export, which holds the LLM and comes in the precision that it was made in."
            )
        return LLM2SLMExportedModel.from_pretrained(model, **hub), processor
    loaded = LLM2SLMForConditionalGeneration.from_pretrained(model, load_llm=load_llm, **options, **hub)
    if device is None:
        device = str(torch.accelerator.current_accelerator()) if torch.accelerator.is_available() else "cpu"
    return loaded.to(device), processor


def read_rows(*arguments: Any, **options: Any) -> Rows:
    """[`load_rows`], whose progress is for somebody who is there to see it."""
    from ..rows import load_rows

    require_extra("train", "datasets")
    import datasets

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    return load_rows(*arguments, **options)


def quiet() -> None:
    """Leave out what transformers tells while it loads; downloads, which take long, still show their progress."""
    from huggingface_hub.utils import enable_progress_bars
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    enable_progress_bars()


def show_numbers(title: str, numbers: dict[str, float]) -> None:
    """Print a table of names and numbers."""
    table = Table(
        "", Column("", justify="right"), title=title, title_justify="left", show_header=False, box=box.SIMPLE
    )
    for name, value in numbers.items():
        table.add_row(name, f"{value:,}" if isinstance(value, int) else f"{value:,.2f}")
    Console().print(table)
