"""What a configuration may say. It is input from whoever made the checkpoint, so it is checked before anything is built.

The functions are pure: they take what a file holds and raise a `ValueError` that names the field as it stands in the file
(`slm_config.hidden_size`), what was found and what was expected.
"""

from __future__ import annotations

import inspect
import math
import ntpath
import os
import posixpath
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from packaging.version import InvalidVersion, Version
from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from .version import __version__

# The format of configuration that this version writes, and the newest that it reads. It grows with every change by which
# an older version would read a checkpoint wrongly.
FORMAT_VERSION = 1

PARTS = ("llm_config", "slm_config")

# How a field's name ends, the largest value, and what real models have. These bound what a model costs to build without
# its weights: Python objects, one by one. What its weights may take is bounded by its files, see `check_memory`.
SIZES: tuple[tuple[str, int, str], ...] = (
    ("layers|n_layer|blocks", 1_000, "the deepest LLMs have some 130 layers"),
    ("experts", 2**15, "the largest mixtures of experts have some hundreds, product keys 2**14"),
    ("heads?", 2**12, "the widest LLMs have 128 heads"),
    ("vocab|vocab_size|vocab_size_base", 2**26, "the largest tables have 20 million rows"),
    (
        "hidden_size|intermediate_size|embedding_size|d_model|d_ff|d_kv|n_embd|dim",
        2**20,
        "the widest LLMs have 53,248",
    ),
    ("labels|classes", 2**20, "the largest classifiers have some 100,000 classes"),
    (r"\w+\[\]", 2**24, "numbers in a list are token ids, layers or sizes"),
)
# How the names of other numbers end, and the range outside of which a model computes nothing but NaN.
RANGES: tuple[tuple[str, float, float], ...] = (
    ("drop|dropout|pdrop|dropout_prob|dropout_rate|layerdrop", 0, 1),
    ("eps|epsilon", 0, 1),
    ("rope_theta", 1e-6, 1e15),
)
# Layers times experts: the largest mixtures of experts have some 25,000, product keys 2**19.
LARGEST_NUMBER_OF_EXPERTS = 2**20
# Any other whole number: what a float holds exactly, as JSON has it.
LARGEST_INTEGER = 2**53
DEEPEST_NESTING = 16

# Fields that may name a repository of kernels, whose code would be downloaded and run.
_KERNEL_FIELDS = ("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation")
# Class attributes by which transformers reads every other attribute.
_RESERVED = ("attribute_map", "sub_configs_defaults")
# Where transformers looks for the text part of a configuration, whatever lies there.
_TEXT_PARTS = ("text_config", "decoder", "generator", "text_encoder")
_SWITCHES = ("is_encoder_decoder", "output_hidden_states", "output_attentions", "return_dict", "use_cache")


# The format --------------------------------------------------------------------------------------------------------------
def check_format(config: Mapping[str, Any]) -> None:
    """Raise a `ValueError` if a configuration is of a newer format than this version reads. Without one it is of the first."""
    found = config.get("format_version", 1)
    if not _is_integer(found) or found < 1:
        raise ValueError(f"`format_version` must be a positive integer, got {_shown(found)}.")
    if found <= FORMAT_VERSION:
        return
    try:
        writer = Version(str(config.get("llm2slm_version"))).public
        by, requirement = f"transformers-llm2slm {writer}", f"'transformers-llm2slm>={writer}'"
    except InvalidVersion:
        by, requirement = "a newer transformers-llm2slm", "transformers-llm2slm"
    raise ValueError(
        f"This checkpoint was written by {by} in format {_shown(found)}; this is {__version__}, which reads formats up to "
        f"{FORMAT_VERSION}. Install a newer version: pip install -U {requirement}"
    )


