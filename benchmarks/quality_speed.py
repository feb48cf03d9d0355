"""Tokens per second of the contestants of the main tables, all in one run and in float32."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from quality_cells import HYBRID, TUNED, Cell
from quality_models import contestant_for, rows_for
from quality_tables import MAIN

from transformers_llm2slm.measurements import provenance
from transformers_llm2slm.speed import measure_speed
from transformers_llm2slm.structure import lay_out_for_decoding

NEW_TOKENS = 32
LAID_OUT = "decoding after to_decoding_layout, times the LLM"


def measure(folder: pathlib.Path, tasks: Sequence[str], rounds: int) -> None:
    """
    Time the contestants, untrained, for speed does not depend on the weights: one prompt of median length, exactly 32 tokens,
    medians of the rounds; each as it is loaded and in the layout for decoding. Writes `speed.json`, and leaves other tasks in it as
    they are.
    """
    file = folder / "speed.json"
    stored: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"figures": {}}
    for task in tasks:
        writers: dict[str, Callable[[int], Any]] = {}
        # Rows that differ in training alone are as fast; the others are compared with the first.
        trained: dict[str, Any] = {"rows": 0, "steps": 0, "heal_steps": 0, "learning_rate": 0.0, "labels": "data"}
        trained |= {"tuned_llm": False, "lora_rank": None}
        alike = {row.name: row.cells[0].with_changes(**trained) for row in MAIN[task]}
        of_cell = {cell: name for name, cell in reversed(alike.items())}
        for row in sorted(MAIN[task], key=lambda row: row.cells[0].contestant != TUNED):
            if of_cell[alike[row.name]] == row.name:
                writers[row.name] = writer(row.cells[0])
                writers[f"{row.name}, laid out"] = writer(row.cells[0], lay_out=True)
        figures = measure_speed(writers, NEW_TOKENS, rounds)
        llm = figures[next(iter(writers))]["further token, ms"]
        for own in figures.values():
            own["decoding, times the LLM"] = llm / own["further token, ms"]
        stored["figures"][task] = {
            name: figures[of_cell[cell]] | {LAID_OUT: figures[f"{of_cell[cell]}, laid out"]["decoding, times the LLM"]}
            for name, cell in alike.items()
        }
        print(f"{task}: " + ", ".join(f"{name} {own['tokens/s']:.1f} tokens/s" for name, own in figures.items()))
    settings = {"new tokens": NEW_TOKENS, "batch size": 1, "dtype": "float32", "rounds": rounds}
    stored |= {"settings": settings} | provenance("python benchmarks/quality.py --speed")
    file.write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")


def writer(cell: Cell, lay_out: bool = False) -> Callable[[int], Any]:
    """Reads the validation prompt of median length and writes so many tokens, laid out for decoding or not."""
    contestant = contestant_for(cell)
    contestant.model.float().eval()
    if lay_out and cell.contestant == HYBRID:
        contestant.model.to_decoding_layout()
    elif lay_out:
        lay_out_for_decoding(contestant.model)
    prompts = sorted((r["prompt"] for r in rows_for(cell, "validation", contestant.processor.llm_tokenizer)), key=len)
    middle = [prompts[len(prompts) // 2]]

    def write(count: int) -> None:
        contestant.write(middle, min_new_tokens=count, max_new_tokens=count, do_sample=False)

    return write
