"""Cached LLM states: the frozen LLM reads a data set once, and training goes on without it.

A cache is a folder of Arrow files, each with the states of some prompts, and `cache.json`, which says what they depend on.
A prompt is found by a hash of its LLM tokens, so identical prompts are encoded once, and one cache may serve several data
sets. A file appears when all of it is written, so what was interrupted goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from .configuration_llm2slm import LLM2SLMConfig
from .data_collator import STATES_COLUMN
from .evaluation import require_extra
from .llm_states import read_llm_states
from .processing_llm2slm import LLM2SLMProcessor
from .reference import llm_fingerprint
from .rows import prompt_and_completion
from .states_format import bytes_per_token, check_dtype, decode_states, encode_states

if TYPE_CHECKING:
    from datasets import Dataset

    from .modeling_llm2slm import LLM2SLMForConditionalGeneration

logger = logging.get_logger(__name__)

SETTINGS_NAME = "cache.json"
SHAPE, DTYPE = "shape of the states of a token", "dtype of the states"
_KEY_COLUMN = "llm_states_key"
# Beside its states, a row of a file holds its key, its length and two sums.
_ROW_BYTES = 80
# A file holds the states of at most so many bytes and so many prompts: what an interruption can cost.
_SHARD_BYTES, _SHARD_PROMPTS = 256 * 2**20, 1024
# A file half written that has not changed for so long is that of a process that was killed.
_LEFT_OVER_SECONDS = 24 * 3600


def cache_llm_states(
    rows: Dataset | Sequence[Mapping[str, Any]],
    model: LLM2SLMForConditionalGeneration,
    processor: LLM2SLMProcessor,
    cache_dir: str | os.PathLike,
    *,
    max_prompt_length: int | None = None,
    dtype: str = "float16",
    batch_size: int = 16,
    num_workers: int | None = None,
) -> Dataset:
    """
    The same rows with the LLM's states of their prompts, which are encoded where the cache does not hold them yet.

    How many bytes that takes, and about how long, is logged (at level INFO) before it begins; a bar shows the progress.

    ```python
    >>> rows = cache_llm_states(rows, model, processor, "states", max_prompt_length=512)
    >>> model = AutoModel.from_pretrained("my-model", load_llm=False)  # now train without the LLM
    >>> trainer = Seq2SeqTrainer(model, args, train_dataset=rows, data_collator=LLM2SLMDataCollator(processor, 512))
    ```

    Args:
        rows (`datasets.Dataset` or a list of dicts): Rows as [`LLM2SLMDataCollator`] takes them.
        model ([`LLM2SLMForConditionalGeneration`]): The model. Loaded with `load_llm=False`, it can use a cache that holds
            all prompts, but not add to it.
        processor ([`LLM2SLMProcessor`]): Its processor.
        cache_dir (`str` or `os.PathLike`): Folder of the cache; made if missing. With Ray on several machines, one that
            all of them see.
        max_prompt_length (`int`, *optional*): Prompts are cut to so many LLM tokens, as by the collator; by default to what
            the models take.
        dtype (`str`, defaults to `"float16"`): How states are stored: `"float32"` (exact), `"float16"`, `"bfloat16"`, or
            `"int8"` (a scale for every 64 values). [`cache_error`] tells what was lost.
        batch_size (`int`, defaults to 16): Prompts that the LLM reads at a time.
        num_workers (`int`, *optional*): Encode with so many Ray actors, on this machine or on the cluster that Ray is
            connected to; each holds the LLM. By default this process does it.

    Returns:
        `datasets.Dataset`: The rows, in their order, with `llm_hidden_states` (a tensor of shape `(prompt_length,
        num_llm_states, llm_state_size)`), read from disk when a row is asked for.

    Raises:
        ValueError: for a cache that was made with another LLM, layer, tokenizer, length or dtype; a row without prompt;
            states beyond what `dtype` holds; prompts that are missing where there is no LLM.
        OSError: if the disk can't hold what is missing.
    """
    require_extra("train", "datasets")
    import datasets

    if not isinstance(rows, datasets.Dataset):
        if isinstance(rows, (datasets.IterableDataset, datasets.DatasetDict)):
            raise TypeError(f"`rows` must be a `datasets.Dataset` or a list of dicts, got a {type(rows).__name__}.")
        rows = datasets.Dataset.from_list(list(rows))
    if len(rows) == 0:
        raise ValueError("`rows` is empty: there is nothing to cache.")
    rows = rows.with_format(None)
    if _KEY_COLUMN in rows.column_names:  # of an earlier cache
        rows = rows.remove_columns(_KEY_COLUMN)
    cache = LLMStatesCache(cache_dir)
    reader = PromptReader.of(model, processor, max_prompt_length, check_dtype(dtype), batch_size)
    cache.claim(reader.settings())
    lengths, keys = _lengths_and_keys(rows, reader)
    _, first = np.unique(keys, return_index=True)
    order = np.sort(first)  # of identical prompts the first, in the order of the rows
    missing = order[cache.find(keys[order]) < 0]
    if len(missing):
        if reader.llm is None:
            raise ValueError(
                f"{len(missing)} of {len(order)} prompts are not in the cache {str(cache_dir)!r}, and the model was loaded "
                "without its LLM (`load_llm=False`), so it can't read them. Cache them with the LLM first."
            )
        shard_size = _SHARD_BYTES // (int(lengths.max()) * reader.bytes_per_token)
        shard_size = min(max(shard_size, 1), _SHARD_PROMPTS)
        shards = [missing[start : start + shard_size] for start in range(0, len(missing), shard_size)]
        _announce(cache, reader, rows, missing, int(lengths[missing].sum()), num_workers or 1)
        encoded = (
            _encode_here(cache, reader, rows, shards)
            if num_workers is None
            else _encode_with_ray(cache, reader, rows, shards, num_workers)
        )
        with datasets.utils.tqdm(total=len(missing), desc="Caching LLM states", unit=" prompts") as progress:
            for count in encoded:
                progress.update(count)
        logger.info("Relative error of the stored states: %.2g (%s).", cache_error(cache_dir), dtype)
    # Keys and not places: those change when the cache grows by the prompts of other rows.
    rows = rows.add_column(_KEY_COLUMN, keys.astype(str).tolist())
    return rows.with_transform(AttachStates(cache_dir))


def cache_error(cache_dir: str | os.PathLike) -> float:
    """
    What storing lost: the root mean square of the error over all values of a cache, over that of the values themselves
    (0 for `"float32"`).
    """
    shards = LLMStatesCache(cache_dir).shards
    if shards is None:
        raise ValueError(f"{os.fspath(cache_dir)!r} holds no cached LLM states.")
    return (sum(shards["squared_error"][:]) / max(sum(shards["squared_norm"][:]), 1e-30)) ** 0.5


# Reading prompts ---------------------------------------------------------------------------------------------------------
@dataclass
class PromptReader:
    """
    What makes states of prompts, and all that they depend on.

    Args:
        llm (`PreTrainedModel`, *optional*): The LLM's reading part; `None` where only its settings are wanted.
        config ([`LLM2SLMConfig`]), processor ([`LLM2SLMProcessor`]): Of the model.
        max_prompt_length (`int`, *optional*): In LLM tokens.
        dtype (`str`): How states are stored.
        batch_size (`int`): Prompts at a time.
    """

    llm: PreTrainedModel | None
    config: LLM2SLMConfig
    processor: LLM2SLMProcessor
    max_prompt_length: int | None
    dtype: str
    batch_size: int

    @classmethod
    def of(
        cls,
        model: LLM2SLMForConditionalGeneration,
        processor: LLM2SLMProcessor,
        max_prompt_length: int | None,
        dtype: str,
        batch_size: int,
    ) -> PromptReader:
        if max_prompt_length is None:  # else the caller's counts, as for the collator, also where it is the greater
            max_prompt_length = processor.max_prompt_length
        return cls(model.llm, model.config, processor, max_prompt_length, dtype, batch_size)

    @property
    def bytes_per_token(self) -> int:
        return bytes_per_token(self.config.num_llm_states, self.config.llm_state_size, self.dtype)

    def settings(self) -> dict[str, Any]:
        """All that the states of a token sequence depend on, by name. Raises a `ValueError` for a nameless LLM."""
        config = self.config
        fingerprint = config.llm_fingerprint
        dtype = config.llm_dtype
        if self.llm is not None:
            fingerprint = llm_fingerprint(self.llm) or fingerprint
            dtype = str(self.llm.dtype).removeprefix("torch.")
        if fingerprint is None:
            raise ValueError(
                "The LLM has no fingerprint to bind a cache to: it is quantised and not loaded from safetensors files. Load "
                "it by name."
            )
        layers = config.llm_layers
        if (total := config.num_llm_layers) is not None:
            layers = [layer % (total + 1) for layer in layers]
        return {
            "LLM": fingerprint,
            "LLM dtype": dtype,
            "LLM quantization": config.llm_quantization_config,
            "LLM layer": layers,
            "LLM embeddings": config.fusion == "llm-embed",
            SHAPE: [config.num_llm_states, config.llm_state_size],
            "tokenizer": _tokenizer_fingerprint(self.processor.llm_tokenizer),
            "maximum prompt length": self.max_prompt_length,
            DTYPE: self.dtype,
        }

    def tokenize(self, prompts: Sequence[Any]) -> list[list[int]]:
        """The LLM's tokens of prompts (texts or conversations), as the collator gives them to the LLM."""
        return self.processor(text=list(prompts), truncation=True, max_length=self.max_prompt_length)["input_ids"]

    def read(self, token_ids: Sequence[list[int]]) -> list[torch.Tensor]:
        """States of token sequences, each of shape `(prompt_length, num_llm_states, llm_state_size)`, on the CPU."""
        states: dict[int, torch.Tensor] = {}
        order = sorted(range(len(token_ids)), key=lambda index: -len(token_ids[index]))
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            rows = [torch.tensor(token_ids[index]) for index in batch]
            mask = [torch.ones_like(row) for row in rows]
            read = read_llm_states(
                self.llm,
                self.config,
                pad_sequence(rows, batch_first=True),
                pad_sequence(mask, batch_first=True),
            ).cpu()
            states |= {index: read[place, : len(rows[place])] for place, index in enumerate(batch)}
        return [states[index] for index in range(len(token_ids))]


