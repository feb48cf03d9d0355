"""Exact reference to a frozen LLM: which commit of which repository, which files, which weights.

A checkpoint only names its LLM, so the name must mean the same weights forever. It holds the repository and the commit, the
hashes of the weight files where the Hub's cache knows them, and a fingerprint of the weights, by which a local copy, a
mirror, other shards or another precision are known too.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, try_to_load_from_cache
from huggingface_hub.errors import RevisionNotFoundError
from huggingface_hub.file_download import REGEX_COMMIT_HASH, repo_folder_name
from transformers import PreTrainedModel
from transformers.utils.hub import resolve_revision

from .configuration_llm2slm import LLM2SLMConfig
from .fingerprint import fingerprint_of_files, hub_hashes, is_exact, weights_fingerprint
from .loading import llm_skeleton

logger = logging.getLogger(__name__)


def pin_revision(name_or_path: str, kwargs: dict[str, Any]) -> str | None:
    """
    Let all that is loaded with the arguments `kwargs` come from one commit, also if the repository moves meanwhile.

    Returns:
        The commit that `kwargs["revision"]` stands for; `None` for a local folder, or if it is not known.
    """
    if Path(name_or_path).exists():
        return None
    known = {key: kwargs[key] for key in ("token", "cache_dir", "local_files_only") if kwargs.get(key) is not None}
    resolved = resolve_revision(name_or_path, kwargs.get("revision"), **known)
    if resolved is not None:
        kwargs["revision"] = resolved
    return _commit(resolved)


def _commit(revision: str | None) -> str | None:
    """The commit that a revision stands for; `None` for a branch or tag that could not be resolved."""
    commit = getattr(revision, "resolved", revision)
    return commit if commit is not None and REGEX_COMMIT_HASH.fullmatch(commit) else None


def weight_files(name_or_path: str, kwargs: Mapping[str, Any]) -> list[Path]:
    """The safetensors files of a model that has been loaded with the arguments `kwargs`: on disk, or in the cache."""
    folder, subfolder = Path(name_or_path), kwargs.get("subfolder") or ""
    if not folder.is_dir():
        revision = kwargs.get("revision")
        config_file = try_to_load_from_cache(
            name_or_path,
            f"{subfolder}/config.json" if subfolder else "config.json",
            cache_dir=kwargs.get("cache_dir"),
            revision=getattr(revision, "resolved", revision),
        )
        if not isinstance(config_file, str):
            return []
        return sorted(Path(config_file).parent.glob("*.safetensors"))
    return sorted((folder / subfolder).glob("*.safetensors"))


def llm_fingerprint(llm: PreTrainedModel, name_or_path: str | None = None, **kwargs: Any) -> str | None:
    """
    Fingerprint of the LLM's weights, see [`weights_fingerprint`]; `None` where it can't be taken.

    Where the weights in memory are not exact (float16, quantised), it is taken from the files they were loaded from.
    """
    if is_exact(llm):
        parameters = dict(llm.named_parameters())
        return weights_fingerprint(parameters, parameters.__getitem__)
    return None if name_or_path is None else _fingerprint_of_files(llm, weight_files(name_or_path, kwargs))


def _fingerprint_of_files(llm: PreTrainedModel, files: list[Path]) -> str | None:
    return fingerprint_of_files([name for name, _ in llm_skeleton(llm.config).named_parameters()], files)


def reference_to(
    llm: PreTrainedModel, name_or_path: str | None, kwargs: Mapping[str, Any], in_memory: bool
) -> dict[str, Any]:
    """
    The fields of the configuration that name an LLM.

    Args:
        llm: The LLM's reading part.
        name_or_path: Where it was loaded from, as far as it is known.
        kwargs: The arguments it was loaded with; those of [`pin_revision`] have a commit for a revision.
        in_memory: Whether the caller had loaded it. Then only its weights tell which commit it is, and whether they were
            changed since: a name is taken if the files of that name are these weights, or can't be had to compare.
    """
    fingerprint = llm_fingerprint(llm, name_or_path, **kwargs)
    commit = _commit(kwargs.get("revision"))
    files = [] if name_or_path is None else weight_files(name_or_path, kwargs)
    if in_memory and name_or_path is not None and is_exact(llm):
        known = {place: found for place, found in _places(name_or_path, kwargs).items() if found}
        same = [place for place, found in known.items() if _fingerprint_of_files(llm, found) == fingerprint]
        if known and not same:
            logger.warning(
                "The LLM in memory has other weights than %r, which it was loaded from: the checkpoint will name no LLM, and "
                "whoever loads it must pass `llm_model=` or `llm_name_or_path=`. Save the LLM and compose with its folder "
                "to name it.",
                name_or_path,
            )
            name_or_path = None
        commit, files = (same[0], known[same[0]]) if same else (None, [])
    return {
        "llm_name_or_path": name_or_path,
        "llm_revision": None if name_or_path is None else commit,
        "llm_subfolder": kwargs.get("subfolder") or "",
        "llm_fingerprint": fingerprint,
        "llm_files": hub_hashes(files) or None,
    }


def _places(name_or_path: str, kwargs: Mapping[str, Any]) -> dict[str | None, list[Path]]:
    """The weight files of a model by commit: of the folder, or of every commit in the cache, the one asked for first."""
    if Path(name_or_path).is_dir():
        return {None: weight_files(name_or_path, kwargs)}
    cache = Path(kwargs.get("cache_dir") or constants.HF_HUB_CACHE)
    snapshots = cache / repo_folder_name(repo_id=name_or_path, repo_type="model") / "snapshots"
    first = _commit(kwargs.get("revision"))
    commits = sorted((folder.name for folder in snapshots.glob("*")), key=lambda commit: (commit != first, commit))
    return {commit: weight_files(name_or_path, {**kwargs, "revision": commit}) for commit in commits}


# Checking ----------------------------------------------------------------------------------------------------------------
def check_llm_weights(
    config: LLM2SLMConfig, llm: PreTrainedModel, name_or_path: str | None, kwargs: Mapping[str, Any]
) -> None:
    """
    Raise a `ValueError` if an LLM is not the one that a model was trained with.

    Args:
        config: The model's configuration.
        llm: The LLM's reading part.
        name_or_path: Where it was loaded from; `None` for a model in memory, which may have changed since.
        kwargs: The arguments it was loaded with.
    """
    expected = config.llm_files or {}
    found = {} if name_or_path is None else hub_hashes(weight_files(name_or_path, kwargs))
    if expected and all(found.get(file) == digest for file, digest in expected.items()):
        return  # the very files
    fingerprint = llm_fingerprint(llm, name_or_path, **kwargs)
    # Other files may hold the same weights, but not under the same name at the same commit.
    recorded = (name_or_path, kwargs.get("revision")) == (config.llm_name_or_path, config.llm_revision)
    changed = sorted(file for file in expected.keys() & found.keys() if expected[file] != found[file])
    if recorded and changed:
        difference = f"{changed[0]} with sha256 {expected[changed[0]]}, found {found[changed[0]]} there"
    elif config.llm_fingerprint is not None and fingerprint != config.llm_fingerprint:
        place = "the model in memory" if name_or_path is None else _place(name_or_path, kwargs.get("revision"))
        difference = (
            f"fingerprint {config.llm_fingerprint}, found {place} with {fingerprint or 'none that can be read'}"
        )
    else:
        return
    raise ValueError(
        "The LLM is not the one this model was trained with: expected weights of "
        f"{_place(config.llm_name_or_path, config.llm_revision)} with {difference}. Pass the right LLM with "
        "`llm_name_or_path=`, `llm_revision=` or `llm_model=`, or accept this one with `llm_check_fingerprint=False`."
    )


def _place(name_or_path: Any, revision: Any) -> str:
    return f"{name_or_path!r}" + (f" at {revision}" if revision else "")


def gone_commit(config: LLM2SLMConfig, error: BaseException, kwargs: Mapping[str, Any]) -> str | None:
    """
    What to tell of an LLM that could not be loaded since its commit is gone from the Hub; `None` for another reason.

    The Hub is asked for the hashes of what the main branch holds now, so that nothing needs to be downloaded to know.
    """
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, RevisionNotFoundError):
        cause = cause.__cause__ or cause.__context__
    if cause is None or kwargs.get("revision") != config.llm_revision:
        return None
    name = str(config.llm_name_or_path)
    try:
        info = HfApi().model_info(name, files_metadata=True, token=kwargs.get("token"))
    except OSError:
        return None
    prefix = f"{config.llm_subfolder}/" if config.llm_subfolder else ""
    hashes = {file.rfilename: file.lfs.sha256 for file in info.siblings or () if file.lfs is not None}
    expected = config.llm_files or {}
    if not expected:
        weights = "nothing is recorded to compare its weight files by"
    elif all(hashes.get(prefix + file) == digest for file, digest in expected.items()):
        weights = "its weight files are the same"
    else:
        weights = "its weight files are others"
    return (
        f"The commit {config.llm_revision} of {name!r}, the LLM this model was trained with, is gone from the Hub. The main "
        f"branch is at {info.sha}, and {weights}. Pass a copy of the LLM with `llm_name_or_path=`, or the commit that holds "
        f"it with `llm_revision=` (`llm_revision={str(info.sha)!r}` for the main branch); its weights will be checked."
    )
