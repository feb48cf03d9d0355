"""Probes: short forward passes, made once when a model is composed, that tell whether a model can take its part at all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from .configuration_llm2slm import LLM2SLMConfig, decoder_text_config, key_value_heads
from .fingerprint import is_exact
from .key_values import key_value_states
from .llm_states import hidden_states
from .outputs import cache_of
from .structure import accepts, cache_argument, embed_tokens, mask_positions, reader

PADDING = 2


@contextmanager
def eval_mode(model: PreTrainedModel) -> Iterator[None]:
    """Eval mode for a while."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _some_tokens(embedding: Any) -> torch.Tensor:
    """Six tokens `(1, 6)` that any vocabulary has."""
    return torch.arange(3, 9, device=embedding.weight.device)[None] % embedding.weight.shape[0]


def _computes_exactly(states: torch.Tensor, model: PreTrainedModel) -> bool:
    """Whether a model computes in float32, with weights that are not quantised."""
    return states.dtype is torch.float32 and is_exact(model)


def _differ(first: torch.Tensor, second: torch.Tensor, model: PreTrainedModel) -> bool:
    """Whether two results of a model differ by more than rounding."""
    # LLM.int8 takes outliers out by the whole batch, so its rounding depends on the padding.
    tolerance = 1e-3 if _computes_exactly(first, model) else 0.05
    return (first - second).abs().max().item() > tolerance * max(first.abs().max().item(), 1e-3)


def _padding_matters(
    read: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    ids: torch.Tensor,
    alone: torch.Tensor,
    side: str,
    model: PreTrainedModel,
) -> bool:
    """
    Whether what `read(tokens, attention_mask)` gives for `ids` `(1, 6)` changes with masked padding at a side, `"left"` or `"right"`.

    Beside what it gives `alone`, or where a model rounds, beside other tokens as padding: between batches of different shapes alone, processors
    without bfloat16 round the states of sound models apart by a tenth and more.
    """

    def padded(padding: torch.Tensor) -> torch.Tensor:
        parts = [(padding, 0), (ids, 1)] if side == "left" else [(ids, 1), (padding, 0)]
        mask = torch.cat([torch.full_like(tokens, kept) for tokens, kept in parts], dim=1)
        return read(torch.cat([tokens for tokens, _ in parts], dim=1), mask)[:, mask[0].bool()]

    beside = alone if _computes_exactly(alone, model) else padded(ids[:, PADDING : 2 * PADDING])
    return _differ(beside, padded(ids[:, :PADDING]), model)


@torch.no_grad()
def check_can_read(llm: PreTrainedModel, config: LLM2SLMConfig) -> None:
    """
    Raise a `ValueError` that says why, if `llm` can't be the LLM: its states must have the width that its configuration
    tells, and must not depend on padding behind the prompt; where layers above `llm_layer` are not run, what is read must
    be its hidden states. Two to five forward passes over at most eight tokens.
    """
    name = type(llm).__name__
    body = llm.get_encoder() if llm.config.is_encoder_decoder else llm
    ids = _some_tokens(body.get_input_embeddings())

    def read(tokens: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return body(input_ids=tokens, attention_mask=attention_mask).last_hidden_state

    with eval_mode(llm):
        alone = read(ids, torch.ones_like(ids))
        padding_matters = _padding_matters(read, ids, alone, "right", llm)
    if alone.shape[-1] != config.llm_hidden_size:
        raise ValueError(
            f"{name} can't be the LLM: its states are {alone.shape[-1]} wide, but its configuration says "
            f"{config.llm_hidden_size}."
        )
    if padding_matters:
        raise ValueError(
            f"{name} can't be the LLM: its states change with padding that the attention mask marks, so a prompt would "
            "mean something else in each batch. Choose another LLM."
        )
    if config.llm_layers == [-1] or config.fusion == "kv":
        return
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "return_dict": True}
    with eval_mode(llm):
        expected = body(**inputs, output_hidden_states=True).hidden_states
        found = hidden_states(body, config.llm_layers, config.num_llm_layers, inputs)
    for layer, states in zip(config.llm_layers, found, strict=True):
        if _differ(expected[layer], states, llm):
            raise ValueError(
                f"{name} can't be read at `llm_layer` {layer}: its hidden states are not what its layers are given, so no "
                "layer below the last can be read alone. Choose `llm_layer=-1`."
            )


