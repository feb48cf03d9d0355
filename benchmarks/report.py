"""What every benchmark's results say of where and by what they were measured."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import pathlib
import platform
from typing import Any

import torch


def cpu_model() -> str:
    """What the processor calls itself."""
    info = pathlib.Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def provenance(command: str, *libraries: str) -> dict[str, Any]:
    """Command, date, machine, and the versions of Python, torch, transformers, this package and `libraries`."""
    names = ("torch", "transformers", "transformers-llm2slm", *libraries)
    return {
        "command": command,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": {"cpu": cpu_model(), "cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "versions": {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in names},
    }
