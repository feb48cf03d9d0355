"""`llm2slm train` and `llm2slm cache`: what they make, how they go on, and what they refuse."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest
import torch
from conftest import ROWS, loaded
from safetensors.torch import load_file
from transformers import Seq2SeqTrainingArguments

from transformers_llm2slm import LLM2SLMDataCollator
from transformers_llm2slm.cli.train import training_arguments

pytestmark = pytest.mark.usefixtures("own_settings")

OPTIONS = ["--max-steps", 4, "--save-steps", 2, "--per-device-train-batch-size", 2, "--learning-rate", 1e-2]
OPTIONS += ["--logging-steps", 1, "--set", "use_cpu=true"]


def weights(folder):
    return load_file(folder / "model.safetensors")


def test_train(run, checkpoint, rows_file, tmp_path):
    out = tmp_path / "out"
    options = [*OPTIONS, "--validation-file", rows_file, "--eval-steps", 2, "--set", "warmup_steps=1"]
    options += ["--bf16", "--gradient-accumulation-steps", 2, "--gradient-checkpointing"]
    options += ["--max-prompt-length", 9, "--max-response-length", 4, "--set", "per_device_eval_batch_size=12"]
    code, text, _ = run("train", checkpoint, "--train-file", rows_file, "--output-dir", out, *options)
    assert code == 0
    results = {name: json.loads((out / f"{name}_results.json").read_text()) for name in ("train", "eval")}
    state = json.loads((out / "trainer_state.json").read_text())
    evaluated = {entry["step"]: entry["eval_loss"] for entry in state["log_history"] if "eval_loss" in entry}
    assert state["global_step"] == 4 and sorted(evaluated) == [2, 4]
    assert evaluated[4] == results["eval"]["eval_loss"] < evaluated[2]
    assert text.splitlines()[-1] == (
        f"Saved in {out} after 4 steps on 12 rows, train_loss {results['train']['train_loss']:.4f}, "
        f"eval_loss {results['eval']['eval_loss']:.4f}."
    )
    before, after = weights(checkpoint), weights(out)
    assert before.keys() == after.keys()
    assert [name for name in before if torch.equal(before[name], after[name])] == []
    assert loaded(out)[0].config.llm_fingerprint == loaded(checkpoint)[0].config.llm_fingerprint
    model, processor = loaded(out)
    losses = [
        model(**LLM2SLMDataCollator(processor, *lengths)(ROWS)).loss.item() for lengths in ((9, 4), (9, 9), (20, 4))
    ]
    assert losses[0] == pytest.approx(results["eval"]["eval_loss"], rel=0.01)  # that was in bfloat16
    assert results["eval"]["eval_loss"] not in (pytest.approx(losses[1], rel=0.02), pytest.approx(losses[2], rel=0.02))
    arguments = torch.load(out / "training_args.bin", weights_only=False)
    assert (arguments.warmup_steps, arguments.gradient_accumulation_steps) == (1, 2)
    assert arguments.bf16 and arguments.gradient_checkpointing


@pytest.mark.parametrize("value", [True, False])
@pytest.mark.parametrize("name", ["gradient_checkpointing", "activation_checkpointing"])
def test_checkpointing_by_either_name(tmp_path, name, value):
    """A setting comes last, and before the option of the command, by the old name and by transformers' new one."""
    names = {field.name for field in dataclasses.fields(Seq2SeqTrainingArguments)}
    if name not in names:
        pytest.skip("this transformers has the old name only")
    arguments = training_arguments(tmp_path, [f"{name}={str(value).lower()}"], gradient_checkpointing=not value)
    found = "activation_checkpointing" if "activation_checkpointing" in names else name
    assert getattr(arguments, found) is value


