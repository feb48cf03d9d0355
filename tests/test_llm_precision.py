"""The frozen LLM in another precision than the SLM: bfloat16, float16, int8 and 4-bit, trained beside, saved and reloaded."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from conftest import IDS, PROMPTS, RESPONSES, VOCAB_SIZE
from safetensors import safe_open
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    TorchAoConfig,
)

from transformers_llm2slm import LLM2SLMForConditionalGeneration, LLM2SLMProcessor

load = LLM2SLMForConditionalGeneration.from_pretrained
compose = LLM2SLMForConditionalGeneration.from_llm_slm_pretrained

# Widths that 4-bit kernels take: two blocks of 64 weights a row, so that the order of their scales shows.
LLMS = {
    "t5": lambda: T5ForConditionalGeneration(
        T5Config(vocab_size=VOCAB_SIZE, d_model=128, d_kv=32, d_ff=128, num_layers=2, num_heads=4, **IDS)
    ),
    "llama": lambda: LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=128,
            intermediate_size=192,
            num_hidden_layers=2,
            num_attention_heads=4,
            **IDS,
        )
    ),
}
PRECISIONS = ["bfloat16", "float16", "int8", "nf4", "fp4", "torchao-int8"]


def arguments(precision: str) -> dict[str, Any]:
    """What asks for an LLM in this precision."""
    if precision.startswith("torchao"):
        quantization = pytest.importorskip("torchao.quantization")
        return {"llm_quantization_config": TorchAoConfig(quantization.Int8WeightOnlyConfig())}
    if "float" in precision:
        return {"llm_dtype": precision}
    pytest.importorskip("bitsandbytes")
    if precision == "int8":
        return {"llm_quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
    return {"llm_quantization_config": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=precision)}


def precision_of(llm: nn.Module) -> str:
    """The precision that all linear layers of the LLM are really in, but for those that its family keeps in float32."""
    kept = llm._keep_in_fp32_modules or ()
    linear = [m for name, m in llm.named_modules() if isinstance(m, nn.Linear) and name.split(".")[-1] not in kept]
    assert len(linear) >= 10
    kinds = {
        (type(m).__name__, type(m.weight.data).__name__, str(m.weight.dtype), getattr(m.weight, "quant_type", None))
        for m in linear
    }
    (kind,) = kinds
    names = {
        ("Linear8bitLt", "Tensor", "torch.int8", None): "int8",
        ("Linear4bit", "Tensor", "torch.uint8", "nf4"): "nf4",
        ("Linear4bit", "Tensor", "torch.uint8", "fp4"): "fp4",
        ("Linear", "Int8Tensor", "torch.float32", None): "torchao-int8",
    }
    return names.get(kind) or kind[2].removeprefix("torch.")


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of all parameters, what torchao holds as plain tensors."""
    return {
        name: (p.data if type(p.data) is torch.Tensor else p.data.dequantize()).clone()
        for name, p in model.named_parameters()
    }


@pytest.fixture(scope="module")
def llms(zoo, tmp_path_factory):
    """Folders with an LLM each, wide enough to be quantised."""
    root = tmp_path_factory.mktemp("llms")
    for name, make in LLMS.items():
        torch.manual_seed(0)
        model = make()
        for parameter in model.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.1)
        model.tie_weights()
        model.save_pretrained(root / name)
        zoo.tokenizers["bpe"].save_pretrained(root / name)
    return {name: str(root / name) for name in LLMS}


@pytest.fixture
def make(zoo, llms):
    """Composes a model in a precision, with a batch for it."""

    def make(precision, llm="llama", slm="llama"):
        folder = zoo.checkpoint(slm, "bpe", "slm")
        torch.manual_seed(0)
        model = compose(llms[llm], folder, fusion="add", **arguments(precision))
        processor = LLM2SLMProcessor.from_llm_slm_pretrained(llms[llm], folder, fusion="add")
        return model, processor(text=PROMPTS, text_target=RESPONSES, padding=True, return_tensors="pt")

    return make


