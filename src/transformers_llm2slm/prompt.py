"""Prompts: what the LLM's reading leaves for the SLM, the checks before it, the fusion that makes it; and responses."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.modeling_outputs import ModelOutput

from .configuration_llm2slm import LLM2SLMConfig, decoder_text_config, encoder_text_config
from .key_values import last_tokens
from .structure import DroppedModule, embed_tokens, move_padding, position_limit


@dataclass
class LLM2SLMPrompt(ModelOutput):
    """
    A prompt that the LLM has read, ready for the SLM: what [`~LLM2SLMForConditionalGeneration.encode_prompt`] returns,
    and `forward` and `generate` take as `prompt=`, on this machine or another.

    Args:
        prompt_states (`torch.Tensor` of shape `(batch_size, prompt_length, slm_hidden_size)`): The fused prompt, padded
            on the right.
        attention_mask (`torch.LongTensor` of shape `(batch_size, prompt_length)`): 1 for real positions, 0 for padding.
        last_token_ids (`torch.LongTensor` of shape `(batch_size, 1)`, *optional*): For `fusion="kv"`, the last token of each
            prompt, which the SLM reads itself; `prompt_states` are then keys and values, of shape `(batch_size, prompt_length,
            num_llm_states, slm_state_size)`.
    """

    prompt_states: torch.Tensor = None  # type: ignore[assignment]
    attention_mask: torch.Tensor = None  # type: ignore[assignment]
    last_token_ids: torch.Tensor | None = None


def check_prompt_length(tokens: torch.Tensor, model: PreTrainedModel, part: str) -> None:
    """Raise a `ValueError` if a prompt of shape `(batch_size, prompt_length, ...)` is longer than `model` can take."""
    limit = position_limit(encoder_text_config(model.config), model)
    if limit is not None and tokens.shape[1] > limit:
        raise ValueError(
            f"The prompt is {tokens.shape[1]} tokens long (with padding), but the {part} ({type(model).__name__}) takes "
            f"at most {limit}. Shorten it, or truncate: `processor(..., truncation=True, max_length={limit})`."
        )


def check_tensor(name: str, value: Any) -> None:
    """Raise a `ValueError` for an argument of a model that is no tensor."""
    if value is not None and not isinstance(value, torch.Tensor):
        raise ValueError(
            f"`{name}` must be a tensor, got {type(value).__name__}. Text becomes tensors by `batch = processor(text, padding=True, "
            'return_tensors="pt")`, and what that returns is handed on by its names: `model.generate(**batch)`.'
        )


def prompt_mask(
    config: LLM2SLMConfig,
    llm: PreTrainedModel | None,
    input_ids: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    llm_hidden_states: torch.Tensor | None,
) -> torch.Tensor:
    """
    The attention mask `(batch_size, prompt_length)` of a prompt.

    Raises:
        ValueError: if there is no prompt, the batch is empty, its parts are not of one shape, a row has no token, padding is not marked, or
            tokens are not the LLM's.
    """
    given = {"input_ids": input_ids, "attention_mask": attention_mask, "llm_hidden_states": llm_hidden_states}
    for name, value in given.items():
        check_tensor(name, value)
    tokens = input_ids if input_ids is not None else llm_hidden_states
    if tokens is None:
        raise ValueError(
            "There is no prompt: pass `input_ids` (and `attention_mask`), `llm_hidden_states` or `prompt`, for instance "
            "what `LLM2SLMProcessor` returns."
        )
    shapes = {name: tuple(tensor.shape) for name, tensor in given.items() if tensor is not None}
    for name, shape in shapes.items():
        states = name == "llm_hidden_states"
        if len(shape) not in ((3, 4) if states else (2,)):
            expected = "prompt_length, [num_llm_states, ]llm_state_size" if states else "prompt_length"
            raise ValueError(f"`{name}` must be of shape (batch_size, {expected}), got {shape}.")
    if len({shape[:2] for shape in shapes.values()}) > 1:
        found = ", ".join(f"`{name}` is of shape {shape}" for name, shape in shapes.items())
        raise ValueError(f"The parts of a prompt must be of one batch size and one length, but {found}.")
    if attention_mask is None:
        pad = getattr(encoder_text_config(config.llm_config), "pad_token_id", None)
        if input_ids is not None and input_ids.shape[0] > 1 and pad is not None and bool((input_ids == pad).any()):
            raise ValueError(
                f"`input_ids` holds the LLM's padding token ({pad}) but there is no `attention_mask`, so padding can't be "
                "told from text. Pass the `attention_mask` that the processor returns."
            )
        attention_mask = torch.ones(tokens.shape[:2], dtype=torch.long, device=tokens.device)
    if torch.compiler.is_compiling():
        return attention_mask
    if tokens.shape[0] == 0:
        raise ValueError(
            "The batch must hold at least one prompt, found none: its parts are of batch size 0. Leave empty batches out."
        )
    if tokens.shape[1] == 0 or bool((attention_mask.sum(dim=1) == 0).any()):
        rows = [] if tokens.shape[1] == 0 else (attention_mask.sum(dim=1) == 0).nonzero()[:, 0].tolist()
        which = f"Prompt {rows[0]} of the batch is" if rows else "The prompt is"
        raise ValueError(f"{which} empty: the LLM needs at least one token to read. Leave empty prompts out.")
    if input_ids is not None and llm is not None:
        size = llm.get_input_embeddings().weight.shape[0]
        low, high = (int(bound) for bound in input_ids[attention_mask.to(input_ids.device) != 0].aminmax())
        if low < 0 or high >= size:
            raise ValueError(
                f"`input_ids` holds token {low if low < 0 else high}, but the LLM's vocabulary has {size} tokens. `input_ids` are the LLM's "
                "tokens: make them with `LLM2SLMProcessor` or the LLM's tokenizer. A token that was added to a tokenizer can pad prompts "
                "and stand in responses, but not in prompts, as the LLM is frozen and can't learn it."
            )
    return attention_mask


def padded_right(input_ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """
    Tokens of shape `(batch_size, prompt_length)` with all padding on the right, and of token 0: another may have been added to
    the tokenizer, and lie beyond the embeddings.
    """
    return move_padding(input_ids.to(mask.device).masked_fill(mask == 0, 0), mask, "right")


def slm_view(
    slm_input_ids: torch.Tensor | None, slm_attention_mask: torch.Tensor | None, alignment: torch.Tensor | None
) -> dict[str, torch.Tensor]:
    """
    The prompt in the SLM's tokens, as `fusion="align"` takes it: the three, by their names, padded on the right.

    Raises:
        ValueError: if there is none.
    """
    if slm_input_ids is None or alignment is None:
        views = {"slm_input_ids": slm_input_ids, "alignment": alignment}
        missing = [f"`{name}`" for name, view in views.items() if view is None]
        raise ValueError(
            '`fusion="align"` needs the prompt in both token views: `input_ids` of the LLM, `slm_input_ids`, '
            f"`slm_attention_mask` and `alignment` of the SLM. This batch lacks {' and '.join(missing)}. Make it with "
            "`LLM2SLMProcessor.from_llm_slm_pretrained` of the same two models."
        )
    mask = torch.ones_like(slm_input_ids) if slm_attention_mask is None else slm_attention_mask
    given = {"slm_attention_mask": mask, "alignment": alignment}
    moved = {name: move_padding(view, mask.to(view.device), "right") for name, view in given.items()}
    return {"slm_input_ids": padded_right(slm_input_ids, mask.to(slm_input_ids.device))} | moved


def one_to_one_view(slm_input_ids: torch.Tensor, slm_attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """What [`slm_view`] takes, of an SLM with as many tokens as the LLM: each, counted by its place, covers the LLM's own."""
    ranks = torch.arange(slm_input_ids.shape[1], device=slm_input_ids.device).expand(slm_input_ids.shape)
    return {"slm_input_ids": slm_input_ids, "slm_attention_mask": slm_attention_mask, "alignment": ranks}


