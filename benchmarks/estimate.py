"""
How far `llm2slm estimate` is from what is measured: its figures, as the models, are for the pairs and conditions of `speed.py`.

    python benchmarks/estimate.py [--rounds 3] [--speed benchmarks/results/speed.json]
    python benchmarks/estimate.py --measure [--rounds 3] [--pair PAIR]

Without `--measure`, the seconds to compare with are the medians in the results of `speed.py`, of LLM and hybrid, in float32 and
with the LLM in bfloat16. They must be of the same machine, with as many threads. With `--measure`, LLM and hybrid are made of
the same configurations with random weights, and in each round LLM, hybrid and estimate come one after another, so that a load
that comes and goes on the machine meets all of them; medians are compared.

The error of a cell is the larger one of LLM and hybrid. Results are written as they come; cells that are there already are
left as they are, unless with `--fresh`. The exit code is 1 if a cell is off by more than 25 %.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import statistics
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from speed_pairs import MODELS, PAIRS, TINY_LLAMA, TINY_T5, SpeedPair, cells
from speed_report import HYBRID_BF16, LLM_BF16
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from transformers_llm2slm import LLM2SLMForConditionalGeneration
from transformers_llm2slm.contestants import HYBRID, LLM, Conditions
from transformers_llm2slm.estimate import Estimate, estimate
from transformers_llm2slm.measurements import provenance
from transformers_llm2slm.speed import seconds_of

LIMIT = 0.25
# Names of LLM and hybrid in the results of `speed.py`, by the precision of the LLM.
NAMES = {torch.float32: (LLM, HYBRID), torch.bfloat16: (LLM_BF16, HYBRID_BF16)}
WARM_UP_TOKENS = 4


# Configurations ------------------------------------------------------------------------------------------------------
def config_of(name: str, tiny: bool) -> PreTrainedConfig:
    """The configuration of a model of `speed.py`."""
    config = MODELS[name]()
    if tiny:
        sizes = TINY_T5 if config.is_encoder_decoder else TINY_LLAMA
        changed = config.to_dict() | sizes | {"vocab_size": 512}
        config = type(config).from_dict(changed | ({"layer_types": None} if "layer_types" in changed else {}))
    return config


def estimated(pair: SpeedPair, cell: Conditions, llm_dtype: torch.dtype, options: argparse.Namespace) -> Estimate:
    return estimate(
        config_of(pair.llm, options.tiny),
        None if pair.slm is None else config_of(pair.slm, options.tiny),
        prompt_length=cell.prompt_length,
        output_length=cell.new_tokens,
        batch_size=cell.batch_size,
        num_beams=cell.num_beams,
        slm_layers=pair.slm_layers,
        fusion=fusion_of(pair),
        llm_dtype=llm_dtype,
        slm_dtype=torch.float32,
        seconds=options.seconds,
    )


def fusion_of(pair: SpeedPair) -> str | None:
    """Random tokens have no characters to align by; the tokens of one model stand for those of the other."""
    return pair.fusion if pair.slm is None else "add"


# What is compared with -----------------------------------------------------------------------------------------------
Task = tuple[str, SpeedPair, Conditions, torch.dtype, Callable[[], dict[str, float]]]


def recorded_tasks(options: argparse.Namespace) -> Iterator[Task]:
    """Cells that `speed.py` has measured."""
    recorded = json.loads(options.speed.read_text())["pairs"]
    for pair in chosen_pairs(options):
        for cell in recorded.get(pair.name, {}).get("cells", {}).values():
            conditions = Conditions(**cell["conditions"])
            for llm_dtype, names in NAMES.items():
                if all(name in cell["figures"] for name in names):
                    seconds = [cell["figures"][name]["total, s"]["median"] for name in names]
                    measured = dict(zip(("llm", "hybrid"), seconds, strict=True))
                    yield pair.name, pair, conditions, llm_dtype, measured.copy


def measured_tasks(options: argparse.Namespace) -> Iterator[Task]:
    """Cells that are to be measured, with models of random weights."""
    for pair in chosen_pairs(options):
        if not pair.exports and options.pair is None:
            continue  # its LLM is too large to make beside others
        llm, hybrid = make(pair, options.tiny)
        for conditions in cells(pair.sweeps, options.tiny):
            yield pair.name, pair, conditions, pair.llm_dtype, writing(llm, hybrid, conditions)


def chosen_pairs(options: argparse.Namespace) -> list[SpeedPair]:
    return [PAIRS[name] for name in options.pair or PAIRS]


def make(pair: SpeedPair, tiny: bool) -> tuple[PreTrainedModel, LLM2SLMForConditionalGeneration]:
    """LLM and hybrid, which share the weights of the LLM."""
    torch.manual_seed(0)
    models = []
    for name, dtype in ((pair.llm, pair.llm_dtype), (pair.slm, torch.float32)):
        if name is not None:
            config = config_of(name, tiny)
            auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
            models.append(auto.from_config(config, dtype=dtype).eval())
    hybrid = LLM2SLMForConditionalGeneration.from_llm_slm_pretrained(
        *models, slm_layers=pair.slm_layers, fusion=fusion_of(pair)
    )
    return models[0], hybrid.eval()


def writing(
    llm: PreTrainedModel, hybrid: LLM2SLMForConditionalGeneration, conditions: Conditions
) -> Callable[[], dict[str, float]]:
    """A function that lets both write once, and gives the seconds that each takes."""
    vocabulary = min(llm.config.get_text_config().vocab_size, hybrid.config.vocab_size)
    input_ids = torch.randint(3, vocabulary, (conditions.batch_size, conditions.prompt_length))
    prompt = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
    for model in (llm, hybrid):
        model.generate(**prompt, **conditions.arguments(min(conditions.new_tokens, WARM_UP_TOKENS)))

    def write() -> dict[str, float]:
        arguments = conditions.arguments(conditions.new_tokens)
        return {
            name: seconds_of(lambda model=model: model.generate(**prompt, **arguments))  # type: ignore[misc]
            for name, model in (("llm", llm), ("hybrid", hybrid))
        }

    return write


# Comparing -----------------------------------------------------------------------------------------------------------
def compare(task: Task, options: argparse.Namespace) -> dict[str, Any]:
    """One cell: the seconds measured and estimated in each round, their medians, and the errors."""
    _, pair, conditions, llm_dtype, measure = task
    measured, found = [], []
    for _ in range(options.rounds):
        measured.append(measure())
        found.append(estimated(pair, conditions, llm_dtype, options))
    seconds = {
        name: {
            "measured": statistics.median(row[name] for row in measured),
            "estimated": statistics.median(row.speed[name].total_seconds for row in found),
        }
        for name in ("llm", "hybrid")
    }
    errors = {name: row["estimated"] / row["measured"] - 1 for name, row in seconds.items()}
    gains = [seconds["llm"][kind] / seconds["hybrid"][kind] for kind in ("measured", "estimated")]
    return {
        **provenance(options.command),
        "conditions": dataclasses.asdict(conditions),
        "LLM in": str(llm_dtype).removeprefix("torch."),
        "seconds": seconds,
        "times the LLM": dict(zip(("measured", "estimated"), gains, strict=True)),
        "errors": errors,
        "error": max(map(abs, errors.values())),
        "break-even, tokens": [row.break_even.from_tokens for row in found],
        "seconds to estimate": statistics.median(row.measuring_seconds for row in found),
        "rounds": {"measured": measured, "estimated": [dataclasses.asdict(row)["speed"] for row in found]},
    }


def summary(pairs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The median and the largest error over all cells, and whether all are within the limit."""
    errors = [cell["error"] for pair in pairs.values() for cell in pair.values()]
    singles = [
        abs(estimate[name]["total_seconds"] / cell["seconds"][name]["measured"] - 1)
        for pair in pairs.values()
        for cell in pair.values()
        for estimate in cell["rounds"]["estimated"]
        for name in ("llm", "hybrid")
    ]
    return {
        "cells": len(errors),
        "median error": statistics.median(errors),
        "largest error": max(errors),
        "median error of a single estimate": statistics.median(singles),
        "largest error of a single estimate": max(singles),
        "limit": LIMIT,
        "within the limit": max(errors) <= LIMIT,
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true", help="measure LLM and hybrid too")
    parser.add_argument("--speed", type=pathlib.Path, default=pathlib.Path("benchmarks/results/speed.json"))
    parser.add_argument("--pair", choices=PAIRS, action="append", help="this pair only; repeatable")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of each cell, 3 by default")
    parser.add_argument(
        "--seconds", type=float, default=10, help="how long to measure for an estimate, 10 s by default"
    )
    parser.add_argument("--fresh", action="store_true", help="leave nothing of earlier results")
    parser.add_argument("--tiny", action="store_true", help="toy models, to try the script out")
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("benchmarks/results/estimate.json"))
    options = parser.parse_args()
    options.command = f"python benchmarks/estimate.py --rounds {options.rounds} --seconds {options.seconds:g}"
    options.command += "".join(f" --{name}" for name in ("measure", "tiny") if getattr(options, name))
    return options


