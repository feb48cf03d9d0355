"""Tokens per second of the contestants of the main tables, all in one run and in float32."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

from quality_cells import SLM, TUNED, Cell
from quality_models import contestant_for, rows_for
from quality_tables import MAIN, teacher_cell

from transformers_llm2slm.few_rows import few_row_linears
from transformers_llm2slm.measurements import provenance
from transformers_llm2slm.speed import measure_speed

NEW_TOKENS = 32
DECODING = "decoding, times the LLM"
ALIKE = "decoding, times the LLM with the same linear layers"


def read_speed(file: pathlib.Path) -> dict[str, Any]:
    """Figures by task and row, of what was measured into a file."""
    stored = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    return {task: own["figures"] for task, own in stored.items()}


def measure(file: pathlib.Path, tasks: Sequence[str], rounds: int) -> None:
    """
    Time the contestants, untrained, for speed does not depend on the weights: one prompt of median length, exactly 32 tokens,
    medians of the rounds. Hybrids and SLMs write by this library's linear layers for few rows, the LLM by its own `generate`, and
    once more with these layers. Other tasks in the file stay as they are.
    """
    stored: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    settings = {"new tokens": NEW_TOKENS, "batch size": 1, "dtype": "float32", "rounds": rounds}
    for task in tasks:
        writers: dict[str, Callable[[int], Any]] = {}
        # Rows that differ in training alone are as fast; the others are compared with the first.
        trained: dict[str, Any] = {"rows": 0, "steps": 0, "heal_steps": 0, "learning_rate": 0.0, "labels": "data"}
        trained |= {"tuned_llm": False, "lora_rank": None}
        alike = {row.name: row.cells[0].with_changes(**trained) for row in MAIN[task]}
        of_cell = {cell: name for name, cell in reversed(alike.items())}
        for row in sorted(MAIN[task], key=lambda row: row.cells[0].contestant != TUNED):
            if of_cell[alike[row.name]] == row.name:
                writers[row.name] = writer(row.cells[0], few_rows=row.cells[0].contestant == SLM)
        writers[ALIKE] = writer(teacher_cell(task), few_rows=True)
        figures = measure_speed(writers, NEW_TOKENS, rounds)
        for own in figures.values():
            for name, other in ((DECODING, TUNED), (ALIKE, ALIKE)):
                own[name] = figures[other]["further token, ms"] / own["further token, ms"]
        own_figures = {name: figures[of_cell[cell]] for name, cell in alike.items()}
        made = provenance(f"python benchmarks/quality.py --speed {file.name}")
        stored[task] = {"figures": own_figures, "settings": settings} | made
        file.write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")
        print(f"{task}: " + ", ".join(f"{name} {own['tokens/s']:.1f} tokens/s" for name, own in figures.items()))


def writer(cell: Cell, few_rows: bool) -> Callable[[int], Any]:
    """Reads the validation prompt of median length and writes so many tokens, by this library's linear layers or its own; a hybrid
    has this library's of itself."""
    contestant = contestant_for(cell)
    contestant.model.float().eval()
    prompts = sorted((r["prompt"] for r in rows_for(cell, "validation", contestant.processor.llm_tokenizer)), key=len)
    middle = [prompts[len(prompts) // 2]]

    def write(count: int) -> None:
        with few_row_linears(contestant.model) if few_rows else nullcontext():
            contestant.write(middle, min_new_tokens=count, max_new_tokens=count, do_sample=False)

    return write
