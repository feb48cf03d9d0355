"""The card that a trainer writes with the mix-in, and what the plain trainers leave; every number in it is from somewhere."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from conftest import PROMPTS, RESPONSES
from datasets import Dataset
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.repocard_data import model_index_to_eval_results
from huggingface_hub.utils import validate_repo_id
from safetensors import safe_open
from transformers import AutoModel, Seq2SeqTrainer, Seq2SeqTrainingArguments

from transformers_llm2slm import LLM2SLMDataCollator, LLM2SLMModelCardMixin, prepare_sft_config
from transformers_llm2slm.card_text import shown
from transformers_llm2slm.cli import main
from transformers_llm2slm.measurements import read_records

ROWS = [{"prompt": prompt, "completion": response} for prompt, response in zip(PROMPTS, RESPONSES, strict=True)] * 2
# PEFT and TRL still use the names.
pytestmark = pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing:FutureWarning")
NO_REPORTS = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "remove_unused_columns": False}


class CardTrainer(LLM2SLMModelCardMixin, Seq2SeqTrainer):
    pass


def make(kind, both, folder, **settings):
    model, processor = both
    options = {"max_steps": 2, "per_device_train_batch_size": 3, "learning_rate": 1e-2, **NO_REPORTS, **settings}
    rows = {"train_dataset": ROWS, "eval_dataset": ROWS[:4], "data_collator": LLM2SLMDataCollator(processor)}
    return kind(model, Seq2SeqTrainingArguments(str(folder), **options), processing_class=processor, **rows)


def numbers(text: str) -> set[str]:
    """All numbers in a text, digits that are part of a name (`flan-t5`, `rouge1`) left out."""
    found = re.findall(r"(?<![\w.,:-])-?\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?(?![\w])", text)
    return {number.rstrip(",") for number in found}


def values(source: object) -> set[str]:
    """All numbers in a structure of plain values, as the card writes them, and those in its texts."""
    if isinstance(source, dict):
        return set().union(*(values(value) for value in source.values()), *(values(key) for key in source))
    if isinstance(source, (list, tuple)):
        return set().union(*map(values, source))
    if isinstance(source, (int, float)) and not isinstance(source, bool):
        return {shown(source), str(source)}
    return numbers(str(source)) if isinstance(source, str) else set()


def sources(folder: Path) -> set[str]:
    """Every number that is counted or measured of a checkpoint: config, headers, sizes, records, versions."""
    config = json.loads((folder / "config.json").read_text())
    model = AutoModel.from_pretrained(folder)
    parts = [sum(p.numel() for p in part.parameters()) for part in (model.llm, model.projector, model.slm)]
    llm_files = Path(config["llm_name_or_path"]).glob("*.safetensors")
    sizes = [sum(file.stat().st_size for file in files) for files in (folder.glob("*.safetensors"), llm_files)]
    with safe_open(folder / "model.safetensors", "pt") as tensors:
        assert sum(tensors.get_tensor(key).numel() for key in tensors.keys() if ".projector." in key) == parts[1]
    widths = [model.config.llm_hidden_size, model.config.slm_hidden_size, config["projector_num_layers"]]
    records = json.loads((folder / "measurements.json").read_text())
    return values([parts, sizes, widths, config["transformers_version"], records, 0])


def test_every_number_of_a_trained_models_card_was_counted_or_measured(small, tmp_path, capsys):
    """`train`, `evaluate --beside-llm` and `card` on the command line; then all the numbers, and the client's own checks."""
    model, processor = small
    for part in (model, processor):
        part.save_pretrained(tmp_path / "composed")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    out = tmp_path / "trained"
    options = ["--max-steps", 2, "--set", "use_cpu=true", "--set", "hub_token=hf_secret"]
    # With one round its median, its fastest and its slowest are one number.
    timing = ["--beside-llm", "--timing-tokens", 3, "--timing-rounds", 3]
    for command in (
        [
            "train",
            tmp_path / "composed",
            "--train-file",
            rows,
            "--validation-file",
            rows,
            "--output-dir",
            out,
            *options,
        ],
        ["evaluate", out, "--file", rows, "--max-new-tokens", 4, *timing, "--output", tmp_path / "results.json"],
        [
            "card",
            out,
            "--dataset",
            "org/rows",
            "--license",
            "mit",
            "--base-model",
            "org/llm",
            "--base-model",
            "org/slm",
        ],
    ):
        with pytest.raises(SystemExit) as ended:
            main([str(word) for word in command])
        assert ended.value.code == 0, capsys.readouterr().err
    card = ModelCard.load(out / "README.md")
    assert [record["kind"] for record in read_records(out)] == ["training", "quality", "quality", "speed"]
    told = json.loads((tmp_path / "results.json").read_text())
    assert read_records(out)[2]["metrics"].items() <= told.items()
    _, _, body = str(card).partition("\n---\n")
    # What does not vary is no measurement: the paper's id and the citation.
    written = body.partition("## Citation")[0].replace("https://arxiv.org/abs/2402.16844", "")
    unknown = numbers(written) - sources(out)
    assert not unknown and len(numbers(written)) >= 40
    measured = values([result.metric_value for result in card.data.eval_results])
    assert measured <= sources(out)

    for text in (card.content, (out / "measurements.json").read_text()):
        assert str(tmp_path) not in text and "hf_secret" not in text
        assert Path(model.config.llm_name_or_path).parent.name not in text
    assert "`llm2slm evaluate trained --file rows.jsonl --max-new-tokens 4 --beside-llm --timing-tokens 3" in body
    assert "| LLM | " in body.partition("## Speed")[2] and "Not measured." not in body
    # All that the client checks by itself.
    data = card.data.to_dict()
    assert ModelCardData(**data).to_dict() == data
    name, results = model_index_to_eval_results(data["model-index"])
    assert name == "trained" and {result.metric_type for result in results} == set(data["metrics"])
    for repository in (*data["base_model"], *data["datasets"]):
        validate_repo_id(repository)
    assert (data["base_model_relation"], data["license"], data["datasets"]) == ("finetune", "mit", ["org/rows"])


