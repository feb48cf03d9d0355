"""SLMs cut from their LLM: that their layers compute what they did there, for every family, and what can't be cut."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import make_batch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM, Qwen3MoeConfig

from transformers_llm2slm import LLM2SLMForConditionalGeneration, LLM2SLMProcessor
from transformers_llm2slm.loading import cut_slm
from transformers_llm2slm.structure import DroppedModule


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "mistral", "phi3"])
@torch.no_grad()
def test_cut_decoder_goes_on_where_the_llm_stops(zoo, tmp_path, family, layers):
    """
    Untrained, the SLM of the LLM's top k layers has the LLM's own states over the prompt in each of its layers, and so
    its keys and values; its first token is the LLM's own.
    """
    llm = zoo.checkpoint(family, "bpe", "llm")
    model = LLM2SLMForConditionalGeneration.from_llm_slm_pretrained(llm, slm_layers=layers, fusion="replace")
    processor = LLM2SLMProcessor.from_llm_slm_pretrained(llm)
    config = model.config
    assert (config.fusion, config.projector_init, config.llm_layer) == ("replace", "identity", 3 - layers)
    assert config.slm_layers == list(range(3 - layers, 3))
    assert config.get_text_config().num_hidden_layers == layers

    batch = make_batch(processor, side="left")
    labels = batch.pop("labels")
    expected = model.llm(**batch, output_hidden_states=True).hidden_states[-layers - 1 :]
    prompt = model.encode_prompt(**batch)
    states = model.slm(**model.model.slm_inputs(prompt, None), output_hidden_states=True).hidden_states
    real = batch["attention_mask"].bool()
    assert len(states) == len(expected) == layers + 1
    for ours, theirs in zip(states, expected, strict=True):
        torch.testing.assert_close(ours[real], theirs[real], rtol=0, atol=1e-5)
    whole = AutoModelForCausalLM.from_pretrained(llm)
    first = whole(**batch).logits[:, -1]
    torch.testing.assert_close(model(**batch, labels=labels).logits[:, 0], first, rtol=0, atol=1e-4)

    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    batch["labels"] = labels
    torch.testing.assert_close(loaded(**batch).logits, model(**batch).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family, layers", [("gpt2", [0, 2]), ("gpt-neo", [1, 3]), ("gpt-neo", 3)])
@torch.no_grad()
def test_cut_layers_compute_what_they_did(zoo, tmp_path, family, layers):
    """
    Any choice of layers, with what is listed layer by layer (GPT-Neo's attention types), saved and loaded too: each gives
    what the LLM's own layer gives for the same input. These families add learned positions to every input.
    """
    llm = zoo.checkpoint(family, "bpe", "llm")
    composed = LLM2SLMForConditionalGeneration.from_llm_slm_pretrained(llm, slm_layers=layers)
    composed.save_pretrained(tmp_path)
    whole = AutoModelForCausalLM.from_pretrained(llm)
    chosen = composed.config.slm_layers
    assert chosen == ([1, 2, 3] if layers == 3 else layers)
    hidden = torch.randn(1, 20, 32)
    positions = torch.arange(20)[None]
    for model in (composed, LLM2SLMForConditionalGeneration.from_pretrained(tmp_path)):
        if family == "gpt-neo":
            types = [whole.config.attention_layers[layer] for layer in chosen]
            assert model.slm.config.attention_layers == types
            assert [block.attn.attention_type for block in model.slm.transformer.h] == types
        assert torch.equal(model.slm.transformer.wte.weight, whole.transformer.wte.weight)
        states = model.slm(inputs_embeds=hidden, output_hidden_states=True).hidden_states
        torch.testing.assert_close(states[0], hidden + whole.transformer.wpe(positions), rtol=0, atol=1e-6)
        reference = copy.deepcopy(whole)
        reference.transformer.h = nn.ModuleList(reference.transformer.h[layer] for layer in chosen)
        expected = reference(inputs_embeds=hidden).logits
        torch.testing.assert_close(model.slm(inputs_embeds=hidden).logits, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["t5", "mt5", "bart", "pegasus", "t5gemma"])
@pytest.mark.parametrize("layers", [1, [1, 0], [-1]], ids=str)
@torch.no_grad()
def test_cut_encoder_decoder(zoo, tmp_path, family, layers):
    """An enc-dec LLM's encoder reads, and the chosen layers of its decoder write; the SLM has no encoder of its own."""
    llm = zoo.checkpoint(family, "bpe", "llm")
    model = LLM2SLMForConditionalGeneration.from_llm_slm_pretrained(llm, slm_layers=layers)
    processor = LLM2SLMProcessor.from_llm_slm_pretrained(llm)
    whole = AutoModelForSeq2SeqLM.from_pretrained(llm)
    total = len(getattr(whole.get_decoder(), "block", None) or whole.get_decoder().layers)
    chosen = {"1": [0], "[1, 0]": [1, 0], "[-1]": [total - 1]}[str(layers)]
    config = model.config
    assert (config.slm_layers, config.slm_encoder, config.fusion) == (chosen, "skip", "replace")
    assert (config.projector_init, config.llm_layer) == ("identity", -1)
    assert isinstance(model.slm.get_encoder(), DroppedModule)
    name = "block" if family in ("t5", "mt5") else "layers"
    ours, theirs = getattr(model.slm.get_decoder(), name), getattr(whole.get_decoder(), name)
    assert len(ours) == len(chosen)
    for layer, origin in zip(ours, chosen, strict=True):
        expected = dict(theirs[origin].named_parameters())
        for key, parameter in layer.named_parameters():
            if "relative_attention_bias" in key:  # only a first layer has one
                expected[key] = dict(theirs[0].named_parameters())[key]
            assert torch.equal(parameter, expected[key]), key
    if family in ("t5", "mt5"):
        assert "layer.0.SelfAttention.relative_attention_bias.weight" in dict(ours[0].named_parameters())

    # Untrained it is the LLM with fewer layers: the same as taking them out of the LLM itself.
    batch = make_batch(processor)
    keep = nn.ModuleList(copy.deepcopy(theirs[origin]) for origin in chosen)
    if family in ("t5", "mt5"):
        bias = theirs[0].layer[0].SelfAttention.relative_attention_bias
        for index, layer in enumerate(keep):
            layer.layer[0].SelfAttention.has_relative_attention_bias = index == 0
            layer.layer[0].SelfAttention.relative_attention_bias = bias
            layer.layer[0].SelfAttention.layer_idx = layer.layer[1].EncDecAttention.layer_idx = index
    setattr(whole.get_decoder(), name, keep)
    if family == "t5gemma":
        decoder = whole.get_decoder().config
        decoder.layer_types = [decoder.layer_types[origin] for origin in chosen]
        decoder.num_hidden_layers = len(chosen)
    expected = whole(**batch, use_cache=False).logits
    torch.testing.assert_close(model(**batch).logits, expected, rtol=0, atol=1e-4)
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(**batch).logits, expected, rtol=0, atol=1e-4)
    tokens = model.generate(batch["input_ids"], attention_mask=batch["attention_mask"], max_new_tokens=4)
    again = loaded.generate(batch["input_ids"], attention_mask=batch["attention_mask"], max_new_tokens=4)
    assert tokens.tolist() == again.tolist()


