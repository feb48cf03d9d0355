"""The fit: a projector in closed form that makes the SLM's inputs out of the LLM's states, as well as a linear map can."""

from __future__ import annotations

import pytest
import torch
from conftest import PROMPTS, RESPONSES, Pair
from transformers import AutoModelForSeq2SeqLM

from transformers_llm2slm import LLM2SLMForConditionalGeneration, LLM2SLMProcessor
from transformers_llm2slm.alignment import align_tokens
from transformers_llm2slm.fit import fit_projector, fit_slm_embeddings
from transformers_llm2slm.structure import embed_tokens

# Enough different tokens that no linear map fits them by their small number.
FIT_PROMPTS = [
    *PROMPTS,
    *RESPONSES,
    "In the beginning there was a tokenizer, and it was good; then came 1024 more of them.",
    "def forward(self, hidden_states):\n    return self.norm(hidden_states) + 3.5",
    "Quick brown foxes jump over lazy dogs; jackdaws love my big sphinx of quartz!",
    "UPPER CASE, Title Case, snake_case, camelCase, 0123456789, (brackets) [and] {braces}.",
    "The price rose from 12.50 to 99.95 within 7 days, she wrote in her letter of May 4th.",
]


def fused_and_goals(model, processor, target, prompts=FIT_PROMPTS):
    """
    What each prompt position is, and what the SLM itself makes of the same text there; both `(tokens, width)`.

    Written without the fit's own code: one prompt at a time, through `encode_prompt`.
    """
    fused, goals = [], []
    for prompt in prompts:
        batch = processor(text=[prompt], return_tensors="pt")
        states = model.encode_prompt(**batch).prompt_states[0]
        tokens = processor.tokenizer(prompt, return_tensors="pt", return_offsets_mapping=True)
        ids = tokens["input_ids"]
        if target == "embeddings":
            goal = embed_tokens(model.slm, ids)[0]
        elif model.slm.config.is_encoder_decoder:
            goal = model.slm.get_encoder()(input_ids=ids, output_hidden_states=True).hidden_states[target][0]
        else:
            goal = model.slm(ids, output_hidden_states=True).hidden_states[target][0]
        if len(goal) != len(states):
            offsets = processor.llm_tokenizer(prompt, return_offsets_mapping=True)["offset_mapping"]
            goal = goal[align_tokens(offsets, tokens["offset_mapping"][0].tolist())]
        fused.append(states)
        goals.append(goal)
    return torch.cat(fused), torch.cat(goals)


def same_model_pair(zoo, family, **kwargs):
    """An SLM that is its own LLM, so that a linear map from the right layer of it is exact."""
    checkpoint = zoo.checkpoint(family, "bpe", "slm")
    torch.manual_seed(0)
    model = LLM2SLMForConditionalGeneration.from_llm_slm_pretrained(
        checkpoint, checkpoint, projector_num_layers=1, **{"fusion": "replace"} | kwargs
    )
    return model, LLM2SLMProcessor.from_llm_slm_pretrained(checkpoint, checkpoint, fusion=model.config.fusion)


@pytest.mark.parametrize("family", ["llama", "t5", "bart", "gpt2"])
@pytest.mark.parametrize("layer", [0, 1])
@torch.no_grad()
def test_recovers_a_linear_relation(zoo, family, layer):
    """The states at a layer of an SLM that is its own LLM are its own states there, so the fit explains all of them."""
    model, processor = same_model_pair(zoo, family, llm_layer=layer)
    explained = fit_projector(model, processor, FIT_PROMPTS, target=layer, ridge=1e-6)
    assert explained > 0.999
    fused, goals = fused_and_goals(model, processor, layer)
    torch.testing.assert_close(fused, goals, rtol=0, atol=0.02 * goals.abs().max().item())
    # On text that it was not fitted on, too, for it found the identity.
    fused, goals = fused_and_goals(model, processor, layer, ["A house! 42 new words, naturally."])
    assert 1 - (fused - goals).square().sum() / (goals - goals.mean(dim=0)).square().sum() > 0.99


