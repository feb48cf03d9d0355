"""The standard `Trainer` and `Seq2SeqTrainer`, unchanged: what they train, save, resume and score."""

from __future__ import annotations

import json
import logging
import os
import pathlib
import subprocess
import sys
import time

import interrupted_run
import pytest
import torch
from conftest import VOCAB_SIZE, Pair
from datasets import Dataset
from safetensors import safe_open
from torch import nn
from transformers import (
    AutoModel,
    AutoProcessor,
    LlamaConfig,
    LlamaForCausalLM,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

from transformers_llm2slm import LLM2SLMDataCollator, LLM2SLMForConditionalGeneration, LLM2SLMProcessor

ROWS = [
    {"prompt": "translate English to German: The house is wonderful.", "completion": "Das Haus ist wunderbar."},
    {"prompt": "Hello there!", "completion": "Hi"},
    {"prompt": "What writes quickly?", "completion": "A quick small model."},
    {"prompt": "naïve, 12 tokens", "completion": "écrit"},
]


@pytest.fixture(params=["small", "small_causal"])
def both(request):
    """A model and its processor: with an encoder-decoder SLM and with a decoder-only one."""
    return request.getfixturevalue(request.param)


def make_trainer(
    model, processor, output_dir, cls=Trainer, rows=ROWS, eval_rows=None, compute_metrics=None, more=None, **settings
):
    defaults = {
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "save_strategy": "no",
        "remove_unused_columns": False,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    arguments_class = Seq2SeqTrainingArguments if issubclass(cls, Seq2SeqTrainer) else TrainingArguments
    return cls(
        model=model,
        args=arguments_class(output_dir=str(output_dir), **defaults | settings),
        train_dataset=rows,
        eval_dataset=eval_rows,
        data_collator=LLM2SLMDataCollator(processor),
        compute_metrics=compute_metrics,
        **{"processing_class": processor} | (more or {}),
    )


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def without_dropout(model):
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    return model


# Its name from transformers 5.23 on comes first, where the other one warns.
CHECKPOINTING = next(
    name for name in ("activation_checkpointing", "gradient_checkpointing") if hasattr(TrainingArguments, name)
)


def enable_checkpointing(model):
    getattr(model, f"{CHECKPOINTING}_enable")()


# Training ----------------------------------------------------------------------------------------------------------------
def test_seq2seq_trainer_memorises(both, tmp_path):
    """
    Rows as a `datasets.Dataset`: the loss falls to nearly nothing, `compute_metrics` sees the very completions, decoded, and the frozen LLM is bit for
    bit what it was.
    """
    model, processor = both
    without_dropout(model)
    rows = Dataset.from_list(ROWS)
    llm = {name: parameter.clone() for name, parameter in model.llm.named_parameters()}
    seen = {}

    def compute_metrics(prediction):
        pad = processor.tokenizer.pad_token_id
        for name, ids in (("predictions", prediction.predictions), ("references", prediction.label_ids)):
            ids[ids == -100] = pad
            seen[name] = processor.batch_decode(ids, skip_special_tokens=True)
        return {"exact": sum(p == r for p, r in zip(seen["predictions"], seen["references"], strict=True)) / len(ROWS)}

    trainer = make_trainer(
        model,
        processor,
        tmp_path,
        cls=Seq2SeqTrainer,
        rows=rows,
        eval_rows=rows,
        compute_metrics=compute_metrics,
        predict_with_generate=True,
        generation_max_length=24,
        per_device_eval_batch_size=3,
        learning_rate=2e-2,
        lr_scheduler_type="linear",
        max_steps=120,
    )
    before = trainer.evaluate()
    assert before["eval_exact"] == 0
    trainer.train()
    history = losses(trainer)
    assert history[0] == pytest.approx(before["eval_loss"], rel=0.3) and history[-1] < 0.05 * history[0]
    after = trainer.evaluate()
    assert after["eval_exact"] == 1 and after["eval_loss"] < 0.1
    assert seen["predictions"] == seen["references"] == [row["completion"] for row in ROWS]
    for name, parameter in model.llm.named_parameters():
        assert torch.equal(parameter, llm[name]) and parameter.grad is None, name

    # The trainer fills the generation config with defaults; texts are as long as ever afterwards.
    batch = processor(text=[row["prompt"] for row in ROWS], padding=True, return_tensors="pt")
    texts = processor.batch_decode(model.eval().generate(**batch), skip_special_tokens=True)
    assert texts == seen["references"]


def test_rows_tokenized_before_train_alike(both, tmp_path):
    """Tokens that `Dataset.map` made train as the text does, with the `Trainer`'s own way with columns."""
    model, processor = both
    without_dropout(model)
    state = {name: weights.clone() for name, weights in model.state_dict().items()}
    text = Dataset.from_list(ROWS)
    tokens = text.map(lambda rows: processor(text=rows["prompt"], text_target=rows["completion"]), batched=True)
    seen = []
    for rows, settings in ((text, {}), (tokens, {"remove_unused_columns": True})):
        model.load_state_dict(state)
        trainer = make_trainer(model, processor, tmp_path, rows=rows, max_steps=3, **settings)
        trainer.train()
        seen.append(losses(trainer))
    assert seen[0] == seen[1] and len(seen[0]) == 3


def test_plain_trainer(both, tmp_path):
    """With the plain `Trainer`, here with rows as a list, the metrics see logits and labels that stand side by side."""
    model, processor = both
    without_dropout(model)
    shapes = []

    def compute_metrics(prediction):
        logits, labels = prediction.predictions, prediction.label_ids
        shapes.append((logits.shape, labels.shape))
        scored = labels != -100
        return {"accuracy": (logits.argmax(-1) == labels)[scored].mean()}

    trainer = make_trainer(
        model,
        processor,
        tmp_path,
        eval_rows=ROWS,
        compute_metrics=compute_metrics,
        learning_rate=2e-2,
        lr_scheduler_type="linear",
        max_steps=120,
    )
    trainer.train()
    assert model.slm.training and not any(module.training for module in model.llm.modules())
    assert losses(trainer)[-1] < 0.05 * losses(trainer)[0]
    assert trainer.evaluate()["eval_accuracy"] == 1
    assert shapes[0] == ((*shapes[0][1], VOCAB_SIZE), shapes[0][1])


def test_gradient_accumulation_is_the_big_batch(both, tmp_path):
    """Responses of very different lengths in four small batches weigh as in one: token by token."""
    model, processor = both
    state = {name: tensor.clone() for name, tensor in without_dropout(model).state_dict().items()}
    histories, results = [], []
    for batch_size in (4, 2, 1):
        model.load_state_dict(state, strict=False)
        trainer = make_trainer(
            model,
            processor,
            tmp_path,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=4 // batch_size,
            learning_rate=1e-3,
            max_steps=6,
        )
        trainer.train()
        histories.append(losses(trainer))
        results.append(model.projector.layers[-1].weight.detach().clone())
    assert len(histories[0]) == 6 and histories[0][-1] < histories[0][0]
    for history, result in zip(histories[1:], results[1:], strict=True):
        assert history == pytest.approx(histories[0], rel=1e-4)
        torch.testing.assert_close(result, results[0], rtol=0, atol=1e-4)


def test_gradient_checkpointing_gives_the_same_gradients(both):
    """The SLM's layers run again in the backward pass, the frozen LLM's do not, and the gradients are the same."""
    model, processor = both
    without_dropout(model).train()
    batch = LLM2SLMDataCollator(processor)(ROWS)
    runs = {"llm": 0, "slm": 0}

    def count(part):
        def hook(*_):
            runs[part] += 1

        return hook

    for part in runs:
        module = getattr(model, part)
        decoder = (
            module.get_decoder() if part == "slm" else module.get_encoder() if hasattr(module, "shared") else module
        )
        layer = (decoder.block if hasattr(decoder, "block") else decoder.layers)[1]
        linear = next(module for module in layer.modules() if isinstance(module, nn.Linear))
        linear.register_forward_pre_hook(count(part))

    def gradients():
        model.zero_grad()
        runs.update(llm=0, slm=0)
        loss = model(**batch).loss
        loss.backward()
        return loss, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    loss, expected = gradients()
    assert runs == {"llm": 1, "slm": 1}
    enable_checkpointing(model)
    again, found = gradients()
    assert runs == {"llm": 1, "slm": 2}
    torch.testing.assert_close(again, loss, rtol=0, atol=1e-6)
    assert set(found) == set(expected) and any("projector" in name for name in found)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6, msg=name)


def test_gradient_checkpointing_trains(both, tmp_path):
    model, processor = both
    without_dropout(model)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plain = make_trainer(model, processor, tmp_path, max_steps=5)
    plain.train()
    model.load_state_dict(state, strict=False)
    checkpointing = make_trainer(model, processor, tmp_path, max_steps=5, **{CHECKPOINTING: True})
    checkpointing.train()
    assert losses(checkpointing)[-1] < losses(checkpointing)[0]
    assert losses(checkpointing) == pytest.approx(losses(plain), rel=1e-3)


def test_label_smoothing(both, tmp_path):
    """The trainer's own smoothed loss: it takes the labels out of the batch and scores the logits itself."""
    model, processor = both
    without_dropout(model)
    batch = LLM2SLMDataCollator(processor)(ROWS)
    with torch.no_grad():
        log_probs = model(**batch).logits.log_softmax(dim=-1)
    scored = batch["labels"] != -100
    nll = -log_probs.gather(2, batch["labels"].clamp(min=0).unsqueeze(-1))[..., 0][scored].mean()
    expected = 0.9 * nll + 0.1 * -log_probs.mean(dim=-1)[scored].mean()
    trainer = make_trainer(
        model, processor, tmp_path, cls=Seq2SeqTrainer, eval_rows=ROWS, label_smoothing_factor=0.1, max_steps=60
    )
    trainer.data_collator = LLM2SLMDataCollator(processor)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected.item(), rel=1e-4)
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(expected.item(), rel=1e-3)
    assert losses(trainer)[-1] < 0.6 * losses(trainer)[0]


