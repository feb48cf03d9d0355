"""Records of measurements: kept with the weights that they are of; and speed, which is one of them."""

from __future__ import annotations

import json
import types

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModel

from transformers_llm2slm import speed
from transformers_llm2slm.measurements import read_records, shareable_command, trainer_records, versions, write_record
from transformers_llm2slm.speed import measure_speed, speed_beside_llm


def weights(folder, value):
    save_file({"model.slm.w": torch.full((3,), value)}, folder / "model.safetensors")


def test_a_record_replaces_one_of_the_same_thing(tmp_path):
    weights(tmp_path, 1.0)
    for kind, key, subject in (("quality", "data", {"name": "a"}), ("speed", "settings", {"new tokens": 4})):
        for figure, about in ((1.5, subject), (2.5, subject), (3.5, {})):
            write_record(tmp_path, {"kind": kind, "metrics": {}, "figures": {}, key: about, "figure": figure})
    write_record(tmp_path, {"kind": "training", "data": {"name": "a"}, "settings": {"steps": 1}})
    write_record(tmp_path, {"kind": "training", "data": {}, "settings": {"steps": 2}})
    records = read_records(tmp_path)
    assert [record.get("figure") for record in records] == [2.5, 3.5, 2.5, 3.5, None]
    assert records[-1]["settings"] == {"steps": 2}


def test_records_of_other_weights_are_not_read(tmp_path):
    weights(tmp_path, 1.0)
    write_record(tmp_path, {"kind": "quality", "data": {"name": "a"}, "metrics": {}})
    weights(tmp_path, 2.0)
    assert read_records(tmp_path) == []
    write_record(tmp_path, {"kind": "quality", "data": {"name": "b"}, "metrics": {}})
    weights(tmp_path, 1.0)
    assert read_records(tmp_path) == []


def test_what_is_no_record_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"holds no \*.safetensors files"):
        write_record(tmp_path, {"kind": "quality"})
    weights(tmp_path, 1.0)
    for text, error in (
        ("{", "is no JSON: .* measure again"),
        ('[{"kind": 1}]', "holds no list of records"),
        ('[{"kind": "speed", "weights": "a", "settings": {}}]', "holds no list of records"),
    ):
        (tmp_path / "measurements.json").write_text(text)
        with pytest.raises(ValueError, match=error):
            read_records(tmp_path)


def test_what_the_trainer_leaves_behind(tmp_path):
    assert trainer_records(tmp_path) == []
    (tmp_path / "trainer_state.json").write_text(json.dumps({"global_step": 7, "epoch": 1.5, "log_history": []}))
    results = {"train_loss": 3.5, "train_runtime": 9.0, "eval_loss": 2.5, "eval_rougeL": 30.5, "eval_samples": 12}
    (tmp_path / "all_results.json").write_text(
        json.dumps(results | {"eval_runtime": 1.0, "eval_steps_per_second": 8.0})
    )
    training, quality = trainer_records(tmp_path)
    assert training["settings"] == {"steps": 7, "epochs": 1.5, "training loss": 3.5}
    assert (quality["data"], quality["metrics"]) == (
        {"split": "validation", "rows": 12},
        {"loss": 2.5, "rougeL": 30.5},
    )


def test_commands_and_records_hold_no_path_and_no_token(tmp_path):
    words = [
        "/usr/bin/run.py",
        "--out",
        str(tmp_path / "out"),
        "--hub_token",
        "hf_a",
        "--token=hf_b",
        "--data=/a/b.json",
    ]
    words += ["hub_token=hf_c", "--max-new-tokens", "4", "--prefix", "two words"]
    command = shareable_command(words)
    assert command == "run.py --out out --data=b.json --max-new-tokens 4 --prefix 'two words'"
    weights(tmp_path, 1.0)
    write_record(
        tmp_path, {"kind": "quality", "data": {"name": str(tmp_path / "rows.jsonl")}, "metrics": {}, "note": "/a/b"}
    )
    (record,) = read_records(tmp_path)
    assert (record["data"], record["note"]) == ({"name": "rows.jsonl"}, "b")


def test_versions_are_of_what_is_installed():
    assert versions("no-such-library").keys() == {"python", "transformers-llm2slm", "transformers", "torch"}
    assert versions()["torch"] == torch.__version__


def test_speed_is_the_median_of_rounds_in_turn(monkeypatch):
    """On a clock of its own: a round of the LLM takes so many seconds a token, the first of them to warm up."""
    calls, now = [], 0.0
    monkeypatch.setattr(speed, "time", types.SimpleNamespace(perf_counter=lambda: now))

    def writer(name, *rounds):
        def write(count):
            nonlocal now
            calls.append((name, count))
            now += rounds[sum(call[0] == name for call in calls[:-1]) // 2] * count

        return write

    writers = {"LLM": writer("LLM", 50.0, 4.0, 9.0, 2.0), "this model": writer("it", 50.0, 1.0, 1.0, 1.0)}
    figures = measure_speed(writers, 5, rounds=3)
    assert calls == [("LLM", 1), ("LLM", 5), ("it", 1), ("it", 5)] * 4
    assert figures["LLM"] == {
        "first token, ms": 4000,
        "further token, ms": 4000,
        "total, s": 20,
        "fastest, s": 10,
        "slowest, s": 45,
        "tokens/s": 0.25,
        "times the LLM": 1,
    }
    assert (figures["this model"]["total, s"], figures["this model"]["times the LLM"]) == (5, 4)
    with pytest.raises(ValueError, match="at least 2 new tokens and 1 round, got 1 and 3"):
        measure_speed({}, 1, 3)


def test_the_whole_llm_writes_beside_the_model(small_causal, tmp_path):
    model, processor = small_causal
    with pytest.raises(ValueError, match='load the model with `load_llm="whole"`'):
        speed_beside_llm(model, processor, "Hello there!", new_tokens=3, rounds=1)
    model.save_pretrained(tmp_path)
    model = AutoModel.from_pretrained(tmp_path, load_llm="whole")
    record = speed_beside_llm(model, processor, "Hello there!", new_tokens=3, rounds=1)
    assert list(record["figures"]) == ["LLM", "this model"]
    prompt_tokens = len(processor(text="Hello there!")["input_ids"])
    assert (record["settings"]["prompt tokens"], record["settings"]["new tokens"]) == (prompt_tokens, 3)
