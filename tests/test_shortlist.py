"""A shortlist: the SLM writes listed tokens alone, by an LM head of their number, and is otherwise as it was."""

from __future__ import annotations

import copy

import numpy
import pytest
import torch
from conftest import PROMPTS, RESPONSES, Pair
from transformers import AutoModel, GenerationConfig, LogitsProcessorList, SuppressTokensLogitsProcessor

from transformers_llm2slm import lora_config, make_shortlist
from transformers_llm2slm.shortlist import ShortlistHead, shortlisted

OPTIONS = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
# Gemma 3 caps its logits behind the head, BART adds a bias there, T5 scales what goes into it.
SLMS = ["llama", "gemma3", "gpt2", "t5", "bart", "opt"]


def batch_of(processor):
    return processor(text=PROMPTS, padding=True, return_tensors="pt")


def composed(zoo, slm, **options):
    model, processor = zoo.compose(Pair("llama", slm, "replace"))
    vocabulary = model.get_output_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    return model, processor, sorted(torch.randperm(vocabulary, generator=generator)[: vocabulary // 3].tolist())


@pytest.mark.parametrize("slm", SLMS)
@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"do_sample": True, "top_p": 0.9}], ids=["greedy", "beams", "sampled"]
)
def test_writes_what_it_would_if_all_others_were_suppressed(zoo, slm, options):
    model, processor, listed = composed(zoo, slm)
    if slm == "gemma3":
        model.slm.config.get_text_config().final_logit_softcapping = 5.0
    batch, options = batch_of(processor), OPTIONS | options
    needed = {getattr(model.generation_config, f"{name}_token_id") for name in ("eos", "bos", "pad")}
    others = set(range(len(model.get_output_embeddings().weight))) - set(listed) - needed
    suppress = LogitsProcessorList([SuppressTokensLogitsProcessor(sorted(others), device=model.device)])
    torch.manual_seed(0)
    # Beams count probabilities among all tokens, before any are suppressed (here the end, too).
    options["renormalize_logits"] = True
    expected = model.generate(**batch, **options, logits_processor=suppress)
    torch.manual_seed(0)
    found = model.generate(**batch, **options, shortlist=listed)
    assert torch.equal(found, expected)
    assert set(found.flatten().tolist()) <= set(listed) | needed


@pytest.mark.parametrize("slm", ["llama", "t5"])
def test_only_listed_tokens_are_scored_and_the_model_stays_as_it_was(zoo, slm):
    model, processor, listed = composed(zoo, slm)
    head, before = model.get_output_embeddings(), {key: value.clone() for key, value in model.state_dict().items()}
    names = [name for name, _ in model.named_modules()]
    seen = []
    hook = torch.nn.modules.module.register_module_forward_hook(
        lambda module, _, output: seen.append(module.weight.shape[0]) if isinstance(module, ShortlistHead) else None
    )
    outputs = model.generate(
        **batch_of(processor), **OPTIONS, shortlist=listed, output_logits=True, return_dict_in_generate=True
    )
    hook.remove()
    assert len(seen) == 8 and max(seen) <= len(listed) + 3
    assert all(set(torch.where(step[0].isfinite())[0].tolist()) >= set(listed) for step in outputs.logits)
    assert all(step.isfinite().sum(dim=1).max() == seen[0] for step in outputs.logits)
    assert model.get_output_embeddings() is head and [name for name, _ in model.named_modules()] == names
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    labels = torch.full((3, 4), 5)
    assert model(**batch_of(processor), labels=labels).logits.isfinite().all()


def test_it_is_saved_and_can_be_lifted(zoo, tmp_path):
    model, processor, listed = composed(zoo, "llama")
    batch = batch_of(processor)
    everything = model.generate(**batch, **OPTIONS)
    assert model.shortlist is None
    listed = model.shortlist = sorted(set(listed) - set(everything.flatten().tolist()))
    expected = model.generate(**batch, **OPTIONS)
    assert not torch.equal(expected, everything)
    assert torch.equal(model.generate(**batch, generation_config=GenerationConfig(**OPTIONS)), expected)
    assert torch.equal(model.generate(**batch, **OPTIONS, shortlist=[]), everything)
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path, llm_model=model.llm)
    assert loaded.shortlist == listed and torch.equal(loaded.generate(**batch, **OPTIONS), expected)
    loaded.shortlist = None
    assert torch.equal(loaded.generate(**batch, **OPTIONS), everything)


def test_head_is_made_anew_when_the_weights_have_changed(zoo):
    model, processor, listed = composed(zoo, "llama")
    model.shortlist = listed
    batch = batch_of(processor)
    model.generate(**batch, **OPTIONS)
    narrow = vars(model.slm)["_shortlist_head"]
    model.generate(**batch, **OPTIONS)
    assert vars(model.slm)["_shortlist_head"] is narrow
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(-1)
    found = model.generate(**batch, **OPTIONS)
    fresh = copy.deepcopy(model)
    vars(fresh.slm).pop("_shortlist_head")
    assert torch.equal(found, fresh.generate(**batch, **OPTIONS))
    assert vars(model.slm)["_shortlist_head"] is not narrow