def _tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of what a tokenizer makes of text, but for padding and truncation, which change with every call."""
    if tokenizer.is_fast:
        parts = json.loads(tokenizer.backend_tokenizer.to_str())
        parts = {name: part for name, part in parts.items() if name not in ("padding", "truncation")}
    else:
        parts = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    parts["truncation_side"] = tokenizer.truncation_side
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _key(token_ids: Sequence[int]) -> str:
    return hashlib.sha256(np.asarray(token_ids, dtype=np.int64).tobytes()).hexdigest()[:32]


def _lengths_and_keys(rows: Dataset, reader: PromptReader) -> tuple[np.ndarray, np.ndarray]:
    """Length in tokens and hash of each row's prompt."""

    def tokenize(columns: Mapping[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        token_ids = reader.tokenize(_prompts(columns, indices))
        return {"length": [len(ids) for ids in token_ids], "key": [_key(ids) for ids in token_ids]}

    tokenized = rows.map(
        tokenize,
        batched=True,
        with_indices=True,
        remove_columns=rows.column_names,
        desc="Tokenizing prompts",
        load_from_cache_file=False,
        keep_in_memory=True,
        new_fingerprint="llm2slm",  # nothing is cached under it, and hashing the LLM would take its time
    )
    return np.array(tokenized["length"][:], dtype=np.int64), np.array(tokenized["key"][:], dtype="S32")


def _prompts(columns: Mapping[str, list[Any]], indices: Sequence[int] | np.ndarray) -> list[Any]:
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    names = (f"Row {index} (the first is 0)" for index in indices)
    return [prompt_and_completion(row, name)[0] for row, name in zip(rows, names, strict=True)]


# The folder --------------------------------------------------------------------------------------------------------------
class LLMStatesCache:
    """
    A folder of cached states.

    Args:
        cache_dir (`str` or `os.PathLike`): The folder.
    """

    def __init__(self, cache_dir: str | os.PathLike):
        import datasets

        self.folder = Path(cache_dir)
        files = sorted(self.folder.glob("states-*.arrow"))
        parts = [datasets.Dataset.from_file(str(file)) for file in files]
        self.shards = datasets.concatenate_datasets(parts) if parts else None
        keys = np.array(self.shards["key"][:] if self.shards is not None else [], dtype="S32")
        self.order = np.argsort(keys, kind="stable")
        self.keys = keys[self.order]

    def find(self, keys: np.ndarray) -> np.ndarray:
        """Rows of the cache that hold these keys, -1 for those that are missing."""
        if not len(self.keys):
            return np.full(len(keys), -1)
        places = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
        return np.where(self.keys[places] == keys, self.order[places], -1)

    def settings(self) -> dict[str, Any]:
        """What the states depend on."""
        return json.loads((self.folder / SETTINGS_NAME).read_text(encoding="utf-8"))

    def claim(self, settings: dict[str, Any]) -> None:
        """Make the folder a cache with these settings. Raises a `ValueError` if it is one with others."""
        file = self.folder / SETTINGS_NAME
        # Asked first, as another process may write the settings meanwhile. Hidden files may be what one left that was killed.
        in_use = self.folder.is_dir() and any(not entry.name.startswith(".") for entry in self.folder.iterdir())
        if file.exists():
            found = self.settings()
            for name, expected in settings.items():
                if found.get(name) != expected:
                    raise ValueError(
                        f"The cache {str(self.folder)!r} was made with another {name}: expected {expected}, found "
                        f"{found.get(name)}. Its states are of no use here: choose another `cache_dir`, or delete it."
                    )
        elif in_use:
            raise ValueError(
                f"{str(self.folder)!r} is not empty, and no cache of LLM states: it has no `{SETTINGS_NAME}`. Choose "
                "another `cache_dir`."
            )
        else:
            self.folder.mkdir(parents=True, exist_ok=True)
            _write_whole(file, lambda part: part.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8"))
        _remove_left_overs(self.folder)

    def write(self, reader: PromptReader, prompts: Sequence[Any]) -> int:
        """Encode prompts into one file of the cache; returns their number."""
        import datasets

        token_ids = reader.tokenize(prompts)
        features = datasets.Features(
            {
                "key": datasets.Value("string"),
                "num_tokens": datasets.Value("int32"),
                "states": datasets.Value("large_binary"),
                "squared_error": datasets.Value("float64"),
                "squared_norm": datasets.Value("float64"),
            }
        )
        keys = [_key(ids) for ids in token_ids]
        name = hashlib.sha256("".join(keys).encode()).hexdigest()[:16]

        def write(part: Path) -> None:
            with datasets.arrow_writer.ArrowWriter(path=str(part), features=features) as writer:
                for key, states in zip(keys, reader.read(token_ids), strict=True):
                    data, error, norm = encode_states(states, reader.dtype)
                    values = {"states": data, "squared_error": error, "squared_norm": norm}
                    writer.write({"key": key, "num_tokens": len(states)} | values)
                writer.finalize()

        _write_whole(self.folder / f"states-{name}.arrow", write)
        return len(prompts)


def _write_whole(file: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` write a file that appears under its name when it is whole; another process may be writing it too."""
    part = file.with_name(f".{file.name}.{uuid.uuid4().hex}.part")
    try:
        write(part)
        os.replace(part, file)
    finally:
        part.unlink(missing_ok=True)


def _remove_left_overs(folder: Path) -> None:
    """Remove what processes that were killed have half written."""
    for part in folder.glob(".*.part"):
        with suppress(OSError):  # another process was faster, or the folder is read-only
            if time.time() - part.stat().st_mtime > _LEFT_OVER_SECONDS:
                part.unlink()


class AttachStates:
    """
    The transform of rows with cached states: adds a row's states when it is asked for.

    Args:
        cache_dir (`str` or `os.PathLike`): The cache; only its path goes along to the workers of a data loader.
    """

    def __init__(self, cache_dir: str | os.PathLike):
        self.cache_dir = os.path.abspath(cache_dir)
        self._opened: tuple[LLMStatesCache, dict[str, Any]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_opened": None}

    def __call__(self, columns: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        columns = dict(columns)
        keys = columns.pop(_KEY_COLUMN, None)
        if keys is None:  # only other columns are asked for
            return columns
        if self._opened is None:
            cache = LLMStatesCache(self.cache_dir)
            self._opened = cache, cache.settings() if cache.shards is not None else {}
        cache, settings = self._opened
        places = cache.find(np.array(keys, dtype="S32"))
        if cache.shards is None or (places < 0).any():
            raise ValueError(f"The cached LLM states in {self.cache_dir!r} are gone. Make them again.")
        shape, dtype = tuple(settings[SHAPE]), settings[DTYPE]
        return columns | {
            STATES_COLUMN: [decode_states(data, shape, dtype) for data in cache.shards[places]["states"]]
        }


# Encoding ----------------------------------------------------------------------------------------------------------------
def _announce(
    cache: LLMStatesCache, reader: PromptReader, rows: Dataset, missing: np.ndarray, num_tokens: int, workers: int
) -> None:
    """Say how many bytes and about how long it will be. Raises an `OSError` if the disk can't hold it."""
    size = num_tokens * reader.bytes_per_token + _ROW_BYTES * len(missing)
    free = shutil.disk_usage(cache.folder).free
    what = f"The LLM's states of {len(missing):,} prompts ({num_tokens:,} tokens) take {_gigabytes(size)} in {reader.dtype}"
    if size > free:
        raise OSError(
            f"{what}, but the disk of {str(cache.folder)!r} has {_gigabytes(free)} left. Choose another `cache_dir`, "
            'dtype="int8", a smaller `max_prompt_length`, or fewer rows.'
        )
    sample = missing[:: max(len(missing) // reader.batch_size, 1)][: reader.batch_size]
    token_ids = reader.tokenize(_prompts(rows[sample], sample))
    reader.read(token_ids[:1])  # what happens only once does not count
    began = time.perf_counter()
    reader.read(token_ids)
    seconds = (time.perf_counter() - began) * num_tokens / sum(map(len, token_ids)) / workers
    logger.info("%s, and about %s to encode.", what, _duration(seconds))


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:,.2f} GB" if size >= 1e7 else f"{size / 1e3:,.0f} kB"


def _duration(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 120
        else f"{seconds / 60:.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )


def _encode_here(
    cache: LLMStatesCache, reader: PromptReader, rows: Dataset, shards: Sequence[np.ndarray]
) -> Iterator[int]:
    for shard in shards:
        yield cache.write(reader, _prompts(rows[shard], shard))


def _encode_with_ray(
    cache: LLMStatesCache, reader: PromptReader, rows: Dataset, shards: Sequence[np.ndarray], num_workers: int
) -> Iterator[int]:
    """Ray Data over the shards: each actor holds the LLM and writes files of its own, the same as one process would."""
    require_extra("ray", "ray")
    import ray

    if not ray.is_initialized():
        ray.init(include_dashboard=False)
    items = [{"prompts": json.dumps(_prompts(rows[shard], shard))} for shard in shards]
    encoded = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        _EncodingActor,
        fn_constructor_args=(ray.put(reader), str(cache.folder.resolve())),
        batch_size=1,
        concurrency=num_workers,
        num_gpus=1 if torch.cuda.is_available() else 0,
    )
    for row in encoded.iter_rows():
        yield int(row["count"])


class _EncodingActor:
    """Holds the LLM, on its machine's accelerator if there is one."""

    def __init__(self, reader: Any, cache_dir: str):
        import ray

        self.reader: PromptReader = ray.get(reader)
        self.cache = LLMStatesCache(cache_dir)
        if self.reader.llm is not None and torch.accelerator.is_available():
            self.reader.llm.to(torch.accelerator.current_accelerator())

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        counts = [self.cache.write(self.reader, json.loads(prompts)) for prompts in batch["prompts"]]
        return {"count": np.array(counts)}


__all__ = ["cache_error", "cache_llm_states"]
