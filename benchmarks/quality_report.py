"""Tables, plots and the page of results that `quality.py` makes of its cells."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from quality_cells import HYBRID, TASKS, TUNED, Cell
from quality_models import read_rows
from quality_scores import Interval, RowScores, interval
from quality_speed import ALIKE, DECODING, read_speed
from quality_tables import ABLATIONS, MAIN, Row

SHOWN = 20
# The paper's claim: within 2 % of the fine-tuned LLM's score, at 4 times its decoding speed.
AIM_SHARE, AIM_SPEED = 98, 4
COLUMNS = {
    "synopsis": ("rouge1", "rouge2", "rougeL", "chrf"),
    "ddtp-de": ("bleu", "chrf", "rougeL"),
}
TITLES = {"rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L", "bleu": "BLEU", "chrf": "chrF"}


# What is there -----------------------------------------------------------------------------------------------------------
def results_of(row: Row, folder: pathlib.Path) -> list[dict[str, Any]]:
    """The results of those of its seeds that have been run."""
    files = [folder / cell.task / f"{cell.name}.json" for cell in row.cells]
    return [json.loads(file.read_text(encoding="utf-8")) for file in files if file.exists()]


def references_of(cell: Cell) -> list[str]:
    return [" ".join(row["completion"].split()) for row in read_rows(cell.task, cell.split)]


def figures_of(rows: Sequence[Row], folder: pathlib.Path) -> tuple[dict[str, dict[str, Any]], dict[str, RowScores]]:
    """For each row that has results: mean `scores` over its seeds, their `spread`, `seeds`, `loss` and `parameters`; and what
    intervals are made of."""
    figures: dict[str, dict[str, Any]] = {}
    scores: dict[str, RowScores] = {}
    for row in rows:
        if not (results := results_of(row, folder)):
            continue
        cell = row.cells[0]
        own = scores[row.name] = RowScores([result["answers"] for result in results], references_of(cell))
        losses = [result["metrics"]["loss"] for result in results if "loss" in result["metrics"]]
        single = [result["metrics"][TASKS[cell.task].score] for result in results]
        figures[row.name] = {
            "seeds": len(results),
            "parameters": results[0]["parameters"],
            "scores": {name: round(own.on(name), 2) for name in COLUMNS[cell.task]},
            "spread": [round(min(single), 2), round(max(single), 2)],
            "loss": round(float(np.mean(losses)), 3) if losses else None,
        }
    return figures, scores


def difference(own: RowScores, other: RowScores, judged: str) -> Callable[[np.ndarray], float]:
    """Of two rows' scores, on drawn test rows."""
    return lambda chosen: own.on(judged, chosen) - other.on(judged, chosen)


def ablation_figures(rows: Sequence[Row], folder: pathlib.Path) -> dict[str, dict[str, Any]]:
    """[`figures_of`] rows, and each one's `change` from the first, with its interval."""
    figures, scores = figures_of(rows, folder)
    cell = rows[0].cells[0]
    judged, count = TASKS[cell.task].score, len(references_of(cell))
    if rows[0].name not in figures:
        return {}
    for name, entry in figures.items():
        if name != rows[0].name:
            change = difference(scores[name], scores[rows[0].name], judged)
            entry["change"] = round(change(np.arange(count)), 2)
            entry["change, interval"] = rounded(interval(change, count))
    return figures


def main_figures(rows: Sequence[Row], folder: pathlib.Path) -> dict[str, dict[str, Any]]:
    """
    [`figures_of`] rows, with the interval of the task's score and, of a hybrid, its difference to the SLM alone that it is
    compared with, and the share of the gap from there to the fine-tuned LLM that is closed.
    """
    figures, scores = figures_of(rows, folder)
    if not figures:
        return figures
    judged, count = TASKS[rows[0].cells[0].task].score, len(references_of(rows[0].cells[0]))
    tuned = scores.get(TUNED)
    for row in rows:
        if row.name not in figures:
            continue
        own, entry = scores[row.name], figures[row.name]
        alone = scores.get(row.beside) if row.beside else None
        entry["interval"] = rounded(interval(lambda chosen, own=own: own.on(judged, chosen), count))
        if row.cells[0].contestant != HYBRID:
            continue
        if tuned is not None:
            entry["of the LLM's score, %"] = round(100 * own.on(judged) / tuned.on(judged), 1)
        if alone is None:
            continue
        above = difference(own, alone, judged)
        everything = np.arange(count)
        entry["beside"] = row.beside
        entry["above the SLM alone"] = round(above(everything), 2)
        entry["above the SLM alone, interval"] = rounded(interval(above, count))
        if tuned is not None:

            def closed(chosen: np.ndarray, above: Any = above, alone: RowScores = alone) -> float:
                return 100 * above(chosen) / (tuned.on(judged, chosen) - alone.on(judged, chosen))

            entry["gap closed, %"] = round(closed(everything), 1)
            entry["gap closed, interval"] = rounded(interval(closed, count), 1)
    return figures


