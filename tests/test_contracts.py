"""The contracts of the design, each as a test over the family matrix."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import PROMPTS, RESPONSES, Pair, make_batch
from transformers import AutoModel, AutoModelForSeq2SeqLM, AutoProcessor, DynamicCache
from transformers.modeling_outputs import BaseModelOutput

from transformers_llm2slm import LLM2SLMForConditionalGeneration
from transformers_llm2slm.structure import accepts, cache_argument, embed_tokens


def llm_body(model):
    return model.llm.get_encoder() if model.llm.config.is_encoder_decoder else model.llm


def count_calls(module):
    """Counts passes as they begin: one that is left at the highest layer asked for has no end."""
    calls = []
    handle = module.register_forward_pre_hook(lambda *_: calls.append(1))
    return calls, handle


def test_1_frozen(composed):
    """The LLM has no gradients, does not move and stays in eval mode; projector and SLM all get gradients."""
    _, model, processor = composed
    model = copy.deepcopy(model)
    before = {name: parameter.clone() for name, parameter in model.llm.named_parameters()}
    model.train()
    assert model.slm.training and not any(module.training for module in model.llm.modules())
    assert not any(parameter.requires_grad for parameter in model.llm.parameters())

    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert not any(name.startswith("model.llm.") for name in trainable)
    optimizer = torch.optim.SGD(trainable.values(), lr=0.1)
    model(**make_batch(processor)).loss.backward()
    optimizer.step()
    assert all(parameter.grad is None for parameter in model.llm.parameters())
    for name, parameter in model.llm.named_parameters():
        torch.testing.assert_close(parameter, before[name], rtol=0, atol=0)
    # Not reached: token embeddings of an encoder that is given the prompt as states, and sinusoidal positions.
    unreached = [name for name, p in trainable.items() if p.grad is None]
    allowed = ("encoder.embed_tokens.weight", "shared.weight", "embed_positions.weight")
    assert all(name.endswith(allowed) for name in unreached), unreached
    assert not any("projector" in name for name in unreached)


def test_2_encoded_once(composed):
    """One `generate` runs the LLM once, whatever the beams and the sampled sequences."""
    _, model, processor = composed
    batch = make_batch(processor)
    del batch["labels"]
    for arguments in (
        {"num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 3},
        {},
    ):
        calls, handle = count_calls(llm_body(model))
        model.generate(**batch, max_new_tokens=4, **arguments)
        handle.remove()
        assert len(calls) == 1


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_3_padding_does_not_matter(composed, side):
    """Logits, loss and greedy tokens of a prompt are the same alone and in a batch, padded left or right."""
    _, model, processor = composed
    batch = make_batch(processor, side=side)
    logits = model(**batch).logits
    new_tokens = {"max_new_tokens": 6, "min_new_tokens": 6}
    generated = model.generate(**{k: v for k, v in batch.items() if k != "labels"}, **new_tokens)
    for row, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        alone = make_batch(processor, [prompt], [response])
        outputs = model(**alone)
        length = alone["labels"].shape[1]
        torch.testing.assert_close(logits[row, :length], outputs.logits[0], rtol=0, atol=1e-4)
        same_row = {key: value[row : row + 1] for key, value in batch.items()}
        torch.testing.assert_close(model(**same_row).loss, outputs.loss, rtol=0, atol=1e-4)
        alone_generated = model.generate(**{k: v for k, v in alone.items() if k != "labels"}, **new_tokens)
        assert generated[row].tolist() == alone_generated[0].tolist()


@torch.no_grad()
def test_4_two_roads_one_result(composed):
    """Teacher-forced logits equal the step-by-step logits of `generate` with its cache."""
    _, model, processor = composed
    batch = make_batch(processor, side="left")
    labels = batch.pop("labels")
    steps = model.generate(
        **batch, max_new_tokens=5, min_new_tokens=5, output_logits=True, return_dict_in_generate=True, use_cache=True
    )
    stepwise = torch.stack(steps.logits, dim=1)
    sequences = steps.sequences[:, 1:] if model.slm.config.is_encoder_decoder else steps.sequences
    labels = sequences[:, : stepwise.shape[1]]
    forced = model(**batch, labels=labels).logits
    assert forced.shape == stepwise.shape == (3, 5, model.config.vocab_size)
    torch.testing.assert_close(forced, stepwise.to(forced.dtype), rtol=0, atol=1e-4)


def to_the_left(rows, mask):
    """Rows that are padded on the right, padded on the left."""
    return torch.stack([torch.cat([row[~m.bool()], row[m.bool()]]) for row, m in zip(rows, mask, strict=True)])


def filled_cache(model, states, copies=1):
    """A cache of all tokens of left-padded prompts but the last, of their keys and values (`fusion="kv"`)."""
    heads = model.slm.config.num_key_value_heads
    states = states[:, :-1].unflatten(-1, (heads, -1)).transpose(1, 3).repeat_interleave(copies, dim=0)
    cache = DynamicCache()
    for layer in range(model.slm.config.num_hidden_layers):
        # (batch_size, num_heads, 2 * num_layers, length, head_size)
        cache.update(states[:, :, 2 * layer], states[:, :, 2 * layer + 1], layer)
    return cache


@torch.no_grad()
def test_5_native_generation(composed):
    """`generate` is the SLM's own, fed with the fused prompt: same tokens, same scores, same type of output."""
    pair, model, processor = composed
    batch = make_batch(processor)
    del batch["labels"]
    prompt = model.encode_prompt(**batch)
    arguments = {"max_new_tokens": 5, "num_beams": 2, "return_dict_in_generate": True, "output_scores": True}
    ours = model.generate(**batch, **arguments)
    states, mask = prompt.prompt_states, prompt.attention_mask
    if dict(pair.options).get("slm_encoder") == "skip":
        fed = {"encoder_outputs": BaseModelOutput(last_hidden_state=states), "attention_mask": mask}
    elif model.slm.config.is_encoder_decoder:
        fed = {"inputs_embeds": states, "attention_mask": mask}
    else:  # the padding goes to the left
        fed = {"inputs_embeds": to_the_left(states, mask), "attention_mask": mask.flip(1)}
    if pair.fusion == "kv":
        cache = filled_cache(model, fed.pop("inputs_embeds"), arguments["num_beams"])
        fed |= {"input_ids": to_the_left(batch["input_ids"], mask), cache_argument(model.slm.forward): cache}
    theirs = model.slm.generate(**fed, **arguments)
    assert type(ours) is type(theirs)
    written = theirs.sequences[:, mask.shape[1] if pair.fusion == "kv" else 0 :]
    assert ours.sequences.tolist() == written.tolist()
    torch.testing.assert_close(ours.sequences_scores, theirs.sequences_scores, rtol=0, atol=1e-5)
    again = model.generate(prompt=prompt, **arguments)
    assert again.sequences.tolist() == ours.sequences.tolist()


