"""The parts of `benchmarks/speed.py` that decide what it says: drafts of a given quality, targets, pictures, resuming."""

from __future__ import annotations

import argparse
import json
import pathlib
import sys

import pytest
import torch
from conftest import Pair
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from transformers_llm2slm.contestants import Conditions, llm_contestant, random_prompts

BENCHMARKS = pathlib.Path(__file__).parent.parent / "benchmarks"
pytestmark = pytest.mark.skipif(not BENCHMARKS.is_dir(), reason="the benchmarks are not part of a release")
sys.path.insert(0, str(BENCHMARKS))

PAIRS = [Pair("t5", "t5", "add"), Pair("llama", "llama", "add")]
LONG = Conditions(prompt_length=12, new_tokens=80)


@pytest.fixture(scope="module", params=PAIRS, ids=str)
def pair(request, zoo):
    """A pair with its whole LLM, and prompts as the LLM takes them."""
    model, _ = zoo.compose(request.param, load_llm="whole")
    for part in (model.slm, model.model.whole_llm):
        part.generation_config.eos_token_id = None
    inputs = random_prompts(model, LONG)
    return model, {name: inputs[name] for name in ("input_ids", "attention_mask")}


# Drafts --------------------------------------------------------------------------------------------------------------
def test_half_of_the_text_is_quoted():
    from speed_rivals import given_text

    prompt = torch.arange(1000, 1040)[None]
    text = given_text(prompt, 60, 900)
    quoted = (text >= 1000).reshape(-1)
    assert len(text) == 60 and torch.equal(text, given_text(prompt, 60, 900))
    assert [int(quoted[start : start + 8].sum()) for start in range(0, 56, 8)] == [0, 8] * 3 + [0]
    assert torch.equal(text[8:16].diff(), torch.ones(7, dtype=torch.long))


@pytest.mark.parametrize("rate", [0.0, 0.7, 1.0])
def test_drafts_are_accepted_at_the_rate(pair, rate):
    """Each token with this probability, whatever the assistant itself would say, and the text is the given one."""
    from speed_rivals import assisted_contestant, writes_given_text

    model, prompt = pair
    llm = model.model.whole_llm
    contestant = assisted_contestant(llm, model.slm, prompt, LONG, rate, num_assistant_tokens=3)
    given = writes_given_text(llm, prompt, LONG)["logits_processor"][0].text
    passes = []
    hook = model.slm.register_forward_hook(lambda *_: passes.append(1))
    for _ in range(3):
        assert torch.equal(contestant.write(80)[0], given)
    hook.remove()
    drafts = contestant.drafts
    if rate in (0.0, 1.0):
        assert drafts.acceptance_rate == rate
    else:
        deviation = (rate * (1 - rate) / drafts.drafted) ** 0.5
        assert abs(drafts.acceptance_rate - rate) < 4 * deviation
    # The assistant does the work of every token that is drafted, looked at or not.
    rounds = {0.0: 3 * 80, 1.0: 3 * 20}.get(rate)
    assert len(passes) >= drafts.drafted
    if rounds is not None:
        assert 3 * rounds - 3 * 6 <= len(passes) <= 3 * rounds


def test_prompt_lookup_finds_what_is_quoted(pair):
    """In the prompt of a decoder-only LLM; that of an encoder-decoder is nowhere that transformers looks."""
    from speed_rivals import lookup_of_given_text, writes_given_text

    model, prompt = pair
    llm = model.model.whole_llm
    contestant = lookup_of_given_text(llm, prompt, LONG)
    assert torch.equal(contestant.write(80)[0], writes_given_text(llm, prompt, LONG)["logits_processor"][0].text)
    assert contestant.drafts.accepted > 10
    assert contestant.drafts.accepted < 60


