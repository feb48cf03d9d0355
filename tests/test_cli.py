"""The command line as a user meets it: what it writes, what it says, and how it ends. No network."""

from __future__ import annotations

import gzip
import importlib.util
import io
import json
import pathlib
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import PROMPTS, RESPONSES, Pair
from safetensors.torch import load_file, save_file
from transformers import TextStreamer

from transformers_llm2slm import LLM2SLMDataCollator, LLM2SLMForConditionalGeneration, LLM2SLMProcessor, __version__
from transformers_llm2slm.cli import main
from transformers_llm2slm.cli.info import format_bytes
from transformers_llm2slm.evaluation import generate_texts, text_scores
from transformers_llm2slm.rows import load_rows

ROWS = [{"prompt": f"{prompt} {i}", "completion": RESPONSES[i % 3]} for i, prompt in enumerate(PROMPTS * 4)]


@pytest.fixture(autouse=True)
def own_settings(tmp_path_factory, monkeypatch):
    """Data sets are cached in a temporary folder; what the command line sets for its process is set back."""
    import datasets
    from transformers.utils import logging

    cache = tmp_path_factory.mktemp("datasets")
    for name in ("HF_DATASETS_CACHE", "DOWNLOADED_DATASETS_PATH", "EXTRACTED_DATASETS_PATH"):
        monkeypatch.setattr(datasets.config, name, cache / name)
    monkeypatch.setenv("COLUMNS", "80")
    verbosity = logging.get_verbosity()
    yield
    logging.set_verbosity(verbosity)
    logging.enable_progress_bar()
    datasets.enable_progress_bars()


