"""The command line as a user meets it: what it writes, what it says, and how it ends. No network."""

from __future__ import annotations

import importlib.util
import io
import json
import pathlib
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import PROMPTS, ROWS, Pair, loaded, write_rows
from safetensors.torch import load_file, save_file
from transformers import TextStreamer

from transformers_llm2slm import LLM2SLMForConditionalGeneration, __version__
from transformers_llm2slm.cli import main
from transformers_llm2slm.cli.info import format_bytes
from transformers_llm2slm.evaluation import generate_texts, text_scores

pytestmark = pytest.mark.usefixtures("own_settings")


# The program ---------------------------------------------------------------------------------------------------------
def test_version_and_help(run):
    assert run("--version") == (0, f"llm2slm {__version__}\n", "")
    code, out, _ = run()
    assert code == 0 and out == run("--help")[1]
    assert [
        name
        for name in (
            "compose",
            "info",
            "generate",
            "cache",
            "train",
            "evaluate",
            "card",
            "export",
            "bench",
            "estimate",
        )
        if f"│ {name} " not in out
    ] == []
    assert max(map(len, out.splitlines())) <= 80


def test_option_names_are_whole_at_80_columns(run):
    for command in ("compose", "info", "generate", "train", "evaluate", "card", "export", "bench", "estimate"):
        code, out, _ = run(command, "--help")
        options = [line for line in out.splitlines() if line.lstrip("│* ").startswith("--")]
        assert code == 0 and len(options) >= 5
        assert not any("…" in line.split("  ")[0] for line in options)
    assert "--per-device-train-batch-size" in run("train", "--help")[1]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["compse"], "No such command 'compse'"),
        (["info"], "Missing argument 'DIR'. See `llm2slm info --help`."),
        (["generate", "a", "b", "--beams", "2"], "No such option: --beams"),
        (["generate", "a", "b", "--num-beams", "0"], "Invalid value for '--num-beams'"),
    ],
)
def test_wrong_usage(error, arguments, text):
    assert text in error(*arguments)


def test_process_of_its_own(tmp_path):
    """Exit code and streams as a shell sees them."""
    command = [sys.executable, "-m", "transformers_llm2slm.cli", "info", str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 2 and ended.stdout == ""
    assert (
        ended.stderr
        == f"error: '{tmp_path}' is no model at all; expected LLM-to-SLM, which `llm2slm compose` makes.\n"
    )


def test_debug_shows_the_traceback(error, tmp_path):
    assert "no model at all" in error("info", tmp_path)
    for arguments in (["--debug", "info", str(tmp_path)], ["info", str(tmp_path), "--debug"]):
        with pytest.raises(ValueError, match="no model at all"):
            main(arguments)


def test_interrupt(run, monkeypatch, checkpoint):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(LLM2SLMForConditionalGeneration, "from_pretrained", interrupt)
    code, out, err = run("generate", checkpoint, "Hello")
    assert (code, out, err.strip()) == (130, "", "interrupted")


@pytest.mark.parametrize(
    ("module", "extra", "command"),
    [
        ("typer", "cli", ["--version"]),
        ("rich", "cli", ["--version"]),
        ("accelerate", "train", ["train", "model", "--output-dir", "out"]),
        ("datasets", "train", ["train", "model", "--output-dir", "out"]),
        ("rouge_score", "eval", ["evaluate", "model", "--file", "rows.jsonl"]),
        ("datasets", "train", ["evaluate", "model", "--file", "rows.jsonl"]),
    ],
)
def test_missing_extra(error, monkeypatch, module, extra, command):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == module else find_spec(name))
    text = error(*command)
    assert module in text and text.endswith(f'pip install "transformers-llm2slm[{extra}]".')


