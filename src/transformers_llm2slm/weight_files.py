"""Files of weights: safetensors only, inside their repository, and no smaller than the model that they should fill."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, is_offline_mode, try_to_load_from_cache
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file

from .validation import check_memory, check_weight_index

# What reads these runs whatever they say (torch.load, with or without `weights_only`), or is not read at all.
_PICKLES = re.compile(r"(pytorch_model|model|adapter_model)[\w.-]*\.(bin|pt|pth|ckpt|pkl)(\.index\.json)?")
# What `save_pretrained` writes, in one file or several.
_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
# What transformers would take before `model.safetensors`, and without comparing it to the model.
_DISTRIBUTED = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")


def check_weight_files(name_or_path: str, accept: str, variant: str | None = None, **place: Any) -> None:
    """
    Check that a model's weights are safetensors of its own repository, before any of its shards is looked for.

    Without this, transformers would ask a service on the Hub to convert pickles, and tell users to read them.

    Args:
        name_or_path (`str`): Hub id or local folder.
        accept (`str`): For the error: how to accept pickles, a sentence; empty where they can't be.
        variant (`str`, *optional*): As for `from_pretrained`.
        place: Where the files are: `revision`, `subfolder`, `token`, `cache_dir` ...

    Raises:
        OSError: where there are none; with the names of pickles, if there are some.
        ValueError: for an index that names anything but safetensors of this repository.
    """
    folder = Path(name_or_path, place.get("subfolder") or "")
    if distributed := [file.name for file in folder.glob("shard-*") if _DISTRIBUTED.fullmatch(file.name)]:
        raise ValueError(
            f"{name_or_path!r} holds {distributed[0]!r} of a checkpoint that several processes wrote, which is not read. Make "
            "one file of them with transformers' `consolidate_safetensors`, or save with `save_pretrained`."
        )
    files = [_with_variant(file, variant) for file in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)]
    # The index first: it is small, and where there is none its absence is remembered.
    index = _found(name_or_path, files[1], place)
    if index is not None:
        check_weight_index(_json(index), files[1])
        # A base model's files are as its makers want them; which of them an LLM is, its fingerprint tells.
        if not accept and _exists(name_or_path, files[0], place):
            raise ValueError(
                f"{name_or_path!r} holds weights twice, in {files[0]!r} and in the shards of {files[1]!r}, and nothing says which "
                "are the newer. Delete the others, or save the model again into an empty place."
            )
        return
    if _found(name_or_path, files[0], place | {"force_download": False}) is not None:  # transformers will, once
        return
    pickles = _pickles(name_or_path, folder, place)
    found = (
        f"its weights are pickles ({', '.join(pickles[:3])}), which can run code when they are read"
        if pickles
        else "none"
    )
    raise OSError(
        f"Expected weights of {name_or_path!r} in {files[0]!r} or {files[1]!r}, found {found}."
        + (f" Convert them with `save_pretrained`{accept}." if pickles else "")
    )


def _found(name_or_path: str, file: str, place: dict[str, Any]) -> str | None:
    """Where a file is on this machine now, `None` if the repository has none of this name."""
    try:
        return cached_file(name_or_path, file, _raise_exceptions_for_missing_entries=False, **place)
    except OSError:
        raise
    except Exception as error:  # of the HTTP client: a connection that was cut, for one
        raise OSError(f"{file!r} of {name_or_path!r} can't be downloaded: {error!r}") from error


def _exists(name_or_path: str, file: str, place: dict[str, Any]) -> bool:
    """Whether a repository holds a file, which is not downloaded; offline, whether the cache does."""
    path = "/".join(part for part in (place.get("subfolder"), file) if part)
    if Path(name_or_path).is_dir():
        return Path(name_or_path, path).is_file()
    revision = place.get("revision")
    known = {"revision": getattr(revision, "resolved", revision)}
    found = try_to_load_from_cache(name_or_path, path, cache_dir=place.get("cache_dir"), **known)
    if found is None and not (place.get("local_files_only") or is_offline_mode()):
        return HfApi(token=place.get("token")).file_exists(name_or_path, path, **known)
    return isinstance(found, str)  # the cache also knows of files that do not exist


def stale_weights(held: Iterable[str], written: Iterable[str]) -> list[str]:
    """Of the files that a folder or repository holds, earlier weights that those just `written` have not replaced."""
    weights = {file for file in written if _WEIGHTS.fullmatch(file)}
    return sorted(file for file in held if _WEIGHTS.fullmatch(file) and file not in weights) if weights else []


@contextmanager
def replacing_weights(folder: str | os.PathLike, is_main_process: bool = True) -> Iterator[None]:
    """
    While this lasts, weights are saved to a folder; those of an earlier save, in other files, are deleted at its end, by
    the main process.
    """

    def stamps() -> dict[str, int]:
        files = Path(folder).glob("model*.safetensors*")
        return {file.name: file.stat().st_mtime_ns for file in files}

    before = stamps()
    yield
    after = stamps() if is_main_process else {}
    for name in stale_weights(after, (name for name in after if after[name] != before.get(name))):
        Path(folder, name).unlink()


def _with_variant(file: str, variant: str | None) -> str:
    name, _, ending = file.rpartition(".")
    return f"{name}.{variant}.{ending}" if variant else file


def _json(file: str) -> Any:
    try:
        return json.loads(Path(file).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{Path(file).name!r} is not JSON: {error}") from error


def _pickles(name_or_path: str, folder: Path, place: Mapping[str, Any]) -> list[str]:
    """Files of weights that are no safetensors, for the error. Other files of training (`optimizer.pt`) are none."""
    if folder.is_dir():
        names = [file.name for file in folder.iterdir()]
    else:
        try:
            names = HfApi(token=place.get("token")).list_repo_files(name_or_path, revision=place.get("revision"))
        except (OSError, ValueError):  # offline, for one
            names = []
        prefix = f"{place['subfolder']}/" if place.get("subfolder") else ""
        names = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
    return sorted(filter(_PICKLES.fullmatch, names))


# Building ------------------------------------------------------------------------------------------------------------------
@contextmanager
def building(what: str, *clear: type[Exception]) -> Iterator[None]:
    """
    Errors of any kind while a model is built are its configuration's: they become a `ValueError` that says of which part.

    Args:
        what: The part, for the error.
        clear: Kinds of errors that are told well enough already.
    """
    try:
        yield
    except Exception as error:
        # The others say what to install, and what the machine lacks.
        if isinstance(error, (*clear, ImportError, torch.OutOfMemoryError)):
            raise
        raise ValueError(f"{what} can't be built, as its configuration is not sound: {error!r}") from error


def load_compared(
    model: PreTrainedModel, state_dict: Any, checkpoint_files: Sequence[str] | None, *args: Any, **kwargs: Any
) -> Any:
    """
    `PreTrainedModel._load_pretrained_model` for a class that compares its size to that of its files first.

    What files lack, transformers allocates and fills at random before it tells. A configuration of absurd sizes would take
    all memory there is.
    """
    if checkpoint_files and all(file.endswith(".safetensors") for file in checkpoint_files):
        check_memory(
            f"The {type(model).__name__}", _numbers_without_memory(model), sum(map(_numbers, checkpoint_files))
        )
    return PreTrainedModel._load_pretrained_model(model, state_dict, checkpoint_files, *args, **kwargs)


def _numbers_without_memory(model: nn.Module) -> int:
    return sum(tensor.numel() for tensor in chain(model.parameters(), model.buffers()) if tensor.is_meta)


def _numbers(file: str) -> int:
    """How many numbers a safetensors file holds, by its header."""
    try:
        with safe_open(file, framework="pt") as tensors:
            return sum(math.prod(tensors.get_slice(key).get_shape()) for key in tensors.keys())
    except SafetensorError as error:
        raise OSError(
            f"{file!r} can't be read as safetensors: {error}. Delete it, and download or save it again."
        ) from error
