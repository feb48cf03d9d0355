"""What `test_remote_code.py` runs in an environment without the package: see `main`."""

from __future__ import annotations

import importlib.util
import json
import pathlib
import sys
from typing import Any

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSeq2SeqLM,
    AutoProcessor,
    AutoTokenizer,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    pipeline,
)

TRUST = {"trust_remote_code": True}
NEW_TOKENS = {"max_new_tokens": 6, "min_new_tokens": 6}


def generate(name: str, prompts: list[str]) -> list[list[int]]:
    """Tokens by a checkpoint's model and processor."""
    model, processor = AutoModel.from_pretrained(name, **TRUST), AutoProcessor.from_pretrained(name, **TRUST)
    return model.generate(**processor(text=prompts, padding=True, return_tensors="pt"), **NEW_TOKENS).tolist()


def load(name: str, prompts: list[str], again: str) -> dict[str, Any]:
    """What the Auto classes and the pipeline make of a checkpoint; it is saved to the folder `again`, and loaded from it."""
    pipe = pipeline("text2text-generation", model=name, **TRUST)
    parts = [auto.from_pretrained(name, **TRUST) for auto in (AutoConfig, AutoModelForSeq2SeqLM, AutoProcessor)]
    try:
        tokenizer = type(AutoTokenizer.from_pretrained(name, **TRUST)).__name__
    except ValueError as error:
        tokenizer = str(error)
    pipe.save_pretrained(again)
    return {
        "modules": sorted({type(part).__module__ for part in (*parts, pipe, pipe.model, pipe.processor)}),
        "one_class": type(parts[1]) is type(pipe.model) and type(parts[0]) is type(pipe.model.config),
        "tokens": generate(name, prompts),
        "texts": [row["generated_text"] for row in pipe(prompts, **NEW_TOKENS)],
        "tokenizer": tokenizer,
        "again": generate(again, prompts),
    }


def train(name: str, prompts: list[str], folder: str) -> dict[str, Any]:
    """Two steps of training; what the checkpoint of the second generates, and what the trained model does."""
    model, processor = AutoModel.from_pretrained(name, **TRUST), AutoProcessor.from_pretrained(name, **TRUST)
    arguments = Seq2SeqTrainingArguments(
        folder, max_steps=2, save_steps=2, learning_rate=1e-2, report_to=[], use_cpu=True, remove_unused_columns=False
    )
    trainer = Seq2SeqTrainer(
        model,
        arguments,
        train_dataset=prompts,
        data_collator=lambda rows: processor(text=rows, text_target=rows, padding=True, return_tensors="pt"),
        processing_class=processor,
    )
    trainer.train()
    inputs = processor(text=prompts, padding=True, return_tensors="pt")
    tokens = model.eval().generate(**inputs, **NEW_TOKENS).tolist()
    return {"trained": tokens, "checkpoint": generate(f"{folder}/checkpoint-2", prompts)}


def main(folder: pathlib.Path) -> None:
    """Read `tasks.json` in `folder` and write `results.json` beside it."""
    tasks = json.loads((folder / "tasks.json").read_text())
    prompts, trust = tasks["prompts"], tasks["names"][0]
    results: dict[str, Any] = {"installed": importlib.util.find_spec("transformers_llm2slm") is not None}
    for name in tasks["names"]:
        results[name] = load(name, prompts, str(folder / f"{pathlib.Path(name).name}-again"))
    results |= train(trust, prompts, str(folder / "trained"))
    for auto in (AutoConfig, AutoModel, AutoProcessor):
        try:
            auto.from_pretrained(trust)
        except ValueError as error:
            results[auto.__name__] = str(error)
    (folder / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
