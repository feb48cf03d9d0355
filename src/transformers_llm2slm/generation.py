"""Generation: the SLM's own `generate`, fed with the fused prompt, or the LLM's own, drafted by the SLM."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from transformers import GenerationConfig, GenerationMixin

from .configuration_llm2slm import check_choice
from .few_rows import few_row_linears
from .lossless import generate_lossless
from .prompt import LLM2SLMPrompt, check_response_length, option, without_prompt_length
from .shortlist import as_token_ids, shortlisted
from .structure import learns_positions

if TYPE_CHECKING:
    from .modeling_llm2slm import LLM2SLMForConditionalGeneration

Mode = Literal["hybrid", "lossless"]

# Ways of transformers to write that give the prompt's tokens to a model. What each is called, and what can be had here.
_NEED_TOKENS = {
    "assistant_model": 'Let the SLM itself be the draft, `mode="lossless"`, or draft by `prompt_lookup_num_tokens`.',
    "assistant_early_exit": "Draft by `prompt_lookup_num_tokens`.",
    "use_mtp": "Draft by `prompt_lookup_num_tokens`.",
    "guidance_scale": "Leave it out.",
}


def check_options(fusion: str, kwargs: dict[str, Any], *configs: GenerationConfig | None) -> None:
    """
    Raise a `ValueError` for what `generate` can't do behind a prompt that is no tokens, or for `fusion="kv"` keys and values.

    Args:
        fusion: The model's.
        kwargs, configs: The arguments of `generate`, its generation config and the model's own.
    """
    for name, instead in _NEED_TOKENS.items():
        if option(name, kwargs, *configs) not in (None, False, 1 if name == "guidance_scale" else None):
            raise ValueError(
                f"`{name}` needs the prompt as tokens, but what the SLM gets are states that the LLM made of it. {instead}"
            )
    if fusion != "kv":
        return
    if option("prompt_lookup_num_tokens", kwargs, *configs) is not None:
        raise ValueError(
            '`prompt_lookup_num_tokens` does not go with `fusion="kv"`: transformers\' assisted generation takes no cache that '
            'begins with a prompt. Leave it out, or write with `mode="lossless"`.'
        )
    implementation = option("cache_implementation", kwargs, configs[0])
    if implementation not in (None, "dynamic"):
        raise ValueError(
            f'With `fusion="kv"` the SLM goes on from a dynamic cache, which holds the prompt; got `cache_implementation='
            f"{implementation!r}`. Leave it out."
        )


class LLM2SLMGenerationMixin(GenerationMixin):
    """What [`LLM2SLMForConditionalGeneration`] has of `GenerationMixin`, by way of its parts."""

    @property
    def generation_config(self) -> GenerationConfig:
        """The SLM's generation config: it is the SLM that generates."""
        return self.model.slm.generation_config

    @generation_config.setter
    def generation_config(self, value: GenerationConfig) -> None:
        if "model" in self._modules:  # PreTrainedModel sets one before there is an SLM, which brings its own
            self.model.slm.generation_config = value

    @property
    def shortlist(self) -> list[int] | None:
        """The tokens that the SLM may write (see [`make_shortlist`]), `None` if all; kept and saved in the generation config."""
        return getattr(self.generation_config, "shortlist", None)

    @shortlist.setter
    def shortlist(self, value: Sequence[int] | None) -> None:
        self.generation_config.shortlist = None if value is None else as_token_ids(value)
        # A config that was derived from a model's is read back without what it was given since.
        self.generation_config._from_model_config = False

    @torch.no_grad()
    def generate(
        self: LLM2SLMForConditionalGeneration,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *args: Any,
        prompt: LLM2SLMPrompt | None = None,
        mode: Mode = "hybrid",
        shortlist: Sequence[int] | None = None,
        **kwargs: Any,
    ) -> Any:
        r"""
        Read the prompt once and let the SLM write: this is the SLM's own `generate`, fed with the fused prompt. In float32 on an x86
        CPU, linear layers multiply few rows as [`few_row_linear`] does while it runs: faster, and the same but for rounding.

        Args:
            inputs (`torch.LongTensor` of shape `(batch_size, prompt_length)`, *optional*): `input_ids` by another name.
            generation_config (`GenerationConfig`, *optional*): Defaults to the SLM's, `model.generation_config`.
            prompt ([`LLM2SLMPrompt`], *optional*): The prompt, already encoded; the LLM is not run.
            mode (`str`, defaults to `"hybrid"`): `"lossless"` gives the LLM's own output, greedy or sampled, which the SLM
                drafts and the LLM verifies; for one prompt at a time, without beams, on a model that was loaded with
                `load_llm="whole"`. See [`generate_lossless`].
            shortlist (`Sequence[int]`, *optional*): The tokens that the SLM may write, see [`make_shortlist`]: its LM head scores
                no others, which makes steps faster. Defaults to `model.shortlist`; an empty one lifts that.
            kwargs: The prompt (see [`LLM2SLMModel.encode_prompt`]), and whatever the SLM's `generate` takes: `num_beams`,
                `do_sample`, `max_new_tokens`, `streamer`, `stop_strings`, `cache_implementation` ... Lengths count the
                response, for both kinds of SLM.

        Returns:
            What the SLM's `generate` returns; the sequences hold the response only. In lossless mode, what the LLM's returns.

        Raises:
            ValueError: for a mode that does not exist, lossless mode where it can't be had, or what needs the prompt's tokens:
                `assistant_model`, `assistant_early_exit`, `guidance_scale`; with `fusion="kv"` also for
                `prompt_lookup_num_tokens` and other caches than dynamic ones.
        """
        check_choice("mode", mode, get_args(Mode))
        fields = inspect.signature(self.model.encode_prompt).parameters
        prompt_kwargs = {name: kwargs.pop(name) for name in fields if name in kwargs}
        if kwargs.pop("labels", None) is not None:  # Seq2SeqTrainer passes the whole batch
            for name in ("shift_labels", "decoder_input_ids"):
                kwargs.pop(name, None)
        if inputs is not None:
            prompt_kwargs["input_ids"] = inputs
        if shortlist is not None:
            shortlist = as_token_ids(shortlist)
        else:
            shortlist = getattr(generation_config, "shortlist", self.shortlist)
        with (
            shortlisted(self.slm, shortlist, self.generation_config, generation_config, kwargs),
            few_row_linears(self),
        ):
            if mode == "lossless":
                return self._generate_lossless(prompt, prompt_kwargs, generation_config, *args, **kwargs)
            check_options(self.config.fusion, kwargs, generation_config, self.generation_config)
            if prompt is None:
                prompt = self.encode_prompt(**prompt_kwargs)
            kwargs |= self.model.slm_prompt(prompt)
            if self.config.fusion == "kv":
                kwargs["cache_implementation"] = None  # the SLM's config may name another than the prompt's
            if not self.slm.config.is_encoder_decoder:
                generation_config, kwargs = without_prompt_length(generation_config, kwargs, self.generation_config)
                if learns_positions(self.slm):
                    new_tokens = option("max_new_tokens", kwargs, generation_config, self.generation_config)
                    # The last token is not read. transformers writes 20 where nothing else is said.
                    read = (20 if new_tokens is None else new_tokens) - 1
                    check_response_length(read, prompt.attention_mask.shape[1], self.slm, "SLM")
            return self.slm.generate(None, generation_config, *args, **kwargs)

    def _generate_lossless(
        self: LLM2SLMForConditionalGeneration,
        prompt: LLM2SLMPrompt | None,
        prompt_kwargs: dict[str, Any],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        if prompt is not None or prompt_kwargs.get("llm_hidden_states") is not None:
            raise ValueError("In lossless mode the LLM reads and verifies: pass `input_ids`, not what it has read.")
        if self.model.whole_llm is None:
            raise ValueError(
                "Lossless generation needs the whole LLM, but this model holds the part of it that reads. Load the model "
                'with `load_llm="whole"`.'
            )
        return generate_lossless(self, self.model.whole_llm, prompt_kwargs, *args, **kwargs)
