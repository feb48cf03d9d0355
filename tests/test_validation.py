"""Checkpoints of strangers: what is refused, with which text, and that it is before anything is built or downloaded."""

from __future__ import annotations

import copy
import json
import re
import shutil
import subprocess
import sys
import textwrap

import pytest
import torch
from conftest import FAMILIES, Pair
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModel, AutoProcessor
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import transformers_llm2slm
from transformers_llm2slm import LLM2SLMConfig, LLM2SLMForConditionalGeneration
from transformers_llm2slm.validation import FORMAT_VERSION, check_config, check_inside, check_llm_source, check_values

ERRORS = (ValueError, OSError, StrictDataclassError)
load = LLM2SLMForConditionalGeneration.from_pretrained


@pytest.fixture(scope="module")
def sound(zoo, tmp_path_factory):
    """A checkpoint of two decoder-only models; tests work on copies."""
    folder = tmp_path_factory.mktemp("sound")
    model, processor = zoo.compose(Pair("llama", "t5", "replace"))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def checkpoint(sound, tmp_path):
    return shutil.copytree(sound, tmp_path / "checkpoint")


@pytest.fixture
def untouched(monkeypatch):
    """Nothing may be built, and no file of weights be looked for."""

    def refuse(*args, **kwargs):
        raise AssertionError("went on to build or to load")

    monkeypatch.setattr(LLM2SLMForConditionalGeneration, "__init__", refuse)
    monkeypatch.setattr("transformers.modeling_utils._get_resolved_checkpoint_files", refuse)
    monkeypatch.setattr("transformers_llm2slm.checkpoint.load_llm", refuse)
    monkeypatch.setattr("builtins.input", refuse)


def edit(folder, change, name="config.json"):
    content = json.loads((folder / name).read_text())
    change(content)
    (folder / name).write_text(json.dumps(content))


def setter(path, value):
    """A change of one value: `slm_config.d_model`."""

    def change(content):
        *parents, field = path.split(".")
        for parent in parents:
            content = content[parent]
        content[field] = value

    return change


