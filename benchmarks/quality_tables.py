"""The tables of `quality.py`: which cells stand in them, under which names."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from quality_cells import HYBRID, MINILM, MPNET, SEEDS, SLM, TASKS, TUNED, ZERO_SHOT, Cell

# The LLM's layers, those first that change most what passes through them: see block_influence.py.
INFLUENCE = pathlib.Path(__file__).resolve().parent / "results" / "quality" / "block_influence.json"
BY_INFLUENCE = json.loads(INFLUENCE.read_text(encoding="utf-8"))["order"]
STEPS = 400
# All rows that there are, each of them at most once.
MORE = {"rows": 21_000, "steps": 1300}
# Of a new SLM, which begins with random weights.
NEW_STEPS = 3000
# Of the SLM in the main table, of two that are smaller, and of the largest that a shortlist makes fast enough for the aim.
LAYERS, FAST, FEW, MANY = 8, 7, 4, 12


@dataclass(frozen=True)
class Row:
    """
    A line of a table.

    Args:
        name: What it is called.
        cells: One for each seed.
        beside: Of a hybrid: the row of the SLM alone that it is compared with, as large and trained on as many rows, if there is one.
        in_summary: Whether it stands in the README too.
    """

    name: str
    cells: tuple[Cell, ...]
    beside: str | None = SLM
    in_summary: bool = True


def seeds(cell: Cell) -> tuple[Cell, ...]:
    return tuple(cell.with_changes(seed=seed) for seed in SEEDS)


def influential(count: int) -> tuple[int, ...]:
    return tuple(sorted(BY_INFLUENCE[:count]))


def slm_alone(task: str) -> Cell:
    return Cell(task, SLM, slm_layers=influential(LAYERS), steps=STEPS)


def hybrid(task: str) -> Cell:
    return Cell(task, HYBRID, slm_layers=LAYERS, fusion="replace", steps=STEPS)


def hybrid_kv(task: str) -> Cell:
    return Cell(task, HYBRID, slm_layers=influential(LAYERS), fusion="kv", steps=STEPS)


def teacher_cell(task: str) -> Cell:
    """The fine-tuned LLM, by which others are taught."""
    return Cell(task, TUNED, steps=200, learning_rate=1e-4)


# Texts whose tokens make a shortlist, by the name of the cell's setting.
SHORTLISTS = {"answers": "answers", "prompts": "prompts and answers"}


def with_shortlists(row: Row, kinds: Sequence[str] = ()) -> list[Row]:
    """A row and those of the same models that write by a shortlist."""
    rows = [row]
    for kind in kinds:
        cells = tuple(cell.with_changes(shortlist=kind) for cell in row.cells)
        name = f"{row.name}, shortlist of {SHORTLISTS[kind]}"
        rows.append(dataclasses.replace(row, name=name, cells=cells))
    return rows


def compared(task: str, suffix: str = "", shortlists: Sequence[str] = (), **changes: Any) -> list[Row]:
    """The SLM alone and the hybrid with some settings, in all seeds."""
    alone = Row(f"{SLM}{suffix}", seeds(slm_alone(task).with_changes(**changes)))
    by_kv = Row(f"{HYBRID}{suffix}", seeds(hybrid_kv(task).with_changes(**changes)), alone.name)
    return [alone, *with_shortlists(by_kv, shortlists)]


def once(task: str, suffix: str, shortlists: Sequence[str] = (), **changes: Any) -> list[Row]:
    """The hybrid with settings that are tried in one seed, and without an SLM alone that would be trained so."""
    cell = hybrid_kv(task).with_changes(**changes)
    return with_shortlists(Row(f"{HYBRID}{suffix}", (cell,), None, in_summary=False), shortlists)


def main_rows(task: str) -> list[Row]:
    """Those that a user should know in all seeds; then others, that show what a setting does."""
    by_lora = teacher_cell(task).with_changes(lora_rank=16, learning_rate=1e-3)
    # In German answers hold no names that only the prompts know.
    shortlists = tuple(SHORTLISTS) if task == "synopsis" else ("answers",)
    # As many seeds as there was time for.
    tried = 2 if task == "synopsis" else 1
    rows = [
        Row(ZERO_SHOT, (Cell(task, ZERO_SHOT),)),
        Row(TUNED, (teacher_cell(task),)),
        *compared(task),
        *compared(task, ", tuned LLM", shortlists, tuned_llm=True),
        Row(f'{HYBRID}, fusion="replace"', seeds(hybrid(task))[:tried], in_summary=False),
    ]
    tuned: dict[str, Any] = {"tuned_llm": True}
    healed = tuned | {"heal_steps": STEPS}
    most = tuned | {"slm_layers": influential(MANY)}
    more = f"{MORE['rows']:,} rows"
    if task == "synopsis":
        return [
            *rows,
            Row(f"{TUNED} by LoRA", (by_lora,), in_summary=False),
            *once(task, f", {more}", **MORE),
            *once(task, f", {MANY} layers, tuned LLM, {more}", ["prompts"], **most, **MORE),
            *once(task, ", tuned LLM, healed, its answers", shortlists, **healed, labels="llm"),
        ]
    return [
        *rows,
        *once(task, f", {FEW} layers", slm_layers=influential(FEW)),
        *once(task, ", tuned LLM, healed", **healed),
        *once(task, f", {FAST} layers, tuned LLM, healed", shortlists, **healed, slm_layers=influential(FAST)),
    ]


def factors(task: str) -> dict[str, list[Row]]:
    """
    For each factor the setting that others are compared with first, and then what changes with others: one seed each, measured
    on validation rows. Of a cut SLM that is the best setting of the main table, in half the steps, so that all can be afforded.
    """

    def row(name: str, cell: Cell, **changes: Any) -> Row:
        return Row(name, (cell.with_changes(**changes),))

    ablated = {"tuned_llm": True, "split": "validation"}
    half = ablated | {"steps": STEPS // 2}
    best, alone, embedded = (cell.with_changes(**half) for cell in (hybrid_kv(task), slm_alone(task), hybrid(task)))
    published = hybrid_kv(task).with_changes(split="validation")
    states = embedded.with_changes(steps=STEPS // 4)
    before_a_cut = hybrid_kv(task).with_changes(
        split="validation", steps=STEPS // 2, fusion=None, projector_init="zero"
    )
    new = Cell(task, HYBRID, llm=MINILM, slm_shape="t5-256x4", steps=NEW_STEPS, split="validation")
    new_alone = Cell(task, SLM, slm_shape="t5-256x4", steps=NEW_STEPS, split="validation")

    def each_once(name: str, cell: Cell) -> list[Row]:
        """A cell, and with other numbers of rows that are read at most once."""
        numbers = (cell.steps, STEPS // 4)
        return [row(f"{name}, {steps * cell.batch_size:,} rows", cell, steps=steps) for steps in numbers]

    cut = {
        "What is handed over": [
            row("keys and values", best),
            row("the states at the cut, in place of embeddings", embedded),
            row("nothing: the SLM alone", alone),
        ],
        "LLM": [
            row("fine-tuned first", best),
            row("as published", best, tuned_llm=False),
        ],
        "Layers of the SLM": [
            row(f"{LAYERS}, by influence", best),
            *(row(f"{count}, by influence", best, slm_layers=influential(count)) for count in (FEW, MANY)),
            row(f"{LAYERS}, the upper ones", best, slm_layers=LAYERS),
        ],
        "Start of the projector": [row("identity", best), row("random", best, projector_init="random")],
        "What is trained": [
            row("SLM and projector", best),
            row("projector alone", best, freeze_slm=True),
        ],
        "Learning rate": [
            row("1e-3", best),
            row("3e-4", best, learning_rate=3e-4),
            row("2e-3", best, learning_rate=2e-3),
            row("SLM 1e-3, projector 1e-4", best, projector_learning_rate=1e-4),
        ],
        "Rows, each of them once": [*each_once("hybrid", best), *each_once("SLM alone", alone)],
        "With the LLM as published": [
            row(f"{STEPS} steps", published),
            row(f"{4 * STEPS:,} steps over the same rows", published, steps=4 * STEPS),
            row("learning rate 3e-4", published, learning_rate=3e-4),
        ],
        "Length of the prompt": [
            row("all", best),
            *(row(f"{length} tokens", best, max_prompt_length=length) for length in (20, 40)),
        ],
        "What is learnt": [
            row("the data's answers", best),
            row("the fine-tuned LLM's answers", best, labels="llm"),
            row("the data's, half of the loss from the fine-tuned LLM's logits", best, distillation_weight=0.5),
            row(f"the prompts' own text in {STEPS // 2} steps before", best, heal_steps=STEPS // 2),
            row("SLM alone, the data's answers", alone),
            row("SLM alone, the fine-tuned LLM's answers", alone, labels="llm"),
        ],
    }
    # An SLM that gets states; a fourth of the steps, as each takes several times as long.
    given_states = {
        "States: fusion": [
            row("replace", states),
            row("add, from zero", states, fusion="add", projector_init="zero"),
            row("align, from zero (of one tokenizer, the same as add)", states, fusion="align", projector_init="zero"),
            row("llm-embed", states, fusion="llm-embed"),
        ],
        "States: start of the projector": [
            row("identity", states),
            row("random", states, projector_init="random"),
            row("fit to the embeddings of the SLM", states, projector_init="fit"),
        ],
        "States: layer of the LLM": [
            row("the one below the SLM's first", states),
            row("last", states, llm_layer=30),
            row("middle", states, llm_layer=15),
            row("learned mix of four", states, llm_layer=(8, 15, 22, 30)),
        ],
        "States: projector": [
            row("2 layers, from the identity", states),
            row("1 layer", states, projector_num_layers=1),
            row("2 layers, four times as wide", states, projector_hidden_size=4 * 576),
            row("2 layers with RMS norm", states, projector_norm="rms_norm"),
        ],
    }
    fresh = {
        "LLM before the same SLM": [
            row("none: the SLM alone", alone, tuned_llm=False),
            row("SmolLM2-135M, keys and values", best, tuned_llm=False),
            row("SmolLM2-135M, its last states added, from zero", before_a_cut, fusion="add", llm_layer=30),
            row("MPNet, 109M, aligned, from zero", before_a_cut, llm=MPNET),
            row("MiniLM, 23M, aligned, from zero", before_a_cut, llm=MINILM),
        ],
        "New SLM behind MiniLM": [
            row("align", new),
            row(
                "replace, the SLM's decoder alone (cross-attention to the LLM)",
                new,
                fusion="replace",
                slm_encoder="skip",
            ),
            row("SLM alone", new_alone),
        ],
    }
    if task == "synopsis":
        return cut | given_states | fresh
    # That what was chosen by the synopses holds for another task.
    return {
        "What is handed over": cut["What is handed over"][:2],
        "LLM": cut["LLM"],
        "Layers of the SLM": [
            row(f"{LAYERS}, by influence", best),
            row(f"{LAYERS}, spread evenly", best, slm_layers=(0, 4, 8, 12, 17, 21, 25, 29)),
        ],
    }


MAIN = {task: main_rows(task) for task in TASKS}
ABLATIONS = {task: factors(task) for task in TASKS}
TABLES = ("main", "ablations")


def cells_of(tables: Sequence[str], tasks: Sequence[str]) -> list[Cell]:
    """The cells of some tables, each once, those with the first seed first."""
    rows = [row for task in tasks for row in MAIN[task] if "main" in tables]
    if "ablations" in tables:
        rows += [row for task in tasks for of_factor in ABLATIONS[task].values() for row in of_factor]
    return sorted(dict.fromkeys(cell for row in rows for cell in row.cells), key=lambda cell: cell.seed)


def reproduced(task: str) -> Cell:
    """The cell of the main table that `make quality` runs again."""
    return hybrid_kv(task)
