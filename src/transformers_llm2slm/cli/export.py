"""The command `llm2slm export`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from .shared import (
    CacheDir,
    LLMNameOrPath,
    LocalFilesOnly,
    Model,
    Revision,
    Token,
    hub_arguments,
    load,
    quiet,
    show_numbers,
)


def export(
    model: Model,
    out: Annotated[Path, Argument(metavar="OUT", help="Folder of the export.", show_default=False)],
    format: Annotated[str, Option(metavar="NAME", help="onnx, for ONNX Runtime, or openvino.")] = "onnx",
    int8: Annotated[
        bool, Option("--int8", help="Keep matrices in int8: a quarter of the bytes, and rounded.")
    ] = False,
    llm_name_or_path: LLMNameOrPath = None,
    revision: Revision = None,
    token: Token = None,
    cache_dir: CacheDir = None,
    local_files_only: LocalFilesOnly = False,
) -> None:
    """Export a checkpoint, LLM included, to graphs for a runtime on CPUs, and compare them with it."""
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{str(out)!r} is not empty: choose another folder.")
    quiet()
    hub = hub_arguments(revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only)
    loaded, processor = load(model, llm_name_or_path, "float32", "float32", "cpu", hub)
    began = time.perf_counter()
    loaded.export(out, format=format, int8=int8, processor=processor)
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    show_numbers(
        f"{out}: {format}{', int8' if int8 else ''}", {"MB": size / 1e6, "seconds": time.perf_counter() - began}
    )