# Values --------------------------------------------------------------------------------------------------------------
REFUSED = [
    # sizes
    (
        "slm_config.num_layers",
        10_000,
        r"`slm_config.num_layers` must lie in [0, 1,000] (the deepest LLMs have some 130",
    ),
    (
        "slm_config.d_model",
        -32,
        "`slm_config.d_model` must lie in [0, 1,048,576] (the widest LLMs have 53,248), got -32",
    ),
    ("llm_config.hidden_size", 2**21, "`llm_config.hidden_size` must lie in [0, 1,048,576]"),
    ("llm_config.vocab_size", 10**12, "`llm_config.vocab_size` must lie in [0, 67,108,864]"),
    ("slm_config.num_heads", 10**6, "`slm_config.num_heads` must lie in [0, 4,096] (the widest LLMs have 128 heads)"),
    ("projector_hidden_size", 2**40, "`projector_hidden_size` must lie in [0, 1,048,576]"),
    ("projector_num_layers", 10**6, "`projector_num_layers` must lie in [0, 1,000]"),
    ("slm_config.num_labels", 10**9, "`slm_config.num_labels` must lie in [0, 1,048,576]"),
    ("llm_config.num_experts", 2**16, "`llm_config.num_experts` must lie in [0, 32,768]"),
    ("llm_layer", [0] * 5000, "`llm_layer` must list at most 1,000 layers, got 5,000"),
    ("slm_config.anything", 10**400, "`slm_config.anything` must lie within +-2**53, got a number of 1329 bits"),
    (
        "slm_config.layers_of_layers",
        [[2**30]],
        "`slm_config.layers_of_layers[0][0]` must lie in [-16,777,216, 16,777,216]",
    ),
    # kinds
    ("slm_config.d_model", "32", "`slm_config.d_model` must be a whole number, got '32'"),
    ("slm_config.d_model", 24.5, "`slm_config` is no valid configuration of a `t5` model: "),
    ("llm_config.rms_norm_eps", float("nan"), "`llm_config.rms_norm_eps` is not a number (NaN)"),
    ("llm_config.rms_norm_eps", -1.0, "`llm_config.rms_norm_eps` must be a number in [0, 1], got -1.0"),
    ("slm_config.dropout_rate", 7, "`slm_config.dropout_rate` must be a number in [0, 1], got 7"),
    ("slm_config.pad_token_id", "x", "`slm_config.pad_token_id` must be the id of a token, a whole number, got 'x'"),
    ("decoder_start_token_id", 5000, "`decoder_start_token_id` must be one of the SLM's 320 tokens, got 5000"),
    ("slm_config.use_cache", [1], "`slm_config.use_cache` must be true or false, got [1]"),
    ("llm_layer", "last", "'llm_layer' with value 'last' doesn't match any type"),
    ("projector_num_layers", None, "'projector_num_layers' expected int, got NoneType"),
    ("fusion", "mean", "`fusion` must be one of 'add', 'replace', 'llm-embed', 'align', 'kv', got 'mean'"),
    (
        "is_encoder_decoder",
        False,
        "`is_encoder_decoder` must be true (text in, text out, whatever the SLM), got False",
    ),
    ("llm_config.is_encoder_decoder", True, "`llm_config.is_encoder_decoder` is true, but a `llama` model is none"),
    ("dtype", "load", "`dtype` must be the name of a torch dtype such as 'float32', got 'load'"),
    ("torch_dtype", "int8", "`torch_dtype` must be the name of a torch dtype such as 'float32', got 'int8'"),
    ("slm_config.dtype", "nn", "`slm_config.dtype` must be the name of a torch dtype"),
    ("llm_dtype", "half of it", "`llm_dtype` must be the name of a torch dtype"),
    (
        "llm_quantization_config",
        {"quant_method": "magic"},
        "`llm_quantization_config.quant_method` is 'magic', expected",
    ),
    ("llm_config.quantization_config", "gptq", "`llm_config.quantization_config` must be an object, got 'gptq'"),
    (
        "quantization_config",
        {"load_in_8bit": True},
        "`quantization_config` is not read: projector and SLM are held as they",
    ),
    (
        "slm_config.quantization_config",
        {"load_in_8bit": True},
        "`slm_config.quantization_config` is not read: projector and",
    ),
    # parts
    ("slm_config", None, "`slm_config` must hold the full configuration of a model, got None"),
    ("llm_config", [], "`llm_config` must hold the full configuration of a model, got []"),
    (
        "llm_config.model_type",
        "nothing",
        "`llm_config.model_type` is 'nothing', which this version of transformers does",
    ),
    (
        "llm_config",
        {"model_type": "x", "auto_map": {}},
        "It comes with code of its own (`auto_map`), which is not run",
    ),
    ("slm_config.model_type", "llm2slm", "`slm_config` is an LLM-to-SLM model itself; these can't be nested"),
    ("llm_config.text_config", {"hidden_size": 1}, "`llm_config.text_config` is no part of a LlamaConfig"),
    # what every key becomes an attribute of
    ("get_text_config", 1, "`get_text_config` is no field: it would hide an attribute of LLM2SLMConfig"),
    ("vocab_size", 320, "`vocab_size` is no field"),
    ("__class__", "x", "`__class__` is no field"),
    ("attribute_map", {"fusion": "slm_encoder"}, "`attribute_map` is no field"),
    ("slm_config.to_dict", 1, "`slm_config.to_dict` is no field: it would hide an attribute of T5Config"),
    # code and files
    (
        "attn_implementation",
        "kernels-community/flash-attn",
        "`attn_implementation` is 'kernels-community/flash-attn', exp",
    ),
    (
        "llm_config._attn_implementation",
        "evil/x@main",
        "a checkpoint does not choose which kernels are downloaded and run",
    ),
    ("slm_config.attn_implementation", {"": "a/b:c"}, "`slm_config.attn_implementation` is 'a/b:c', expected a name"),
    ("experts_implementation", 3, "`experts_implementation` is 3, expected a name such as 'sdpa'"),
    ("transformers_weights", "adapter_model.bin", "`transformers_weights` is not read from a checkpoint"),
    ("fusion_config", {"x": True}, "`fusion_config` is not read from a checkpoint"),
    ("llm_subfolder", "../other", "`llm_subfolder` must lie inside its repository, got '../other'"),
    ("llm_subfolder", "/etc", "`llm_subfolder` must lie inside its repository, got '/etc'"),
    ("llm_subfolder", "a\\..\\b", "`llm_subfolder` must lie inside its repository"),
    ("llm_revision", "../../../x", "`llm_revision` must be a commit, a branch or a tag, got '../../../x'"),
    ("llm_revision", 7, "`llm_revision` must be a commit, a branch or a tag, got 7"),
    (
        "llm_name_or_path",
        "https://evil.example/x",
        "must be the id of a repository such as 'org/name', not an address",
    ),
    ("llm_name_or_path", "file:/etc", "must be the id of a repository such as 'org/name', not an address"),
    ("llm_name_or_path", "", "`llm_name_or_path` must be the id of a repository or a local folder, got ''"),
    ("llm_name_or_path", "org/\0llm", "`llm_name_or_path` holds a NUL character"),
    ("llm_name_or_path", "a/b/c", "which is neither a folder nor the id of a repository: Repo id must be in the form"),
    ("llm_name_or_path", "org/llm--x", "Pass the LLM with `llm_name_or_path=` or `llm_model=`"),
    ("model_type", "t5", "`model_type` must be 'llm2slm', got 't5'"),
    ("format_version", "1", "`format_version` must be a positive integer, got '1'"),
]