def test_draft_lengths_follow_the_rate(pair, monkeypatch):
    """On a clock by which the assistant takes a tenth of the LLM's time, and the LLM as long for four tokens as for one."""
    import speed_rivals

    model, prompt = pair
    now = 0.0

    class Steps:
        def __init__(self, seconds):
            self.seconds = seconds

        def step(self, count):
            nonlocal now
            now += self.seconds

    def seconds_of(step):
        before = now
        step()
        return now - before

    monkeypatch.setattr(speed_rivals, "seconds_of", seconds_of)
    monkeypatch.setattr(speed_rivals, "Decoding", lambda *_: Steps(1.0))
    lengths = speed_rivals.fitting_draft_lengths(model.model.whole_llm, Steps(0.1), prompt, (0.5, 0.7, 0.9))
    assert lengths == {0.5: 2, 0.7: 4, 0.9: 10}


def test_steps_are_timed_between_tokens():
    from speed_rivals import StepClock

    clock = StepClock()
    clock.times = [0.0, 10.0, 12.0, 13.0, 16.0]  # the first is the prompt's
    assert clock.step_seconds(4) == 2.0


@pytest.mark.parametrize("name", ["t5-v1_1-large", "SmolLM2-135M", "Qwen3-0.6B"])
def test_ctranslate2_writes_what_the_llm_does(name, tmp_path):
    """Exactly as many tokens, and to begin with the LLM's own, or one that rounding its matrices makes as good."""
    pytest.importorskip("ctranslate2")
    from speed_pairs import save_model
    from speed_rivals import CTranslate2, CTranslate2Process, convert_to_ctranslate2
    from transformers.utils import logging

    torch.manual_seed(0)
    verbosity = logging.get_verbosity()
    assert save_model(name, tmp_path / "llm", None, torch.float32, tiny=True) == "random weights"
    convert_to_ctranslate2(tmp_path / "llm", tmp_path / "converted")
    logging.set_verbosity(verbosity)
    auto = AutoModelForSeq2SeqLM if name.startswith("t5") else AutoModelForCausalLM
    llm, ids = auto.from_pretrained(tmp_path / "llm").eval(), torch.randint(3, 500, (2, 12))
    prompt = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    for conditions in (Conditions(12, 7, batch_size=2), Conditions(12, 7, batch_size=2, num_beams=2)):
        contestant = CTranslate2(tmp_path / "converted").contestant(prompt, conditions, 1.0)
        written = contestant.write(7)
        assert written.shape == (2, 7) and contestant.write(1).shape == (2, 1) and contestant.step_bytes == 1.0
        if conditions.num_beams == 1:
            start = {"decoder_input_ids": torch.zeros_like(ids[:, :1])} if llm.config.is_encoder_decoder else {}
            logits = llm(**prompt, **start).logits[:, -1]
            assert torch.equal(logits.argmax(dim=1), llm_contestant(llm, prompt, conditions).write(7)[:, 0])
            behind = logits.max(dim=1).values - logits.gather(1, written[:, :1])[:, 0]
            assert (behind < 0.1 * logits.std(dim=1)).all()
            beside = CTranslate2Process(tmp_path / "converted").contestant(prompt, conditions, 1.0)
            assert torch.equal(beside.write(7), written) and beside.step_bytes == 1.0


# What is said --------------------------------------------------------------------------------------------------------
def measured(new_tokens=128, **totals):
    """A cell whose contestants took so long in all, in three rounds."""
    from speed_report import CT2, HYBRID_BF16

    names = {"llm": "LLM", "slm": "SLM alone", "hybrid": "hybrid", "int8": "hybrid, onnx int8", "ct2": CT2}
    names |= {"assisted": "assisted, 70% accepted", "halved": HYBRID_BF16}
    seconds = {names[key]: {"first token": [0.1] * 3, "total": [total] * 3} for key, total in totals.items()}
    for name in seconds:
        if name.startswith("hybrid"):
            seconds[name] = {"encode": [0.05, 0.06, 0.07]} | seconds[name]
    from transformers_llm2slm.contestants import figures_of

    conditions = Conditions(new_tokens=new_tokens)
    figures = figures_of(seconds, conditions)
    return {"seconds": seconds, "figures": figures, "conditions": vars(conditions)}


def pair_results(*cells):
    start = {name: {"peak memory, bytes": 1e9, "on disk, bytes": 1e8} for name in ("LLM", "hybrid")}
    return {"cells": {str(index): cell for index, cell in enumerate(cells)}, "steps": {}, "start-up": start}