def test_interrupted_training_goes_on(run, error, checkpoint, rows_file, tmp_path):
    """A run that was cut off after step 2 ends with the very weights of one that was not."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert run("train", checkpoint, "--train-file", rows_file, "--output-dir", whole, *OPTIONS)[0] == 0
    shutil.copytree(whole / "checkpoint-2", cut / "checkpoint-2")
    command = ["train", checkpoint, "--train-file", rows_file, "--output-dir", cut, *OPTIONS]
    assert "go on from checkpoint-2 with `--resume`" in error(*command)
    code, out, err = run(*command, "--resume")
    assert code == 0 and f"Going on from {cut / 'checkpoint-2'}." in err
    assert out.count("'loss': ") == 2  # steps 3 and 4 only
    expected = weights(whole)
    for name, tensor in weights(cut).items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0)
    # Once more, when there is nothing left to do.
    assert run(*command, "--resume")[0] == 0
    for name, tensor in weights(cut).items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0)


def test_resume_with_nothing_to_resume_starts(run, checkpoint, rows_file, tmp_path):
    options = ["--max-steps", 1, "--resume", "--set", "use_cpu=true"]
    code, _, err = run("train", checkpoint, "--train-file", rows_file, "--output-dir", tmp_path / "out", *options)
    assert code == 0 and "starting anew" in err
    assert json.loads((tmp_path / "out" / "trainer_state.json").read_text())["global_step"] == 1


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            ["--prompt-column", "text"],
            "has no column 'text'; its columns are prompt, completion: choose one with `prompt_column`.",
        ),
        (["--eval-steps", "2"], "`--eval-steps` needs rows to evaluate on: add `--validation-file`"),
        (["--set", "warmup=2"], "a field of Seq2SeqTrainingArguments, such as warmup_steps=100, got 'warmup=2'."),
        (["--set", "weight_decay=x"], "`--set weight_decay=` takes a number or true or false, got 'x'."),
        (["--set", "lr_scheduler_type=x"], "x is not a valid SchedulerType"),
    ],
)
def test_train_refuses(error, checkpoint, rows_file, tmp_path, options, text):
    assert text in error("train", checkpoint, "--train-file", rows_file, "--output-dir", tmp_path / "out", *options)
    assert not (tmp_path / "out").exists()


def test_train_does_not_write_over_its_model(error, checkpoint, rows_file):
    before = weights(checkpoint)
    assert "must be another folder" in error(
        "train", checkpoint, "--train-file", rows_file, "--output-dir", checkpoint
    )
    assert all(torch.equal(before[name], tensor) for name, tensor in weights(checkpoint).items())


def test_cache(run, error, checkpoint, rows_file, tmp_path):
    """It tells what it takes before, and what it took; training on it gives the losses of training with the LLM."""
    out, options = tmp_path / "states", ["--max-prompt-length", 9, "--states-dtype", "float32"]
    code, text, err = run("cache", checkpoint, out, "--file", rows_file, *options)
    size = sum(file.stat().st_size for file in out.iterdir())
    assert (code, text.splitlines()[-1]) == (
        0,
        f"{out} holds the states of these 12 rows: {size:,} bytes, relative error 0.",
    )
    announced = " ".join(err.split())
    assert announced.startswith("The LLM's states of ") and " tokens) take " in announced
    assert "refused" not in announced and " s to encode." in announced
    before = {file: file.stat().st_mtime_ns for file in out.iterdir()}
    results = []
    for name, more in (("cached", [*options, "--cache-llm-states", out]), ("live", options[:2])):
        assert (
            run("train", checkpoint, "--train-file", rows_file, "--output-dir", tmp_path / name, *OPTIONS, *more)[0]
            == 0
        )
        results.append(json.loads((tmp_path / name / "train_results.json").read_text())["train_loss"])
    assert results[0] == pytest.approx(results[1], abs=1e-5)
    assert {file: file.stat().st_mtime_ns for file in out.iterdir()} == before
    assert loaded(tmp_path / "cached")[0].llm is not None
    assert "made with another maximum prompt length: expected 12, found 9" in error(
        "cache", checkpoint, out, "--file", rows_file, "--max-prompt-length", 12, "--states-dtype", "float32"
    )