@pytest.fixture
def run(capsys):
    """Runs a command; gives its exit code, and what it wrote to stdout and stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return ended.value.code, out, err

    return run


@pytest.fixture
def error(run):
    """Runs a command that must fail; gives its text, which must be one line on stderr and nothing on stdout."""

    def error(*arguments: object) -> str:
        code, out, err = run(*arguments)
        assert (code, out) == (2, "")
        assert err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n")
        return err.removeprefix("error: ").rstrip("\n")

    return error


@pytest.fixture(scope="session")
def sources(zoo):
    """Folders of an LLM and an SLM, with two tokenizers."""
    return zoo.sources(Pair("llama", "llama", "align"))


@pytest.fixture(scope="session")
def checkpoint(sources, tmp_path_factory):
    """A composed checkpoint with a decoder-only SLM; read only."""
    folder = tmp_path_factory.mktemp("cli") / "model"
    torch.manual_seed(0)
    model = LLM2SLMForConditionalGeneration.from_llm_slm_pretrained(*sources)
    model.save_pretrained(folder)
    LLM2SLMProcessor.from_llm_slm_pretrained(*sources).save_pretrained(folder)
    return folder


@pytest.fixture
def rows_file(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    return file


def loaded(folder):
    return LLM2SLMForConditionalGeneration.from_pretrained(folder), LLM2SLMProcessor.from_pretrained(folder)


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


# Rows ----------------------------------------------------------------------------------------------------------------
def write_rows(file, rows=ROWS):
    import datasets

    lines = "".join(json.dumps(row) + "\n" for row in rows)
    if file.suffix == ".gz":
        file.write_bytes(gzip.compress(lines.encode()))
    elif file.suffix == ".csv":
        datasets.Dataset.from_list(rows).to_csv(file, index=False)
    elif file.suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(file)
    else:
        file.write_text(lines if file.suffix == ".jsonl" else json.dumps(rows), encoding="utf-8")
    return file


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.jsonl.gz", "rows.csv", "rows.parquet"])
def test_rows_of_every_kind_of_file(tmp_path, name):
    rows = [*ROWS[:2], {"prompt": "NA", "completion": "None"}]  # words, not missing values
    assert load_rows(write_rows(tmp_path / name, rows)).to_list() == rows


def test_rows_with_a_context(tmp_path):
    """It follows the prompt, in rows where it has text, as in Alpaca."""
    rows = [{"instruction": "Add.", "input": text, "output": "3"} for text in ("1 + 2", "", " ")]
    columns = {"prompt_column": "instruction", "completion_column": "output", "context_column": "input"}
    prompts = load_rows(write_rows(tmp_path / "rows.jsonl", rows), **columns)["prompt"][:]
    assert prompts == ["Add.\n\n1 + 2", "Add.", "Add."]
    with pytest.raises(
        ValueError, match="no column 'inputs'; its columns are instruction, input, output: .* `context_column`"
    ):
        load_rows(tmp_path / "rows.jsonl", **columns | {"context_column": "inputs"})


def test_rows_by_column(tmp_path):
    nested = [{"id": i, "translation": {"en": row["prompt"], "de": row["completion"]}} for i, row in enumerate(ROWS)]
    file = write_rows(tmp_path / "nested.jsonl", nested)
    columns = {"prompt_column": "translation.en", "completion_column": "translation.de"}
    assert load_rows(file, **columns).to_list() == ROWS
    assert load_rows(file, **columns | {"completion_column": None}, max_rows=2).to_list() == [
        {"prompt": row["prompt"]} for row in ROWS[:2]
    ]


def test_rows_of_a_data_set(tmp_path):
    write_rows(tmp_path / "train.jsonl")
    assert load_rows(dataset=str(tmp_path), split="train[2:5]").to_list() == ROWS[2:5]


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("rows.jsonl", '{"text": "a", "completion": "b"}', "has no column 'prompt'; its columns are text, completion"),
        ("rows.jsonl", '{"prompt": "a", "completion": 3}', "column 'completion' of .* must be text, found int64"),
        ("rows.jsonl", '{"prompt": "a", "completion": ["b"]}', "column 'completion' of .* must be text"),
        ("rows.jsonl", '{"prompt": "a", "completion": "b"}\n{"prompt": " ", "completion": "c"}', "Row 1 .*no prompt"),
        ("rows.jsonl", '{"prompt": "a", "completion": "b"}\n{"prompt": "c"}', "Row 1 .*no completion"),
        ("rows.jsonl", '{"prompt": "a"', "can't be read as json: "),
        ("rows.csv", "prompt,completion\n", "can't be read as csv: .*no data"),
        ("rows.json", "[]", "can't be read as json|holds no rows"),
        ("rows.xlsx", "PK", "its name must end in one of .jsonl, .json,"),
    ],
)
def test_rows_that_can_not_be_taken(tmp_path, name, content, text):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=text):
        load_rows(tmp_path / name)


CHAT = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]


@pytest.mark.parametrize("name", ["rows.jsonl.gz", "rows.parquet"])
def test_rows_of_conversations(tmp_path, name):
    """A column of conversations, or prompts and completions that are lists of messages."""
    rows = [{"talk": CHAT, "asked": CHAT[:1], "answered": CHAT[1:]}] * 2
    file = write_rows(tmp_path / name, rows)
    assert load_rows(file, messages_column="talk").to_list() == [{"messages": CHAT}] * 2
    columns = {"prompt_column": "asked", "completion_column": "answered"}
    expected = [{"prompt": CHAT[:1], "completion": CHAT[1:]}] * 2
    assert load_rows(file, **columns, conversational=True).to_list() == expected
    with pytest.raises(ValueError, match="column 'asked' of .* must be text, found list"):
        load_rows(file, **columns)


@pytest.mark.parametrize(
    ("messages", "text"),
    [
        ("Hello", "column 'messages' of .* must be a list of messages, found string"),
        (CHAT[:1], "Row 0 .*has no response to learn: .*found the roles user"),
        (CHAT[1:], "Row 0 .*has no response to learn: .*found the roles assistant"),
        ([{"role": "user"}, CHAT[1]], "Row 0 .*has no messages with text: leave such rows out"),
    ],
)
def test_conversations_that_can_not_be_taken(tmp_path, messages, text):
    file = write_rows(tmp_path / "rows.jsonl", [{"messages": messages}])
    with pytest.raises(ValueError, match=text):
        load_rows(file, messages_column="messages")


def test_rows_from_nowhere(tmp_path, rows_file):
    with pytest.raises(FileNotFoundError, match="There is no file"):
        load_rows(tmp_path / "none.jsonl")
    for arguments in ({}, {"file": rows_file, "dataset": "squad"}):
        with pytest.raises(ValueError, match="give one of the two"):
            load_rows(**arguments)


# train ---------------------------------------------------------------------------------------------------------------
OPTIONS = ["--max-steps", 4, "--save-steps", 2, "--per-device-train-batch-size", 2, "--learning-rate", 1e-2]
OPTIONS += ["--logging-steps", 1, "--set", "use_cpu=true"]


def weights(folder):
    return load_file(folder / "model.safetensors")


def test_train(run, checkpoint, rows_file, tmp_path):
    out = tmp_path / "out"
    options = [*OPTIONS, "--validation-file", rows_file, "--eval-steps", 2, "--set", "warmup_steps=1"]
    options += ["--bf16", "--gradient-accumulation-steps", 2, "--gradient-checkpointing"]
    options += ["--max-prompt-length", 9, "--max-response-length", 4, "--set", "per_device_eval_batch_size=12"]
    code, text, _ = run("train", checkpoint, "--train-file", rows_file, "--output-dir", out, *options)
    assert code == 0
    results = {name: json.loads((out / f"{name}_results.json").read_text()) for name in ("train", "eval")}
    state = json.loads((out / "trainer_state.json").read_text())
    evaluated = {entry["step"]: entry["eval_loss"] for entry in state["log_history"] if "eval_loss" in entry}
    assert state["global_step"] == 4 and sorted(evaluated) == [2, 4]
    assert evaluated[4] == results["eval"]["eval_loss"] < evaluated[2]
    assert text.splitlines()[-1] == (
        f"Saved in {out} after 4 steps on 12 rows, train_loss {results['train']['train_loss']:.4f}, "
        f"eval_loss {results['eval']['eval_loss']:.4f}."
    )
    before, after = weights(checkpoint), weights(out)
    assert before.keys() == after.keys()
    assert [name for name in before if torch.equal(before[name], after[name])] == []
    assert loaded(out)[0].config.llm_fingerprint == loaded(checkpoint)[0].config.llm_fingerprint
    model, processor = loaded(out)
    losses = [
        model(**LLM2SLMDataCollator(processor, *lengths)(ROWS)).loss.item() for lengths in ((9, 4), (9, 9), (20, 4))
    ]
    assert losses[0] == pytest.approx(results["eval"]["eval_loss"], rel=0.01)  # that was in bfloat16
    assert results["eval"]["eval_loss"] not in (pytest.approx(losses[1], rel=0.02), pytest.approx(losses[2], rel=0.02))
    arguments = torch.load(out / "training_args.bin", weights_only=False)
    assert (arguments.warmup_steps, arguments.gradient_accumulation_steps) == (1, 2)
    assert arguments.bf16 and arguments.gradient_checkpointing


def test_interrupted_training_goes_on(run, error, checkpoint, rows_file, tmp_path):
    """A run that was cut off after step 2 ends with the very weights of one that was not."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert run("train", checkpoint, "--train-file", rows_file, "--output-dir", whole, *OPTIONS)[0] == 0
    shutil.copytree(whole / "checkpoint-2", cut / "checkpoint-2")
    command = ["train", checkpoint, "--train-file", rows_file, "--output-dir", cut, *OPTIONS]
    assert "go on from checkpoint-2 with `--resume`" in error(*command)
    code, out, err = run(*command, "--resume")
    assert code == 0 and f"Going on from {cut / 'checkpoint-2'}." in err
    assert out.count("'loss': ") == 2  # steps 3 and 4 only
    expected = weights(whole)
    for name, tensor in weights(cut).items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0)
    # Once more, when there is nothing left to do.
    assert run(*command, "--resume")[0] == 0
    for name, tensor in weights(cut).items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0)