def fuse(
    fusion: str,
    slm: PreTrainedModel,
    projected: torch.Tensor,
    mask: torch.Tensor,
    input_ids: torch.Tensor | None,
    slm_input_ids: torch.Tensor | None = None,
    slm_attention_mask: torch.Tensor | None = None,
    alignment: torch.Tensor | None = None,
) -> LLM2SLMPrompt:
    """
    Join the projected states with the SLM's own view of the prompt.

    Args:
        projected (`torch.Tensor` of shape `(batch_size, prompt_length, slm_hidden_size)`), mask, input_ids (of shape
            `(batch_size, prompt_length)`): What the projector made of each LLM token, padded on the right.
        slm_input_ids, slm_attention_mask, alignment (of shape `(batch_size, slm_prompt_length)`): The SLM's tokens and,
            for each, the rank of its LLM token in the row: for `"align"`, what [`slm_view`] gives.

    Raises:
        ValueError: if the batch lacks what the fusion needs, or the fused prompt is too long for the SLM.
    """
    device = projected.device
    if fusion == "align":
        views = (slm_input_ids, alignment, slm_attention_mask)
        ids, alignment, mask = (view.to(device) for view in views)  # type: ignore[union-attr]  # `slm_view` gives them
        index = alignment.clamp(0, projected.shape[1] - 1).unsqueeze(-1).expand(-1, -1, projected.shape[2])
        projected = projected.gather(1, index) + embed_tokens(slm, ids)
    elif fusion in ("add", "kv"):
        if input_ids is None:
            raise ValueError(
                f'`fusion="{fusion}"` needs `input_ids` beside `llm_hidden_states`, since the SLM embeds the same tokens.'
            )
        if fusion == "add":
            projected = projected + embed_tokens(slm, input_ids)
    # Where the encoder was dropped, nothing but cross-attention sees the prompt, which knows no positions.
    if not (slm.config.is_encoder_decoder and isinstance(slm.get_encoder(), DroppedModule)):
        check_prompt_length(projected, slm, "SLM")
    last = last_tokens(input_ids, mask) if fusion == "kv" else None  # type: ignore[arg-type]  # checked above
    return LLM2SLMPrompt(prompt_states=projected, attention_mask=mask.to(device), last_token_ids=last)


