"""Reading: what the frozen LLM makes of a prompt."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from .configuration_llm2slm import LLM2SLMConfig
from .key_values import read_key_values
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
        `torch.Tensor` of shape `(batch_size, prompt_length, num_llm_states, llm_state_size)`: the layers of
        `config.llm_layer` and, for `fusion="llm-embed"`, the tokens' embeddings; for `"kv"`, their keys and values.

    Raises:
        ValueError: for prompts that are longer than the LLM can read.
    """
    check_prompt_length(input_ids, llm, "LLM")
    body = llm.get_encoder() if llm.config.is_encoder_decoder else llm
    device = body.get_input_embeddings().weight.device
    inputs = {"input_ids": input_ids.to(device), "attention_mask": attention_mask.to(device), "return_dict": True}
    if config.fusion == "kv":
        return torch.stack(read_key_values(body, config.llm_layers, inputs), dim=2)
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
        # A forward pass that is left half way would leave shards gathered; and a trace, which drops what it does not need
        # by itself, can't be left.
        whole = torch.compiler.is_compiling() or any(isinstance(module, FSDPModule) for module in body.modules())
        if max(layers) < num_layers and not whole:
            if (reached := _layer_inputs(body, layers, num_layers, inputs)) is not None:
                return reached
        if set(layers) == {num_layers}:
            layers = [-1] * len(layers)
    if set(layers) == {-1}:
        return [body(**inputs).last_hidden_state] * len(layers)
    outputs = body(**inputs, output_hidden_states=True)
    return [outputs.hidden_states[layer] for layer in layers]


def _layer_inputs(
    body: nn.Module, layers: Sequence[int], num_layers: int, inputs: dict[str, Any]
) -> list[torch.Tensor] | None:
    """What the modules at `layers` are given, in a pass that ends at the highest; `None` where they can't be found."""
    states: dict[int, torch.Tensor] = {}

    def take(layer: int, state: torch.Tensor) -> None:
        states[layer] = state
        if layer == max(layers):
            raise _LayerReached

    try:
        with _hooks(body, layers, num_layers, take):
            body(**inputs)
    except _LayerReached:
        return [states[layer] for layer in layers]
    except LayersNotFound:
        pass
    return None


class LayersNotFound(ValueError):
    """Raised for a model whose layers can't be told from its other parts."""


@contextmanager
def _hooks(
    body: nn.Module, layers: Sequence[int], num_layers: int | None, take: Callable[[int, torch.Tensor], None]
) -> Iterator[None]:
    """Hand the states at `layers` (-1 or `num_layers` for the last) to `take`, in every pass that this thread makes in the block."""
    thread = threading.get_ident()

    def take_own(layer: int, state: torch.Tensor) -> None:
        if threading.get_ident() == thread:  # others may be reading with the same model
            take(layer, state)

    last = set(layers) & {-1, num_layers}
    hooks = []
    try:
        if others := set(layers) - last:
            try:
                blocks = list(body.get_submodule(layer_list(body, num_layers or 0)).children())
            except ValueError as error:
                raise LayersNotFound(str(error)) from error
        for layer in others:

            def give_input(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], layer: int = layer) -> None:
                take_own(layer, args[0] if args else kwargs["hidden_states"])

            hooks.append(blocks[layer].register_forward_pre_hook(give_input, with_kwargs=True))

        def give_output(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            for layer in last:
                take_own(layer, output.last_hidden_state)

        hooks.append(body.register_forward_hook(give_output))
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def recorded_states(body: nn.Module, layers: Sequence[int], num_layers: int | None) -> Iterator[list[torch.Tensor]]:
    """
    The states of a model at some of its layers, from the first pass that somebody else makes inside of the block.

    Args:
        body, layers, num_layers: As for [`hidden_states`].

    Returns:
        A list that is empty until then, and holds a tensor of shape `(batch_size, sequence_length, hidden_size)` for each
        of `layers` afterwards.
    """
    if num_layers is not None:
        layers = [layer % (num_layers + 1) for layer in layers]
    states: dict[int, torch.Tensor] = {}
    recorded: list[torch.Tensor] = []

    def take(layer: int, state: torch.Tensor) -> None:
        states.setdefault(layer, state)
        if not recorded and states.keys() == set(layers):
            recorded.extend(states[layer] for layer in layers)

    with _hooks(body, layers, num_layers, take):
        yield recorded
