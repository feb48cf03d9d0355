"""Reading: the states of the layers that are asked for, and no layer above them."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import FAMILIES, PAIRS, Pair

from transformers_llm2slm import LLM2SLMConfig
from transformers_llm2slm.llm_states import hidden_states
from transformers_llm2slm.loading import load_llm
from transformers_llm2slm.probes import check_can_read
from transformers_llm2slm.structure import layer_list

IDS = torch.tensor([[5, 9, 17, 30, 2, 1], [7, 8, 2, 1, 1, 1]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 0], [1, 1, 1, 0, 0, 0]])
INPUTS = {"input_ids": IDS, "attention_mask": MASK}


class TwoTowers(torch.nn.Module):
    """A model with another list of as many layers, which is found first and never run."""

    def __init__(self, llm):
        super().__init__()
        self.images = torch.nn.ModuleList(torch.nn.Identity() for _ in llm.layers)
        self.text = llm

    def forward(self, **inputs):
        return self.text(**inputs)


def count_runs(blocks):
    """A list of the indices of the layers that run, which fills as they do."""
    runs = []
    for index, block in enumerate(blocks):
        block.register_forward_hook(lambda *_, index=index: runs.append(index))
    return runs


@pytest.mark.parametrize("family", sorted({pair.llm for pair in PAIRS} | {"marian", "pegasus", "opt", "phi3"}))
@torch.no_grad()
def test_layers_that_are_asked_for(zoo, family):
    """For each layer and some sets of them: what `output_hidden_states` gives, and only the layers below it run."""
    llm = load_llm(zoo.checkpoint(family, "bpe", "llm"))
    body = llm.get_encoder() if llm.config.is_encoder_decoder else llm
    expected = body(**INPUTS, output_hidden_states=True, return_dict=True).hidden_states
    total = len(expected) - 1
    runs = count_runs(body.get_submodule(layer_list(body, total)))
    for layers in [[layer] for layer in range(-total - 1, total + 1)] + [
        [0, total - 1],
        [1, 0, 1],
        [-1, 0],
        [-2],
        [-1, total],
    ]:
        runs.clear()
        states = hidden_states(body, layers, total, INPUTS)
        for layer, state in zip(layers, states, strict=True):
            torch.testing.assert_close(state, expected[layer], rtol=0, atol=0, msg=f"{family} {layers}")
        assert runs == list(range(max(layer % (total + 1) for layer in layers)))


@torch.no_grad()
def test_layers_that_can_not_be_found(zoo):
    """Where the number of layers is not known, or no list has as many, the whole is run."""
    llm = load_llm(zoo.checkpoint("llama", "bpe", "llm"))
    expected = llm(**INPUTS, output_hidden_states=True).hidden_states
    for num_layers in (None, 7):
        assert torch.equal(hidden_states(llm, [1], num_layers, INPUTS)[0], expected[1])
    assert torch.equal(hidden_states(llm, [-1], None, INPUTS)[0], expected[-1])
    assert torch.equal(hidden_states(TwoTowers(llm), [1], len(llm.layers), INPUTS)[0], expected[1])


def test_no_layer_above_runs_when_a_model_reads(zoo):
    """In `generate` and in training: of three layers, the two below `llm_layer=2`."""
    pair = Pair("llama", "t5", "replace", (("llm_layer", 2),))
    model, processor = zoo.compose(pair)
    runs = count_runs(model.llm.layers)
    batch = processor(text=["a text", "another one"], text_target=["b", "c"], padding=True, return_tensors="pt")
    model.generate(**{key: batch[key] for key in ("input_ids", "attention_mask")}, max_new_tokens=3)
    assert runs == [0, 1]
    model(**batch).loss.backward()
    assert runs == [0, 1, 0, 1]


def test_states_that_are_not_what_layers_get_are_refused(zoo):
    """A model whose hidden states are something else would read one thing in training and another elsewhere."""
    llm = load_llm(zoo.checkpoint("llama", "bpe", "llm"))
    config = LLM2SLMConfig(llm_config=copy.deepcopy(llm.config), slm_config=FAMILIES["t5"](), llm_layer=1)
    check_can_read(llm, config)
    forward = llm.forward

    def scaled(*args, **kwargs):
        outputs = forward(*args, **kwargs)
        if outputs.hidden_states is not None:
            outputs.hidden_states = tuple(2 * state for state in outputs.hidden_states)
        return outputs

    llm.forward = scaled
    with pytest.raises(ValueError, match="LlamaModel can't be read at `llm_layer` 1: .* Choose `llm_layer=-1`"):
        check_can_read(llm, config)
