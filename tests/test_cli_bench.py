"""`llm2slm bench`: what it measures, tells and writes. The times themselves are nobody's business here."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import PROMPTS, SMALL, SMALL_CAUSAL
from matplotlib.image import imread
from transformers.utils import logging

from transformers_llm2slm import LLM2SLMForConditionalGeneration, LLM2SLMProcessor
from transformers_llm2slm.cli import main

SHORT = ("--prompt-length", 12, "--new-tokens", 5, "--rounds", 2)


@pytest.fixture(autouse=True)
def own_settings(monkeypatch):
    """What the command line sets for its process is set back."""
    monkeypatch.setenv("COLUMNS", "80")
    verbosity, threads = logging.get_verbosity(), torch.get_num_threads()
    yield
    logging.set_verbosity(verbosity)
    logging.enable_progress_bar()
    torch.set_num_threads(threads)


def compose(zoo, pair, folder):
    sources = zoo.sources(pair)
    torch.manual_seed(0)
    LLM2SLMForConditionalGeneration.from_llm_slm_pretrained(*sources).save_pretrained(folder)
    LLM2SLMProcessor.from_llm_slm_pretrained(*sources).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def checkpoint(zoo, tmp_path_factory):
    return compose(zoo, SMALL_CAUSAL, tmp_path_factory.mktemp("bench") / "model")


@pytest.fixture
def run(capsys):
    """Runs the command; gives its exit code, and what it wrote to stdout and stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main(["bench", *map(str, arguments)])
        out, err = capsys.readouterr()
        return ended.value.code, out, err

    return run


def test_a_checkpoint_beside_its_llm(run, checkpoint, tmp_path):
    output, plot = tmp_path / "new" / "bench.json", tmp_path / "bench.png"
    code, out, _ = run(checkpoint, *SHORT, "--threads", 1, "--output", output, "--plot", plot, "--device", "cpu")
    assert code == 0
    results = json.loads(output.read_text())
    assert results["settings"] == {
        "prompt tokens": 12,
        "new tokens": 5,
        "batch size": 1,
        "beams": 1,
        "prompts": "random tokens",
        "LLM in": "float32",
        "SLM in": "float32",
        "threads": 1,
        "rounds": 2,
    }
    names = ["LLM", "SLM alone", "hybrid", "prompt lookup", "lossless"]
    assert list(results["figures"]) == names
    for name in names:
        assert [line for line in out.splitlines() if line.strip().startswith(name)], name
        figures = results["figures"][name]
        assert figures["total, s"]["min"] <= figures["total, s"]["median"] <= figures["total, s"]["max"]
        assert figures["tokens/s"]["max"] == pytest.approx(5 / figures["total, s"]["min"])
    assert "encode, s" in results["figures"]["hybrid"] and "encode, s" not in results["figures"]["LLM"]
    assert set(results["accepted"]) == {"prompt lookup", "lossless"}
    bandwidth = results["memory bandwidth, bytes/s"]
    assert set(results["limit of a step, s"]) == {"LLM", "SLM alone", "hybrid"}
    assert results["limit of a step, s"]["LLM"] * bandwidth > 4 * 320 * 48  # the LM head alone, in bytes
    assert (
        results["command"].startswith("llm2slm bench model --prompt-length 12")
        and "bench.json" not in results["command"]
    )
    assert imread(plot).shape[1] == 960


def test_batches_have_no_drafts_and_no_limit(run, checkpoint, tmp_path):
    output = tmp_path / "bench.json"
    code, out, _ = run(checkpoint, *SHORT, "--batch-size", 2, "--num-beams", 2, "--output", output)
    results = json.loads(output.read_text())
    assert code == 0 and list(results["figures"]) == ["LLM", "SLM alone", "hybrid"]
    assert results["accepted"] == results["limit of a step, s"] == {}
    figures = results["figures"]["hybrid"]
    assert figures["tokens/s"]["max"] == pytest.approx(2 * 5 / figures["total, s"]["min"])


def test_prompts_of_a_file(run, checkpoint, tmp_path):
    file, output = tmp_path / "rows.jsonl", tmp_path / "bench.json"
    file.write_text("".join(json.dumps({"text": prompt}) + "\n" for prompt in PROMPTS))
    options = (*SHORT, "--file", file, "--prompt-column", "text", "--output", output)
    assert run(checkpoint, *options)[0] == 0
    assert json.loads(output.read_text())["settings"]["prompts"] == "rows.jsonl"
    code, out, err = run(checkpoint, *options, "--batch-size", 30)
    assert (code, out) == (2, "") and "but the batch takes 30. Give more texts" in err


def test_what_is_refused(run, checkpoint):
    code, _, err = run(checkpoint, *SHORT, "--export-dir", checkpoint)
    assert code == 2 and "is no export" in err
    code, _, err = run(checkpoint, "--new-tokens", 1)
    assert code == 2 and "'--new-tokens': Input should be greater than or equal to 2" in err


@pytest.mark.filterwarnings("ignore:`isinstance:FutureWarning")
def test_exports(run, zoo, tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    folder, output = zoo.export(SMALL).folder, tmp_path / "bench.json"
    checkpoint = compose(zoo, SMALL, tmp_path / "model")
    assert run(checkpoint, *SHORT, "--export-dir", folder, "--output", output)[0] == 0
    results = json.loads(output.read_text())
    assert list(results["figures"])[-1] == "hybrid, onnx float32"
    assert results["limit of a step, s"]["hybrid, onnx float32"] == results["limit of a step, s"]["hybrid"]
    code, _, err = run(checkpoint, *SHORT, "--export-dir", folder, "--export-dir", folder)
    assert code == 2 and "Two exports are alike, 'hybrid, onnx float32'" in err