def test_head_is_made_anew_after_writing_past_autograd(zoo):
    """As adapters are merged: to `weight.data`, of which the weight keeps no count."""
    model, processor, listed = composed(zoo, "llama")
    batch = batch_of(processor)
    model.generate(**batch, **OPTIONS, shortlist=listed)
    head = model.get_output_embeddings()
    version = head.weight._version
    head.weight.data.neg_()
    assert head.weight._version == version
    found = model.generate(**batch, **OPTIONS, shortlist=listed)
    vars(model.slm).pop("_shortlist_head")
    assert torch.equal(found, model.generate(**batch, **OPTIONS, shortlist=listed))


@pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing:FutureWarning")  # PEFT's
def test_an_adapter_on_the_head_counts(zoo):
    """The head with its adapter scores all tokens, and those that are not listed are masked."""
    peft = pytest.importorskip("peft")
    model, processor, listed = composed(zoo, "llama")
    batch, everything = batch_of(processor), list(range(model.get_output_embeddings().weight.shape[0]))
    adapted = peft.get_peft_model(model, lora_config(model, target_modules=["lm_head"])).eval()
    torch.manual_seed(0)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    expected = adapted.generate(**batch, **OPTIONS)
    assert torch.equal(adapted.generate(**batch, **OPTIONS, shortlist=everything), expected)
    some = adapted.generate(**batch, **OPTIONS, shortlist=listed)
    assert not torch.equal(some, expected)
    merged = adapted.merge_and_unload()
    for tokens, texts in ((everything, expected), (listed, some)):
        assert torch.equal(merged.generate(**batch, **OPTIONS, shortlist=tokens), texts)


def test_end_tokens_of_a_call_are_listed_too(zoo):
    model, processor, listed = composed(zoo, "llama")
    batch = batch_of(processor)
    unlisted = next(token for token in range(5, 500) if token not in listed)
    with shortlisted(model.slm, listed, {"eos_token_id": [unlisted]}, None, GenerationConfig(pad_token_id=unlisted)):
        assert unlisted in vars(model.slm)["_shortlist_head"].listed
    logits = model.generate(
        **batch,
        max_new_tokens=1,
        shortlist=listed,
        eos_token_id=unlisted,
        output_logits=True,
        return_dict_in_generate=True,
    ).logits[0]
    assert logits[:, unlisted].isfinite().all()


@pytest.mark.parametrize("make", [torch.tensor, numpy.array, tuple])
def test_it_may_be_a_tensor_or_an_array(zoo, tmp_path, make):
    model, processor, _ = composed(zoo, "llama")
    batch, listed = batch_of(processor), [3, 5, 8, 13]
    expected = model.generate(**batch, shortlist=listed, max_new_tokens=4)
    assert torch.equal(model.generate(**batch, shortlist=make(listed), max_new_tokens=4), expected)
    model.shortlist = make(listed)
    assert model.shortlist == listed and {type(token) for token in model.shortlist} == {int}
    model.save_pretrained(tmp_path)
    assert model.from_pretrained(tmp_path).shortlist == listed


@pytest.mark.parametrize("wrong", [[3, 100_000], [-1], [3, "a"]])
def test_what_is_no_token_is_refused(zoo, wrong):
    model, processor, _ = composed(zoo, "llama")
    with pytest.raises(ValueError, match=r"`shortlist` must hold token ids in \[0, \d+\] .* got (100000|-1|'a')"):
        model.generate(**batch_of(processor), shortlist=wrong)


def test_lossless_mode_drafts_by_it_and_stays_the_llms_own(zoo):
    model, processor, listed = composed(zoo, "llama")
    model = type(model).from_llm_slm_pretrained(zoo.checkpoint("llama", "bpe", "llm"), slm_layers=2, load_llm="whole")
    batch = processor(text=PROMPTS[:1], return_tensors="pt")
    expected = model.generate(**batch, **OPTIONS, mode="lossless", shortlist=[])
    assert torch.equal(model.generate(**batch, **OPTIONS, mode="lossless", shortlist=listed), expected)


@pytest.mark.parametrize("slm", ["llama", "t5", "t5gemma"])
def test_made_of_texts_it_can_write_them_and_spell_others(zoo, slm):
    _, processor = zoo.compose(Pair("llama", slm, "align"))
    listed = make_shortlist(processor, RESPONSES)
    assert listed == sorted(set(listed)) and all(0 <= token for token in listed)
    assert {token for row in processor(text_target=RESPONSES)["labels"] for token in row} <= set(listed)
    assert set(processor.tokenizer.all_special_ids) <= set(listed)
    letters = [
        token for token, text in enumerate(processor.tokenizer.convert_ids_to_tokens(range(300))) if text == "z"
    ]
    assert set(letters) <= set(listed)
    fewer = make_shortlist(processor, RESPONSES, size=3)
    assert set(fewer) < set(listed)
    for texts in ([], "a text"):
        with pytest.raises(ValueError, match="must be a list of texts"):
            make_shortlist(processor, texts)