@pytest.fixture(params=["small", "small_causal"])
def both(request):
    return request.getfixturevalue(request.param)


def test_the_trainer_writes_our_card(both, tmp_path):
    trainer = make(CardTrainer, both, tmp_path, warmup_steps=1, label_smoothing_factor=0.1)
    both[0].slm.get_input_embeddings().requires_grad_(False)
    trained = sum(p.numel() for p in both[0].parameters() if p.requires_grad)
    trainer.train()
    metrics = trainer.evaluate()
    trainer.create_model_card(dataset="org/rows", model_name="early")  # nothing is saved yet, so nothing recorded
    assert not (tmp_path / "measurements.json").exists()
    trainer.save_model()
    trainer.create_model_card(dataset="org/rows", tags="mine", evaluation_data={"name": "org/rows", "split": "dev"})
    card = ModelCard.load(tmp_path / "README.md")
    settings = {
        "rows": "6",
        "steps": "2",
        "learning rate": "0.01",
        "warm-up steps": "1",
        "label smoothing": "0.1",
        "parameters trained": f"{trained:,}",
        "training loss": shown(trainer.state.log_history[-2]["train_loss"]),
    }
    for name, value in settings.items():
        assert f"- {name}: {value}\n" in card.text
    assert "On org/rows, split dev, 4 rows; measured on " in card.text and "by `Seq2SeqTrainer.evaluate`" in card.text
    assert f"| this model | {shown(metrics['eval_loss'])} |" in card.text
    assert (card.data.datasets, card.data.tags) == (["org/rows"], ["llm2slm", "mine"])
    assert '"early"' in card.text  # the name stays until another is given
    # An evaluation before the last steps is none of these weights.
    trainer.args.max_steps = 3
    trainer.train()
    trainer.save_model()
    trainer.create_model_card()
    text = (tmp_path / "README.md").read_text()
    assert "- steps: 3\n" in text and "_Of earlier weights than those" in text.partition("## Results")[2]


def test_trl_keeps_our_card_and_a_plain_trainers_is_put_right(small, tmp_path, capsys):
    from trl import SFTConfig, SFTTrainer

    class CardSFTTrainer(LLM2SLMModelCardMixin, SFTTrainer):
        pass

    model, processor = small
    args = SFTConfig(str(tmp_path), max_steps=1, save_steps=1, bf16=False, report_to="none", use_cpu=True)
    options = {"train_dataset": Dataset.from_list(ROWS), "data_collator": LLM2SLMDataCollator(processor)}
    for kind, ours in ((CardSFTTrainer, True), (SFTTrainer, False)):
        trainer = kind(model, prepare_sft_config(args, model), processing_class=processor.tokenizer, **options)
        trainer.train()
        assert ("<!-- llm2slm:parts -->" in (tmp_path / "README.md").read_text()) is ours
    trainer.save_model()
    trainer.save_state()
    with pytest.raises(SystemExit):
        main(["card", str(tmp_path)])
    assert "error" not in capsys.readouterr().err
    card = ModelCard.load(tmp_path / "README.md")
    assert "- steps: 1\n" in card.text and "TRL" not in card.text and "trl" in card.data.tags


def test_an_adapter_keeps_the_trainers_card(small, tmp_path):
    from peft import get_peft_model

    from transformers_llm2slm import lora_config

    model, processor = small
    model.save_pretrained(tmp_path / "base")
    model.name_or_path = str(tmp_path / "base")
    trainer = make(CardTrainer, (get_peft_model(model, lora_config(model)), processor), tmp_path / "adapter")
    trainer.train()
    trainer.create_model_card(model_name="mine")
    text = (tmp_path / "adapter" / "README.md").read_text()
    assert "llm2slm:parts" not in text and "# mine" in text


def test_card_of_what_is_no_checkpoint(tmp_path, capsys):
    for folder, error in ((tmp_path / "none", "takes a local folder"), (tmp_path, "is no model at all")):
        with pytest.raises(SystemExit) as ended:
            main(["card", str(folder)])
        assert ended.value.code == 2 and error in capsys.readouterr().err
    assert not (tmp_path / "README.md").exists()
