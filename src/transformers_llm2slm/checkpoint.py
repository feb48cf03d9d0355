"""What a checkpoint holds, and putting a loaded model together again, with checks that nothing is guessed.

A checkpoint holds projector and SLM, and names the LLM by repository, commit and fingerprint.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.quantizers.auto import AutoQuantizationConfig
from transformers.utils import CONFIG_NAME, is_peft_available
from transformers.utils.hub import cached_file
from transformers.utils.peft_utils import ADAPTER_SAFE_WEIGHTS_NAME, find_adapter_config_file

from .configuration_llm2slm import LLM_SUBFOLDER, LLM2SLMConfig, encoder_text_config
from .fingerprint import is_exact
from .loading import (
    HUB_ARGUMENTS,
    RAM_EFFICIENT_LOADING,
    adopt_llm,
    check_writes,
    hub_place,
    llm_unreachable,
    load_config,
    load_llm,
    quantization_of,
)
from .reference import check_llm_weights, gone_commit, pin_revision
from .validation import check_config, check_llm_source
from .weight_files import building, check_weight_files, replacing_weights

if TYPE_CHECKING:
    from .modeling_llm2slm import LLM2SLMForConditionalGeneration, LLM2SLMModel


def is_checkpoint_key(name: str) -> bool:
    """Whether a checkpoint holds this key of [`LLM2SLMModel`]: projector and SLM are held, the LLM is only named."""
    return not name.startswith(("llm.", "whole_llm."))


@contextmanager
def llm_left_out(module: LLM2SLMModel) -> Iterator[None]:
    """`module` without its LLM, which is not even visited: 4-bit weights are rewritten when their state dict is asked for."""
    llm, whole = module.llm, module.whole_llm
    # accelerate has put the model on the meta device and asks which weights to fill it with.
    if llm is not None and all(next(part.parameters()).is_meta for part in (llm, module.slm)):
        raise ValueError(RAM_EFFICIENT_LOADING)
    module.llm = module.whole_llm = None
    try:
        yield
    finally:
        module.llm, module.whole_llm = llm, whole


def keep_first_names(module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    """Hook after `state_dict()`: leave out a module's second names. torch.distributed.checkpoint knows the first only."""
    first: dict[nn.Module, str] = {}
    named = module.named_modules(remove_duplicate=False)
    seconds = tuple(f"{prefix}{name}." for name, submodule in named if first.setdefault(submodule, name) != name)
    for key in [key for key in state_dict if key.startswith(seconds)]:
        del state_dict[key]


