"""
Linear layers of few rows, in float32: how much faster as a batch of slices than as PyTorch's own product.

    python benchmarks/few_rows.py [--rounds 9] [--output benchmarks/results/few_rows.json]

The matrices are those of a T5-v1.1-small, of SmolLM2-135M and of a T5-v1.1-large; as many of each as are more than the caches
hold. In every round both products of each are timed, one after the other. The ratio is that of the medians.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics
from typing import Any

import torch
from torch.nn import functional

from transformers_llm2slm.few_rows import few_row_linear
from transformers_llm2slm.measurements import provenance
from transformers_llm2slm.speed import memory_bandwidth, seconds_of

ROWS = (1, 2, 3, 4)
MATRICES = {
    "T5-v1.1-small": ((384, 512), (512, 384), (1024, 512), (512, 1024), (32128, 512)),
    "SmolLM2-135M": ((576, 576), (192, 576), (1536, 576), (576, 1536), (49152, 576)),
    "T5-v1.1-large": ((1024, 1024), (2816, 1024), (1024, 2816), (32128, 1024)),
}
DISTINCT_BYTES = 150e6


@torch.no_grad()
def measure(shape: tuple[int, int], rows: int, rounds: int) -> dict[str, float]:
    """Seconds of a product with a matrix of `(out_features, in_features)`, medians, and their ratio."""
    size = shape[0] * shape[1] * torch.float32.itemsize
    matrices = [torch.randn(shape) for _ in range(1 + int(DISTINCT_BYTES / size))]
    hidden_states = torch.randn(1, rows, shape[1])
    seconds: dict[str, list[float]] = {"torch": [], "slices": []}
    for index in range(rounds + 1):
        for name, product in (("torch", functional.linear), ("slices", few_row_linear)):
            taken = seconds_of(lambda product=product: [product(hidden_states, matrix) for matrix in matrices])  # type: ignore[misc]
            seconds[name] += [taken / len(matrices)] if index else []
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return medians | {
        "bytes/s, torch": size / medians["torch"],
        "bytes/s, slices": size / medians["slices"],
        "ratio": medians["torch"] / medians["slices"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="rounds that are counted, 9 by default")
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("benchmarks/results/few_rows.json"))
    options = parser.parse_args()
    results: dict[str, dict[str, Any]] = {}
    print(f"{'':32}" + "".join(f"{f'{rows} row(s)':>12}" for rows in ROWS) + "   (times as fast)")
    for model, shapes in MATRICES.items():
        for shape in shapes:
            name = f"{model}, {shape[0]} x {shape[1]}"
            results[name] = {str(rows): measure(shape, rows, options.rounds) for rows in ROWS}
            print(f"{name:32}" + "".join(f"{own['ratio']:12.2f}" for own in results[name].values()), flush=True)
    report = {
        **provenance(f"python benchmarks/few_rows.py --rounds {options.rounds}"),
        "bandwidth, bytes/s": memory_bandwidth(),
        "results": results,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
