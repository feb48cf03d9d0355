"""The graphs that an exported model consists of: modules to trace, what they are traced with, and their free axes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import AttentionInterface, Cache, DynamicCache, EncoderDecoderCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.masking_utils import AttentionMaskInterface, eager_mask
from transformers.modeling_outputs import BaseModelOutput

from .configuration_llm2slm import decoder_text_config
from .prompt import fuse
from .structure import accepts, embed_tokens, mask_positions

if TYPE_CHECKING:
    from .modeling_llm2slm import LLM2SLMForConditionalGeneration, LLM2SLMModel

ATTENTION = "llm2slm_export"
# Sizes that graphs are traced with. They differ, so that none is taken for another.
BATCH, PROMPT, PAST, NEW = 2, 7, 5, 3


# Modules -----------------------------------------------------------------------------------------------------------------
class PromptGraph(nn.Module):
    """LLM, projector, fusion and the SLM's encoder, if it has one: from tokens to what the SLM takes of a prompt."""

    def __init__(self, model: LLM2SLMModel):
        super().__init__()
        self.model = model

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        slm_input_ids: torch.Tensor | None = None,
        slm_attention_mask: torch.Tensor | None = None,
        alignment: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        model = self.model
        projected = model.projector(model.llm_states(input_ids, attention_mask))
        prompt = fuse(
            model.config.fusion,
            model.slm,
            projected,
            attention_mask,
            input_ids,
            slm_input_ids,
            slm_attention_mask,
            alignment,
        )
        states = prompt.prompt_states
        if model.slm.config.is_encoder_decoder and model.config.slm_encoder != "skip":
            states = model.slm.get_encoder()(
                inputs_embeds=states, attention_mask=prompt.attention_mask, return_dict=True
            ).last_hidden_state
        return {"prompt_states": states}


class CrossGraph(nn.Module):
    """Keys and values of an encoder-decoder SLM's cross-attention, which are the same in every step."""

    def __init__(self, slm: PreTrainedModel):
        super().__init__()
        self.slm = slm

    def forward(self, prompt_states: torch.Tensor) -> dict[str, list[torch.Tensor]]:
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        tokens = torch.zeros((prompt_states.shape[0], 1), dtype=torch.long)
        self.slm(
            decoder_input_ids=tokens,
            encoder_outputs=BaseModelOutput(last_hidden_state=prompt_states),
            cache=cache,
            use_cache=True,
        )
        return cache_tensors(cache.cross_attention_cache, "cross_")


class EmbedGraph(nn.Module):
    """Embeddings of a decoder-only SLM's tokens, so that its step takes a fused prompt and tokens alike."""

    def __init__(self, slm: PreTrainedModel):
        super().__init__()
        self.slm = slm

    def forward(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"inputs_embeds": embed_tokens(self.slm, input_ids)}


class StepGraph(nn.Module):
    """One pass of the SLM's decoder over new tokens, behind what is in its cache: logits after the last of them."""

    def __init__(self, slm: PreTrainedModel):
        super().__init__()
        self.slm = slm

    def forward(
        self,
        attention_mask: torch.Tensor,
        keys: list[torch.Tensor],
        values: list[torch.Tensor],
        decoder_input_ids: torch.Tensor | None = None,
        cross_keys: list[torch.Tensor] | None = None,
        cross_values: list[torch.Tensor] | None = None,
        inputs_embeds: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
    ) -> dict[str, Any]:
        cache: Any = filled_cache(keys, values)
        if cross_keys is not None and cross_values is not None:
            own, cache = cache, EncoderDecoderCache(cache, filled_cache(cross_keys, cross_values))
            # Only its shape is read: the keys and values of what the encoder said are there.
            states = torch.zeros((*attention_mask.shape, decoder_text_config(self.slm.config).hidden_size))
            inputs: dict[str, Any] = {
                "decoder_input_ids": decoder_input_ids,
                "encoder_outputs": BaseModelOutput(last_hidden_state=states),
            }
        else:
            own, inputs = cache, {"inputs_embeds": inputs_embeds}
            if position_ids is not None:
                inputs["position_ids"] = position_ids
            if accepts(self.slm.forward, "logits_to_keep"):
                inputs["logits_to_keep"] = 1
        outputs = self.slm(**inputs, attention_mask=attention_mask, cache=cache, use_cache=True, return_dict=True)
        return {"logits": outputs.logits[:, -1:]} | cache_tensors(own, "new_")


