"""What the models return."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers.cache_utils import Cache
from transformers.modeling_outputs import ModelOutput


@dataclass
class LLM2SLMModelOutput(ModelOutput):
    """
    Args:
        last_hidden_state (`torch.Tensor` of shape `(batch_size, response_length, hidden_size)`): The SLM's states at the
            response's positions; position `t` is the one that predicts token `t`.
        past_key_values (`Cache`, *optional*): The SLM's cache.
    """

    last_hidden_state: torch.Tensor | None = None
    past_key_values: Cache | None = None


@dataclass
class LLM2SLMOutput(ModelOutput):
    """
    Args:
        loss (`torch.Tensor` of shape `(1,)`, *optional*): The SLM's own language-model loss over the response.
        logits (`torch.Tensor` of shape `(batch_size, response_length, vocab_size)`): `logits[:, t]` scores token `t` of
            the response.
        past_key_values (`Cache`, *optional*): The SLM's cache.
        hidden_states, attentions (`tuple(torch.Tensor)`, *optional*): Those of the SLM's decoder, where asked for.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
