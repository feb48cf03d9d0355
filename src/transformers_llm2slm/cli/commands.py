"""The commands of `llm2slm`. What is slow to import is imported inside them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from typer import Argument, Option

from .arguments import integers
from .bench import bench
from .cache import cache
from .card import card
from .estimate import estimate
from .evaluate import evaluate
from .export import export
from .shared import (
    LOADING,
    CacheDir,
    Device,
    Dtype,
    Fusion,
    LLMDtype,
    LLMLayer,
    LLMNameOrPath,
    LLMRevision,
    LocalFilesOnly,
    MaxNewTokens,
    Model,
    Models,
    NumBeams,
    Revision,
    SLMEncoder,
    SLMRevision,
    Token,
    check_reachable,
    dtype_name,
    hub_arguments,
    load,
    quiet,
    read_rows,
)
from .train import train

PROJECTOR = "Projector"

app = typer.Typer(
    help="LLM-to-SLM: a frozen large model reads the prompt once, a small model writes the answer.",
    epilog="Compose a model, train it, evaluate it, generate with it. llm2slm COMMAND --help tells more.",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def llm2slm(
    context: typer.Context,
    version: Annotated[bool, Option("--version", help="Show the version and exit.")] = False,
    debug: Annotated[bool, Option("--debug", help="Show the traceback of an error.")] = False,  # see `cli.main`
) -> None:
    if version:
        from .. import __version__

        typer.echo(f"llm2slm {__version__}")
        raise typer.Exit()
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command()
def compose(
    models: Models,
    out: Annotated[Path, Argument(metavar="OUT", help="Folder for the model and its processor.", show_default=False)],
    slm_layers: Annotated[
        str | None,
        Option(metavar="N|LIST", help="Cut the SLM from the LLM: so many of its layers, or these, as in 0,5,11."),
    ] = None,
    fusion: Fusion = None,
    llm_layer: LLMLayer = None,
    slm_encoder: SLMEncoder = None,
    projector_init: Annotated[
        str | None, Option(metavar="NAME", rich_help_panel=PROJECTOR, help="random, zero, identity or fit.")
    ] = None,
    projector_hidden_size: Annotated[
        int | None, Option(metavar="N", rich_help_panel=PROJECTOR, help="Width of the projector's hidden layers.")
    ] = None,
    projector_num_layers: Annotated[
        int | None, Option(metavar="N", rich_help_panel=PROJECTOR, help="Number of its linear layers.")
    ] = None,
    projector_activation: Annotated[
        str | None,
        Option(metavar="NAME", rich_help_panel=PROJECTOR, help="Its activation, such as relu, gelu or silu."),
    ] = None,
    projector_norm: Annotated[
        str | None,
        Option(
            metavar="NAME", rich_help_panel=PROJECTOR, help="none, layer_norm or rms_norm, before its first layer."
        ),
    ] = None,
    fit_file: Annotated[
        Path | None,
        Option(
            metavar="FILE",
            rich_help_panel=PROJECTOR,
            help="Prompts for --projector-init fit: JSON lines, CSV or Parquet.",
        ),
    ] = None,
    fit_column: Annotated[str, Option(metavar="NAME", rich_help_panel=PROJECTOR, help="Their column.")] = "prompt",
    fit_rows: Annotated[
        int, Option(metavar="N", rich_help_panel=PROJECTOR, min=1, help="How many of them to take.")
    ] = 300,
    fit_target: Annotated[
        str,
        Option(
            metavar="N|NAME",
            rich_help_panel=PROJECTOR,
            help="embeddings, or the index of a hidden layer of the SLM.",
        ),
    ] = "embeddings",
    llm_dtype: Annotated[
        str | None,
        Option(metavar="TYPE", rich_help_panel=LOADING, help="float32, bfloat16 or float16; else as stored."),
    ] = None,
    slm_dtype: Annotated[
        str | None, Option(metavar="TYPE", rich_help_panel=LOADING, help="The same for SLM and projector.")
    ] = None,
    llm_revision: LLMRevision = None,
    slm_revision: SLMRevision = None,
    save_llm: Annotated[
        bool, Option("--save-llm", help="Save the LLM too, for a checkpoint that needs nothing else.")
    ] = False,
    overwrite: Annotated[bool, Option("--overwrite", help="Write over a checkpoint in OUT.")] = False,
    token: Token = None,
    cache_dir: CacheDir = None,
    local_files_only: LocalFilesOnly = False,
) -> None:
    """Compose a model of a frozen LLM and an SLM, and save it. Its projector wants training."""
    if len(models) > 2:
        raise ValueError(f"`compose` takes an LLM, an SLM and a folder, got {len(models) + 1} names.")
    llm, slm = models[0], models[1] if len(models) == 2 else None
    if slm is None and slm_layers is None:
        raise ValueError("Name an SLM between LLM and OUT, or cut one from the LLM with `--slm-layers`.")
    if (out / "config.json").exists() and not overwrite:
        raise ValueError(f"{str(out)!r} holds a checkpoint already: choose another folder, or add `--overwrite`.")
    if (fit_file is None) == (projector_init == "fit"):
        raise ValueError("`--projector-init fit` and `--fit-file` go together.")
    prompts = None
    if fit_file is not None:
        prompts = read_rows(fit_file, prompt_column=fit_column, completion_column=None, max_rows=fit_rows)["prompt"][:]
    fit = {
        "fit_prompts": prompts,
        "fit_target": fit_target if fit_target == "embeddings" else integers("fit-target", fit_target),
    }
    hub = hub_arguments(token=token, cache_dir=cache_dir, local_files_only=local_files_only)
    revisions = {"llm_revision": llm_revision, "slm_revision": slm_revision if slm else None}
    for name, revision in ((llm, llm_revision), (slm, slm_revision)):
        if name is not None:
            check_reachable(name, **hub_arguments(revision=revision, **hub))
    hub |= {name: value for name, value in revisions.items() if value is not None}
    options = {
        "slm_layers": integers("slm-layers", slm_layers),
        "fusion": fusion,
        "llm_layer": integers("llm-layer", llm_layer),
        "slm_encoder": slm_encoder,
        "projector_init": projector_init,
        "projector_hidden_size": projector_hidden_size,
        "projector_num_layers": projector_num_layers,
        "projector_activation": projector_activation,
        "projector_norm": projector_norm,
        "llm_dtype": dtype_name("llm-dtype", llm_dtype),
        "slm_dtype": dtype_name("slm-dtype", slm_dtype),
    }
    options = {name: value for name, value in (options | fit).items() if value is not None}

    from ..modeling_llm2slm import LLM2SLMForConditionalGeneration
    from ..processing_llm2slm import LLM2SLMProcessor
    from .info import checkpoint_info, show_info

    quiet()
    model = LLM2SLMForConditionalGeneration.from_llm_slm_pretrained(llm, slm, **options, **hub)
    choices = {"fusion": model.config.fusion, "slm_encoder": model.config.slm_encoder}
    processor = LLM2SLMProcessor.from_llm_slm_pretrained(llm, slm, **choices, **hub)
    model.save_pretrained(out, save_llm=save_llm)
    processor.save_pretrained(out)
    show_info(checkpoint_info(str(out)), Console())


@app.command()
def info(
    model: Model,
    as_json: Annotated[bool, Option("--json", help="Print JSON, for programs.")] = False,
    revision: Revision = None,
    token: Token = None,
    cache_dir: CacheDir = None,
    local_files_only: LocalFilesOnly = False,
) -> None:
    """Tell what a checkpoint is made of, without loading it."""
    from .info import checkpoint_info, show_info

    quiet()
    hub = hub_arguments(revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only)
    told = checkpoint_info(model, **hub)
    if as_json:
        typer.echo(json.dumps(told, indent=2))
    else:
        show_info(told, Console())


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str, Argument(metavar="PROMPT", help="The prompt; - reads it from stdin.", show_default=False)],
    max_new_tokens: MaxNewTokens = 256,
    num_beams: NumBeams = 1,
    do_sample: Annotated[bool, Option("--do-sample", help="Sample, in place of the likeliest token.")] = False,
    temperature: Annotated[float | None, Option(metavar="X", help="Of sampling, which it implies.")] = None,
    top_p: Annotated[float | None, Option(metavar="X", help="Of sampling, which it implies.")] = None,
    seed: Annotated[int | None, Option(metavar="N", help="Makes sampling repeatable.")] = None,
    llm_name_or_path: LLMNameOrPath = None,
    llm_dtype: LLMDtype = None,
    dtype: Dtype = None,
    device: Device = None,
    revision: Revision = None,
    token: Token = None,
    cache_dir: CacheDir = None,
    local_files_only: LocalFilesOnly = False,
) -> None:
    """Answer a prompt. The answer is shown as it is written, unless beams are searched."""
    text = sys.stdin.read().rstrip("\n") if prompt == "-" else prompt
    if not text.strip():
        raise ValueError("The prompt is empty: the LLM needs text to read.")
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "num_beams": num_beams}
    sampling = {name: value for name, value in (("temperature", temperature), ("top_p", top_p)) if value is not None}
    options |= {"do_sample": True} | sampling if do_sample or sampling else {"do_sample": False}

    from transformers import TextStreamer, set_seed

    quiet()
    hub = hub_arguments(revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only)
    loaded, processor = load(model, llm_name_or_path, llm_dtype, dtype, device, hub)
    inputs = processor(text=[text], return_tensors="pt").to(loaded.device)
    if seed is not None:
        set_seed(seed)
    if num_beams == 1:
        # What stands before the first new token is the SLM's start token, or nothing.
        streamer = TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        loaded.generate(**inputs, **options, streamer=streamer)
    else:
        typer.echo(processor.batch_decode(loaded.generate(**inputs, **options), skip_special_tokens=True)[0])


app.command()(cache)
app.command()(train)
app.command()(evaluate)
app.command()(card)
app.command()(export)
app.command()(bench)
app.command()(estimate)
