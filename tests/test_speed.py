"""The clock in rounds, and the limit that the memory sets to a step."""

from __future__ import annotations

import types

import pytest
import torch
from conftest import FAMILIES, VOCAB_SIZE
from transformers import LlamaForCausalLM, T5ForConditionalGeneration

from transformers_llm2slm import speed
from transformers_llm2slm.speed import Decoding, memory_bandwidth, spread, step_bytes, times_in_rounds

PROMPT, NEW_TOKENS = 9, 6


@pytest.fixture
def t5():
    """A T5 that has read a prompt: inner width 32, as wide as the model."""
    model = T5ForConditionalGeneration(FAMILIES["t5"]()).eval()
    ids = torch.randint(3, VOCAB_SIZE, (1, PROMPT))
    mask = torch.ones_like(ids)
    with torch.no_grad():
        encoded = model.get_encoder()(input_ids=ids, attention_mask=mask, return_dict=True)
    return model, {"encoder_outputs": encoded, "attention_mask": mask}


@pytest.fixture
def llama():
    model = LlamaForCausalLM(FAMILIES["llama"]()).eval()
    return model, {"input_ids": torch.randint(3, VOCAB_SIZE, (1, PROMPT))}


# By hand: of 2 decoder layers of T5 the self-attention's 4 matrices, the cross-attention's query and output (its keys and values
# are there), 2 of the feed-forward and 3 norms, with a norm behind them and the LM head.
T5_MATRICES = 2 * (4 * 32 * 32 + 2 * 32 * 32 + 2 * 32 * 64) + VOCAB_SIZE * 32
T5_VECTORS = 2 * 3 * 32 + 32
# Of 3 layers of Llama: query and output (4 heads of 8), key and value (2 heads), 3 of the feed-forward; 2 norms.
LLAMA_MATRICES = 3 * (2 * 48 * 32 + 2 * 48 * 16 + 3 * 48 * 64) + VOCAB_SIZE * 48
LLAMA_VECTORS = 3 * 2 * 48 + 48
# Keys and values of one position. In the steps that write tokens 2 to 6, the cache grows by 1 to 5, which is 3 in the mean.
T5_CACHE = 2 * 2 * 32 * (PROMPT + 1 + 3)
LLAMA_CACHE = 2 * 3 * 16 * (PROMPT + 3)


def test_bytes_of_a_step(t5, llama):
    for (model, inputs), matrices, vectors, cache in (
        (t5, T5_MATRICES, T5_VECTORS, T5_CACHE),
        (llama, LLAMA_MATRICES, LLAMA_VECTORS, LLAMA_CACHE),
    ):
        found = step_bytes(model, inputs, NEW_TOKENS)
        assert found == {
            "weights": 4 * (matrices + vectors),
            "cache": 4 * cache,
            "total": 4 * (matrices + vectors + cache),
        }
        halved = step_bytes(model, inputs, NEW_TOKENS, dtype=torch.bfloat16)
        assert halved["total"] == found["total"] / 2
        blocks = step_bytes(model, inputs, NEW_TOKENS, torch.float32, int8_block=16)
        assert blocks["weights"] == pytest.approx(matrices * (1 + 4 / 16) + 4 * vectors)
        assert blocks["cache"] == found["cache"]


def test_a_scale_for_each_row(llama):
    model, inputs = llama
    rows = (
        3 * ((32 + 2 * 16) + 48 + 2 * 64 + 48) + VOCAB_SIZE
    )  # query, keys, values; output; feed-forward and its output
    found = step_bytes(model, inputs, NEW_TOKENS, torch.float32, int8_block=0)
    assert found["weights"] == pytest.approx(LLAMA_MATRICES + 4 * rows + 4 * LLAMA_VECTORS)


def test_tied_weights_count_once():
    config = FAMILIES["llama"]()
    config.tie_word_embeddings = True
    model = LlamaForCausalLM(config).eval()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    found = step_bytes(model, {"input_ids": torch.ones((1, PROMPT), dtype=torch.long)}, NEW_TOKENS)
    assert found["weights"] == 4 * (LLAMA_MATRICES + LLAMA_VECTORS)


def test_steps_are_those_of_the_model(t5, llama):
    """A pass behind the prompt gives the logits of one over everything."""
    for model, inputs in (t5, llama):
        decoding = Decoding(model, inputs)
        before = decoding.cache_bytes()
        logits = decoding.step(3).logits[:, -1]
        zeros = torch.zeros((1, 4 if model.config.is_encoder_decoder else 3), dtype=torch.long)
        with torch.no_grad():
            if model.config.is_encoder_decoder:
                whole = model(**inputs, decoder_input_ids=zeros)
            else:
                whole = model(input_ids=torch.cat([inputs["input_ids"], zeros], dim=1))
        torch.testing.assert_close(logits, whole.logits[:, -1], atol=1e-5, rtol=1e-4)
        positions = PROMPT + 1 if model.config.is_encoder_decoder else PROMPT
        assert decoding.cache_bytes() - before == 3 * before // positions


def test_rounds_end_with_the_time(monkeypatch):
    """On a clock of its own: a task takes 4 s, and no round begins after 10 s, but at least so many are run."""
    now, calls = 0.0, []

    def task(name):
        def run():
            nonlocal now
            calls.append(name)
            now += 4.0

        return run

    monkeypatch.setattr(speed, "time", types.SimpleNamespace(perf_counter=lambda: now, sleep=calls.append))
    tasks = {"a": {"first": task("a1"), "total": task("a2")}, "b": {"total": task("b")}}
    times = times_in_rounds(tasks, rounds=5, max_seconds=20, pause=0.5)
    assert times == {"a": {"first": [4.0] * 2, "total": [4.0] * 2}, "b": {"total": [4.0] * 2}}
    assert calls == [0.5, "a1", "a2", 0.5, "b"] * 2
    assert len(times_in_rounds(tasks, rounds=5, max_seconds=1, min_rounds=3)["b"]["total"]) == 3


def test_bandwidth_is_bytes_over_the_median_time(monkeypatch):
    """The first pass, which brings the memory in, is left out."""
    seconds = iter([9.0, 1.0, 2.0, 4.0])
    monkeypatch.setattr(speed, "seconds_of", lambda function: next(seconds))
    assert memory_bandwidth(size=2**20, passes=3) == 2**20 / 2.0


def test_spread():
    assert spread(iter([4.0, 1.0, 2.0])) == {"median": 2.0, "min": 1.0, "max": 4.0}