# Configurations ------------------------------------------------------------------------------------------------------------
def check_config(config: Any, config_class: type[PreTrainedConfig]) -> None:
    """
    Check what a `config.json` holds, before a configuration is made of it.

    Args:
        config: What the file holds.
        config_class: The configuration's class, whose methods and properties no key may hide.

    Raises:
        ValueError: for the first value that no sound checkpoint has; for a newer format before any other.
    """
    if not isinstance(config, Mapping):
        raise ValueError(f"`config.json` must hold an object, got {_shown(config)}.")
    check_format(config)
    if config.get("model_type", config_class.model_type) != config_class.model_type:
        raise ValueError(f"`model_type` must be {config_class.model_type!r}, got {_shown(config['model_type'])}.")
    if config.get("is_encoder_decoder", True) is not True:
        found = _shown(config["is_encoder_decoder"])
        raise ValueError(f"`is_encoder_decoder` must be true (text in, text out, whatever the SLM), got {found}.")
    for field, text in (
        ("transformers_weights", "the weights of a checkpoint are in `model.safetensors`"),
        ("fusion_config", "it would change the classes of transformers; pass it to `from_pretrained` if you want it"),
    ):
        if field in config:
            raise ValueError(f"`{field}` is not read from a checkpoint: {text}. Take it out of the file.")
    for name in PARTS:
        _check_part(name, config.get(name))
    for path, part in (("quantization_config", config), ("slm_config.quantization_config", config["slm_config"])):
        if isinstance(part, Mapping) and part.get("quantization_config") is not None:
            raise ValueError(
                f"`{path}` is not read: projector and SLM are held as they are trained, and the LLM alone may be quantised."
            )
    check_values(config)
    _check_keys(config, config_class)
    for field in ("llm_name_or_path", "slm_name_or_path"):
        _check_name(field, config.get(field))
    _check_revision("llm_revision", config.get("llm_revision"))
    check_inside("`llm_subfolder`", config.get("llm_subfolder", ""))
    for field in ("dtype", "torch_dtype"):
        _check_dtype(field, config.get(field), floating=True)
    _check_dtype("llm_dtype", config.get("llm_dtype"))
    _check_quantization("llm_quantization_config", config.get("llm_quantization_config"))
    layers = config.get("llm_layer")
    if isinstance(layers, list) and len(layers) > (most := SIZES[0][1]):
        raise ValueError(f"`llm_layer` must list at most {most:,} layers, got {len(layers):,}.")


def _check_part(name: str, config: Any) -> None:
    """The configuration of one of the two models."""
    if isinstance(config, PreTrainedConfig):
        return
    if not isinstance(config, Mapping):
        raise ValueError(
            f"`{name}` must hold the full configuration of a model, got {_shown(config)}. Save the checkpoint again with "
            "`model.save_pretrained`."
        )
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        code = " It comes with code of its own (`auto_map`), which is not run." if "auto_map" in config else ""
        raise ValueError(
            f"`{name}.model_type` is {_shown(model_type)}, which this version of transformers does not know.{code} Install a "
            "version that does, or import the package that registers it first."
        )
    if config.get("is_encoder_decoder") and not CONFIG_MAPPING[model_type]().is_encoder_decoder:
        raise ValueError(f"`{name}.is_encoder_decoder` is true, but a `{model_type}` model is none. Set it to false.")
    if model_type == "llm2slm":
        raise ValueError(f"`{name}` is an LLM-to-SLM model itself; these can't be nested. Choose a plain model.")


def check_values(config: Mapping[str, Any], name: str = "") -> None:
    """
    Check every value of a configuration, at any depth: sizes, numbers, dtypes, and what would fetch code or weights.

    Args:
        config: What the file holds.
        name: What the fields are called after in an error, e.g. `"llm_config"`.
    """
    for path, field, value in _fields(config, name, 0):
        if isinstance(value, str) and "\0" in value:
            raise ValueError(f"`{path}` holds a NUL character.")
        elif isinstance(value, float) and math.isnan(value):
            raise ValueError(f"`{path}` is not a number (NaN).")
        elif isinstance(value, (int, float, str)):
            _check_number(path, field, value)
        if field in _SWITCHES and not (value is None or isinstance(value, bool)):
            raise ValueError(f"`{path}` must be true or false, got {_shown(value)}.")
        if field.endswith("_token_id"):
            _check_token_id(path, field, value)
        if field in _KERNEL_FIELDS:
            _check_implementation(path, value)
        elif field in ("dtype", "torch_dtype"):
            _check_dtype(path, value)
        elif field == "quantization_config":
            _check_quantization(path, value)
    for part, experts in _number_of_experts(config, name):
        if experts > LARGEST_NUMBER_OF_EXPERTS:
            raise ValueError(
                f"`{part}` must have at most {LARGEST_NUMBER_OF_EXPERTS:,} experts in all its layers (the largest models "
                f"have some 25,000), got {experts:,}."
            )