@pytest.mark.parametrize("rows", [ROWS, Dataset.from_list(ROWS)], ids=["list", "dataset"])
def test_forgotten_remove_unused_columns(small, tmp_path, rows):
    """The trainer's default takes the columns away; whoever notices first says what to set."""
    trainer = make_trainer(*small, tmp_path, rows=rows, max_steps=1, remove_unused_columns=True)
    with pytest.raises(ValueError, match="`?remove_unused_columns=False`?"):
        trainer.train()


# Checkpoints -------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def larger(zoo, tmp_path_factory):
    """Folders of an LLM and of SLMs of both kinds, large enough that a file's header weighs nothing beside the weights."""
    root = tmp_path_factory.mktemp("larger")
    t5 = {
        "vocab_size": VOCAB_SIZE,
        "d_model": 256,
        "d_kv": 64,
        "d_ff": 1024,
        "num_layers": 2,
        "num_heads": 4,
        "decoder_start_token_id": 0,
    }
    ids = {"pad_token_id": 0, "eos_token_id": 2}
    llama = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 256,
        "intermediate_size": 1024,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    torch.manual_seed(0)
    models = {
        "llm": T5ForConditionalGeneration(T5Config(**t5 | {"num_layers": 4}, **ids)),
        "t5": T5ForConditionalGeneration(T5Config(**t5, **ids)),
        "llama": LlamaForCausalLM(LlamaConfig(**llama, **ids)),
    }
    for name, model in models.items():
        model.save_pretrained(root / name)
        zoo.tokenizers["bpe"].save_pretrained(root / name)
    return root


