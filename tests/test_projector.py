"""The projector: its arithmetic for each setting, and where each initialisation starts."""

from __future__ import annotations

import pytest
import torch
from conftest import FAMILIES, PROMPTS, RESPONSES, Pair
from huggingface_hub.errors import StrictDataclassClassValidationError
from torch.nn import functional
from transformers.activations import ACT2FN

from transformers_llm2slm import LLM2SLMConfig, LLM2SLMForConditionalGeneration, LLM2SLMProjector


def make_config(llm="llama", slm="t5", **fields):
    """A configuration of an LLM of width 48 and an SLM of width 32, unless others are named."""
    fields = {"fusion": "replace"} | fields
    return LLM2SLMConfig(llm_config=FAMILIES[llm](), slm_config=FAMILIES[slm](), **fields)


def make_batch(processor, **kwargs):
    return processor(text=PROMPTS, text_target=RESPONSES, padding=True, return_tensors="pt", **kwargs)


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu"])
@pytest.mark.parametrize("norm", ["none", "layer_norm", "rms_norm"])
@pytest.mark.parametrize("num_layers", [1, 2, 4])
def test_forward_is_norm_linear_activation_linear(num_layers, norm, activation):
    config = make_config(
        projector_num_layers=num_layers,
        projector_norm=norm,
        projector_activation=activation,
        projector_hidden_size=20,
    )
    torch.manual_seed(0)
    projector = LLM2SLMProjector(config)
    sizes = [48, *[20] * (num_layers - 1), 32]
    assert [tuple(layer.weight.shape) for layer in projector.layers] == list(zip(sizes[1:], sizes, strict=False))
    num_norm = {"none": 0, "layer_norm": 2 * 48, "rms_norm": 48}[norm]
    num_linear = sum(i * o + o for i, o in zip(sizes, sizes[1:], strict=False))
    assert sum(p.numel() for p in projector.parameters()) == num_linear + num_norm

    states = torch.randn(2, 5, 1, 48) * 3 + 1
    expected = states[:, :, 0]
    if norm == "layer_norm":
        expected = (expected - expected.mean(-1, keepdim=True)) / expected.var(-1, keepdim=True, correction=0).sqrt()
    elif norm == "rms_norm":
        expected = expected / expected.square().mean(-1, keepdim=True).sqrt()
    for index, layer in enumerate(projector.layers):
        expected = functional.linear(expected, layer.weight, layer.bias)
        if index < num_layers - 1:
            expected = ACT2FN[activation](expected)
    output = projector(states)
    assert output.shape == (2, 5, 32)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)


def test_hidden_size_defaults_to_the_larger_width():
    assert LLM2SLMProjector(make_config()).layers[0].out_features == 48
    assert LLM2SLMProjector(make_config(llm="t5", slm="llama")).layers[0].out_features == 48


def test_unknown_activation_is_an_error():
    message = "`projector_activation` must be one of .*'relu'.*, got 'no_such_activation'"
    with pytest.raises(StrictDataclassClassValidationError, match=message):
        LLM2SLMProjector(make_config(projector_activation="no_such_activation"))


def test_mix_weights():
    """Several layers start as their mean; the weights are a softmax, and are learned."""
    projector = LLM2SLMProjector(make_config(llm_layer=[0, 2, -1]))
    states = torch.randn(2, 5, 3, 48)
    torch.testing.assert_close(projector.mix(states), states.mean(dim=2))
    with torch.no_grad():
        projector.layer_weights.copy_(torch.tensor([0.5, -1.0, 2.0]))
    weights = torch.tensor([0.5, -1.0, 2.0]).exp()
    expected = (states * (weights / weights.sum())[:, None]).sum(dim=2)
    torch.testing.assert_close(projector.mix(states), expected)
    projector(states).square().sum().backward()
    gradient = projector.layer_weights.grad
    assert gradient.abs().min() > 0
    assert gradient.sum().abs() < 1e-3 * gradient.abs().max()  # a softmax doesn't feel a common shift


def test_one_layer_has_no_mix_weights():
    assert LLM2SLMProjector(make_config(llm_layer=1)).layer_weights is None
    assert LLM2SLMProjector(make_config(llm_layer=[1])).layer_weights is None


