#!/usr/bin/env python3
"""Compose, train, measure, save and load an LLM-to-SLM model, on two CPU cores in about ten minutes: `make demo`.

    python examples/demo.py
    python examples/demo.py --slm_layers 6 --max_steps 100
    python examples/demo.py --llm Qwen/Qwen3-0.6B --dataset org/rows --prompt_column question --completion_column answer

The LLM reads the description of a software package; the SLM, cut from the LLM's upper layers, writes its one-line
synopsis. Beside it stand the LLM itself, untrained, and the same SLM trained in the same way without the LLM.
"""

import copy
import datetime
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, load_dataset
from prepare_models import prepare
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    HfArgumentParser,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    set_seed,
)
from transformers.utils import logging

from transformers_llm2slm import (
    LLM2SLMDataCollator,
    LLM2SLMForConditionalGeneration,
    LLM2SLMProcessor,
    fit_slm_embeddings,
)
from transformers_llm2slm.evaluation import text_scores
from transformers_llm2slm.measurements import (
    QUALITY,
    SPEED,
    TRAINING,
    Record,
    machine,
    shareable_command,
    versions,
    write_record,
)
from transformers_llm2slm.model_card import write_model_card
from transformers_llm2slm.speed import THIS_MODEL, measure_speed, seconds_of, times_in_rounds

PROJECT = Path(__file__).resolve().parent.parent
DEFAULT_DATA = "descriptions and synopses of Debian packages (examples/data of the library)"
DEFAULT_LLM, DEFAULT_LLM_HUB_ID = "smollm2-135m-instruct", "HuggingFaceTB/SmolLM2-135M-Instruct"
LLM, SLM, HYBRID, WORDS = "LLM, zero-shot", "SLM alone", "LLM-to-SLM", "first 8 words"
console = Console(width=120)

# From prompts, and arguments of `generate`, to texts.
Writer = Callable[..., list[str]]
Figures = dict[str, dict[str, Any]]


@dataclass
class DemoArguments:
    """What can be chosen on the command line."""

    llm: str | None = field(default=None, metadata={"help": f"LLM, hub id or folder; default: {DEFAULT_LLM_HUB_ID}"})
    slm: str | None = field(default=None, metadata={"help": "SLM, hub id or folder; default: cut from the LLM"})
    slm_layers: int = field(default=12, metadata={"help": "how many upper layers of the LLM to cut, without --slm"})
    dataset: str | None = field(default=None, metadata={"help": "hub dataset or file; default: examples/data"})
    prompt_column: str = field(default="prompt", metadata={"help": "column of the texts to read"})
    completion_column: str = field(default="completion", metadata={"help": "column of the texts to write"})
    prompt_suffix: str = field(default="\nSynopsis:", metadata={"help": "what every prompt ends with"})
    instruction: str = field(
        default="Describe this software package in one line of at most eight words.",
        metadata={"help": "what the untrained LLM is told to do with a prompt"},
    )
    max_prompt_length: int = field(default=80, metadata={"help": "tokens of a prompt, suffix not counted"})
    max_new_tokens: int = field(default=24, metadata={"help": "tokens of a response"})
    max_steps: int = field(default=160, metadata={"help": "training steps of each model"})
    train_minutes: float = field(default=3.0, metadata={"help": "fewer steps if the hybrid's would take longer"})
    train_batch_size: int = field(default=16, metadata={"help": "rows in a step"})
    learning_rate: float = field(default=1e-3, metadata={"help": "peak of AdamW's learning rate"})
    fit_rows: int = field(default=500, metadata={"help": "rows that the SLM's embeddings are fitted on"})
    eval_rows: int = field(default=120, metadata={"help": "held-out rows to measure quality on"})
    timing_rounds: int = field(default=5, metadata={"help": "rounds of the speed measurement"})
    timing_tokens: int = field(default=64, metadata={"help": "tokens that each model writes in a round"})
    output_dir: Path = field(default=PROJECT / "demo_output", metadata={"help": "folder for everything made"})
    seed: int = field(default=42, metadata={"help": "of the order of the rows"})