def filled_cache(keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> DynamicCache:
    """A cache that holds these keys and values, each of shape `(batch_size, num_heads, length, head_size)`."""
    cache = DynamicCache()
    for key, value in zip(keys, values, strict=True):
        layer = DynamicLayer()
        layer.keys, layer.values, layer.dtype, layer.device = key, value, key.dtype, key.device
        layer.is_initialized = True
        cache.layers.append(layer)
    return cache


def cache_tensors(cache: Cache, prefix: str = "") -> dict[str, list[torch.Tensor]]:
    """Keys and values of a cache, by layer."""
    return {f"{prefix}{name}": [getattr(layer, name) for layer in cache.layers] for name in ("keys", "values")}


# Attention ---------------------------------------------------------------------------------------------------------------
def export_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    position_bias: torch.Tensor | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """
    Attention in the fewest operations that move no cache around, as graphs run them one by one: heads that share keys and
    values become rows of one product, where transformers' own repeats the keys and values.

    Args:
        query (`torch.Tensor` of shape `(batch_size, num_heads, length, head_size)`).
        key, value (`torch.Tensor` of shape `(batch_size, num_key_value_heads, key_length, head_size)`).
        attention_mask, position_bias (*optional*): What is added to the scores.

    Returns:
        `torch.Tensor` of shape `(batch_size, length, num_heads, head_size)`, and no weights.
    """
    batch, heads, length, size = query.shape
    groups = key.shape[1]
    # Moving the heads past a single token moves nothing: what was done so is undone, and is a reshape.
    one_token = isinstance(length, int) and length == 1
    query = query.transpose(1, 2).reshape(batch, heads, 1, size) if one_token else query
    query = query * (size**-0.5 if scaling is None else scaling)
    shared = heads != groups
    # Where the length is free, a shape that is spelled out keeps the converter from losing the rank further on (GPT-2).
    spelled_out = shared or not isinstance(length, int)
    rows = query.reshape(batch, groups, -1, size) if spelled_out else query
    scores = rows @ key.transpose(-1, -2)
    scores = scores.reshape(batch, heads, length, -1) if shared else scores
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if position_bias is not None:
        # Both biases are the same in every layer, so the graph adds them up once. Before the scores, and not behind them, as the
        # attention that such a sum would be fused to is slower.
        scores = (position_bias if attention_mask is None else position_bias + attention_mask) + scores
    elif attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(dim=-1)
    weights = weights.reshape(batch, groups, -1, key.shape[2]) if shared else weights
    output = weights @ value
    if one_token:
        return output.reshape(batch, 1, heads, size), None
    return (output.reshape(batch, heads, length, size) if shared else output).transpose(1, 2), None


def export_mask(
    *,
    q_length: int,
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = False,
    **kwargs: Any,
) -> torch.Tensor | None:
    """The mask of eager attention, and none where the graph takes a single token that may look at all that is behind it."""
    one_token = isinstance(q_length, int) and q_length == 1
    if one_token and allow_is_causal_skip and attention_mask is None and local_size is None:
        return None
    return eager_mask(q_length=q_length, attention_mask=attention_mask, local_size=local_size, **kwargs)


AttentionInterface.register(ATTENTION, export_attention)
AttentionMaskInterface.register(ATTENTION, export_mask)


@contextmanager
def exporting(slm: PreTrainedModel, attention: str) -> Iterator[None]:
    """`slm` with this attention, and with an LM head of its own that a quantiser finds, for as long as the block runs."""
    head, before = slm.get_output_embeddings(), slm.config._attn_implementation
    weight = head.weight
    head.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
    slm.set_attn_implementation(attention)
    try:
        yield
    finally:
        head.weight = weight
        slm.set_attn_implementation(before)


# Tracing -----------------------------------------------------------------------------------------------------------------
@dataclass
class Graph:
    """
    What is traced.

    Args:
        module (`nn.Module`): The computation.
        inputs (`dict[str, Any]`): Tensors, and lists of them, to trace it with.
        axes (`dict[str, tuple[int, ...]]`): The axes of each input (of every tensor of a list) that stay free.
    """

    module: nn.Module
    inputs: dict[str, Any]
    axes: dict[str, tuple[int, ...]]

    @property
    def dynamic_shapes(self) -> dict[str, Any]:
        """The free axes as `torch.export` wants them."""
        from torch.export import Dim

        free = {name: dict.fromkeys(axes, Dim.AUTO) for name, axes in self.axes.items()}
        return {
            name: [free[name]] * len(value) if isinstance(value, list) else free[name]
            for name, value in self.inputs.items()
        }


@torch.no_grad()
def graphs_of(model: LLM2SLMForConditionalGeneration) -> dict[str, Graph]:
    """The graphs of a model: `prompt`; `cross` for an encoder-decoder SLM or `embed` for a decoder-only one; `step`."""
    # Every input is a tensor of its own: one that is given twice would be one input of the graph.
    slm, ids = model.slm, torch.ones((BATCH, PROMPT), dtype=torch.long)
    reads = {name: ids.clone() for name in ("input_ids", "attention_mask")}
    if model.config.fusion == "align":  # the prompt in the SLM's tokens is of a length of its own
        own = torch.ones((BATCH, PROMPT + 2), dtype=torch.long)
        reads |= {name: own.clone() for name in ("slm_input_ids", "slm_attention_mask", "alignment")}
    reader, step = PromptGraph(model.model).eval(), StepGraph(slm).eval()
    graphs = {"prompt": Graph(reader, reads, dict.fromkeys(reads, (0, 1)))}
    states = reader(**reads)["prompt_states"]
    if slm.config.is_encoder_decoder:
        cross = CrossGraph(slm).eval()
        graphs["cross"] = Graph(cross, {"prompt_states": states}, {"prompt_states": (0, 1)})
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        encoded = BaseModelOutput(last_hidden_state=states)
        slm(decoder_input_ids=ids[:, :PAST], encoder_outputs=encoded, cache=cache, use_cache=True)
        inputs = {
            "decoder_input_ids": ids[:, :1],
            "attention_mask": torch.ones(states.shape[:2], dtype=torch.long),
            **cache_tensors(cache.self_attention_cache),
            **cache_tensors(cache.cross_attention_cache, "cross_"),
        }
        axes: dict[str, tuple[int, ...]] = {"decoder_input_ids": (0,), "attention_mask": (0, 1)}
        graphs["step"] = Graph(
            step, inputs, axes | dict.fromkeys(("keys", "values", "cross_keys", "cross_values"), (0, 2))
        )
        return graphs
    graphs["embed"] = Graph(EmbedGraph(slm).eval(), {"input_ids": ids}, {"input_ids": (0, 1)})
    own_cache, mask = DynamicCache(), torch.ones((BATCH, PAST + NEW), dtype=torch.long)
    slm(inputs_embeds=embed_tokens(slm, ids[:, :PAST]), cache=own_cache, use_cache=True)
    inputs = {"inputs_embeds": embed_tokens(slm, ids[:, :NEW]), "attention_mask": mask, **cache_tensors(own_cache)}
    if accepts(slm.forward, "position_ids"):
        inputs["position_ids"] = mask_positions(mask)[:, -NEW:]
    free = dict.fromkeys(inputs, (0, 1)) | dict.fromkeys(("keys", "values"), (0, 2))
    graphs["step"] = Graph(step, inputs, dict(free))
    return graphs