@pytest.mark.parametrize("slm", ["t5", "llama"])
def test_checkpoints_are_slim_and_load(larger, tmp_path, slm):
    """
    A `checkpoint-*` folder weighs what projector and SLM weigh, its optimizer twice that; no byte of the LLM. It loads by
    `AutoModel` and `AutoProcessor` and scores as the model in memory did.
    """
    sources = (larger / "llm", larger / slm)
    model = LLM2SLMForConditionalGeneration.from_llm_slm_pretrained(*sources, fusion="add")
    processor = LLM2SLMProcessor.from_llm_slm_pretrained(*sources, fusion="add")
    trainer = make_trainer(model, processor, tmp_path, max_steps=2, save_strategy="steps", save_steps=1)
    trainer.train()
    folders = sorted(tmp_path.glob("checkpoint-*"))
    assert [folder.name for folder in folders] == ["checkpoint-1", "checkpoint-2"]

    trained = sum(p.nbytes for part in (model.projector, model.slm) for p in part.parameters())
    frozen = sum(p.nbytes for p in model.llm.parameters())
    assert frozen > 0.5 * trained
    for folder in folders:
        files = list(folder.glob("*.safetensors"))
        assert trained <= sum(file.stat().st_size for file in files) <= 1.01 * trained
        for file in files:
            with safe_open(file, framework="pt") as tensors:
                assert {key.split(".")[1] for key in tensors.keys()} == {"projector", "slm"}
        assert (folder / "optimizer.pt").stat().st_size <= 2.03 * trained
        assert {file.name for file in folder.glob("*.bin")} <= {"training_args.bin"} and not (folder / "llm").exists()

    batch = LLM2SLMDataCollator(processor)(ROWS)
    loaded = AutoModel.from_pretrained(folders[-1])
    with torch.no_grad():
        torch.testing.assert_close(loaded(**batch).loss, model.eval()(**batch).loss, rtol=0, atol=1e-6)
    again = LLM2SLMDataCollator(AutoProcessor.from_pretrained(folders[-1]))(ROWS)
    assert {name: tensor.tolist() for name, tensor in again.items()} == {n: t.tolist() for n, t in batch.items()}


