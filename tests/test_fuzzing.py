"""Files of a checkpoint changed at random: the end is always a clear error, or a model that works.

The examples are the same on every run. To look for new ones: `LLM2SLM_FUZZING_EXAMPLES=5000 pytest tests/test_fuzzing.py`.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PROMPTS, Pair
from huggingface_hub.errors import StrictDataclassError
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from transformers import AutoModel, AutoProcessor

from transformers_llm2slm import LLM2SLMForConditionalGeneration, LLM2SLMProcessor

# `StrictDataclassError` is how transformers' own configurations refuse a value; an `ImportError` says what to install.
CLEAR = (ValueError, OSError, StrictDataclassError, ImportError)
MORE = int(os.environ.get("LLM2SLM_FUZZING_EXAMPLES", "0"))
PAIRS = (Pair("t5", "t5", "add"), Pair("llama", "llama", "align"), Pair("bert", "gpt2", "replace"))
# These are read by `AutoConfig` and `AutoProcessor` before they know whose file it is.
BY_CLASS_ONLY = {"model_type", "auto_map", "configuration_files", "processor_class"}

numbers = st.one_of(
    st.integers(-3, 70),
    st.sampled_from([1000, 10**6, 2**31, -(2**31), 2**53, 2**63, 10**30]),
    st.floats(width=32),
    st.sampled_from([1e-300, 1e300, -0.5, 0.5]),
)
words = st.one_of(
    st.sampled_from(
        ["", "add", "align", "t5", "llama", "llm2slm", "clip", "gelu", "bfloat16", "int8", "load", "auto", "\0"]
    ),
    st.sampled_from(
        ["../../etc/passwd", "/etc/passwd", "https://evil.example/x", "~/x", "a\\b", "org/name", "a/b@main:c"]
    ),
    st.text(max_size=5),
)
scalars = st.one_of(st.none(), st.booleans(), numbers, words)
keys = st.one_of(
    words,
    st.sampled_from(["model_type", "auto_map", "attn_implementation", "quantization_config", "quant_method", "dtype"]),
    st.sampled_from(["attribute_map", "get_text_config", "vocab_size", "per_layer_config", "text_config", "decoder"]),
    st.sampled_from(["num_labels", "id2label", "rope_parameters", "rope_scaling", "layer_types", "pruned_heads"]),
    st.sampled_from(
        ["transformers_weights", "fusion_config", "base_model_tp_plan", "is_decoder", "num_hidden_layers"]
    ),
)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(keys, inner, max_size=3)),
    max_leaves=4,
)


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every object or list of a file, with each of its keys."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in list(items):
        yield value, key
        yield from places(item)


def change(data: st.DataObject, content: Any) -> tuple[Any, set[str]]:
    """`content` with one to three values left out, replaced or added; and the keys at its top that were touched."""
    content = copy.deepcopy(content)
    touched = set()
    for _ in range(data.draw(st.integers(1, 3))):
        within, key = data.draw(st.sampled_from(list(places(content)) or [(content, "x")]))
        what = data.draw(st.sampled_from(["leave out", "replace", "replace", "replace", "add"]))
        if what == "leave out":
            within.pop(key, None) if isinstance(within, dict) else within.pop(key)
        else:
            key = data.draw(keys) if what == "add" and isinstance(within, dict) else key
            within[key] = data.draw(values)
        touched |= {key} if within is content else set()
    return content, touched


def examples(number: int) -> Any:
    return settings(
        max_examples=MORE or number,
        derandomize=not MORE,
        deadline=None,
        database=None,
        phases=[Phase.generate, Phase.shrink] if MORE else [Phase.generate],
        suppress_health_check=list(HealthCheck),
    )


@pytest.fixture(scope="module")
def checkpoints(zoo, tmp_path_factory):
    """A checkpoint of each pair, in shards, with inputs for its model."""
    made = []
    for pair in PAIRS:
        folder = tmp_path_factory.mktemp("fuzzing")
        model, processor = zoo.compose(pair)
        model.save_pretrained(folder, max_shard_size="100kB")
        processor.save_pretrained(folder)
        inputs = processor(text=PROMPTS[:2], text_target=["a", "b c"], padding=True, return_tensors="pt")
        made.append((folder, shutil.copytree(zoo.sources(pair)[0], folder / "its-llm"), inputs))
    return made


@pytest.fixture(autouse=True)
def no_way_out(monkeypatch):
    """Nobody is asked anything, no connection is made, and transformers' reports of every load are not printed."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked the terminal"))
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("connected to the network"))
    monkeypatch.setattr("transformers.utils.loading_report.log_state_dict_report", lambda *_, **__: None)


def check(file: Path, content: Any, load: Any) -> None:
    """With `content` in `file`, `load` gives a model that works, or says what is wrong."""
    original = file.read_text()
    file.write_text(json.dumps(content))
    try:
        load()
    except CLEAR as error:
        assert len(str(error)) > 20, repr(error)
    finally:
        file.write_text(original)


def check_model(loader: Any, folder: Path, inputs: Any, **kwargs: Any) -> None:
    model = loader.from_pretrained(folder, **kwargs)
    with torch.no_grad():
        output = model(**inputs, return_dict=True)
    assert output.logits.isfinite().all() and output.loss.isfinite()


@given(data=st.data())
@examples(250)
def test_configurations(checkpoints, data):
    folder, _, inputs = checkpoints[data.draw(st.integers(0, len(PAIRS) - 1))]
    file = folder / "config.json"
    content, touched = change(data, json.loads(file.read_text()))
    loaders = [LLM2SLMForConditionalGeneration] + ([] if touched & BY_CLASS_ONLY else [AutoModel])
    loader = data.draw(st.sampled_from(loaders))
    check(file, content, lambda: check_model(loader, folder, inputs))


@given(data=st.data())
@examples(100)
def test_configurations_of_llms(checkpoints, data):
    folder, llm, inputs = checkpoints[data.draw(st.integers(0, len(PAIRS) - 1))]
    file = llm / "config.json"
    content, _ = change(data, json.loads(file.read_text()))
    kwargs = {"llm_name_or_path": str(llm)}
    check(file, content, lambda: check_model(LLM2SLMForConditionalGeneration, folder, inputs, **kwargs))


@given(data=st.data())
@examples(60)
def test_indices(checkpoints, data):
    folder, _, inputs = checkpoints[data.draw(st.integers(0, len(PAIRS) - 1))]
    file = folder / "model.safetensors.index.json"
    content, _ = change(data, json.loads(file.read_text()))
    check(file, content, lambda: check_model(LLM2SLMForConditionalGeneration, folder, inputs))


@given(data=st.data())
@examples(60)
def test_processors(checkpoints, data):
    folder = checkpoints[data.draw(st.integers(0, len(PAIRS) - 1))][0]
    file = folder / "processor_config.json"
    content, touched = change(data, json.loads(file.read_text()))
    loader = LLM2SLMProcessor if touched & BY_CLASS_ONLY else AutoProcessor

    def load() -> None:
        processor = loader.from_pretrained(folder)
        assert (
            processor(text=PROMPTS[:2], text_target=["a", "b"], padding=True, return_tensors="pt")["labels"].dim() == 2
        )

    check(file, content, load)