def rounded(values: Interval, digits: int = 2) -> list[float]:
    return [round(value, digits) for value in values]


# Text --------------------------------------------------------------------------------------------------------------------
def main_table(task: str, figures: dict[str, dict[str, Any]], speed: dict[str, Any]) -> str:
    """The main table of a task, in Markdown."""
    judged = TITLES[TASKS[task].score]
    titles = [TITLES[name] for name in COLUMNS[task]]
    header = ["", "seeds", *titles, f"{judged}, 95 %", "of single seeds", "above the SLM alone", "gap closed"]
    header += ["tokens/s", "x the LLM", "decoding, x the LLM", "alike"]
    lines = []
    for name, row in figures.items():
        own = speed.get(task, {}).get(name, {})
        lines.append(
            [
                name,
                str(row["seeds"]),
                *(f"{row['scores'][column]:.1f}" for column in COLUMNS[task]),
                shown(row["interval"]),
                shown(row["spread"]) if row["seeds"] > 1 else "",
                shown(row.get("above the SLM alone, interval"), row.get("above the SLM alone")),
                shown(row.get("gap closed, interval"), row.get("gap closed, %"), "{:.0f} %"),
                f"{own['tokens/s']:.1f}" if own else "",
                f"{own['times the LLM']:.2f}" if own else "",
                f"{own[DECODING]:.2f}" if own else "",
                f"{own[ALIKE]:.2f}" if own else "",
            ]
        )
    return table(header, lines)


def verdicts(task: str, figures: dict[str, dict[str, Any]], speed: dict[str, Any]) -> str:
    """What the main table says of each hybrid, beside what was aimed at, as a list in Markdown."""
    judged, speeds = TITLES[TASKS[task].score], speed.get(task, {})
    lines = []
    for name, row in figures.items():
        if "of the LLM's score, %" not in row or name not in speeds:
            continue
        share, decoding = row["of the LLM's score, %"], speeds[name][DECODING]
        reached = "reached" if share >= AIM_SHARE and decoding >= AIM_SPEED else "missed"
        beside = "its SLM alone has not been trained."
        if "beside" in row:
            difference, interval = row["above the SLM alone"], row["above the SLM alone, interval"]
            beside_slm = decoding / speeds[row["beside"]][DECODING]
            found = "surely above" if interval[0] > 0 else "surely below" if interval[1] < 0 else "not surely above"
            closed = shown(row["gap closed, interval"], row["gap closed, %"], "{:.0f} %")
            beside = (
                f"{found} `{row['beside']}`, {difference:+.1f} {judged} ({shown(interval)}), at {beside_slm:.2f} x its decoding "
                f"speed. It closes {closed} of the gap from there to the fine-tuned LLM."
            )
        lines.append(
            f"- `{name}`: {beside} It has {share:.1f} % of the fine-tuned LLM's score at {decoding:.2f} x its decoding speed, "
            f"{speeds[name][ALIKE]:.2f} x alike. The aim, {AIM_SHARE} % at {AIM_SPEED} x: {reached}."
        )
    return "\n".join(lines)


def ablation_table(task: str, factors: dict[str, dict[str, dict[str, Any]]]) -> str:
    """What each factor changes, in Markdown."""
    judged = TASKS[task].score
    lines = []
    for factor, rows in factors.items():
        for index, (name, row) in enumerate(rows.items()):
            change = f"{row['change']:+.1f} ({shown(row['change, interval'])})" if "change" in row else ""
            own = [f"{row['scores'][judged]:.1f}", change, f"{row['loss']:.2f}"]
            lines.append(["" if index else f"**{factor}**", name, *own])
    return table(["", "setting", TITLES[judged], "change, 95 %", "loss per token"], lines)


def shown(values: Sequence[float] | None, middle: float | None = None, form: str = "{:.1f}") -> str:
    if values is None:
        return ""
    text = " to ".join(form.format(value) for value in values)
    return text if middle is None else f"{form.format(middle)} ({text})"


def table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def answers_table(task: str, folder: pathlib.Path) -> str:
    """The references of the first test rows and what each contestant of the main table wrote, by its first seed."""
    found = {row.name: results[0]["answers"] for row in MAIN[task] if (results := results_of(row, folder))}
    references = references_of(MAIN[task][0].cells[0])
    lines = []
    for index in range(SHOWN):
        lines.append(f"{index + 1}. *{escaped(references[index])}*")
        lines += [f"    - {name}: {escaped(texts[index])}" for name, texts in found.items()]
    return "\n".join(lines)


def escaped(text: str) -> str:
    for character in "\\*_`<|":
        text = text.replace(character, f"\\{character}")
    return text