def checkpoint_state_dict(model: PreTrainedModel, state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint of `model` holds of a state dict that was gathered from several processes: tied weights once."""
    prefix, ties = f"{model.base_model_prefix}.", model.all_tied_weights_keys
    return {
        key: value
        for key, value in state_dict.items()
        if is_checkpoint_key(key.removeprefix(prefix)) and ties.get(key) not in state_dict
    }


def expect_checkpoint_keys(module: nn.Module, incompatible_keys: Any) -> None:
    """Hook after `load_state_dict()`: what a checkpoint does not hold is not missing from it."""
    # Every name counts, of tied weights too; keys come with the prefix that the module has in the model that is loaded.
    named = dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))
    missing = incompatible_keys.missing_keys
    absent = {name for name in named if any(f".{key}".endswith(f".{name}") for key in missing)}
    # A file holds tied weights once, under one of their names.
    loaded = {id(tensor) for name, tensor in named.items() if name not in absent}
    expected = {name for name in absent if not is_checkpoint_key(name) or id(named[name]) in loaded}
    missing[:] = [key for key in missing if not any(f".{key}".endswith(f".{name}") for name in expected)]


def check_checkpoint(name_or_path: str | os.PathLike | None, kwargs: dict[str, Any], finds_llm: bool) -> None:
    """
    Refuse what must not be loaded, before anything is downloaded but its `config.json`, and before anything is built.

    Args:
        name_or_path: Hub id or local folder of a checkpoint, or of an adapter of one; `None` where the caller gives a
            configuration and a state dict.
        kwargs: The arguments of `from_pretrained`. Their `revision` becomes one commit, so that what was checked is loaded.
        finds_llm: Whether the LLM will be looked for where the checkpoint says.

    Raises:
        ValueError: for a configuration or an index that no sound checkpoint has, see [`check_config`].
        OSError: for weights that are not safetensors.
    """
    if name_or_path is None:
        return
    name = os.fspath(name_or_path)
    pin_revision(name, kwargs)
    place = {key: value for key, value in hub_place(kwargs).items() if value is not None}
    base = _base_of_adapter(name, place, kwargs.get("adapter_kwargs") or {})
    if base != name:  # the revision was the adapter's
        name = base
        pin_revision(name, place)
    config = kwargs.get("config")
    if isinstance(config, PreTrainedConfig):
        config = config.to_dict()
    else:
        with building(f"The configuration of {name!r}", ValueError, OSError):
            config, _ = PreTrainedConfig.get_config_dict(name if config is None else config, **place)
        check_config(config, LLM2SLMConfig)
    if config.get("export") is not None:
        raise ValueError(
            f"{name!r} is an export, whose graphs are no weights of this class. Load it with `LLM2SLMExportedModel.from_pretrained` "
            "or `AutoModel.from_pretrained`."
        )
    llm = config.get("llm_name_or_path")
    if finds_llm and llm is not None and not config.get("llm_in_checkpoint"):
        check_llm_source(llm, os.path.isdir(name))
    check_weight_files(name, "", variant=kwargs.get("variant"), **place)


def _base_of_adapter(name: str, place: dict[str, Any], adapter_kwargs: Mapping[str, Any]) -> str:
    """The checkpoint that an adapter of PEFT belongs to, by the rules of transformers; `name` where it is no adapter."""
    # An Auto class has found the base, and `place` is where that is.
    adapter_place: dict[str, Any] = {**place, **adapter_kwargs}
    adapter = adapter_place.pop("_adapter_model_path", None)
    if adapter is None and is_peft_available() and (file := find_adapter_config_file(name, **place)) is not None:
        adapter = name
        if not os.path.exists(os.path.join(name, CONFIG_NAME)):
            with building(f"The adapter {adapter!r}", OSError), open(file, encoding="utf-8") as reader:
                name = os.fspath(json.load(reader)["base_model_name_or_path"])
    if adapter is not None and not cached_file(
        adapter, ADAPTER_SAFE_WEIGHTS_NAME, _raise_exceptions_for_missing_entries=False, **adapter_place
    ):
        raise OSError(
            f"The adapter {adapter!r} has no {ADAPTER_SAFE_WEIGHTS_NAME!r}; pickles, which can run code when they are read, "
            "are not loaded. Save it again with PEFT's `save_pretrained`."
        )
    return name


def check_loaded(name_or_path: Any, info: Mapping[str, Any]) -> None:
    """Raise a `ValueError` if a checkpoint lacked weights: nothing is silently random."""
    missing = sorted(info["missing_keys"])
    mismatched = sorted(map(str, info["mismatched_keys"]))
    if missing or mismatched:
        parts = sorted({part for part in ("projector", "slm") for key in missing if f"{part}." in key})
        shown = ", ".join((missing + mismatched)[:4])
        raise ValueError(
            f"The checkpoint {os.fspath(name_or_path)!r} lacks weights: expected all of projector and SLM, found "
            f"{len(missing)} key(s) of {' and '.join(parts) or 'the model'} missing and {len(mismatched)} of another shape "
            f"({shown}{' ...' if len(missing) + len(mismatched) > 4 else ''}). It is incomplete or belongs to another "
            "configuration: save it again with `model.save_pretrained`, or compose a new model with "
            "`from_llm_slm_pretrained`."
        )


def checkpoint_location(
    model: PreTrainedModel, checkpoint: str | os.PathLike, hub: Mapping[str, Any]
) -> dict[str, Any]:
    """
    The arguments by which a processor is found beside a model that was loaded with the arguments `hub`: at the same commit.

    The token is not among them, as models get pickled and copied about.
    """
    names = ["cache_dir", "local_files_only"]
    if model.name_or_path == str(checkpoint):  # else `checkpoint` is an adapter of PEFT, and the model its base
        names += ["revision", "subfolder"]
    found = {name: hub[name] for name in names if name in hub}
    return {name: getattr(value, "resolved", value) for name, value in found.items()}


def attach_pretrained_llm(
    model: LLM2SLMForConditionalGeneration,
    checkpoint: str | os.PathLike,
    llm_model: PreTrainedModel | None,
    llm_kwargs: dict[str, Any],
    hub: dict[str, Any],
    whole: bool,
) -> None:
    """
    Load the LLM that a checkpoint names (or holds), check that it is the one, and attach it.

    Args:
        model: A model that has just been loaded without its LLM.
        checkpoint: Where it was loaded from.
        llm_model: The LLM, if it is in memory already.
        llm_kwargs: The caller's `llm_*` arguments, without the prefix.
        hub: The caller's arguments for the checkpoint that concern the LLM too.
        whole: Whether to keep the LLM with its LM head, for lossless generation.
    """
    config = model.config
    check = llm_kwargs.pop("check_fingerprint", True)
    if llm_model is not None:
        check_llm_config(config, llm_model.config, "the model in memory")
        loaded = llm_model
        llm = adopt_llm(llm_model)
        if check:
            # What is not exact in memory is known by its files only.
            check_llm_weights(config, llm, None if is_exact(llm) else llm_model.name_or_path or None, {})
    else:
        arguments = {key: value for key, value in hub.items() if key in (*HUB_ARGUMENTS, "device_map")}
        other = llm_kwargs.pop("name_or_path", None)
        own = other is None and config.llm_in_checkpoint
        if own:
            # Where `checkpoint` is an adapter of PEFT, the model is its base, which is elsewhere.
            name = model.name_or_path
            place = hub if name == os.fspath(checkpoint) else {}
            subfolder = "/".join(part for part in (place.get("subfolder"), LLM_SUBFOLDER) if part)
            arguments |= {"revision": place.get("revision"), "subfolder": subfolder}
        else:
            name = other or config.llm_name_or_path
            if name is None:
                raise ValueError(
                    "The checkpoint names no LLM: it was composed of a model in memory. Pass that model with "
                    "`llm_model=`, a local copy with `llm_name_or_path=`, or go without it with `load_llm=False`."
                )
            if other is None or other == config.llm_name_or_path:
                arguments["revision"] = config.llm_revision
            arguments["subfolder"] = config.llm_subfolder
        arguments["dtype"] = config.llm_dtype or "auto"
        arguments |= llm_kwargs
        arguments = {key: value for key, value in arguments.items() if value not in (None, "")}
        loaded = _load_checked(config, name, arguments, "quantization_config" not in llm_kwargs, whole)
        llm = adopt_llm(loaded) if whole else loaded
        # The files of a checkpoint's own LLM hold it as it was in memory, rounded or quantised.
        if check and (is_exact(llm) or not own):
            check_llm_weights(config, llm, name, arguments)
    model.model.attach_llm(llm, check_writes(loaded) if whole else None)
    config.llm_dtype, config.llm_quantization_config = llm.dtype, quantization_of(llm)


def save_llm_of(
    model: LLM2SLMForConditionalGeneration,
    folder: str | os.PathLike,
    is_main_process: bool,
    kwargs: Mapping[str, Any],
) -> None:
    """
    Save the LLM of a model in the subfolder `llm/` of its checkpoint.

    Args:
        model: The model.
        folder: Where its checkpoint is saved.
        is_main_process: Whether this process writes. Of an LLM that is sharded, all must take part.
        kwargs: The other arguments of `save_pretrained`; of them, `max_shard_size` is the LLM's too.

    Raises:
        ValueError: if there is no LLM, or its weights can't be written.
    """
    if model.llm is None:
        raise ValueError("`save_llm=True` needs the LLM, but this model was loaded with `load_llm=False`.")
    check_can_be_saved(model.llm)
    # transformers can't turn quantised weights back into the files that they were loaded from.
    original = quantization_of(model.llm) is None
    llm = model.llm if model.model.whole_llm is None else model.model.whole_llm
    shards = {name: value for name, value in kwargs.items() if name == "max_shard_size"}
    place = os.path.join(folder, LLM_SUBFOLDER)
    with replacing_weights(place, is_main_process):
        llm.save_pretrained(place, is_main_process, save_original_format=original, **shards)


def check_can_be_saved(llm: PreTrainedModel) -> None:
    """Raise a `ValueError` if the weights of an LLM in memory can't be written as they were read."""
    states = [getattr(parameter, "quant_state", None) for parameter in llm.parameters()]
    # bitsandbytes 0.50 rearranges 4-bit weights for CPUs with AVX512-BF16 in their first pass, and its way back loses
    # the order of their scales (`_convert_weight_packed_for_cpu_inverse`).
    if any(getattr(state, "packing_format_for_cpu", False) for state in states):
        raise ValueError(
            "`save_llm=True` can't write this 4-bit LLM: bitsandbytes has rearranged its weights for this CPU and can't "
            "restore them. Load the model anew and save it before it reads a prompt, or save without `save_llm=True`."
        )


def record_llm_precision(config: LLM2SLMConfig, llm_kwargs: Mapping[str, Any]) -> None:
    """Let the config of a model that is loaded without its LLM say in which precision the caller wants the LLM."""
    if "dtype" in llm_kwargs:
        config.llm_dtype = None if llm_kwargs["dtype"] == "auto" else llm_kwargs["dtype"]
    if "quantization_config" in llm_kwargs:
        quantization = llm_kwargs["quantization_config"]
        config.llm_quantization_config = quantization.to_dict() if hasattr(quantization, "to_dict") else quantization


def _load_checked(
    config: LLM2SLMConfig, name: str, arguments: dict[str, Any], quantise_as_recorded: bool, whole: bool
) -> PreTrainedModel:
    try:
        llm_config = load_config(name, arguments, "llm")
    except (OSError, ValueError) as error:
        if text := gone_commit(config, error, arguments):
            raise OSError(text) from error
        if isinstance(error, OSError):
            raise OSError(llm_unreachable(name, arguments.get("revision"), error)) from error
        raise
    check_llm_config(config, llm_config, repr(name))
    # Files that hold the LLM quantised say themselves how.
    if quantise_as_recorded and config.llm_quantization_config and not hasattr(llm_config, "quantization_config"):
        with building("`llm_quantization_config`"):
            quantization = AutoQuantizationConfig.from_dict(dict(config.llm_quantization_config))
        arguments = arguments | {"quantization_config": quantization}
    return load_llm(name, config=llm_config, whole=whole, **arguments)


def check_llm_config(config: LLM2SLMConfig, llm_config: PreTrainedConfig, found: str) -> None:
    """Raise a `ValueError` if an LLM has not the architecture that the checkpoint was trained with."""
    expected, given = encoder_text_config(config.llm_config), encoder_text_config(llm_config)
    for name in ("model_type", "hidden_size", "num_hidden_layers", "vocab_size"):
        if getattr(expected, name, None) != getattr(given, name, None):
            raise ValueError(
                f"The LLM is not the one this model was trained with: expected `{name}` "
                f"{getattr(expected, name, None)!r} ({config.llm_name_or_path!r}), found {getattr(given, name, None)!r} "
                f"({found}). Pass the right LLM with `llm_name_or_path=` or `llm_model=`."
            )