def test_resume_with_nothing_to_resume_starts(run, checkpoint, rows_file, tmp_path):
    options = ["--max-steps", 1, "--resume", "--set", "use_cpu=true"]
    code, _, err = run("train", checkpoint, "--train-file", rows_file, "--output-dir", tmp_path / "out", *options)
    assert code == 0 and "starting anew" in err
    assert json.loads((tmp_path / "out" / "trainer_state.json").read_text())["global_step"] == 1


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            ["--prompt-column", "text"],
            "has no column 'text'; its columns are prompt, completion: choose one with `prompt_column`.",
        ),
        (["--eval-steps", "2"], "`--eval-steps` needs rows to evaluate on: add `--validation-file`"),
        (["--set", "warmup=2"], "a field of Seq2SeqTrainingArguments, such as warmup_steps=100, got 'warmup=2'."),
        (["--set", "weight_decay=x"], "`--set weight_decay=` takes a number or true or false, got 'x'."),
        (["--set", "lr_scheduler_type=x"], "x is not a valid SchedulerType"),
    ],
)
def test_train_refuses(error, checkpoint, rows_file, tmp_path, options, text):
    assert text in error("train", checkpoint, "--train-file", rows_file, "--output-dir", tmp_path / "out", *options)
    assert not (tmp_path / "out").exists()


def test_train_does_not_write_over_its_model(error, checkpoint, rows_file):
    before = weights(checkpoint)
    assert "must be another folder" in error(
        "train", checkpoint, "--train-file", rows_file, "--output-dir", checkpoint
    )
    assert all(torch.equal(before[name], tensor) for name, tensor in weights(checkpoint).items())


# cache -------------------------------------------------------------------------------------------------------------------
def test_cache(run, error, checkpoint, rows_file, tmp_path):
    """It tells what it takes before, and what it took; training on it gives the losses of training with the LLM."""
    out, options = tmp_path / "states", ["--max-prompt-length", 9, "--states-dtype", "float32"]
    code, text, err = run("cache", checkpoint, out, "--file", rows_file, *options)
    size = sum(file.stat().st_size for file in out.iterdir())
    assert (code, text.splitlines()[-1]) == (
        0,
        f"{out} holds the states of these 12 rows: {size:,} bytes, relative error 0.",
    )
    announced = " ".join(err.split())
    assert announced.startswith("The LLM's states of ") and " tokens) take " in announced
    assert "refused" not in announced and " s to encode." in announced
    before = {file: file.stat().st_mtime_ns for file in out.iterdir()}
    results = []
    for name, more in (("cached", [*options, "--cache-llm-states", out]), ("live", options[:2])):
        assert (
            run("train", checkpoint, "--train-file", rows_file, "--output-dir", tmp_path / name, *OPTIONS, *more)[0]
            == 0
        )
        results.append(json.loads((tmp_path / name / "train_results.json").read_text())["train_loss"])
    assert results[0] == pytest.approx(results[1], abs=1e-5)
    assert {file: file.stat().st_mtime_ns for file in out.iterdir()} == before
    assert loaded(tmp_path / "cached")[0].llm is not None
    assert "made with another maximum prompt length: expected 12, found 9" in error(
        "cache", checkpoint, out, "--file", rows_file, "--max-prompt-length", 12, "--states-dtype", "float32"
    )


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
