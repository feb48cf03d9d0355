"""The model card: what it says is counted or passed in, what is not known is left out."""

from __future__ import annotations

import ast
import os
import re
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard

from transformers_llm2slm import LLM2SLMForConditionalGeneration, LLM2SLMProcessor
from transformers_llm2slm.model_card import _ranges, is_hub_id, without_path, write_model_card

Small = tuple[LLM2SLMForConditionalGeneration, LLM2SLMProcessor]


def size(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def row(card: str, name: str) -> list[str]:
    """The cells of a table's row."""
    line = next(line for line in card.splitlines() if line.startswith(f"| {name} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


@pytest.fixture
def cut(small_causal: Small) -> LLM2SLMForConditionalGeneration:
    """A model with an SLM cut from its LLM."""
    llm = small_causal[0].config.llm_name_or_path
    return LLM2SLMForConditionalGeneration.from_llm_slm_pretrained(llm, slm_layers=2)


def test_parameters_are_counted_and_the_llm_is_frozen(small: Small, tmp_path: Path) -> None:
    model = small[0]
    model.projector.layers[0].bias.requires_grad_(False)
    card = write_model_card(tmp_path / "mine", model).read_text()
    bias = model.projector.layers[0].bias.numel()
    projector, slm, llm = size(model.projector), size(model.slm), size(model.llm)
    assert row(card, "LLM")[2:] == [f"{llm:,}", "0", f"{llm:,}"]
    assert row(card, "projector")[2:] == [f"{projector:,}", f"{projector - bias:,}", f"{bias:,}"]
    assert row(card, "SLM")[2:] == [f"{slm:,}", f"{slm:,}", "0"]


def test_an_llm_that_is_not_loaded_has_no_numbers(small: Small, tmp_path: Path) -> None:
    small[0].model.attach_llm(None)
    assert row(write_model_card(tmp_path, small[0]).read_text(), "LLM")[2:] == ["-", "-", "-"]


def test_metadata_names_hub_repositories_only(small: Small, tmp_path: Path) -> None:
    model = small[0]
    data = ModelCard.load(write_model_card(tmp_path / "local", model, dataset="/data/rows.jsonl")).data
    assert (data.base_model, data.datasets, data.license) == (None, None, None)
    assert (data.library_name, data.pipeline_tag, data.tags) == ("transformers", "text2text-generation", ["llm2slm"])

    model.config.llm_name_or_path, model.config.slm_name_or_path = "google/flan-t5-large", "google-t5/t5-small"
    data = ModelCard.load(write_model_card(tmp_path / "hub", model, dataset="org/rows", license="mit")).data
    assert data.base_model == ["google/flan-t5-large", "google-t5/t5-small"]
    assert (data.datasets, data.license) == (["org/rows"], "mit")


def test_base_model_of_a_local_copy(cut: LLM2SLMForConditionalGeneration, tmp_path: Path) -> None:
    path = write_model_card(tmp_path, cut, base_model="HuggingFaceTB/SmolLM2-135M-Instruct")
    assert ModelCard.load(path).data.base_model == ["HuggingFaceTB/SmolLM2-135M-Instruct"]
    card = path.read_text()
    link = "[HuggingFaceTB/SmolLM2-135M-Instruct](https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct)"
    assert row(card, "LLM")[1] == f"{link} (`llama`), its hidden states 1"
    assert row(card, "SLM")[1] == "cut from the LLM: its layers 1, 2, embeddings and head (`llama`)"


def test_no_path_of_the_machine(small: Small, tmp_path: Path) -> None:
    model = small[0]
    assert os.path.isabs(model.config.llm_name_or_path)
    rows = tmp_path / "rows.jsonl"
    rows.touch()
    training = {"data": rows, "log": r"C:\Users\someone\train.log"}
    card = write_model_card(tmp_path / "mine", model, dataset=str(rows), training=training).read_text()
    assert str(tmp_path) not in card and "someone" not in card
    assert os.path.dirname(model.config.llm_name_or_path) not in card
    assert "Trained on rows.jsonl." in card and "- log: train.log" in card
    assert row(card, "LLM")[1].startswith(os.path.basename(model.config.llm_name_or_path))


def test_figures_are_those_passed_in(small: Small, tmp_path: Path) -> None:
    card = write_model_card(
        tmp_path / "mine",
        small[0],
        dataset="two words",
        training={"steps": 1200, "learning rate": 5e-4, "bf16": True},
        metrics={"this model": {"ROUGE-L": 30.123, "loss": 2.5}, "LLM": {"ROUGE-L": 31.0, "loss": None}},
        speed={"tokens per second": 1234.56},
        notes={"metrics": "On 300 rows."},
        limits=["It speaks German only."],
    ).read_text()
    assert "- steps: 1,200\n- learning rate: 0.0005\n- bf16: true" in card
    assert "On 300 rows.\n\n|  | ROUGE-L | loss |" in card
    assert row(card, "this model") == ["this model", "30.12", "2.5"]
    assert row(card, "LLM")[1:] != [] and "| LLM | 31 | - |" in card
    assert row(card, "tokens per second") == ["tokens per second", "1,234.6"]
    assert "- It speaks German only." in card and "two words" in card


def test_nothing_measured_is_said(small: Small, tmp_path: Path) -> None:
    card = write_model_card(tmp_path / "mine", small[0]).read_text()
    assert card.count("Not measured.") == 2
    assert "The data is not recorded." in card
    assert "{{" not in card and "{%" not in card and "None" not in card
    assert not re.search(r"\n\n\n", card)


def test_the_example_is_python_that_names_the_folder(small: Small, tmp_path: Path) -> None:
    prompt = 'Say "it\'s"\nin C:\\temp'
    for repo_id, expected in ((None, "mine"), ("org/other", "org/other")):
        card = write_model_card(tmp_path / "mine", small[0], example=prompt, repo_id=repo_id).read_text()
        tree = ast.parse(card.partition("```python\n")[2].partition("```")[0])
        strings = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]
        assert expected in strings and prompt in strings
        assert f"# {expected.rpartition('/')[2]}\n" in card


def test_what_the_checkpoint_holds(small: Small, tmp_path: Path) -> None:
    assert "holds projector and SLM; the LLM is" in write_model_card(tmp_path / "slim", small[0]).read_text()
    small[0].config.llm_in_checkpoint = True
    assert "holds LLM, projector and SLM." in write_model_card(tmp_path / "whole", small[0]).read_text()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("google/flan-t5-large", True),
        ("gpt2", True),
        ("/models/gpt2", False),
        ("data/rows.jsonl", False),
        ("a b", False),
    ],
)
def test_is_hub_id(name: str, expected: bool) -> None:
    assert is_hub_id(name) is expected


def test_a_folder_is_no_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert not is_hub_id("org/model")
    assert without_path("org/model") == "model"
    assert without_path("three short words") == "three short words"


def test_runs_of_layers() -> None:
    assert _ranges([0, 4, 5, 6, 8, 9]) == "0, 4-6, 8, 9"
