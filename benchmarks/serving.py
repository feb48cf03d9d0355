"""
Tokens per second at 1, 8 and 32 requests on one machine: the whole LLM, and the hybrid served in several ways.

    python benchmarks/serving.py [--pair PAIR] [--llm FOLDER] [--slm-layers 4] [--exported] [--rounds 5] [--minutes 4]

Two pairs: SmolLM2-135M-Instruct with an SLM cut from its upper layers, which reads descriptions of software packages; and
T5-v1.1-large with T5-v1.1-small, of random weights, on random prompts of 16 to 256 tokens. What is written does not matter
here: every answer has exactly as many tokens. A single request is the one of median length; more than 8 are served in
batches of 8. The contestants are

    LLM                     its own `generate`, prompts sorted by length
    hybrid, unsorted        batches as the requests came
    hybrid                  prompts sorted by length, which pads less
    hybrid, overlapped      the same, and the LLM reads a batch while the SLM writes for the one before
    exported                with --exported: the hybrid in ONNX Runtime with matrices in int8, sorted; and overlapped

and, of one request, 4 sampled answers: in one call with `num_return_sequences=4`, for which the hybrid reads the prompt once,
and in 4 calls. In a round each does each task once, all contestants of a task one after another, so that a load that comes
and goes on the machine meets all of them. Figures are medians over the rounds, with the fastest and the slowest. The ratio to
the LLM is the median of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import gzip
import json
import pathlib
import random
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from generate_overhead import T5_LARGE, T5_SMALL
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, T5Config, T5ForConditionalGeneration
from transformers.utils import logging

from transformers_llm2slm import LLM2SLMForConditionalGeneration
from transformers_llm2slm.evaluation import generate_batches
from transformers_llm2slm.measurements import provenance, shareable_command
from transformers_llm2slm.speed import spread, times_in_rounds

PROJECT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT / "examples"))

from prepare_models import prepare  # noqa: E402

LLM, HYBRID, EXPORTED = "LLM", "hybrid", "exported"
UNSORTED, OVERLAPPED = ", unsorted", ", overlapped"
BATCH_SIZE, NUM_SEQUENCES = 8, 4

Request = list[int]  # a prompt in the LLM's tokens
Writer = Callable[[], Iterable[torch.Tensor]]


# What is served, and to whom -----------------------------------------------------------------------------------------
def smollm2(options: argparse.Namespace, count: int) -> tuple[LLM2SLMForConditionalGeneration, list[Request]]:
    """SmolLM2-135M-Instruct in front of its own upper layers, and descriptions of software packages."""
    folder = options.llm or prepare("smollm2-135m-instruct", PROJECT / "models")
    llm = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = LLM2SLMForConditionalGeneration.from_llm_slm_pretrained(
        llm, slm_layers=options.slm_layers, fusion="replace", load_llm="whole"
    )
    with gzip.open(PROJECT / "examples" / "data" / "synopsis-validation.jsonl.gz", "rt", encoding="utf-8") as lines:
        prompts = [json.loads(line)["prompt"] for line in lines]
    texts = random.Random(0).sample(prompts, count)
    return model, AutoTokenizer.from_pretrained(folder)(texts)["input_ids"]


def t5(options: argparse.Namespace, count: int) -> tuple[LLM2SLMForConditionalGeneration, list[Request]]:
    """T5 v1.1 large in front of T5 v1.1 small, and random tokens."""
    large, small = (T5ForConditionalGeneration(T5Config(**sizes)) for sizes in (T5_LARGE, T5_SMALL))
    model = LLM2SLMForConditionalGeneration.from_llm_slm_pretrained(large, small, fusion="add", load_llm="whole")
    generator = random.Random(0)
    lengths = [generator.randint(16, 256) for _ in range(count)]
    return model, [[generator.randrange(3, large.config.vocab_size) for _ in range(length)] for length in lengths]


PAIRS = {"smollm2": smollm2, "t5": t5}


def take(requests: Sequence[Request], count: int) -> list[Request]:
    """The first `count` requests; of one, that of median length."""
    return list(requests[:count]) if count > 1 else [sorted(requests, key=len)[len(requests) // 2]]


def batches(requests: Sequence[Request], side: str = "right", in_order: bool = False) -> list[dict[str, torch.Tensor]]:
    """Batches of requests, the longest first unless they stay in order, padded on one side."""
    rows = requests if in_order else sorted(requests, key=len, reverse=True)
    padded = []
    for start in range(0, len(rows), BATCH_SIZE):
        group = [torch.tensor(row) for row in rows[start : start + BATCH_SIZE]]
        columns = {"input_ids": group, "attention_mask": [torch.ones_like(row) for row in group]}
        padded.append({name: pad_sequence(rows, True, padding_side=side) for name, rows in columns.items()})
    return padded


# Contestants ---------------------------------------------------------------------------------------------------------
@dataclass
class Task:
    """
    Something that several contestants do.

    Args:
        name (`str`): What it is.
        num_answers, new_tokens (`int`): How many answers it takes, and how many tokens each has.
        contestants (`dict[str, Callable[[], Iterable[torch.Tensor]]]`): For each a function that gives its answers, as
            tensors of shape `(batch_size, new_tokens)`. The first is the one that the others are compared with.
    """

    name: str
    num_answers: int
    new_tokens: int
    contestants: dict[str, Writer]
    answers: dict[str, torch.Tensor] = field(default_factory=dict)

    def run(self, contestant: str) -> None:
        """Let one contestant write. A `RuntimeError` if its answers have another length, or overlapping changed them."""
        answers = self.answers[contestant] = torch.cat(list(self.contestants[contestant]()))
        if answers.shape != (self.num_answers, self.new_tokens):
            raise RuntimeError(
                f"{self.name}, {contestant}: wrote {tuple(answers.shape)}, not {(self.num_answers, self.new_tokens)}."
            )
        if not torch.equal(answers, self.answers[contestant.removesuffix(OVERLAPPED)]):
            raise RuntimeError(f"{self.name}, {contestant}: wrote other tokens than without overlapping.")

    def figures(self, seconds: Mapping[str, Sequence[float]]) -> dict[str, dict[str, Any]]:
        """For each contestant the spread of its seconds, tokens per second, and how many times as fast as the first."""
        first = next(iter(seconds.values()))
        return {
            name: {
                "seconds": spread(own),
                "tokens_per_second": self.num_answers * self.new_tokens / statistics.median(own),
                "times_llm": statistics.median(theirs / ours for theirs, ours in zip(first, own, strict=True)),
            }
            for name, own in seconds.items()
        }


def llm_answers(llm: PreTrainedModel, requests: Sequence[Request], **generate_kwargs: Any) -> Iterator[torch.Tensor]:
    """Answers of the LLM to requests sorted by length, a batch at a time."""
    seq2seq = llm.config.is_encoder_decoder
    for batch in batches(requests, "right" if seq2seq else "left"):
        yield llm.generate(**batch, **generate_kwargs)[:, 1 if seq2seq else batch["input_ids"].shape[1] :]


def hybrid_answers(model: Any, served: Iterable[Mapping[str, Any]], **kwargs: Any) -> Iterator[torch.Tensor]:
    """Answers of the hybrid, exported or not, to batches of prompts."""
    for sequences in generate_batches(model, served, **kwargs):
        yield sequences[:, int(model.slm.config.is_encoder_decoder) :]


def make_tasks(
    models: Mapping[str, Any], requests: Sequence[Request], counts: Iterable[int], new_tokens: int
) -> list[Task]:
    """
    To answer so many requests, for each of `counts`; and to give several answers to one.

    Args:
        models (`Mapping[str, Any]`): `LLM`, `HYBRID` and perhaps `EXPORTED`.
    """
    hybrids = {name: model for name, model in models.items() if name != LLM}
    lengths = {"max_new_tokens": new_tokens, "eos_token_id": None, "pad_token_id": 0, "num_beams": 1}
    greedy, sampled = lengths | {"do_sample": False}, lengths | {"do_sample": True}
    tasks = []
    for count in counts:
        taken = take(requests, count)
        contestants: dict[str, Writer] = {LLM: partial(llm_answers, models[LLM], taken, **greedy)}
        if count > BATCH_SIZE:
            unsorted = batches(taken, in_order=True)
            contestants[f"{HYBRID}{UNSORTED}"] = partial(hybrid_answers, models[HYBRID], unsorted, **greedy)
        for name, model in hybrids.items():
            contestants[name] = partial(hybrid_answers, model, batches(taken), **greedy)
            if count > BATCH_SIZE:
                contestants[f"{name}{OVERLAPPED}"] = partial(
                    hybrid_answers, model, batches(taken), overlap=True, **greedy
                )
        tasks.append(Task(f"{count} request{'s' if count > 1 else ''}", count, new_tokens, contestants))
    one, several = take(requests, 1), sampled | {"num_return_sequences": NUM_SEQUENCES}
    contestants = {f"{LLM}, one call": partial(llm_answers, models[LLM], one, **several)}
    for name, model in hybrids.items():
        calls = batches(one) * NUM_SEQUENCES
        contestants[f"{name}, one call"] = partial(hybrid_answers, model, batches(one), **several)
        contestants[f"{name}, {NUM_SEQUENCES} calls"] = partial(hybrid_answers, model, calls, **sampled)
    return [*tasks, Task(f"{NUM_SEQUENCES} answers to 1 request", NUM_SEQUENCES, new_tokens, contestants)]


# Measuring -----------------------------------------------------------------------------------------------------------
def measure(pair: str, options: argparse.Namespace, folder: str) -> dict[str, Any]:
    """Setting and figures of one pair; `folder` is for the export."""
    torch.manual_seed(0)
    model, requests = PAIRS[pair](options, max(options.requests))
    exported = {EXPORTED: model.export(folder, format="onnx", int8=True)} if options.exported else {}
    model.eval().to(getattr(torch, options.dtype))
    models = {LLM: model.model.whole_llm, HYBRID: model} | exported

    def run(counts: Sequence[int], new_tokens: int, rounds: int) -> tuple[list[Task], dict[str, Any]]:
        tasks = make_tasks(models, requests, counts, new_tokens)
        runs = {task.name: {name: partial(task.run, name) for name in task.contestants} for task in tasks}
        return tasks, times_in_rounds(runs, rounds, max_seconds=60 * options.minutes)

    run([min(options.requests)], 2, 1)  # to warm up
    tasks, seconds = run(options.requests, options.new_tokens, options.rounds)
    lengths = {str(count): [len(request) for request in take(requests, count)] for count in options.requests}
    return {
        "setting": {
            "dtype": options.dtype,
            "new_tokens": options.new_tokens,
            "batch_size": BATCH_SIZE,
            "prompt_tokens": {
                count: {"shortest": min(row), "mean": statistics.mean(row), "longest": max(row)}
                for count, row in lengths.items()
            },
            "parameters": {
                "whole llm": models[LLM].num_parameters(),
                "llm": model.llm.num_parameters(),
                "slm": model.slm.num_parameters(),
            },
        },
        "figures": {task.name: task.figures(seconds[task.name]) for task in tasks},
        "seconds": seconds,
    }


def show(pair: str, figures: Mapping[str, Mapping[str, Any]]) -> None:
    """Print the figures of one pair."""
    print(f"{pair:46}{'tokens/s':>10}{'x LLM':>8}{'seconds':>10}  (fastest - slowest)")
    for task, rows in figures.items():
        for name, row in rows.items():
            seconds = row["seconds"]
            print(
                f"{task:24}{name:22}{row['tokens_per_second']:10.1f}{row['times_llm']:8.2f}{seconds['median']:10.2f}"
                f"  ({seconds['min']:.2f} - {seconds['max']:.2f})"
            )
    print(flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", choices=PAIRS, help="measure this pair only, and leave the results of the other")
    parser.add_argument("--llm", help="SmolLM2-135M-Instruct, or another decoder-only LLM: hub id or folder")
    parser.add_argument("--slm-layers", type=int, default=4, help="upper layers of it that are the SLM, 4 by default")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="bfloat16 by default")
    parser.add_argument("--exported", action="store_true", help="measure the hybrid in ONNX Runtime, int8, too")
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 8, 32], help="1 8 32 by default")
    parser.add_argument("--new-tokens", type=int, default=64, help="tokens of every answer, 64 by default")
    parser.add_argument("--rounds", type=int, default=5, help="the most rounds, 5 by default")
    parser.add_argument("--minutes", type=float, default=4, help="begin no round of a pair later, 4 by default")
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("benchmarks/results/serving.json"))
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()

    command = f"python benchmarks/serving.py {shareable_command(sys.argv[1:])}".rstrip()
    results = json.loads(options.output.read_text()) if options.pair and options.output.exists() else {}
    for pair in [options.pair] if options.pair else PAIRS:
        with tempfile.TemporaryDirectory() as folder:
            measured = measure(pair, options, folder)
        results[pair] = provenance(command, *(["onnxruntime"] if options.exported else [])) | measured
        show(pair, results[pair]["figures"])
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(results, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