def test_llm_embed_adds_the_embedding_through_its_own_map():
    """The last of the given states is the token's embedding; it goes through one linear layer and is not mixed."""
    projector = LLM2SLMProjector(make_config(fusion="llm-embed", llm_layer=[1, 2]))
    states = torch.randn(2, 5, 3, 48)
    without = states.clone()
    without[:, :, 2] = 0
    difference = projector(states) - projector(without)
    torch.testing.assert_close(
        difference, functional.linear(states[:, :, 2], projector.embed_projection.weight), rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(projector.mix(states), states[:, :, :2].mean(dim=2))


def test_residual_adds_the_mixed_states():
    plain = LLM2SLMProjector(make_config(slm="llama", llm_layer=[0, 1]))
    residual = LLM2SLMProjector(make_config(slm="llama", llm_layer=[0, 1], projector_residual=True))
    residual.load_state_dict(plain.state_dict())
    states = torch.randn(2, 5, 2, 48)
    torch.testing.assert_close(residual(states) - plain(states), states.mean(dim=2), rtol=1e-4, atol=1e-5)


def test_states_are_taken_to_the_projectors_dtype():
    projector = LLM2SLMProjector(make_config(fusion="llm-embed"))
    states = torch.randn(1, 3, 2, 48).to(torch.bfloat16)
    output = projector(states)
    assert output.dtype is torch.float32
    torch.testing.assert_close(output, projector(states.float()), rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["random", "zero", "identity", "fit"])
@pytest.mark.parametrize("fusion", ["replace", "llm-embed"])
def test_reset_parameters(kind, fusion):
    """Where each initialisation starts: norms at one, biases at zero, the last layer at zero or random."""
    projector = LLM2SLMProjector(make_config(fusion=fusion, llm_layer=[0, 1], projector_norm="layer_norm"))
    with torch.no_grad():
        for parameter in projector.parameters():
            parameter.fill_(7)
    torch.manual_seed(0)
    projector.reset_parameters(kind)
    assert all((layer.bias == 0).all() for layer in projector.layers)
    assert (projector.norm.weight == 1).all() and (projector.norm.bias == 0).all()
    assert (projector.layer_weights == 0).all()
    # Kaiming's uniform with a=sqrt(5) lies within one over the root of the fan-in, and has that over sqrt(3) as spread.
    first, last = projector.layers[0].weight, projector.layers[-1].weight
    assert first.abs().max() <= 48**-0.5 and abs(first.std() * (3 * 48) ** 0.5 - 1) < 0.1
    assert (last == 0).all() == (kind in ("zero", "identity"))
    if fusion == "llm-embed":
        assert (projector.embed_projection.weight == 0).all() == (kind != "random")
        assert (projector.embed_projection.bias == 0).all()


def test_random_is_seeded(zoo):
    """`torch.manual_seed` decides the projector, and nothing else does."""
    llm, slm = zoo.sources(Pair("llama", "t5", "replace"))

    def weights(seed):
        torch.manual_seed(seed)
        model = LLM2SLMForConditionalGeneration.from_llm_slm_pretrained(llm, slm, fusion="replace")
        return torch.cat([parameter.flatten() for parameter in model.projector.parameters()])

    first, second, other = weights(1), weights(1), weights(2)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    assert (first != other).sum() == 48 * 48 + 48 * 32  # both weights, not the biases


@pytest.mark.parametrize("slm", ["t5", "llama", "bart", "gpt2"])
@pytest.mark.parametrize("fusion", ["add", "align"])
@torch.no_grad()
def test_zero_starts_as_the_slm_alone(zoo, fusion, slm):
    """With `"add"` and `"align"` the hybrid's logits are those of the SLM on its own tokens of the same text."""
    model, processor = zoo.compose(Pair("llama", slm, fusion), projector_init="zero")
    assert model.config.projector_init == "zero" and model.config.projector_residual is False
    for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
        batch = processor(text=[prompt], text_target=[response], return_tensors="pt")
        ids = processor.tokenizer(prompt, return_tensors="pt")["input_ids"]
        labels = batch["labels"]
        if model.slm.config.is_encoder_decoder:
            expected = model.slm(input_ids=ids, labels=labels).logits
        else:
            expected = model.slm(torch.cat([ids, labels], dim=1)).logits[:, ids.shape[1] - 1 : -1]
        torch.testing.assert_close(model(**batch).logits, expected, rtol=0, atol=1e-4)


def test_zero_learns(small):
    """A last layer of zeros still gets a gradient, and after one step so do the layers before it."""
    model, processor = small
    model.projector.reset_parameters("zero")
    optimizer = torch.optim.SGD(model.projector.parameters(), lr=0.1)
    batch = make_batch(processor)
    model(**batch).loss.backward()
    first, last = model.projector.layers
    assert last.weight.grad.abs().max() > 0 and first.weight.grad.abs().max() == 0
    optimizer.step()
    optimizer.zero_grad()
    model(**batch).loss.backward()
    assert first.weight.grad.abs().max() > 0


@pytest.mark.parametrize("fusion", ["replace", "llm-embed"])
def test_zero_needs_the_slms_own_embeddings(zoo, fusion):
    with pytest.raises(ValueError, match=f'`projector_init="zero"` needs `fusion="add"` or `"align"`, got {fusion!r}'):
        zoo.compose(Pair("llama", "t5", fusion), projector_init="zero")


@pytest.mark.parametrize("slm", ["t5", "gpt2"])
@torch.no_grad()
def test_identity_passes_the_llms_states(zoo, slm):
    """The prompt states are the LLM's own, the padding aside."""
    model, processor = zoo.compose(Pair("t5", slm, "replace"), projector_init="identity")
    assert model.config.projector_residual is True
    batch = make_batch(processor)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    states = model.llm.get_encoder()(input_ids=ids, attention_mask=mask).last_hidden_state
    prompt = model.encode_prompt(ids, mask)
    assert prompt.attention_mask.tolist() == mask.tolist()
    real = mask.bool()
    torch.testing.assert_close(prompt.prompt_states[real], states[real], rtol=0, atol=1e-6)


def test_identity_needs_equal_widths(zoo):
    with pytest.raises(
        StrictDataclassClassValidationError, match="needs an LLM and an SLM of equal width, got 48 and 32"
    ):
        zoo.compose(Pair("llama", "t5", "replace"), projector_init="identity")