def _fields(value: Any, path: str, depth: int) -> Iterator[tuple[str, str, Any]]:
    """All that a configuration holds, as `("slm_config.num_layers", "num_layers", 6)`; an item of a list by its list's name."""
    if depth > DEEPEST_NESTING:
        raise ValueError(f"`{path:.80}...` is nested more than {DEEPEST_NESTING} levels deep.")
    items: Any = ()
    if isinstance(value, Mapping):
        items = ((f"{path}.{key}" if path else str(key), str(key), item) for key, item in value.items())
    elif isinstance(value, (list, tuple)):
        field = path.rpartition(".")[2].partition("[")[0]
        items = ((f"{path}[{index}]", f"{field}[]", item) for index, item in enumerate(value))
    for name, field, item in items:
        yield name, field, item
        yield from _fields(item, name, depth + 1)


def _check_number(path: str, field: str, value: int | float | str) -> None:
    if isinstance(value, int) and abs(value) > LARGEST_INTEGER:
        raise ValueError(f"`{path}` must lie within +-2**53, got {_shown(value)}.")
    for names, low, high in RANGES:
        in_range = isinstance(value, (int, float)) and low <= value <= high
        if re.fullmatch(rf"(\w*_)?({names})", field) and not in_range:
            raise ValueError(f"`{path}` must be a number in [{low}, {high}], got {_shown(value)}.")
    for names, largest, reason in SIZES:
        if not re.fullmatch(rf"(\w*_)?({names})", field):
            continue
        # Quantisers call an axis `dim` too, and the last one is -1.
        smallest = -largest if field.endswith("[]") else -1 if field == "dim" else 0
        if isinstance(value, int) and not smallest <= value <= largest:
            raise ValueError(f"`{path}` must lie in [{smallest:,}, {largest:,}] ({reason}), got {value:,}.")
        if isinstance(value, str) and not field.endswith("[]"):
            raise ValueError(f"`{path}` must be a whole number, got {_shown(value)}.")


def _check_token_id(path: str, field: str, value: Any) -> None:
    several = isinstance(value, (list, tuple)) and field not in ("pad_token_id", "decoder_start_token_id")
    ids = value if several else [value]
    if value is not None and not (ids and all(map(_is_integer, ids))):
        raise ValueError(f"`{path}` must be the id of a token, a whole number, got {_shown(value)}.")


def _number_of_experts(config: Mapping[str, Any], name: str) -> Iterator[tuple[str, int]]:
    """Layers times experts of each model in a configuration."""
    counts = {"layers|n_layer": 1, "experts": 1}
    for field, value in config.items():
        if isinstance(value, Mapping):
            yield from _number_of_experts(value, f"{name}.{field}" if name else str(field))
        for names in counts:
            if _is_integer(value) and re.fullmatch(rf"(\w*_)?({names})", str(field)):
                counts[names] = max(counts[names], value)
    yield name, math.prod(counts.values())


def _check_implementation(path: str, value: Any) -> None:
    if isinstance(value, Mapping):
        value = next((item for item in value.values() if not _is_plain_name(item)), None)
    if not _is_plain_name(value):
        raise ValueError(
            f"`{path}` is {_shown(value)}, expected a name such as 'sdpa': a checkpoint does not choose which kernels are "
            "downloaded and run. Pass the argument to `from_pretrained` if you want these."
        )


