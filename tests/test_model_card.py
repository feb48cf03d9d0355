"""The model card: what it says is counted or passed in, what is not known is left out."""

from __future__ import annotations

import ast
import importlib.resources
import json
import os
import re
from pathlib import Path

import pytest
import torch
from hub_metadata import metadata_errors
from huggingface_hub import ModelCard, ModelCardData
from transformers.modelcard import TrainingSummary

from transformers_llm2slm import LLM2SLMForConditionalGeneration, LLM2SLMProcessor
from transformers_llm2slm.card_metadata import is_hub_id
from transformers_llm2slm.card_text import ranges, shown
from transformers_llm2slm.measurements import without_path, write_record
from transformers_llm2slm.model_card import checkpoint_skeleton, is_boilerplate, write_model_card

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


def test_an_llm_that_is_not_loaded_is_counted_by_its_configuration(small: Small, tmp_path: Path) -> None:
    llm = f"{size(small[0].llm):,}"
    small[0].model.attach_llm(None)
    assert row(write_model_card(tmp_path, small[0]).read_text(), "LLM")[2:] == [llm, "0", llm]


def test_the_skeleton_of_a_checkpoint_gives_the_same_card(small: Small, tmp_path: Path) -> None:
    small[0].save_pretrained(tmp_path)
    whole = write_model_card(tmp_path, small[0], repo_id="org/mine").read_text()
    (tmp_path / "README.md").unlink()
    assert write_model_card(tmp_path, checkpoint_skeleton(tmp_path), repo_id="org/mine").read_text() == whole
    assert f"- Weights of this checkpoint: {(tmp_path / 'model.safetensors').stat().st_size:,} bytes" in whole


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
    assert row(card, "LLM")[1] == f"{link} (`llama`), keys and values of its layers 1, 2"
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
    assert "The data is not recorded." in card and "weights of this checkpoint were not counted" in card
    assert "{{" not in card and "{%" not in card and "None" not in card
    assert not re.search(r"\n\n\n", card)


def test_the_example_is_python_that_names_the_folder(small: Small, tmp_path: Path) -> None:
    prompt = 'Say "it\'s"\nin C:\\temp'
    for folder, repo_id, expected in (("mine", None, "mine"), ("folder", "org/other", "org/other")):
        card = write_model_card(tmp_path / folder, small[0], example=prompt, repo_id=repo_id).read_text()
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
    assert ranges([0, 4, 5, 6, 8, 9]) == "0, 4-6, 8, 9"


# Updates -----------------------------------------------------------------------------------------------------------------
def between(card: str, name: str) -> str:
    """What stands between the markers of a section."""
    return re.search(rf"<!-- llm2slm:{name}[^>]* -->\n(.*?)\n<!-- /llm2slm:{name} -->", card, re.DOTALL)[1]


@pytest.mark.parametrize("line_break", ["\n", "\r\n"])
def test_an_update_changes_what_is_known_anew_and_no_other_byte(small: Small, tmp_path: Path, line_break: str) -> None:
    path = write_model_card(tmp_path, small[0], dataset="two words", metrics={"ROUGE-L": 30.5}, repo_id="org/mine")
    text = path.read_text()
    text = text.replace("## Results", "## How good it is\n\nLook at this first.")
    text = text.replace("<!-- llm2slm:limits -->\n", "").replace("- It writes what", "- I say: it writes what")
    text = text.replace("tags:\n- llm2slm\n", "license: mit # mine\ntags: [llm2slm, mine]\nextra: {kept: yes}\n")
    text = text.replace("\n", line_break)
    path.write_bytes(text.encode())

    write_model_card(tmp_path, small[0], speed={"tokens/s": 12.5})
    updated = path.read_bytes().decode()
    new = line_break.join(["|  | value |", "| --- | --- |", "| tokens/s | 12.5 |"])
    speed = line_break.join(["<!-- llm2slm:speed -->", "{}", "<!-- /llm2slm:speed -->"])
    assert updated == text.replace(speed.format("Not measured."), speed.format(new))
    # Where metadata come in, the header is written anew, with all that was in it.
    write_model_card(tmp_path, small[0], tags=["new"], base_model="org/base")
    data = ModelCard.load(path).data
    assert (data.license, data.tags, data.extra) == ("mit", ["llm2slm", "mine", "new"], {"kept": True})
    assert data.base_model == ["org/base"]
    assert line_break.join(["## How good it is", "", "Look at this first."]) in path.read_bytes().decode()