def test_values_that_are_refused(checkpoint, untouched):
    original = (checkpoint / "config.json").read_text()
    for path, value, text in REFUSED:
        (checkpoint / "config.json").write_text(original)
        edit(checkpoint, setter(path, value))
        with pytest.raises(ERRORS, match=re.escape(text)):
            load(checkpoint)
        if path != "model_type":  # by which AutoModel chooses another class
            with pytest.raises(ERRORS, match=re.escape(text)):
                AutoModel.from_pretrained(checkpoint)
    (checkpoint / "config.json").write_text(original)
    with pytest.raises(ValueError, match="went on to build"):  # the spies work
        load(checkpoint)


def test_nothing_but_an_object(checkpoint, untouched):
    for content, text in (
        ("[1, 2]", "`config.json` must hold an object, got [1, 2]"),
        ("{", "is not a valid JSON file"),
        ("7", "The configuration of"),
        (
            json.dumps(LLM2SLMConfig().to_dict())[:-1] + ', "a":' + "[" * 40 + "]" * 40 + "}",
            "is nested more than 16 levels",
        ),
    ):
        (checkpoint / "config.json").write_text(content)
        with pytest.raises(ERRORS, match=re.escape(text)):
            load(checkpoint)


def test_no_family_of_transformers_is_refused():
    """The bounds are generous: every configuration that transformers makes by default is within them."""
    shared = LLM2SLMConfig().to_dict()
    for model_type in [*FAMILIES, "deepseek_v3", "gpt_oss", "llama4_text", "mixtral", "qwen3_moe", "gemma3", "doge"]:
        model_type = {"gpt-neo": "gpt_neo", "gemma3": "gemma3_text"}.get(model_type, model_type)
        part = CONFIG_MAPPING[model_type]().to_dict()
        check_config(shared | {"llm_config": part, "slm_config": part}, LLM2SLMConfig)
    with pytest.raises(
        ValueError, match=re.escape("`slm_config` must have at most 1,048,576 experts in all its layers")
    ):
        check_values({"slm_config": {"num_hidden_layers": 1000, "num_experts": 2**15}})


def test_what_is_sound_though_unusual():
    """Infinity is a bound in some configurations; quantised parts say how; plain names of attention are no repositories."""
    config = LLM2SLMConfig().to_dict()
    config["llm_config"] |= {"time_step_limit": [0.0, float("inf")], "dtype": "bfloat16"}
    config["llm_quantization_config"] = {"load_in_8bit": True}
    config |= {"attn_implementation": "sdpa", "llm_revision": "refs/pr/1", "llm_subfolder": "a/b", "unknown": [1]}
    config |= {"llm_name_or_path": "/home/someone/llm", "auto_map": {"AutoModel": "modeling_llm2slm.LLM2SLMModel"}}
    loaded = LLM2SLMConfig.from_dict(copy.deepcopy(config))
    assert (loaded.llm_config.dtype, loaded.llm_name_or_path) == (torch.bfloat16, "/home/someone/llm")


