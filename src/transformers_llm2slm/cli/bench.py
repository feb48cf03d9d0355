"""The command `llm2slm bench`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Column, Table
from typer import Option

from .shared import (
    CacheDir,
    Device,
    Dtype,
    File,
    LLMDtype,
    LLMNameOrPath,
    LocalFilesOnly,
    Model,
    NumBeams,
    PromptColumn,
    Revision,
    Token,
    hub_arguments,
    load,
    quiet,
    read_rows,
    shown_command,
)

if TYPE_CHECKING:
    from ..contestants import Spread

# Columns of the table: the figure, its heading, by what it is multiplied, and how it is written.
COLUMNS = (
    ("encode, s", "encode", 1000, ".1f"),
    ("project, s", "project", 1000, ".2f"),
    ("first token, s", "first", 1000, ".1f"),
    ("token, s", "token", 1000, ".2f"),
    ("total, s", "total", 1000, ".0f"),
    ("tokens/s", "tokens/s", 1, ".1f"),
    ("times the first", "x LLM", 1, ".2f"),
)


def bench(
    context: typer.Context,
    model: Model,
    export_dir: Annotated[
        list[Path] | None, Option(metavar="OUT", help="Folder of `llm2slm export`, to measure too; repeatable.")
    ] = None,
    prompt_length: Annotated[int, Option(metavar="N", min=1, help="Length of a prompt, in LLM tokens.")] = 128,
    new_tokens: Annotated[int, Option(metavar="N", min=2, help="Length of a response: always so many tokens.")] = 128,
    batch_size: Annotated[int, Option(metavar="N", min=1, help="Prompts at a time.")] = 1,
    num_beams: NumBeams = 1,
    rounds: Annotated[int, Option(metavar="N", min=1, help="Rounds, after one to warm up.")] = 5,
    threads: Annotated[int | None, Option(metavar="N", min=1, help="Threads; else as many as torch takes.")] = None,
    file: File = None,
    prompt_column: PromptColumn = "prompt",
    output: Annotated[Path | None, Option(metavar="FILE", help="Write the results here, as JSON.")] = None,
    plot: Annotated[Path | None, Option(metavar="FILE", help="Draw them here, as PNG, PDF or SVG.")] = None,
    llm_name_or_path: LLMNameOrPath = None,
    llm_dtype: LLMDtype = None,
    dtype: Dtype = None,
    device: Device = None,
    revision: Revision = None,
    token: Token = None,
    cache_dir: CacheDir = None,
    local_files_only: LocalFilesOnly = False,
) -> None:
    """
    Measure the speed of a model beside its LLM, its SLM and the LLM's other ways to decode.

    Prompts are random tokens, or the text of --file, on which the drafts of prompt lookup and lossless mode depend.
    """
    import torch

    from ..contestants import Conditions, contestants_of, export_name, figures_of, race, random_prompts, text_prompts
    from ..evaluation import require_extra
    from ..exported import LLM2SLMExportedModel
    from ..measurements import provenance
    from ..speed import memory_bandwidth

    quiet()
    if plot is not None:
        require_extra("bench", "matplotlib")
    for path in (output, plot):  # a path that can't be written to must not cost a measurement
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.open("a").close()
    if threads is not None:
        torch.set_num_threads(threads)
    conditions = Conditions(prompt_length, new_tokens, batch_size, num_beams)
    hub = hub_arguments(revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only)
    loaded, processor = load(model, llm_name_or_path, llm_dtype, dtype, device, hub, load_llm="whole")
    exported = {}
    for folder in export_dir or []:
        other = LLM2SLMExportedModel.from_pretrained(folder)
        if export_name(other) in exported:
            raise ValueError(f"Two exports are alike, {export_name(other)!r}: leave {str(folder)!r} out.")
        exported[export_name(other)] = other
    if file is None:
        inputs = random_prompts(loaded, conditions)
    else:
        rows = read_rows(file, prompt_column=prompt_column, completion_column=None)
        inputs = text_prompts(processor, rows["prompt"][:], conditions)
        inputs = {name: tensor.to(loaded.device) for name, tensor in inputs.items()}
    contestants, llm = contestants_of(loaded, inputs, conditions, exported), loaded.model.whole_llm
    console = Console(stderr=True)
    with console.status(f"Measuring {len(contestants)} contestants in {rounds} rounds, after one to warm up"):
        seconds, _ = race(contestants, conditions, rounds)
        bandwidth = memory_bandwidth() if loaded.device.type == "cpu" else None
    figures = figures_of(seconds, conditions)
    limits = {
        name: contestant.step_bytes / bandwidth
        for name, contestant in contestants.items()
        if bandwidth is not None and contestant.step_bytes is not None
    }
    settings = {
        "prompt tokens": inputs["input_ids"].shape[1],
        "new tokens": new_tokens,
        "batch size": batch_size,
        "beams": num_beams,
        "prompts": "random tokens" if file is None else file.name,
        "LLM in": str(getattr(llm, "dtype", None)).removeprefix("torch."),
        "SLM in": str(loaded.slm.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "rounds": rounds,
    }
    accepted = {
        name: contestant.drafts.acceptance_rate for name, contestant in contestants.items() if contestant.drafts
    }
    show(settings, figures, accepted, limits)
    if output is not None:
        results = {
            **provenance(shown_command(context), "onnxruntime", "openvino"),
            "settings": settings,
            "figures": figures,
            "accepted": accepted,
            "limit of a step, s": limits,
            "memory bandwidth, bytes/s": bandwidth,
        }
        output.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    if plot is not None:
        draw(plot, settings, figures)


def show(
    settings: dict[str, Any],
    figures: dict[str, dict[str, Spread]],
    accepted: dict[str, float | None],
    limits: dict[str, float],
) -> None:
    """Print the figures as a table: medians; milliseconds where nothing else is said."""
    columns = [column for column in COLUMNS if any(column[0] in row for row in figures.values())]
    headings = [heading for _, heading, *_ in columns] + ["min-max", "accepted", "x limit"]
    title = ", ".join(f"{name} {value}" for name, value in settings.items())
    table = Table(
        "", *(Column(heading, justify="right") for heading in headings), title=title, title_justify="left",
        box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False,
    )  # fmt: skip
    for name, row in figures.items():
        cells = [f"{factor * row[key]['median']:{style}}" if key in row else "" for key, _, factor, style in columns]
        total, rate = row["total, s"], accepted.get(name)
        cells.append(f"{1000 * total['min']:.0f}-{1000 * total['max']:.0f}")
        cells.append("" if rate is None else f"{rate:.0%}")
        cells.append(f"{row['token, s']['median'] / limits[name]:.2f}" if name in limits else "")
        table.add_row(name, *cells)
    # Wide enough for all of it where nobody says how wide a line is, as in a file.
    console = Console()
    console = console if console.is_terminal else Console(width=max(console.width, 120))
    console.print(table)
    console.print(
        "Medians in ms; min-max of the total. x limit: the time of a further token, over what reading the weights and the "
        "cache that it needs takes."
    )


def draw(path: Path, settings: dict[str, Any], figures: dict[str, dict[str, Spread]]) -> None:
    """A bar for each contestant: the time to the first token, and that of the others."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1.2 + 0.4 * len(figures)), layout="constrained")
    axis = figure.subplots()
    names = list(figures)
    first, total = ([figures[name][key]["median"] for name in names] for key in ("first token, s", "total, s"))
    further = [t - f for f, t in zip(first, total, strict=True)]
    axis.barh(names, first, color="#93b4f5", label="reading, first token")
    bars = axis.barh(names, further, left=first, color="#2563eb", label="further tokens")
    speeds = [f"{figures[name]['tokens/s']['median']:.1f} tokens/s" for name in names]
    axis.bar_label(bars, labels=speeds, padding=4, fontsize=8)
    axis.invert_yaxis()
    axis.margins(x=0.2)
    axis.set_xlabel("seconds")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8, loc="lower right")
    shown = ("prompt tokens", "new tokens", "batch size", "beams", "threads")
    axis.set_title(", ".join(f"{name} {settings[name]}" for name in shown), fontsize=9, loc="left")
    figure.savefig(path, dpi=120)