@torch.no_grad()
def test_6_round_trip(composed, tmp_path):
    """Saved and loaded by class and by Auto class: bit-equal parameters, equal logits, slim files."""
    _, model, processor = composed
    batch = make_batch(processor)
    logits = model(**batch).logits
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    for loader in (LLM2SLMForConditionalGeneration, AutoModel, AutoModelForSeq2SeqLM):
        loaded = loader.from_pretrained(tmp_path)
        assert type(loaded) is LLM2SLMForConditionalGeneration
        expected = dict(model.named_parameters())
        assert {name for name, _ in loaded.named_parameters()} == set(expected)
        for name, parameter in loaded.named_parameters():
            assert torch.equal(parameter, expected[name]), name
        torch.testing.assert_close(loaded(**batch).logits, logits, rtol=0, atol=1e-6)
    again = make_batch(AutoProcessor.from_pretrained(tmp_path))
    assert {key: value.tolist() for key, value in again.items()} == {k: v.tolist() for k, v in batch.items()}

    held = sum(p.numel() * p.element_size() for part in (model.projector, model.slm) for p in part.parameters())
    written = sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    header = 40_000  # names and shapes, which weigh more than the weights of a model this tiny
    assert written <= 1.01 * held + header
    assert not list(tmp_path.glob("**/*.bin")) and not (tmp_path / "llm").exists()


