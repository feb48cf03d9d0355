"""The fingerprint of weights: the same for the same weights in any precision, another for any others."""

from __future__ import annotations

import copy
import pathlib

import torch
from transformers import AutoModel, AutoModelForCausalLM

from transformers_llm2slm.fingerprint import fingerprint_of_files, is_exact, weights_fingerprint
from transformers_llm2slm.loading import adopt_llm, load_llm
from transformers_llm2slm.reference import llm_fingerprint


def test_same_in_float32_bfloat16_and_from_files(zoo):
    folder = zoo.checkpoint("llama", "bpe", "llm")
    expected = llm_fingerprint(load_llm(folder))
    assert llm_fingerprint(load_llm(folder, dtype=torch.bfloat16)) == expected
    half = load_llm(folder, dtype=torch.float16)
    assert not is_exact(half) and llm_fingerprint(half) is None
    assert llm_fingerprint(half, folder) == expected
    names = [name for name, _ in half.named_parameters()]
    assert fingerprint_of_files(names, sorted(pathlib.Path(folder).glob("*.safetensors"))) == expected
    assert fingerprint_of_files([*names, "not.there"], sorted(pathlib.Path(folder).glob("*.safetensors"))) is None


def test_does_not_depend_on_head_or_pooler(zoo):
    """A body, a model with a head and the files of either have one fingerprint: that of the part that reads."""
    folder = zoo.checkpoint("llama", "bpe", "llm")
    expected = llm_fingerprint(load_llm(folder))
    assert llm_fingerprint(adopt_llm(AutoModelForCausalLM.from_pretrained(folder))) == expected
    assert llm_fingerprint(adopt_llm(AutoModel.from_pretrained(folder))) == expected
    bert = zoo.checkpoint("bert", "bpe", "llm")
    assert AutoModel.from_pretrained(bert).pooler is not None
    assert llm_fingerprint(load_llm(bert)) == llm_fingerprint(adopt_llm(AutoModel.from_pretrained(bert)))


def test_changes_with_values_names_and_shapes(zoo):
    llm = load_llm(zoo.checkpoint("llama", "bpe", "llm"))
    expected = llm_fingerprint(llm)
    for name, parameter in llm.named_parameters():
        changed = copy.deepcopy(llm)
        changed.get_parameter(name).data.mul_(1.02)
        assert llm_fingerprint(changed) != expected, (name, parameter.shape)
    tensors = {"a": torch.arange(6.0)}
    same = weights_fingerprint(tensors, tensors.__getitem__)
    renamed = {"b": torch.arange(6.0)}
    reshaped = {"a": torch.arange(6.0).reshape(2, 3)}
    assert len({same, *(weights_fingerprint(t, t.__getitem__) for t in (renamed, reshaped))}) == 3
