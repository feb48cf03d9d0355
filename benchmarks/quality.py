#!/usr/bin/env python3
"""
Quality: LLM, SLM alone and LLM-to-SLM, trained and measured on real text, with what each setting changes.

    python benchmarks/quality.py                        # whatever is missing of all tables
    python benchmarks/quality.py --table main --task synopsis
    python benchmarks/quality.py --list                 # the cells, and which of them are there
    python benchmarks/quality.py --reproduce            # one row of the main table once more, beside the stored one
    python benchmarks/quality.py --speed                # tokens per second of the main table's contestants
    python benchmarks/quality.py --report               # tables and plots from what is there; also done at the end

Two tasks: descriptions of software packages to one line (synopsis), and English to German (ddtp-de). A cell is one contestant
with one setting and one seed; its settings, metrics, losses on the way and generated answers go to
`results/quality/TASK/NAME.json` when it is done, so an interrupted run goes on where it was. Test rows are read for the main
table alone, ablations are measured on validation rows. Cached LLM states, the fine-tuned LLMs (teachers) and what else is made
on the way lie in the work folder. Frozen LLMs and autocast are in bfloat16 where the machine is faster in it, as it was for all
results that do not say otherwise, else in float32.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
import tempfile
import time
from typing import Any

import quality_report
import quality_speed
from quality_cells import TASKS, Cell
from quality_tables import TABLES, cells_of, reproduced, teacher_cell
from quality_training import run
from transformers.utils import logging

from transformers_llm2slm.measurements import provenance

RESULTS = pathlib.Path(__file__).resolve().parent / "results" / "quality"
WORK = pathlib.Path(__file__).resolve().parent.parent / "quality_work"


def file_of(cell: Cell) -> pathlib.Path:
    return RESULTS / cell.task / f"{cell.name}.json"


def measure(cell: Cell, work_dir: pathlib.Path) -> dict[str, Any]:
    """Run a cell; of the teacher the weights are kept, for others to learn from."""

    def teacher() -> pathlib.Path:
        tuned = teacher_cell(cell.task)
        if not teacher_folder(tuned, work_dir).exists():
            print(f"first its teacher, {tuned.name}", flush=True)
            complete(tuned, work_dir)
        return teacher_folder(tuned, work_dir)

    result, model = run(cell, work_dir, teacher)
    if cell == teacher_cell(cell.task):
        model.bfloat16().save_pretrained(teacher_folder(cell, work_dir))
    return result | provenance("python benchmarks/quality.py", "datasets", "rouge-score", "sacrebleu")


def teacher_folder(cell: Cell, work_dir: pathlib.Path) -> pathlib.Path:
    return work_dir / "teachers" / f"{cell.task}_{cell.name}"


def complete(cell: Cell, work_dir: pathlib.Path) -> None:
    """Run a cell and write its results."""
    began = time.perf_counter()
    print(f"{cell.task}: {cell.name}", flush=True)
    result = measure(cell, work_dir)
    file = file_of(cell)
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    part.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    part.replace(file)
    print(f"  {told(result)}, {time.perf_counter() - began:.0f} s", flush=True)


def told(result: dict[str, Any]) -> str:
    return ", ".join(
        f"{name} {result['metrics'][name]:.2f}"
        for name in ("rougeL", "chrf", "bleu", "loss")
        if name in result["metrics"]
    )


def reproduce(task: str, work_dir: pathlib.Path) -> None:
    """Train one row of the main table again, and print it beside the stored one."""
    cell = reproduced(task)
    stored = json.loads(file_of(cell).read_text(encoding="utf-8"))
    print(f"{task}: {cell.name}, stored from {stored['date']}", flush=True)
    result = measure(cell, work_dir)
    print(f"{'':10}{'stored':>10}{'now':>10}")
    for name, value in stored["metrics"].items():
        print(f"{name:10}{value:10.2f}{result['metrics'][name]:10.2f}")
    equal = sum(a == b for a, b in zip(stored["answers"], result["answers"], strict=True))
    print(f"{equal} of {len(result['answers'])} answers are the same.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--task", choices=TASKS, action="append", help="of this task only; repeatable")
    parser.add_argument("--table", choices=TABLES, action="append", help="of this table only; repeatable")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no cell later than this")
    parser.add_argument("--list", action="store_true", help="list the cells")
    parser.add_argument("--report", action="store_true", help="write tables and plots from what is there")
    parser.add_argument(
        "--speed",
        nargs="?",
        const="speed.json",
        metavar="FILE",
        help="measure the speed of the main table's contestants, into this file of the results, speed.json by default",
    )
    parser.add_argument("--rounds", type=int, default=5, help="rounds of the speed measurement, 5 by default")
    parser.add_argument("--reproduce", action="store_true", help="one row of the main table beside the stored one")
    parser.add_argument("--work-dir", type=pathlib.Path, default=WORK, help="folder for states and checkpoints")
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    began = time.perf_counter()
    if options.reproduce:
        for task in options.task or ("synopsis",):
            with tempfile.TemporaryDirectory() as folder:
                reproduce(task, pathlib.Path(folder))
        return
    cells = cells_of(options.table or tuple(TABLES), options.task or tuple(TASKS))
    if options.list:
        for cell in cells:
            print(f"{'done ' if file_of(cell).exists() else 'to do'} {cell.task}: {cell.name}")
        return
    if options.speed:
        quality_speed.measure(RESULTS / options.speed, options.task or tuple(TASKS), options.rounds)
    elif not options.report:
        for cell in cells:
            if not file_of(cell).exists():
                if time.perf_counter() - began > 60 * options.minutes:
                    sys.exit("The time is up; run it again for the cells that are missing.")
                complete(cell, options.work_dir)
    quality_report.write(RESULTS)


if __name__ == "__main__":
    main()