def test_cut_from_a_model_in_memory(zoo):
    """The SLM has its own copy of the weights: training it leaves the LLM as it is."""
    llm = AutoModelForCausalLM.from_pretrained(zoo.checkpoint("llama", "bpe", "llm"))
    model = LLM2SLMForConditionalGeneration.from_llm_slm_pretrained(llm, slm_layers=2)
    assert model.llm.layers[2].mlp.up_proj.weight is llm.model.layers[2].mlp.up_proj.weight
    pointers = {parameter.data_ptr() for parameter in llm.parameters()}
    assert not any(parameter.data_ptr() in pointers for parameter in model.slm.parameters())
    assert all(parameter.requires_grad for parameter in model.slm.parameters())


def test_cuts_that_are_refused(zoo):
    compose = LLM2SLMForConditionalGeneration.from_llm_slm_pretrained
    llm, seq2seq = zoo.checkpoint("llama", "bpe", "llm"), zoo.checkpoint("bart", "bpe", "llm")
    for source, layers in ((llm, 0), (llm, 4), (seq2seq, 4)):
        with pytest.raises(ValueError, match=rf"`slm_layers` must lie in \[1, 3\] .* 3 decoder layers, got {layers}"):
            compose(source, slm_layers=layers)
    for layers in ([], [0, 3], [-4]):
        with pytest.raises(
            ValueError, match=r"`slm_layers` must name layers in \[0, 2\] of the LLM's decoder, got \["
        ):
            compose(llm, slm_layers=layers)
    body = AutoModel.from_pretrained(llm)
    with pytest.raises(ValueError, match="can't be cut from a LlamaModel: it has no LM head.*as AutoModelForCausalLM"):
        compose(body, slm_layers=1)
    for arguments in ({}, {"slm": llm, "slm_layers": 1}):
        with pytest.raises(ValueError, match="either an SLM, or `slm_layers` to cut one from the LLM, and not both"):
            compose(llm, **arguments)


def test_layers_of_several_kinds(zoo):
    """Where a configuration makes layers dense or of experts by their place, others can't stand in it."""
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 320}
    config = Qwen3MoeConfig(
        **sizes,
        num_hidden_layers=4,
        num_experts=4,
        intermediate_size=48,
        moe_intermediate_size=16,
        mlp_only_layers=[0, 1],
    )
    llm = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match=r"can't be cut to its layers \[2, 3\]: .* layers of another kind .*mlp"):
        cut_slm(llm, 2)
    slm, layers = cut_slm(llm, [0, 1, 3])
    assert layers == [0, 1, 3]
    for layer, origin in zip(slm.model.layers, (llm.model.layers[index] for index in layers), strict=True):
        assert type(layer.mlp) is type(origin.mlp)
        assert all(torch.equal(a, b) for a, b in zip(layer.parameters(), origin.parameters(), strict=True))


def test_precision_of_the_llm_is_its_own(zoo):
    """What is cut is trained: it comes from the weights as stored, whatever the LLM reads in."""
    source = zoo.checkpoint("llama", "bpe", "llm")
    stored = AutoModelForCausalLM.from_pretrained(source)
    for options in ({}, {"slm_dtype": "float32"}):
        model = LLM2SLMForConditionalGeneration.from_llm_slm_pretrained(
            source, slm_layers=2, llm_dtype="bfloat16", **options
        )
        assert (model.llm.dtype, model.slm.dtype) == (torch.bfloat16, torch.float32)
        assert torch.equal(model.slm.model.layers[1].mlp.up_proj.weight, stored.model.layers[2].mlp.up_proj.weight)
