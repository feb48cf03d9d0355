"""Pictures of what `speed.py` measured."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from speed_report import started

# Of each kind of contestant, by how its name begins; the first that fits counts.
COLORS = (
    ("LLM, ctranslate2", "#b45309"),
    ("LLM, bfloat16", "#475569"),
    ("LLM", "#94a3b8"),
    ("SLM alone", "#16a34a"),
    ("hybrid, onnx int8", "#7c3aed"),
    ("hybrid, onnx", "#a78bfa"),
    ("hybrid, openvino", "#db2777"),
    ("hybrid, LLM in bfloat16", "#60a5fa"),
    ("hybrid", "#2563eb"),
    ("assisted", "#f59e0b"),
    ("prompt lookup", "#d4a72c"),
)
OTHER = "#64748b"


def color(name: str) -> str:
    return next((value for start, value in COLORS if name.startswith(start)), OTHER)


def draw_all(results: dict[str, Any], output: pathlib.Path) -> list[pathlib.Path]:
    """Draw what there is beside the results' own file; returns the files."""
    pairs = {name: stored for name, stored in results["pairs"].items() if stored["cells"]}
    pictures: tuple[tuple[str, Callable[..., None], dict[str, Any]], ...] = (
        ("length", draw_length, {name: it for name, it in pairs.items() if len(lengths(it)) > 1}),
        ("memory", draw_memory, {name: it for name, it in pairs.items() if it["start-up"]}),
        ("parts", draw_parts, pairs),
    )
    written = []
    for suffix, draw, drawn in pictures:
        if drawn:
            written.append(output.with_name(f"{output.stem}_{suffix}.png"))
            columns = min(len(drawn), 2)
            rows = -(-len(drawn) // columns)
            figure = Figure(figsize=(7 * columns, 4.6 * rows), layout="constrained")
            axes: Sequence[Axes] = figure.subplots(rows, columns, squeeze=False).flat
            for axis, (name, stored) in zip(axes, drawn.items(), strict=False):
                axis.spines[["top", "right"]].set_visible(False)
                axis.set_title(name, fontsize=10, loc="left")
                draw(axis, stored)
            for axis in axes[len(drawn) :]:
                axis.set_visible(False)
            figure.savefig(written[-1], dpi=110)
    return written


def base(stored: dict[str, Any]) -> dict[str, Any]:
    """The base conditions, which are measured first."""
    return next(iter(stored["cells"].values()))


def lengths(stored: dict[str, Any]) -> list[dict[str, Any]]:
    """The cells that differ from the base at most in what is written, the shortest first."""
    fixed = {key: value for key, value in base(stored)["conditions"].items() if key != "new_tokens"}
    cells = [cell for cell in stored["cells"].values() if cell["conditions"].items() >= fixed.items()]
    return sorted(cells, key=lambda cell: cell["conditions"]["new_tokens"])


def draw_length(axis: Axes, stored: dict[str, Any]) -> None:
    """Seconds over the length of the output, with the fastest and the slowest round."""
    cells = lengths(stored)
    shared = [name for name in cells[0]["figures"] if all(name in cell["figures"] for cell in cells)]
    for name in shared:
        totals = [cell["figures"][name]["total, s"] for cell in cells]
        axis.errorbar(
            [cell["conditions"]["new_tokens"] for cell in cells],
            [total["median"] for total in totals],
            yerr=[
                [total["median"] - total["min"] for total in totals],
                [total["max"] - total["median"] for total in totals],
            ],
            label=name, color=color(name), marker="o", markersize=4, capsize=2,
        )  # fmt: skip
    written = [cell["conditions"]["new_tokens"] for cell in cells]
    axis.set_xscale("log", base=2)
    axis.set_xticks(written, labels=[str(count) for count in written])
    axis.set_yscale("log")
    axis.set_xlabel(f"tokens written (prompt of {cells[0]['conditions']['prompt_length']} tokens, one at a time)")
    axis.set_ylabel("seconds")
    axis.set_ylim(top=axis.get_ylim()[1] * 3)  # room for the names
    axis.grid(axis="y", alpha=0.3)
    axis.legend(frameon=False, fontsize=8, loc="upper left", ncols=2)


def draw_memory(axis: Axes, stored: dict[str, Any]) -> None:
    """Tokens per second over peak memory: the upper left is best."""
    cell = base(stored)
    points = {
        name: (start["peak memory, bytes"] / 1e9, row["tokens/s"]["median"])
        for name, row in cell["figures"].items()
        if (start := started(stored, name)) is not None
    }
    # Whom nobody beats in both.
    best = sorted(
        (memory, speed)
        for memory, speed in points.values()
        if not any(m <= memory and s >= speed and (m, s) != (memory, speed) for m, s in points.values())
    )
    axis.plot([memory for memory, _ in best], [speed for _, speed in best], color="#cbd5e1", zorder=0)
    axis.set_yscale("log")
    # Points lie close together, so their names stand beside the picture, the fastest on top.
    for rank, (name, point) in enumerate(sorted(points.items(), key=lambda item: item[1][1])):
        axis.scatter(*point, color=color(name), s=40)
        axis.annotate(
            name, point, xytext=(1.04, rank / max(len(points) - 1, 1)), textcoords="axes fraction", fontsize=8, va="center",
            color=color(name), arrowprops={"arrowstyle": "-", "color": color(name), "alpha": 0.35, "linewidth": 0.7},
        )  # fmt: skip
    axis.margins(x=0.1, y=0.1)
    axis.set_xlim(left=0)
    axis.set_xlabel("peak memory of a process with it alone, GB")
    axis.set_ylabel("tokens per second")
    axis.grid(alpha=0.3)


def draw_parts(axis: Axes, stored: dict[str, Any]) -> None:
    """Where the time goes: encoding, what else there is to the first token, and the others."""
    figures, conditions = base(stored)["figures"], base(stored)["conditions"]
    names = sorted(figures, key=lambda name: -figures[name]["total, s"]["median"])

    def medians(key: str) -> list[float]:
        return [figures[name].get(key, {"median": 0.0})["median"] for name in names]

    encode, first, total = medians("encode, s"), medians("first token, s"), medians("total, s")
    encode = [min(e, f) for e, f in zip(encode, first, strict=True)]
    reading = [f - e for e, f in zip(encode, first, strict=True)]
    further = [max(t - f, 0.0) for f, t in zip(first, total, strict=True)]
    axis.barh(names, encode, color="#0f766e", label="LLM encodes, projector")
    axis.barh(names, reading, left=encode, color="#5eead4", label="reading, first token")
    bars = axis.barh(names, further, left=first, color="#cbd5e1", label="further tokens")
    axis.bar_label(bars, labels=[f"{seconds:.2f} s" for seconds in total], padding=4, fontsize=8)
    for label in axis.get_yticklabels():
        label.set_color(color(label.get_text()))
        label.set_fontsize(8)
    axis.margins(x=0.15)
    axis.set_xlabel(f"seconds for {conditions['new_tokens']} tokens after {conditions['prompt_length']}")
    axis.legend(frameon=False, fontsize=8, loc="upper right")
