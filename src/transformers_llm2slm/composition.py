"""Composing a model of two, and putting a loaded one together again, with checks that nothing is guessed."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from transformers import AutoTokenizer, GenerationConfig, PreTrainedConfig, PreTrainedModel

from .configuration_llm2slm import (
    FUSIONS,
    PROJECTOR_INITS,
    LLM2SLMConfig,
    check_choice,
    decoder_text_config,
    encoder_text_config,
)
from .loading import (
    HUB_ARGUMENTS,
    adopt_llm,
    check_writes,
    cut_slm,
    load_llm,
    load_slm,
    location,
    quantization_of,
    slm_auto_class,
    take_prefixed,
)
from .probes import check_can_read, check_can_write, check_keeps_key_values, keeps_key_values
from .reference import pin_revision, reference_to
from .structure import named_dtype

if TYPE_CHECKING:
    from .modeling_llm2slm import LLM2SLMForConditionalGeneration
    from .processing_llm2slm import LLM2SLMProcessor

# Arguments of `from_llm_slm_pretrained` that are fields of the configuration.
CONFIG_ARGUMENTS = (
    "llm_layer",
    "slm_encoder",
    "projector_hidden_size",
    "projector_num_layers",
    "projector_activation",
    "projector_norm",
)


def compose(
    cls: type[LLM2SLMForConditionalGeneration],
    llm: str | os.PathLike | PreTrainedModel,
    slm: str | os.PathLike | PreTrainedModel | None,
    *,
    slm_layers: int | Sequence[int] | None = None,
    fusion: str | None = None,
    projector_init: str | None = None,
    fit_prompts: Sequence[str] | None = None,
    fit_target: str | int = "embeddings",
    processor: LLM2SLMProcessor | None = None,
    load_llm: bool | str = True,
    **kwargs: Any,
) -> LLM2SLMForConditionalGeneration:
    """See [`LLM2SLMForConditionalGeneration.from_llm_slm_pretrained`]."""
    check_choice("load_llm", load_llm, (True, "whole"))
    given = {name: kwargs.pop(name, None) for name in CONFIG_ARGUMENTS}
    fields = {name: value for name, value in given.items() if value is not None}
    shared = {key: kwargs.pop(key) for key in (*HUB_ARGUMENTS, "dtype", "trust_remote_code") if key in kwargs}
    llm_kwargs, slm_kwargs = shared | take_prefixed(kwargs, "llm_"), shared | take_prefixed(kwargs, "slm_")
    if kwargs:
        raise TypeError(
            f"`from_llm_slm_pretrained` got unknown argument(s) {', '.join(sorted(kwargs))}. Arguments for one of the two "
            "models start with `llm_` or `slm_`."
        )
    if (slm is None) == (slm_layers is None):
        raise ValueError("Give either an SLM, or `slm_layers` to cut one from the LLM, and not both.")
    if fusion is not None:
        check_choice("fusion", fusion, FUSIONS)
    if projector_init is not None:
        check_choice("projector_init", projector_init, PROJECTOR_INITS)
    if projector_init == "fit" and not fit_prompts:
        raise ValueError('`projector_init="fit"` needs `fit_prompts=`: a few hundred prompts like those of your task.')

    llm_source, slm_source = _source(llm), _source(slm)
    if llm_source is not None:
        pin_revision(llm_source, llm_kwargs)
    # Of an SLM in memory, nobody knows which commit it is.
    in_memory = slm_source is None or isinstance(slm, PreTrainedModel)
    slm_commit = None if in_memory else pin_revision(slm_source, slm_kwargs)
    whole, slm_model = _load_parts(llm, slm, slm_layers, llm_kwargs, slm_kwargs, load_llm == "whole")
    llm_model = adopt_llm(whole) if isinstance(llm, PreTrainedModel) or load_llm == "whole" else whole
    if slm_layers is not None:
        slm_model, fields["slm_layers"] = slm_model
        fields, fusion, projector_init = defaults_of_cut(llm_model, fields, fusion, projector_init)
    elif fields.get("slm_encoder", "keep") == "keep":
        check_can_write(slm_model)
    if fusion == "kv":
        fields = defaults_of_key_values(llm_model.config, slm_model.config, fields)
    tokenizers = (llm_source, slm_source, llm_kwargs, slm_kwargs)
    if slm_layers is not None:  # what is cut from the LLM has its tokenizer
        tokenizers = (llm_source, llm_source, llm_kwargs, llm_kwargs)
    fusion = _choose_fusion(fusion, fields, processor, *tokenizers)
    projector_init = projector_init or "random"
    if fusion == "kv" and projector_init not in ("random", "identity"):
        raise ValueError(
            f'`fusion="kv"` takes `projector_init="identity"` (equal heads) or `"random"`, got {projector_init!r}. Others '
            'are for hidden states: set `fusion="replace"`.'
        )
    if projector_init == "zero" and fusion not in ("add", "align"):
        raise ValueError(
            f'`projector_init="zero"` needs `fusion="add"` or `"align"`, got {fusion!r}: nothing of the prompt would reach '
            "the SLM. Choose another initialisation."
        )

    config = LLM2SLMConfig(
        llm_config=_plain(llm_model.config),
        # A copy: a config sets the attention implementation of its parts anew, and the SLM has chosen its own.
        slm_config=copy.deepcopy(slm_model.config),
        fusion=fusion,
        projector_init=projector_init,
        projector_residual=projector_init == "identity",
        **reference_to(llm_model, llm_source, llm_kwargs, isinstance(llm, PreTrainedModel)),
        llm_dtype=llm_model.dtype,
        llm_quantization_config=quantization_of(llm_model),
        slm_name_or_path=slm_source,
        slm_revision=slm_commit,
        dtype=slm_model.dtype,
        **fields,
    )
    check_can_read(llm_model, config)
    if fusion == "kv":
        check_keeps_key_values(llm_model, config.llm_config, "LLM")
        check_keeps_key_values(slm_model, config.slm_config, "SLM")
    # A fit takes its goals from the SLM's encoder too, which "skip" drops.
    whole_slm = copy.deepcopy(slm_model) if config.slm_encoder == "skip" and projector_init == "fit" else slm_model
    generation_config = slm_model.generation_config
    model = cls(config, slm=slm_model)
    model.projector.to(device=slm_model.device, dtype=slm_model.dtype)
    model.generation_config = _with_pad_token(generation_config)
    model.model.attach_llm(llm_model, check_writes(whole) if load_llm == "whole" else None)
    model.name_or_path = ""
    model.checkpoint_location = {"cache_dir": shared["cache_dir"]} if "cache_dir" in shared else {}
    if fit_prompts and projector_init == "fit":
        from .fit import fit_projector

        if processor is None:
            processor = _processor(*tokenizers, fusion)
        fit_projector(model, processor, fit_prompts, target=fit_target, slm=whole_slm)
    return model.eval()


def _load_parts(
    llm: Any, slm: Any, slm_layers: Any, llm_kwargs: dict[str, Any], slm_kwargs: dict[str, Any], keep_whole: bool
) -> tuple[PreTrainedModel, Any]:
    """LLM and SLM; a cut SLM comes with its layers. The LLM is whole if it is in memory or to be kept so."""
    llm_source = _source(llm)
    if slm_layers is not None:
        in_memory = isinstance(llm, PreTrainedModel)
        # What is cut is trained, so it is cut from the LLM as stored, or in the SLM's own precision.
        as_stored = {key: value for key, value in llm_kwargs.items() if key not in ("quantization_config", "dtype")}
        as_stored |= {key: value for key, value in slm_kwargs.items() if key == "dtype"}
        whole = llm if in_memory else load_slm(llm_source, **as_stored)
        if whole.get_output_embeddings() is None:
            raise ValueError(
                f"An SLM can't be cut from a {type(whole).__name__}: it has no LM head to write with. Pass the LLM as "
                f"{slm_auto_class(whole.config).__name__}, or name an SLM."
            )
        if quantization_of(whole) is not None:
            raise ValueError(
                f"An SLM can't be cut from a quantised {type(whole).__name__}: its weights can't be trained. Name a "
                "repository that holds the LLM unquantised, and say with `llm_quantization_config=` how it is to read."
            )
        if unknown := sorted(slm_kwargs.keys() - llm_kwargs.keys() - {"dtype"}):
            raise TypeError(
                f"An SLM cut from the LLM is not loaded, so `slm_{unknown[0]}` says nothing; leave it out."
            )
        slm_model, layers = cut_slm(whole, slm_layers)
        if (dtype := named_dtype(slm_kwargs.get("dtype"))) is not None:
            slm_model = slm_model.to(dtype)
        alike = as_stored | {"dtype": whole.dtype} == llm_kwargs | {"dtype": named_dtype(llm_kwargs.get("dtype"))}
        if not in_memory and as_stored != llm_kwargs and not alike:
            whole = load_llm(llm_source, whole=keep_whole, **llm_kwargs)
        elif not in_memory and not keep_whole:
            whole = adopt_llm(whole)
        return whole, (slm_model, layers)
    llm_model = llm if isinstance(llm, PreTrainedModel) else load_llm(llm_source, whole=keep_whole, **llm_kwargs)
    slm_model = slm if isinstance(slm, PreTrainedModel) else load_slm(_source(slm), **slm_kwargs)
    if slm_model.base_model is llm_model.base_model:  # the LLM is frozen, and the SLM trained
        slm_model = copy.deepcopy(slm_model)
    slm_auto_class(slm_model.config)
    return llm_model, slm_model


def _source(model: str | os.PathLike | PreTrainedModel | None) -> Any:
    """Where a model is from: what the caller gave, or what a model in memory was loaded from, if anything."""
    if isinstance(model, PreTrainedModel):
        return model.name_or_path or None
    return None if model is None else os.fspath(model)


def _plain(config: PreTrainedConfig) -> PreTrainedConfig:
    """A copy of a model's config without how it happens to be held in memory."""
    config = type(config).from_dict(config.to_dict())
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def _with_pad_token(generation_config: GenerationConfig) -> GenerationConfig:
    """Decoder-only models often name no padding token; generation then pads with the end of sequence and says so."""
    if generation_config.pad_token_id is None and (eos := generation_config.eos_token_id) is not None:
        generation_config.pad_token_id = eos[0] if isinstance(eos, list) else eos
    return generation_config


