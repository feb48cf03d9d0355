"""What was measured of a checkpoint, recorded where it was measured: `measurements.json` in the checkpoint's folder.

A record says of which weights it is, by their fingerprint, so that figures of a checkpoint that was trained on, or replaced
by another, are not taken for those of the new one. Records hold no path of a machine.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath, PureWindowsPath
from typing import Any

import torch

from .checkpoint_files import checkpoint_fingerprint

RECORDS_NAME = "measurements.json"
# What a record is of.
TRAINING, QUALITY, SPEED = "training", "quality", "speed"
_FIGURES = {TRAINING: ("settings",), QUALITY: ("metrics",), SPEED: ("settings", "figures")}
_LIBRARIES = ("transformers-llm2slm", "transformers", "torch")
# Of what the Trainer reports beside the metrics, figures of how long it took and of how much there was.
_NO_METRICS = ("runtime", "per_second", "epoch", "samples", "num_tokens", "preparation_time", "total_flos")
_SPLITS = {"eval": "validation", "predict": "test", "test": "test"}

Record = dict[str, Any]


# Where, when, by what ----------------------------------------------------------------------------------------------------
def cpu_model() -> str:
    """What the processor calls itself."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def machine() -> dict[str, Any]:
    """What figures are measured on: the processor, its cores, torch's threads, and the accelerators if there are any."""
    found: dict[str, Any] = {"cpu": cpu_model(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    found["instructions"] = torch.backends.cpu.get_cpu_capability()  # of which torch has kernels, such as "AVX512"
    if torch.cuda.is_available():
        found["gpus"] = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return found


def versions(*libraries: str) -> dict[str, str]:
    """Versions of Python, of torch, transformers and this package, and of those of `libraries` that are installed."""
    found = {"python": platform.python_version()}
    for name in (*_LIBRARIES, *libraries):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def provenance(command: str, *libraries: str) -> dict[str, Any]:
    """Command, date, machine, and the versions of Python, torch, transformers, this package and `libraries`."""
    return {
        "command": command,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": versions(*libraries),
    }


def without_path(value: Any) -> Any:
    """`value`, or its last part if it is the absolute path of something on a machine."""
    if isinstance(value, (str, os.PathLike)):
        text = os.fspath(value)
        for kind in (PurePath, PureWindowsPath):
            if kind(text).is_absolute() or os.path.exists(text):
                return kind(text).name or text
    return value


def shareable_command(words: Sequence[str]) -> str:
    """A command line as others may see it: paths by their last part, and no token."""
    kept: list[str] = []
    secret_follows = False
    for word in words:
        name, equals, value = word.partition("=")
        secret, secret_follows = secret_follows, is_secret(name) and not equals and word.startswith("-")
        if not secret and not is_secret(name):
            kept.append(f"{name}={without_path(value)}" if equals else str(without_path(word)))
    return shlex.join(kept)


def is_secret(name: str) -> bool:
    """Whether what an argument holds is not for others, by its name: `--token`, `hub_token`."""
    return re.fullmatch(r"-*(?:\w+[-_])*token", name) is not None


def _without_paths(value: Any) -> Any:
    """Plain values with every path in them named by its last part."""
    if isinstance(value, Mapping):
        return {key: _without_paths(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_paths(item) for item in value]
    return without_path(value)


# Records -----------------------------------------------------------------------------------------------------------------
def read_records(folder: str | os.PathLike, weights: str | None = None) -> list[Record]:
    """
    The records in a checkpoint's folder, oldest first.

    Args:
        folder (`str` or `os.PathLike`): The checkpoint.
        weights (`str`, *optional*): Fingerprint of the weights that the records must be of; by default those in `folder`.

    Raises:
        ValueError: if the file is none of ours.
    """
    weights = weights or checkpoint_fingerprint(folder)
    return [record for record in _all_records(folder) if weights is not None and record["weights"] == weights]


def write_record(folder: str | os.PathLike, record: Mapping[str, Any]) -> Path:
    """
    Add a record of the weights in `folder` to those that are there. One of the same thing is replaced: training, quality
    on the same data, speed under the same conditions. So are all of other weights.

    Args:
        folder (`str` or `os.PathLike`): The checkpoint.
        record (`Mapping`): `kind` and what belongs to it, in plain values. Of `"training"`: `data` and `settings`; of
            `"quality"`: `data` (`name`, `config`, `split`, `rows`) and `metrics`, and `beside` for the same metrics of other
            models; of `"speed"`: `settings` and `figures` by model. All may have what [`provenance`] gives, and a `note`.

    Raises:
        ValueError: if there are no weights in `folder`, or the file is none of ours.
    """
    weights = checkpoint_fingerprint(folder)
    if weights is None:
        raise ValueError(f"{os.fspath(folder)!r} holds no *.safetensors files: there is nothing to record figures of.")
    new = _without_paths(record) | {"weights": weights}
    kept = [old for old in read_records(folder, weights) if _subject(old) != _subject(new)]
    path = Path(folder, RECORDS_NAME)
    path.write_text(json.dumps([*kept, new], indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def _subject(record: Mapping[str, Any]) -> tuple[Any, ...]:
    """What of two records of the same thing is equal."""
    kind = record["kind"]
    return kind, {TRAINING: None, QUALITY: record.get("data"), SPEED: record.get("settings")}.get(kind)


def _all_records(folder: str | os.PathLike) -> list[Record]:
    path = Path(folder, RECORDS_NAME)
    if not path.is_file():
        return []
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is no JSON: {error}. Delete it, and measure again.") from error
    if not isinstance(records, list) or not all(isinstance(record, dict) and _is_record(record) for record in records):
        raise ValueError(f"{str(path)!r} holds no list of records of measurements. Move it away, and measure again.")
    return records


def _is_record(record: Mapping[str, Any]) -> bool:
    figures = [record.get(name) for name in _FIGURES.get(record.get("kind", ""), ())]
    return {"kind", "weights"} <= record.keys() and all(isinstance(part, Mapping) for part in figures)


# The Trainer's own files -------------------------------------------------------------------------------------------------
def trainer_records(folder: str | os.PathLike) -> list[Record]:
    """Records made of what a `Trainer` has written into a folder: `trainer_state.json` and `*_results.json`."""
    records = []
    state = _read_json(Path(folder, "trainer_state.json"))
    results = {prefix: _read_json(Path(folder, f"{prefix}_results.json")) for prefix in ("train", *_SPLITS)}
    everything = _read_json(Path(folder, "all_results.json"))
    if state:
        records.append({"kind": TRAINING, "settings": _training_of_state(state, results["train"] or everything)})
    for prefix, split in _SPLITS.items():
        metrics = metrics_of(results[prefix] or everything, prefix)
        if metrics:
            rows = (results[prefix] or everything).get(f"{prefix}_samples")
            data = {"split": split} | ({"rows": rows} if rows is not None else {})
            records.append({"kind": QUALITY, "data": data, "metrics": metrics, "command": "Trainer"})
    return records


def metrics_of(results: Mapping[str, Any], prefix: str) -> dict[str, float]:
    """The metrics among what a `Trainer` reports under names that start with `prefix`, without it."""
    return {
        name.removeprefix(f"{prefix}_"): value
        for name, value in results.items()
        if name.startswith(f"{prefix}_") and not name.endswith(_NO_METRICS) and isinstance(value, (int, float))
    }


def _training_of_state(state: Mapping[str, Any], results: Mapping[str, Any]) -> dict[str, Any]:
    found = {
        "rows": results.get("train_samples"),
        "steps": state.get("global_step"),
        "epochs": state.get("epoch"),
        "rows on a device at a time": state.get("train_batch_size"),
        "training loss": results.get("train_loss"),
    }
    return {name: value for name, value in found.items() if value is not None}


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a file; empty if there is no such file, or something else in it."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


__all__ = ["machine", "provenance", "read_records", "trainer_records", "versions", "write_record"]