def test_targets():
    from speed_pairs import T5_PAIR
    from speed_report import checks

    cell = measured(llm=12.0, slm=1.94, hybrid=2.0, int8=1.2, ct2=2.4, assisted=6.0)
    results = {"pairs": {T5_PAIR: pair_results(cell), "b": pair_results(measured(llm=8.0, slm=1.0, halved=2.0))}}
    bare = {"eager": 5.0, "onnx float32": 1.7, "openvino float32": 1.5, "onnx int8": 1.65, "openvino int8": 2.5}
    table = {name: {"bare, times the limit": value} for name, value in bare.items()}
    results["pairs"][T5_PAIR]["steps"] = {"table": table}
    found = checks(results, [T5_PAIR, "b", "c"])
    values = [(row["pair"], row["value"] and round(row["value"], 3), row["holds"]) for row in found]
    assert values == [
        (T5_PAIR, 1.0, True),
        (T5_PAIR, 6.0, True),
        (T5_PAIR, 3.0, True),
        (T5_PAIR, 10.0, True),
        (T5_PAIR, 2.0, False),
        (T5_PAIR, 1.5, True),
        (T5_PAIR, 1.65, False),
        ("b", round(2.0 / 1.06, 3), False),
        ("c", None, False),
    ]
    assert "(hybrid, onnx int8)" in found[3]["check"] and found[4]["target"] == "at least 2.5"
    assert "(openvino float32)" in found[5]["check"] and found[5]["target"] == "at most 1.6"


def test_pictures(tmp_path):
    from matplotlib.image import imread
    from speed_plots import draw_all

    cells = [measured(count, llm=count / 10, hybrid=count / 50) for count in (128, 16, 64)]
    results = {"pairs": {"a": pair_results(*cells), "b": pair_results(cells[0])}}
    files = draw_all(results, tmp_path / "speed.json")
    assert [file.name for file in files] == ["speed_length.png", "speed_memory.png", "speed_parts.png"]
    shapes = [imread(file).shape for file in files]
    assert shapes[0][1] < shapes[1][1]  # one panel, since the other pair was measured at one length; two
    assert all(float(imread(file)[..., :3].std()) > 0.03 for file in files)
    assert draw_all({"pairs": {}}, tmp_path / "none.json") == []


def test_results_are_kept_and_found_again(tmp_path):
    from speed import Results

    results = Results(tmp_path / "sub" / "speed.json")
    results.pair("a")["cells"]["base"] = {"rounds": 3}
    results.save()
    again = Results(tmp_path / "sub" / "speed.json")
    assert again.pair("a")["cells"] == {"base": {"rounds": 3}}
    assert json.loads((tmp_path / "sub" / "speed.json").read_text())["pairs"]["a"]["steps"] == {}
    assert Results(tmp_path / "sub" / "speed.json", fresh=True).content == {"pairs": {}}


def test_measured_pairs_are_left_alone(tmp_path, monkeypatch, capsys):
    """Nothing is made again for a pair of which everything is there."""
    import speed
    from speed_pairs import PAIRS, cells

    pair = next(iter(PAIRS.values()))
    results = speed.Results(tmp_path / "speed.json")
    stored = results.pair(pair.name)
    stored["cells"] = {str(cell): {} for cell in cells(pair.sweeps, tiny=True)}
    stored |= {"steps": {"a": 1}, "start-up": {"a": 1}}
    results.save()
    monkeypatch.setattr(speed, "child", lambda *_, **__: pytest.fail("something was run"))
    speed.run_pair(pair, argparse.Namespace(output=tmp_path / "speed.json", tiny=True), tmp_path)
    assert capsys.readouterr().out == "  measured already\n"


def test_cells_differ_in_one_thing():
    from speed_pairs import cells

    base, *others = cells(sweeps=True, tiny=False)
    changes = [dict(vars(cell).items() - vars(base).items()) for cell in others]
    assert [list(change) for change in changes] == [["prompt_length"]] * 2 + [["new_tokens"]] * 3 + [
        ["batch_size"]
    ] * 2 + [["num_beams"]]
    assert {value for change in changes for value in change.values()} == {32, 512, 16, 64, 256, 8, 4}
    assert cells(sweeps=False, tiny=False) == [base]
