#!/usr/bin/env python3
"""Write the model cards of the checkpoints that our benchmarks train, from their recorded results: `make cards`.

No weights are trained or measured here. The model is composed anew, for its parameters and sizes to be counted; all other
figures are those of `results/*/results.json`.
"""

from __future__ import annotations

import json
import pathlib
import re
import sys
import tempfile

import datasets
from transformers import AutoModelForCausalLM
from transformers.utils import logging

PROJECT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT / "examples"))

from demo import DEFAULT_LLM, DemoArguments, card_records, compose, load_rows, write_card  # noqa: E402
from prepare_models import prepare  # noqa: E402

from transformers_llm2slm import LLM2SLMProcessor  # noqa: E402

NAME = "llm2slm-smollm2-135m-synopsis"


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
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = pathlib.Path(folder, NAME)
        model.save_pretrained(checkpoint)
        records = card_records(results, len(processor(text=middle)["input_ids"]))
        card = write_card(checkpoint, model, arguments, prompts[0], records).read_text(encoding="utf-8")
    # These files have the sizes of those that were trained, and other weights.
    card_file.write_text(re.sub(r" weights=[\w:.-]+ -->", " -->", card), encoding="utf-8")


if __name__ == "__main__":
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    write_demo_card(
        PROJECT / "benchmarks" / "results" / "demo" / "results.json", PROJECT / "model_cards" / f"{NAME}.md"
    )