@pytest.mark.parametrize("path", ["..", "a/../b", "/a", "\\a", "C:\\a", "C:a", "a\\..\\b", "\0", None, 3])
def test_paths_that_lead_out(path):
    with pytest.raises(ValueError, match="`x` must lie inside its repository, got"):
        check_inside("`x`", path)
    check_inside("`x`", "a..b/.c/model-00001-of-00002.safetensors")


@pytest.mark.parametrize("name", ["/home/them/llm", "./llm", "../llm", "~/llm", "C:\\llm", "models\\llm", "."])
def test_folders_of_whoever_made_it(name):
    with pytest.raises(
        ValueError, match="comes from the Hub and names its LLM by .*, a folder on the machine of whoever"
    ):
        check_llm_source(name, checkpoint_is_local=False)
    check_llm_source(name, checkpoint_is_local=True)
    check_llm_source("org/llm", checkpoint_is_local=False)


# Versions ------------------------------------------------------------------------------------------------------------
def test_newer_formats(checkpoint, untouched):
    """A newer format says what to install, whatever else is wrong; the version is only told if it is one."""
    here = transformers_llm2slm.__version__
    newer = f"in format 2; this is {here}, which reads formats up to 1. Install a newer version: pip install -U "
    for writer, by, requirement in (
        ("0.4.0", "transformers-llm2slm 0.4.0", "'transformers-llm2slm>=0.4.0'"),
        ("0.4.0rc1+local", "transformers-llm2slm 0.4.0rc1", "'transformers-llm2slm>=0.4.0rc1'"),
        ("0.4' ; rm -rf ~ #", "a newer transformers-llm2slm", "transformers-llm2slm"),
        (None, "a newer transformers-llm2slm", "transformers-llm2slm"),
    ):
        edit(
            checkpoint,
            lambda c, w=writer: c.update(format_version=2, llm2slm_version=w, fusion="telepathy", llm_config=0),
        )
        for loader in (load, AutoModel.from_pretrained, AutoConfig.from_pretrained):
            with pytest.raises(ValueError, match=re.escape(f"was written by {by} {newer}{requirement}") + "$"):
                loader(checkpoint)


def test_versions_are_those_of_the_writer(checkpoint):
    """A file without a format is of the first; what is saved is of this version, whatever was read."""
    edit(checkpoint, lambda c: c.update(llm2slm_version="0.0.1"))
    config = LLM2SLMConfig.from_pretrained(checkpoint)
    assert config.llm2slm_version == "0.0.1"
    config.save_pretrained(checkpoint)
    saved = json.loads((checkpoint / "config.json").read_text())
    assert (saved["format_version"], saved["llm2slm_version"]) == (FORMAT_VERSION, transformers_llm2slm.__version__)
    edit(checkpoint, lambda c: (c.pop("format_version"), c.pop("llm2slm_version")))
    assert LLM2SLMConfig.from_pretrained(checkpoint).format_version == 1


# Building ------------------------------------------------------------------------------------------------------------
def test_errors_of_building_name_the_part(checkpoint):
    original = (checkpoint / "config.json").read_text()
    for path, value, text in (
        (
            "slm_config.relative_attention_num_buckets",
            -1,
            "The SLM, a `t5` model, can't be built, as its configuration is not",
        ),
        ("slm_config.feed_forward_proj", 5, "`slm_config` is no valid configuration of a `t5` model: "),
        ("slm_config.dense_act_fn", "magic", "The SLM, a `t5` model, can't be built"),
        ("llm_config.num_attention_heads", 5, "`llm_config` is no valid configuration of a `llama` model: "),
    ):
        (checkpoint / "config.json").write_text(original)
        edit(checkpoint, setter(path, value))
        with pytest.raises(ValueError, match=re.escape(text)) as caught:
            load(checkpoint)
        assert caught.value.__cause__ is not None