def _is_plain_name(value: Any) -> bool:
    return value is None or (isinstance(value, str) and re.fullmatch(r"[\w|]+", value) is not None)


def _check_dtype(path: str, value: Any, floating: bool = False) -> None:
    if value is None or isinstance(value, torch.dtype):
        return
    dtype = getattr(torch, value, None) if isinstance(value, str) else None
    if not isinstance(dtype, torch.dtype) or (floating and not dtype.is_floating_point):
        raise ValueError(f"`{path}` must be the name of a torch dtype such as 'float32', got {_shown(value)}.")


def _check_quantization(path: str, value: Any) -> None:
    if value is None:
        return
    if not isinstance(value, Mapping):
        raise ValueError(f"`{path}` must be an object, got {_shown(value)}.")
    method = value.get("quant_method")
    if method is None and (value.get("load_in_8bit") or value.get("load_in_4bit")):
        return
    if not isinstance(method, str) or method not in {*AUTO_QUANTIZATION_CONFIG_MAPPING, "bitsandbytes"}:
        raise ValueError(
            f"`{path}.quant_method` is {_shown(method)}, expected one of {', '.join(sorted(AUTO_QUANTIZATION_CONFIG_MAPPING))}."
        )


def _check_keys(config: Mapping[str, Any], config_class: type[PreTrainedConfig], prefix: str = "") -> None:
    """No key may hide a method or a property: every key becomes an attribute of the configuration."""
    for key, value in config.items():
        attribute = inspect.getattr_static(config_class, key, None)
        read_only = isinstance(attribute, property) and attribute.fset is None
        method = callable(attribute) or isinstance(attribute, (classmethod, staticmethod))
        if (
            key in _TEXT_PARTS
            and config_class.model_type
            and key not in config_class.sub_configs_defaults
            and value is not None
        ):
            raise ValueError(f"`{prefix}{key}` is no part of a {config_class.__name__}. Take it out of the file.")
        if key.startswith("__") or key in _RESERVED or read_only or method:
            raise ValueError(
                f"`{prefix}{key}` is no field: it would hide an attribute of {config_class.__name__}. Take it out of the file."
            )
        if isinstance(value, Mapping) and (key.endswith("_config") or key in ("encoder", "decoder")):
            model_type = value.get("model_type")
            known = isinstance(model_type, str) and model_type in CONFIG_MAPPING
            _check_keys(value, CONFIG_MAPPING[model_type] if known else PreTrainedConfig, f"{prefix}{key}.")


def check_processor(config: Any) -> None:
    """Raise a `ValueError` for what a `processor_config.json` can't hold. The fusion is checked by the processor itself."""
    if not isinstance(config, Mapping):
        raise ValueError(f"`processor_config.json` must hold an object, got {_shown(config)}.")
    for field in ("shared_tokenizer", "slm_is_encoder_decoder"):
        if not isinstance(value := config.get(field, True), bool):
            raise ValueError(f"`{field}` must be true or false, got {_shown(value)}.")
    for field in ("max_prompt_length", "slm_max_prompt_length"):
        value = config.get(field)
        if value is not None and not (_is_integer(value) and 0 < value <= LARGEST_INTEGER):
            raise ValueError(f"`{field}` must be a positive number of tokens, got {_shown(value)}.")
    _check_token_id("decoder_start_token_id", "decoder_start_token_id", config.get("decoder_start_token_id"))
    template = config.get("chat_template")
    if template is not None and not isinstance(template, str):
        raise ValueError(f"`chat_template` must be a template, a text, got {_shown(template)}.")


# Names and paths -----------------------------------------------------------------------------------------------------------
def _check_name(field: str, value: Any) -> None:
    """A repository or a folder; which of them, and whether it may be followed, is seen when it is: `check_llm_source`."""
    if value is None:
        return
    if not isinstance(value, (str, os.PathLike)) or not str(value).strip():
        raise ValueError(f"`{field}` must be the id of a repository or a local folder, got {_shown(value)}.")
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:", str(value)):
        raise ValueError(
            f"`{field}` must be the id of a repository such as 'org/name', not an address, got {_shown(value)}."
        )


