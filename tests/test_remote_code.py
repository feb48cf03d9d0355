"""Checkpoints with a copy of the code: they load without the package, and with it the package wins."""

from __future__ import annotations

import ast
import importlib.metadata
import json
import os
import subprocess
import sys
import sysconfig
import types
import venv

import pytest
import remote_code_run
import transformers
from conftest import PROMPTS, Pair
from transformers import AutoConfig, AutoModel, AutoModelForSeq2SeqLM, AutoProcessor, dynamic_module_utils, pipeline
from transformers.dynamic_module_utils import get_class_from_dynamic_module, get_imports

import transformers_llm2slm
from transformers_llm2slm import LLM2SLMConfig, LLM2SLMForConditionalGeneration, LLM2SLMProcessor
from transformers_llm2slm.pipeline_text2text import Text2TextGenerationPipeline
from transformers_llm2slm.remote_code import HEADER, TASK, code_included, with_code, without_code

PAIRS = {"one": Pair("t5", "t5", "add"), "two": Pair("llama", "llama", "align")}
PARTS = (LLM2SLMConfig, LLM2SLMForConditionalGeneration, LLM2SLMProcessor)


@pytest.fixture(scope="module")
def checkpoints(zoo, tmp_path_factory):
    """Folders with code of a checkpoint with `one` tokenizer, and one with `two`; and what each generates."""
    made = {}
    for name, pair in PAIRS.items():
        folder = tmp_path_factory.mktemp("code") / name
        model, processor = zoo.compose(pair)
        # What is put on the Hub can name no LLM that is a folder of this machine.
        model.save_pretrained(folder, include_code=True, save_llm=name == "two")
        processor.save_pretrained(folder, include_code=True)
        batch = processor(text=PROMPTS, padding=True, return_tensors="pt")
        made[name] = folder, model.generate(**batch, **remote_code_run.NEW_TOKENS).tolist()
        assert not hasattr(model.config, "auto_map") and not hasattr(processor, "auto_map")
    return made


@pytest.fixture
def modules_cache(tmp_path, monkeypatch):
    """A folder of its own for what transformers copies of a checkpoint's code."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "transformers_modules"]:
        del sys.modules[name]


# Without the package -----------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def python_without_package(tmp_path_factory):
    """An interpreter that has what this one has, but for the package."""
    folder = tmp_path_factory.mktemp("without") / "environment"
    venv.create(folder, symlinks=os.name != "nt")
    packages, scripts = (
        sysconfig.get_path(name, "venv", {"base": str(folder), "platbase": str(folder)})
        for name in ("purelib", "scripts")
    )
    # A folder that a .pth file names brings no .pth files of its own, and so no editable installs.
    lines = sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})
    if any(os.path.isdir(os.path.join(path, "transformers_llm2slm")) for path in lines):
        lines.append("import sys; sys.modules['transformers_llm2slm'] = None")
    with open(os.path.join(packages, "present.pth"), "w", encoding="utf-8") as file:
        file.write("\n".join(lines))
    return os.path.join(scripts, "python")


def test_without_the_package(checkpoints, python_without_package, hub, tmp_path):
    """From a folder and from the Hub: load, generate, train, save, load again. All with the flag, nothing without it."""
    (one, one_tokens), (two, two_tokens) = checkpoints.values()
    hub.add_folder("org/two", two)
    tasks = {"names": [str(one), "org/two"], "prompts": PROMPTS}
    (tmp_path / "tasks.json").write_text(json.dumps(tasks))
    environment = hub.environment(tmp_path / "home", HF_MODULES_CACHE=str(tmp_path / "modules"))
    environment.pop("PYTHONPATH", None)
    run = subprocess.run(
        [python_without_package, remote_code_run.__file__, str(tmp_path)],
        env=environment,
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["installed"] is False
    for name, tokens in ((str(one), one_tokens), ("org/two", two_tokens)):
        result = results[name]
        assert result["tokens"] == result["again"] == tokens
        assert {module.partition(".")[0] for module in result["modules"]} == {"transformers_modules"}
        # One folder of modules: parts of two would not know each other's classes.
        assert len({module.rpartition(".")[0] for module in result["modules"]}) == 1 and result["one_class"]
    _, processor = (auto.from_pretrained(two) for auto in (AutoModel, AutoProcessor))
    assert results["org/two"]["texts"] == processor.batch_decode(two_tokens, skip_special_tokens=True)
    assert results[str(one)]["tokenizer"] == "TokenizersBackend"
    assert results["org/two"]["tokenizer"].startswith("'org/two' has two tokenizers")
    assert results["checkpoint"] == results["trained"] != one_tokens
    for auto in ("AutoConfig", "AutoModel", "AutoProcessor"):
        assert "Please pass the argument `trust_remote_code=True` to allow custom code to be run." in results[auto]

    # What was saved there is the same code, and loads here by the package.
    for folder in (one, two):
        again = tmp_path / f"{folder.name}-again"
        assert code(again) == code(folder) and not code(again).keys() & {"__init__.py"}
        assert type(AutoModel.from_pretrained(again)) is LLM2SLMForConditionalGeneration
        assert json.loads((again / "config.json").read_text()).items() >= with_code({}).items()


def code(folder):
    return {file.name: file.read_text() for file in folder.glob("*.py")}


# With the package --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("trust", [{}, {"trust_remote_code": True}], ids=["plain", "trusted"])
@pytest.mark.parametrize("name", list(PAIRS))
def test_the_package_wins(checkpoints, name, trust, tmp_path):
    """Every Auto class and the pipeline give the package's classes, ask for nothing, and save no code again."""
    folder, tokens = checkpoints[name]
    config, model, processor = (
        auto.from_pretrained(folder, **trust) for auto in (AutoConfig, AutoModelForSeq2SeqLM, AutoProcessor)
    )
    assert (type(config), type(model), type(processor)) == PARTS
    pipe = pipeline(TASK, model=str(folder), device="cpu", **trust)
    assert type(pipe) is Text2TextGenerationPipeline and type(pipe.model) is LLM2SLMForConditionalGeneration
    expected = processor.batch_decode(tokens, skip_special_tokens=True)
    rows = pipe(PROMPTS, max_new_tokens=6, min_new_tokens=6)
    assert [row["generated_text"] for row in rows] == expected
    pipe.save_pretrained(tmp_path)
    assert not code(tmp_path)
    for file in ("config.json", "processor_config.json"):
        assert not {"auto_map", "custom_pipelines"} & json.loads((tmp_path / file).read_text()).keys()


