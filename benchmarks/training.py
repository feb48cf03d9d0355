"""
What a training step costs, in time and memory: the SLM alone, the hybrid with its LLM, the hybrid with cached states, and
the whole LLM.

    python benchmarks/training.py [--rounds 3] [--pair PAIR] [--output benchmarks/results/training.json]

Two pairs of real sizes with random weights. Every contestant trains with `Seq2SeqTrainer` on the same rows (128 prompt
tokens, 32 response tokens, 8 rows a step, AdamW, bfloat16 autocast, weights in float32), each in a process of its own, one
after the other and in turn which first, so that a load that comes and goes on the machine meets all of them. A step is
timed from the end of the one before, so reading the batch counts; the first two of each process do not. Memory is the peak
of the process's resident set, cached states that the system mapped included. The ratios are medians over the rounds.
Logits are computed over the response only, by all of them.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import torch
from datasets import Dataset, load_dataset
from generate_overhead import T5_LARGE, T5_SMALL, smollm2_config
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoProcessor,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    TrainerCallback,
)
from transformers.utils import logging

from transformers_llm2slm import (
    LLM2SLMDataCollator,
    LLM2SLMForConditionalGeneration,
    LLM2SLMProcessor,
    cache_llm_states,
)
from transformers_llm2slm.measurements import provenance

DATA = pathlib.Path(__file__).parent.parent / "examples" / "data" / "synopsis-train.jsonl.gz"
PROMPT_LENGTH, RESPONSE_LENGTH, BATCH_SIZE = 128, 32, 8
WARM_UP, STEPS = 2, 6
SLM, LIVE, CACHED, LLM = "SLM alone", "hybrid, LLM live", "hybrid, cached states", "whole LLM"
CONTESTANTS = (SLM, LIVE, CACHED, LLM)
PAIRS = ("t5-v1.1-large -> t5-v1.1-small", "SmolLM2-135M -> its top 12 layers")
SETTING = {
    "prompt_length": PROMPT_LENGTH,
    "response_length": RESPONSE_LENGTH,
    "batch_size": BATCH_SIZE,
    "steps": STEPS,
    "autocast": "bfloat16",
    "dtype of the states": "float16",
}
LIMITS = {"seconds": 1.1, "bytes": 1.15}


# What is trained -----------------------------------------------------------------------------------------------------
def make_tokenizer(texts: Sequence[str], seq2seq: bool) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer; as T5's, it ends every text for an encoder-decoder."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "</s>", "<unk>"]
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=32_000, special_tokens=special, show_progress=False)
    )
    if seq2seq:
        tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def compose(pair: str) -> tuple[PreTrainedModel, LLM2SLMForConditionalGeneration]:
    """The whole LLM, and the hybrid."""
    torch.manual_seed(0)
    if pair == PAIRS[0]:
        llm = T5ForConditionalGeneration(T5Config(**T5_LARGE))
        slm = T5ForConditionalGeneration(T5Config(**T5_SMALL))
        return llm, LLM2SLMForConditionalGeneration.from_llm_slm_pretrained(llm, slm, fusion="add")
    llm = LlamaForCausalLM(smollm2_config())
    return llm, LLM2SLMForConditionalGeneration.from_llm_slm_pretrained(llm, slm_layers=12, fusion="replace")


def prepare(pair: str, folder: pathlib.Path) -> None:
    """Write models, rows and cached states, once for all processes."""
    texts = load_dataset("json", data_files=str(DATA), split="train")["prompt"][:]
    count = (WARM_UP + STEPS) * BATCH_SIZE
    rows = [
        {"prompt": " ".join(texts[3 * i : 3 * i + 12]), "completion": " ".join(texts[-i - 4 : -i - 1])}
        for i in range(count)
    ]
    (folder / "rows.json").write_text(json.dumps(rows))
    llm, model = compose(pair)
    seq2seq = model.slm.config.is_encoder_decoder
    processor = LLM2SLMProcessor(
        make_tokenizer(texts, seq2seq),
        fusion=model.config.fusion,
        slm_is_encoder_decoder=seq2seq,
        decoder_start_token_id=0 if seq2seq else None,
    )
    processor.save_pretrained(folder / "hybrid")
    model.save_pretrained(folder / "hybrid")
    model.slm.save_pretrained(folder / "slm")
    llm.save_pretrained(folder / "llm")
    cache_llm_states(rows, model, processor, folder / "states", max_prompt_length=PROMPT_LENGTH)


# One contestant, in a process of its own -----------------------------------------------------------------------------
class Clock(TrainerCallback):
    """Times of the ends of the steps."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.ends.append(time.perf_counter())