def _check_revision(field: str, value: Any) -> None:
    # The rules of git for names of branches and tags (https://git-scm.com/docs/git-check-ref-format).
    if value is not None and not (
        isinstance(value, str) and re.fullmatch(r"(?!/)(?!.*\.\.)[^\s~^:?*\[\\\x00-\x1f]+", value)
    ):
        raise ValueError(f"`{field}` must be a commit, a branch or a tag, got {_shown(value)}.")


def check_inside(what: str, path: Any) -> None:
    """Raise a `ValueError` if a path in a repository leads out of it. `what` names the field."""
    parts = re.split(r"[/\\]", path) if isinstance(path, str) else [".."]
    if ".." in parts or _is_absolute(path) or "\0" in path or ntpath.splitdrive(path)[0]:
        raise ValueError(f"{what} must lie inside its repository, got {_shown(path)}.")


def check_llm_source(name: str, checkpoint_is_local: bool) -> None:
    """
    Raise a `ValueError` if a checkpoint names an LLM that must not be looked for.

    Args:
        name: The LLM's repository or folder, by the checkpoint.
        checkpoint_is_local: Whether the checkpoint is a folder on this machine. One from the Hub says nothing about them.
    """
    if not _is_local_path(name):
        try:
            validate_repo_id(name)
        except HFValidationError as error:
            raise ValueError(
                f"`llm_name_or_path` is {_shown(name)}, which is neither a folder nor the id of a repository: {error} Pass "
                "the LLM with `llm_name_or_path=` or `llm_model=`, or go without it with `load_llm=False`."
            ) from error
    elif not checkpoint_is_local:
        raise ValueError(
            f"The checkpoint comes from the Hub and names its LLM by {_shown(name)}, a folder on the machine of whoever made "
            "it. Say where the LLM is with `llm_name_or_path=` (the id of its repository, or a folder of yours) or "
            "`llm_model=`, or go without it with `load_llm=False`."
        )


def _is_local_path(name: str) -> bool:
    return os.path.isdir(name) or _is_absolute(name) or name.startswith((".", "~")) or "\\" in name


def _is_absolute(path: str) -> bool:
    return posixpath.isabs(path) or ntpath.isabs(path)


# Files of weights ----------------------------------------------------------------------------------------------------------
def check_weight_index(index: Any, file: str) -> None:
    """
    Check the index of sharded weights before any shard is looked for.

    Args:
        index: What `model.safetensors.index.json` holds.
        file: Its name, for the error.
    """
    shards = index.get("weight_map") if isinstance(index, Mapping) else None
    if not isinstance(shards, Mapping) or not shards or not isinstance(index.get("metadata"), Mapping):
        raise ValueError(f"{file!r} is no index of weights: it must hold the objects `metadata` and `weight_map`.")
    for key, shard in shards.items():
        what = f"The file of {_shown(key)} in {file!r}"
        check_inside(what, shard)
        if not shard.endswith(".safetensors"):
            raise ValueError(f"{what} must be safetensors, got {_shown(shard)}.")


def check_memory(what: str, needed: int, held: int) -> None:
    """
    Raise a `ValueError` if a model is far larger than the files that should fill it, before it gets any memory.

    Args:
        what: What the model is, for the error.
        needed: Numbers in the model's parameters and buffers.
        held: Numbers in its files.
    """
    # Quantised files pack up to 8 numbers into one, and what a model computes (masks, positions) is not in them.
    if needed > 16 * held + 2**24:
        raise ValueError(
            f"{what} would hold {needed:,} numbers, but its files of weights hold {held:,}: its configuration and its files "
            "do not belong together."
        )


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _shown(value: Any) -> str:
    """A value for an error text, however long it is."""
    if _is_integer(value) and value.bit_length() > 128:
        return f"a number of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
