"""The command `llm2slm estimate`."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Column, Table
from typer import Option

from .arguments import integers
from .shared import (
    CacheDir,
    Fusion,
    LLMLayer,
    LLMRevision,
    LocalFilesOnly,
    Models,
    SLMEncoder,
    SLMRevision,
    Token,
    check_reachable,
    dtype_name,
    hub_arguments,
    quiet,
)

if TYPE_CHECKING:
    from ..estimate import Estimate

NAMES = {"llm": "LLM", "slm": "SLM alone", "hybrid": "hybrid"}


def estimate(
    models: Models,
    prompt_length: Annotated[int, Option(metavar="N", min=1, help="Tokens of each prompt.", show_default=False)],
    output_length: Annotated[int, Option(metavar="N", min=1, help="Tokens of each response.", show_default=False)],
    batch: Annotated[int, Option(metavar="N", min=1, help="Prompts at a time.")] = 1,
    beams: Annotated[int, Option(metavar="N", min=1, help="Beams; 1 is greedy.")] = 1,
    slm_layers: Annotated[
        str | None,
        Option(metavar="N|LIST", help="An SLM cut from the LLM: so many of its layers, or these, as in 0,5,11."),
    ] = None,
    llm_layer: LLMLayer = None,
    slm_encoder: SLMEncoder = None,
    fusion: Fusion = None,
    llm_dtype: Annotated[
        str | None, Option(metavar="TYPE", help="float32, bfloat16 or float16; else as its configuration says.")
    ] = None,
    slm_dtype: Annotated[str | None, Option(metavar="TYPE", help="The same for SLM and projector.")] = None,
    seconds: Annotated[float, Option(metavar="X", min=0.1, help="How long to measure, about.")] = 10.0,
    as_json: Annotated[bool, Option("--json", help="Print JSON, for programs.")] = False,
    llm_revision: LLMRevision = None,
    slm_revision: SLMRevision = None,
    token: Token = None,
    cache_dir: CacheDir = None,
    local_files_only: LocalFilesOnly = False,
) -> None:
    """Tell before any training how fast a hybrid would be beside its LLM on this machine, and what memory it takes."""
    from ..estimate import estimate
    from ..loading import load_config

    if len(models) > 2:
        raise ValueError(f"`estimate` takes an LLM and an SLM, got {len(models)} names.")
    if (len(models) == 2) == (slm_layers is not None):
        raise ValueError("Name an SLM after the LLM, or cut one from the LLM with `--slm-layers`, and not both.")
    quiet()
    hub = hub_arguments(token=token, cache_dir=cache_dir, local_files_only=local_files_only)
    configs = []
    for part, name, revision in zip(("llm", "slm"), models, (llm_revision, slm_revision), strict=False):
        place = hub_arguments(revision=revision, **hub)
        check_reachable(name, **place)
        configs.append(load_config(name, place, part))
    found = estimate(
        *configs,
        prompt_length=prompt_length,
        output_length=output_length,
        batch_size=batch,
        num_beams=beams,
        slm_layers=integers("slm-layers", slm_layers),
        llm_layer=integers("llm-layer", llm_layer),
        slm_encoder=slm_encoder,
        fusion=fusion,
        llm_dtype=dtype_name("llm-dtype", llm_dtype),
        slm_dtype=dtype_name("slm-dtype", slm_dtype),
        seconds=seconds,
    )
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(found), indent=2))
    else:
        show_estimate(found, Console())


def show_estimate(found: Estimate, console: Console) -> None:
    """Print an estimate, fit for 80 columns."""
    from .info import format_bytes

    work = found.workload
    title = (
        f"prompts of {work.prompt_length:,} tokens, responses of {work.output_length:,}, batch {work.batch_size:,}, "
    )
    table = Table(
        Column("milliseconds"),
        *(Column(name, justify="right") for name in NAMES.values()),
        title=title + ("greedy" if work.num_beams == 1 else f"{work.num_beams} beams"),
        title_justify="left",
        box=box.SIMPLE_HEAD,
    )
    rows = {
        "read the prompts": "encode_seconds",
        "project": "project_seconds",
        "first token": "first_token_seconds",
        "each further token": "further_token_seconds",
        "all tokens": "total_seconds",
    }
    speed = [found.speed[name] for name in NAMES]
    memory = [found.memory[name] for name in NAMES]
    for row, field in rows.items():
        table.add_row(row, *(f"{1000 * getattr(one, field):,.1f}" for one in speed))
    table.add_section()
    table.add_row("tokens a second", *(f"{one.tokens_per_second:,.1f}" for one in speed))
    table.add_row("times the LLM", *(f"{one.times_llm:.2f}" for one in speed), style="bold")
    table.add_section()
    sizes = {"LLM": "llm_bytes", "projector": "projector_bytes", "SLM": "slm_bytes", "keys and values": "cache_bytes"}
    for row, field in (sizes | {"memory": "total_bytes"}).items():
        table.add_row(row, *(format_bytes(getattr(one, field)) for one in memory))
    console.print(table)
    total, layers = found.llm_num_layers, found.llm_layer if isinstance(found.llm_layer, list) else [found.llm_layer]
    read = "takes keys and values of the LLM's layers" if found.fusion == "kv" else "reads the LLM at layer"
    if total is not None:
        layers = [layer % (total + 1) for layer in layers]
    console.print(
        f"{break_even_text(found)}\nThe hybrid {read} {', '.join(map(str, layers))} of {total}. "
        f"Its checkpoint takes {format_bytes(found.checkpoint_bytes)} on disk.\nLLM in {found.llm_dtype}, SLM in "
        f"{found.slm_dtype}; measured in {found.measuring_seconds:.1f} s with {found.threads} thread(s).",
        highlight=False,
    )


def break_even_text(found: Estimate) -> str:
    """Where the break-even lies, and what can be gained at most."""
    even = found.break_even
    if even.from_tokens is None:
        return f"The hybrid is faster for no response. {even.reason}"
    if even.to_tokens is not None:
        return f"The hybrid is faster for responses of up to {even.to_tokens:,} tokens. {even.reason}"
    where = "for every response" if even.from_tokens == 1 else f"for responses from {even.from_tokens:,} tokens on"
    return f"The hybrid is faster {where}, at most {even.most_gained:.2f} times, as they grow. {even.reason}"