class PlainCollator(LLM2SLMDataCollator):
    """The same rows, cut to the same lengths, as a plain model takes them."""

    def __call__(self, rows: Sequence[Any]) -> dict[str, Any]:
        batch = super().__call__(rows)
        prompt, labels = batch["input_ids"], batch["labels"]
        if self.processor.slm_is_encoder_decoder:
            return {"input_ids": prompt, "attention_mask": batch["attention_mask"], "labels": labels}
        # No row is padded. Logits over the prompt, which nobody scores, would make the plain model look slow.
        return {
            "input_ids": torch.cat([prompt, labels[:, :-1]], dim=1),
            "labels": labels,
            "shift_labels": labels,
            "logits_to_keep": labels.shape[1],
        }


def peak_bytes() -> int:
    """The peak of this process's resident set."""
    status = pathlib.Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))


def train(contestant: str, folder: pathlib.Path) -> dict[str, Any]:
    """Train one contestant; returns the seconds of its steps, its peak of memory and its losses."""
    processor = AutoProcessor.from_pretrained(folder / "hybrid")
    rows: Any = Dataset.from_list(json.loads((folder / "rows.json").read_text()))
    collator_class: type[LLM2SLMDataCollator] = LLM2SLMDataCollator
    if contestant == LIVE:
        model = LLM2SLMForConditionalGeneration.from_pretrained(folder / "hybrid", llm_name_or_path=folder / "llm")
    elif contestant == CACHED:
        model = LLM2SLMForConditionalGeneration.from_pretrained(folder / "hybrid", load_llm=False)
        rows = cache_llm_states(rows, model, processor, folder / "states", max_prompt_length=PROMPT_LENGTH)
    else:
        auto_class = AutoModelForSeq2SeqLM if processor.slm_is_encoder_decoder else AutoModelForCausalLM
        model = auto_class.from_pretrained(folder / ("slm" if contestant == SLM else "llm"))
        collator_class = PlainCollator
    clock = Clock()
    arguments = Seq2SeqTrainingArguments(
        output_dir=str(folder / "out"),
        per_device_train_batch_size=BATCH_SIZE,
        max_steps=WARM_UP + STEPS,
        bf16=True,
        use_cpu=True,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    trainer = Seq2SeqTrainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        data_collator=collator_class(processor, PROMPT_LENGTH, RESPONSE_LENGTH, pad_to_max_length=True),
        callbacks=[clock],
    )
    trainer.train()
    seconds = [end - begin for begin, end in zip(clock.ends[WARM_UP - 1 :], clock.ends[WARM_UP:], strict=False)]
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return {"seconds": seconds, "bytes": peak_bytes(), "losses": losses, "trained_parameters": trained}


