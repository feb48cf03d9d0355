"""The configuration: defaults, errors, what it answers for the SLM, and that nothing is lost on the way to disk."""

from __future__ import annotations

import copy
import json
import pathlib
import pickle

import pytest
import torch
from conftest import FAMILIES
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, GenerationConfig, LlamaConfig, OPTConfig, T5Config

from transformers_llm2slm import LLM2SLMConfig


def make(llm="llama", slm="t5", **kwargs) -> LLM2SLMConfig:
    return LLM2SLMConfig(llm_config=FAMILIES[llm](), slm_config=FAMILIES[slm](), **kwargs)


FULL = {
    "fusion": "llm-embed",
    "llm_layer": [0, 2, -1],
    "slm_encoder": "skip",
    "slm_layers": [0, 1],
    "projector_hidden_size": 20,
    "projector_num_layers": 3,
    "projector_activation": "gelu",
    "projector_norm": "rms_norm",
    "projector_init": "fit",
    "llm_name_or_path": "org/llm",
    "llm_revision": "0123abc",
    "llm_subfolder": "part",
    "llm_fingerprint": "deadbeef",
    "llm_dtype": "bfloat16",
    "llm_in_checkpoint": True,
    "slm_name_or_path": "org/slm",
    "slm_revision": "4567def",
}


def test_defaults():
    config = make()
    assert (
        config.to_dict().items()
        >= {
            "model_type": "llm2slm",
            "fusion": "add",
            "llm_layer": -1,
            "slm_encoder": "keep",
            "slm_layers": None,
            "projector_hidden_size": None,
            "projector_num_layers": 2,
            "projector_activation": "relu",
            "projector_norm": "none",
            "projector_residual": False,
            "projector_init": "random",
            "llm_name_or_path": None,
            "llm_revision": None,
            "llm_subfolder": "",
            "llm_fingerprint": None,
            "llm_dtype": None,
            "llm_in_checkpoint": False,
            "slm_name_or_path": None,
            "slm_revision": None,
            "is_encoder_decoder": True,
        }.items()
    )
    assert config.keys_to_ignore_at_inference == ["cache", "past_key_values"]
    empty = LLM2SLMConfig()  # `to_diff_dict` needs one without arguments
    assert type(empty.llm_config) is type(empty.slm_config) is T5Config


# To disk and back ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("fields", [{}, FULL], ids=["default", "full"])
@pytest.mark.parametrize(("llm", "slm"), [("llama", "t5"), ("t5gemma", "marian"), ("gpt2", "t5gemma")])
def test_round_trip(llm, slm, fields, tmp_path):
    """Files, dictionaries, copies and pickles give the same configuration, parts included."""
    config = make(llm, slm, **fields)
    config.transformers_version = "5.0.0"
    config.save_pretrained(tmp_path)
    loaders = {
        "class": LLM2SLMConfig.from_pretrained(tmp_path),
        "auto": AutoConfig.from_pretrained(tmp_path),
        "dict": LLM2SLMConfig.from_dict(config.to_dict()),
        "diff": LLM2SLMConfig.from_dict(config.to_diff_dict()),
        "json": LLM2SLMConfig.from_dict(json.loads(config.to_json_string())),
        "copy": copy.deepcopy(config),
        "pickle": pickle.loads(pickle.dumps(config)),
    }
    for name, loaded in loaders.items():
        loaded.transformers_version, loaded.name_or_path = "5.0.0", ""  # what `from_pretrained` adds
        assert type(loaded) is LLM2SLMConfig and loaded is not config
        assert {key: getattr(loaded, key) for key in fields} == fields, name
        assert loaded.to_dict() == config.to_dict(), name
        for part in ("llm_config", "slm_config"):
            own, other = getattr(config, part), getattr(loaded, part)
            assert type(other) is type(own) and other is not own
            assert other.to_diff_dict() == own.to_diff_dict()
        assert loaded == config != make(llm, slm, projector_num_layers=5)


