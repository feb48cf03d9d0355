"""Calls from several threads at once, as servers make them: each gets its own answer, and the model stays as it was."""

from __future__ import annotations

import copy
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import SMALL, Pair

from transformers_llm2slm import LLM2SLMExportedModel, LLM2SLMForConditionalGeneration

OPTIONS = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}


@pytest.fixture(autouse=True)
def threads_that_switch_often():
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    yield
    sys.setswitchinterval(interval)


@pytest.fixture
def requests():
    """Of equal length, so that no shape tells one from another."""
    return torch.randint(3, 300, (4, 1, 12), generator=torch.Generator().manual_seed(0))


def answers_are_their_own(call, requests, repeats=6):
    """What four threads get, each for its request, is what one gets for each."""
    expected = [call(request, index) for index, request in enumerate(requests)]
    with ThreadPoolExecutor(4) as pool:
        calls = [
            (index, pool.submit(call, request, index))
            for _ in range(repeats)
            for index, request in enumerate(requests)
        ]
        return all(torch.equal(future.result(), expected[index]) for index, future in calls)


def cut(zoo, **options):
    torch.manual_seed(0)
    source = zoo.checkpoint("llama", "bpe", "llm")
    return LLM2SLMForConditionalGeneration.from_llm_slm_pretrained(source, slm_layers=2, **options)


@pytest.mark.parametrize("fusion", ["replace", "kv"])
def test_reading_and_writing(zoo, requests, fusion):
    model = cut(zoo, fusion=fusion)
    assert answers_are_their_own(lambda ids, _: model.encode_prompt(input_ids=ids).prompt_states, requests)
    assert answers_are_their_own(lambda ids, _: model.generate(input_ids=ids, **OPTIONS), requests)


@pytest.mark.parametrize("fusion", ["replace", "kv"])
def test_lossless_mode(zoo, requests, fusion):
    model = cut(zoo, fusion=fusion, load_llm="whole")
    assert answers_are_their_own(lambda ids, _: model.generate(input_ids=ids, mode="lossless", **OPTIONS), requests, 3)


def test_shortlists(zoo, requests):
    """Different ones, none, and an error among them; the model has its whole head in the end."""
    model = cut(zoo)
    before = copy.deepcopy(model.state_dict())
    lists = [[], list(range(3, 200)), list(range(100, 300)), []]

    def call(ids, index):
        if index == 3:
            with pytest.raises(ValueError, match="`shortlist` must hold token ids"):
                model.generate(input_ids=ids, shortlist=[-1], **OPTIONS)
        return model.generate(input_ids=ids, shortlist=lists[index], **OPTIONS)

    assert answers_are_their_own(call, requests)
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in before)


@pytest.mark.parametrize(
    ("format", "runtime", "pair"),
    [("onnx", "onnxruntime", Pair("llama", "qwen3", "kv")), ("openvino", "openvino", SMALL)],
)
def test_exports(zoo, requests, format, runtime, pair):
    pytest.importorskip(runtime)
    model = LLM2SLMExportedModel.from_pretrained(zoo.export(pair, format).folder)
    assert answers_are_their_own(lambda ids, _: model.generate(input_ids=ids, **OPTIONS), requests)
