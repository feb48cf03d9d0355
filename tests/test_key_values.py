"""`fusion="kv"`: an SLM that goes on from the keys and values that the LLM made of the prompt."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import PROMPTS, RESPONSES, Pair
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
)

from transformers_llm2slm import LLM2SLMConfig, LLM2SLMForConditionalGeneration, LLM2SLMProcessor
from transformers_llm2slm.fit import fit_projector, fit_slm_embeddings

GREEDY = {"max_new_tokens": 10, "min_new_tokens": 10, "do_sample": False, "num_beams": 1}
UNCUT = Pair("llama", "qwen3", "kv")


def whole(zoo, family):
    llm = AutoModelForCausalLM.from_pretrained(zoo.checkpoint(family, "bpe", "llm")).eval()
    llm.generation_config.eos_token_id = None
    return llm


def cut(zoo, family, layers, **options):
    """An SLM cut from an LLM of three layers, by its keys and values."""
    source = zoo.checkpoint(family, "bpe", "llm")
    model = LLM2SLMForConditionalGeneration.from_llm_slm_pretrained(
        source, slm_layers=layers, fusion="kv", load_llm="whole", **options
    )
    model.generation_config.eos_token_id = None
    return model, LLM2SLMProcessor.from_llm_slm_pretrained(source, fusion="kv")


def batch_of(processor, prompts=PROMPTS, side="right", **options):
    for tokenizer in (processor.tokenizer, processor.llm_tokenizer):
        tokenizer.padding_side = side
    return processor(text=prompts, padding=True, return_tensors="pt", **options)


# The same computation ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "mistral", "phi3", "gpt2"])
@pytest.mark.parametrize("options", [{}, {"num_beams": 3, "num_return_sequences": 2}], ids=["greedy", "beams"])
def test_cut_of_all_layers_writes_what_the_llm_writes(zoo, family, options):
    """What the SLM attends to is what the LLM would, so with all of its layers the output is its own."""
    llm = whole(zoo, family)
    model, processor = cut(zoo, family, llm.config.num_hidden_layers)
    batch = batch_of(processor, side="left")
    prompt_length = batch["input_ids"].shape[1]
    expected = llm.generate(**batch, **GREEDY | options)[:, prompt_length:]
    assert torch.equal(model.generate(**batch, **GREEDY | options), expected)


@torch.no_grad()
def test_logits_of_a_response_are_the_llms(zoo):
    llm = whole(zoo, "llama")
    model, processor = cut(zoo, "llama", 3)
    batch = batch_of(processor, PROMPTS[:1], text_target=RESPONSES[:1])
    found = model(**batch).logits
    ids = torch.cat([batch["input_ids"], batch["labels"]], dim=1)
    expected = llm(ids).logits[:, batch["input_ids"].shape[1] - 1 : -1]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("layers", [2, [0, 2]])
def test_some_layers_get_their_own_keys_and_values(zoo, layers):
    model, processor = cut(zoo, "llama", layers)
    kept = [1, 2] if layers == 2 else layers
    assert model.config.llm_layer == model.config.slm_layers == kept
    batch = batch_of(processor, PROMPTS[:1])
    cache = model.model.whole_llm(**batch, use_cache=True)["cache"]
    states = model.encode_prompt(**batch).prompt_states
    for place, layer in enumerate(kept):
        for offset, name in enumerate(("keys", "values")):
            own = getattr(cache.layers[layer], name).transpose(1, 2).flatten(2)
            torch.testing.assert_close(states[:, :, 2 * place + offset], own, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layers", [None, 2])
def test_prompts_of_a_batch_do_not_mix(zoo, layers):
    model, processor = zoo.compose(UNCUT) if layers is None else cut(zoo, "llama", layers)
    alone = [model.generate(**batch_of(processor, [prompt]), **GREEDY) for prompt in PROMPTS]
    for side in ("left", "right"):
        assert torch.equal(model.generate(**batch_of(processor, side=side), **GREEDY), torch.cat(alone))


def test_prompt_of_one_token(zoo):
    model, _ = cut(zoo, "llama", 3)
    ids = torch.tensor([[7]])
    expected = model.model.whole_llm.generate(ids, **GREEDY)[:, 1:]
    assert torch.equal(model.generate(input_ids=ids, **GREEDY), expected)


@pytest.mark.parametrize("layers", [1, 3])
def test_lossless_mode(zoo, layers):
    model, processor = cut(zoo, "llama", layers)
    batch = batch_of(processor, PROMPTS[:1])
    expected = model.model.whole_llm.generate(**batch, **GREEDY)[:, batch["input_ids"].shape[1] :]
    options = {"mode": "lossless", "num_assistant_tokens": 3, "return_dict_in_generate": True}
    outputs = model.generate(**batch, **GREEDY, **options)
    assert torch.equal(outputs.sequences, expected)
    assert layers == 1 or outputs.num_accepted == outputs.num_drafted > 0


# Training ------------------------------------------------------------------------------------------------------------
def test_training_reaches_all_that_is_trained(zoo):
    model, processor = zoo.compose(UNCUT)
    batch = batch_of(processor, text_target=RESPONSES)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(12):
        loss = model(**batch).loss
        losses.append(loss.item())
        loss.backward()
        without = {n for n, p in model.named_parameters() if p.requires_grad and p.grad is None}
        # What is made of the last token of the prompt is not handed over, and the projector has nothing else.
        assert not {name for name in without if "slm" in name or "projector" in name}
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] / 2


def test_autocast_computes_in_its_own_precision(zoo):
    model, processor = zoo.compose(UNCUT)
    batch = batch_of(processor, text_target=RESPONSES)
    exact = model(**batch).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(**batch).loss
        written = model.generate(**batch_of(processor), **GREEDY)
    torch.testing.assert_close(loss.float(), exact, atol=0.1, rtol=0.05)
    assert written.shape == (len(PROMPTS), 10)


def test_gradient_checkpointing_is_refused(zoo):
    model, processor = zoo.compose(UNCUT)
    model.slm.model.gradient_checkpointing = True  # as `gradient_checkpointing_enable` does, by one name or another
    model.train()
    with pytest.raises(ValueError, match="With gradient checkpointing a model takes no cache"):
        model(**batch_of(processor, text_target=RESPONSES))
    model.eval()
    assert model(**batch_of(processor, text_target=RESPONSES)).loss > 0


def test_prompt_is_used_again(zoo):
    """`generate` adds to a cache of its own, not to the prompt."""
    model, processor = zoo.compose(UNCUT)
    with torch.no_grad():
        prompt = model.encode_prompt(**batch_of(processor))
    before = copy.deepcopy(prompt)
    first = model.generate(prompt=prompt, **GREEDY)
    assert torch.equal(model.generate(prompt=prompt, **GREEDY), first)
    assert all(torch.equal(prompt[name], before[name]) for name in before)


@pytest.mark.parametrize("place", ["argument", "config", "own"])
@torch.no_grad()
def test_a_cache_that_holds_the_prompt_is_dynamic(zoo, place):
    """The SLM's generation config, often copied from the LLM, may name another cache; asked for, it is an error."""
    model, processor = zoo.compose(UNCUT)
    batch = batch_of(processor)
    expected = model.generate(**batch, **GREEDY)

    def generate(**options):
        if place == "argument":
            return model.generate(**batch, **GREEDY | options)
        config = copy.deepcopy(model.generation_config)
        config.update(**GREEDY | options)
        if place == "config":
            return model.generate(**batch, generation_config=config)
        model.generation_config = config
        return model.generate(**batch)

    assert torch.equal(generate(cache_implementation="dynamic"), expected)
    if place == "own":
        assert torch.equal(generate(cache_implementation="static"), expected)
    else:
        with pytest.raises(ValueError, match=r"goes on from a dynamic cache.*got `cache_implementation='static'`"):
            generate(cache_implementation="static")
    with pytest.raises(
        ValueError, match='`prompt_lookup_num_tokens` does not go with `fusion="kv"`.*`mode="lossless"`'
    ):
        generate(prompt_lookup_num_tokens=3)