# compose and info ----------------------------------------------------------------------------------------------------
def test_compose_is_what_python_composes(run, sources, tmp_path):
    options = ["--fusion", "llm-embed", "--llm-layer", "1,-1", "--projector-hidden-size", 24]
    options += ["--projector-num-layers", 3, "--projector-activation", "silu", "--projector-norm", "rms_norm"]
    options += ["--llm-dtype", "bfloat16", "--slm-dtype", "float32"]
    assert run("compose", *sources, tmp_path / "out", *options)[::2] == (0, "")
    model, processor = loaded(tmp_path / "out")
    config = model.config
    assert (config.fusion, config.llm_layer, config.projector_norm) == ("llm-embed", [1, -1], "rms_norm")
    assert [layer.out_features for layer in model.projector.layers] == [24, 24, 48]
    assert (config.projector_activation, config.projector_init) == ("silu", "random")
    assert (model.llm.dtype, model.slm.dtype) == (torch.bfloat16, torch.float32)
    assert (config.llm_name_or_path, config.slm_name_or_path) == sources
    assert processor.fusion == "llm-embed" and not processor.shared_tokenizer
    expected = LLM2SLMForConditionalGeneration.from_llm_slm_pretrained(*sources).slm.state_dict()
    for name, tensor in model.slm.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("text", "layers", "fusion", "llm_layer"),
    [
        ("2", [1, 2], None, [1, 2]),
        ("0,2", [0, 2], None, [0, 2]),
        ("2,", [2], None, [2]),
        ("2", [1, 2], "replace", 1),
        ("0,2", [0, 2], "replace", -1),
    ],
)
def test_compose_cuts_the_slm(run, sources, tmp_path, text, layers, fusion, llm_layer):
    asked = [] if fusion is None else ["--fusion", fusion]
    code, out, _ = run("compose", sources[0], tmp_path / "out", "--slm-layers", text, *asked)
    model, processor = loaded(tmp_path / "out")
    assert code == 0
    assert (model.config.slm_layers, model.config.llm_layer, model.config.fusion) == (
        layers,
        llm_layer,
        fusion or "kv",
    )
    assert model.slm.config.num_hidden_layers == len(layers)
    assert processor.shared_tokenizer
    assert f"cut from the LLM, layers {', '.join(map(str, layers))}" in out


def test_compose_fits_the_projector(run, sources, tmp_path, rows_file):
    options = ["--projector-init", "fit", "--fit-file", rows_file, "--fit-rows", 6, "--fusion", "replace"]
    assert run("compose", *sources, tmp_path / "fit", *options, "--projector-num-layers", 1)[0] == 0
    model, processor = loaded(tmp_path / "fit")
    expected = LLM2SLMForConditionalGeneration.from_llm_slm_pretrained(
        *sources,
        fusion="replace",
        projector_init="fit",
        projector_num_layers=1,
        fit_prompts=[row["prompt"] for row in ROWS[:6]],
    )
    torch.testing.assert_close(model.projector.layers[0].weight, expected.projector.layers[0].weight)


def test_compose_leaves_a_checkpoint_alone(error, run, sources, tmp_path):
    out = tmp_path / "out"
    assert run("compose", *sources, out)[0] == 0
    before = (out / "config.json").read_bytes()
    assert "holds a checkpoint already" in error("compose", *sources, out, "--fusion", "replace")
    assert (out / "config.json").read_bytes() == before
    assert run("compose", *sources, out, "--fusion", "replace", "--overwrite")[0] == 0
    assert loaded(out)[0].config.fusion == "replace"


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--fusion", "sum"], "`fusion` must be one of 'add', 'replace', 'llm-embed', 'align', 'kv', got 'sum'"),
        (["--fusion", "add"], '`fusion="add"` adds the SLM\'s embedding of the same token'),
        # Raised inside a strict dataclass, whose own words ("Class validation error for ...") are left out.
        (["--llm-layer", "9"], "`llm_layer` must lie in [-4, 3] for an LLM of 3 layers, got 9."),
        (["--llm-layer", "last"], "`--llm-layer` takes a number or a list of them, such as 4 or 0,5,11, got 'last'."),
        (["--slm-layers", "2"], "Give either an SLM, or `slm_layers`"),
        (["--slm-dtype", "int8"], "`--slm-dtype` must be one of float32, bfloat16, float16, auto, got 'int8'."),
        (["--projector-init", "fit"], "`--projector-init fit` and `--fit-file` go together."),
        (["--fit-file", "rows.jsonl"], "`--projector-init fit` and `--fit-file` go together."),
    ],
)
def test_compose_refuses(error, sources, tmp_path, options, text):
    assert error("compose", *sources, tmp_path / "out", *options).startswith(text)
    assert not (tmp_path / "out").exists()


def test_compose_names_what_is_missing(error, sources, tmp_path):
    assert error("compose", sources[0], tmp_path / "out").startswith("Name an SLM between LLM and OUT")
    assert "got 4 names" in error("compose", *sources, "third", tmp_path / "out")
    text = error("compose", sources[0], "no/such-model", tmp_path / "out", "--local-files-only")
    assert text.startswith("'no/such-model' is no folder here, and as a hub id it fails: ")


