"""The model: a frozen LLM reads the prompt once, a projector carries its states over, an SLM writes the answer."""

from __future__ import annotations

import os
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from .checkpoint import (
    attach_pretrained_llm,
    check_checkpoint,
    check_loaded,
    checkpoint_location,
    checkpoint_state_dict,
    expect_checkpoint_keys,
    keep_first_names,
    llm_left_out,
    record_llm_precision,
    save_llm_of,
)
from .composition import compose
from .configuration_llm2slm import LLM2SLMConfig, check_choice
from .export_mixin import ExportMixin
from .generation import LLM2SLMGenerationMixin
from .key_values import KeyValueProjector, cached_length, continued_prompt, take_cache
from .llm_states import read_llm_states
from .loading import HUB_ARGUMENTS, build_slm, freeze, take_prefixed
from .outputs import LLM2SLMModelOutput, LLM2SLMOutput, cache_of
from .projector import LLM2SLMProjector
from .prompt import (
    LLM2SLMPrompt,
    check_labels,
    check_response_length,
    fuse,
    padded_right,
    prompt_mask,
    slm_arguments,
    slm_view,
)
from .push import PushMixin
from .remote_code import IncludesCode
from .structure import (
    accepts,
    cache_argument,
    drop_module,
    embed_tokens,
    join_tied_embeddings,
    layer_classes,
    mask_positions,
    move_padding,
    reader,
)
from .weight_files import building, load_compared, replacing_weights


# Models ------------------------------------------------------------------------------------------------------------------
class LLM2SLMPreTrainedModel(IncludesCode, PreTrainedModel):
    """Base of the two model classes: configuration, initialisation, and what the SLM is asked for its owner."""

    config: LLM2SLMConfig
    config_class = LLM2SLMConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _load_pretrained_model = staticmethod(load_compared)

    def _init_weights(self, module: nn.Module) -> None:
        # The SLM is a PreTrainedModel of its own and initialises itself, and so does the projector: of a model outside
        # its own source, transformers leaves out every module without parameters of its own (`_initialize_weights`).
        pass

    @property
    def dtype(self) -> torch.dtype:
        """dtype of the SLM, whatever that of the LLM."""
        return self.slm.dtype

    @property
    def device(self) -> torch.device:
        """Device of the SLM, whatever that of the LLM."""
        return self.slm.device

    @property
    def _no_split_modules(self) -> set[str]:
        """Classes of the layers of SLM and LLM: what FSDP shards one by one, and device maps keep in one place."""
        return layer_classes(self.slm) | (set() if self.llm is None else layer_classes(self.llm))

    @_no_split_modules.setter
    def _no_split_modules(self, value: Any) -> None:
        pass  # PreTrainedModel sets its own; the parts know better, and the LLM comes and goes

    def get_input_embeddings(self) -> nn.Module:
        return reader(self.slm).get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.slm.set_input_embeddings(value)

    def get_output_embeddings(self) -> Any:
        return self.slm.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.slm.set_output_embeddings(new_embeddings)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """Resize the SLM's vocabulary; the LLM's is frozen like the rest of it."""
        return self.slm.resize_token_embeddings(*args, **kwargs)