def test_the_prompt_and_the_repository_stay(small: Small, tmp_path: Path) -> None:
    path = write_model_card(tmp_path, small[0], example='Say "a\\b"', repo_id="org/mine")
    before = path.read_text()
    assert write_model_card(tmp_path, small[0]).read_text() == before
    assert 'model="org/other"' in write_model_card(tmp_path, small[0], repo_id="org/other").read_text()


def test_passed_metadata_replace_what_is_set(small: Small, tmp_path: Path) -> None:
    write_model_card(tmp_path, small[0], license="mit", language="de")
    data = ModelCard.load(write_model_card(tmp_path, small[0], license="apache-2.0")).data
    assert (data.license, data.language) == ("apache-2.0", "de")


def test_records_are_of_the_weights_that_lie_there(small: Small, tmp_path: Path) -> None:
    """Results of weights that were replaced are not shown as those of the new ones."""
    model = small[0]
    model.save_pretrained(tmp_path)
    data = {"name": "org/rows", "split": "test", "rows": 120}
    by = {
        "command": "llm2slm evaluate mine",
        "date": "2026-01-02T03:04:05+00:00",
        "machine": {"cpu": "A CPU", "threads": 2},
    }
    record = {"kind": "quality", "data": data, "metrics": {"rougeL": 31.25, "loss": 2.5}, **by}
    write_record(tmp_path, record)
    write_record(tmp_path, record | {"metrics": {"rougeL": 32.75, "loss": 2.5}})
    path = write_model_card(tmp_path, model)
    results = between(path.read_text(), "results")
    assert results.startswith(
        "On org/rows, split test, 120 rows; measured on 2026-01-02 by `llm2slm evaluate mine` on A CPU, 2 threads:\n\n"
    )
    assert "| this model | 32.75 | 2.5 |" in results and "31.25" not in results
    card = ModelCard.load(path)
    (result,) = card.data.eval_results  # the Hub knows no metric of the name loss
    assert (result.metric_type, result.metric_name, result.metric_value) == ("rouge", "ROUGE-L", 32.75)
    assert (result.dataset_type, result.dataset_split, card.data.metrics) == ("org/rows", "test", ["rouge"])
    assert card.data.datasets is None  # it was evaluated on them, not trained

    with torch.no_grad():
        model.projector.layers[0].weight.add_(1)
    model.save_pretrained(tmp_path)
    for _ in range(2):
        stale = between(write_model_card(tmp_path, model).read_text(), "results")
        assert stale.startswith("_Of earlier weights than those that lie here now") and stale.endswith(results)
        assert stale.count("_Of earlier weights") == 1
    write_record(tmp_path, record | {"metrics": {"rougeL": 40.5}})
    assert "earlier weights" not in write_model_card(tmp_path, model).read_text()
    assert [result.metric_value for result in ModelCard.load(path).data.eval_results] == [40.5]


# Other cards -------------------------------------------------------------------------------------------------------------
def boilerplate() -> str:
    """What transformers pushes beside a model or a processor that has no card."""
    said = (
        "This is the model card of a 🤗 transformers model that has been pushed on the Hub. This model card has been "
        "automatically generated."
    )
    data = ModelCardData(tags=["given"], library_name="transformers")
    return str(ModelCard.from_template(data, model_description=said))


def trainers_card() -> str:
    summary = TrainingSummary("mine", tags=["generated_from_trainer"], hyperparameters={"seed": 1}, finetuned_from="")
    return summary.to_model_card()


def trls_card() -> str:
    template = importlib.resources.files("trl") / "templates" / "lm_model_card.md"
    data = ModelCardData(tags=["sft", "trl"], library_name="transformers")
    return str(ModelCard.from_template(data, template_str=template.read_text(), model_name="mine", trainer_name="SFT"))


