"""PEFT: LoRA on the SLM, the projector in full, the LLM untouched; trained, saved alone, loaded, merged, pushed."""

from __future__ import annotations

import logging
import pathlib
import re
import warnings

import pytest
import torch
from conftest import PROMPTS, RESPONSES, Pair
from datasets import Dataset
from peft import AutoPeftModel, AutoPeftModelForSeq2SeqLM, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from test_sft import SETTINGS
from test_trainer import ROWS, make_trainer, without_dropout
from torch import nn
from transformers import AutoModel, AutoModelForSeq2SeqLM, Seq2SeqTrainer, Trainer, pipeline
from transformers.pytorch_utils import Conv1D
from transformers.utils import hub
from trl import SFTConfig, SFTTrainer

from transformers_llm2slm import LLM2SLMDataCollator, LLM2SLMForConditionalGeneration, prepare_sft_config
from transformers_llm2slm.lora import lora_config

# PEFT 0.21 asks and TRL 1.16 sets by the old name what transformers 5.23 calls `activation_checkpointing`.
pytestmark = pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing:FutureWarning")

load = LLM2SLMForConditionalGeneration.from_pretrained

PAIRS = [
    Pair("t5", "t5", "add"),
    Pair("bert", "t5", "align"),
    Pair("bart", "bart", "add"),
    Pair("gpt2", "t5gemma", "replace", (("slm_encoder", "skip"),)),
    Pair("llama", "llama", "align"),
    Pair("t5", "gpt2", "align"),
    Pair("gpt2", "gemma3", "align"),
    Pair("bert", "opt", "replace"),
    Pair("t5", "phi3", "replace"),
    Pair("mt5", "llama", "llm-embed"),
]


@pytest.fixture
def saved(request, zoo, tmp_path):
    """A model that was saved and loaded, as an adapter's base must be, and its processor."""
    pair = getattr(request, "param", Pair("t5", "t5", "add"))
    model, processor = zoo.compose(pair)
    model.save_pretrained(tmp_path / "base")
    return without_dropout(load(tmp_path / "base")), processor


def every_pair(function):
    return pytest.mark.parametrize("saved", PAIRS, ids=str, indirect=True)(function)


def batch_of(processor):
    return processor(text=PROMPTS, text_target=RESPONSES, padding=True, return_tensors="pt")