def defaults_of_cut(
    llm: PreTrainedModel, fields: dict[str, Any], fusion: str | None, projector_init: str | None
) -> tuple[dict[str, Any], str | None, str | None]:
    """
    Defaults for an SLM cut from the LLM. Of a decoder-only LLM they make its keys and values over the prompt exactly those of the
    LLM before any training: it is given them or, where the LLM keeps others or none, starts where the layer below it ends.
    """
    layers = fields["slm_layers"]
    if llm.config.is_encoder_decoder:
        fields.setdefault("slm_encoder", "skip")
    else:
        fusion = fusion or ("kv" if keeps_key_values(llm) else "replace")
        total = encoder_text_config(llm.config).num_hidden_layers
        if fusion != "kv" and layers == list(range(total - len(layers), total)):
            fields.setdefault("llm_layer", total - len(layers))
    return fields, fusion or "replace", projector_init or "identity"


def defaults_of_key_values(llm: PreTrainedConfig, slm: PreTrainedConfig, fields: dict[str, Any]) -> dict[str, Any]:
    """Defaults for `fusion="kv"`: each layer of a cut SLM gets what it had in the LLM, one of another SLM what is as high up."""
    fields.setdefault("projector_num_layers", 1)
    layers, total = (decoder_text_config(part).num_hidden_layers for part in (slm, llm))
    if "llm_layer" not in fields:
        fields["llm_layer"] = fields.get("slm_layers") or [
            round(index * (total - 1) / max(layers - 1, 1)) for index in range(layers)
        ]
    return fields


