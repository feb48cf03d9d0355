"""What the files of a checkpoint tell without being loaded: their tensors, sizes, and a fingerprint of the weights."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HFValidationError
from torch import nn

from .configuration_llm2slm import LLM_SUBFOLDER, LLM2SLMConfig
from .fingerprint import fingerprint_of_files, weights_fingerprint
from .reference import weight_files


def safetensors_headers(files: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """Number of elements, bytes and dtype of every tensor in safetensors files, from their headers."""
    tensors = {}
    for file in sorted(files):
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            text = opened.read(length) if 0 < length < file.stat().st_size else b""
        try:
            header = json.loads(text)
        except ValueError as error:
            raise ValueError(f"{str(file)!r} is no safetensors file, or a broken one: write it again.") from error
        header.pop("__metadata__", None)
        end = max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
        if file.stat().st_size != 8 + length + end:
            raise ValueError(
                f"{str(file)!r} is {file.stat().st_size} bytes long, expected {8 + length + end}: it is cut."
            )
        for key, tensor in header.items():
            start, stop = tensor["data_offsets"]
            tensors[key] = {"numel": math.prod(tensor["shape"]), "bytes": stop - start, "dtype": tensor["dtype"]}
    return tensors


def llm_files_bytes(config: LLM2SLMConfig, cache_dir: str | os.PathLike | None = None) -> int | None:
    """Size of the weight files that a checkpoint names as its LLM; `None` if they are not on this machine."""
    if (source := config.llm_name_or_path) is None:
        return None
    place = {"revision": config.llm_revision, "subfolder": config.llm_subfolder, "cache_dir": cache_dir}
    try:
        files = weight_files(os.fspath(source), place)
    except HFValidationError:  # a folder of another machine
        return None
    return sum(file.stat().st_size for file in files) or None


def checkpoint_bytes(folder: str | os.PathLike) -> int | None:
    """Size of the weight files of a checkpoint, those of an LLM that it holds among them; `None` if there are none."""
    files = [*Path(folder).glob("*.safetensors"), *Path(folder, LLM_SUBFOLDER).glob("*.safetensors")]
    return sum(file.stat().st_size for file in files) or None


def checkpoint_fingerprint(folder: str | os.PathLike) -> str | None:
    """Fingerprint of what a checkpoint holds of projector and SLM, see `weights_fingerprint`; `None` without weights."""
    files = sorted(Path(folder).glob("*.safetensors"))
    names = list(safetensors_headers(files))
    return fingerprint_of_files(names, files) if names else None


def holds_weights_of(folder: str | os.PathLike, model: nn.Module) -> bool:
    """Whether a checkpoint's files hold the weights that a model has now; of sharded parameters that is not known."""
    files = sorted(Path(folder).glob("*.safetensors"))
    tensors = model.state_dict()
    names = list(safetensors_headers(files))
    if not names or any(name not in tensors or type(tensors[name].data) is not torch.Tensor for name in names):
        return False
    return weights_fingerprint(names, tensors.__getitem__) == fingerprint_of_files(names, files)