def test_7_no_silent_randomness(composed, tmp_path):
    """A checkpoint that lacks a weight of projector or SLM is refused, whichever it is."""
    from safetensors.torch import load_file, save_file

    _, model, _ = composed
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    assert not any(".llm." in key or key.startswith("llm.") for key in weights)
    for part in ("projector", "slm"):
        key = next(key for key in weights if f"{part}." in key and key.endswith("weight"))
        save_file({k: v for k, v in weights.items() if k != key}, file, metadata={"format": "pt"})
        with pytest.raises(
            ValueError, match=rf"lacks weights: expected all of projector and SLM, found [12] key.*{part}"
        ):
            LLM2SLMForConditionalGeneration.from_pretrained(tmp_path, load_llm=False)


def test_8_loss_and_logits(composed):
    """The loss is the SLM's own on the same fused input, and sums over the tokens that it is told."""
    pair, model, processor = composed
    batch = make_batch(processor)
    labels = batch["labels"]
    with torch.no_grad():
        outputs = model(**batch)
        prompt = model.encode_prompt(**{k: v for k, v in batch.items() if k != "labels"})
        states, mask = prompt.prompt_states, prompt.attention_mask
        if not model.slm.config.is_encoder_decoder:
            states = to_the_left(states, mask)
            tokens = embed_tokens(model.slm, labels.masked_fill(labels == -100, 0))
            full_mask = torch.cat([mask.flip(1), torch.ones_like(labels)], dim=1)
            positions = (full_mask.cumsum(dim=1) - 1).clamp(min=0)
            cached = 0
            fed = {}
            if pair.fusion == "kv":
                cached = mask.shape[1] - 1
                fed[cache_argument(model.slm.forward)] = filled_cache(model, states)
                states = embed_tokens(model.slm, to_the_left(batch["input_ids"], mask)[:, -1:])
            if accepts(model.slm.forward, "position_ids"):
                fed["position_ids"] = positions[:, cached:]
            own = model.slm(
                inputs_embeds=torch.cat([states, tokens], dim=1),
                attention_mask=full_mask,
                labels=torch.cat([torch.full_like(mask, -100), labels], dim=1)[:, cached:],
                **fed,
            )
        elif dict(pair.options).get("slm_encoder") == "skip":
            encoded = BaseModelOutput(last_hidden_state=states)
            own = model.slm(encoder_outputs=encoded, attention_mask=mask, labels=labels)
        else:
            own = model.slm(inputs_embeds=states, attention_mask=mask, labels=labels)
        summed = model(**batch, num_items_in_batch=7).loss
    assert outputs.logits.shape == (*labels.shape, model.config.vocab_size)
    torch.testing.assert_close(outputs.loss, own.loss, rtol=1e-5, atol=1e-5)
    scored = (labels != -100).sum()
    torch.testing.assert_close(summed, outputs.loss * scored / 7, rtol=1e-5, atol=1e-5)
    by_hand = torch.nn.functional.cross_entropy(outputs.logits.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(outputs.loss, by_hand, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("slm", ["t5", "llama"])
def test_9_dtypes_are_separate(zoo, slm, tmp_path):
    """An LLM in bfloat16 beside an SLM in float32: composed, saved and reloaded as such, and to other dtypes."""
    pair = Pair("llama", slm, "replace")
    model, processor = zoo.compose(pair, llm_dtype=torch.bfloat16, slm_dtype=torch.float32)
    batch = make_batch(processor)

    def dtypes(model):
        return tuple({p.dtype for p in part.parameters()} for part in (model.llm, model.projector, model.slm))

    assert dtypes(model) == ({torch.bfloat16}, {torch.float32}, {torch.float32})
    assert model.dtype is torch.float32 and model.config.llm_dtype == "bfloat16"
    loss = model(**batch).loss
    loss.backward()
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert dtypes(loaded) == dtypes(model)
    torch.testing.assert_close(loaded(**batch).loss, loss, rtol=0, atol=0)
    other = AutoModel.from_pretrained(tmp_path, dtype=torch.bfloat16, llm_dtype=torch.float32)
    assert dtypes(other) == ({torch.float32}, {torch.bfloat16}, {torch.bfloat16})
