#!/usr/bin/env python3
"""Write the model cards of the checkpoints that our benchmarks train, from their recorded results: `make cards`.

No weights are trained or measured here. A model is composed anew, for its parameters and sizes to be counted; all other
figures are those of `results/demo/results.json` and of `results/quality`.
"""

from __future__ import annotations

import json
import pathlib
import re
import tempfile
from collections.abc import Callable, Iterator

import datasets
from quality_cells import HYBRID, TASKS
from quality_models import PROJECT, contestant_for, rows_for
from quality_report import COLUMNS, TITLES, results_of, shown
from quality_tables import LAYERS, MAIN, MORE, Row
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from transformers_llm2slm import LLM2SLMForConditionalGeneration, LLM2SLMProcessor
from transformers_llm2slm.measurements import QUALITY, SPEED, TRAINING, Record
from transformers_llm2slm.model_card import write_model_card
from transformers_llm2slm.speed import THIS_MODEL

# `quality_models` makes the examples importable.
from demo import (  # isort: skip
    DEFAULT_LLM,
    DEFAULT_LLM_HUB_ID,
    DemoArguments,
    card_records,
    compose,
    load_rows,
    write_card,
)
from prepare_models import prepare  # isort: skip

CARDS, RESULTS = PROJECT / "model_cards", PROJECT / "benchmarks" / "results"
NAME = "llm2slm-smollm2-135m"