class LLM2SLMModel(LLM2SLMPreTrainedModel):
    """
    The three parts without a loss: `llm` (frozen), `projector` and `slm`.

    Its state dict holds what is trained, projector and SLM; so does every checkpoint that is made of it. The LLM is
    attached by `from_pretrained` and `from_llm_slm_pretrained`, or by [`~LLM2SLMModel.attach_llm`].
    """

    def __init__(self, config: LLM2SLMConfig, slm: PreTrainedModel | None = None):
        super().__init__(config)
        self.projector = (KeyValueProjector if config.fusion == "kv" else LLM2SLMProjector)(config)
        self.slm = build_slm(config.slm_config) if slm is None else slm
        if config.slm_encoder == "skip":
            drop_module(self.slm, self.slm.get_encoder(), "The SLM's encoder")
        join_tied_embeddings(self.slm)
        config.slm_config = self.slm.config
        # That is of the SLM; and this is how transformers keeps parts out of it.
        if getattr(config, "quantization_config", None) is not None:
            self._keep_in_fp32_modules = {"projector", "model.projector"}
        self.llm: PreTrainedModel | None = None
        self.whole_llm: PreTrainedModel | None = None
        self.register_state_dict_post_hook(keep_first_names)
        self.register_load_state_dict_post_hook(expect_checkpoint_keys)
        self.post_init()

    def attach_llm(self, llm: PreTrainedModel | None, whole: PreTrainedModel | None = None) -> None:
        """
        Take `llm` (what [`load_llm`] or [`adopt_llm`] returns) as the frozen LLM; `None` takes it away. `whole` is the model
        with its LM head that `llm` was adopted from, for lossless generation.
        """
        self.llm, self.whole_llm = (None if part is None else freeze(part) for part in (llm, whole))

    def train(self, mode: bool = True) -> LLM2SLMModel:
        """Training mode for projector and SLM; the LLM stays in eval mode."""
        super().train(mode)
        for part in (self.llm, self.whole_llm):
            if part is not None:
                part.eval()
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Projector and SLM, each tensor once."""
        with llm_left_out(self):
            return super().state_dict(*args, **kwargs)

    # Reading -------------------------------------------------------------------------------------------------------------
    def llm_states(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """
        Run the frozen LLM over a batch that is padded on the right, see [`read_llm_states`].

        Raises:
            ValueError: if the model was loaded without its LLM.
        """
        if self.llm is None:
            raise ValueError(
                "This model was loaded without its LLM (`load_llm=False`), so it can't read a prompt. Pass "
                "`llm_hidden_states=` (cached LLM states) or `prompt=` (from `encode_prompt` of a model that has it), or "
                "load the model without `load_llm=False`."
            )
        return read_llm_states(self.llm, self.config, input_ids, attention_mask)

    def encode_prompt(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        slm_input_ids: torch.Tensor | None = None,
        slm_attention_mask: torch.Tensor | None = None,
        alignment: torch.Tensor | None = None,
        llm_hidden_states: torch.Tensor | None = None,
    ) -> LLM2SLMPrompt:
        """
        Read a batch of prompts: LLM, projector, fusion. Padding may be on either side.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, prompt_length)`): The prompt in the LLM's tokens.
            attention_mask (`torch.Tensor` of shape `(batch_size, prompt_length)`, *optional*): 1 for real tokens.
            slm_input_ids (`torch.LongTensor` of shape `(batch_size, slm_prompt_length)`): The prompt in the SLM's tokens
                (`fusion="align"`).
            slm_attention_mask (`torch.Tensor` of shape `(batch_size, slm_prompt_length)`, *optional*).
            alignment (`torch.LongTensor` of shape `(batch_size, slm_prompt_length)`): For each SLM token, which of the
                row's LLM tokens (padding not counted) covers the same characters (`fusion="align"`).
            llm_hidden_states (`torch.Tensor` of shape `(batch_size, prompt_length, llm_state_size)` or
                `(batch_size, prompt_length, num_llm_states, llm_state_size)`, *optional*): What the LLM made of the
                prompt, from [`~LLM2SLMModel.llm_states`]; the LLM is then not run.

        Raises:
            ValueError: for an empty prompt, one too long for the LLM, or a batch that lacks what the fusion needs.
        """
        attention_mask = prompt_mask(self.config, self.llm, input_ids, attention_mask, llm_hidden_states)
        if input_ids is not None:
            input_ids = padded_right(input_ids, attention_mask)
        mask = move_padding(attention_mask, attention_mask, "right")
        align = self.config.fusion == "align"
        view = slm_view(slm_input_ids, slm_attention_mask, alignment) if align else {}
        if llm_hidden_states is None:
            states = self.llm_states(input_ids, mask)  # type: ignore[arg-type]  # there is one, or prompt_mask raised
        else:
            states = llm_hidden_states if llm_hidden_states.dim() == 4 else llm_hidden_states.unsqueeze(2)
            states = move_padding(states, attention_mask.to(states.device), "right")
        expected = (self.config.num_llm_states, self.config.llm_state_size)
        if tuple(states.shape[2:]) != expected:
            raise ValueError(
                f"This projector takes {expected[0]} LLM state(s) of width {expected[1]} for each token, got "
                f"{states.shape[2]} of width {states.shape[3]}. Use the LLM (and the `llm_layer`) it was made for."
            )
        projected = self.projector(states.to(self.device))
        return fuse(self.config.fusion, self.slm, projected, mask, input_ids, **view)

    # Writing -------------------------------------------------------------------------------------------------------------
    def slm_prompt(self, prompt: LLM2SLMPrompt) -> dict[str, Any]:
        """The arguments by which the SLM's own `forward` or `generate` takes a fused prompt."""
        states, mask = prompt.prompt_states, prompt.attention_mask
        states, mask = states.to(self.device, self.dtype), mask.to(self.device)
        if self.config.slm_encoder == "skip":
            return {"encoder_outputs": BaseModelOutput(last_hidden_state=states), "attention_mask": mask}
        if not self.slm.config.is_encoder_decoder:
            # The response follows at once, so the padding goes before the prompt.
            states, mask = (move_padding(t, mask, "left") for t in (states, mask))
        if self.config.fusion == "kv":
            last = embed_tokens(self.slm, prompt.last_token_ids).to(self.dtype)  # type: ignore[arg-type]
            return continued_prompt(self.slm, self.config, states, mask, last)
        return {"inputs_embeds": states, "attention_mask": mask}

    def slm_inputs(
        self, prompt: LLM2SLMPrompt, decoder_input_ids: torch.Tensor | None, cache: Any = None
    ) -> dict[str, Any]:
        """The arguments of one forward pass of the SLM over prompt and (shifted) response, or what of them `cache` lacks."""
        kwargs = self.slm_prompt(prompt)
        if cache is not None:
            kwargs[cache_argument(self.slm.forward)] = cache
        if self.slm.config.is_encoder_decoder:
            if decoder_input_ids is None:
                start = torch.full((len(prompt.attention_mask), 1), self.decoder_start_token_id())
                decoder_input_ids = start.to(self.device)
            check_response_length(decoder_input_ids.shape[1], 0, self.slm, "SLM")
            return kwargs | {"decoder_input_ids": decoder_input_ids}
        embeds, mask, read = kwargs.pop("inputs_embeds"), kwargs.pop("attention_mask"), cached_length(self.slm, kwargs)
        written = max(read - embeds.shape[1], 0)  # of the response, by the cache
        if decoder_input_ids is not None and decoder_input_ids.shape[1] > 0:
            response = embed_tokens(self.slm, decoder_input_ids).to(embeds.dtype)
            check_response_length(written + response.shape[1], embeds.shape[1], self.slm, "SLM")
            embeds = torch.cat([embeds, response], dim=1)
            mask = torch.cat([mask, mask.new_ones(len(mask), written + response.shape[1])], dim=1)
        kwargs |= {"inputs_embeds": embeds[:, read - written :], "attention_mask": mask}
        if accepts(self.slm.forward, "position_ids"):
            kwargs["position_ids"] = mask_positions(mask)[:, read:]
        return kwargs

    def num_scored(self, decoder_input_ids: torch.Tensor | None) -> int:
        """Positions of the response that a pass over `decoder_input_ids` scores; a prompt alone scores its first token."""
        if decoder_input_ids is None:
            return 1
        return decoder_input_ids.shape[1] + (not self.slm.config.is_encoder_decoder)

    def decoder_start_token_id(self) -> int:
        """The token that an encoder-decoder SLM starts from."""
        config = self.slm.generation_config
        for value in (config.decoder_start_token_id, self.config.decoder_start_token_id, config.bos_token_id):
            if value is not None:
                return value[0] if isinstance(value, list) else value
        raise ValueError(
            f"The SLM ({type(self.slm).__name__}) names no token to start from. Set "
            "`model.generation_config.decoder_start_token_id`."
        )

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        slm_input_ids: torch.Tensor | None = None,
        slm_attention_mask: torch.Tensor | None = None,
        alignment: torch.Tensor | None = None,
        llm_hidden_states: torch.Tensor | None = None,
        prompt: LLM2SLMPrompt | None = None,
        decoder_input_ids: torch.Tensor | None = None,
        use_cache: bool = False,
        **kwargs: Any,
    ) -> LLM2SLMModelOutput:
        """The SLM's states at the response's positions. Arguments as for [`LLM2SLMForConditionalGeneration`]."""
        kwargs = slm_arguments(kwargs)
        if prompt is None:
            prompt = self.encode_prompt(
                input_ids, attention_mask, slm_input_ids, slm_attention_mask, alignment, llm_hidden_states
            )
        inputs = self.slm_inputs(prompt, decoder_input_ids, take_cache(kwargs))
        length = self.num_scored(decoder_input_ids)
        head_inputs: list[torch.Tensor] = []

        def take_states(_: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            # What the LM head is given is the SLM's last state, with whatever scaling the SLM puts before its head. The
            # head itself has nothing to do here, so it is left none of it.
            head_inputs.append(args[0][:, -length:])
            return (args[0][:, :0], *args[1:])

        hook = self.slm.get_output_embeddings().register_forward_pre_hook(take_states)
        try:
            outputs = self.slm(**inputs, use_cache=use_cache, return_dict=True, **kwargs)
        finally:
            hook.remove()
        return LLM2SLMModelOutput(last_hidden_state=head_inputs[0], cache=cache_of(outputs))


class LLM2SLMForConditionalGeneration(PushMixin, ExportMixin, LLM2SLMGenerationMixin, LLM2SLMPreTrainedModel):
    """
    LLM-to-SLM: text in, text out. Compose it with [`~LLM2SLMForConditionalGeneration.from_llm_slm_pretrained`], train it
    with the standard `Trainer`, load it with `AutoModel.from_pretrained`.
    """

    def __init__(self, config: LLM2SLMConfig, slm: PreTrainedModel | None = None):
        super().__init__(config)
        self.model = LLM2SLMModel(config, slm=slm)
        # The arguments by which a processor is found beside the checkpoint; see `from_pretrained`.
        self.checkpoint_location: dict[str, Any] = {}
        self.post_init()

    @property
    def llm(self) -> PreTrainedModel | None:
        """The frozen LLM, `None` if the model was loaded without it."""
        return self.model.llm

    @property
    def projector(self) -> LLM2SLMProjector:
        return self.model.projector  # type: ignore[return-value]  # with keys and values it is another, with less to it

    @property
    def slm(self) -> PreTrainedModel:
        return self.model.slm

    # Composing, loading, saving --------------------------------------------------------------------------------------
    @classmethod
    def from_llm_slm_pretrained(
        cls,
        llm: str | os.PathLike | PreTrainedModel,
        slm: str | os.PathLike | PreTrainedModel | None = None,
        **kwargs: Any,
    ) -> LLM2SLMForConditionalGeneration:
        r"""
        Compose a model of a frozen LLM and an SLM. The projector is new and wants training.

        Args:
            llm (`str`, `os.PathLike` or `PreTrainedModel`): Hub id or local folder of the LLM, or the model itself.
            slm (`str`, `os.PathLike` or `PreTrainedModel`, *optional*): The same for the SLM; or `None` with `slm_layers`.
            slm_layers (`int` or `list[int]`, *optional*): Cut the SLM from the LLM instead: these decoder layers, its
                embeddings and head. Of a decoder-only LLM the number k stands for the top k layers. `projector_init` is then
                `"identity"` by default.
            fusion (`str`, *optional*): `"add"`, `"replace"`, `"llm-embed"`, `"align"` or `"kv"`, see [`LLM2SLMConfig`]. By
                default `"add"` where the tokenizers are equal and `"align"` where not. For an SLM cut from a decoder-only LLM it
                is `"kv"`, or `"replace"` if the LLM keeps no keys and values that can be handed over; for one cut from an
                encoder-decoder LLM `"replace"`. With `"replace"` the top k of L layers get `llm_layer=L-k`.
            llm_layer, slm_encoder, projector_hidden_size, projector_num_layers, projector_activation, projector_norm
                (*optional*): See [`LLM2SLMConfig`].
            load_llm (`True` or `"whole"`, defaults to `True`): `"whole"` keeps all of the LLM, for lossless generation.
            projector_init (`str`, defaults to `"random"`): `"random"` (the paper); `"zero"` (with `"add"` and
                `"align"`: the model starts as the SLM alone); `"identity"` (equal widths: states pass unchanged);
                `"fit"` (ridge regression on `fit_prompts`, see [`fit_projector`]).
            fit_prompts (`Sequence[str]`, *optional*): A few hundred prompts for `projector_init="fit"`.
            fit_target (`str` or `int`, defaults to `"embeddings"`): What the fused prompt is fitted to: the SLM's own
                `"embeddings"`, or its own states at a layer.
            processor ([`LLM2SLMProcessor`], *optional*): Of the same two models; for models in memory, that have no name
                to load tokenizers from.
            llm_*, slm_* (*optional*): Arguments of `from_pretrained` for one of the two, e.g. `llm_dtype`,
                `llm_device_map`, `llm_quantization_config`, `llm_revision`, `slm_dtype`, `slm_token`.
            kwargs (*optional*): `dtype`, `token`, `cache_dir`, `local_files_only`, `force_download` for both.

        Returns:
            [`LLM2SLMForConditionalGeneration`] in eval mode.

        Raises:
            ValueError: where the two can't be joined as asked; the text says why and what to do.
            OSError: where a checkpoint can't be reached.

        Example:

        ```python
        >>> model = LLM2SLMForConditionalGeneration.from_llm_slm_pretrained("google/flan-t5-large", "google-t5/t5-small")
        ```
        """
        return compose(cls, llm, slm, **kwargs)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        *model_args: Any,
        load_llm: bool | str = True,
        llm_model: PreTrainedModel | None = None,
        **kwargs: Any,
    ) -> Any:
        r"""
        Load projector and SLM from a checkpoint, and the frozen LLM that it names from its own repository.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): Hub id or local folder of the checkpoint.
            load_llm (`bool` or `"whole"`, defaults to `True`): `False` gives a model without the LLM, for training on cached
                states and for machines that only write; `"whole"` loads all of the LLM, for `generate(mode="lossless")`.
            llm_model (`PreTrainedModel`, *optional*): The LLM, already in memory.
            llm_name_or_path (`str`, *optional*): Another place to load the same LLM from, a local copy for instance.
            llm_check_fingerprint (`bool`, defaults to `True`): `False` accepts an LLM with other weights than those that
                the model was trained with.
            llm_* (*optional*): `llm_dtype`, `llm_device_map`, `llm_quantization_config`, `llm_token` ... for the LLM.
            kwargs (*optional*): As for any `from_pretrained`. `quantization_config` is the SLM's, `revision` is the checkpoint's; `token`, `cache_dir`,
                `local_files_only` and `force_download` reach the LLM's loader too.

        Raises:
            ValueError: for a checkpoint that is not sound or lacks weights, or an LLM that is not the one it was trained with.
            OSError: if the checkpoint or its LLM can't be reached, or has no safetensors.
        """
        check_choice("load_llm", load_llm, (True, False, "whole"))
        if getattr(kwargs.get("config"), "export", None) is not None:  # an Auto class has read it
            try:
                from transformers_llm2slm.exported import LLM2SLMExportedModel
            except ImportError as error:
                raise ImportError("Exported models need the package transformers-llm2slm.") from error
            names = ("revision", "subfolder", *HUB_ARGUMENTS)
            hub = {key: kwargs[key] for key in names if kwargs.get(key) is not None}
            return LLM2SLMExportedModel.from_pretrained(pretrained_model_name_or_path, **hub)
        wants_info = kwargs.pop("output_loading_info", False)
        llm_kwargs = take_prefixed(kwargs, "llm_")
        finds_llm = bool(load_llm) and llm_model is None and "name_or_path" not in llm_kwargs
        check_checkpoint(pretrained_model_name_or_path, kwargs, finds_llm)
        hub = {key: kwargs[key] for key in ("revision", "subfolder", "device_map") if kwargs.get(key) is not None}
        hub |= {key: kwargs[key] for key in HUB_ARGUMENTS if kwargs.get(key) is not None}
        # Weights of another shape are told by `check_loaded`.
        kwargs |= {"use_safetensors": True, "ignore_mismatched_sizes": True, "output_loading_info": True}
        with building(
            f"The model of {str(pretrained_model_name_or_path)!r}", ValueError, OSError, StrictDataclassError
        ):
            model, info = super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)
        check_loaded(pretrained_model_name_or_path, info)
        model.checkpoint_location = checkpoint_location(model, pretrained_model_name_or_path, hub)
        if load_llm:
            whole = load_llm == "whole"
            attach_pretrained_llm(model, pretrained_model_name_or_path, llm_model, llm_kwargs, hub, whole)
        else:
            record_llm_precision(model.config, llm_kwargs)
        return (model, info) if wants_info else model

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        *args: Any,
        save_llm: bool = False,
        **kwargs: Any,
    ) -> None:
        """
        Save projector and SLM; the LLM is named in the config, by repository, commit and fingerprint.

        Args:
            save_directory (`str` or `os.PathLike`): Where to.
            is_main_process (`bool`, defaults to `True`): Whether this process writes; the others help to gather weights.
            save_llm (`bool`, defaults to `False`): Save the LLM too, in the subfolder `llm/`, for a checkpoint that
                needs nothing else.
            include_code (`bool`, defaults to `False`): Save a copy of the code too, see [`IncludesCode`].
            args, kwargs: As for any `save_pretrained` (`push_to_hub`, `max_shard_size`, `state_dict` ...).

        Raises:
            ValueError: for `save_llm=True` without an LLM, or with one whose weights can't be written.
        """
        if save_llm:
            save_llm_of(self, save_directory, is_main_process, kwargs)
        self.config.llm_in_checkpoint = save_llm
        if (state_dict := kwargs.get("state_dict")) is not None:
            kwargs["state_dict"] = checkpoint_state_dict(self, state_dict)
        with replacing_weights(save_directory, is_main_process):
            super().save_pretrained(save_directory, is_main_process, *args, **kwargs)

    # Reading and writing ---------------------------------------------------------------------------------------------
    def encode_prompt(self, *args: Any, **kwargs: Any) -> LLM2SLMPrompt:
        """See [`LLM2SLMModel.encode_prompt`]."""
        return self.model.encode_prompt(*args, **kwargs)

    def prepare_decoder_input_ids_from_labels(self, labels: torch.Tensor) -> torch.Tensor:
        """
        The response's tokens as the SLM gets them while it is scored on `labels`.

        Args:
            labels (`torch.LongTensor` of shape `(batch_size, response_length)`): SLM tokens, padded with -100.

        Returns:
            For an encoder-decoder SLM, `labels` shifted right behind its start token; for a decoder-only SLM, `labels`
            without the last column, as the prompt's last state predicts the first token.
        """
        pad = self.config.pad_token_id
        tokens = labels.masked_fill(labels == -100, 0 if pad is None else pad)
        if not self.slm.config.is_encoder_decoder:
            return tokens[:, :-1]
        if hasattr(self.slm, "prepare_decoder_input_ids_from_labels"):
            return self.slm.prepare_decoder_input_ids_from_labels(labels)
        start = torch.full_like(tokens[:, :1], self.model.decoder_start_token_id())
        return torch.cat([start, tokens[:, :-1]], dim=1)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        slm_input_ids: torch.Tensor | None = None,
        slm_attention_mask: torch.Tensor | None = None,
        alignment: torch.Tensor | None = None,
        llm_hidden_states: torch.Tensor | None = None,
        prompt: LLM2SLMPrompt | None = None,
        decoder_input_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> LLM2SLMOutput | tuple:
        r"""
        Score a response.

        Args:
            input_ids, attention_mask, slm_input_ids, slm_attention_mask, alignment, llm_hidden_states: The prompt, see
                [`LLM2SLMModel.encode_prompt`].
            prompt ([`LLM2SLMPrompt`], *optional*): The prompt, already encoded; the LLM is not run.
            decoder_input_ids (`torch.LongTensor` of shape `(batch_size, response_length)`, *optional*): The response in
                SLM tokens, shifted as [`~LLM2SLMForConditionalGeneration.prepare_decoder_input_ids_from_labels`] does.
            cache (`Cache`, *optional*): From an earlier pass with `use_cache=True`; `decoder_input_ids` then go on behind it.
            labels (`torch.LongTensor` of shape `(batch_size, response_length)`, *optional*): The response in SLM tokens,
                -100 where not scored. `shift_labels` is another name for them: they stand where they are scored.
            num_items_in_batch (`int`, *optional*): Number of tokens that the loss is averaged over (gradient
                accumulation).

        Returns:
            [`LLM2SLMOutput`], or a tuple with `return_dict=False`.

        Raises:
            ValueError: for labels that are not tokens of the SLM, an empty prompt or batch, or one that lacks what the fusion
                needs; for a prompt or response that is longer than LLM or SLM take.
        """
        kwargs = slm_arguments(kwargs)
        # Not in the signature, since `Trainer` waits for every argument with "label" in its name.
        shift_labels = kwargs.pop("shift_labels", None)
        labels = shift_labels if labels is None else labels
        if labels is not None:
            check_labels(labels, self.get_output_embeddings().weight.shape[0])
            if decoder_input_ids is None:
                decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
        if prompt is None:
            prompt = self.encode_prompt(
                input_ids, attention_mask, slm_input_ids, slm_attention_mask, alignment, llm_hidden_states
            )
        inputs = self.model.slm_inputs(prompt, decoder_input_ids, take_cache(kwargs))
        length = self.model.num_scored(decoder_input_ids)
        if not self.slm.config.is_encoder_decoder and accepts(self.slm.forward, "logits_to_keep"):
            inputs["logits_to_keep"] = length
        outputs = self.slm(**inputs, use_cache=bool(use_cache), return_dict=True, **kwargs)
        logits = outputs.logits[:, -length:].contiguous()
        loss = None
        if labels is not None:
            labels = labels.to(logits.device).contiguous()
            # The SLM's own loss function. Our labels stand where they are scored, so they are not shifted again.
            loss = self.slm.loss_function(
                logits=logits,
                labels=labels,
                shift_labels=labels,
                vocab_size=logits.shape[-1],
                num_items_in_batch=num_items_in_batch,
            )
        output = LLM2SLMOutput(
            loss=loss,
            logits=logits,
            cache=cache_of(outputs) if use_cache else None,
            hidden_states=outputs.get("decoder_hidden_states") or outputs.get("hidden_states"),
            attentions=outputs.get("decoder_attentions") or outputs.get("attentions"),
        )
        return_dict = self.config.return_dict if return_dict is None else return_dict
        return output if return_dict else output.to_tuple()


__all__ = [
    "LLM2SLMForConditionalGeneration",
    "LLM2SLMModel",
    "LLM2SLMModelOutput",
    "LLM2SLMOutput",
    "LLM2SLMPreTrainedModel",
    "LLM2SLMProjector",
    "LLM2SLMPrompt",
]