# Tokenizers --------------------------------------------------------------------------------------------------------------
# Texts on which two tokenizers that are called equal must agree: case, digits, runs of spaces, scripts, code, emoji.
_PROBES = (
    "Translate English to German: The house is wonderful, isn't it?",
    "  Two  spaces,\ttabs\nand 1234567890 digits: 3.14159 \u20ac99",
    "na\u00efve caf\u00e9 \u00df \u0416\u0443\u043a \u6f22\u5b57 \U0001f642",
    "def f(x):\n    return x ** 2  # comment",
)


def tokenizers_equal(first: Any, second: Any) -> bool:
    """Whether two tokenizers turn every text into the same tokens, special ones included: equal vocabularies, and equal
    tokens on probe texts."""
    if first is second:
        return True
    if first.get_vocab() != second.get_vocab():
        return False
    return all(first(text)["input_ids"] == second(text)["input_ids"] for text in _PROBES)


def load_tokenizer(name_or_path: str, kwargs: Mapping[str, Any]) -> Any:
    """The tokenizer of a repository, with those of the loading arguments that concern it."""
    return AutoTokenizer.from_pretrained(name_or_path, **location(kwargs, "trust_remote_code", "config"))


def _processor(
    llm: str | None, slm: str | None, llm_kwargs: dict[str, Any], slm_kwargs: dict[str, Any], fusion: str
) -> LLM2SLMProcessor:
    from .processing_llm2slm import LLM2SLMProcessor

    if llm is None or slm is None:
        raise ValueError("Models in memory name no tokenizers: pass `processor=LLM2SLMProcessor(...)`.")
    prefixed = {f"llm_{k}": v for k, v in llm_kwargs.items()} | {f"slm_{k}": v for k, v in slm_kwargs.items()}
    return LLM2SLMProcessor.from_llm_slm_pretrained(llm, slm, fusion=fusion, **prefixed)