@torch.no_grad()
def test_exact_fit_of_the_embeddings_gives_the_slm_alone(zoo):
    """Fitted embeddings are as good as the SLM's own: the hybrid's logits come near to those of the SLM alone."""
    model, processor = same_model_pair(
        zoo, "llama", llm_layer=0, projector_init="fit", fit_prompts=FIT_PROMPTS, fit_target="embeddings"
    )
    assert model.config.projector_init == "fit" and not model.training
    batch = processor(text=[PROMPTS[0]], text_target=[RESPONSES[0]], return_tensors="pt")
    ids, labels = batch["input_ids"], batch["labels"]
    alone = model.slm(torch.cat([ids, labels], dim=1)).logits[:, ids.shape[1] - 1 : -1]
    fitted = model(**batch).logits
    random, _ = same_model_pair(zoo, "llama", llm_layer=0)
    spread = (random(**batch).logits - alone).abs().mean()
    assert (fitted - alone).abs().mean() < 0.02 * spread


@pytest.mark.parametrize("target", ["embeddings", 1, -1])
@pytest.mark.parametrize(
    "pair",
    [
        Pair("t5", "t5", "add"),
        Pair("llama", "llama", "replace"),
        Pair("bert", "bart", "replace", (("projector_norm", "layer_norm"), ("llm_layer", (0, -1)))),
        Pair("llama", "t5", "llm-embed"),
        Pair("llama", "gpt2", "align"),
        Pair("bart", "qwen3", "align"),
    ],
    ids=str,
)
@torch.no_grad()
def test_explained_share_and_gain(zoo, pair, target):
    """
    The share returned is 1 - (squared error) / (variance of what the projector is asked for), measured here on the
    fused prompt itself, and the error is below that of a random projector, for every fusion.
    """
    model, processor = zoo.compose(pair)
    random_error = torch.sub(*fused_and_goals(model, processor, target)).square().sum().item()
    model.projector.reset_parameters("fit")
    explained = fit_projector(model, processor, FIT_PROMPTS, target=target)
    fused, goals = fused_and_goals(model, processor, target)
    error = (fused - goals).square().sum().item()
    assert error < 0.85 * random_error

    # What the projector is asked for is the goal without what the fusion adds by itself: a last layer of zeros.
    last = model.projector.layers[-1]
    last.weight.zero_()
    last.bias.zero_()
    rest, _ = fused_and_goals(model, processor, target)
    asked = (goals - rest).double()
    variance = (asked - asked.mean(dim=0)).square().sum().item()
    if variance < 1e-9:  # `"add"` and `"align"` have the embeddings already: there is nothing to ask for
        assert target == "embeddings" and explained == 1.0 and error < 1e-9
    else:
        assert 0 < explained < 1
        assert explained == pytest.approx(1 - error / variance, abs=1e-3)


@torch.no_grad()
def test_ridge_pulls_towards_the_mean(small_causal):
    """With an enormous ridge the weights vanish and the free bias is the mean of the goals: nothing is explained."""
    model, processor = small_causal
    explained = fit_projector(model, processor, FIT_PROMPTS, target=1, ridge=1e9)
    last = model.projector.layers[-1]
    assert last.weight.abs().max() < 1e-6 and explained == pytest.approx(0, abs=1e-4)
    last.bias.zero_()
    fused, goals = fused_and_goals(model, processor, 1)
    fit_projector(model, processor, FIT_PROMPTS, target=1, ridge=1e9)
    torch.testing.assert_close(last.bias, (goals - fused).mean(dim=0), rtol=0, atol=1e-4)


