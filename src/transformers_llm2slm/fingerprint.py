"""What tells whether an LLM is the one that a checkpoint was trained with: a sample of its weights, and its files' hashes.

The fingerprint is a hash over a sample of the weights, rounded to bfloat16, so it is the same for one model loaded in
float32 and in bfloat16, from one file or from shards, and costs milliseconds: 256 values, spread evenly, of every
parameter. A model of which any matrix was tuned differs. Where a model is held in a form that doesn't round to the same
values (float16, int8, 4-bit), the sample is read from its safetensors files, of which only the pages in question are read.

The hashes are those by which the Hub names large files (sha256). The cache names what it downloads by them, so they are
known without reading a file.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn

NUM_VALUES = 256
_SHA256 = re.compile(r"[0-9a-f]{64}")


def weights_fingerprint(names: Iterable[str], get_tensor: Callable[[str], torch.Tensor]) -> str:
    """
    Fingerprint of the parameters `names`.

    Args:
        names (`Iterable[str]`): Names of all parameters of the model, in any order.
        get_tensor (`Callable`): Gives the parameter of a name, in float32 or bfloat16, of any shape.

    Returns:
        `str`: `"bf16-sample:"` and 32 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for name in sorted(names):
        tensor = get_tensor(name).detach()
        values = tensor.reshape(-1)[_evenly(tensor.numel(), NUM_VALUES)]
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
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


def hub_hashes(files: Iterable[Path]) -> dict[str, str]:
    """
    The sha256 of files in the Hub's cache, by name, as far as it is known without reading them.

    A file of a snapshot is a link to what was downloaded, which is named by its hash
    (https://huggingface.co/docs/huggingface_hub/guides/manage-cache). Of a local folder, nothing is known.
    """
    targets = {file.name: file.resolve().name for file in files if file.is_symlink()}
    return {name: target for name, target in targets.items() if _SHA256.fullmatch(target)}