def test_load_best_model_at_end(both, tmp_path):
    """The checkpoint with the best score, here the highest loss and so the first, is in memory at the end, LLM and all."""
    model, processor = both
    without_dropout(model)
    trainer = make_trainer(
        model,
        processor,
        tmp_path,
        eval_rows=ROWS,
        max_steps=24,
        eval_strategy="steps",
        eval_steps=8,
        save_strategy="steps",
        save_steps=8,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,
    )
    trainer.train()
    scores = {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
    best = max(scores, key=scores.get)
    assert best == 8 and trainer.state.best_metric == scores[best]
    assert pathlib.Path(trainer.state.best_model_checkpoint).name == f"checkpoint-{best}"
    assert trainer.evaluate()["eval_loss"] == pytest.approx(scores[best], rel=1e-5)
    expected = AutoModel.from_pretrained(trainer.state.best_model_checkpoint)
    for (name, parameter), value in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(parameter, value), name


@pytest.mark.parametrize(
    "kind",
    [
        "small",
        "small_causal",
    ],
)
def test_resuming_warns_of_nothing(request, kind, tmp_path, caplog):
    """What a checkpoint leaves to the LLM's own repository is not missing from it."""
    model, processor = request.getfixturevalue(kind)
    settings = {"save_strategy": "steps", "save_steps": 2}
    make_trainer(model, processor, tmp_path, max_steps=2, **settings).train()
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        resumed = make_trainer(model, processor, tmp_path, max_steps=3, **settings)
        resumed.train(resume_from_checkpoint=True)
    finally:
        logger.removeHandler(caplog.handler)
    assert resumed.state.global_step == 3 and len(losses(resumed)) == 3
    # (The trainer also tells that the tokenizer has a bos token that T5's configuration does not name.)
    assert [text for text in map(logging.LogRecord.getMessage, caplog.records) if "missing" in text] == []


def read_losses(file):
    return {step: values for step, *values in map(json.loads, file.read_text().splitlines())}


def test_killed_and_resumed(zoo, tmp_path):
    """
    A run is killed (SIGKILL) beyond its last checkpoint and resumed: from there on each step has the loss and gradient
    norm of a run that was never interrupted, with the order of the rows and the dropout that it would have had.
    """
    model, processor = zoo.compose(Pair("llama", "t5", "align"))
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    rows = [
        {"prompt": f"{row['prompt']} {index}", "completion": row["completion"]} for index in range(3) for row in ROWS
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    killed = tmp_path / "killed.jsonl"
    errors = tmp_path / "errors.txt"
    with errors.open("w") as stderr:
        process = subprocess.Popen(
            [sys.executable, interrupted_run.__file__, str(tmp_path), "killed"],
            env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=stderr,
        )
    try:
        uninterrupted = interrupted_run.run(tmp_path, "whole")  # meanwhile
        deadline = time.monotonic() + 120
        while not killed.exists() or len(killed.read_text().splitlines()) < interrupted_run.HANG_AT:
            assert process.poll() is None, errors.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == -9
    expected = read_losses(tmp_path / "whole.jsonl")
    assert list(expected) == list(range(1, 11)) and len({loss for loss, _ in expected.values()}) == 10
    before = read_losses(killed)
    assert list(before) == list(range(1, 9))
    assert sorted(folder.name for folder in (tmp_path / "killed").iterdir()) == ["checkpoint-3", "checkpoint-6"]

    killed.rename(tmp_path / "before.jsonl")
    resumed = interrupted_run.run(tmp_path, "killed", resume=True)
    after = read_losses(killed)
    assert list(after) == [7, 8, 9, 10]  # from checkpoint-6 on
    for run in (before, after):
        for step, values in run.items():
            assert values == pytest.approx(expected[step], rel=1e-6), step
    for (name, parameter), value in zip(
        resumed.model.named_parameters(), uninterrupted.model.parameters(), strict=True
    ):
        torch.testing.assert_close(parameter, value, rtol=0, atol=1e-6, msg=name)
