"""What `speed.py` measured, beside its targets and as tables."""

from __future__ import annotations

import statistics
from typing import Any

from speed_pairs import T5_PAIR

from transformers_llm2slm.cli.bench import COLUMNS
from transformers_llm2slm.contestants import ENCODE, HYBRID, LLM, LOOKUP, SLM, TOTAL

LLM_BF16, HYBRID_BF16, CT2, COMPILED = (
    "LLM, bfloat16",
    "hybrid, LLM in bfloat16",
    "LLM, ctranslate2 int8",
    "SLM alone, compiled",
)
# By the linear layers that the hybrid writes with.
LLM_ALIKE = "LLM, linear layers of the hybrid"
# What is started in the place of contestants that differ from it in an argument alone.
MADE_OF = {LOOKUP: LLM, LLM_ALIKE: LLM, COMPILED: SLM}
OVERHEAD_TARGET, LIMIT_TARGET = 1.03, 1.6


def assisted_name(rate: float) -> str:
    return f"assisted, {rate:.0%} accepted"


def started(stored: dict[str, Any], name: str) -> dict[str, Any] | None:
    """The start-up of a contestant, or of what it is made of."""
    name = "assisted" if name.startswith("assisted") else MADE_OF.get(name, name)
    return stored["start-up"].get(name)


# Targets -------------------------------------------------------------------------------------------------------------
def checks(results: dict[str, Any], pairs: list[str]) -> list[dict[str, Any]]:
    """
    The targets, by what was measured in the base: for every pair, what the hybrid costs beyond its parts; for the pair of
    T5, how many times as fast it is as others, and how near the limit a bare step of the SLM comes in each precision.
    `value` is a median of the ratios within a round, `None` if not measured.
    """
    found = []

    def check(pair: str, name: str, values: list[float] | None, target: float, at_most: bool = False) -> None:
        value = None if values is None else statistics.median(values)
        holds = value is not None and (value <= target if at_most else value >= target)
        sign = "at most" if at_most else "at least"
        found.append({"pair": pair, "check": name, "value": value, "target": f"{sign} {target:g}", "holds": holds})

    for pair in pairs:
        measured = results["pairs"].get(pair, {}).get("cells", {})
        seconds = next(iter(measured.values()), {"seconds": {}})["seconds"]

        def times(slow: str, fast: str, seconds: dict[str, Any] = seconds) -> list[float] | None:
            if slow not in seconds or fast not in seconds:
                return None
            return [s / f for s, f in zip(seconds[slow][TOTAL], seconds[fast][TOTAL], strict=True)]

        hybrid = HYBRID if HYBRID in seconds else HYBRID_BF16
        overhead = None
        if hybrid in seconds and SLM in seconds:
            parts = zip(seconds[hybrid][ENCODE], seconds[SLM][TOTAL], strict=True)
            overhead = [
                whole / (encode + slm) for whole, (encode, slm) in zip(seconds[hybrid][TOTAL], parts, strict=True)
            ]
        check(pair, "hybrid over encode + SLM", overhead, OVERHEAD_TARGET, at_most=True)
        if pair != T5_PAIR:
            continue
        names = [name for name in seconds if name.startswith(HYBRID)]
        fastest = min(names, key=lambda name: statistics.median(seconds[name][TOTAL]), default=HYBRID)  # noqa: B023
        check(pair, "hybrid beside the LLM", times(LLM, HYBRID), 5)
        check(pair, "hybrid beside assisted at 70 %", times(assisted_name(0.7), HYBRID), 2.5)
        check(pair, f"fastest hybrid ({fastest}) beside the LLM", times(LLM, fastest), 8)
        check(pair, f"fastest hybrid ({fastest}) beside the LLM in CTranslate2 int8", times(CT2, fastest), 2.5)
        table = results["pairs"].get(pair, {}).get("steps", {}).get("table", {})
        for precision in ("float32", "int8"):
            bare = {name: row["bare, times the limit"] for name, row in table.items() if name.endswith(precision)}
            nearest = min(bare, key=bare.__getitem__, default="none exported")
            limit = [bare[nearest]] if bare else None
            check(pair, f"step in {precision} ({nearest}) over its limit", limit, LIMIT_TARGET, at_most=True)
    return found


