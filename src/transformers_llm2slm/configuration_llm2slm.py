"""Configuration of an LLM-to-SLM model: which frozen LLM, which SLM, and how the two are joined."""

import math
import os
from typing import Any, Literal, get_args

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.configuration_utils import SubConfigSpec
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from .remote_code import IncludesCode, code_included, with_code, without_code
from .validation import FORMAT_VERSION, PARTS, check_config
from .version import __version__

Fusion = Literal["add", "replace", "llm-embed", "align", "kv"]
ProjectorInit = Literal["random", "zero", "identity", "fit"]
ProjectorNorm = Literal["none", "layer_norm", "rms_norm"]
SLMEncoder = Literal["keep", "skip"]

FUSIONS: tuple[str, ...] = get_args(Fusion)
PROJECTOR_INITS: tuple[str, ...] = get_args(ProjectorInit)

# Subfolder of a self-contained checkpoint (`save_pretrained(..., save_llm=True)`) that holds the LLM.
LLM_SUBFOLDER = "llm"


def check_choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    """Raise a `ValueError` that names the choices if `value` is none of them."""
    if value not in choices:
        raise ValueError(
            f"`{name}` must be one of {', '.join(map(repr, choices))}, got {value!r}. Set `{name}` to one of these."
        )


def encoder_text_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The part of `config` that describes how a model reads text (its encoder, where it has one)."""
    encoder = getattr(config, "encoder", None)
    if config.is_encoder_decoder and isinstance(encoder, PreTrainedConfig):
        return encoder.get_text_config()
    return config if config.is_encoder_decoder else config.get_text_config()


def decoder_text_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The part of `config` that describes how a model writes text (its decoder, where it has one)."""
    decoder = getattr(config, "decoder", None)
    if config.is_encoder_decoder and isinstance(decoder, PreTrainedConfig):
        return decoder.get_text_config()
    return config if config.is_encoder_decoder else config.get_text_config()


