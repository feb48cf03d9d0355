"""Contestants: each writes exactly as much as it should, and what it should."""

from __future__ import annotations

import pytest
import torch
from conftest import PROMPTS, Pair

from transformers_llm2slm import lossless
from transformers_llm2slm.contestants import (
    HYBRID,
    LLM,
    LOOKUP,
    LOSSLESS,
    SLM,
    Conditions,
    Contestant,
    contestants_of,
    drafting,
    figures_of,
    llm_contestant,
    lossless_contestant,
    race,
    random_prompts,
    text_prompts,
)

ONE = Conditions(prompt_length=12, new_tokens=10)
# Both kinds of LLM with both kinds of SLM; an SLM without its encoder; two tokenizers.
RACING_PAIRS = [
    Pair("t5", "t5", "add"),
    Pair("t5", "gpt2", "align"),
    Pair("llama", "t5", "replace", (("slm_encoder", "skip"),)),
    Pair("llama", "llama", "align"),
]


@pytest.fixture(scope="module", params=RACING_PAIRS, ids=str)
def raced(request, zoo):
    """A pair with its whole LLM, one round of all that it is compared with, and what they wrote."""
    model, _ = zoo.compose(request.param, load_llm="whole")
    inputs = random_prompts(model, ONE)
    contestants = contestants_of(model, inputs, ONE)
    return model, inputs, contestants, *race(contestants, ONE, rounds=2, warm_up_tokens=2)


def test_everybody_writes_what_they_should(raced):
    model, inputs, contestants, seconds, written = raced
    assert list(contestants) == list(seconds) == list(written) == [LLM, SLM, HYBRID, LOOKUP, LOSSLESS]
    llm = model.model.whole_llm
    prompt = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    own = llm.generate(**prompt, max_new_tokens=10, do_sample=False, eos_token_id=None, pad_token_id=0)[:, -10:]
    hybrid = model.generate(**inputs, max_new_tokens=10, do_sample=False, eos_token_id=None, pad_token_id=0)[:, -10:]
    for name in (LLM, LOOKUP, LOSSLESS):
        assert torch.equal(written[name], own), name
    for name in (SLM, HYBRID):
        assert torch.equal(written[name], hybrid), name


def test_what_is_timed(raced):
    _, _, contestants, seconds, _ = raced
    parts = {name: list(times) for name, times in seconds.items()}
    plain = ["first token", "total"]
    assert parts == dict.fromkeys((LLM, SLM, LOOKUP, LOSSLESS), plain) | {HYBRID: ["encode", "project", *plain]}
    assert all(len(values) == 2 and min(values) > 0 for times in seconds.values() for values in times.values())
    drafted = {name: it.drafts for name, it in contestants.items() if it.drafts is not None}
    assert list(drafted) == [LOOKUP, LOSSLESS]


def test_lossless_drafts_are_counted(raced, monkeypatch):
    """Of all that was written, the warming up too; by drafts of three tokens."""
    model, inputs, *_ = raced
    monkeypatch.setattr(lossless.DraftLength, "choose", lambda self: 3)
    contestant = lossless_contestant(model, inputs, ONE)
    for _ in range(2):
        contestant.write(10)
    options = ONE.arguments(10) | {"mode": "lossless", "return_dict_in_generate": True}
    outputs = model.generate(**inputs, **options)
    assert contestant.drafts.drafted == 2 * outputs.num_drafted > 0
    assert contestant.drafts.acceptance_rate == outputs.num_accepted / outputs.num_drafted


def test_limits(raced):
    """A step of the hybrid is one of its SLM. A draft has no step of one length, and so no limit."""
    model, _, contestants, _, _ = raced
    limits = {name: contestant.step_bytes for name, contestant in contestants.items()}
    assert limits[SLM] == limits[HYBRID] and limits[LOOKUP] is limits[LOSSLESS] is None
    head = model.slm.get_output_embeddings().weight.nbytes
    assert head < limits[SLM] < sum(parameter.nbytes for parameter in model.slm.parameters()) + 40_000


@pytest.mark.parametrize("conditions", [Conditions(7, 5, batch_size=3), Conditions(7, 5, num_beams=2)], ids=str)
def test_batches_and_beams(zoo, conditions):
    model, _ = zoo.compose(RACING_PAIRS[3], load_llm="whole")
    inputs = random_prompts(model, conditions)
    assert {name: len(tensor) for name, tensor in inputs.items()} == dict.fromkeys(inputs, conditions.batch_size)
    contestants = contestants_of(model, inputs, conditions)
    assert list(contestants) == [LLM, SLM, HYBRID]
    assert [contestant.step_bytes for contestant in contestants.values()] == [None] * 3
    _, written = race(contestants, conditions, rounds=1)
    assert torch.equal(written[SLM], written[HYBRID])
    options = conditions.arguments(5)
    own = model.model.whole_llm.generate(inputs["input_ids"], attention_mask=inputs["attention_mask"], **options)
    assert torch.equal(written[LLM], own[:, 7:])


