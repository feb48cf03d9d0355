"""The example scripts as a user runs them, in this process, on tiny models: what they leave behind, and what they refuse."""

from __future__ import annotations

import gzip
import importlib
import json
import pathlib
import sys

import pytest
import torch
from conftest import PROMPTS, RESPONSES
from datasets import Dataset
from huggingface_hub import ModelCard
from peft import PeftModel
from transformers import AutoModel, AutoProcessor, AutoTokenizer, pipeline
from transformers.utils import logging

from transformers_llm2slm import LLM2SLMDataCollator, LLM2SLMForConditionalGeneration
from transformers_llm2slm.evaluation import generate_texts, text_scores

# TRL 1.16 and PEFT 0.21 call by its old name what transformers 5.23 calls `activation_checkpointing`.
pytestmark = pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing:FutureWarning")

EXAMPLES = pathlib.Path(__file__).parent.parent / "examples"
ROWS = [{"prompt": f"{prompt} {i}", "completion": RESPONSES[i % 3]} for i, prompt in enumerate(PROMPTS * 3)]
TEMPLATE = "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"


@pytest.fixture(autouse=True)
def own_settings(tmp_path_factory, monkeypatch):
    """Data sets are cached in a temporary folder; what a script sets for its process is set back."""
    import datasets

    cache = tmp_path_factory.mktemp("datasets")
    for name in ("HF_DATASETS_CACHE", "DOWNLOADED_DATASETS_PATH", "EXTRACTED_DATASETS_PATH"):
        monkeypatch.setattr(datasets.config, name, cache / name)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    verbosity = logging.get_verbosity()
    yield
    logging.set_verbosity(verbosity)
    datasets.enable_progress_bars()


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs a script with its output in a folder `out`, and gives that folder."""

    def run(script: str, *flags: str, **options: object) -> pathlib.Path:
        defaults = {
            "output_dir": tmp_path / "out",
            "max_steps": 4,
            "learning_rate": 1e-2,
            "per_device_train_batch_size": 4,
            "per_device_eval_batch_size": 4,
            "report_to": "none",
        }
        options = defaults | options
        arguments = [text for name, value in options.items() for text in (f"--{name}", str(value))]
        monkeypatch.setattr(sys, "argv", [script, *(f"--{flag}" for flag in ("use_cpu", *flags)), *arguments])
        importlib.import_module(script).main()
        return pathlib.Path(str(options["output_dir"]))

    return run


@pytest.fixture
def file(tmp_path):
    """A file of rows."""

    def write(name: str, rows: list) -> pathlib.Path:
        path = tmp_path / name
        if name.endswith(".parquet"):
            Dataset.from_list(rows).to_parquet(path)
        else:
            with (gzip.open if name.endswith(".gz") else open)(path, "wt", encoding="utf-8") as lines:
                lines.writelines(json.dumps(row) + "\n" for row in rows)
        return path

    return write


@pytest.fixture
def chat_llm(zoo, tmp_path):
    """A decoder-only LLM with a chat template."""
    folder = tmp_path / "chat"
    source = pathlib.Path(zoo.checkpoint("llama", "bpe", "llm"))
    folder.mkdir()
    for path in source.iterdir():
        (folder / path.name).symlink_to(path)
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.chat_template = TEMPLATE
    (folder / "tokenizer_config.json").unlink()
    (folder / "tokenizer.json").unlink()
    tokenizer.save_pretrained(folder)
    return folder


def t5_pair(zoo) -> dict[str, str]:
    return {
        "llm_name_or_path": zoo.checkpoint("t5", "bpe", "llm"),
        "slm_name_or_path": zoo.checkpoint("t5", "bpe", "slm"),
    }


def numbers_of(folder: pathlib.Path) -> dict[str, float]:
    return json.loads((folder / "all_results.json").read_text())


def without_dropout(monkeypatch) -> None:
    monkeypatch.setattr(torch.nn.Dropout, "forward", lambda self, states: states)


# What a run leaves behind ------------------------------------------------------------------------------------------------
def test_summarization(run, file, zoo, tmp_path):
    """
    Metrics are those of the texts that the checkpoint writes when it is loaded by the Auto classes; texts, state, card and
    results are all there, and a pipeline takes the folder.
    """
    rows = [{"article": row["prompt"], "highlights": row["completion"]} for row in ROWS]
    out = run(
        "run_summarization",
        *("do_train", "do_eval", "do_predict", "predict_with_generate"),
        **t5_pair(zoo),
        train_file=file("train.jsonl.gz", rows),
        validation_file=file("validation.parquet", rows[:5]),
        test_file=file("test.jsonl", rows[3:]),
        text_column="article",
        summary_column="highlights",
        prompt_prefix="summarize: ",
        max_prompt_length=20,
        max_response_length=8,
        max_predict_samples=5,
        per_device_eval_batch_size=5,
        num_beams=2,
    )
    results = numbers_of(out)
    model, processor = AutoModel.from_pretrained(out), AutoProcessor.from_pretrained(out)
    prompts = ["summarize: " + row["prompt"] for row in ROWS[3:8]]
    generation = {"max_prompt_length": 20, "max_new_tokens": 8, "num_beams": 2}
    texts = generate_texts(model, processor, prompts, **generation).texts
    assert (out / "generated_predictions.txt").read_text().splitlines() == [" ".join(text.split()) for text in texts]
    labels = processor(text_target=[row["completion"] for row in ROWS[3:8]], truncation=True, max_target_length=8)
    references = processor.batch_decode(labels["labels"], skip_special_tokens=True)
    scores = text_scores([text.strip() for text in texts], references)
    for name in ("rouge1", "rouge2", "rougeL", "rougeLsum"):
        assert results[f"predict_{name}"] == pytest.approx(scores[name], abs=1e-3)

    batch = LLM2SLMDataCollator(processor, 20, 8)(
        [{"prompt": f"summarize: {row['prompt']}", "completion": row["completion"]} for row in ROWS[:5]]
    )
    with torch.no_grad():
        loss = model(**batch).loss.item()
    assert results["eval_loss"] == pytest.approx(loss, abs=1e-4) and "eval_bleu" not in results
    assert (results["train_samples"], results["eval_samples"], results["predict_samples"]) == (len(ROWS), 5, 5)
    state = json.loads((out / "trainer_state.json").read_text())
    assert state["global_step"] == 4 and 0 < results["train_loss"] < 20

    card = ModelCard.load(out / "README.md")
    assert card.data.tags == ["llm2slm"] and "Trained on train.jsonl.gz." in card.content
    training = card.content.partition("<!-- llm2slm:training")[2].partition("<!-- /llm2slm:training")[0].splitlines()
    assert {"- steps: 4", "- rows in a step: 4", "- learning rate: 0.01"} < set(training)
    assert f"- training loss: {results['train_loss']:.4g}" in training
    heading = "On test.jsonl, split test, 5 rows; measured on "
    row = f"| this model | {results['predict_loss']:.4g} | {results['predict_rouge1']:.4g} |"
    assert row in card.content.partition(heading)[2]
    assert "On validation.parquet, split validation, 5 rows; measured on " in card.content
    assert {(result.dataset_split, result.metric_value) for result in card.data.eval_results} >= {
        ("test", results["predict_rougeL"])
    }
    written = pipeline("text2text-generation", model=str(out))(prompts[0], max_new_tokens=4)[0]["generated_text"]
    assert isinstance(written, str)


def test_translation_of_nested_columns(run, file, chat_llm):
    """An SLM cut from the LLM; columns of a column; BLEU and chrF and no others."""
    rows = [{"translation": {"en": row["prompt"], "de": row["completion"]}} for row in ROWS]
    out = run(
        "run_translation",
        *("do_train", "do_predict", "predict_with_generate", "fit_slm_embeddings", "freeze_slm_embeddings"),
        llm_name_or_path=chat_llm,
        slm_layers="1,",
        train_file=file("rows.jsonl", rows),
        test_file=file("test.jsonl", rows[:3]),
        source_column="translation.en",
        target_column="translation.de",
        prompt_suffix=r"\nGerman:",
        max_response_length=8,
    )
    results = numbers_of(out)
    scored = {name for name in results if name.startswith("predict_")}
    assert {"predict_bleu", "predict_chrf"} < scored and not any("rouge" in name for name in scored)
    assert len((out / "generated_predictions.txt").read_text().splitlines()) == 3
    model = AutoModel.from_pretrained(out)
    assert model.config.slm_layers == [1] and model.config.fusion == AutoProcessor.from_pretrained(out).fusion == "kv"
    # Frozen, the LM head is still the LLM's; the embeddings were fitted before.
    llm = LLM2SLMForConditionalGeneration.from_llm_slm_pretrained(chat_llm, slm_layers=[1]).slm
    assert torch.equal(model.slm.get_output_embeddings().weight, llm.get_output_embeddings().weight)
    assert not torch.equal(model.slm.get_input_embeddings().weight, llm.get_input_embeddings().weight)
    assert r"- prompts: '...\nGerman:'" in (out / "README.md").read_text()


def test_cached_states_give_the_same_run(run, file, zoo, tmp_path, monkeypatch):
    """Trained on cached states, without an LLM in memory: losses, metrics and texts are those of the live run."""
    without_dropout(monkeypatch)
    train_file = file("train.jsonl", ROWS)
    # Prompts of their own: both splits go into one cache.
    test_file = file("test.jsonl", [row | {"prompt": "Other. " + row["prompt"]} for row in ROWS[:3]])
    utils = importlib.import_module("example_utils")
    llms = []
    monkeypatch.setattr(
        utils, "train", lambda trainer, train=utils.train: llms.append(trainer.model.llm) or train(trainer)
    )
    outs = []
    for name, options in (
        ("live", {}),
        ("cached", {"cache_llm_states": tmp_path / "states", "cache_dtype": "float32"}),
    ):
        out = run(
            "run_summarization",
            *("do_train", "do_eval", "do_predict", "predict_with_generate"),
            **t5_pair(zoo),
            train_file=train_file,
            validation_file=test_file,
            test_file=test_file,
            max_response_length=8,
            output_dir=tmp_path / name,
            **options,
        )
        outs.append(out)
    assert llms[0] is not None and llms[1] is None
    live, cached = map(numbers_of, outs)
    for name in ("train_loss", "eval_loss", "predict_loss", "eval_rougeL", "predict_rougeL", "predict_gen_len"):
        assert cached[name] == pytest.approx(live[name], abs=1e-4), name
    texts = [(out / "generated_predictions.txt").read_text() for out in outs]
    assert texts[0] == texts[1]


def test_an_interrupted_run_goes_on(run, file, zoo, caplog):
    """The same command goes on from the last checkpoint, from the model that it finds there."""
    options = t5_pair(zoo) | {"train_file": file("train.jsonl", ROWS), "save_steps": 2, "learning_rate": 1e-3}
    run("run_summarization", "do_train", **options, max_steps=2)
    assert "Going on from" not in caplog.text
    out = run("run_summarization", "do_train", **options, max_steps=4)
    assert "Going on from" in caplog.text and "checkpoint-2" in caplog.text
    state = json.loads((out / "trainer_state.json").read_text())
    assert state["global_step"] == 4 and (out / "checkpoint-4").is_dir()


def test_evaluation_of_a_checkpoint(file, small, tmp_path, monkeypatch):
    """A checkpoint is scored, with arguments from a file; nothing is trained, cached or saved."""
    model, processor = small
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    out = tmp_path / "out"
    arguments = {
        "model_name_or_path": str(tmp_path / "model"),
        "validation_file": str(file("rows.jsonl", ROWS[:3])),
        "max_response_length": 8,
        "do_eval": True,
        "cache_llm_states": str(tmp_path / "states"),
        "output_dir": str(out),
        "use_cpu": True,
        "report_to": "none",
    }
    (tmp_path / "arguments.json").write_text(json.dumps(arguments))
    monkeypatch.setattr(sys, "argv", ["run_summarization", str(tmp_path / "arguments.json")])
    importlib.import_module("run_summarization").main()
    with torch.no_grad():
        loss = model(**LLM2SLMDataCollator(processor, None, 8)(ROWS[:3])).loss.item()
    assert numbers_of(out)["eval_loss"] == pytest.approx(loss, abs=1e-4)
    assert {path.name for path in out.iterdir()} == {"all_results.json", "eval_results.json"}
    assert not (tmp_path / "states").exists()


# Instructions ------------------------------------------------------------------------------------------------------------
def as_messages(row: dict[str, str]) -> list[dict[str, str]]:
    return [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]


def test_instructions_as_conversations(run, file, chat_llm):
    """Rows of messages, and the same as prompts and completions of messages, give the same run, in the chat's format."""
    rows = [
        {"messages": as_messages(row), "asked": as_messages(row)[:1], "said": as_messages(row)[1:]} for row in ROWS
    ]
    options = {
        "llm_name_or_path": chat_llm,
        "slm_layers": 2,
        "train_file": file("train.parquet", rows),
        "validation_file": file("validation.jsonl", rows[:3]),
        "test_file": file("test.jsonl", rows[:3]),
        "max_response_length": 8,
        "bf16": False,
    }
    flags = ("do_eval", "do_predict")
    out = run("run_instruction_sft", *flags, **options, messages_column="messages")
    results = numbers_of(out)
    texts = (out / "generated_predictions.txt").read_text().splitlines()
    model, processor = AutoModel.from_pretrained(out), AutoProcessor.from_pretrained(out)
    chats = [f"<s>user: {row['prompt']}\nassistant:" for row in ROWS[:3]]
    inputs = processor(text=chats, add_special_tokens=False, padding=True, return_tensors="pt")
    generated = processor.batch_decode(model.generate(**inputs, max_new_tokens=8), skip_special_tokens=True)
    assert texts == [" ".join(text.split()) for text in generated]
    assert {"train_loss", "eval_loss", "predict_rougeL", "predict_exact_match"} < set(results)
    card = (out / "README.md").read_text()
    assert "An LLM-to-SLM model" in card and "trained using [TRL]" not in card and "split validation" in card

    other = run(
        "run_instruction_sft",
        *flags,
        **options,
        prompt_column="asked",
        completion_column="said",
        output_dir=out / "other",
    )
    for name in ("train_loss", "eval_loss", "predict_chrf"):
        assert numbers_of(other)[name] == pytest.approx(results[name], abs=1e-5)


