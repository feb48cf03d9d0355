"""The metadata of a model card: base models and their licences, results for the Hub, and merging with what is there."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import (
    EvalResult,
    ModelCard,
    ModelCardData,
    hf_hub_download,
    is_offline_mode,
    try_to_load_from_cache,
)
from huggingface_hub.errors import HFValidationError, HTTPError
from huggingface_hub.utils import validate_repo_id

from .configuration_llm2slm import LLM2SLMConfig
from .measurements import without_path
from .push import CARD_NAME
from .remote_code import TASK

logger = logging.getLogger(__name__)

TASK_NAME = "Text-to-text generation"
# The ids that https://huggingface.co/metrics has for our metrics, and how they are written.
_METRICS = {
    "rouge1": ("rouge", "ROUGE-1"),
    "rouge2": ("rouge", "ROUGE-2"),
    "rougeL": ("rouge", "ROUGE-L"),
    "rougeLsum": ("rouge", "ROUGE-Lsum"),
    "bleu": ("sacrebleu", "BLEU"),
    "chrf": ("chrf", "chrF"),
    "exact_match": ("exact_match", "Exact match"),
}
_DATA_SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".parquet", ".txt", ".arrow", ".gz", ".zst")


# Names -------------------------------------------------------------------------------------------------------------------
def is_hub_id(name: str) -> bool:
    """Whether `name` can be the id of a repository on the Hub, and is no file or folder on this machine."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not os.path.exists(name) and not name.endswith(_DATA_SUFFIXES)


def is_dataset_id(name: str | None) -> bool:
    """Whether `name` can be that of a data set on the Hub. One word may as well be a description, so it takes a `/`."""
    return name is not None and "/" in name and is_hub_id(name)


def source_names(config: LLM2SLMConfig) -> list[str | None]:
    """Where LLM and SLM are from, as far as the configuration knows."""
    return [os.fspath(name) if name else None for name in (config.llm_name_or_path, config.slm_name_or_path)]


def metric_name(name: str) -> str:
    """How a metric is written: `rougeL` as `ROUGE-L`."""
    return _METRICS[name][1] if name in _METRICS else name


# Licences of the base models ---------------------------------------------------------------------------------------------
def license_of(
    name_or_path: str | None,
    revision: str | None = None,
    *,
    online: bool = False,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike | None = None,
) -> str | None:
    """
    The licence that a model's own card states: a local folder's, the cached one, or (`online`) the Hub's, which is cached.

    Returns:
        `str` as the Hub writes it, such as `"apache-2.0"`; the licence's own name where that is `"other"`; `None` if it is
        not known. Nothing that goes wrong here is an error: a card without it is still a card.
    """
    if name_or_path is None:
        return None
    try:
        metadata = _card_metadata(name_or_path, revision, online, token, cache_dir)
    except (OSError, ValueError, HTTPError, yaml.YAMLError) as error:
        logger.info(f"The licence of {name_or_path!r} is not known: {error}")
        return None
    found = metadata.get("license")
    if found == "other":
        found = metadata.get("license_name") or found
    return found if isinstance(found, str) else None


def _card_metadata(
    name_or_path: str,
    revision: str | None,
    online: bool,
    token: str | bool | None,
    cache_dir: str | os.PathLike | None,
) -> Mapping[str, Any]:
    folder = Path(name_or_path)
    if folder.is_dir():
        card = folder / CARD_NAME
        return ModelCard.load(card, ignore_metadata_errors=True).data.to_dict() if card.is_file() else {}
    if not is_hub_id(name_or_path):
        return {}
    place = {"revision": revision, "cache_dir": cache_dir}
    card_file = try_to_load_from_cache(name_or_path, CARD_NAME, **place)
    if card_file is None and online and not is_offline_mode():
        card_file = hf_hub_download(name_or_path, CARD_NAME, token=token, **place)
    if not isinstance(card_file, str):  # the cache also knows of files that do not exist
        return {}
    return ModelCard.load(card_file, ignore_metadata_errors=True).data.to_dict()


# New metadata ------------------------------------------------------------------------------------------------------------
def new_metadata(
    base_models: Iterable[str],
    *,
    name: str,
    datasets: Sequence[str] = (),
    results: Sequence[EvalResult] = (),
    license: str | None = None,
    language: str | Sequence[str] | None = None,
    tags: Sequence[str] = (),
) -> ModelCardData:
    """
    The metadata of a card, as far as they are known.

    `base_model_relation` is set, as the Hub takes a model with two base models for a merge of them
    (https://huggingface.co/docs/hub/model-cards#specifying-a-base-model); this one is a fine-tuned SLM beside a frozen LLM.
    """
    bases = list(dict.fromkeys(base_models))
    return ModelCardData(
        language=language if language is None or isinstance(language, str) else list(language),
        license=license,
        library_name="transformers",
        pipeline_tag=TASK,
        tags=["llm2slm", *tags],
        base_model=bases or None,
        base_model_relation="finetune" if bases else None,
        datasets=list(dict.fromkeys(datasets)) or None,
        metrics=list(dict.fromkeys(result.metric_type for result in results)) or None,
        model_name=name if results else None,
        eval_results=list(results) or None,
    )


def eval_results(record: Mapping[str, Any]) -> list[EvalResult]:
    """What a record of quality has for the Hub's `model-index`: the metrics that the Hub knows, on a data set with a name."""
    data = record.get("data") or {}
    if not (name := without_path(data.get("name"))):
        return []
    args = {"rows": data["rows"]} if "rows" in data else None
    return [
        EvalResult(
            task_type=TASK,
            task_name=TASK_NAME,
            dataset_type=name,
            dataset_name=name,
            dataset_config=data.get("config"),
            dataset_split=data.get("split"),
            dataset_args=args,
            metric_type=_METRICS[metric][0],
            metric_name=_METRICS[metric][1],
            metric_value=value,
        )
        for metric, value in record["metrics"].items()
        if metric in _METRICS
    ]


# Merging -----------------------------------------------------------------------------------------------------------------
def merge_metadata(old: ModelCardData, new: ModelCardData, given: Collection[str] = ()) -> bool:
    """
    Put into `old` what `new` knows: lists are united, results are replaced by newer ones of the same thing, and what is
    set in `old` is kept, unless `given` names it.

    Returns:
        `bool`: Whether `old` has changed.
    """
    before = json.dumps(old.to_dict(), default=str)
    united = ("tags", "base_model", "datasets", "metrics")
    for key, value in new.__dict__.items():
        if value is None or key in ("eval_results", "model_name"):
            continue
        present = old.get(key)
        if key in united and present is not None:
            listed = [present] if isinstance(present, str) else list(present)
            added = [item for item in value if item not in listed]
            old[key] = [*listed, *added] if added else present
        elif present is None or key in given:
            old[key] = value
    if new.eval_results:
        old.model_name = old.get("model_name") or new.model_name
        old.eval_results = _merged_results(old.get("eval_results") or [], new.eval_results)
    return json.dumps(old.to_dict(), default=str) != before


def _merged_results(old: Sequence[EvalResult], new: Sequence[EvalResult]) -> list[EvalResult]:
    kept = [result for result in old if not any(result.is_equal_except_value(other) for other in new)]
    return [*kept, *new]
