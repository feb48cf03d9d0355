"""A fingerprint of a model's weights: tells whether an LLM is the one that a checkpoint was trained with.

It is a hash over a sample of the weights, rounded to bfloat16, so it is the same for one model loaded in float32 and in
bfloat16, and costs milliseconds: 64 parameters are chosen evenly among all, and 256 values evenly in each. A model that
was fine-tuned at all differs in nearly all of them. Where a model is held in a form that doesn't round to the same
values (float16, int8, 4-bit), the sample is read from its safetensors files.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn

NUM_PARAMETERS = 64
NUM_VALUES = 256


def weights_fingerprint(names: Iterable[str], get_tensor: Callable[[str], torch.Tensor]) -> str:
    """
    Fingerprint of the parameters `names`.

    Args:
        names (`Iterable[str]`): Names of all parameters of the model, in any order.
        get_tensor (`Callable`): Gives the parameter of a name, in float32 or bfloat16, of any shape.

    Returns:
        `str`: `"bf16-sample:"` and 32 hexadecimal digits.
    """
    names = sorted(names)
    digest = hashlib.sha256()
    for index in _evenly(len(names), NUM_PARAMETERS):
        tensor = get_tensor(names[index]).detach()
        values = tensor.reshape(-1)[_evenly(tensor.numel(), NUM_VALUES)]
        digest.update(f"{names[index]}{tuple(tensor.shape)}".encode())
        digest.update(values.to("cpu", torch.bfloat16).contiguous().view(torch.uint8).numpy().tobytes())
    return f"bf16-sample:{digest.hexdigest()[:32]}"


def _evenly(size: int, count: int) -> list[int]:
    """`count` indices spread evenly over `size` items, first and last among them; all of them if there are fewer."""
    if size <= count:
        return list(range(size))
    return [round(i * (size - 1) / (count - 1)) for i in range(count)]


def is_exact(model: nn.Module) -> bool:
    """Whether the parameters in memory round to the fingerprint: all in float32 or bfloat16, none quantised."""
    return all(p.dtype in (torch.float32, torch.bfloat16) and type(p.data) is torch.Tensor for p in model.parameters())


def fingerprint_of_files(names: Iterable[str], files: Sequence[Path]) -> str | None:
    """The fingerprint that a model with parameters `names` has by its safetensors `files`; `None` if some are missing.

    A parameter is found under its own name or under one that ends in it (`layers.0.w` as `model.layers.0.w`).
    """
    where: dict[str, tuple[Path, str]] = {}
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for key in tensors.keys():
                parts = key.split(".")
                for start in range(len(parts)):
                    where.setdefault(".".join(parts[start:]), (file, key))
                where[key] = (file, key)
    names = list(names)
    if any(name not in where for name in names):
        return None

    def get_tensor(name: str) -> torch.Tensor:
        file, key = where[name]
        with safe_open(file, framework="pt") as tensors:
            return tensors.get_tensor(key)

    return weights_fingerprint(names, get_tensor)