def _choose_fusion(
    fusion: str | None,
    fields: Mapping[str, Any],
    processor: LLM2SLMProcessor | None,
    llm: str | None,
    slm: str | None,
    llm_kwargs: dict[str, Any],
    slm_kwargs: dict[str, Any],
) -> str:
    """The fusion asked for, checked against the tokenizers, or the one they suggest."""
    if fusion in ("replace", "llm-embed"):
        return fusion
    if fusion is None and fields.get("slm_encoder") == "skip":
        return "replace"
    if processor is not None:
        tokenizers = (processor.llm_tokenizer, processor.tokenizer)
    elif llm is not None and slm is not None:
        tokenizers = (load_tokenizer(llm, llm_kwargs), load_tokenizer(slm, slm_kwargs))
    elif fusion is None:
        raise ValueError(
            "Models in memory name no tokenizers to choose a fusion by: pass `fusion=` or `processor=LLM2SLMProcessor(...)`."
        )
    else:
        return fusion
    equal = tokenizers_equal(*tokenizers)
    if fusion in ("add", "kv") and not equal:
        raise ValueError(different_tokenizers(*tokenizers, fusion))
    return fusion or ("add" if equal else "align")


def different_tokenizers(llm_tokenizer: Any, tokenizer: Any, fusion: str = "add") -> str:
    """Error text for a fusion that takes one tokenizer, with two."""
    reason = "adds the SLM's embedding of the same token" if fusion == "add" else "has the SLM read the last token"
    return (
        f'`fusion="{fusion}"` {reason}, so LLM and SLM must share one tokenizer; expected '
        f"equal ones, found {type(llm_tokenizer).__name__} with {len(llm_tokenizer)} tokens and "
        f'{type(tokenizer).__name__} with {len(tokenizer)}. Use `fusion="align"` (aligned by characters), '
        '`"replace"` or `"llm-embed"`.'
    )
