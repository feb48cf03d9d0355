"""What the models return."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers.cache_utils import Cache
from transformers.modeling_outputs import ModelOutput


def cache_of(outputs: ModelOutput) -> Cache | None:
    """The cache of what a transformers model returned. transformers calls it `past_key_values` up to 5.23."""
    return outputs["cache"] if "cache" in outputs else outputs.get("past_key_values")


class _OldName:
    @property
    def past_key_values(self) -> Cache | None:
        """The cache, by the name that it had up to transformers 5.23."""
        return self.cache  # type: ignore[attr-defined]


@dataclass
class LLM2SLMModelOutput(_OldName, ModelOutput):
    """
    Args:
        last_hidden_state (`torch.Tensor` of shape `(batch_size, response_length, hidden_size)`): The SLM's states at the
            response's positions; position `t` is the one that predicts token `t`.
        cache (`Cache`, *optional*): The SLM's cache.
    """

    last_hidden_state: torch.Tensor | None = None
    cache: Cache | None = None


@dataclass
class LLM2SLMOutput(_OldName, ModelOutput):
    """
    Args:
        loss (`torch.Tensor`, a scalar, *optional*): The SLM's own language-model loss over the response.
        logits (`torch.Tensor` of shape `(batch_size, response_length, vocab_size)`): `logits[:, t]` scores token `t` of
            the response.
        cache (`Cache`, *optional*): The SLM's cache.
        hidden_states, attentions (`tuple(torch.Tensor)`, *optional*): Those of the SLM's decoder, where asked for.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    cache: Cache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