@pytest.mark.parametrize(("llm", "slm"), [("t5", "t5"), ("llama", "llama")])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_train_save_and_reload(make, precision, llm, slm, tmp_path):
    """One step moves all of projector and SLM, in float32, and not a bit of the LLM; it is reloaded in its precision."""
    model, batch = make(precision, llm, slm)
    assert precision_of(model.llm) == precision
    before = weights(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    model(**batch).loss.backward()
    optimizer.step()
    model.eval()
    for name, parameter in weights(model).items():
        part = name.split(".")[1]
        assert torch.equal(parameter, before[name]) == (part == "llm"), name
        assert part == "llm" or parameter.dtype is torch.float32

    with torch.no_grad():
        logits = model(**batch).logits
        assert logits.dtype is torch.float32
        model.save_pretrained(tmp_path)
        torch.testing.assert_close(model(**batch).logits, logits, rtol=0, atol=0)  # saving did not touch the LLM
        with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
            assert {key.split(".")[1] for key in file.keys()} == {"projector", "slm"}
        for cls in (LLM2SLMForConditionalGeneration, AutoModel):
            again = cls.from_pretrained(tmp_path)
            assert precision_of(again.llm) == precision
            assert {p.dtype for part in (again.slm, again.projector) for p in part.parameters()} == {torch.float32}
            torch.testing.assert_close(again(**batch).logits, logits, rtol=0, atol=1e-6)


@pytest.mark.parametrize("load_llm", [True, False])
def test_another_precision_than_recorded(make, load_llm, tmp_path):
    """What is asked for is what is loaded, and what the config says from then on; `None` takes the quantisation away."""
    model, _ = make("bfloat16")
    model.save_pretrained(tmp_path)
    steps = [
        ({}, "bfloat16"),
        ({"llm_dtype": torch.float16}, "float16"),
        ({"llm_dtype": "float32"}, "float32"),
        (arguments("int8"), "int8"),
        ({}, "int8"),
        (arguments("nf4"), "nf4"),
        ({"llm_quantization_config": None, "llm_dtype": "bfloat16"}, "bfloat16"),
    ]
    for step, precision in steps:
        model = load(tmp_path, load_llm=load_llm, **step)
        if load_llm:
            assert precision_of(model.llm) == precision
        model.save_pretrained(tmp_path)
        assert precision_of(load(tmp_path).llm) == precision
        config = json.loads((tmp_path / "config.json").read_text())
        assert config["llm_dtype"] == ("float32" if precision in ("int8", "nf4") else precision)
        assert (config["llm_quantization_config"] is None) == ("float" in precision)


@pytest.mark.parametrize("precision", ["bfloat16", "float16", "int8", "nf4"])
def test_self_contained(make, llms, precision, tmp_path, recwarn):
    """The LLM's files hold it as it was in memory; a slim checkpoint of such a model names the original again."""
    model, batch = make(precision)
    logits = model(**batch).logits
    model.save_pretrained(tmp_path)
    load(tmp_path).save_pretrained(tmp_path, save_llm=True)
    again = load(tmp_path)
    assert again.llm.name_or_path != llms["llama"] and precision_of(again.llm) == precision
    torch.testing.assert_close(again(**batch).logits, logits, rtol=0, atol=1e-6)
    again.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert again.llm.name_or_path == llms["llama"] and precision_of(again.llm) == precision
    torch.testing.assert_close(again(**batch).logits, logits, rtol=0, atol=1e-6)
    assert not [w for w in recwarn if "already has a `quantization_config`" in str(w.message)]


def test_weights_that_were_rearranged_are_not_saved(make, tmp_path):
    model, _ = make("nf4")
    model.llm.layers[0].mlp.up_proj.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(ValueError, match="can't write this 4-bit LLM: .* Load the model anew and save it before"):
        model.save_pretrained(tmp_path, save_llm=True)
    assert not list(tmp_path.iterdir())


def test_state_dict_leaves_the_llm_alone(make, monkeypatch):
    """bitsandbytes rewrites 4-bit weights when it is asked for their state dict, and can get them wrong."""
    model, _ = make("nf4")
    expected = model.state_dict().keys()
    monkeypatch.setattr(model.llm, "state_dict", None)  # can't be called
    assert model.state_dict().keys() == expected and model.model.llm is model.llm
    assert {key.split(".")[1] for key in expected} == {"projector", "slm"}


def test_quantised_llm_in_memory_and_quantised_repository(zoo, llms, tmp_path):
    """Both are taken as they are, recorded, and found again."""
    slm = zoo.checkpoint("t5", "bpe", "slm")
    quantization = arguments("int8")["llm_quantization_config"]
    whole = AutoModelForCausalLM.from_pretrained(llms["llama"], quantization_config=quantization)
    whole.save_pretrained(tmp_path / "llm-int8")
    ids = torch.tensor([[5, 6, 7]])
    for llm in (whole, str(tmp_path / "llm-int8")):
        model = compose(llm, slm, fusion="replace")
        assert precision_of(model.llm) == "int8" and model.config.llm_quantization_config["load_in_8bit"]
        model.save_pretrained(tmp_path / "slim")
        model.save_pretrained(tmp_path / "whole", save_llm=True)
        in_memory = {"llm_model": whole} if llm is whole else {}
        for again in (load(tmp_path / "slim"), load(tmp_path / "slim", **in_memory), load(tmp_path / "whole")):
            assert precision_of(again.llm) == "int8" and again.config.llm_quantization_config["load_in_8bit"]
            torch.testing.assert_close(again(input_ids=ids).logits, model(input_ids=ids).logits, rtol=0, atol=1e-6)


def test_slm_cut_from_a_quantised_llm(llms, tmp_path):
    """The SLM is cut from the LLM as stored and stays in float32; a model that is quantised in memory can't be cut."""
    model = compose(llms["llama"], slm_layers=1, **arguments("nf4"))
    assert precision_of(model.llm) == "nf4" and model.config.llm_layer == [1]
    stored = AutoModel.from_pretrained(llms["llama"]).layers[1].state_dict()
    for name, parameter in model.slm.model.layers[0].state_dict().items():
        assert parameter.dtype is torch.float32 and torch.equal(parameter, stored[name])
    model.save_pretrained(tmp_path)
    assert precision_of(load(tmp_path).llm) == "nf4"
    whole = AutoModelForCausalLM.from_pretrained(
        llms["llama"], quantization_config=arguments("int8")["llm_quantization_config"]
    )
    with pytest.raises(
        ValueError, match="can't be cut from a quantised LlamaForCausalLM: .*`llm_quantization_config="
    ):
        compose(whole, slm_layers=1)


@pytest.mark.parametrize("fusion", ["add", "kv"])
@pytest.mark.parametrize("precision", ["int8", "nf4"])
def test_quantised_slm_has_its_projector_in_floating_point(llms, tmp_path, precision, fusion):
    """`quantization_config` without a prefix is the SLM's. Its projector was trained in floating point, and is small."""
    model = compose(llms["llama"], llms["llama"], fusion=fusion)
    model.save_pretrained(tmp_path)
    batch = LLM2SLMProcessor.from_llm_slm_pretrained(llms["llama"], fusion=fusion)(
        PROMPTS, text_target=RESPONSES, padding=True, return_tensors="pt"
    )
    quantization = arguments(precision)["llm_quantization_config"]
    quantised = AutoModel.from_pretrained(tmp_path, quantization_config=quantization)
    layer = quantised.slm.model.layers[0].mlp.up_proj
    assert type(layer).__name__ == {"int8": "Linear8bitLt", "nf4": "Linear4bit"}[precision]
    assert {type(module) for module in quantised.projector.layers} == {nn.Linear}
    for name, parameter in quantised.projector.named_parameters():
        torch.testing.assert_close(parameter.float(), model.projector.get_parameter(name), rtol=1e-2, atol=1e-2)
    logits, expected = (m(**batch).logits.float() for m in (quantised, model))
    assert torch.cosine_similarity(logits, expected, dim=-1).mean() > 0.9
    assert quantised.generate(batch["input_ids"][:1], max_new_tokens=4).shape[0] == 1
