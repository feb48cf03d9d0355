"""Checkpoints that earlier releases wrote are loaded forever, and compute what they computed then."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoProcessor

import transformers_llm2slm

ROOT = Path(__file__).parent / "checkpoints"
FOLDERS = sorted(file.parent for file in ROOT.glob("*/*/expected.json"))


def test_there_are_some():
    """Both kinds of tokenizers and of SLMs, in little space."""
    assert {folder.name for folder in FOLDERS if folder.parent.name == "0.1.0"} == {"one-tokenizer", "two-tokenizers"}
    for release in {folder.parent for folder in FOLDERS}:
        assert sum(file.stat().st_size for file in release.rglob("*") if file.is_file()) < 200_000


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: f"{folder.parent.name}-{folder.name}")
def test_checkpoint(folder, tmp_path):
    expected = json.loads((folder / "expected.json").read_text())
    # The LLM is found by what the checkpoint knows of its weights, wherever it is.
    model = AutoModel.from_pretrained(folder / "checkpoint", llm_name_or_path=str(folder / "llm"))
    processor = AutoProcessor.from_pretrained(folder / "checkpoint")
    assert model.config.llm2slm_version == folder.parent.name and model.config.llm_fingerprint is not None
    batch = processor(text=expected["prompts"], text_target=expected["responses"], padding=True, return_tensors="pt")
    logits = model(**batch).logits[:, [0, 9]]
    torch.testing.assert_close(logits, torch.tensor(expected["logits"]), rtol=0, atol=1e-4)
    batch.pop("labels")
    generated = model.generate(**batch, max_new_tokens=12, do_sample=False).tolist()
    pad = model.config.pad_token_id
    assert [[token for token in row if token != pad] for row in generated] == expected["generated"]
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["llm2slm_version"] == transformers_llm2slm.__version__