def disturb(model):
    """What training does to an adapter: all that is trained is another than at the start."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn_like(parameter)
    return model.eval()


@every_pair
def test_what_is_adapted(saved):
    """A and B for each linear layer of the SLM but its LM head, the projector, nothing else; no warning of PEFT."""
    model, processor = saved
    logits = model(**batch_of(processor)).logits
    linear = {
        f"model.slm.{name}": sum(module.weight.shape)
        for name, module in model.slm.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and module is not model.get_output_embeddings()
    }
    projector = sum(parameter.numel() for parameter in model.projector.parameters())
    everything = sum(parameter.numel() for parameter in model.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        adapted = get_peft_model(model, lora_config(model, r=4, lora_alpha=8))
    names = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    layers = {name.removeprefix("base_model.model.").split(".lora_")[0] for name in names if ".lora_" in name}
    assert layers == set(linear) and len(linear) >= 8
    trained = 4 * sum(linear.values()) + projector
    # PEFT keeps the projector that it found beside the one that is trained.
    assert adapted.get_nb_trainable_parameters() == (trained, everything + trained)
    assert not [name for name in adapted.state_dict() if "llm." in name]
    torch.testing.assert_close(adapted.eval()(**batch_of(processor)).logits, logits, rtol=0, atol=1e-5)


@every_pair
@pytest.mark.parametrize("trainer", [Seq2SeqTrainer, SFTTrainer])
def test_training_moves_the_adapter_and_nothing_else(saved, trainer, tmp_path):
    model, processor = saved
    if trainer is SFTTrainer:
        trainer = SFTTrainer(
            model,
            prepare_sft_config(SFTConfig(str(tmp_path), **SETTINGS | {"learning_rate": 1e-2}), model),
            train_dataset=Dataset.from_list(ROWS),
            data_collator=LLM2SLMDataCollator(processor),
            processing_class=processor,
            peft_config=lora_config(model, r=4),
        )
        adapted = trainer.model
    else:
        adapted = get_peft_model(model, lora_config(model, r=4))
        trainer = make_trainer(adapted, processor, tmp_path, cls=trainer, max_steps=4)
    before = {name: parameter.detach().clone() for name, parameter in adapted.named_parameters()}
    loss = trainer.evaluate(ROWS)["eval_loss"]
    trainer.train()
    assert trainer.evaluate(ROWS)["eval_loss"] < loss
    for name, parameter in adapted.named_parameters():
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name
        trained = ".lora_" in name or ".projector.modules_to_save." in name
        assert parameter.requires_grad == trained and not (trained and ".llm." in name), name


@every_pair
def test_saved_alone_loaded_and_merged(saved, tmp_path):
    """An adapter alone gives the same logits and texts on its base; merged they are those of an ordinary model."""
    model, processor = saved
    batch, prompts = batch_of(processor), processor(text=PROMPTS, padding=True, return_tensors="pt")
    base = model(**batch).logits
    adapted = disturb(get_peft_model(model, lora_config(model, r=4)))
    logits = adapted(**batch).logits
    assert (logits - base).abs().max() > 0.1
    ids = adapted.generate(**prompts, max_new_tokens=8)

    adapted.save_pretrained(tmp_path / "adapter")
    keys = load_file(tmp_path / "adapter" / "adapter_model.safetensors").keys()
    assert {".".join(key.split(".")[2:4]) for key in keys} == {"model.slm", "model.projector"}
    size = (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size
    assert size < 0.75 * (tmp_path / "base" / "model.safetensors").stat().st_size

    again = PeftModel.from_pretrained(load(tmp_path / "base"), tmp_path / "adapter")
    auto = AutoPeftModel.from_pretrained(tmp_path / "adapter", import_allowlist=["transformers_llm2slm"])
    for loaded in (again, auto):
        assert loaded.get_base_model().llm is not None
        torch.testing.assert_close(loaded(**batch).logits, logits, rtol=0, atol=1e-5)
        assert torch.equal(loaded.generate(**prompts, max_new_tokens=8), ids)

    again.merge_adapter()
    torch.testing.assert_close(again(**batch).logits, logits, rtol=0, atol=1e-4)
    again.unmerge_adapter()
    torch.testing.assert_close(again(**batch).logits, logits, rtol=0, atol=1e-4)
    merged = again.merge_and_unload()
    assert (
        type(merged) is LLM2SLMForConditionalGeneration
        and merged.state_dict().keys() == load(tmp_path / "base").state_dict().keys()
    )
    torch.testing.assert_close(merged(**batch).logits, logits, rtol=0, atol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    for cls in (LLM2SLMForConditionalGeneration, AutoModel):
        reloaded = cls.from_pretrained(tmp_path / "merged")
        torch.testing.assert_close(reloaded(**batch).logits, merged(**batch).logits, rtol=0, atol=1e-6)


def test_trainer_checkpoint_is_an_adapter(saved, tmp_path):
    model, processor = saved
    adapted = get_peft_model(model, lora_config(model, r=4))
    make_trainer(adapted, processor, tmp_path, cls=Trainer, max_steps=2, save_strategy="steps", save_steps=2).train()
    checkpoint = tmp_path / "checkpoint-2"
    assert (checkpoint / "adapter_model.safetensors").exists() and not (checkpoint / "model.safetensors").exists()
    again = AutoPeftModel.from_pretrained(checkpoint, import_allowlist=["transformers_llm2slm"])
    batch = batch_of(processor)
    torch.testing.assert_close(again(**batch).logits, adapted.eval()(**batch).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("save_llm", [False, True])
def test_an_adapter_loads_as_a_model(saved, save_llm, tmp_path):
    """transformers finds the base that an adapter names, in every class; also one that holds its LLM."""
    model, processor = saved
    model.save_pretrained(tmp_path / "whole", save_llm=save_llm)
    model = load(tmp_path / "whole")
    adapted = disturb(get_peft_model(model, lora_config(model)))
    adapted.save_pretrained(tmp_path / "adapter")
    processor.save_pretrained(tmp_path / "whole")  # a pipeline takes that of the base
    batch, prompts = batch_of(processor), processor(text=PROMPTS, padding=True, return_tensors="pt")
    for cls in (LLM2SLMForConditionalGeneration, AutoModel, AutoModelForSeq2SeqLM):
        again = cls.from_pretrained(tmp_path / "adapter")
        torch.testing.assert_close(again(**batch).logits, adapted(**batch).logits, rtol=0, atol=1e-5)
    texts = processor.batch_decode(adapted.generate(**prompts, max_new_tokens=8), skip_special_tokens=True)
    pipe = pipeline("text2text-generation", model=str(tmp_path / "adapter"))
    assert [pipe(prompt, max_new_tokens=8)[0]["generated_text"] for prompt in PROMPTS] == texts


def test_a_checkpoint_that_lacks_weights_is_noticed(saved, tmp_path):
    model, _ = saved
    get_peft_model(model, lora_config(model)).save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    weights = load_file(file)
    gone = next(key for key in weights if "lora_B" in key)
    del weights[gone]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.warns(UserWarning, match=f"missing adapter keys.*{re.escape(gone.removesuffix('.weight'))}"):
        PeftModel.from_pretrained(load(tmp_path / "base"), tmp_path / "adapter")


def test_push_to_hub_uploads_the_adapter_alone(saved, monkeypatch):
    commits = []

    class Hub:
        def create_repo(self, repo_id, **kwargs):
            return type("Url", (), {"repo_id": f"org/{repo_id}"})

        def create_commit(self, repo_id, operations, **kwargs):
            commits.append((repo_id, sorted(operation.path_in_repo for operation in operations)))

    class Card:
        def save(self, path):
            pathlib.Path(path).write_text("---\nlibrary_name: peft\n---\n")

    monkeypatch.setattr(hub, "hf_api", Hub)
    monkeypatch.setattr(hub, "create_and_tag_model_card", lambda *args, **kwargs: Card())
    model, _ = saved
    get_peft_model(model, lora_config(model)).push_to_hub("mine")
    assert commits == [("org/mine", ["README.md", "adapter_config.json", "adapter_model.safetensors"])]


@pytest.mark.parametrize("targets", [["q", "v"], r".*SelfAttention\.(q|v)|.*EncDecAttention\.(q|v)"])
def test_own_targets_are_those_of_the_slm(small, targets):
    """The LLM is a T5 too, with layers of the same names; the same holds for modules that are trained in full."""
    model, _ = small
    config = lora_config(model, target_modules=targets, modules_to_save=["final_layer_norm"], use_rslora=True, r=2)
    assert config.use_rslora
    adapted = get_peft_model(model, config)
    trained = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert not [name for name in trained if ".llm." in name]
    layers = {name.split(".lora_")[0].rpartition(".")[2] for name in trained if ".lora_" in name}
    blocks = 3 + 2 * 2  # attention of the encoder, and both of the decoder
    assert layers == {"q", "v"} and len([name for name in trained if ".lora_" in name]) == blocks * 2 * 2
    assert len([name for name in trained if "final_layer_norm.modules_to_save" in name]) == 2


def test_all_linear_is_that_of_the_slm(small_causal):
    model, _ = small_causal
    assert lora_config(model, target_modules="all-linear") == lora_config(model)
    pattern = lora_config(model).target_modules
    assert re.fullmatch(pattern, "model.slm.model.layers.11.mlp.up_proj")
    assert not re.fullmatch(pattern, "model.llm.layers.0.mlp.up_proj")
    assert not re.fullmatch(pattern, "model.slm.lm_head")


def test_errors(small):
    model, _ = small
    with pytest.raises(
        ValueError, match=r"`target_modules` names 'c_attn', which the SLM \(T5For.*are k, o, q, v, wi, wo;"
    ):
        lora_config(model, target_modules=["q", "c_attn"])
    with pytest.raises(ValueError, match=r"`modules_to_save` names 'score'"):
        lora_config(model, modules_to_save=["score"])
    with pytest.raises(
        ValueError, match=r"`task_type='CAUSAL_LM'` makes an adapter that PEFT can't load .* Leave it out"
    ):
        lora_config(model, task_type="CAUSAL_LM")


@pytest.mark.parametrize("task_type", ["SEQ_2_SEQ_LM", "CAUSAL_LM"])
@pytest.mark.parametrize("pair", ["small", "small_causal"])
def test_a_task_type_changes_nothing(request, pair, task_type):
    """With one, PEFT names arguments that models have commonly, `inputs_embeds=None` for instance."""
    model, processor = request.getfixturevalue(pair)
    batch = batch_of(processor)
    logits = model(**batch).logits
    targets = ["q", "v"] if pair == "small" else ["q_proj", "v_proj"]
    adapted = get_peft_model(model, LoraConfig(task_type=task_type, target_modules=targets)).eval()
    torch.testing.assert_close(adapted(**batch).logits, logits, rtol=0, atol=1e-5)
    tokens = adapted.generate(**processor(PROMPTS[0], return_tensors="pt"), max_new_tokens=4)
    assert torch.equal(tokens, model.generate(**processor(PROMPTS[0], return_tensors="pt"), max_new_tokens=4))
    with pytest.raises(
        ValueError, match=r"takes no `inputs_embeds`: pass the prompt as `input_ids`, .* virtual tokens"
    ):
        adapted(inputs_embeds=torch.zeros(1, 4, 32), labels=batch["labels"])


def test_an_adapter_with_a_task_type_is_loaded(saved, tmp_path):
    model, processor = saved
    adapted = disturb(get_peft_model(model, lora_config(model, r=4, task_type="SEQ_2_SEQ_LM")))
    adapted.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForSeq2SeqLM.from_pretrained(tmp_path / "adapter").eval()
    assert torch.equal(loaded(**batch_of(processor)).logits, adapted(**batch_of(processor)).logits)


def test_a_model_that_was_never_saved(small, saved, caplog, monkeypatch, tmp_path):
    """Its adapter names no base, and that is said before it is trained."""
    monkeypatch.setattr(logging.getLogger("transformers_llm2slm"), "propagate", True)
    lora_config(saved[0])
    assert not caplog.records
    model, _ = small
    adapted = get_peft_model(model, lora_config(model))
    assert "an adapter of it will name no base model. Save it, load it" in caplog.text
    adapted.save_pretrained(tmp_path / "adapter")
    assert adapted.peft_config["default"].base_model_name_or_path is None
