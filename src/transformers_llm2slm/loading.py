"""Loading the two models: the LLM without what it never runs, the SLM whole or cut from the LLM."""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.integrations import is_fsdp_enabled
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    MODEL_MAPPING,
)
from transformers.utils.output_capturing import maybe_install_capturing_hooks

from .configuration_llm2slm import decoder_text_config, encoder_text_config
from .structure import DroppedModule, drop_module, layer_list, position_limit
from .validation import check_values
from .weight_files import building, check_weight_files, load_compared

# Arguments of `from_pretrained` that say where files come from; they reach every loader unless given for one part.
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token", "proxies")
REMOTE_CODE_ARGUMENTS = ("trust_remote_code", "code_revision")


def take_prefixed(kwargs: dict[str, Any], prefix: str) -> dict[str, Any]:
    """Pop the arguments whose names start with `prefix`; return them without it."""
    return {key[len(prefix) :]: kwargs.pop(key) for key in list(kwargs) if key.startswith(prefix)}


def location(kwargs: Mapping[str, Any], *more: str) -> dict[str, Any]:
    """
    The arguments by which the files of a repository are loaded: those of `kwargs` that say where they come from, and any of
    the names in `more`. No code of the repository is run unless these ask for it; transformers would ask the terminal.
    """
    return {"trust_remote_code": False} | hub_place(kwargs, *more)


def hub_place(kwargs: Mapping[str, Any], *more: str) -> dict[str, Any]:
    """Those of the arguments of a `from_pretrained` that say where files come from, and any of the names in `more`."""
    names = (*HUB_ARGUMENTS, "revision", "subfolder", *more)
    return {key: value for key, value in kwargs.items() if key in names}


def for_auto_class(kwargs: dict[str, Any]) -> dict[str, Any]:
    """
    Arguments for the `from_pretrained` of an Auto class. It would ask the terminal whether to run code, and looks for an
    adapter first: of what says where files come from, it passes only token and revision on to that.
    """
    place = {key: value for key, value in hub_place(kwargs).items() if key not in ("token", "revision")}
    return {"trust_remote_code": False, "adapter_kwargs": place} | kwargs


def check_files(name_or_path: str, kwargs: dict[str, Any], part: str) -> dict[str, Any]:
    """
    Arguments to load the `part` (`"llm"` or `"slm"`) with: from safetensors, which are checked first, unless
    `use_safetensors=False` asks for pickles.
    """
    if kwargs.get("use_safetensors") is False or kwargs.get("gguf_file"):
        return kwargs
    accept = f", or accept them with `{part}_use_safetensors=False`"
    check_weight_files(name_or_path, accept, variant=kwargs.get("variant"), **hub_place(kwargs))
    return kwargs | {"use_safetensors": True}


def load_config(name_or_path: str, kwargs: Mapping[str, Any], part: str) -> PreTrainedConfig:
    """
    The configuration of the `part` (`"llm"` or `"slm"`) by its own repository, whose `config.json` is checked first.

    Raises:
        OSError: if it can't be reached.
        ValueError: if it is not sound, or takes code of the repository that the arguments `kwargs` don't trust.
    """
    try:
        with building(f"The {part.upper()} {name_or_path!r}", ValueError, OSError):
            if not kwargs.get("gguf_file"):
                content, _ = PreTrainedConfig.get_config_dict(name_or_path, **location(kwargs))
                check_values(content, f"{part}_config")
            return AutoConfig.from_pretrained(name_or_path, **location(kwargs, *REMOTE_CODE_ARGUMENTS))
    except ValueError as error:
        if "custom code" not in str(error):
            raise
        raise ValueError(f"{error}\nFor this model the argument is `{part}_trust_remote_code=True`.") from error


