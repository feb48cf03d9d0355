"""The commands of `llm2slm`. What is slow to import is imported inside them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Column, Table
from typer import Argument, Option

if TYPE_CHECKING:
    from .modeling_llm2slm import LLM2SLMForConditionalGeneration
    from .processing_llm2slm import LLM2SLMProcessor

app = typer.Typer(
    help="LLM-to-SLM: a frozen large model reads the prompt once, a small model writes the answer.",
    epilog="llm2slm COMMAND --help tells more. Compose a model, train it, evaluate it, generate with it.",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

# Options that several commands take ---------------------------------------------------------------------------------
Model = Annotated[str, Argument(metavar="DIR", help="Checkpoint: a local folder or a hub id.", show_default=False)]
Token = Annotated[str | None, Option(help="Hub token, where the one of `hf auth login` will not do.")]
CacheDir = Annotated[Path | None, Option(help="Where downloads are kept.")]
LocalFilesOnly = Annotated[bool, Option("--local-files-only", help="Download nothing.")]
Revision = Annotated[str | None, Option(help="Branch, tag or commit of the checkpoint.")]
LLMNameOrPath = Annotated[str | None, Option(help="Another place to load the same LLM from, such as a local copy.")]
LLMDtype = Annotated[str | None, Option(help="float32, bfloat16 or float16; by default as the checkpoint says.")]
Dtype = Annotated[str | None, Option(help="The same for projector and SLM; by default as stored.")]
Device = Annotated[str | None, Option(help="Such as cpu or cuda:1; by default an accelerator if there is one.")]
MaxNewTokens = Annotated[int, Option(min=1, help="Longest response in SLM tokens.")]
NumBeams = Annotated[int, Option(min=1, help="Beams; 1 is greedy.")]
Dataset = Annotated[str | None, Option(help="Data set of the hub, in place of a file.")]
DatasetConfig = Annotated[str | None, Option(help="Its configuration.")]
PromptColumn = Annotated[str, Option(help="Column of the prompts; a.b for b inside of a.")]
CompletionColumn = Annotated[str, Option(help="Column of the responses to learn or to compare with.")]
MaxPromptLength = Annotated[int | None, Option(min=1, help="Cut prompts to so many LLM tokens.")]


@app.callback(invoke_without_command=True)
def llm2slm(
    context: typer.Context,
    version: Annotated[bool, Option("--version", help="Show the version and exit.")] = False,
    debug: Annotated[bool, Option("--debug", help="Show the traceback of an error.")] = False,  # see `cli.main`
) -> None:
    if version:
        from . import __version__

        typer.echo(f"llm2slm {__version__}")
        raise typer.Exit()
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command()
def compose(
    models: Annotated[
        list[str],
        Argument(metavar="LLM [SLM]", help="Hub ids or local folders; no SLM with --slm-layers.", show_default=False),
    ],
    out: Annotated[Path, Argument(metavar="OUT", help="Folder for the model and its processor.", show_default=False)],
    slm_layers: Annotated[
        str | None, Option(help="Cut the SLM from the LLM: a number of layers, or their indices as in 0,5,11.")
    ] = None,
    fusion: Annotated[
        str | None, Option(help="add, align, replace or llm-embed; by default by the tokenizers.")
    ] = None,
    llm_layer: Annotated[
        str | None, Option(help="Hidden layer of the LLM to read; several, as in 4,8,-1, mix.")
    ] = None,
    slm_encoder: Annotated[str | None, Option(help="keep or skip, for an encoder-decoder SLM.")] = None,
    projector_init: Annotated[str | None, Option(help="random, zero, identity or fit.")] = None,
    projector_hidden_size: Annotated[int | None, Option(help="Width of the projector's hidden layers.")] = None,
    projector_num_layers: Annotated[int | None, Option(help="Number of its linear layers.")] = None,
    projector_activation: Annotated[str | None, Option(help="Its activation, such as relu, gelu or silu.")] = None,
    projector_norm: Annotated[str | None, Option(help="none, layer_norm or rms_norm, before its first layer.")] = None,
    fit_file: Annotated[
        Path | None, Option(help="Prompts for --projector-init fit: JSON lines, CSV or Parquet.")
    ] = None,
    fit_column: Annotated[str, Option(help="Their column.")] = "prompt",
    fit_rows: Annotated[int, Option(min=1, help="How many of them to take.")] = 300,
    fit_target: Annotated[str, Option(help="embeddings, or the index of a hidden layer of the SLM.")] = "embeddings",
    llm_dtype: Annotated[str | None, Option(help="float32, bfloat16 or float16; by default as stored.")] = None,
    slm_dtype: Annotated[str | None, Option(help="The same for SLM and projector.")] = None,
    llm_revision: Annotated[str | None, Option(help="Branch, tag or commit of the LLM.")] = None,
    slm_revision: Annotated[str | None, Option(help="Branch, tag or commit of the SLM.")] = None,
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
        from .cli_data import load_rows

        prompts = load_rows(fit_file, prompt_column=fit_column, completion_column=None, max_rows=fit_rows)["prompt"][:]
    fit = {
        "fit_prompts": prompts,
        "fit_target": fit_target if fit_target == "embeddings" else integers("fit-target", fit_target),
    }
    hub = hub_arguments(token=token, cache_dir=cache_dir, local_files_only=local_files_only)
    revisions = {"llm_revision": llm_revision, "slm_revision": slm_revision if slm else None}
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

    from .cli_info import checkpoint_info, show_info
    from .modeling_llm2slm import LLM2SLMForConditionalGeneration
    from .processing_llm2slm import LLM2SLMProcessor

    quiet()
    model = LLM2SLMForConditionalGeneration.from_llm_slm_pretrained(llm, slm, **options, **hub)
    processor = LLM2SLMProcessor.from_llm_slm_pretrained(llm, slm, fusion=model.config.fusion, **hub)
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
    from .cli_info import checkpoint_info, show_info

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
    temperature: Annotated[float | None, Option(help="Of sampling, which it implies.")] = None,
    top_p: Annotated[float | None, Option(help="Of sampling, which it implies.")] = None,
    seed: Annotated[int | None, Option(help="Makes sampling repeatable.")] = None,
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


@app.command()
def train(
    model: Model,
    output_dir: Annotated[
        Path, Option(help="Folder for checkpoints, results and the trained model.", show_default=False)
    ],
    train_file: Annotated[Path | None, Option(help="JSON lines (also .gz), CSV or Parquet.")] = None,
    validation_file: Annotated[Path | None, Option(help="The same, to evaluate on.")] = None,
    dataset: Dataset = None,
    dataset_config: DatasetConfig = None,
    split: Annotated[str, Option(help="Its split to train on; slices, as in train[:1000], are taken.")] = "train",
    validation_split: Annotated[str | None, Option(help="Its split to evaluate on.")] = None,
    prompt_column: PromptColumn = "prompt",
    completion_column: CompletionColumn = "completion",
    max_prompt_length: MaxPromptLength = None,
    max_response_length: Annotated[int | None, Option(min=1, help="Cut responses to so many SLM tokens.")] = None,
    learning_rate: Annotated[float, Option(help="Highest learning rate.")] = 1e-4,
    num_train_epochs: Annotated[float, Option(help="Times to go over the rows.")] = 1.0,
    max_steps: Annotated[int | None, Option(min=1, help="Steps to train, in place of epochs.")] = None,
    per_device_train_batch_size: Annotated[int, Option(min=1, help="Rows at a time on each device.")] = 8,
    gradient_accumulation_steps: Annotated[int, Option(min=1, help="Batches to a step.")] = 1,
    gradient_checkpointing: Annotated[
        bool, Option("--gradient-checkpointing", help="Compute again in place of keeping: less memory, slower.")
    ] = False,
    bf16: Annotated[
        bool | None, Option("--bf16/--no-bf16", help="Mixed precision; by default where a GPU has it.")
    ] = None,
    logging_steps: Annotated[int, Option(min=1, help="Steps between losses shown.")] = 50,
    save_steps: Annotated[int, Option(min=1, help="Steps between checkpoints.")] = 500,
    eval_steps: Annotated[int | None, Option(min=1, help="Steps between evaluations; by default at the end.")] = None,
    seed: Annotated[int, Option(help="Of the order of rows and of dropout.")] = 42,
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
    from .evaluation import require_extra

    require_extra("train", "accelerate", "datasets")

    from transformers.utils import is_torch_bf16_gpu_available

    from .cli_data import load_rows
    from .cli_train import checkpoint_to_resume, training_arguments
    from .cli_train import train as run

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
        gradient_checkpointing=gradient_checkpointing,
        bf16=is_torch_bf16_gpu_available() if bf16 is None else bf16,
        logging_steps=logging_steps,
        save_steps=save_steps,
        eval_steps=eval_steps,
        seed=seed,
    )
    hub = hub_arguments(revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only)
    source = {"dataset": dataset, "dataset_config": dataset_config, "token": token, "cache_dir": cache_dir}
    columns = {"prompt_column": prompt_column, "completion_column": completion_column}
    rows = load_rows(train_file, split=split, **source, **columns)
    validation_rows = None
    if validation_file is not None:
        validation_rows = load_rows(validation_file, **columns)
    elif validation_split is not None:
        validation_rows = load_rows(split=validation_split, **source, **columns)
    loaded, processor = load(model, llm_name_or_path, llm_dtype, dtype, "cpu", hub)  # the trainer chooses the device
    metrics = run(
        loaded, processor, arguments, rows, validation_rows, max_prompt_length, max_response_length, resume_from=last
    )
    show_numbers(
        "trained",
        {"rows": len(rows)} | {name: metrics[name] for name in ("train_loss", "eval_loss") if name in metrics},
    )
    typer.echo(f"Saved in {output_dir}.")


@app.command()
def evaluate(
    model: Model,
    file: Annotated[Path | None, Option(help="JSON lines (also .gz), CSV or Parquet.")] = None,
    dataset: Dataset = None,
    dataset_config: DatasetConfig = None,
    split: Annotated[str, Option(help="Its split.")] = "test",
    prompt_column: PromptColumn = "prompt",
    completion_column: CompletionColumn = "completion",
    max_rows: Annotated[int | None, Option(min=1, help="Only the first rows.")] = None,
    batch_size: Annotated[int, Option(min=1, help="Prompts at a time.")] = 8,
    max_new_tokens: MaxNewTokens = 128,
    num_beams: NumBeams = 1,
    max_prompt_length: MaxPromptLength = None,
    output: Annotated[Path | None, Option(help="Write the results here, as JSON.")] = None,
    predictions: Annotated[
        Path | None, Option(help="Write prompts, completions and predictions here, as JSON lines.")
    ] = None,
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
    from .cli_data import load_rows
    from .evaluation import generate_texts, require_extra, text_scores

    require_extra("eval", "rouge_score", "sacrebleu")
    rows = load_rows(
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
    prompts, completions = list(rows["prompt"]), list(rows["completion"])
    quiet()
    hub = hub_arguments(revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only)
    loaded, processor = load(model, llm_name_or_path, llm_dtype, dtype, device, hub)
    generation = {"max_new_tokens": max_new_tokens, "num_beams": num_beams, "do_sample": False}
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
    if output is not None:
        settings = {"model": model, "data": str(file or dataset), "batch_size": batch_size, **generation}
        write(output, json.dumps(scores | speed | settings, indent=2))
    if predictions is not None:
        lines = zip(prompts, completions, generated.texts, strict=True)
        names = ("prompt", "completion", "prediction")
        write(
            predictions, "\n".join(json.dumps(dict(zip(names, row, strict=True)), ensure_ascii=False) for row in lines)
        )


# What the commands share ---------------------------------------------------------------------------------------------
def integers(option: str, text: str | None) -> int | list[int] | None:
    """`4` is a number, `4,8` and `4,` are lists. Raises a `ValueError` that names the option."""
    if text is None:
        return None
    try:
        numbers = [int(number) for number in text.split(",") if number.strip()]
    except ValueError:
        numbers = []
    if not numbers:
        raise ValueError(f"`--{option}` takes a number or a list of them, such as 4 or 0,5,11, got {text!r}.")
    return numbers if "," in text else numbers[0]


def dtype_name(option: str, dtype: str | None) -> str | None:
    """The dtype as given. Raises a `ValueError` for what a model can't be loaded in."""
    names = ("float32", "bfloat16", "float16", "auto")
    if dtype is not None and dtype not in names:
        raise ValueError(f"`--{option}` must be one of {', '.join(names)}, got {dtype!r}.")
    return dtype


