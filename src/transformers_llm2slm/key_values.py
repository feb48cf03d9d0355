"""
`fusion="kv"`: the SLM gets the prompt as keys and values, those that layers of the LLM made of it, and reads none of it itself.

For an SLM cut from the LLM they are exactly what its layers would attend to in the LLM. What the LLM's states are elsewhere, they
are here: `2 * num_layers` states for each token, keys and values of the first layer, of the second and so on, all heads side by
side. The last token of the prompt is the first that the SLM reads, as in any decoder that goes on from a filled cache.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import init
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from .configuration_llm2slm import LLM2SLMConfig
from .outputs import cache_of
from .structure import cache_argument, floating_dtype


class KeyValueProjector(nn.Module):
    """
    A linear map for the keys of each layer, and one for its values.

    Shapes:
        input: `(batch_size, prompt_length, num_llm_states, llm_state_size)`
        output: `(batch_size, prompt_length, num_llm_states, slm_state_size)`
    """

    def __init__(self, config: LLM2SLMConfig):
        super().__init__()
        sizes = config.llm_state_size, config.slm_state_size
        layers = [nn.Linear(*sizes) for _ in range(config.num_llm_states)]
        self.layers = nn.ModuleList(layers)
        self.residual = config.projector_residual
        for layer in layers:
            if config.projector_init == "identity":
                init.zeros_(layer.weight)
            else:
                init.xavier_uniform_(layer.weight)
            init.zeros_(layer.bias)

    def forward(self, llm_states: torch.Tensor) -> torch.Tensor:
        states = llm_states.to(floating_dtype(self.layers[0]))
        mapped = torch.stack([layer(states[:, :, index]) for index, layer in enumerate(self.layers)], dim=2)
        return mapped + states if self.residual else mapped


# What the LLM keeps ------------------------------------------------------------------------------------------------------
def key_value_states(cache: Cache, layers: Sequence[int], length: int) -> list[torch.Tensor]:
    """
    Keys and values of some layers of a cache that has just been filled with `length` tokens.

    Returns:
        Two tensors for each of `layers`, of shape `(batch_size, length, num_heads * head_size)`.

    Raises:
        ValueError: for layers that keep something else.
    """
    states = []
    for layer in layers:
        kept = cache.layers[layer]
        for name in ("keys", "values"):
            tensor = getattr(kept, name, None)
            if not isinstance(tensor, torch.Tensor) or tensor.dim() != 4 or tensor.shape[2] != length:
                found = tuple(tensor.shape) if isinstance(tensor, torch.Tensor) else type(kept).__name__
                raise ValueError(
                    f'`fusion="kv"` takes the {name} that the LLM\'s layer {layer} keeps of each of {length} tokens, found '
                    f"{found}. Choose another fusion for this LLM."
                )
            states.append(tensor.transpose(1, 2).flatten(2))
    return states


def read_key_values(body: nn.Module, layers: Sequence[int], inputs: dict[str, Any]) -> list[torch.Tensor]:
    """Run a decoder over a prompt for its keys and values at some layers; see [`key_value_states`]."""
    cache = DynamicCache()  # without a configuration every layer keeps all tokens, whatever its window
    outputs = body(**inputs | {"use_cache": True, cache_argument(body.forward): cache})
    return key_value_states(cache_of(outputs) or cache, layers, inputs["input_ids"].shape[1])


@contextmanager
def recorded_key_values(body: nn.Module, layers: Sequence[int], length: int) -> Iterator[list[torch.Tensor]]:
    """As `recorded_states`, for keys and values: from the first pass that somebody else makes inside of the block."""
    recorded: list[torch.Tensor] = []
    thread = threading.get_ident()  # others may be reading with the same model

    def take(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not recorded and threading.get_ident() == thread:
            recorded.extend(key_value_states(cache_of(output), layers, length))

    hook = body.register_forward_hook(take)
    try:
        yield recorded
    finally:
        hook.remove()


# What the SLM gets -------------------------------------------------------------------------------------------------------
class PromptLayer(DynamicLayer):
    """
    A layer of a cache that begins with a prompt. It takes the number of rows and the precision of what is added first: beams and
    several sequences for a prompt share what it holds, and autocast computes in another precision.
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor):
        super().__init__()
        self.keys, self.values, self.dtype, self.device = keys, values, keys.dtype, keys.device
        self.is_initialized = True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if (repeats := len(key_states) // len(self.keys)) > 1:
            self.keys, self.values = (tensor.repeat_interleave(repeats, dim=0) for tensor in (self.keys, self.values))
        self.keys, self.values = self.keys.to(key_states.dtype), self.values.to(value_states.dtype)
        return super().update(key_states, value_states, *args, **kwargs)


def prompt_cache(states: torch.Tensor, num_heads: int) -> DynamicCache:
    """
    A cache that holds all of a prompt but its last token.

    Args:
        states (`torch.Tensor` of shape `(batch_size, prompt_length, 2 * num_layers, num_heads * head_size)`): Padded on the left.
    """
    heads = states[:, :-1].unflatten(-1, (num_heads, -1)).permute(2, 0, 3, 1, 4)
    cache = DynamicCache()
    cache.layers = [PromptLayer(heads[index], heads[index + 1]) for index in range(0, len(heads), 2)]
    return cache


def last_tokens(input_ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The last token of each prompt, of shape `(batch_size, 1)`, in a batch that is padded on the right."""
    return input_ids.gather(1, mask.sum(dim=1, keepdim=True).to(input_ids.device) - 1)


def take_cache(kwargs: dict[str, Any]) -> Cache | None:
    """The cache in the arguments of a forward pass, by either of its names; it is taken out of them."""
    found = [kwargs.pop(name, None) for name in ("cache", "past_key_values")]
    return found[0] if found[0] is not None else found[1]


def cached_length(slm: Any, inputs: dict[str, Any]) -> int:
    """
    How many tokens the cache in the arguments of an SLM's forward pass holds.

    Raises:
        ValueError: if the SLM would leave it out, as it does with gradient checkpointing.
    """
    cache = inputs.get(cache_argument(slm.forward))
    if cache is None:
        return 0
    if slm.training and any(getattr(module, "gradient_checkpointing", False) for module in slm.modules()):
        raise ValueError(
            'With gradient checkpointing a model takes no cache, and with `fusion="kv"` that is where the prompt is. Train '
            "without it: `gradient_checkpointing=False`."
        )
    return cache.get_seq_length()


def continued_prompt(
    slm: Any, config: LLM2SLMConfig, states: torch.Tensor, mask: torch.Tensor, embeds: torch.Tensor
) -> dict[str, Any]:
    """
    The arguments by which an SLM goes on behind a prompt that it did not read.

    Args:
        states, mask: Keys and values as for [`prompt_cache`], and the mask `(batch_size, prompt_length)`.
        embeds (`torch.Tensor` of shape `(batch_size, 1, embedding_size)`): The SLM's embedding of the prompt's last token.

    Returns:
        As `generate` wants it, `inputs_embeds` for the whole prompt, of which it takes what the cache lacks.
    """
    return {
        "inputs_embeds": embeds.expand(-1, mask.shape[1], -1),
        "attention_mask": mask,
        cache_argument(slm.forward): prompt_cache(states, config.slm_key_value_heads[0]),
    }