@torch.no_grad()
def test_only_the_last_layer_changes_and_batches_do_not_matter(small_causal):
    model, processor = small_causal
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    one = fit_projector(model, processor, FIT_PROMPTS, target=1, batch_size=1)
    weight = model.projector.layers[-1].weight.clone()
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == {"model.projector.layers.1.weight", "model.projector.layers.1.bias"}
    assert fit_projector(model, processor, FIT_PROMPTS, target=1, batch_size=64) == pytest.approx(one, abs=1e-9)
    torch.testing.assert_close(model.projector.layers[-1].weight, weight, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_skip_takes_its_goals_from_the_dropped_encoder(zoo):
    """An SLM without encoder, whose LLM is that encoder: fitted to its last state, it is the SLM as it was."""
    model, processor = same_model_pair(
        zoo, "t5", slm_encoder="skip", projector_init="fit", fit_prompts=FIT_PROMPTS, fit_target=-1
    )
    whole = AutoModelForSeq2SeqLM.from_pretrained(zoo.checkpoint("t5", "bpe", "slm"))
    assert not any("encoder." in name and "decoder." not in name for name, _ in model.slm.named_parameters())
    batch = processor(text=PROMPTS, text_target=RESPONSES, padding=True, return_tensors="pt")
    states = whole.get_encoder()(batch["input_ids"], batch["attention_mask"]).last_hidden_state
    real = batch["attention_mask"].bool()
    fused = model.encode_prompt(batch["input_ids"], batch["attention_mask"]).prompt_states
    torch.testing.assert_close(fused[real], states[real], rtol=0, atol=0.02 * states[real].abs().max().item())
    logits = whole(**batch).logits
    torch.testing.assert_close(model(**batch).logits, logits, rtol=0, atol=0.02 * logits.abs().max().item())


def test_skip_without_its_encoder_has_no_goals(zoo):
    """Once the encoder is dropped its states can't be goals, unless the whole SLM is given."""
    model, processor = zoo.compose(Pair("t5", "t5", "replace", (("slm_encoder", "skip"),)))
    with pytest.raises(ValueError, match="the encoder of this SLM was dropped.*Pass the whole SLM as `slm=`"):
        fit_projector(model, processor, FIT_PROMPTS, target=1)
    whole = AutoModelForSeq2SeqLM.from_pretrained(zoo.checkpoint("t5", "bpe", "slm"))
    assert 0 < fit_projector(model, processor, FIT_PROMPTS, target=1, slm=whole) < 1


@pytest.mark.parametrize("fusion", ["add", "align", "llm-embed"])
def test_through_from_llm_slm_pretrained(zoo, fusion, tmp_path):
    """`projector_init="fit"` composes the model that `fit_projector` makes, and it is saved and loaded like any other."""
    pair = Pair("llama", "t5", fusion)
    model, processor = zoo.compose(pair, projector_init="fit", fit_prompts=FIT_PROMPTS, fit_target=2)
    by_hand, _ = zoo.compose(pair)
    torch.manual_seed(0)
    by_hand.projector.load_state_dict(model.projector.state_dict())
    by_hand.projector.layers[-1].reset_parameters()
    fit_projector(by_hand, processor, FIT_PROMPTS, target=2)
    for (name, parameter), expected in zip(
        model.projector.named_parameters(), by_hand.projector.parameters(), strict=True
    ):
        torch.testing.assert_close(parameter, expected, rtol=1e-4, atol=1e-4, msg=name)
    model.save_pretrained(tmp_path)
    loaded = LLM2SLMForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.config.projector_init == "fit"
    assert torch.equal(loaded.projector.layers[-1].weight, model.projector.layers[-1].weight)


def test_models_in_memory_need_a_processor(zoo):
    """A processor serves where the models name no tokenizers; without one, the error says so."""
    llm, slm = zoo.sources(Pair("llama", "t5", "replace"))
    processor = LLM2SLMProcessor.from_llm_slm_pretrained(llm, slm, fusion="replace")
    slm_model = AutoModelForSeq2SeqLM.from_pretrained(slm)
    slm_model.name_or_path = ""
    arguments = {"fusion": "replace", "projector_init": "fit", "fit_prompts": FIT_PROMPTS}
    with pytest.raises(ValueError, match=r"name no tokenizers: pass `processor=LLM2SLMProcessor\(\.\.\.\)`"):
        LLM2SLMForConditionalGeneration.from_llm_slm_pretrained(llm, slm_model, **arguments)
    model = LLM2SLMForConditionalGeneration.from_llm_slm_pretrained(llm, slm_model, processor=processor, **arguments)
    random, _ = zoo.compose(Pair("llama", "t5", "replace"))
    fitted_error, random_error = (
        torch.sub(*fused_and_goals(m, processor, "embeddings")).square().sum() for m in (model, random)
    )
    assert fitted_error < 0.5 * random_error


def test_errors(small_causal, zoo):
    model, processor = small_causal
    with pytest.raises(ValueError, match=r'`projector_init="fit"` needs `fit_prompts=`: a few hundred prompts'):
        zoo.compose(Pair("llama", "llama", "align"), projector_init="fit")
    for prompts in ([], "a text"):
        with pytest.raises(
            ValueError, match=r"`prompts` must be a list of texts to fit to, a few hundred of them, got"
        ):
            fit_projector(model, processor, prompts)
    with pytest.raises(ValueError, match=r"`target` must be \"embeddings\" or the index of a layer.*got 'states'"):
        fit_projector(model, processor, FIT_PROMPTS, target="states")
    with pytest.raises(ValueError, match=r"`target` must lie in \[-4, 3\] for this SLM, got 4"):
        fit_projector(model, processor, FIT_PROMPTS, target=4)
    model.model.attach_llm(None)
    with pytest.raises(ValueError, match="loaded without its LLM"):
        fit_projector(model, processor, FIT_PROMPTS)


@pytest.mark.parametrize("family", ["llama", "gemma3"])  # Gemma scales its embeddings
@torch.no_grad()
def test_embeddings_of_a_cut_slm_start_in_the_space_of_its_layer(zoo, family, tmp_path):
    """A token's embedding becomes the mean of its states; the head keeps what it had; the checkpoint holds both."""
    llm = zoo.checkpoint(family, "bpe", "llm")
    model = LLM2SLMForConditionalGeneration.from_llm_slm_pretrained(llm, slm_layers=1, fusion="replace")
    processor = LLM2SLMProcessor.from_llm_slm_pretrained(llm)
    head = model.get_output_embeddings().weight.clone()
    fit_slm_embeddings(model, processor, FIT_PROMPTS, prior=1e-6)
    embeddings = embed_tokens(model.slm, torch.arange(model.config.vocab_size))
    ids = [processor(text=prompt)["input_ids"] for prompt in FIT_PROMPTS]
    token = max({t for row in ids for t in row}, key=lambda t: sum(row[1:].count(t) for row in ids))
    states = []
    for row in ids:
        row = torch.tensor([row])
        of_row = model.model.llm_states(row, torch.ones_like(row))[0, :, 0]
        states += [of_row[place] for place in range(1, row.shape[1]) if row[0, place] == token]
    torch.testing.assert_close(embeddings[token], torch.stack(states).mean(dim=0), rtol=1e-3, atol=1e-3)
    assert torch.equal(model.get_output_embeddings().weight, head)
    unseen = next(t for t in range(model.config.vocab_size) if all(t not in row for row in ids))
    assert embeddings[unseen].isfinite().all() and not torch.equal(embeddings[unseen], head[unseen])
    model.save_pretrained(tmp_path)
    loaded = LLM2SLMForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(embed_tokens(loaded.slm, torch.arange(model.config.vocab_size)), embeddings)
    assert torch.equal(loaded.get_output_embeddings().weight, head)
    with pytest.raises(ValueError, match="compose the model with `slm_layers="):
        fit_slm_embeddings(*zoo.compose(Pair("llama", "t5", "replace")), FIT_PROMPTS)


def test_fitted_embeddings_hang_on_no_projector(zoo):
    """A projector that starts as zero, or anyhow, changes nothing of where the SLM's layer expects its tokens."""
    llm = zoo.checkpoint("llama", "bpe", "llm")
    processor = LLM2SLMProcessor.from_llm_slm_pretrained(llm)
    options = [("replace", "identity"), ("replace", "random"), ("add", "zero"), ("kv", "identity")]
    found = []
    for fusion, start in options:
        model = LLM2SLMForConditionalGeneration.from_llm_slm_pretrained(
            llm, slm_layers=1, fusion=fusion, projector_init=start
        )
        fit_slm_embeddings(model, processor, FIT_PROMPTS)
        found.append(model.get_input_embeddings().weight)
    assert found[0].abs().max() > 0
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-4, atol=1e-5)


def test_dropout_is_no_goal(zoo):
    """A model that is being trained is fitted to what it gives without dropout, and goes on in training."""
    model, processor = zoo.compose(Pair("t5", "t5", "replace", (("slm_encoder", "keep"),)))
    found = []
    for training in (False, True):
        model.train(training)
        found.append(fit_projector(model, processor, FIT_PROMPTS, target=-1))
        assert model.slm.training == training
    assert found[0] == found[1]


def test_a_fitted_head_is_saved_from_a_gathered_state_dict(zoo, tmp_path):
    """As trainers save what they have sharded. Head and embeddings are no longer one."""
    llm = zoo.checkpoint("gpt2", "bpe", "llm")
    model = LLM2SLMForConditionalGeneration.from_llm_slm_pretrained(llm, slm_layers=2)
    processor = LLM2SLMProcessor.from_llm_slm_pretrained(llm)
    fit_slm_embeddings(model, processor, FIT_PROMPTS)
    model.save_pretrained(tmp_path, state_dict=model.state_dict())
    loaded = LLM2SLMForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(loaded.get_output_embeddings().weight, model.get_output_embeddings().weight)
    assert torch.equal(loaded.slm.get_input_embeddings().weight, model.slm.get_input_embeddings().weight)