def key_value_heads(config: PreTrainedConfig) -> tuple[int, int]:
    """Number and size of the heads whose keys and values a decoder keeps; zeros where its configuration does not tell."""
    text_config = decoder_text_config(config)
    heads = getattr(text_config, "num_attention_heads", None) or 0
    size = getattr(text_config, "head_dim", None) or (text_config.hidden_size // heads if heads else 0)
    return getattr(text_config, "num_key_value_heads", None) or heads, size


@strict
class LLM2SLMConfig(IncludesCode, PreTrainedConfig):
    r"""
    Configuration of [`LLM2SLMForConditionalGeneration`].

    Args:
        llm_config (`PreTrainedConfig` or `dict`): Full configuration of the frozen LLM.
        slm_config (`PreTrainedConfig` or `dict`): Full configuration of the SLM.
        fusion (`str`, defaults to `"add"`): How projected LLM states enter the SLM's prompt.
            `"add"`: projected states + the SLM's embedding of the same token (one shared tokenizer; the paper's choice);
            `"replace"`: projected states alone;
            `"llm-embed"`: projected states + the LLM's embedding of the token through a linear map;
            `"align"`: the prompt in the SLM's tokens, each added to the projected state of the LLM token that covers
            the same characters (for two tokenizers);
            `"kv"`: the keys and values that layers of the LLM made of the prompt, through a linear map each, as the SLM's
            cache (two decoder-only models with one tokenizer). The SLM reads no prompt but its last token.
        llm_layer (`int` or `list[int]`, defaults to -1): Index into the LLM's hidden states (0 is its embedding output,
            -1 its last layer). A list gives a learned softmax-weighted mix of these layers. With `"kv"`, the LLM's layers
            (0 is the first) whose keys and values the SLM's layers get, one for each.
        slm_encoder (`str`, defaults to `"keep"`): For an encoder-decoder SLM: `"keep"` feeds the fused prompt to its
            encoder, `"skip"` hands it straight to its decoder as encoder output, and the encoder is dropped.
        slm_layers (`list[int]`, *optional*): Decoder layers of the LLM that the SLM was cut from.
        projector_hidden_size (`int`, *optional*): Width of the projector's hidden layers; defaults to the larger of the
            LLM's and the SLM's widths.
        projector_num_layers (`int`, defaults to 2): Number of linear layers (the paper's projector has 2).
        projector_activation (`str`, defaults to `"relu"`): Activation between them, a name in transformers' `ACT2FN`.
        projector_norm (`str`, defaults to `"none"`): Norm of the LLM's states before the first layer: `"none"`,
            `"layer_norm"` or `"rms_norm"`.
        projector_residual (`bool`, defaults to `False`): Add the LLM's states to the projector's output (equal widths).
        projector_init (`str`, defaults to `"random"`): How the projector was initialised: `"random"`, `"zero"`,
            `"identity"` or `"fit"`.
        llm_name_or_path (`str`, *optional*): Hub id or local path of the frozen LLM, which the checkpoint only names.
        llm_revision (`str`, *optional*): The commit of that repository the model was composed with.
        llm_subfolder (`str`, defaults to `""`): Subfolder of that repository.
        llm_fingerprint (`str`, *optional*): Fingerprint of the LLM's weights, see [`weights_fingerprint`].
        llm_files (`dict[str, str]`, *optional*): The sha256 of each of the LLM's weight files, where the Hub told it.
        llm_dtype (`str`, *optional*): dtype the LLM is loaded in, e.g. `"bfloat16"`; `None` is as stored.
        llm_quantization_config (`dict`, *optional*): How the LLM is quantised, while it is loaded or by its files.
        llm_in_checkpoint (`bool`, defaults to `False`): Whether the checkpoint holds the LLM in its `llm/` subfolder.
        slm_name_or_path (`str`, *optional*), slm_revision (`str`, *optional*): Where the SLM came from (for the record).
        export (`dict`, *optional*): Of an exported model, its `format`, whether it is in `int8`, and `cache_shapes`: for
            `keys` and `values`, heads and head size of each layer.
        format_version (`int`), llm2slm_version (`str`): The format of the configuration, and the version of this library
            that wrote it; a file always holds those of the version that saves it.

    Raises:
        StrictDataclassError: (of huggingface_hub, around a `ValueError`) for a choice that does not exist, a size that is
            not positive, or two models that can't be joined so.
        ValueError: on loading, for a newer format, and for what no sound checkpoint holds, see `validation.check_config`.
    """

    model_type = "llm2slm"
    sub_configs_defaults = {
        "llm_config": SubConfigSpec(config_class=AutoConfig, model_type="t5"),
        "slm_config": SubConfigSpec(config_class=AutoConfig, model_type="t5"),
    }
    keys_to_ignore_at_inference = ["cache", "past_key_values"]

    llm_config: Any = None
    slm_config: Any = None
    # Choices are checked in `validate_architecture`, whose errors say what to do.
    fusion: str = "add"
    llm_layer: int | list[int] = -1
    slm_encoder: str = "keep"
    slm_layers: list[int] | None = None
    projector_hidden_size: int | None = None
    projector_num_layers: int = 2
    projector_activation: str = "relu"
    projector_norm: str = "none"
    projector_residual: bool = False
    projector_init: str = "random"
    llm_name_or_path: str | os.PathLike | None = None
    llm_revision: str | None = None
    llm_subfolder: str = ""
    llm_fingerprint: str | None = None
    llm_files: dict[str, str] | None = None
    llm_dtype: Any = None
    llm_quantization_config: dict | None = None
    llm_in_checkpoint: bool = False
    slm_name_or_path: str | os.PathLike | None = None
    slm_revision: str | None = None
    export: dict | None = None
    format_version: int = FORMAT_VERSION
    llm2slm_version: str | None = __version__
    # Text in, text out, whatever the SLM: Seq2SeqTrainer and the pipelines ask this.
    is_encoder_decoder: bool = True

    def validate_architecture(self) -> None:
        """Part of `@strict`-powered validation: choices, ranges and combinations."""
        check_choice("fusion", self.fusion, FUSIONS)
        check_choice("slm_encoder", self.slm_encoder, get_args(SLMEncoder))
        check_choice("projector_norm", self.projector_norm, get_args(ProjectorNorm))
        check_choice("projector_init", self.projector_init, PROJECTOR_INITS)
        check_choice("projector_activation", self.projector_activation, tuple(ACT2FN))
        if self.projector_num_layers < 1:
            raise ValueError(f"`projector_num_layers` must be at least 1, got {self.projector_num_layers}.")
        if self.projector_hidden_size is not None and self.projector_hidden_size < 1:
            raise ValueError(f"`projector_hidden_size` must be positive, got {self.projector_hidden_size}.")
        if self.slm_encoder == "skip" and not self.slm_config.is_encoder_decoder:
            raise ValueError(
                f'`slm_encoder="skip"` needs an encoder-decoder SLM, got a decoder-only `{self.slm_config.model_type}`. '
                'Use `slm_encoder="keep"`.'
            )
        if self.projector_residual and self.llm_state_size != self.slm_state_size:
            raise ValueError(
                "`projector_residual=True` needs an LLM and an SLM of equal width, got "
                f"{self.llm_state_size} and {self.slm_state_size}. Set `projector_residual=False`, or compose with "
                'another `projector_init` than "identity".'
            )
        if self.fusion == "kv":
            self._validate_key_values()
        layers = self.num_llm_layers
        for layer in self.llm_layers:
            if layers is not None and not -layers - 1 <= layer <= layers:
                raise ValueError(
                    f"`llm_layer` must lie in [{-layers - 1}, {layers}] for an LLM of {layers} layers, got {layer}."
                )
        if self.llm_layer == []:
            raise ValueError("`llm_layer` is an empty list; give at least one layer.")
        if (
            getattr(self, "decoder_start_token_id", None) is not None
            and special_token_id(self.slm_config, "decoder_start_token_id") is None
        ):
            raise ValueError(
                f"`decoder_start_token_id` is {self.decoder_start_token_id}, but the SLM's own configuration names none: set "
                "`slm_config.decoder_start_token_id` too."
            )
        vocab_size = self.get_text_config().vocab_size
        for name, config in (("", self), ("slm_config.", self.slm_config)):
            start = getattr(config, "decoder_start_token_id", None)
            if isinstance(start, int) and not 0 <= start < vocab_size:
                raise ValueError(
                    f"`{name}decoder_start_token_id` must be one of the SLM's {vocab_size} tokens, got {start}."
                )

    def _validate_key_values(self) -> None:
        """What `fusion="kv"` asks for."""
        for part, config in (("LLM", self.llm_config), ("SLM", self.slm_config)):
            if config.is_encoder_decoder or not all(key_value_heads(config)):
                raise ValueError(
                    f'`fusion="kv"` needs a decoder-only {part} that keeps keys and values, got a `{config.model_type}`. Choose '
                    "another fusion."
                )
        total, layers = self.num_llm_layers or 0, self.slm_config.get_text_config().num_hidden_layers
        if len(self.llm_layers) != layers or not all(0 <= layer < total for layer in self.llm_layers):
            raise ValueError(
                f"`fusion=\"kv\"` needs one of the LLM's {total} layers in `llm_layer` for each of the SLM's {layers}, got "
                f'{self.llm_layer}. For hidden states of a layer set `fusion="replace"`.'
            )
        if self.projector_num_layers != 1 or self.projector_norm != "none":
            raise ValueError(
                '`fusion="kv"` maps keys and values by one linear layer each: set `projector_num_layers=1` and '
                f'`projector_norm="none"`, got {self.projector_num_layers} and {self.projector_norm!r}. '
                'Another projector is for hidden states: set `fusion="replace"`.'
            )

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """
        As for any config, but what the file holds is checked first, and `llm_*` arguments of `AutoModel.from_pretrained` are
        left for the LLM's loader.
        """
        check_config(config_dict, cls)
        config_dict = without_code(config_dict) | {name: _part(name, config_dict[name]) for name in PARTS}
        llm_kwargs = {}
        if kwargs.get("return_unused_kwargs"):
            llm_kwargs = {key: kwargs.pop(key) for key in list(kwargs) if key.startswith("llm_")}
        try:
            config = super().from_dict(config_dict, **kwargs)
        except StrictDataclassError:
            raise  # it names the field
        except Exception as error:
            raise ValueError(f"`config.json` is no valid configuration of an LLM-to-SLM model: {error!r}.") from error
        if kwargs.get("return_unused_kwargs"):
            config, unused = config
            return config, unused | llm_kwargs
        return config

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        push_to_hub: bool = False,
        include_code: bool = False,
        **kwargs: Any,
    ) -> None:
        """As for any config; a model's, while the model is saved with its code, brings the code."""
        with code_included(self, include_code):
            super().save_pretrained(save_directory, **kwargs)
            self._save_code_and_push(save_directory, push_to_hub, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        # Whatever wrote the file that was read, this version writes the next.
        output = super().to_dict() | {"format_version": FORMAT_VERSION, "llm2slm_version": __version__}
        # Written anew, since `pipeline` leaves classes, which are no JSON, in the `custom_pipelines` that it has read.
        return with_code(output) if "auto_map" in output else output

    # Widths ----------------------------------------------------------------------------------------------------------
    @property
    def llm_hidden_size(self) -> int:
        """Width of the LLM's hidden states."""
        return encoder_text_config(self.llm_config).hidden_size

    @property
    def slm_hidden_size(self) -> int:
        """Width of what the SLM takes as a prompt: its input embeddings or, with `slm_encoder="skip"`, encoder output."""
        text_config = encoder_text_config(self.slm_config)
        if self.slm_encoder == "keep":
            # Some decoders embed into a narrower space than they compute in (OPT-350m).
            for name in ("word_embed_proj_dim", "embedding_size"):
                if isinstance(width := getattr(text_config, name, None), int):
                    return width
        return text_config.hidden_size

    @property
    def slm_key_value_heads(self) -> tuple[int, int]:
        """Number and size of the heads whose keys and values the SLM keeps."""
        return key_value_heads(self.slm_config)

    @property
    def llm_state_size(self) -> int:
        """Width of each state that is kept of an LLM token: a hidden state or, for `"kv"`, all keys (or values) of a layer."""
        return math.prod(key_value_heads(self.llm_config)) if self.fusion == "kv" else self.llm_hidden_size

    @property
    def slm_state_size(self) -> int:
        """Width of what the projector makes of it."""
        return math.prod(self.slm_key_value_heads) if self.fusion == "kv" else self.slm_hidden_size

    @property
    def num_llm_layers(self) -> int | None:
        """Number of layers the LLM reads with."""
        config = self.llm_config
        if config.is_encoder_decoder and isinstance(layers := getattr(config, "encoder_layers", None), int):
            return layers
        return getattr(encoder_text_config(config), "num_hidden_layers", None)

    @property
    def llm_layers(self) -> list[int]:
        """`llm_layer` as a list."""
        return self.llm_layer if isinstance(self.llm_layer, list) else [self.llm_layer]

    @property
    def num_llm_states(self) -> int:
        """
        States kept of each LLM token: one a layer in `llm_layer`, and the token's embedding for `"llm-embed"`; two a layer,
        keys and values, for `"kv"`.
        """
        if self.fusion == "kv":
            return 2 * len(self.llm_layers)
        return len(self.llm_layers) + (self.fusion == "llm-embed")

    # What generation, Trainer and pipelines ask a model's config is answered by the SLM ------------------------------
    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PreTrainedConfig:
        """The SLM's text config: it is the SLM that writes."""
        return decoder_text_config(self.slm_config)

    @property
    def vocab_size(self) -> int:
        return self.get_text_config().vocab_size

    def __setattr__(self, key: str, value: Any) -> None:
        if key == "llm_dtype" and value is not None:
            value = str(value).removeprefix("torch.")
        elif key in ("llm_name_or_path", "slm_name_or_path") and value is not None:
            # A local folder is named so that it is found from any working directory.
            value = os.path.abspath(value) if os.path.isdir(value) else os.fspath(value)
        super().__setattr__(key, value)

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        for name in ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"):
            if getattr(self, name, None) is None:
                setattr(self, name, special_token_id(self.slm_config, name))


def _part(name: str, config: dict[str, Any] | PreTrainedConfig) -> PreTrainedConfig:
    """The configuration of one of the two models, with errors that say of which."""
    if isinstance(config, PreTrainedConfig):
        return config
    try:
        return CONFIG_MAPPING[config["model_type"]](**config)
    except Exception as error:  # of any kind: hundreds of classes make what they can of it
        raise ValueError(
            f"`{name}` is no valid configuration of a `{config['model_type']}` model: {error!r}."
        ) from error


def special_token_id(config: PreTrainedConfig, name: str) -> Any:
    """A special token id of the writing side: on the config itself, else on its decoder's."""
    value = getattr(config, name, None)
    return value if value is not None else getattr(decoder_text_config(config), name, None)


__all__ = ["LLM2SLMConfig"]