def test_the_package_wins_before_its_import(checkpoints, modules_cache, monkeypatch):
    """The copy's classes are the installed package's, unless that is older than the copy."""
    folder, _ = checkpoints["one"]
    names = ("LLM2SLMConfig", "LLM2SLMForConditionalGeneration", "LLM2SLMProcessor", "Text2TextGenerationPipeline")

    def loaded():
        return tuple(get_class_from_dynamic_module(f"auto_llm2slm.{name}", str(folder)) for name in names)

    assert loaded() == (*PARTS, Text2TextGenerationPipeline)
    for part in PARTS:  # as transformers does with what it loads so; none is to be saved with the code for that
        part.register_for_auto_class()
        assert part._auto_class is None
    for name in [name for name in sys.modules if name.endswith(".auto_llm2slm")]:
        del sys.modules[name]
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.0.9")
    assert {found.__module__.partition(".")[0] for found in loaded()} == {"transformers_modules"}


# What is copied ----------------------------------------------------------------------------------------------------------
def test_copied_modules(checkpoints):
    """The copies import each other and what transformers brings, read no other file, and are no more than it takes."""
    folder, _ = checkpoints["one"]
    copies = code(folder)
    required = {"torch", "transformers", "huggingface_hub", "safetensors", "packaging"}
    for name, text in copies.items():
        # transformers demands every third-party import that is not in a `try`, in functions too.
        assert set(get_imports(folder / name)) <= required | sys.stdlib_module_names, name
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and node.level:
                # By this form alone transformers finds the files that it needs.
                assert node.level == 1 and f"{node.module}.py" in copies, f"{name}, line {node.lineno}"
        assert name == "remote_code.py" or not any(way in text for way in ("__file__", "importlib.resources")), name
    assert {
        "auto_llm2slm.py",
        "modeling_llm2slm.py",
        "processing_llm2slm.py",
        "pipeline_text2text.py",
    } <= copies.keys()
    for name in (
        "registration",
        "data_collator",
        "rows",
        "llm_states_cache",
        "lora",
        "sft",
        "evaluation",
        "model_card",
    ):
        assert f"{name}.py" not in copies, f"{name} is not needed to load, run and save a model; see remote_code.py."


