#!/usr/bin/env python3
"""
Write the figures of README.md and quality.md anew, from the files in `benchmarks/results`: no number there is typed by hand.

    python benchmarks/readme.py

A block of figures stands between `<!-- figures: NAME -->` and `<!-- end of figures -->`; NAME is one of `BLOCKS`, whose function
makes the text in between. A test compares the two.
"""

from __future__ import annotations

import json
import pathlib
import re
from collections.abc import Callable, Collection, Sequence
from typing import Any

from quality_cells import HYBRID, SLM
from quality_report import ablation_table, main_table, table, verdicts
from quality_speed import ALIKE, DECODING, read_speed
from quality_tables import MAIN
from speed_report import started

PROJECT = pathlib.Path(__file__).resolve().parent.parent
RESULTS = PROJECT / "benchmarks" / "results"
BLOCK = re.compile(r"(<!-- figures: ([\w-]+) -->\n).*?(<!-- end of figures -->)", re.DOTALL)
QUALITY_TASKS = {"synopsis": "A package's description to its one-line synopsis", "ddtp-de": "English to German"}
T5 = "t5-v1_1-large -> t5-v1_1-small"


def read(name: str) -> Any:
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def where(result: dict[str, Any]) -> str:
    """Command, date and machine of a result."""
    machine, versions = result["machine"], result["versions"]
    processor = " with ".join(machine[part] for part in ("cpu", "instructions") if part in machine)
    return (
        f"`{result['command']}` on {result['date'][:10]}, on {machine['cores']} cores of an {processor}, transformers "
        f"{versions['transformers']}, torch {versions['torch'].partition('+')[0]}"
    )


def bold(cells: Sequence[str]) -> list[str]:
    return [f"**{cell}**" for cell in cells]


# What training costs -----------------------------------------------------------------------------------------------------
def training() -> str:
    pairs = read("training.json")
    names = list(next(iter(pairs.values()))["table"])
    rows = []
    for name in names:
        cells = [name]
        for pair in pairs.values():
            own = pair["table"][name]
            seconds, memory = f"{own['times_slm_seconds']:.2f}", f"{own['times_slm_bytes']:.2f}"
            if own["times_slm_seconds"] == 1:
                seconds, memory = f"{seconds} ({own['seconds']:.2f} s)", f"{memory} ({own['bytes'] / 2**30:.1f} GiB)"
            cells += [seconds, memory]
        rows.append(bold(cells) if "cached" in name else cells)
    header = [""] + [text for pair in pairs for text in (f"{pair}: a step", "peak memory")]
    return table(header, rows) + f"\n\n{where(next(iter(pairs.values())))}; medians of 3 rounds."


# The demonstration -------------------------------------------------------------------------------------------------------
def demo() -> str:
    results = read("demo/results.json")
    names = {"LLM, zero-shot": "LLM, zero-shot", "SLM alone": "the same SLM, trained without the LLM"}
    names |= {"LLM-to-SLM": "LLM-to-SLM", "first 8 words": "the first 8 words of the description"}
    rows = []
    for name, shown in names.items():
        quality, speed = results["quality"][name], results["speed"].get(name)
        cells = [shown, *(f"{quality[f'ROUGE-{kind}']:.1f}" for kind in ("1", "2", "L"))]
        cells.append(f"{quality['loss per token']:.2f}" if "loss per token" in quality else "-")
        cells += [f"{speed['tokens/s']:.1f}", f"{speed['times the LLM']:.2f}"] if speed else ["", ""]
        rows.append(bold(cells) if name == "LLM-to-SLM" else cells)
    return table(["", "ROUGE-1", "ROUGE-2", "ROUGE-L", "loss per token", "tokens/s", "times the LLM"], rows)


# Speed -------------------------------------------------------------------------------------------------------------------
SPEED_ROWS = {
    "LLM": "LLM, its own `generate`",
    "LLM, linear layers of the hybrid": "LLM with the linear layers of the hybrid",
    "LLM, bfloat16": "LLM in bfloat16",
    "LLM, ctranslate2 int8": "LLM in CTranslate2 int8",
    "assisted, 50% accepted": "LLM, assisted generation, 50 % of drafts accepted",
    "assisted, 70% accepted": "the same, 70 %",
    "assisted, 90% accepted": "the same, 90 %",
    "prompt lookup": "LLM, prompt lookup, half of the text quoted",
    "hybrid": "**hybrid**",
    "hybrid, openvino int8": "hybrid, OpenVINO int8",
    "hybrid, onnx float32": "hybrid, ONNX Runtime float32",
    "hybrid, onnx int8": "**hybrid, ONNX Runtime int8**",
    "SLM alone": "SLM alone, on a prompt that is encoded already",
}


def base(pair: dict[str, Any]) -> dict[str, Any]:
    return next(iter(pair["cells"].values()))