# Data --------------------------------------------------------------------------------------------------------------------
def load_rows(arguments: DemoArguments, tokenizer: PreTrainedTokenizerBase) -> list[Dataset]:
    """Training and held-out rows, with `prompt`, `completion` and the prompt's `length` in tokens."""
    source = arguments.dataset
    if source is None:
        file = str(PROJECT / "examples" / "data" / "synopsis-{}.jsonl.gz")
        splits = load_dataset("json", data_files={name: file.format(name) for name in ("train", "validation")})
    elif Path(source).is_file():
        kinds = {".csv": "csv", ".parquet": "parquet"}
        splits = load_dataset(kinds.get(Path(source.removesuffix(".gz")).suffix, "json"), data_files=source)
    else:
        splits = load_dataset(source)
    held_out = next((name for name in ("validation", "test") if name in splits), None)
    if held_out is None:
        splits, held_out = splits["train"].train_test_split(arguments.eval_rows, seed=arguments.seed), "test"

    def to_row(row: Mapping[str, str]) -> dict[str, Any]:
        # The prompt is cut, never the suffix: the response goes on from its states.
        cut = tokenizer(row[arguments.prompt_column], truncation=True, max_length=arguments.max_prompt_length)
        prompt = tokenizer.decode(cut["input_ids"], skip_special_tokens=True) + arguments.prompt_suffix
        return {"prompt": prompt, "completion": row[arguments.completion_column], "length": len(cut["input_ids"])}

    rows = [splits["train"], splits[held_out].select(range(min(arguments.eval_rows, len(splits[held_out]))))]
    return [part.map(to_row, remove_columns=part.column_names, desc="Reading rows") for part in rows]


class SLMAloneCollator:
    """Rows to a batch for an SLM without an LLM: it reads the prompt itself, and is scored on the completion."""

    def __init__(self, processor: LLM2SLMProcessor, max_response_length: int):
        self.processor, self.max_response_length = processor, max_response_length

    def prompts(self, texts: Sequence[str]) -> dict[str, torch.Tensor]:
        """A batch of prompts, padded on the left for a decoder-only SLM."""
        side = "right" if self.processor.slm_is_encoder_decoder else "left"
        batch = self.processor.tokenizer(list(texts), padding=True, padding_side=side, return_tensors="pt")
        return {name: batch[name] for name in ("input_ids", "attention_mask")}

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = self.prompts([row["prompt"] for row in rows])
        texts, length = [row["completion"] for row in rows], self.max_response_length
        cut = {"truncation": True, "max_target_length": length}
        labels = self.processor(text_target=texts, padding=True, return_tensors="pt", **cut)["labels"]
        if self.processor.slm_is_encoder_decoder:
            return batch | {"labels": labels}
        scored = labels != -100
        response = labels.masked_fill(~scored, self.processor.tokenizer.pad_token_id)
        mask = torch.cat([batch["attention_mask"], scored.long()], dim=1)
        return {
            "input_ids": torch.cat([batch["input_ids"], response], dim=1),
            "attention_mask": mask,
            "position_ids": (mask.cumsum(dim=1) - 1).clamp(min=0),
            # The model shifts labels itself, so they begin with the prompt's last token, and so do the logits.
            "labels": torch.cat([torch.full_like(labels[:, :1], -100), labels], dim=1),
            "logits_to_keep": labels.shape[1] + 1,
        }


# Models ------------------------------------------------------------------------------------------------------------------
def fast_dtype() -> torch.dtype:
    """bfloat16 if this machine multiplies matrices clearly faster in it than in float32, else float32."""
    matrices = {str(dtype): torch.ones(1024, 1024, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)}
    products = {name: {"product": lambda m=m: m @ m} for name, m in matrices.items()}
    # By the fastest, as other programs may take the processor for a while.
    single, half = (min(times["product"]) for times in times_in_rounds(products, rounds=10).values())
    return torch.bfloat16 if half < 0.8 * single else torch.float32