def write_demo_card(results_file: pathlib.Path, card_file: pathlib.Path) -> None:
    """The card of the checkpoint that `make demo` trained when it gave these results."""
    results = json.loads(results_file.read_text(encoding="utf-8"))
    names = DemoArguments.__dataclass_fields__
    arguments = DemoArguments(**{name: value for name, value in results["settings"].items() if name in names})
    llm_path = prepare(DEFAULT_LLM, PROJECT / "models")
    processor = LLM2SLMProcessor.from_llm_slm_pretrained(llm_path, fusion="replace")
    prompts = list(load_rows(arguments, processor.llm_tokenizer)[1]["prompt"])
    middle = sorted(prompts, key=len)[len(prompts) // 2]  # the one that speed was measured on
    llm = AutoModelForCausalLM.from_pretrained(llm_path, dtype="bfloat16")
    # On some prompts, as a fitted vocabulary has embeddings and head of its own.
    model = compose(llm, arguments, processor, prompts[:8])

    def write(checkpoint: pathlib.Path) -> pathlib.Path:
        records = card_records(results, len(processor(text=middle)["input_ids"]))
        return write_card(checkpoint, model, arguments, prompts[0], records)

    write_without_weights(card_file, model, write)


def quality_cards() -> Iterator[tuple[pathlib.Path, Row]]:
    """The card of each hybrid of the table of quality that has been trained, and its row; a shortlist makes no other checkpoint."""
    for task, rows in MAIN.items():
        for row in rows:
            cell = row.cells[0]
            if cell.contestant == HYBRID and not cell.shortlist and results_of(row, RESULTS / "quality"):
                tuned = "-tuned-llm" if cell.tuned_llm else ""
                count = len(cell.slm_layers) if isinstance(cell.slm_layers, tuple) else cell.slm_layers
                layers = "" if count == LAYERS else f"-{count}-layers"
                healed = "-healed" if cell.heal_steps else ""
                labels = "-llm-labels" if cell.labels == "llm" else ""
                rows_too = f"-{cell.rows}-rows" if cell.rows == MORE["rows"] else ""
                yield CARDS / f"{NAME}-{task}-{cell.fusion}{tuned}{layers}{healed}{labels}{rows_too}.md", row


def write_quality_card(row: Row, card_file: pathlib.Path) -> None:
    """The card of a hybrid of the table of quality, by its first seed."""
    cell = row.cells[0]
    contestant = contestant_for(cell)
    example = rows_for(cell, cell.split, contestant.processor.llm_tokenizer)[0]["prompt"]

    def write(checkpoint: pathlib.Path) -> pathlib.Path:
        return write_model_card(
            checkpoint,
            contestant.model,
            limits=["It was trained for minutes, to compare ways of training. Its weights are not published."],
            example=example,
            base_model=DEFAULT_LLM_HUB_ID,
            records=quality_records(row),
        )

    write_without_weights(card_file, contestant.model, write)


def write_without_weights(
    card_file: pathlib.Path, model: LLM2SLMForConditionalGeneration, write: Callable[[pathlib.Path], pathlib.Path]
) -> None:
    """Let a card be written beside a checkpoint of that name, and keep the card alone."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = pathlib.Path(folder, card_file.stem)
        model.save_pretrained(checkpoint)
        card = write(checkpoint).read_text(encoding="utf-8")
    # These files have the sizes of those that were trained, and other weights.
    card_file.write_text(re.sub(r" weights=[\w:.-]+ -->", " -->", card), encoding="utf-8")


def quality_records(row: Row) -> list[Record]:
    """What `quality.py` recorded of a row of its main table, as records for a model card."""
    cell = row.cells[0]
    found = {other.name: results for other in MAIN[cell.task] if (results := results_of(other, RESULTS / "quality"))}
    first, count = found[row.name][0], len(found[row.name])
    tables, speed = (
        json.loads((RESULTS / "quality" / name).read_text(encoding="utf-8")) for name in ("tables.json", "speed.json")
    )
    speed = speed[cell.task]
    figures = tables["main"][cell.task][row.name]
    task, judged = TASKS[cell.task], TITLES[TASKS[cell.task].score]
    columns = {name: name for name in COLUMNS[cell.task]} | {"loss": "loss per token"}
    scores = {
        name: {column: results[0]["metrics"][key] for key, column in columns.items() if key in results[0]["metrics"]}
        for name, results in found.items()
    }
    training = {
        "trained": "projector and the SLM's layers; its embeddings and LM head are the LLM's",
        "rows": cell.rows,
        "steps": cell.steps,
        "rows in a step": cell.batch_size,
        "learning rate": cell.learning_rate,
        "schedule": "cosine, the first tenth of the steps warming up",
        "optimizer": "AdamW without weight decay",
        "bfloat16 autocast": first.get("bfloat16", True),  # so were all that do not say
        "prompts": f"at most {cell.prompt_length} tokens, then {task.suffix!r}",
        "answers": f"at most {task.max_new_tokens} tokens",
        "seed": cell.seed,
    }
    files = f"{cell.task}-train.jsonl.gz"
    if cell.rows == MORE["rows"]:
        files += f" and {cell.task}-train-more.jsonl.gz"
    if cell.tuned_llm:
        training["LLM"] = "fine-tuned in full on the same rows first; then it is frozen, and the SLM is cut from it"
    if cell.heal_steps:
        training["healed"] = (
            f"in {cell.heal_steps} steps before, on the prompts' own text: what begins one is read, the rest written"
        )
    if cell.labels == "llm":
        training["labels"] = "what the fine-tuned LLM wrote for the prompts"
    note = (
        f"The figures of one seed each. The mean of {count} seeds of this model is {judged} {figures['scores'][task.score]} "
        f"({shown(figures['interval'])}, paired bootstrap over the rows, 95 %). The others are trained on the same task; where "
        "they differ, their names say how."
    )
    made = ("command", "date", "machine", "versions")
    by, speed_by = ({name: record[name] for name in made} for record in (first, speed))
    return [
        {"kind": TRAINING, "data": {"name": files}, "settings": training, **by},
        {
            "kind": QUALITY,
            "data": {"name": f"{cell.task}-test.jsonl.gz", "rows": len(first["answers"])},
            "metrics": scores.pop(row.name),
            "beside": scores,
            "note": note,
            **by,
        },
        {
            "kind": SPEED,
            "settings": speed["settings"],
            "figures": {THIS_MODEL if name == row.name else name: own for name, own in speed["figures"].items()},
            **speed_by,
        },
    ]


if __name__ == "__main__":
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    write_demo_card(RESULTS / "demo" / "results.json", CARDS / f"{NAME}-synopsis.md")
    for file, row in quality_cards():
        write_quality_card(row, file)