def test_info_counts_and_measures(run, checkpoint, sources):
    code, out, err = run("info", checkpoint, "--json")
    assert (code, err) == (0, "")
    info = json.loads(out)
    model, processor = loaded(checkpoint)
    for name in ("llm", "projector", "slm"):
        part, module = info["parts"][name], getattr(model, name)
        assert part["parameters"] == sum(parameter.numel() for parameter in module.parameters())
        assert part["class"] == type(module).__name__
        assert part["trainable"] == all(parameter.requires_grad for parameter in module.parameters())
        assert part["dtype"] == "float32"
        held = sum(p.numel() * 4 for p in module.parameters()) if name != "llm" else 0
        assert part["checkpoint_bytes"] == held
    assert info["total"]["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert (info["parts"]["llm"]["source"], info["parts"]["slm"]["source"]) == sources
    assert info["parts"]["llm"]["fingerprint"] == model.config.llm_fingerprint
    assert info["parts"]["llm"]["source_bytes"] == (pathlib.Path(sources[0]) / "model.safetensors").stat().st_size
    assert info["tokenizers"]["llm"]["tokens"] == len(processor.llm_tokenizer)
    assert info["projector"]["widths"] == [48, 48, 48]


@pytest.mark.parametrize(
    ("pair", "options"),
    [
        (Pair("bart", "bart", "add"), []),  # tied embeddings, and a buffer beside the parameters
        (Pair("t5", "t5", "add"), ["--slm-encoder", "skip", "--fusion", "replace"]),
        (Pair("roberta", "opt", "llm-embed"), ["--fusion", "llm-embed"]),
        (Pair("bert", "gpt2", "align"), ["--llm-layer", "0,-1"]),
    ],
    ids=str,
)
def test_info_counts_every_family(run, zoo, tmp_path, pair, options):
    assert run("compose", *zoo.sources(pair), tmp_path / "out", *options)[0] == 0
    parts = json.loads(run("info", tmp_path / "out", "--json")[1])["parts"]
    model, _ = loaded(tmp_path / "out")
    for name, part in parts.items():
        assert part["parameters"] == sum(parameter.numel() for parameter in getattr(model, name).parameters())
        assert part.get("missing_parameters", 0) == 0


def test_info_table(run, checkpoint, sources):
    code, out, err = run("info", checkpoint)
    model, _ = loaded(checkpoint)
    assert (code, err) == (0, "") and max(map(len, out.splitlines())) <= 80
    lines = {line.split()[0]: line.split() for line in out.splitlines() if line.strip()}
    count = sum(parameter.numel() for parameter in model.slm.parameters())
    assert lines["slm"][0] == "slm" and lines["fusion"][1:] == ["align"]
    part = next(line for line in out.splitlines() if "LlamaForCausalLM" in line).split()
    assert part == ["slm", "LlamaForCausalLM", f"{count:,}", "trainable", "float32", *format_bytes(4 * count).split()]
    assert lines["total"][1] == f"{sum(parameter.numel() for parameter in model.parameters()):,}"
    assert "Linear(48, 48) -> relu -> Linear(48, 48)" in out
    assert sources[0].rpartition("/")[2] in out.replace("\n", "").replace(" ", "")


def test_info_needs_no_llm(run, sources, tmp_path):
    llm = shutil.copytree(sources[0], tmp_path / "llm")
    assert run("compose", llm, sources[1], tmp_path / "out")[0] == 0
    before = json.loads(run("info", tmp_path / "out", "--json")[1])
    shutil.rmtree(llm)
    code, out, _ = run("info", tmp_path / "out", "--json")
    after = json.loads(out)
    assert code == 0 and after["parts"]["llm"].pop("source_bytes") is None
    assert before["parts"]["llm"].pop("source_bytes") > 0
    assert after == before
    assert "not on this machine" in " ".join(run("info", tmp_path / "out")[1].split())


def test_info_of_a_checkpoint_that_holds_its_llm(run, sources, tmp_path):
    assert run("compose", *sources, tmp_path / "out", "--save-llm", "--llm-dtype", "bfloat16")[0] == 0
    part = json.loads(run("info", tmp_path / "out", "--json")[1])["parts"]["llm"]
    assert (part["dtype"], part["checkpoint_bytes"]) == ("bfloat16", 2 * part["parameters"])
    assert "in the checkpoint" in " ".join(run("info", tmp_path / "out")[1].split())


def test_info_and_generate_by_hub_id(run, zoo, tmp_path):
    """A hub id is looked up in the cache that is named."""
    folder, commit = tmp_path / "out", "0" * 40
    llm, slm = zoo.sources(Pair("t5", "t5", "add"))
    assert run("compose", llm, slm, folder)[0] == 0
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"llm_name_or_path": "org/llm"}))
    for name, source in (("tiny", folder), ("llm", llm)):
        repository = tmp_path / "hub" / f"models--org--{name}"
        shutil.copytree(source, repository / "snapshots" / commit)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(commit)
    hub = ["--cache-dir", tmp_path / "hub", "--local-files-only"]
    code, out, _ = run("info", "org/tiny", "--json", *hub)
    local = json.loads(run("info", folder, "--json", *hub)[1])
    assert code == 0 and json.loads(out) == local | {"checkpoint": "org/tiny"}
    command = [PROMPTS[0], "--max-new-tokens", 5]
    assert run("generate", "org/tiny", *command, *hub) == run("generate", folder, *command, *hub)
    assert run("generate", "org/tiny", *command, *hub, "--revision", "v2")[0] == 2