# Plots -------------------------------------------------------------------------------------------------------------------
def colors_of_rows() -> dict[str, Any]:
    """Of the rows that are drawn, those of the summary: the same in every plot and panel."""
    import matplotlib.pyplot as plt

    names = dict.fromkeys(row.name for rows in MAIN.values() for row in rows if row.in_summary)
    return dict(zip(names, plt.get_cmap("tab20").colors, strict=False))  # type: ignore[attr-defined]


def share_legend(figure: Any) -> None:
    """One legend below all panels, as names are long."""
    handles = {}
    for axis in figure.axes:
        drawn, labels = axis.get_legend_handles_labels()
        handles |= dict(zip(labels, drawn, strict=True))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=2, frameon=False, fontsize=9)


def pareto(path: pathlib.Path, figures: dict[str, dict[str, Any]], speed: dict[str, Any]) -> None:
    """Quality over speed, a panel for each task."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    tasks = [task for task in TASKS if figures.get(task) and speed.get(task)]
    if not tasks:
        return
    colors = colors_of_rows()
    figure, axes = plt.subplots(1, len(tasks), figsize=(5 * len(tasks), 4.4), layout="constrained", squeeze=False)
    for axis, task in zip(axes[0], tasks, strict=True):
        judged = TASKS[task].score
        for name in figures[task]:
            if name in speed[task] and name in colors:
                x, y = speed[task][name]["tokens/s"], figures[task][name]["scores"][judged]
                low, high = figures[task][name]["interval"]
                error = [[max(0.0, y - low)], [max(0.0, high - y)]]
                marker = "D" if name.startswith(HYBRID) else "o"
                axis.errorbar(x, y, yerr=error, fmt=marker, color=colors[name], capsize=3, label=name)
        axis.set_title(task, loc="left", fontsize=11)
        axis.set_xlabel("tokens per second, batch size 1")
        axis.set_ylabel(f"{TITLES[judged]}, 95 % interval")
        axis.set_xlim(left=0)
        axis.margins(x=0.1, y=0.1)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    share_legend(figure)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def curves(path: pathlib.Path, folder: pathlib.Path) -> None:
    """Validation loss over training steps of the main table's contestants, first seed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    tasks = [task for task in TASKS if any(results_of(row, folder) for row in MAIN[task])]
    colors = colors_of_rows()
    figure, axes = plt.subplots(1, len(tasks), figsize=(6 * len(tasks), 5), layout="constrained", squeeze=False)
    for axis, task in zip(axes[0], tasks, strict=True):
        for row in MAIN[task]:
            if row.cells[0].shortlist or row.name not in colors:  # by a shortlist it learns as without
                continue
            for result in results_of(row, folder)[:1]:
                points = [
                    (entry["step"], entry["eval_loss"])
                    for entry in result["curve"]
                    if "eval_loss" in entry and entry["part"] == "training"
                ]
                if points:
                    axis.plot(
                        *zip(*points, strict=True), marker="o", markersize=3, color=colors[row.name], label=row.name
                    )
        axis.set_title(task, loc="left", fontsize=11)
        axis.set_xlabel("training steps")
        axis.set_ylabel("validation loss per token")
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    share_legend(figure)
    figure.savefig(path, dpi=150)
    plt.close(figure)


# The page ----------------------------------------------------------------------------------------------------------------
def write(folder: pathlib.Path) -> dict[str, Any]:
    """Write `tables.json`, the plots and `README.md` into the folder of the results; returns the figures."""
    speed = read_speed(folder / "speed.json")
    figures: dict[str, Any] = {"main": {}, "ablations": {}}
    parts = ["# Quality: tables, curves and answers", "", "Made by `python benchmarks/quality.py --report`."]
    for task in TASKS:
        figures["main"][task] = main_figures(MAIN[task], folder)
        if not figures["main"][task]:
            continue
        parts += ["", f"## {task}, {len(references_of(MAIN[task][0].cells[0]))} test rows", ""]
        parts += [main_table(task, figures["main"][task], speed), "", verdicts(task, figures["main"][task], speed)]
        ablations = {factor: ablation_figures(rows, folder) for factor, rows in ABLATIONS[task].items()}
        figures["ablations"][task] = {factor: found for factor, found in ablations.items() if len(found) > 1}
        if figures["ablations"][task]:
            parts += ["", "### One factor at a time, on validation rows", ""]
            parts.append(ablation_table(task, figures["ablations"][task]))
        parts += [
            "",
            f"### Answers to the first {SHOWN} test rows, by the first seed",
            "",
            answers_table(task, folder),
        ]
    plots = {"pareto.png": "Quality over speed", "curves.png": "Validation loss over steps"}
    (folder / "tables.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    pareto(folder / "pareto.png", figures["main"], speed)
    curves(folder / "curves.png", folder)
    parts += [
        text for name, title in plots.items() if (folder / name).exists() for text in ("", f"![{title}]({name})")
    ]
    (folder / "README.md").write_text("\n".join(parts) + "\n", encoding="utf-8")
    return figures