def test_no_memory_for_what_the_files_do_not_hold(checkpoint, monkeypatch):
    """A width that no file fills is refused before it is allocated; for the LLM by its own configuration too."""
    edit(checkpoint, lambda c: c["slm_config"].update(d_model=2**20, num_layers=2))
    with pytest.raises(
        ValueError, match=r"The LLM2SLMForConditionalGeneration would hold [\d,]{13,} numbers, but its files"
    ):
        load(checkpoint)
    edit(checkpoint, lambda c: c["slm_config"].update(d_model=32, num_layers=3))
    llm = checkpoint.parent / "llm"
    shutil.copytree(json.loads((checkpoint / "config.json").read_text())["llm_name_or_path"], llm)
    edit(llm, lambda c: c.update(intermediate_size=2**20, max_position_embeddings=10**7))
    with pytest.raises(
        ValueError, match=r"The LlamaModel would hold [\d,]{11,} numbers, but its files of weights hold"
    ):
        load(checkpoint, llm_name_or_path=str(llm))


# Remote code ---------------------------------------------------------------------------------------------------------
def test_code_of_repositories_is_not_run(checkpoint, zoo, monkeypatch):
    """Of the LLM's and of the SLM's repository, without asking the terminal; ours is installed, so its copy is not read."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked the terminal"))
    auto_map = {"AutoConfig": "evil.Config", "AutoModel": "evil.Model", "AutoModelForCausalLM": "evil.Model"}
    llm = shutil.copytree(zoo.checkpoint("llama", "unigram", "llm"), checkpoint.parent / "llm")
    for folder in (llm, checkpoint):
        (folder / "evil.py").write_text("raise SystemExit('the code was run')")
    edit(checkpoint, lambda c: c.update(auto_map=auto_map))
    edit(llm, lambda c: c.update(auto_map=auto_map))
    for trust in (None, True):  # what transformers and we know ourselves is loaded from there
        model = AutoModel.from_pretrained(checkpoint, llm_name_or_path=str(llm), trust_remote_code=trust)
        assert type(model) is LLM2SLMForConditionalGeneration
    assert load(checkpoint, llm_name_or_path=str(llm)).llm is not None
    edit(llm, lambda c: c.update(model_type="evil"))
    slm = zoo.checkpoint("t5", "bpe", "slm")
    for loading in (
        lambda: load(checkpoint, llm_name_or_path=str(llm)),
        lambda: LLM2SLMForConditionalGeneration.from_llm_slm_pretrained(str(llm), slm, fusion="replace"),
    ):
        with pytest.raises(ValueError, match=r"(?s)contains custom code.*For this model the argument is `llm_trust_r"):
            loading()
    with pytest.raises(ValueError, match="contains custom code"):
        LLM2SLMForConditionalGeneration.from_llm_slm_pretrained(slm, str(llm), fusion="replace")
    with pytest.raises(SystemExit, match="the code was run"):  # it would be
        load(checkpoint, llm_name_or_path=str(llm), llm_trust_remote_code=True)


def test_kernels_of_the_llm(checkpoint, zoo):
    llm = shutil.copytree(zoo.checkpoint("llama", "unigram", "llm"), checkpoint.parent / "llm")
    edit(llm, lambda c: c.update(_attn_implementation="evil/kernels"))
    with pytest.raises(ValueError, match="`llm_config._attn_implementation` is 'evil/kernels'"):
        load(checkpoint, llm_name_or_path=str(llm))


# Over HTTP -----------------------------------------------------------------------------------------------------------
def test_nothing_is_downloaded(sound, zoo, hub, tmp_path):
    """From the Hub, a refused checkpoint costs its configuration, or its index, and not one request for weights."""
    slm = zoo.checkpoint("t5", "bpe", "slm")
    llm = zoo.checkpoint("llama", "unigram", "llm")
    index = {"metadata": {}, "weight_map": {"model.projector.layers.0.weight": "../../../other.safetensors"}}

    def pickled(folder):
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")

    cases = {
        "large": (sound, setter("slm_config.num_layers", 10_000), None, "must lie in [0, 1,000]"),
        "newer": (sound, setter("format_version", 9), None, "pip install -U"),
        "theirs": (
            sound,
            setter("llm_name_or_path", "/home/them/llm"),
            None,
            "a folder on the machine of whoever made it",
        ),
        "outside": (
            sound,
            setter("llm_name_or_path", "trust/llm"),
            lambda folder: (folder / "model.safetensors.index.json").write_text(json.dumps(index)),
            "must lie inside its repository, got '../../../other.safetensors'",
        ),
        "pickled": (
            sound,
            setter("llm_name_or_path", "trust/llm"),
            pickled,
            "are pickles (pytorch_model.bin), which can run",
        ),
        "names-pickled": (sound, setter("llm_name_or_path", "trust/llm-pickled"), None, "`llm_use_safetensors=False`"),
        "names-code": (sound, setter("llm_name_or_path", "trust/llm-code"), None, "`llm_trust_remote_code=True`"),
        "llm": (llm, setter("llm", 0), None, ""),
        "llm-pickled": (llm, setter("llm", 0), pickled, ""),
        "llm-code": (llm, lambda c: c.update(auto_map={"AutoConfig": "evil.Config"}, model_type="evil"), None, ""),
    }
    for name, (source, change, spoil, _) in cases.items():
        folder = shutil.copytree(source, tmp_path / name)
        edit(folder, change)
        if spoil is not None:
            spoil(folder)
        hub.create(f"trust/{name}")
        hub.add_folder(f"trust/{name}", folder)
    code = f"""
        import json, transformers_llm2slm
        from transformers import AutoModel
        from transformers_llm2slm import LLM2SLMForConditionalGeneration
        errors = {{}}
        for name in {[name for name in cases if "llm" not in name.split("-")]}:
            for loader in (LLM2SLMForConditionalGeneration, AutoModel):
                try:
                    loader.from_pretrained(f"trust/{{name}}")
                except (OSError, ValueError) as error:
                    errors.setdefault(name, []).append(str(error))
        try:
            LLM2SLMForConditionalGeneration.from_llm_slm_pretrained("trust/llm-pickled", {slm!r}, fusion="replace")
        except OSError as error:
            errors["composed"] = [str(error)] * 2
        print(json.dumps(errors))
    """
    with hub.record() as requests:
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code)],
            env=hub.environment(tmp_path / "home"),
            capture_output=True,
            text=True,
            timeout=300,
        )
    assert done.returncode == 0, done.stderr
    errors = json.loads(done.stdout)
    for name, texts in errors.items():
        expected = cases["names-pickled" if name == "composed" else name][3]
        assert len(texts) == 2 and all(expected in text for text in texts), (name, texts)
    asked = {request.path.partition("?")[0] for request in requests}
    loaded = {path for path in asked if path.endswith((".safetensors", ".bin", ".py"))}
    # Which files there are is asked of the two whose own weights are sound, and of those without safetensors.
    assert {path.split("/")[2] for path in loaded} <= {"names-pickled", "names-code", "pickled", "llm-pickled"}
    assert not any(path.endswith((".bin", ".py")) for path in loaded)


# Processors ----------------------------------------------------------------------------------------------------------
def test_processors(checkpoint):
    original = (checkpoint / "processor_config.json").read_text()
    for field, value, text in (
        ("shared_tokenizer", "../..", "`shared_tokenizer` must be true or false, got '../..'"),
        ("slm_is_encoder_decoder", 1, "`slm_is_encoder_decoder` must be true or false, got 1"),
        ("max_prompt_length", -1, "`max_prompt_length` must be a positive number of tokens, got -1"),
        ("slm_max_prompt_length", "5", "`slm_max_prompt_length` must be a positive number of tokens, got '5'"),
        ("decoder_start_token_id", 0.5, "`decoder_start_token_id` must be the id of a token, a whole number, got 0.5"),
        ("fusion", ["add"], "`fusion` must be one of 'add', 'replace', 'llm-embed', 'align', 'kv', got ['add']"),
    ):
        (checkpoint / "processor_config.json").write_text(original)
        edit(checkpoint, setter(field, value), "processor_config.json")
        with pytest.raises(ValueError, match=re.escape(text)):
            AutoProcessor.from_pretrained(checkpoint)