def test_info_tells_how_the_llm_is_quantised(run, checkpoint, tmp_path):
    quantised = shutil.copytree(checkpoint, tmp_path / "quantised")
    config = json.loads((quantised / "config.json").read_text())
    config["llm_quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (quantised / "config.json").write_text(json.dumps(config))
    assert "quantised on loading: bitsandbytes" in " ".join(run("info", quantised)[1].split())
    assert "quantised" not in run("info", checkpoint)[1]


def test_info_tells_what_the_files_lack(run, error, checkpoint, tmp_path):
    broken = shutil.copytree(checkpoint, tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    lost = tensors.pop("model.projector.layers.1.bias")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    code, out, _ = run("info", broken)
    assert code == 0 and f"the files lack {lost.numel()} of the parameters of projector" in out
    assert "INCOMPLETE" not in run("info", checkpoint)[1]
    file = broken / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    assert error("info", broken).endswith("it is cut.")
    file.write_bytes(b"\0" * 100)
    assert "is no safetensors file, or a broken one" in error("info", broken)
    file.unlink()
    assert "holds no *.safetensors files" in error("info", broken)


def test_info_of_something_else(error, sources, tmp_path):
    assert error("info", sources[0]).startswith(f"'{sources[0]}' is a model of type 'llama'; expected LLM-to-SLM")
    assert "is no folder here" in error("info", tmp_path / "none")


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (538_060_032, "538.1 MB"), (2e13, "20.0 TB")]
)
def test_format_bytes(size, text):
    assert format_bytes(size) == text


# generate ------------------------------------------------------------------------------------------------------------
def answer(folder, prompt=PROMPTS[0], **kwargs):
    model, processor = loaded(folder)
    tokens = model.generate(**processor(text=[prompt], return_tensors="pt"), **kwargs)
    return processor.batch_decode(tokens, skip_special_tokens=True)[0] + "\n"


def test_generate_is_what_python_generates(run, checkpoint, monkeypatch):
    expected = answer(checkpoint, max_new_tokens=9)
    assert len(expected) > 5
    assert run("generate", checkpoint, PROMPTS[0], "--max-new-tokens", 9) == (0, expected, "")
    monkeypatch.setattr(sys, "stdin", io.StringIO(PROMPTS[0] + "\n"))
    assert run("generate", checkpoint, "-", "--max-new-tokens", 9) == (0, expected, "")
    beams = answer(checkpoint, max_new_tokens=9, num_beams=3)
    assert run("generate", checkpoint, PROMPTS[0], "--max-new-tokens", 9, "--num-beams", 3) == (0, beams, "")


def test_generate_streams(run, checkpoint, monkeypatch):
    """Every token is handed on as soon as it is there, after the prompt's; beams can't be."""
    handed, put = [], TextStreamer.put
    monkeypatch.setattr(TextStreamer, "put", lambda self, value: handed.append(value.numel()) or put(self, value))
    assert run("generate", checkpoint, PROMPTS[0], "--max-new-tokens", 7)[0] == 0
    assert handed == [0] + [1] * 7
    assert run("generate", checkpoint, PROMPTS[0], "--max-new-tokens", 7, "--num-beams", 2)[0] == 0
    assert len(handed) == 8


def test_generate_with_an_encoder_decoder(run, zoo, tmp_path):
    """Neither the start token nor the end token is shown."""
    assert run("compose", *zoo.sources(Pair("t5", "t5", "add")), tmp_path / "out")[0] == 0
    file = tmp_path / "out" / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"forced_eos_token_id": 2}))
    model, processor = loaded(tmp_path / "out")
    tokens = model.generate(**processor(text=[PROMPTS[0]], return_tensors="pt"), max_new_tokens=9)[0]
    assert (tokens[0], tokens[-1]) == (0, 2)
    expected = processor.tokenizer.decode(tokens[1:-1]) + "\n"
    assert run("generate", tmp_path / "out", PROMPTS[0], "--max-new-tokens", 9) == (0, expected, "")