def speed() -> str:
    results = read("speed.json")
    pair = results["pairs"][T5]
    cell = base(pair)
    rows = []
    for name, shown in SPEED_ROWS.items():
        own = cell["figures"][name]
        start = started(pair, name)
        rows.append(
            [
                shown,
                f"{own['times the first']['median']:.2f}",
                f"{1000 * own['first token, s']['median']:.0f}",
                f"{1000 * own['token, s']['median']:.1f}",
                f"{start['peak memory, bytes'] / 1e9:.1f}" if start else "",
            ]
        )
    header = [
        "T5-v1.1-large to T5-v1.1-small",
        "times the LLM",
        "first token, ms",
        "further token, ms",
        "peak memory, GB",
    ]
    checks = {row["check"]: row["value"] for row in results["checks"] if row["pair"] == T5}
    missed = [row for row in results["checks"] if not row["holds"]]
    said = [f"{row['check']} {row['value']:.2f}, wanted {row['target']}" for row in missed if row["value"] is not None]
    return "\n\n".join(
        [
            table(header, rows),
            f"{where(cell)}: one prompt of {cell['conditions']['prompt_length']} tokens, "
            f"{cell['conditions']['new_tokens']} new ones, medians of {cell['rounds']} rounds in one run, float32 where nothing "
            "else is said ([speed.json](benchmarks/results/speed.json), with every round).",
            "In the same rounds the fastest hybrid was "
            f"{checks['fastest hybrid (hybrid, onnx int8) beside the LLM in CTranslate2 int8']:.1f} times as fast as the LLM in "
            f"CTranslate2 int8, the eager one {checks['hybrid beside assisted at 70 %']:.1f} times as fast as assisted generation "
            f"at 70 %; `generate` took {checks['hybrid over encode + SLM']:.2f} times what reading and the SLM's own `generate` "
            "take. A bare step of the exported SLM takes "
            f"{checks['step in float32 (onnx float32) over its limit']:.2f} (float32) and "
            f"{checks['step in int8 (onnx int8) over its limit']:.2f} times (int8) as long as reading its weights and cache from "
            "memory once.",
            f"Of the targets in `benchmarks/speed_report.py`, {len(results['checks']) - len(missed)} of {len(results['checks'])} "
            f"hold{'; missed: ' + '; '.join(said) if said else ''}.",
            other_pairs(results),
        ]
    )


def other_pairs(results: dict[str, Any]) -> str:
    kinds = {
        "LLM, linear layers of the hybrid": "the LLM with the hybrid's linear layers",
        "hybrid": "hybrid",
        "hybrid, LLM in bfloat16": "hybrid, LLM in bfloat16",
        "hybrid, onnx float32": "hybrid, ONNX float32",
        "hybrid, onnx int8": "hybrid, ONNX int8",
        "LLM, ctranslate2 int8": "the LLM in CTranslate2 int8",
        "assisted, 70% accepted": "assisted at 70 %",
    }
    rows = []
    for name, pair in results["pairs"].items():
        figures = base(pair)["figures"]
        first = next(iter(figures))
        cells = [
            name,
            f"{1000 * figures[first]['token, s']['median']:.0f}" + (" (bfloat16)" if "bfloat" in first else ""),
        ]
        for kind in kinds:
            cells.append(f"{figures[kind]['times the first']['median']:.1f}" if kind in figures else "-")
        rows.append(cells)
    return table(["times the LLM, 128 in, 128 out", "a token of the LLM, ms", *kinds.values()], rows)


def overhead() -> str:
    result = read("generate_overhead.json")
    ratios = ", ".join(f"{own['wall']['ratio']:.2f} times for {pair}" for pair, own in result["results"].items())
    return (
        f"Against the LLM's encoding plus the SLM's `generate` on the same fused input, it took {ratios} "
        f"({result['setting']['prompt_length']} tokens in, {result['setting']['new_tokens']} out; {where(result)})."
    )


def few_rows() -> str:
    result = read("few_rows.json")
    ratios = {
        rows: sorted(own[rows]["ratio"] for own in result["results"].values())
        for rows in next(iter(result["results"].values()))
    }
    one, *more = ratios
    several = [ratio for rows in more for ratio in ratios[rows]]
    return (
        f"{ratios[one][0]:.1f} to {ratios[one][-1]:.1f} times as fast for one row, {min(several):.1f} to {max(several):.1f} times for "
        f"{more[0]} to {more[-1]}, with the matrices of T5 and SmolLM2 ({where(result)})."
    )


# What exports change -----------------------------------------------------------------------------------------------------
def exports() -> str:
    # Of what `make bench` measures; a trained checkpoint has to be given.
    results = {kind: own for kind, own in read("export_quality.json").items() if "checkpoint" not in own["setting"]}
    rows = [
        [
            f"{kind}: {name}",
            *(f"{100 * own[share]:.1f} %" for share in ("prompts equal", "tokens equal", "next tokens equal")),
            f"{own['change of the loss']:+.4f}",
        ]
        for kind, result in results.items()
        for name, own in result["figures"].items()
        if name != "float32"  # the reference
    ]
    header = ["beside eager float32", "all tokens of a prompt", "tokens", "next tokens", "change of the loss"]
    said = "; ".join(
        f"{kind}, {result['setting']['count']} prompts, {result['setting']['new_tokens']} tokens: {where(result)}"
        for kind, result in results.items()
    )
    return f"{table(header, rows)}\n\n{said}."