def test_loading_with_arguments(tmp_path):
    """Fields may be set on loading; arguments for the LLM's loader are left over, not written into the config."""
    make(**FULL).save_pretrained(tmp_path)
    assert LLM2SLMConfig.from_pretrained(tmp_path, fusion="replace").fusion == "replace"
    config, unused = LLM2SLMConfig.from_pretrained(
        tmp_path, return_unused_kwargs=True, projector_init="zero", llm_dtype="float16", llm_token="t", other=1
    )
    assert config.projector_init == "zero" and config.llm_dtype == "bfloat16" and not hasattr(config, "llm_token")
    assert unused == {"llm_dtype": "float16", "llm_token": "t", "other": 1}


# Errors --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("fields", "error"),
    [
        (
            {"fusion": "mean"},
            r"`fusion` must be one of 'add', 'replace', 'llm-embed', 'align', 'kv', got 'mean'. Set `fusion`",
        ),
        ({"slm_encoder": "drop"}, r"`slm_encoder` must be one of 'keep', 'skip', got 'drop'"),
        (
            {"projector_norm": "batch"},
            r"`projector_norm` must be one of 'none', 'layer_norm', 'rms_norm', got 'batch'",
        ),
        ({"projector_init": "one"}, r"`projector_init` must be one of 'random', 'zero', 'identity', 'fit', got 'one'"),
        ({"projector_num_layers": 0}, r"`projector_num_layers` must be at least 1, got 0"),
        ({"projector_hidden_size": 0}, r"`projector_hidden_size` must be positive, got 0"),
        ({"projector_hidden_size": -4}, r"`projector_hidden_size` must be positive, got -4"),
        ({"projector_residual": True}, r"equal width, got 48 and 32. Set `projector_residual=False`"),
        ({"llm_layer": 4}, r"`llm_layer` must lie in \[-4, 3\] for an LLM of 3 layers, got 4"),
        ({"llm_layer": [0, -5]}, r"`llm_layer` must lie in \[-4, 3\] for an LLM of 3 layers, got -5"),
        ({"llm_layer": []}, r"`llm_layer` is an empty list; give at least one layer"),
        (
            {"llm_layer": "last"},
            r"'llm_layer' with value 'last' doesn't match any type in \(<class 'int'>, list\[int\]\)",
        ),
        ({"projector_num_layers": "2"}, r"'projector_num_layers' expected int, got str"),
    ],
)
def test_errors(fields, error):
    with pytest.raises(StrictDataclassError, match=error):
        make(**fields)


def test_errors_of_pairs():
    with pytest.raises(
        StrictDataclassError, match=r'needs an encoder-decoder SLM, got a decoder-only `gpt2`. Use `slm_encoder="k'
    ):
        make("t5", "gpt2", slm_encoder="skip")
    make("t5", "gpt2", projector_residual=True)  # both 32 wide
    for layer in (-4, 3, [0, 1, 2]):
        assert make(llm_layer=layer).llm_layer == layer
    with pytest.raises(StrictDataclassError, match=r"must lie in \[-3, 2\] for an LLM of 2 layers, got 3"):
        make("bart", llm_layer=3)  # of its encoder: the decoder has 3


# Values --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("value", [torch.bfloat16, "bfloat16", "torch.bfloat16"])
def test_llm_dtype_is_a_name(value):
    assert make(llm_dtype=value).llm_dtype == "bfloat16"
    config = make()
    config.llm_dtype = value
    assert json.loads(config.to_json_string())["llm_dtype"] == "bfloat16"
    config.llm_dtype = None
    assert config.llm_dtype is None