def test_an_end_token_ends_nothing(zoo):
    """A model that always writes its end token writes as many as it should."""
    model, _ = zoo.compose(RACING_PAIRS[0], load_llm="whole")
    llm = model.model.whole_llm
    end = llm.generation_config.eos_token_id
    llm.lm_head.register_forward_hook(
        lambda _, args, logits: torch.nn.functional.one_hot(torch.full(logits.shape[:2], end), logits.shape[2]).float()
    )
    written = llm_contestant(llm, random_prompts(model, ONE), ONE).write(6)
    assert written.tolist() == [[end] * 6]


def test_a_wrong_length_is_an_error():
    contestants = {"short": Contestant(lambda count: torch.zeros((1, min(count, 4))))}
    with pytest.raises(RuntimeError, match=r"'short' was to write 10 token\(s\) for each of 1 .* of shape \(1, 4\)"):
        race(contestants, ONE, rounds=1)


def test_drafts_are_counted(zoo):
    """Drafts of three tokens, the second of which is wrong: of each, two are looked at and one is accepted."""
    model, _ = zoo.compose(RACING_PAIRS[0], load_llm="whole")
    llm, inputs = model.model.whole_llm, random_prompts(model, ONE)
    own = llm_contestant(llm, inputs, ONE).write(10)[0]

    class Drafter:
        requires_model_outputs = False

        def get_candidates(self, input_ids):
            place = input_ids.shape[1] - 1
            draft = own[place : place + 3].clone()
            draft[1:2] += 1
            return torch.cat([input_ids, draft[None]], dim=1), None

        def update_candidate_strategy(self, *_):
            pass

    contestant = drafting(
        llm, llm_contestant(llm, inputs, ONE, prompt_lookup_num_tokens=1), make=lambda **_: Drafter()
    )
    assert torch.equal(contestant.write(10)[0], own)
    # Two tokens a pass, the accepted one and the LLM's: five passes, and in the last no more than two are drafted.
    assert (contestant.drafts.drafted, contestant.drafts.accepted) == (10, 5)
    assert "_get_candidate_generator" not in vars(llm)


def test_figures():
    seconds = {
        LLM: {"first token": [1.0, 2.0, 1.0], "total": [10.0, 20.0, 12.0]},
        HYBRID: {"encode": [0.5, 0.7, 0.6], "first token": [1.0, 1.0, 1.0], "total": [2.0, 5.0, 4.0]},
    }
    figures = figures_of(seconds, Conditions(new_tokens=5, batch_size=2))
    assert list(figures[HYBRID]) == [
        "encode, s", "first token, s", "total, s", "token, s", "tokens/s", "times the first",
    ]  # fmt: skip
    assert figures[HYBRID]["encode, s"] == {"median": 0.6, "min": 0.5, "max": 0.7}
    assert figures[HYBRID]["token, s"] == {"median": 0.75, "min": 0.25, "max": 1.0}
    assert figures[HYBRID]["tokens/s"] == {"median": 2.5, "min": 2.0, "max": 5.0}
    assert figures[HYBRID]["times the first"] == {"median": 4.0, "min": 3.0, "max": 5.0}
    assert figures[LLM]["times the first"]["median"] == 1.0


def test_prompts_of_text(zoo):
    model, processor = zoo.compose(RACING_PAIRS[1])
    conditions = Conditions(prompt_length=40, batch_size=2)
    inputs = text_prompts(processor, PROMPTS * 6, conditions)
    assert inputs["input_ids"].shape == (2, 40) and bool(inputs["attention_mask"].all())
    assert set(inputs) >= {"slm_input_ids", "alignment"}
    first = processor.llm_tokenizer.decode(inputs["input_ids"][0], skip_special_tokens=True)
    assert first.startswith(PROMPTS[0][:20])
    assert model.encode_prompt(**inputs).prompt_states.shape[0] == 2
    with pytest.raises(ValueError, match=r"The 1 text\(s\) give 0 prompt\(s\) of 40 tokens, but the batch takes 2"):
        text_prompts(processor, ["short"], conditions)


def test_the_llm_must_be_whole(zoo):
    model, _ = zoo.compose(RACING_PAIRS[0])
    with pytest.raises(ValueError, match='takes the whole LLM: load the model with `load_llm="whole"`'):
        contestants_of(model, {}, ONE)