def test_embeddings_of_a_cut_are_fitted_to_where_it_was_cut(zoo):
    """A token that the SLM writes enters where the LLM's lower layers would have brought it."""
    by_kv, processor = cut(zoo, "llama", 2)
    source = zoo.checkpoint("llama", "bpe", "llm")
    by_state = LLM2SLMForConditionalGeneration.from_llm_slm_pretrained(source, slm_layers=2, fusion="replace")
    for model in (by_kv, by_state):
        fit_slm_embeddings(model, processor, PROMPTS)
    first, second = (model.get_input_embeddings().weight for model in (by_kv, by_state))
    torch.testing.assert_close(first, second, atol=1e-4, rtol=1e-4)


# Checkpoints ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("layers", [None, 2])
def test_saved_and_loaded(zoo, tmp_path, layers):
    model, processor = zoo.compose(UNCUT) if layers is None else cut(zoo, "llama", layers)
    with torch.no_grad():
        for parameter in model.projector.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    batch = batch_of(processor)
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    loaded.generation_config.eos_token_id = model.generation_config.eos_token_id
    assert loaded.config.fusion == "kv" and type(loaded.projector) is type(model.projector)
    assert torch.equal(loaded.generate(**batch, **GREEDY), model.generate(**batch, **GREEDY))
    states = model.model.llm_states(batch["input_ids"], batch["attention_mask"])
    written = AutoModel.from_pretrained(tmp_path, load_llm=False).generate(**batch, llm_hidden_states=states, **GREEDY)
    assert torch.equal(written, model.generate(**batch, **GREEDY))