def test_generate_samples(run, checkpoint):
    command = ["generate", checkpoint, PROMPTS[0], "--max-new-tokens", 9]
    greedy, sampled, again, other = (
        run(*command, *options)[1]
        for options in (
            [],
            ["--temperature", 5, "--seed", 1],
            ["--temperature", 5, "--seed", 1],
            ["--do-sample", "--seed", 2],
        )
    )
    assert sampled == again and len({greedy, sampled, other}) == 3
    # Nearly all of the mass is on one token: sampling within it is greedy.
    assert run(*command, "--top-p", 1e-6)[1] == greedy


def test_generate_refuses(error, checkpoint, sources):
    assert error("generate", checkpoint, "  ") == "The prompt is empty: the LLM needs text to read."
    assert error("generate", checkpoint, "word " * 300).startswith("Prompt 0 is ")
    text = error("generate", checkpoint, "Hi", "--llm-name-or-path", sources[1], "--dtype", "float32")
    assert text.startswith("The LLM is not the one this model was trained with")
    assert "got 'float8'" in error("generate", checkpoint, "Hi", "--dtype", "float8")


# evaluate ------------------------------------------------------------------------------------------------------------
def test_evaluate(run, checkpoint, rows_file, tmp_path):
    results, predictions = tmp_path / "new" / "results.json", tmp_path / "predictions.jsonl"
    options = ["--max-rows", 5, "--batch-size", 2, "--max-new-tokens", 6, "--max-prompt-length", 12, "--no-record"]
    code, out, err = run(
        "evaluate", checkpoint, "--file", rows_file, *options, "--output", results, "--predictions", predictions
    )
    assert (code, err) == (0, "")
    lines = [json.loads(line) for line in predictions.read_text(encoding="utf-8").splitlines()]
    assert [{"prompt": line["prompt"], "completion": line["completion"]} for line in lines] == ROWS[:5]
    generated = generate_texts(
        *loaded(checkpoint),
        [row["prompt"] for row in ROWS[:5]],
        2,
        max_prompt_length=12,
        max_new_tokens=6,
        do_sample=False,
    )
    assert [line["prediction"] for line in lines] == generated.texts
    found = json.loads(results.read_text())
    scores = text_scores(generated.texts, [row["completion"] for row in ROWS[:5]])
    assert {name: found[name] for name in scores} == pytest.approx(scores)
    assert (found["rows"], found["new_tokens"]) == (5, generated.new_tokens)
    assert found["tokens_per_second"] == pytest.approx(found["new_tokens"] / found["seconds"])
    assert (found["model"], found["data"], found["max_new_tokens"]) == (str(checkpoint), str(rows_file), 6)
    assert not (checkpoint / "measurements.json").exists()
    shown = dict(line.split() for line in out.splitlines() if len(line.split()) == 2)
    assert shown["chrf"] == f"{scores['chrf']:.2f}" and shown["rows"] == "5"


def test_evaluate_against_its_own_answers(run, checkpoint, tmp_path):
    """Of three rows one has another completion; columns, beams and CSV go their way."""
    texts = generate_texts(*loaded(checkpoint), PROMPTS, max_new_tokens=6, num_beams=3, do_sample=False).texts
    rows = [{"question": prompt, "answer": text} for prompt, text in zip(PROMPTS, texts, strict=True)]
    rows[1]["answer"] = "something else"
    command = ["evaluate", checkpoint, "--file", write_rows(tmp_path / "rows.csv", rows), "--max-new-tokens", 6]
    command += ["--prompt-column", "question", "--completion-column", "answer", "--num-beams", 3, "--no-record"]
    assert run(*command, "--output", tmp_path / "results.json")[0] == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["exact_match"] == pytest.approx(200 / 3) and results["num_beams"] == 3


def test_evaluate_refuses(error, checkpoint, rows_file, tmp_path, monkeypatch):
    text = error("evaluate", checkpoint, "--file", rows_file, "--completion-column", "summary")
    assert (
        text
        == f"{rows_file} has no column 'summary'; its columns are prompt, completion: choose one with `completion_column`."
    )
    # A place that can't be written to is found before the model is loaded, not after the work.
    monkeypatch.setattr(LLM2SLMForConditionalGeneration, "from_pretrained", None)
    assert "Is a directory" in error("evaluate", checkpoint, "--file", rows_file, "--output", tmp_path)