def main() -> int:
    options = parse()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    there = options.output.exists() and not options.fresh
    results: dict[str, Any] = json.loads(options.output.read_text()) if there else {"pairs": {}}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    columns = ("LLM, s", "estimated", "hybrid, s", "estimated", "x LLM", "estimated", "error")
    print(f"{'':64}" + "".join(f"{name:>11}" for name in columns))
    for task in measured_tasks(options) if options.measure else recorded_tasks(options):
        name, _, conditions, llm_dtype, _ = task
        key = f"{conditions}, LLM in {str(llm_dtype).removeprefix('torch.')}"
        stored = results["pairs"].setdefault(name, {})
        if key not in stored:
            stored[key] = compare(task, options)
            results["summary"] = summary(results["pairs"])
            options.output.write_text(json.dumps(results, indent=1) + "\n")
        cell = stored[key]
        values = [cell["seconds"][part][kind] for part in ("llm", "hybrid") for kind in ("measured", "estimated")]
        values += cell["times the LLM"].values()
        print(
            f"{name}\n  {key:62}" + "".join(f"{value:11.2f}" for value in values) + f"{cell['error']:11.1%}",
            flush=True,
        )
    if "summary" not in results:
        print("There is nothing to compare with: run `benchmarks/speed.py` first, or add `--measure`.")
        return 1
    for name, value in results["summary"].items():
        print(f"{name:36} {value:.1%}" if isinstance(value, float) else f"{name:36} {value}")
    return 0 if results["summary"]["within the limit"] else 1


if __name__ == "__main__":
    sys.exit(main())