@pytest.mark.parametrize("name", ["llm_name_or_path", "slm_name_or_path"])
def test_names_and_folders(name, tmp_path, monkeypatch):
    """A folder is named by its full path, so that it is found from anywhere; a hub id stays as it is."""
    (tmp_path / "models" / "mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    full = str(tmp_path / "models" / "mine")
    for value in ("models/mine", pathlib.Path("models/mine"), full, "./models/../models/mine/"):
        assert getattr(make(**{name: value}), name) == full
    config = make(**{name: "org/mine"})
    assert getattr(config, name) == "org/mine"
    setattr(config, name, pathlib.Path("models/mine"))
    assert getattr(config, name) == full
    config.save_pretrained(tmp_path)
    monkeypatch.chdir("/")
    assert getattr(LLM2SLMConfig.from_pretrained(tmp_path), name) == full


@pytest.mark.parametrize(
    ("llm", "slm", "llm_hidden_size", "slm_hidden_size", "num_llm_layers"),
    [
        ("llama", "t5", 48, 32, 3),
        ("t5", "opt", 32, 24, 3),  # OPT's embeddings are narrower than its layers
        ("opt", "t5", 32, 32, 2),
        ("bart", "gpt2", 32, 32, 2),
        ("t5gemma", "llama", 32, 48, 2),
        ("gpt2", "qwen3", 32, 40, 3),
        ("gpt-neo", "t5gemma", 32, 32, 4),
        ("modernbert", "marian", 48, 32, 2),
    ],
)
def test_sizes(llm, slm, llm_hidden_size, slm_hidden_size, num_llm_layers):
    config = make(llm, slm, fusion="replace")
    assert (config.llm_hidden_size, config.slm_hidden_size) == (llm_hidden_size, slm_hidden_size)
    assert config.num_llm_layers == num_llm_layers


def test_sizes_of_unequal_halves():
    """An LLM is measured by its encoder, an SLM by what its prompt enters."""
    wide = FAMILIES["t5gemma"]()
    wide.encoder.hidden_size, wide.encoder.num_hidden_layers, wide.decoder.vocab_size = 64, 5, 400
    assert LLM2SLMConfig(llm_config=wide, slm_config=FAMILIES["t5"]()).llm_hidden_size == 64
    assert LLM2SLMConfig(llm_config=wide, slm_config=FAMILIES["t5"](), llm_layer=5).num_llm_layers == 5
    slm = LLM2SLMConfig(llm_config=FAMILIES["t5"](), slm_config=wide)
    assert (slm.slm_hidden_size, slm.vocab_size) == (64, 400)
    electra = AutoConfig.for_model("electra", embedding_size=16, hidden_size=24)
    assert LLM2SLMConfig(llm_config=electra, slm_config=electra).llm_hidden_size == 24
    assert LLM2SLMConfig(llm_config=electra, slm_config=electra).slm_hidden_size == 16


@pytest.mark.parametrize(
    ("llm_layer", "fusion", "expected"),
    [
        (-1, "add", 1),
        (2, "align", 1),
        ([1], "replace", 1),
        ([0, -1], "add", 2),
        (-1, "llm-embed", 2),
        ([0, 1, 2], "llm-embed", 4),
    ],
)
def test_num_llm_states(llm_layer, fusion, expected):
    assert make(llm_layer=llm_layer, fusion=fusion).num_llm_states == expected


def test_the_slm_answers():
    """Text config, vocabulary and special tokens are the SLM's: it writes."""
    llama = FAMILIES["llama"]()
    llama.vocab_size, llama.eos_token_id = 400, [2, 7]
    config = LLM2SLMConfig(llm_config=FAMILIES["t5"](), slm_config=llama)
    for arguments in ({}, {"decoder": True}, {"encoder": True}):
        assert config.get_text_config(**arguments) is config.slm_config
    assert config.vocab_size == 400 and config.is_encoder_decoder
    ids = ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id")
    assert [getattr(config, name) for name in ids] == [0, 1, [2, 7], None]
    assert [getattr(make("llama", "t5"), name) for name in ids] == [0, None, 2, 0]
    gemma = make("t5", "t5gemma")
    assert gemma.get_text_config() is gemma.slm_config.decoder
    assert gemma.pad_token_id == 0 and gemma.eos_token_id == 2
    assert make(eos_token_id=9).eos_token_id == 9  # unless it is given
    assert GenerationConfig.from_model_config(make("llama", "bart")).decoder_start_token_id == 2


def test_parts_of_any_kind():
    """Parts are given as configurations or as dictionaries, which name their type."""
    config = LLM2SLMConfig(llm_config=FAMILIES["opt"]().to_dict(), slm_config=FAMILIES["llama"]().to_dict())
    assert type(config.llm_config) is OPTConfig and type(config.slm_config) is LlamaConfig
    assert config.llm_config.word_embed_proj_dim == 24
    with pytest.raises(ValueError, match="Unrecognized model type for subconfig: nothing"):
        LLM2SLMConfig(llm_config={"model_type": "nothing"})