# Tables --------------------------------------------------------------------------------------------------------------
def show(results: dict[str, Any]) -> None:
    """Print the tables: milliseconds and MB where nothing else is said, medians with least and greatest."""
    for pair, stored in results["pairs"].items():
        print(f"\n{pair} ({', '.join(f'{name}: {source}' for name, source in stored.get('models', {}).items())})")
        bandwidth = stored["steps"].get("bandwidth, bytes/s", {}).get("median")
        for index, (cell, measured) in enumerate(stored["cells"].items()):
            threads = measured["machine"]["threads"]
            print(f"\n  {cell}: medians of {measured['rounds']} rounds, {threads} threads")
            headings = "".join(f"{heading:>9}" for _, heading, *_ in COLUMNS)
            print(f"  {'':30}{headings}{'min-max':>14}{'x limit':>9}{'accepted':>9}{'MB':>8}{'disk, MB':>9}")
            for name, row in measured["figures"].items():
                line = "".join(
                    f"{format(factor * row[key]['median'], style):>9}" if key in row else f"{'':9}"
                    for key, _, factor, style in COLUMNS
                )
                total = row["total, s"]
                line += f"{1000 * total['min']:.0f}-{1000 * total['max']:.0f}".rjust(14)
                least = measured["step bytes"].get(name)
                line += f"{row['token, s']['median'] * bandwidth / least:9.2f}" if least and bandwidth else f"{'':9}"
                rate = measured["accepted"].get(name)
                line += f"{rate:9.0%}" if rate is not None else f"{'':9}"
                start = started(stored, name) if index == 0 else None
                if start:
                    line += f"{start['peak memory, bytes'] / 1e6:8.0f}{start['on disk, bytes'] / 1e6:9.0f}"
                print(f"  {name:30}{line}")
        if stored["steps"]:
            show_steps(stored["steps"])
        for where in [stored, stored["steps"], *stored["cells"].values()]:
            for name, text in where.get("failures", {}).items():
                print(f"  FAILED: {name}: {text.splitlines()[0][:200]}")
    for name, row in results.get("trained", {}).get("figures", {}).items():
        rate = row["accepted"]
        text = f"{row['tokens/s']['median']:8.1f} tokens/s{row['times the LLM']['median']:8.2f} x LLM"
        print(f"  trained: {name:20}{text}" + ("" if rate is None else f"{rate:8.0%} accepted"))
    print()
    for row in results["checks"]:
        value = "not measured" if row["value"] is None else f"{row['value']:.2f}"
        print(
            f"{'holds ' if row['holds'] else 'MISSED'} {row['pair']}: {row['check']}: {value}, wanted {row['target']}"
        )


def show_steps(steps: dict[str, Any]) -> None:
    rate = {key: value / 1e9 for key, value in steps["bandwidth, bytes/s"].items()}
    print(
        f"\n  a step of the SLM, in ms; memory read at {rate['median']:.1f} GB/s ({rate['min']:.1f}-{rate['max']:.1f})"
    )
    print(f"  {'':30}{'MB':>9}{'limit':>9}{'generate':>9}{'x limit':>9}{'bare':>9}{'x limit':>9}")
    for label, row in steps["table"].items():
        line = f"{row['bytes']['total'] / 1e6:9.1f}{1000 * row['limit, s']:9.2f}"
        for kind in ("in generate", "bare"):
            if f"{kind}, s" in row:
                line += f"{1000 * row[f'{kind}, s']['median']:9.2f}{row[f'{kind}, times the limit']:9.2f}"
        print(f"  {label:30}{line}")
