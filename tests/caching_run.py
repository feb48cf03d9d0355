"""A caching run of `test_llm_states_cache.py`, which starts it in a process of its own to kill it: see `main`."""

from __future__ import annotations

import json
import pathlib
import sys
import time

import torch
from transformers import AutoModel, AutoProcessor

from transformers_llm2slm import cache_llm_states, llm_states_cache

SHARD_PROMPTS, HANG_AT = 2, 3


def run(folder: pathlib.Path, name: str, hang_at: int | None = None, **kwargs: object) -> list[str]:
    """Cache the rows of `folder`, which has a model and `rows.json`; returns the names of files in order of writing."""
    torch.set_num_threads(1)
    written: list[str] = []
    replace, shard_prompts = llm_states_cache.os.replace, llm_states_cache._SHARD_PROMPTS

    def wait_to_be_killed(part: str, file: pathlib.Path) -> None:
        if len(written) - 1 == hang_at:  # the settings come first
            time.sleep(600)
        replace(part, file)
        written.append(file.name)

    llm_states_cache.os.replace, llm_states_cache._SHARD_PROMPTS = wait_to_be_killed, SHARD_PROMPTS
    try:
        model, processor = AutoModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
        cache_llm_states(json.loads((folder / "rows.json").read_text()), model, processor, folder / name, **kwargs)
    finally:
        llm_states_cache.os.replace, llm_states_cache._SHARD_PROMPTS = replace, shard_prompts
    return written


if __name__ == "__main__":
    run(pathlib.Path(sys.argv[1]), sys.argv[2], hang_at=HANG_AT)
