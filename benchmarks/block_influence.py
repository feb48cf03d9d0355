#!/usr/bin/env python3
"""
How much each layer of the LLM changes what passes through it: what the cut SLMs of `quality.py` are chosen by.

    python benchmarks/block_influence.py

The untrained LLM, on validation rows of the synopses. Writes `results/quality/block_influence.json`.
"""

from __future__ import annotations

import json

from quality_cells import SMOLLM2, ZERO_SHOT, Cell
from quality_models import PROJECT, contestant_for, rows_for
from transformers.utils import logging

from transformers_llm2slm import block_influence
from transformers_llm2slm.measurements import provenance

TASK, ROWS = "synopsis", 48


if __name__ == "__main__":
    logging.set_verbosity_error()
    cell = Cell(TASK, ZERO_SHOT, split="validation")
    contestant = contestant_for(cell)
    tokenizer = contestant.processor.llm_tokenizer
    rows = rows_for(cell, cell.split, tokenizer)[:ROWS]
    influence = block_influence(contestant.model.float(), tokenizer, rows)
    order = sorted(range(len(influence)), key=lambda layer: -influence[layer])
    result = {
        "llm": SMOLLM2,
        "data": f"{TASK}-validation.jsonl.gz, {ROWS} rows",
        "influence": [round(value, 4) for value in influence],
        "order": order,
    }
    file = PROJECT / "benchmarks" / "results" / "quality" / "block_influence.json"
    file.write_text(json.dumps(result | provenance("python benchmarks/block_influence.py"), indent=1) + "\n")
    print(", ".join(f"{layer} ({influence[layer]:.3f})" for layer in order))
