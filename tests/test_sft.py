"""TRL's plain `SFTTrainer`: the losses, metrics and steps of `Seq2SeqTrainer`, on the batches of the same collator."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from conftest import Pair
from datasets import Dataset
from test_trainer import ROWS, losses, without_dropout
from torch.nn import functional as F
from transformers import AutoModel, AutoProcessor, Seq2SeqTrainer, Seq2SeqTrainingArguments
from trl import SFTConfig, SFTTrainer

from transformers_llm2slm import LLM2SLMDataCollator, prepare_sft_config

# TRL 1.16 turns on by the old name what transformers 5.23 calls `activation_checkpointing`.
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")

PAIRS = [
    Pair("t5", "t5", "add"),
    Pair("bert", "t5", "align"),
    Pair("bart", "bart", "add"),
    Pair("gpt2", "t5gemma", "replace", (("slm_encoder", "skip"),)),
    Pair("llama", "llama", "align"),
    Pair("gpt2", "gemma3", "align"),
    Pair("bert", "opt", "replace"),
    Pair("mt5", "llama", "llm-embed"),
    Pair("llama", "qwen3", "kv"),
]
SETTINGS = {
    "learning_rate": 1e-3,
    "lr_scheduler_type": "constant",
    "per_device_train_batch_size": 2,
    "per_device_eval_batch_size": 4,  # TRL gives each batch one weight, `Trainer` each token
    "max_steps": 4,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "bf16": False,
    "seed": 3,
}


def sft_trainer(model, processor, folder, **settings):
    return SFTTrainer(
        model,
        prepare_sft_config(SFTConfig(str(folder), **SETTINGS | settings), model),
        train_dataset=Dataset.from_list(ROWS),
        eval_dataset=Dataset.from_list(ROWS),
        data_collator=LLM2SLMDataCollator(processor),
        processing_class=processor,
    )


@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_losses_are_those_of_seq2seq_trainer(pair, zoo, tmp_path):
    """Same seed, same batches: the losses agree at every step and in evaluation; all that is trained has moved."""
    model, processor = zoo.compose(pair)
    model = without_dropout(model)
    other = copy.deepcopy(model)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

    sft = sft_trainer(model, processor, tmp_path / "sft")
    sft.train()
    arguments = Seq2SeqTrainingArguments(str(tmp_path / "seq2seq"), remove_unused_columns=False, **SETTINGS)
    rows = Dataset.from_list(ROWS)
    seq2seq = Seq2SeqTrainer(
        other,
        arguments,
        train_dataset=rows,
        eval_dataset=rows,
        data_collator=LLM2SLMDataCollator(processor),
        processing_class=processor,
    )
    seq2seq.train()
    assert len(losses(sft)) == 4 and losses(sft)[-1] < losses(sft)[0]
    assert losses(sft) == pytest.approx(losses(seq2seq), abs=1e-4)
    assert sft.evaluate()["eval_loss"] == pytest.approx(seq2seq.evaluate()["eval_loss"], abs=1e-4)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name
        assert parameter.requires_grad != name.startswith("model.llm."), name


def test_metrics(small_causal, tmp_path):
    """Token accuracy and entropy are those of the scored positions, by hand from the model's own logits."""
    model, processor = small_causal
    trainer = sft_trainer(without_dropout(model), processor, tmp_path)
    metrics = trainer.evaluate()
    batch = LLM2SLMDataCollator(processor)(ROWS)
    with torch.no_grad():
        logits, labels = model(**batch).logits, batch["labels"]
    scored = labels != -100
    log_probs = logits.log_softmax(dim=-1)
    entropy = -(log_probs.exp() * log_probs).sum(dim=-1)[scored].mean().item()
    assert metrics["eval_entropy"] == pytest.approx(entropy, abs=1e-4) and 0 < entropy < math.log(logits.shape[-1])
    accuracy = (logits.argmax(dim=-1) == labels)[scored].float().mean().item()
    assert metrics["eval_mean_token_accuracy"] == pytest.approx(accuracy, abs=1e-6)
    assert metrics["eval_loss"] == pytest.approx(F.cross_entropy(logits[scored], labels[scored]).item(), abs=1e-4)


def test_learns_and_saves_a_whole_checkpoint(small_causal, tmp_path):
    """Conversations are learned by heart; what is saved on the way loads by the Auto classes and answers them."""
    model, processor = small_causal
    processor.chat_template = "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
    rows = [
        {"messages": [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]}
        for row in ROWS
    ]
    without_dropout(model)
    settings = SETTINGS | {"max_steps": 60, "learning_rate": 2e-2, "per_device_train_batch_size": 4}
    settings |= {"save_strategy": "steps", "save_steps": 60}
    trainer = SFTTrainer(
        model,
        prepare_sft_config(SFTConfig(str(tmp_path), **settings), model),
        train_dataset=Dataset.from_list(rows),
        data_collator=LLM2SLMDataCollator(processor),
        processing_class=processor,
    )
    trainer.train()
    history = [entry["mean_token_accuracy"] for entry in trainer.state.log_history if "loss" in entry]
    assert history[0] < 0.2 and history[-1] == 1.0
    checkpoint = tmp_path / "checkpoint-60"
    assert json.loads((checkpoint / "trainer_state.json").read_text())["global_step"] == 60
    model, processor = AutoModel.from_pretrained(checkpoint), AutoProcessor.from_pretrained(checkpoint)
    prompts = processor(text=[row["messages"][:-1] for row in rows], padding=True, return_tensors="pt")
    texts = processor.batch_decode(model.generate(**prompts, max_new_tokens=24), skip_special_tokens=True)
    assert texts == [row["completion"] for row in ROWS]


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"packing": True}, r"`packing=True` does not go with an LLM-to-SLM model: .*no one sequence"),
        ({"assistant_only_loss": True}, r"`assistant_only_loss=True` does not go .*only the response is scored"),
        ({"label_smoothing_factor": 0.1}, r"`label_smoothing_factor=0.1` .* use `Seq2SeqTrainer`"),
        ({"completion_only_loss": False}, r"`completion_only_loss=False` does not go"),
    ],
)
def test_options_that_do_not_go(small, tmp_path, settings, error):
    with pytest.raises(ValueError, match=error):
        prepare_sft_config(SFTConfig(str(tmp_path), **SETTINGS | settings), small[0])


def test_a_bias_on_the_logits_is_refused(zoo, tmp_path):
    model, _ = zoo.compose(Pair("qwen3", "marian", "replace"))
    arguments = SFTConfig(str(tmp_path), **SETTINGS)
    prepared = prepare_sft_config(arguments, model)
    assert prepared.dataset_kwargs == {"skip_prepare_dataset": True} and prepared.max_length is None
    assert arguments.remove_unused_columns and not prepared.remove_unused_columns  # the given one is left as it is
    model.slm.final_logits_bias += 0.5
    with pytest.raises(ValueError, match=r"MarianMTModel adds a `final_logits_bias` .* Use `Seq2SeqTrainer`"):
        prepare_sft_config(arguments, model)
