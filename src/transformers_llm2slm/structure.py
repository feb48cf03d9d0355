"""What a transformers model offers, found out from the model itself: its embeddings, limits, layers and parts.

Nothing here knows a model family by name, so a family that appears tomorrow is treated like those of today.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel


def accepts(function: Callable, name: str) -> bool:
    """Whether `function` has a parameter called `name`."""
    return name in inspect.signature(function).parameters


def cache_argument(function: Callable) -> str:
    """What `function`, a model's forward, calls the argument for its cache. transformers says `past_key_values` up to 5.23."""
    return "cache" if accepts(function, "cache") else "past_key_values"


class DroppedModule(nn.Module):
    """Stands where a part was that this model never runs. It holds no weights."""

    main_input_name = "input_ids"

    def __init__(self, what: str):
        super().__init__()
        self.what = what

    def get_input_embeddings(self) -> None:
        """There are none."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(f"{self.what} was dropped when the model was composed and can't be run.")


def drop_module(model: PreTrainedModel, module: nn.Module, what: str) -> None:
    """Take `module` and its weights out of `model`, and out of what the model knows about tied weights."""
    path = next(name for name, candidate in model.named_modules() if candidate is module)
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, DroppedModule(what))
    for prefix, submodel in model.named_modules():
        if isinstance(submodel, PreTrainedModel) and path.startswith(f"{prefix}." if prefix else ""):
            dropped = path[len(prefix) + 1 :] if prefix else path
            for attribute in ("_tied_weights_keys", "all_tied_weights_keys"):
                if ties := getattr(submodel, attribute, None):
                    setattr(submodel, attribute, _without_dropped_ties(ties, f"{dropped}."))


def _without_dropped_ties(ties: dict[str, str], dropped: str) -> dict[str, str]:
    """The `{target: source}` ties that are left without `dropped`; targets that lose their source share a new one."""
    kept: dict[str, str] = {}
    new_source: dict[str, str] = {}
    for target, source in ties.items():
        if target.startswith(dropped):
            continue
        if source.startswith(dropped):
            if (heir := new_source.setdefault(source, target)) != target:
                kept[target] = heir
        else:
            kept[target] = source
    return kept


def join_tied_embeddings(model: PreTrainedModel) -> None:
    """
    Make embeddings that share one matrix, and do the same with it, one module.

    T5 or BART have the same embedding as `shared` and in their encoder and decoder. FSDP2 shards module by module and
    refuses a matrix that two of its groups hold, and accelerate makes a group of the input embedding and the LM head.
    """
    for target, source in model.all_tied_weights_keys.items():
        names = [key.rpartition(".")[0] for key in (target, source)]
        modules = [model.get_submodule(name) for name in names]
        if all(isinstance(module, nn.Embedding) for module in modules) and _alike(*modules):
            model.set_submodule(names[0], modules[1])


def _alike(first: nn.Module, second: nn.Module) -> bool:
    """Whether two modules differ in their parameters only."""
    settings = [{k: v for k, v in vars(module).items() if not k.startswith("_")} for module in (first, second)]
    return type(first) is type(second) and settings[0] == settings[1] and not first._buffers


def layer_classes(model: PreTrainedModel) -> set[str]:
    """Names of the classes that `model` says are never split (`_no_split_modules`), those of dropped parts left out."""
    return set(model._no_split_modules or ()) & {type(module).__name__ for module in model.modules()}


def reader(model: PreTrainedModel) -> Any:
    """The part of `model` that takes a prompt: its encoder or, where it has none (left), its decoder."""
    if model.config.is_encoder_decoder and not isinstance(encoder := model.get_encoder(), DroppedModule):
        return encoder
    return model.get_decoder()


def embed_tokens(model: PreTrainedModel, input_ids: torch.Tensor) -> torch.Tensor:
    """
    The `inputs_embeds` that `model` computes from `input_ids`.

    Most embedding modules scale by themselves; in some models (Marian, Pegasus) the encoder does it afterwards, and
    not to `inputs_embeds` that it is given.

    Args:
        input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`).

    Returns:
        `torch.Tensor` of shape `(batch_size, sequence_length, embedding_size)`.
    """
    part = reader(model)
    embedding = part.get_input_embeddings()
    embeds = embedding(input_ids.to(embedding.weight.device))
    scale = 1.0 if hasattr(embedding, "embed_scale") else getattr(part, "embed_scale", 1.0)
    return embeds if scale == 1.0 else embeds * scale


def embedding_scale(model: PreTrainedModel) -> float:
    """The factor between the rows of the embedding matrix and what [`embed_tokens`] gives."""
    part = reader(model)
    return float(getattr(part.get_input_embeddings(), "embed_scale", getattr(part, "embed_scale", 1.0)))


def position_limit(config: PreTrainedConfig, model: nn.Module | None = None) -> int | None:
    """
    The longest sequence in tokens that a model of this (text) configuration takes, `None` where there is no limit.

    With `model` given, positions that its table keeps for padding are not counted (RoBERTa: 514 rows, 512 tokens).
    """
    limit = getattr(config, "max_position_embeddings", None)
    if not isinstance(limit, int) or limit <= 0:
        return None
    for module in model.modules() if model is not None else ():
        if isinstance(module, nn.Embedding) and module.num_embeddings == limit and module.padding_idx is not None:
            if module.padding_idx < limit - 1 and module.num_embeddings != getattr(config, "vocab_size", None):
                return limit - module.padding_idx - 1
    return limit


def learns_positions(model: PreTrainedModel) -> bool:
    """Whether a decoder has a table of positions, beyond which it can't go; one that rotates states only gets worse there."""
    decoder: Any = model.get_decoder()
    limit = position_limit(decoder.config)
    return limit is not None and any(
        isinstance(module, nn.Embedding)
        and module is not decoder.get_input_embeddings()
        and limit <= module.num_embeddings <= limit + 2  # OPT and BART keep two rows more
        for module in decoder.modules()
    )


def named_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """The dtype that an argument of `from_pretrained` or a configuration asks for; `None` where it leaves that open."""
    if dtype is None or dtype == "auto":
        return None
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype


def floating_dtype(module: nn.Module) -> torch.dtype:
    """dtype that a layer computes in: of its first parameter that is not quantised."""
    return next(parameter.dtype for parameter in module.parameters() if parameter.is_floating_point())


def mask_positions(mask: torch.Tensor) -> torch.Tensor:
    """Position ids, of the shape `(batch_size, sequence_length)` of a mask, that count real tokens only."""
    return (mask.cumsum(dim=1) - 1).clamp(min=0)


def move_padding(tensor: torch.Tensor, mask: torch.Tensor, side: Literal["left", "right"]) -> torch.Tensor:
    """
    Move the real tokens of each row together, all padding to one side, without changing their order.

    Args:
        tensor (`torch.Tensor` of shape `(batch_size, sequence_length, ...)`).
        mask (`torch.Tensor` of shape `(batch_size, sequence_length)`): 1 for real tokens, 0 for padding, anywhere.
        side (`str`): Where the padding goes.

    Returns:
        `torch.Tensor` of the shape of `tensor`.
    """
    order = mask.to(torch.long).argsort(dim=1, descending=side == "right", stable=True)
    order = order.reshape(order.shape + (1,) * (tensor.dim() - 2))
    return tensor.gather(1, order.expand(tensor.shape))


def layer_list(model: nn.Module, num_layers: int) -> str:
    """Name of the `nn.ModuleList` that holds the `num_layers` layers of `model`."""
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == num_layers:
            return name
    raise ValueError(f"Found no list of {num_layers} layers in a {type(model).__name__}; it can't be cut.")