def hub_arguments(**arguments: Any) -> dict[str, Any]:
    """Arguments of every loader, without those that are not given."""
    return {name: value for name, value in arguments.items() if value}


def load(
    model: str,
    llm_name_or_path: str | None,
    llm_dtype: str | None,
    dtype: str | None,
    device: str | None,
    hub: dict[str, Any],
) -> tuple[LLM2SLMForConditionalGeneration, LLM2SLMProcessor]:
    """The model on its device, and its processor."""
    import torch

    from .modeling_llm2slm import LLM2SLMForConditionalGeneration
    from .processing_llm2slm import LLM2SLMProcessor

    options = {
        "llm_name_or_path": llm_name_or_path,
        "llm_dtype": dtype_name("llm-dtype", llm_dtype),
        "dtype": dtype_name("dtype", dtype),
    }
    options = {name: value for name, value in options.items() if value is not None}
    processor = LLM2SLMProcessor.from_pretrained(model, **hub)
    loaded = LLM2SLMForConditionalGeneration.from_pretrained(model, **options, **hub)
    if device is None:
        device = str(torch.accelerator.current_accelerator()) if torch.accelerator.is_available() else "cpu"
    return loaded.to(device), processor


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


def write(file: Path, text: str) -> None:
    """Write a text file, and the folder that it is in."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"{text}\n", encoding="utf-8")