def test_header(checkpoints):
    """Each copy says of which version it is and how to update it; the code below is the package's."""
    folder, _ = checkpoints["one"]
    assert f"transformers-llm2slm {transformers_llm2slm.__version__} " in HEADER and "include_code=True" in HEADER
    for name, text in code(folder).items():
        with open(os.path.join(os.path.dirname(transformers_llm2slm.__file__), name), encoding="utf-8") as file:
            assert text == HEADER + file.read()


def test_off_by_default(small, tmp_path):
    """Without `include_code`, no code and no `auto_map`; also after a save with it, and after one that failed."""
    model, processor = small
    with pytest.raises(RuntimeError), code_included(model.config, True):
        raise RuntimeError
    model.save_pretrained(tmp_path / "with", include_code=True)
    processor.save_pretrained(tmp_path / "with", include_code=True)
    model.config.save_pretrained(tmp_path / "config", include_code=True)
    for part in small:
        part.save_pretrained(tmp_path / "without")
    assert code(tmp_path / "with") == code(tmp_path / "config") and not code(tmp_path / "without")
    for file in ("config.json", "processor_config.json"):
        with_code, without = (json.loads((tmp_path / kind / file).read_text()) for kind in ("with", "without"))
        assert with_code.keys() - without.keys() <= {"auto_map", "custom_pipelines"} and "auto_map" in with_code
        assert without == {key: value for key, value in with_code.items() if key in without}


def test_push_to_hub(small, monkeypatch):
    """`push_to_hub(include_code=True)` uploads the code with model and processor, and only then."""
    uploaded = []
    repository = types.SimpleNamespace(create_repo=lambda *args, **kwargs: types.SimpleNamespace(repo_id="org/model"))
    card = types.SimpleNamespace(save=lambda path: None)
    monkeypatch.setattr(transformers.utils.hub, "hf_api", lambda: repository)
    monkeypatch.setattr(transformers.utils.hub, "create_and_tag_model_card", lambda *args, **kwargs: card)
    monkeypatch.setattr(
        transformers.utils.hub.PushToHubMixin,
        "_upload_modified_files",
        lambda self, folder, *args, **kwargs: uploaded.append({name for name in os.listdir(folder) if ".py" in name}),
    )
    monkeypatch.setattr("transformers_llm2slm.push.delete_stale_weights", lambda *args: None)
    for part in small:
        part.push_to_hub("org/model", include_code=True)
        part.push_to_hub("org/model")
    assert uploaded == [uploaded[0], set()] * 2 and "auto_llm2slm.py" in uploaded[0]


def test_trust_is_not_handed_to_the_llm(zoo, tmp_path, modules_cache):
    """`trust_remote_code=True` is for the checkpoint; what its LLM's repository brings is not run."""
    llm, slm = zoo.sources(PAIRS["one"])
    stranger = tmp_path / "stranger"
    AutoModel.from_pretrained(llm).save_pretrained(stranger)
    zoo.tokenizers["bpe"].save_pretrained(stranger)
    config = json.loads((stranger / "config.json").read_text())
    names = {"AutoConfig": "code.Config", "AutoModel": "code.Model"}
    (stranger / "config.json").write_text(json.dumps(config | {"auto_map": names}))
    (stranger / "code.py").write_text("raise RuntimeError('This code must not be run.')")
    model = LLM2SLMForConditionalGeneration.from_llm_slm_pretrained(str(stranger), slm, fusion="add")
    model.save_pretrained(tmp_path / "model", include_code=True)
    loaded = AutoModel.from_pretrained(tmp_path / "model", trust_remote_code=True)
    assert type(loaded.llm).__module__.startswith("transformers.models.t5")
    with pytest.raises(RuntimeError, match="must not be run"):
        AutoModel.from_pretrained(stranger, trust_remote_code=True)


def test_pipelines_of_others():
    """A checkpoint may name pipelines that someone else wrote; they come and go with the code as they were."""
    others = {"custom_pipelines": {"other": {"impl": "other.Other"}}}
    assert with_code(others)["custom_pipelines"].keys() == {"other", TASK}
    assert without_code(with_code(others)) == others and without_code(with_code({})) == {}
