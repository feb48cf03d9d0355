#!/usr/bin/env python3
"""
How much each layer of the LLM changes what passes through it: what the cut SLMs of `quality.py` are chosen by.

    python benchmarks/block_influence.py

Block influence (Men et al., 2024, arXiv 2403.03853): 1 - cosine of a token's state before a layer and behind it. The mean over the
tokens of the answers to validation rows of the synopses, by the untrained LLM. Writes `results/quality/block_influence.json`.
"""

from __future__ import annotations

import json

import torch
from quality_cells import SMOLLM2, ZERO_SHOT, Cell
from quality_models import PROJECT, contestant_for, rows_for
from torch.nn.functional import cosine_similarity
from transformers.utils import logging

from transformers_llm2slm.measurements import provenance

TASK, ROWS = "synopsis", 48


@torch.no_grad()
def block_influence() -> list[float]:
    """For each layer, the first one first."""
    cell = Cell(TASK, ZERO_SHOT, split="validation")
    contestant = contestant_for(cell)
    model = contestant.model.float().eval()
    changes = []
    for row in rows_for(cell, cell.split, contestant.processor.llm_tokenizer)[:ROWS]:
        batch = contestant.collator([row])
        answer = (batch.pop("labels") != -100).sum()
        # The last state of a decoder has passed its final norm as well, so the last layer's is what goes into that.
        states: list[torch.Tensor] = []
        hook = model.model.norm.register_forward_pre_hook(lambda _, inputs, states=states: states.append(inputs[0]))
        states = [*model(**batch, output_hidden_states=True).hidden_states[:-1], *states]
        hook.remove()
        kept = [state[0, -answer:] for state in states]
        changes.append(
            torch.stack([1 - cosine_similarity(a, b, dim=-1) for a, b in zip(kept, kept[1:], strict=False)])
        )
    return torch.cat(changes, dim=1).mean(dim=1).tolist()


if __name__ == "__main__":
    logging.set_verbosity_error()
    influence = block_influence()
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