def compose(
    llm: PreTrainedModel, arguments: DemoArguments, processor: LLM2SLMProcessor, prompts: Sequence[str] = ()
) -> LLM2SLMForConditionalGeneration:
    """The hybrid before training, with projector and SLM in float32, whatever the LLM is in. `prompts` are to fit it on."""
    slm = {"slm_layers": arguments.slm_layers} if arguments.slm is None else {"slm": arguments.slm}
    model = LLM2SLMForConditionalGeneration.from_llm_slm_pretrained(
        llm, **slm, fusion=processor.fusion, processor=processor
    )
    model.projector.float()
    model.slm.float()
    if arguments.slm is None and not llm.config.is_encoder_decoder:
        if prompts:
            fit_slm_embeddings(model, processor, prompts)
        # Most of the SLM's parameters are in its vocabulary. A few thousand rows train the layers better without them.
        for vocabulary in (model.slm.get_input_embeddings(), model.slm.get_output_embeddings()):
            vocabulary.requires_grad_(False)
    return model


def steps_in_time(model: nn.Module, collator: Callable, rows: Dataset, arguments: DemoArguments, bf16: bool) -> int:
    """`max_steps`, or as many as take `train_minutes`, going by a step without an update on rows of middling length."""
    order = sorted(range(len(rows)), key=rows["length"].__getitem__)
    batch = collator(rows.select(order[len(order) // 2 :][: arguments.train_batch_size]).to_list())
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        seconds = seconds_of(lambda: model(**batch).loss.backward(), repeats=3)
    model.zero_grad()
    return max(1, min(arguments.max_steps, int(60 * arguments.train_minutes / seconds)))


def train(
    model: PreTrainedModel, collator: Callable, rows: Dataset, arguments: DemoArguments, steps: int, bf16: bool
) -> PreTrainedModel:
    """Train with the plain `Seq2SeqTrainer`: the same rows, order, steps and learning rates for every model."""
    settings = Seq2SeqTrainingArguments(
        output_dir=str(arguments.output_dir),
        max_steps=steps,
        per_device_train_batch_size=arguments.train_batch_size,
        train_sampling_strategy="group_by_length",
        learning_rate=arguments.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, steps // 10),
        logging_steps=max(1, steps // 10),
        bf16=bf16,
        use_cpu=True,
        remove_unused_columns=False,
        save_strategy="no",
        report_to="none",
        seed=arguments.seed,
        data_seed=arguments.seed,
    )
    trainer = Seq2SeqTrainer(model, settings, train_dataset=rows, data_collator=collator)
    trainer.train()
    return trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False).eval()


# Quality and speed -------------------------------------------------------------------------------------------------------
def writers(
    llm: PreTrainedModel,
    slm: PreTrainedModel,
    hybrid: LLM2SLMForConditionalGeneration,
    processor: LLM2SLMProcessor,
    collator: SLMAloneCollator,
    instruction: str | None = None,
) -> dict[str, Writer]:
    """A function from prompts to texts for each contestant. The LLM is given the prompt in a chat if instructed."""

    def with_llm(prompts: Sequence[str], **kwargs: Any) -> list[str]:
        tokenizer = processor.llm_tokenizer
        if instruction and tokenizer.chat_template:
            chats = [[{"role": "user", "content": f"{instruction}\n\n{prompt}"}] for prompt in prompts]
            prompts = tokenizer.apply_chat_template(chats, add_generation_prompt=True, tokenize=False)
        batch = tokenizer(prompts, add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt")
        mask = batch["attention_mask"]
        sequences = llm.generate(batch["input_ids"], attention_mask=mask, **kwargs)[:, mask.shape[1] :]
        texts = tokenizer.batch_decode(sequences, skip_special_tokens=True)
        return [text.strip().partition("\n")[0] for text in texts]

    def with_slm(prompts: Sequence[str], **kwargs: Any) -> list[str]:
        batch = collator.prompts(prompts)
        start = 0 if processor.slm_is_encoder_decoder else batch["input_ids"].shape[1]
        return processor.batch_decode(slm.generate(**batch, **kwargs)[:, start:], skip_special_tokens=True)

    def with_hybrid(prompts: Sequence[str], **kwargs: Any) -> list[str]:
        batch = processor(text=prompts, padding=True, return_tensors="pt")
        return processor.batch_decode(hybrid.generate(**batch, **kwargs), skip_special_tokens=True)

    return {LLM: with_llm, SLM: with_slm, HYBRID: with_hybrid}


def write_all(writer: Writer, prompts: Sequence[str], new_tokens: int, batch_size: int = 50) -> list[str]:
    """Greedy texts for all prompts, each on one line."""
    chunks = (prompts[start : start + batch_size] for start in range(0, len(prompts), batch_size))
    texts = (text for chunk in chunks for text in writer(chunk, max_new_tokens=new_tokens, do_sample=False))
    return [" ".join(text.split()) for text in texts]


def rouge(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """ROUGE F-measures in percent, with stemming."""
    scores = text_scores(predictions, references)
    return {f"ROUGE-{kind}": round(scores[f"rouge{kind}"], 2) for kind in ("1", "2", "L")}


@torch.no_grad()
def loss_per_token(model: PreTrainedModel, collator: Callable, rows: Dataset, batch_size: int = 20) -> float:
    """Cross entropy of the references, their end tokens included, by the SLM's tokens."""
    total, count = 0.0, 0
    for start in range(0, len(rows), batch_size):
        batch = collator(rows.select(range(start, min(start + batch_size, len(rows)))).to_list())
        scored = int((batch["labels"] != -100).sum())
        total, count = total + model(**batch).loss.item() * scored, count + scored
    return round(total / count, 3)


def write_exactly(writer: Writer, prompt: str, count: int) -> list[str]:
    """Greedy text of exactly `count` tokens."""
    return writer([prompt], min_new_tokens=count, max_new_tokens=count, do_sample=False)


# Saving, and loading elsewhere -------------------------------------------------------------------------------------------
LOAD_AND_WRITE = """
import json, sys
import transformers_llm2slm
from transformers import AutoModel, AutoProcessor, pipeline
task = json.load(sys.stdin)
model, processor = (auto.from_pretrained(task["checkpoint"]) for auto in (AutoModel, AutoProcessor))
batches = [processor(text=[prompt], return_tensors="pt") for prompt in task["prompts"]]
by_auto = [processor.decode(model.generate(**b, **task["generate"])[0], skip_special_tokens=True) for b in batches]
pipe = pipeline("text2text-generation", model=task["checkpoint"])
by_pipeline = [pipe(prompt, **task["generate"])[0]["generated_text"] for prompt in task["prompts"]]
print(json.dumps([by_auto, by_pipeline]))
"""


def check_checkpoint(checkpoint: Path, writer: Writer, prompts: Sequence[str], new_tokens: int) -> None:
    """Raise a `RuntimeError` if a new process, by `AutoModel` or `pipeline`, writes other texts than the model here."""
    generate = {"max_new_tokens": new_tokens, "do_sample": False}
    task = json.dumps({"checkpoint": str(checkpoint), "prompts": list(prompts), "generate": generate})
    process = subprocess.run([sys.executable, "-c", LOAD_AND_WRITE], input=task, capture_output=True, text=True)
    if process.returncode != 0:
        raise RuntimeError(f"The checkpoint can't be used in a new process:\n{process.stderr}")
    here = [writer([prompt], **generate)[0] for prompt in prompts]
    for road, there in zip(("AutoModel", "pipeline"), json.loads(process.stdout.splitlines()[-1]), strict=True):
        if there != here:
            raise RuntimeError(f"Loaded by {road} in a new process the model writes {there}, in this one {here}.")


# Showing -----------------------------------------------------------------------------------------------------------------
def show(title: str, rows: Figures) -> None:
    """Print a table: a row for each key, a column for each key of the inner mappings."""
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    texts = isinstance(next(iter(rows.values()))[columns[0]], str)
    table = Table("", *columns, title=title, title_justify="left", show_lines=texts)
    for name, row in rows.items():
        cells = (row.get(column, "-") for column in columns)
        table.add_row(name, *(f"{cell:.2f}" if isinstance(cell, float) else escape(str(cell)) for cell in cells))
    console.print(table)


def plot(path: Path, quality: Figures, speed: Figures, note: str) -> None:
    """Two panels of bars: ROUGE-L and tokens per second of the three contestants."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = [LLM, SLM, HYBRID]
    figure, axes = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
    panels = [(quality, "ROUGE-L", "Quality: ROUGE-L, held-out rows"), (speed, "tokens/s", "Speed: tokens per second")]
    for axis, (figures, key, title) in zip(axes, panels, strict=True):
        bars = axis.bar(
            names, [figures[name][key] for name in names], color=["#8a94a6", "#c3c9d4", "#2563eb"], width=0.6
        )
        axis.bar_label(bars, fmt="%.1f", padding=3)
        axis.set_title(title, fontsize=11, loc="left")
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(y=0.2)
    axes[0].axhline(quality[WORDS]["ROUGE-L"], color="#d97706", linestyle="--", linewidth=1.2, label=WORDS)
    axes[0].legend(frameon=False, loc="upper left")
    figure.supxlabel(note, fontsize=8, color="#555555")
    figure.savefig(path, dpi=150)


def card_records(results: Mapping[str, Any], prompt_tokens: int) -> list[Record]:
    """The results, of the hybrid and of what it is compared with, as records for its model card."""
    settings, quality = results["settings"], results["quality"]
    machine = results["machine"]
    by = {name: machine[name] for name in ("date", "versions")} | {"command": results["command"], "machine": machine}
    scores = {name: {key.replace("ROUGE-", "rouge"): x for key, x in row.items()} for name, row in quality.items()}
    speed = {THIS_MODEL if name == HYBRID else name: row for name, row in results["speed"].items()}
    source = settings["dataset"]
    training = {
        "steps": settings["steps"],
        "rows in a step": settings["train_batch_size"],
        "learning rate": settings["learning_rate"],
        "prompts": f"at most {settings['max_prompt_length']} tokens, then {settings['prompt_suffix']!r}",
        "bfloat16 autocast": settings["bf16 autocast"],
        "seed": settings["seed"],
    }
    conditions = {
        "prompt tokens": prompt_tokens,
        "new tokens": settings["timing_tokens"],
        "batch size": 1,
        "decoding": "greedy",
        "all models in": "bfloat16" if settings["bf16 autocast"] else "float32",
        "rounds, of which medians": settings["timing_rounds"],
    }
    return [
        {"kind": TRAINING, "data": {"name": source or DEFAULT_DATA}, "settings": training, **by},
        {
            "kind": QUALITY,
            "data": {"name": source or "synopsis-validation.jsonl.gz", "rows": settings["eval_rows"]},
            "metrics": scores.pop(HYBRID),
            "beside": scores,
            "note": "ROUGE in percent, with stemming. The LLM is untrained; the SLM alone is trained like this model, but "
            "without the LLM.",
            **by,
        },
        {"kind": SPEED, "settings": conditions, "figures": speed, **by},
    ]


def write_card(
    checkpoint: Path,
    hybrid: LLM2SLMForConditionalGeneration,
    arguments: DemoArguments,
    example: str,
    records: Sequence[Record] | None = None,
) -> Path:
    """The model card of the checkpoint; `records` default to those in its folder."""
    return write_model_card(
        checkpoint,
        hybrid,
        limits=["It was trained for minutes, to show how the library works."],
        example=example,
        base_model=DEFAULT_LLM_HUB_ID if arguments.llm is None and arguments.slm is None else None,
        records=records,
    )


# The demonstration -------------------------------------------------------------------------------------------------------
def main() -> None:
    """Run all of it."""
    (arguments,) = HfArgumentParser(DemoArguments, description=__doc__.splitlines()[0]).parse_args_into_dataclasses()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    set_seed(arguments.seed)
    output_dir: Path = arguments.output_dir
    output_dir.mkdir(parents=True, exist_ok=True)
    seconds: dict[str, float] = {}

    @contextmanager
    def phase(name: str) -> Iterator[None]:
        console.rule(f"[bold]{name}", align="left")
        start = time.perf_counter()
        yield
        seconds[name] = round(time.perf_counter() - start, 1)
        console.print(f"{name}: {seconds[name]:.0f} s")

    with phase("Models and data"):
        llm_path = arguments.llm or str(prepare(DEFAULT_LLM, PROJECT / "models"))
        dtype = fast_dtype()
        bf16 = dtype == torch.bfloat16
        llm = AutoModelForCausalLM.from_pretrained(llm_path, dtype=dtype).eval()
        processor = LLM2SLMProcessor.from_llm_slm_pretrained(
            llm_path, arguments.slm, fusion="replace" if arguments.slm is None else None
        )
        train_rows, eval_rows = load_rows(arguments, processor.llm_tokenizer)
        hybrid = compose(llm, arguments, processor, train_rows["prompt"][: arguments.fit_rows])
        slm = copy.deepcopy(hybrid.slm)
        collator = LLM2SLMDataCollator(processor, max_response_length=arguments.max_new_tokens)
        slm_collator = SLMAloneCollator(processor, arguments.max_new_tokens)
        console.print(f"{len(train_rows)} rows to train on, {len(eval_rows)} held out; the LLM is held in {dtype}")
    with phase("Training LLM-to-SLM"):
        steps = steps_in_time(hybrid, collator, train_rows, arguments, bf16)
        console.print(f"{steps} steps of {arguments.train_batch_size} rows, bfloat16 autocast: {bf16}")
        hybrid = train(hybrid, collator, train_rows, arguments, steps, bf16)
    with phase("Training the same SLM alone"):
        slm = train(slm, slm_collator, train_rows, arguments, steps, bf16)

    info = machine() | {"date": datetime.date.today().isoformat()}
    info["versions"] = versions("accelerate", "datasets", "rouge-score")
    settings = asdict(arguments) | {"output_dir": output_dir.name, "steps": steps, "bf16 autocast": bf16}
    prompts, references = list(eval_rows["prompt"]), list(eval_rows["completion"])
    with phase("Quality"):
        contestants = writers(llm, slm, hybrid, processor, slm_collator, arguments.instruction)
        texts = {name: write_all(writer, prompts, arguments.max_new_tokens) for name, writer in contestants.items()}
        texts[WORDS] = [" ".join(prompt.split()[:8]) for prompt in prompts]
        quality = {name: rouge(predictions, references) for name, predictions in texts.items()}
        quality[SLM]["loss per token"] = loss_per_token(slm, slm_collator, eval_rows)
        quality[HYBRID]["loss per token"] = loss_per_token(hybrid, collator, eval_rows)
        columns = {"reference": references} | {name: texts[name] for name in (HYBRID, SLM, LLM)}
        answers = {
            str(row + 1): {name: column[row] for name, column in columns.items()}
            for row in range(min(10, len(prompts)))
        }
        show("Ten held-out rows", answers)
        show(f"Quality on {len(eval_rows)} held-out rows", quality)
    with phase("Speed"):
        timed = writers(llm, copy.deepcopy(slm).to(dtype), copy.deepcopy(hybrid).to(dtype), processor, slm_collator)
        prompt = sorted(prompts, key=len)[len(prompts) // 2]
        one_prompt = {name: partial(write_exactly, writer, prompt) for name, writer in timed.items()}
        speed = measure_speed(one_prompt, arguments.timing_tokens, arguments.timing_rounds)
        prompt_tokens = len(processor(text=prompt)["input_ids"])
        how = (
            f"Batch size 1, a prompt of {prompt_tokens} tokens, {arguments.timing_tokens} new "
            f"tokens, greedy, {dtype}, {info['threads']} threads, medians of {arguments.timing_rounds} rounds".replace(
                "torch.", ""
            )
        )
        show(how, speed)
        command = "make demo" if len(sys.argv) == 1 else shareable_command(["examples/demo.py", *sys.argv[1:]])
        results = {"command": command, "settings": settings, "quality": quality, "speed": speed, "answers": answers}
        results |= {"machine": info, "seconds": seconds}
    with phase("Saving, and loading in a new process"):
        checkpoint = output_dir / "checkpoint"
        hybrid.save_pretrained(checkpoint)
        processor.save_pretrained(checkpoint)
        for record in card_records(results, prompt_tokens):
            write_record(checkpoint, record)
        write_card(checkpoint, hybrid, arguments, prompts[0])
        check_checkpoint(checkpoint, contestants[HYBRID], prompts[:5], arguments.max_new_tokens)
        console.print("In a new process AutoModel and pipeline write the same texts.")
    plot(output_dir / "quality_and_speed.png", quality, speed, f"{how}, {info['cpu']}")
    (output_dir / "results.json").write_text(json.dumps(results, indent=2, default=str) + "\n")
    console.rule(f"[bold]{sum(seconds.values()) / 60:.1f} minutes; everything is in {output_dir.name}", align="left")


if __name__ == "__main__":
    main()