@torch.no_grad()
def check_keeps_key_values(model: PreTrainedModel, config: Any, part: str) -> None:
    """
    Raise a `ValueError` that says why, if the prompt of `model` can't be told or given as keys and values: every layer must keep
    those of all tokens, of the shape that its configuration tells. One forward pass over six tokens.
    """
    ids = _some_tokens(reader(model).get_input_embeddings())
    with eval_mode(model):
        cache = cache_of(model(input_ids=ids, use_cache=True, **{cache_argument(model.forward): DynamicCache()}))
    heads, size = key_value_heads(config)
    layers = range(decoder_text_config(config).num_hidden_layers)
    if cache is None or len(cache.layers) != len(layers):
        raise ValueError(
            f"{type(model).__name__} keeps keys and values for {0 if cache is None else len(cache.layers)} of its {len(layers)} "
            f'layers, so it can\'t be the {part} of `fusion="kv"`. Choose another fusion.'
        )
    widths = {states.shape[-1] for states in key_value_states(cache, layers, ids.shape[1])}
    if widths != {heads * size}:
        raise ValueError(
            f"{type(model).__name__} keeps keys and values of widths {sorted(widths)}, but its configuration tells of {heads} heads "
            f'of {size}, so it can\'t be the {part} of `fusion="kv"`. Choose another fusion.'
        )


def keeps_key_values(model: PreTrainedModel) -> bool:
    """Whether [`check_keeps_key_values`] has nothing to say; a model that takes no cache, or whose configuration tells of no heads, keeps none."""
    if not accepts(model.forward, cache_argument(model.forward)) or not all(key_value_heads(model.config)):
        return False
    try:
        check_keeps_key_values(model, model.config, "LLM")
    except ValueError:
        return False
    return True


@torch.no_grad()
def check_can_write(slm: PreTrainedModel) -> None:
    """
    Raise a `ValueError` that says why, if `slm` can't continue from a prompt that is given as embeddings: its logits must
    be the same from `input_ids` and from `inputs_embeds`; those of a decoder-only SLM must depend neither on later
    tokens nor on padding before the prompt. Two to five forward passes over at most eight tokens.
    """
    name = type(slm).__name__
    causal = not slm.config.is_encoder_decoder
    if not accepts(slm.forward, "inputs_embeds"):
        raise ValueError(f"{name} can't be the SLM: its `forward` takes no `inputs_embeds`. Choose another SLM.")
    if causal and not accepts(slm.prepare_inputs_for_generation, "inputs_embeds"):
        raise ValueError(f"{name} can't be the SLM: its `generate` takes no `inputs_embeds`. Choose another SLM.")
    ids = _some_tokens(reader(slm).get_input_embeddings())
    extra = {} if causal else {"decoder_input_ids": ids[:, :2]}
    with eval_mode(slm):
        expected = slm(input_ids=ids, **extra).logits
        if _differ(expected, slm(inputs_embeds=embed_tokens(slm, ids), **extra).logits, slm):
            raise ValueError(
                f"{name} can't be the SLM: its logits from `inputs_embeds` are not those from `input_ids`, so it can't "
                "take a prompt as embeddings. Choose another SLM."
            )
        if not causal:
            return
        other_end = torch.cat([ids[:, :-1], ids[:, :1]], dim=1)
        if _differ(expected[:, :-1], slm(input_ids=other_end).logits[:, :-1], slm):
            raise ValueError(
                f"{name} can't be the SLM: its logits depend on later tokens (`is_decoder` is "
                f"{getattr(slm.config, 'is_decoder', None)}). Set `is_decoder=True` in its config or choose a causal SLM."
            )

        def write(tokens: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            positions = {"position_ids": mask_positions(attention_mask)}
            positions = positions if accepts(slm.forward, "position_ids") else {}
            return slm(inputs_embeds=embed_tokens(slm, tokens), attention_mask=attention_mask, **positions).logits

        if _padding_matters(write, ids, expected, "left", slm):
            raise ValueError(
                f"{name} can't be the SLM: its logits change with padding that the attention mask marks, so an answer "
                "would depend on the other prompts of its batch. Choose another SLM."
            )