# With this setting accelerate gives all processes but the first their weights from the model's state dict.
RAM_EFFICIENT_LOADING = (
    "`fsdp_cpu_ram_efficient_loading` hands on what the first process has in the model's state dict, and the frozen LLM "
    "is not in it. Set `fsdp_cpu_ram_efficient_loading: false` in the configuration of accelerate, so that each process "
    "loads the LLM, or train on cached LLM states with `load_llm=False`."
)


# The LLM -----------------------------------------------------------------------------------------------------------------
@functools.cache
def reading_class(model_class: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """
    A subclass of `model_class` that has only what reading takes: no decoder behind an encoder, no pooler.

    Its `from_pretrained` reads a whole checkpoint's files and never allocates what it leaves out. What a checkpoint has
    beyond it (an LM head, say) is no concern; what is missing is, and `load_llm` checks that.
    """

    def __init__(self: PreTrainedModel, config: PreTrainedConfig, **kwargs: Any) -> None:
        with building(f"The LLM, a {model_class.__name__},"):
            model_class.__init__(self, config, **kwargs)
        if config.is_encoder_decoder:
            drop_module(self, self.get_decoder(), "The LLM's decoder")
        if isinstance(getattr(self, "pooler", None), nn.Module):
            self.pooler = None

    def __reduce_ex__(self: PreTrainedModel, protocol: Any) -> tuple[Any, ...]:
        return _empty_reader, (model_class,), self.__dict__

    namespace = {"__init__": __init__, "__module__": model_class.__module__, "__doc__": model_class.__doc__}
    namespace |= {"__reduce_ex__": __reduce_ex__}  # pickle would look for this class by its name
    namespace |= {"_load_pretrained_model": staticmethod(load_compared), "_keys_to_ignore_on_load_unexpected": [r".*"]}
    return type(model_class.__name__, (model_class,), namespace)


def _empty_reader(model_class: Any) -> PreTrainedModel:
    """What unpickling fills."""
    reader: Any = reading_class(model_class)
    return reader.__new__(reader)


def llm_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class that reads with a model of this configuration. Raises a `ValueError` where none can."""
    if type(config) not in MODEL_MAPPING:
        raise ValueError(
            f"A `{config.model_type}` model can't be the LLM: transformers has no `AutoModel` for "
            f"{type(config).__name__}. Choose an LLM that `AutoModel` loads."
        )
    model_class = MODEL_MAPPING[type(config)]
    model_class = model_class[0] if isinstance(model_class, (tuple, list)) else model_class
    if (main_input := model_class.main_input_name) != "input_ids":
        raise ValueError(
            f"{model_class.__name__} can't be the LLM: it reads `{main_input}`, not text. Choose an LLM that reads "
            "`input_ids`."
        )
    return reading_class(model_class)


def llm_skeleton(config: PreTrainedConfig) -> PreTrainedModel:
    """The LLM's reading part as its configuration makes it, not quantised, without memory for its weights."""
    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        return llm_class(config)(config)


def llm_position_limit(config: PreTrainedConfig) -> int | None:
    """The longest prompt in tokens that an LLM of this configuration takes, `None` where there is no limit."""
    text_config = encoder_text_config(config)
    if position_limit(text_config) is None or type(config) not in MODEL_MAPPING:
        return position_limit(text_config)
    return position_limit(text_config, llm_skeleton(config))


def load_llm(
    name_or_path: str, config: PreTrainedConfig | None = None, whole: bool = False, **kwargs: Any
) -> PreTrainedModel:
    """
    Load the LLM's reading part from a hub repository or a local folder, frozen and in eval mode.

    Args:
        name_or_path (`str`): Hub id or local folder.
        config (`PreTrainedConfig`, *optional*): Its configuration; loaded if not given.
        whole (`bool`, defaults to `False`): Load all of it, with what it writes with.
        kwargs: Arguments of `from_pretrained` (dtype, device_map, quantization_config, revision, token ...).

    Raises:
        OSError: if it can't be reached; the text says how to go on without it.
        ValueError: if its checkpoint lacks weights, or if FSDP lets only the first process load any.
    """
    if is_fsdp_enabled():
        raise ValueError(RAM_EFFICIENT_LOADING)
    try:
        if config is None:
            config = load_config(name_or_path, kwargs, "llm")
        kwargs = check_files(name_or_path, kwargs, "llm") | {
            "output_loading_info": True,
            "ignore_mismatched_sizes": True,
        }
        # A copy, as a model may change the config it is given, and another model's loading must not see it.
        config = copy.deepcopy(config)
        model_class: Any
        if whole:
            model_class, kwargs = slm_auto_class(config, "an LLM that verifies"), for_auto_class(kwargs)
        elif kwargs.get("trust_remote_code") and type(config) not in MODEL_MAPPING:
            model_class, kwargs = AutoModel, for_auto_class(kwargs)
        else:
            model_class = llm_class(config)
        with building(f"The LLM {name_or_path!r}", ValueError, OSError):
            llm, info = model_class.from_pretrained(name_or_path, config=config, **kwargs)
    except OSError as error:
        raise OSError(llm_unreachable(name_or_path, kwargs.get("revision"), error)) from error
    # What a family computes and so leaves out of its checkpoints (sinusoidal positions), it names with any prefix.
    computed = tuple(llm._keys_to_ignore_on_load_missing or ())
    missing = [key for key in info["missing_keys"] if not any(name.endswith(key) for name in computed)]
    if missing or info["mismatched_keys"]:
        raise ValueError(
            f"The checkpoint {name_or_path!r} does not hold the whole LLM {type(llm).__name__}: missing "
            f"{_some(missing)}, of another shape {_some(info['mismatched_keys'])}. Check that "
            "`llm_name_or_path` and its config belong together."
        )
    return freeze(llm)


def llm_unreachable(name_or_path: str, revision: str | None, error: OSError) -> str:
    """What to tell of an LLM that could not be loaded, and how to go on without it."""
    at = f" (revision {revision})" if revision else ""
    return (
        f"The frozen LLM {name_or_path!r}{at} could not be loaded: {error}\nPass a local copy with `llm_name_or_path=`, a "
        "model in memory with `llm_model=`, or go without it with `load_llm=False` (training on cached states, or writing "
        "from prompts encoded elsewhere)."
    )


def adopt_llm(model: PreTrainedModel) -> PreTrainedModel:
    """The reading part of an LLM that is already in memory, sharing its weights and so freezing them; `model` itself still writes."""
    body = model.base_model
    llm = llm_skeleton(model.config)
    for store in ("_modules", "_parameters", "_buffers"):
        for name, part in getattr(llm, store).items():
            if part is not None and hasattr(body, name) and not isinstance(part, DroppedModule):
                getattr(llm, store)[name] = getattr(body, name)
    if any(parameter.is_meta for parameter in llm.parameters()):
        raise ValueError(
            f"A {type(model).__name__} can't be the LLM: it lacks parts of {type(llm).__name__}. Pass a model that "
            "`AutoModel` loads."
        )
    if getattr(model, "hf_quantizer", None) is not None:
        # Without these it would be saved as if it were not quantised.
        llm.hf_quantizer = model.hf_quantizer
        llm.config.quantization_config = model.config.quantization_config
    if not model.config.is_encoder_decoder:  # of one that is, the encoder is one object in both
        # transformers takes hidden states by hooks on the layers, set once for each model that is asked, and these are of two.
        maybe_install_capturing_hooks(body)
        llm._output_capturing_hooks_installed = True
    return freeze(llm)


def check_writes(llm: PreTrainedModel) -> PreTrainedModel:
    """`llm`, if it is whole. Raises a `ValueError` for one that reads only."""
    if llm.get_output_embeddings() is None:
        raise ValueError(
            f"A {type(llm).__name__} can't verify what the SLM drafts: it has no LM head. Pass the LLM as "
            f"{slm_auto_class(llm.config, 'an LLM that verifies').__name__}."
        )
    return llm


def freeze(llm: PreTrainedModel) -> PreTrainedModel:
    """Frozen, in eval mode."""
    llm.requires_grad_(False)
    return llm.eval()


def quantization_of(llm: PreTrainedModel) -> dict[str, Any] | None:
    """How an LLM is quantised, `None` if it is not."""
    quantizer = getattr(llm, "hf_quantizer", None)
    return None if quantizer is None else quantizer.quantization_config.to_dict()


# The SLM -----------------------------------------------------------------------------------------------------------------
def slm_auto_class(config: PreTrainedConfig, part: str = "the SLM") -> Any:
    """The Auto class that writes with a model of this configuration. Raises a `ValueError` where none can."""
    mapping = MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING if config.is_encoder_decoder else MODEL_FOR_CAUSAL_LM_MAPPING
    auto_class = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    if type(config) not in mapping and not hasattr(config, "auto_map"):
        raise ValueError(
            f"A `{config.model_type}` model can't be {part}: transformers has no `{auto_class.__name__}` for "
            f"{type(config).__name__}, so it can't write. Choose one that generates text."
        )
    return auto_class


def build_slm(config: PreTrainedConfig) -> PreTrainedModel:
    """An SLM of this configuration, of transformers' own code, with new weights."""
    auto_class = slm_auto_class(config)
    with building(f"The SLM, a `{config.model_type}` model,"):
        return auto_class.from_config(config, trust_remote_code=False)


def load_slm(name_or_path: str, **kwargs: Any) -> PreTrainedModel:
    """Load the SLM with its LM head. Raises a `ValueError` if its checkpoint lacks weights."""
    config = load_config(name_or_path, kwargs, "slm")
    kwargs = for_auto_class(check_files(name_or_path, kwargs, "slm"))
    slm, info = slm_auto_class(config).from_pretrained(name_or_path, config=config, output_loading_info=True, **kwargs)
    if info["missing_keys"] or info["mismatched_keys"]:
        raise ValueError(
            f"The checkpoint {name_or_path!r} does not hold a whole SLM {type(slm).__name__}: missing "
            f"{_some(info['missing_keys'])}, of another shape {_some(info['mismatched_keys'])}. An SLM must be a "
            "pretrained model that writes, with its LM head."
        )
    return slm


def cut_slm(llm: PreTrainedModel, layers: int | Sequence[int]) -> tuple[PreTrainedModel, list[int]]:
    """
    Cut an SLM from the LLM, as Distil-Whisper does: some of its decoder layers, with its embeddings and head.

    Args:
        llm (`PreTrainedModel`): The whole LLM, with its LM head.
        layers (`int` or `Sequence[int]`): The decoder layers to keep. A number `k` stands for the top `k` layers of a
            decoder-only LLM, and for `k` evenly spaced ones, first and last among them, of an encoder-decoder LLM.

    Returns:
        The SLM (its own copy of the weights), and the indices of the layers that it keeps.

    Raises:
        ValueError: for layers that the LLM has not, or that would be of another kind where they come to stand in the SLM.
    """
    config, layers = cut_config(llm, layers)
    prefix, _ = decoder_layers(llm)
    pattern = re.compile(rf"^{re.escape(prefix)}\.(\d+)\.(.*)$")
    source = llm.state_dict()
    with torch.device("meta"):
        expected = type(llm)(copy.deepcopy(config)).state_dict().keys()
    taken = {}
    for key in expected:
        match = pattern.match(key)
        old = key if match is None else f"{prefix}.{layers[int(match[1])]}.{match[2]}"
        # What only the first layer has (T5's relative attention bias) is taken from the LLM's first layer.
        taken[key] = old if match is None or old in source else f"{prefix}.0.{match[2]}"
    held = {key for key in source if (match := pattern.match(key)) and int(match[1]) in layers}
    # Layers of several kinds (dense and of experts, attention and recurrence), which a configuration tells by their place.
    if odd := (held - set(taken.values())) | (set(taken.values()) - source.keys()):
        raise ValueError(
            f"A {type(llm).__name__} can't be cut to its layers {layers}: where they would stand in the SLM, its configuration "
            f"asks for layers of another kind (which have no place, or no weights, for {_some(odd)}). Name layers of the kinds "
            "that it begins with."
        )
    state_dict = {key: source[old].clone() for key, old in taken.items()}
    slm, info = type(llm).from_pretrained(
        None, config=config, state_dict=state_dict, dtype=llm.dtype, output_loading_info=True
    )
    if info["missing_keys"]:
        raise ValueError(f"A {type(llm).__name__} can't be cut: found no weights for {_some(info['missing_keys'])}.")
    slm.generation_config = copy.deepcopy(llm.generation_config)
    return slm, layers


def cut_config(llm: PreTrainedModel, layers: int | Sequence[int]) -> tuple[PreTrainedConfig, list[int]]:
    """The configuration of an SLM that [`cut_slm`] cuts from the LLM, and the layers that it keeps. No weights are read."""
    _, total = decoder_layers(llm)
    chosen = _chosen_layers(layers, total, evenly=llm.config.is_encoder_decoder)
    config = copy.deepcopy(llm.config)
    _keep_layers(config, total, chosen)
    return config, chosen


def decoder_layers(llm: PreTrainedModel) -> tuple[str, int]:
    """Name and length of the list of the LLM's decoder layers."""
    decoder = llm.get_decoder()
    text_config = decoder_text_config(llm.config)
    counts = [getattr(text_config, name, None) for name in _LAYER_COUNTS]
    decoder_name = next(name for name, module in llm.named_modules() if module is decoder)
    for count in counts:
        if isinstance(count, int):
            try:
                name = layer_list(decoder, count)
            except ValueError:
                continue
            return f"{decoder_name}.{name}" if decoder_name else name, count
    raise ValueError(f"A {type(llm).__name__} can't be cut: found no list of layers in its {type(decoder).__name__}.")


# What configurations call the number of decoder layers, most specific first.
_LAYER_COUNTS = ("decoder_layers", "num_decoder_layers", "num_hidden_layers", "num_layers")


def _chosen_layers(layers: int | Sequence[int], total: int, evenly: bool) -> list[int]:
    if isinstance(layers, int):
        if not 1 <= layers <= total:
            raise ValueError(
                f"`slm_layers` must lie in [1, {total}] for an LLM of {total} decoder layers, got {layers}."
            )
        if evenly:
            return sorted({round(i * (total - 1) / max(layers - 1, 1)) for i in range(layers)})
        return list(range(total - layers, total))
    chosen = [layer + total if layer < 0 else layer for layer in layers]
    if not chosen or any(not 0 <= layer < total for layer in chosen):
        raise ValueError(
            f"`slm_layers` must name layers in [0, {total - 1}] of the LLM's decoder, got {list(layers)}."
        )
    return chosen


def _keep_layers(config: PreTrainedConfig, total: int, layers: list[int]) -> None:
    """Make `config` that of a model with these decoder layers: their count, and whatever is listed layer by layer."""
    text_config = decoder_text_config(config)
    decoder_only = not config.is_encoder_decoder or text_config is not config
    for key, value in list(vars(text_config).items()):
        if isinstance(value, (list, tuple)) and len(value) == total:
            setattr(text_config, key, [value[layer] for layer in layers])
    names = _LAYER_COUNTS if decoder_only else _LAYER_COUNTS[:2]
    for name in names:
        if isinstance(getattr(text_config, name, None), int):
            setattr(text_config, name, len(layers))


def _some(keys: Sequence[Any] | set[Any]) -> str:
    """A few of many keys, for an error text."""
    keys = sorted(map(str, keys))
    return ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "") if keys else "none"