@pytest.mark.parametrize("card", [boilerplate, trainers_card, trls_card])
def test_untouched_boilerplates_are_replaced_and_edited_ones_are_not(small: Small, tmp_path: Path, card) -> None:
    path = tmp_path / "README.md"
    text = card()
    tags = ModelCard(text).data.tags
    for untouched in (text, text.replace("\n", "\r\n")):
        path.write_bytes(untouched.encode())
        replaced = ModelCard.load(write_model_card(tmp_path, small[0]))
        assert "<!-- llm2slm:parts -->" in replaced.text and "More" not in replaced.text
        assert replaced.data.tags == [*tags, "llm2slm"]
    edited = f"{text}\n## More\n\nBy me.\n" if "[TRL]" in text else text.replace("More", "No more", 1)
    edited = edited.replace("[No more Information Needed]", "Me")
    path.write_text(edited)
    kept = ModelCard.load(write_model_card(tmp_path, small[0]))
    if card is trainers_card:  # who completes it is asked to remove the comment at its head
        assert not is_boilerplate(ModelCard(edited))
    assert kept.text.strip() == ModelCard(edited).text.strip() and kept.data.pipeline_tag == "text2text-generation"


def test_a_card_of_a_persons_own_gets_metadata_alone(small: Small, tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_text("# Mine\n\nAll by hand.\n")
    card = ModelCard.load(write_model_card(tmp_path, small[0], license="mit"))
    assert card.text == "# Mine\n\nAll by hand.\n" and card.data.license == "mit"
    path.write_text("---\nmodel-index: 3\n---\n# Mine\n")
    with pytest.raises(ValueError, match="model_index"):
        write_model_card(tmp_path, small[0])


# What else is known of a checkpoint --------------------------------------------------------------------------------------
def test_licences_are_those_of_the_base_models_own_cards(small: Small, tmp_path: Path) -> None:
    for name, metadata in (("llm", "license: apache-2.0"), ("slm", "license: other\nlicense_name: gemma")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "README.md").write_text(f"---\n{metadata}\n---\n# Base\n")
        setattr(small[0].config, f"{name}_name_or_path", str(tmp_path / name))
    path = write_model_card(tmp_path / "mine", small[0])
    known = "Of the base models, as their own cards state them:\n\n- LLM: llm: `apache-2.0`\n- SLM: slm: `gemma`"
    assert between(path.read_text(), "licenses") == known
    assert ModelCard.load(path).data.license is None  # that of the checkpoint is its author's choice
    (tmp_path / "llm" / "README.md").write_text("---\nlicense: [\n---\n")
    (tmp_path / "slm" / "README.md").unlink()
    assert between(write_model_card(tmp_path / "mine", small[0]).read_text(), "licenses") == known  # known earlier
    fresh = write_model_card(tmp_path / "new", small[0]).read_text()
    assert between(fresh, "licenses") == "Those of the base models are not known here; their own cards state them."


def test_code_in_the_repository_and_an_llm_of_one_machine(small: Small, tmp_path: Path) -> None:
    model = small[0]
    model.save_pretrained(tmp_path)
    usage = between(write_model_card(tmp_path, model, base_model="org/llm").read_text(), "usage")
    assert "trust_remote_code" not in usage and 'llm_name_or_path="org/llm")' in usage
    config = json.loads((tmp_path / "config.json").read_text())
    config["auto_map"] = {"AutoModel": "modeling_llm2slm.LLM2SLMForConditionalGeneration"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert "trust_remote_code=True" in between(write_model_card(tmp_path, model).read_text(), "usage")
    model.config.llm_name_or_path = "org/llm"
    assert "llm_name_or_path" not in between(write_model_card(tmp_path, model).read_text(), "usage")


# The cards that are kept -------------------------------------------------------------------------------------------------
def test_the_card_of_the_demonstration_holds_the_recorded_results() -> None:
    project = Path(__file__).parent.parent
    text = (project / "model_cards" / "llm2slm-smollm2-135m-synopsis.md").read_text()
    assert metadata_errors(text) == []
    results = json.loads((project / "benchmarks" / "results" / "demo" / "results.json").read_text())
    for part in ("quality", "speed"):
        section = between(text, "results" if part == "quality" else part)
        for name, figures in results[part].items():
            assert row(section, "this model" if name == "LLM-to-SLM" else name)[1 : len(figures) + 1] == [
                shown(value) for value in figures.values()
            ]
    assert str(results["machine"]["date"]) in text and f"`{results['command']}`" in text