def slm_arguments(kwargs: dict[str, Any]) -> dict[str, Any]:
    """
    Arguments of a forward pass that go on to the SLM: those that are set, as PEFT names others and leaves them `None`.

    Raises:
        ValueError: for embeddings, in whose place there are a prompt and a response of this model's own.
    """
    given = {name: value for name, value in kwargs.items() if value is not None}
    for name in ("inputs_embeds", "decoder_inputs_embeds"):
        if name in given:
            raise ValueError(
                f"An LLM-to-SLM model takes no `{name}`: pass the prompt as `input_ids`, `llm_hidden_states` or `prompt`, and the "
                "response as `decoder_input_ids`. Of PEFT's methods, those that put virtual tokens before a prompt can't be used."
            )
    return given


# The response ------------------------------------------------------------------------------------------------------------
def check_labels(labels: torch.Tensor, vocab_size: int) -> None:
    """Raise a `ValueError` if `labels` are not tokens of a vocabulary of this size, padded with -100."""
    check_tensor("labels", labels)
    if torch.compiler.is_compiling():
        return
    foreign = (labels >= vocab_size) | ((labels < 0) & (labels != -100))
    if bool(foreign.any()):
        raise ValueError(
            f"`labels` holds token {int(labels[foreign][0])}, but the SLM's vocabulary has {vocab_size} tokens. `labels` "
            "are the response in the SLM's tokens, padded with -100: make them with `LLM2SLMProcessor(..., "
            "text_target=...)` or the SLM's tokenizer."
        )


def check_response_length(response_length: int, prompt_length: int, model: PreTrainedModel, part: str) -> None:
    """Raise a `ValueError` if `model` can't take a response of so many tokens after a prompt of so many."""
    limit = position_limit(decoder_text_config(model.config), model)
    if limit is not None and prompt_length + response_length > limit:
        what = f"prompt ({prompt_length}) and the response ({response_length})" if prompt_length else "response"
        raise ValueError(
            f"The {what} {'together are' if prompt_length else 'is'} {prompt_length + response_length} tokens long (with "
            f"padding), but the {part} ({type(model).__name__}) takes at most {limit}. Cut them: `max_prompt_length` and "
            "`max_response_length` of the collator, `max_length` and `max_target_length` of the processor, `max_new_tokens` of "
            "`generate`."
        )


def option(name: str, *sources: Any) -> Any:
    """What `name` comes to in arguments of `generate` and generation configs: the first that sets it counts, `None` if none does."""
    for source in sources:
        values = source if isinstance(source, dict) else {} if source is None else vars(source)
        if (value := values.get(name)) is not None:
            return value
    return None


def without_prompt_length(
    generation_config: GenerationConfig | None, kwargs: dict[str, Any], own: GenerationConfig
) -> tuple[GenerationConfig | None, dict[str, Any]]:
    """
    Arguments of `generate` in which every length counts the response.

    A decoder-only model takes `max_length` and `min_length` to include the prompt, which the user of this model doesn't
    write; so they become `max_new_tokens` and `min_new_tokens`, wherever they are set.

    Args:
        generation_config (`GenerationConfig`, *optional*), kwargs: What `generate` was given.
        own (`GenerationConfig`): The SLM's own, which fills what those two leave open.
    """
    config, kwargs = copy.deepcopy(generation_config), dict(kwargs)
    for bound in ("max", "min"):
        names = (f"{bound}_new_tokens", f"{bound}_length")  # the first takes precedence, as in transformers
        given, of_config, of_own = (
            next((source[name] for name in names if source.get(name) is not None), None)
            for source in (kwargs, {} if config is None else vars(config), vars(own))
        )
        if given is not None:
            kwargs |= zip(names, (given, None), strict=True)
        elif of_config is not None:
            for name, value in zip(names, (of_config, None), strict=True):
                setattr(config, name, value)
        elif getattr(own, names[1]):
            kwargs |= zip(names, (of_own, None), strict=True)
    return config, kwargs
