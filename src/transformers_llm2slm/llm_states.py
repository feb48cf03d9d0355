"""Reading: what the frozen LLM makes of a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from .configuration_llm2slm import LLM2SLMConfig
from .prompt import check_prompt_length
from .structure import accepts, embed_tokens, layer_list


class _LayerReached(Exception):
    """Ends a forward pass at the layer above which nothing is asked for."""


@torch.no_grad()
def read_llm_states(
    llm: PreTrainedModel, config: LLM2SLMConfig, input_ids: torch.Tensor, attention_mask: torch.Tensor
) -> torch.Tensor:
    """
    Run the frozen LLM over a batch of prompts that is padded on the right, no further than the highest layer asked for.

    Args:
        llm (`PreTrainedModel`): The LLM's reading part.
        config ([`LLM2SLMConfig`]): Says which states the projector takes.
        input_ids, attention_mask (`torch.LongTensor` of shape `(batch_size, prompt_length)`).

    Returns:
        `torch.Tensor` of shape `(batch_size, prompt_length, num_llm_states, llm_hidden_size)`: the layers of
        `config.llm_layer` and, for `fusion="llm-embed"`, the tokens' embeddings.

    Raises:
        ValueError: for prompts that are longer than the LLM can read.
    """
    check_prompt_length(input_ids, llm, "LLM")
    body = llm.get_encoder() if llm.config.is_encoder_decoder else llm
    device = body.get_input_embeddings().weight.device
    inputs = {"input_ids": input_ids.to(device), "attention_mask": attention_mask.to(device), "return_dict": True}
    if accepts(body.forward, "use_cache"):
        inputs["use_cache"] = False
    states = hidden_states(body, config.llm_layers, config.num_llm_layers, inputs)
    if config.fusion == "llm-embed":
        states.append(embed_tokens(llm, input_ids).to(states[0].device))
    return torch.stack(states, dim=2)


def hidden_states(
    body: nn.Module, layers: Sequence[int], num_layers: int | None, inputs: dict[str, Any]
) -> list[torch.Tensor]:
    """
    The states of a model at some of its layers, as `output_hidden_states` gives them; layers above them are not run.

    Args:
        body: The model without a head.
        layers: Indices into its hidden states; 0 is its embedding output, -1 its last layer.
        num_layers: How many layers it has; `None` if that is not known.
        inputs: Arguments of its forward pass.

    Returns:
        A tensor of shape `(batch_size, sequence_length, hidden_size)` for each of `layers`.
    """
    if num_layers is not None:
        layers = [layer % (num_layers + 1) for layer in layers]
        # A forward pass that is left half way would leave shards gathered.
        if max(layers) < num_layers and not any(isinstance(module, FSDPModule) for module in body.modules()):
            if (reached := _layer_inputs(body, layers, num_layers, inputs)) is not None:
                return reached
        if set(layers) == {num_layers}:
            layers = [-1]
    if set(layers) == {-1}:
        return [body(**inputs).last_hidden_state] * len(layers)
    outputs = body(**inputs, output_hidden_states=True)
    return [outputs.hidden_states[layer] for layer in layers]


def _layer_inputs(
    body: nn.Module, layers: Sequence[int], num_layers: int, inputs: dict[str, Any]
) -> list[torch.Tensor] | None:
    """What the modules at `layers` are given, in a pass that ends at the highest; `None` where they can't be found."""
    try:
        blocks = body.get_submodule(layer_list(body, num_layers))
    except ValueError:
        return None
    states: dict[int, torch.Tensor] = {}
    hooks = []
    for layer in set(layers):

        def record(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], layer: int = layer) -> None:
            states[layer] = args[0] if args else kwargs["hidden_states"]
            if layer == max(layers):
                raise _LayerReached

        hooks.append(blocks[layer].register_forward_pre_hook(record, with_kwargs=True))  # type: ignore[index]
    try:
        body(**inputs)
    except _LayerReached:
        return [states[layer] for layer in layers]
    finally:
        for hook in hooks:
            hook.remove()
    return None