def test_lora_ends_in_a_merged_checkpoint(run, file, zoo):
    """The merged model is at the root, its LM head and embeddings untouched; the adapter lies beside it."""
    pair = t5_pair(zoo)
    out = run(
        "run_instruction_sft",
        *("use_peft", "do_predict"),
        **pair,
        train_file=file("train.jsonl", ROWS),
        test_file=file("test.jsonl", ROWS[:3]),
        max_response_length=8,
        lora_r=4,
        bf16=False,
    )
    assert (out / "adapter" / "adapter_config.json").is_file() and not (out / "adapter_config.json").exists()
    base, merged = AutoModel.from_pretrained(out / "base"), AutoModel.from_pretrained(out)
    before = base.slm.state_dict()
    moved = {name for name, tensor in merged.slm.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved and not any("shared" in name or "lm_head" in name for name in moved)
    assert len((out / "generated_predictions.txt").read_text().splitlines()) == 3

    assert json.loads((out / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        out / "base"
    )
    adapted = PeftModel.from_pretrained(base, out / "adapter").eval()
    batch = LLM2SLMDataCollator(AutoProcessor.from_pretrained(out))(ROWS[:3])
    with torch.no_grad():
        torch.testing.assert_close(adapted(**batch).logits, merged.eval()(**batch).logits, rtol=0, atol=1e-4)


# Rows and what is refused ------------------------------------------------------------------------------------------------
def test_a_prompt_is_cut_before_its_suffix(small):
    processor = small[1]
    utils = importlib.import_module("example_utils")
    data = utils.DataArguments(prompt_prefix="Tell: ", prompt_suffix="\\nAnswer:", max_prompt_length=30)
    rows = Dataset.from_list([{"prompt": "a house is wonderful " * 10}, {"prompt": "Hello"}])
    long, short = utils.with_affixes(rows, data, processor)["prompt"]
    assert short == "Tell: Hello\nAnswer:"
    assert long.startswith("Tell: a house") and long.endswith("\nAnswer:")
    assert 27 <= len(processor(text=long)["input_ids"]) <= 30
    data.max_prompt_length = 4
    with pytest.raises(ValueError, match="Prefix and suffix fill a prompt of 4 tokens: raise `--max_prompt_length`"):
        utils.with_affixes(rows, data, processor)


@pytest.mark.parametrize(
    ("options", "flags", "text"),
    [
        ({}, [], "There is nothing to do: give `--do_train`"),
        ({}, ["do_eval"], "There are no validation rows: give `--validation_file` or `--dataset_name`"),
        ({"text_column": "body"}, ["do_train"], "has no column 'body'; its columns are prompt, completion"),
        (
            {"slm_name_or_path": None, "slm_layers": "few"},
            ["do_train"],
            "`--slm_layers` takes a number or a list of them",
        ),
        ({"slm_name_or_path": None}, ["do_train"], "Give either `--model_name_or_path`, a checkpoint, or"),
        ({"llm_name_or_path": None}, ["do_train"], "There is no LLM: give `--llm_name_or_path`"),
        (
            {"slm_name_or_path": None, "model_name_or_path": "some/model", "fusion": "add"},
            ["do_train"],
            "`--fusion` is for composing a model",
        ),
    ],
)
def test_refused(run, file, zoo, options, flags, text):
    options = t5_pair(zoo) | {"train_file": file("train.jsonl", ROWS)} | options
    with pytest.raises(ValueError, match=text):
        run("run_summarization", *flags, **{name: value for name, value in options.items() if value is not None})


def test_rows_that_are_too_long(run, file, zoo):
    """Positions are counted before training: of an SLM that has 128, prompt and response together."""
    pair = {
        "llm_name_or_path": zoo.checkpoint("t5", "unigram", "llm"),
        "slm_name_or_path": zoo.checkpoint("gpt2", "bpe", "slm"),
    }
    train_file = file("train.jsonl", [*ROWS, {"prompt": "Hello", "completion": "wonderful " * 60}])
    with pytest.raises(ValueError, match="takes 128 tokens, but the train rows need .*`--max_response_length`"):
        run("run_summarization", "do_train", **pair, train_file=train_file)
    out = run("run_summarization", "do_train", **pair, train_file=train_file, max_response_length=8, max_steps=1)
    assert numbers_of(out)["train_samples"] == len(ROWS) + 1