# All of them ---------------------------------------------------------------------------------------------------------
def measure(pair: str, rounds: int) -> dict[str, Any]:
    """All rounds of a pair, and of each contestant the medians and their ratios to the SLM alone."""
    counted: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        # A process of its own, too, so that what it held is given back.
        subprocess.run([sys.executable, __file__, "--prepare", pair, "--folder", folder], check=True)
        for index in range(rounds):
            results = {}
            for place in range(len(CONTESTANTS)):
                contestant = CONTESTANTS[(place + index) % len(CONTESTANTS)]
                command = [sys.executable, __file__, "--contestant", contestant, "--folder", folder]
                output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
                results[contestant] = json.loads(output.splitlines()[-1])
                print(
                    f"  round {index + 1}, {contestant}: {statistics.median(results[contestant]['seconds']):.2f} s",
                    flush=True,
                )
            counted.append({name: results[name] for name in CONTESTANTS})
    table = {}
    for name in CONTESTANTS:
        steps = [statistics.median(results[name]["seconds"]) for results in counted]
        alone = [statistics.median(results[SLM]["seconds"]) for results in counted]
        memory = statistics.median(results[name]["bytes"] for results in counted)
        seconds = statistics.median(steps)
        table[name] = {
            "seconds": seconds,
            "tokens_per_second": BATCH_SIZE * (PROMPT_LENGTH + RESPONSE_LENGTH) / seconds,
            "bytes": memory,
            "times_slm_seconds": statistics.median(step / own for step, own in zip(steps, alone, strict=True)),
            "times_slm_bytes": memory / statistics.median(results[SLM]["bytes"] for results in counted),
            "trained_parameters": counted[0][name]["trained_parameters"],
        }
    return {"table": table, "rounds": counted}


def plot(path: pathlib.Path, results: dict[str, Any]) -> None:
    """Seconds a step and peak memory of the contestants, a row of panels for each pair."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(len(results), 2, figsize=(10, 2.6 * len(results)), layout="constrained", squeeze=False)
    for row, (pair, result) in zip(axes, results.items(), strict=True):
        first = f"{pair}: seconds a step"
        panels = (("seconds", 1, first, "%.2f"), ("bytes", 2**30, "peak memory, GiB", "%.1f"))
        for axis, (key, unit, title, style) in zip(row, panels, strict=True):
            values = [result["table"][name][key] / unit for name in CONTESTANTS]
            bars = axis.barh(CONTESTANTS, values, color=["#c3c9d4", "#93b4f5", "#2563eb", "#8a94a6"], height=0.65)
            axis.bar_label(bars, fmt=style, padding=3)
            axis.invert_yaxis()
            axis.set_title(title, fontsize=10, loc="left")
            axis.spines[["top", "right"]].set_visible(False)
            axis.margins(x=0.15)
    figure.savefig(path, dpi=120)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="rounds, 3 by default")
    parser.add_argument("--pair", choices=PAIRS, help="measure this pair only, and leave the results of the other")
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("benchmarks/results/training.json"))
    parser.add_argument("--prepare", help=argparse.SUPPRESS)
    parser.add_argument("--contestant", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=pathlib.Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if options.prepare:
        prepare(options.prepare, options.folder)
        return 0
    if options.contestant:
        print(json.dumps(train(options.contestant, options.folder)))
        return 0
    # Children wait for each other's threads; they must sleep over it.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    results = json.loads(options.output.read_text()) if options.pair and options.output.exists() else {}
    for pair in [options.pair] if options.pair else PAIRS:
        print(pair, flush=True)
        command = f"python benchmarks/training.py --rounds {options.rounds}" + (
            f" --pair '{pair}'" if options.pair else ""
        )
        results[pair] = provenance(command, "datasets", "accelerate") | {"setting": SETTING, "limits": LIMITS}
        results[pair] |= measure(pair, options.rounds)
        print(f"{'':24}{'s/step':>9}{'tokens/s':>10}{'x SLM':>8}{'GiB':>8}{'x SLM':>8}{'trained':>14}")
        for name, row in results[pair]["table"].items():
            print(
                f"{name:24}{row['seconds']:9.2f}{row['tokens_per_second']:10.0f}{row['times_slm_seconds']:8.2f}"
                f"{row['bytes'] / 2**30:8.2f}{row['times_slm_bytes']:8.2f}{row['trained_parameters']:14,}",
                flush=True,
            )
    cached = [result["table"][CACHED] for result in results.values()]
    within = all(row[f"times_slm_{unit}"] <= limit for row in cached for unit, limit in LIMITS.items())
    print(f"The limits for cached states, {LIMITS}, are {'kept' if within else 'exceeded'}.")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(results, indent=2) + "\n")
    plot(options.output.with_suffix(".png"), results)
    return 0 if within else 1


if __name__ == "__main__":
    sys.exit(main())