def lossless() -> str:
    results = read("lossless.json")
    rows = [
        [
            kind,
            str(own["prompts"]),
            str(own["tokens"]),
            str(own["differing"]),
            f"{own['acceptance_rate']:.0%}",
            str(own["most_readings"]),
            f"{own['wall']['ratio']:.2f}",
        ]
        for kind, own in results["greedy"].items()
    ]
    header = [
        "",
        "prompts",
        "tokens",
        "answers that differ",
        "drafts accepted",
        "readings of a prompt",
        "times the LLM",
    ]
    return table(header, rows)


def estimates() -> str:
    summary = read("estimate.json")["summary"]
    return (
        f"Over {summary['cells']} conditions of `benchmarks/speed.py` its seconds were off by {summary['median error']:.1%} in "
        f"the median and by {summary['largest error']:.1%} at most, medians of rounds; a single estimate by "
        f"{summary['median error of a single estimate']:.1%} and {summary['largest error of a single estimate']:.1%} "
        "([estimate.json](benchmarks/results/estimate.json))."
    )


def serving() -> str:
    results = read("serving.json")
    rows = []
    names = list(
        dict.fromkeys(name for result in results.values() for task in result["figures"].values() for name in task)
    )
    order = ("LLM", "hybrid, unsorted", "hybrid", "hybrid, overlapped", "exported", "exported, overlapped")
    names = [name for name in order if name in names]
    for pair, result in results.items():
        shown = {"smollm2": "SmolLM2-135M, its top 4 layers", "t5": "T5-v1.1-large, small"}[pair]
        for task, contestants in result["figures"].items():
            own = {name.removesuffix(", one call"): row for name, row in contestants.items()}
            cells = []
            for name in names:
                ratio = f" ({own[name]['times_llm']:.1f} x)" if name in own and name != "LLM" else ""
                cells.append(f"{own[name]['tokens_per_second']:.0f}{ratio}" if name in own else "-")
            rows.append([f"{shown}: {task}", *cells])
    return table(["tokens/s, and times the LLM", *names], rows)


def quality_summary() -> str:
    """Of the main tables of `quality.py`, the rows that a user should know."""
    return quality({row.name for rows in MAIN.values() for row in rows if row.in_summary})


def quality(names: Collection[str] | None = None) -> str:
    """The main tables of `quality.py`, or some of their rows."""
    figures, speeds = read("quality/tables.json")["main"], read_speed(RESULTS / "quality" / "speed.json")
    if names is not None:
        figures = {task: {name: rows[name] for name in rows if name in names} for task, rows in figures.items()}
    return "\n\n".join(
        f"{title}:\n\n{main_table(task, figures[task], speeds)}\n\n{verdicts(task, figures[task], speeds)}".rstrip()
        for task, title in QUALITY_TASKS.items()
        if figures[task]
    )


def quality_machines() -> str:
    """The speeds beside the main tables, and what the same came to on a processor of less."""
    above, below = (read(f"quality/{name}.json") for name in ("speed", "speed_avx2"))
    parts = []
    for task, title in QUALITY_TASKS.items():
        rows: dict[str, list[str]] = {}  # of those that are as fast, the first
        for row in MAIN[task]:
            figures = [stored[task]["figures"][row.name] for stored in (above, below)]
            cells = [f"{own[name]:.2f}" for name in (DECODING, ALIKE) for own in figures]
            if row.cells[0].contestant in (SLM, HYBRID):
                rows.setdefault(repr(figures), [row.name, *cells])
        names = ["decoding, x the LLM", "above", "AVX2", "above, alike", "AVX2, alike"]
        parts.append(f"{title}:\n\n" + table(names, list(rows.values())))
    return "\n\n".join(parts) + f"\n\n{where(below['synopsis'])}."


def ablations() -> str:
    """What one factor at a time changes."""
    figures = read("quality/tables.json")["ablations"]
    return "\n\n".join(
        f"{QUALITY_TASKS[task]}:\n\n{ablation_table(task, own)}" for task, own in figures.items() if own
    )


BLOCKS: dict[str, Callable[[], str]] = {
    "training": training,
    "demo": demo,
    "overhead": overhead,
    "few-rows": few_rows,
    "speed": speed,
    "exports": exports,
    "lossless": lossless,
    "estimates": estimates,
    "serving": serving,
    "quality": quality,
    "quality-summary": quality_summary,
    "quality-machines": quality_machines,
    "ablations": ablations,
}


def with_figures(text: str) -> str:
    """A document with its blocks made anew."""
    return BLOCK.sub(lambda match: f"{match[1]}{BLOCKS[match[2]]()}\n{match[3]}", text)


if __name__ == "__main__":
    for file in (PROJECT / "README.md", PROJECT / "benchmarks" / "quality.md"):
        file.write_text(with_figures(file.read_text(encoding="utf-8")), encoding="utf-8")