# What can't be -------------------------------------------------------------------------------------------------------
def test_a_cut_gets_keys_and_values_by_default_where_the_llm_keeps_them(zoo):
    compose = LLM2SLMForConditionalGeneration.from_llm_slm_pretrained
    config = compose(zoo.checkpoint("llama", "bpe", "llm"), slm_layers=[0, 2]).config
    assert (config.fusion, config.llm_layer, config.projector_init) == ("kv", [0, 2], "identity")
    # Keys and values of other widths than the configuration tells (multi-head latent attention).
    latent = DeepseekV3ForCausalLM(
        DeepseekV3Config(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=4,
            first_k_dense_replace=3,
            kv_lora_rank=8,
            q_lora_rank=8,
            qk_rope_head_dim=4,
            qk_nope_head_dim=8,
            v_head_dim=6,
        )
    )
    config = compose(latent, slm_layers=2).config
    assert (config.fusion, config.llm_layer) == ("replace", 1)
    with pytest.raises(ValueError, match=r"keeps keys and values of widths \[4, 8\]"):
        compose(latent, slm_layers=2, fusion="kv")
    recurrent = MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=3, state_size=4))
    with pytest.raises(ValueError, match="MambaModel can't be read at `llm_layer` 1"):  # as with "replace"
        compose(recurrent, slm_layers=2)


@pytest.mark.parametrize(
    ("llm", "slm", "part"), [("t5", "llama", "LLM"), ("llama", "t5", "SLM"), ("bert", "llama", "LLM")]
)
def test_models_without_keys_and_values_to_hand_over(zoo, llm, slm, part):
    with pytest.raises((ValueError, StrictDataclassError), match=f"needs a decoder-only {part}|the {part} of"):
        zoo.compose(Pair(llm, slm, "kv"))


def test_two_tokenizers_are_refused(zoo):
    llm, slm = zoo.checkpoint("llama", "unigram", "llm"), zoo.checkpoint("qwen3", "bpe", "slm")
    with pytest.raises(ValueError, match='`fusion="kv"` has the SLM read the last token'):
        LLM2SLMForConditionalGeneration.from_llm_slm_pretrained(llm, slm, fusion="kv")
    with pytest.raises(ValueError, match='`fusion="kv"` has the SLM read the last token'):
        LLM2SLMProcessor.from_llm_slm_pretrained(llm, slm, fusion="kv")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"llm_layer": [0, 1]}, "needs one of the LLM's 3 layers in `llm_layer` for each of the SLM's 3, got"),
        ({"llm_layer": [0, 1, 3]}, r"got \[0, 1, 3\]"),
        ({"projector_num_layers": 2}, "set `projector_num_layers=1`"),
        ({"projector_norm": "layer_norm"}, "set `projector_num_layers=1`"),
        ({"projector_init": "zero"}, 'takes `projector_init="identity"`'),
        ({"projector_init": "fit", "fit_prompts": PROMPTS}, 'takes `projector_init="identity"`'),
    ],
)
def test_options_that_do_not_fit(zoo, options, message):
    with pytest.raises((ValueError, StrictDataclassError), match=message):
        zoo.compose(UNCUT, **options)


def test_tokens_are_needed_beside_cached_states(zoo):
    model, processor = zoo.compose(UNCUT)
    batch = batch_of(processor)
    states = model.model.llm_states(batch["input_ids"], batch["attention_mask"])
    with pytest.raises(ValueError, match='`fusion="kv"` needs `input_ids`'):
        model.generate(llm_hidden_states=states, attention_mask=batch["attention_mask"])


def test_projector_is_not_fitted(zoo):
    model, processor = zoo.compose(UNCUT)
    with pytest.raises(ValueError, match="hands over keys and values, which are not fitted"):
        fit_projector(model, processor, PROMPTS)


def test_configuration_tells_the_widths(zoo):
    config = zoo.compose(UNCUT)[0].config
    assert (config.llm_state_size, config.slm_state_size, config.num_llm_states) == (16, 16, 6)
    assert LLM2SLMConfig.from_dict(config.to_dict()).llm_state_size == 16
