"""The check of a model card's metadata: what `hub_server.py` answers to `ModelCard.validate`."""

from __future__ import annotations

import re
from typing import Any

import yaml

REPOSITORY_ID = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)


def card_metadata(card: str) -> Any:
    """The YAML block at the head of a README, or `None`."""
    block = re.match(r"\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|$)", card, re.DOTALL)
    return yaml.safe_load(block[1]) if block else None


def metadata_errors(card: str) -> list[str]:
    """What the Hub would refuse in a model's card: YAML that is none, wrong types, ids that are none, results of no form."""
    try:
        metadata = card_metadata(card)
    except yaml.YAMLError as error:
        return [f"The metadata is not valid YAML: {error}"]
    if metadata is None:
        return []
    if not isinstance(metadata, dict):
        return ["The metadata must be a mapping"]
    errors = []
    for field in ("library_name", "license", "license_name", "license_link", "pipeline_tag", "base_model_relation"):
        if not isinstance(metadata.get(field, ""), str):
            errors.append(f'"{field}" must be a string')
    for field in ("tags", "datasets", "metrics", "base_model", "language"):
        values = metadata.get(field, [])
        values = [values] if isinstance(values, str) and field in ("base_model", "language", "datasets") else values
        if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
            errors.append(f'"{field}" must be a list of strings')
        elif field in ("base_model", "datasets"):
            wrong = [value for value in values if not REPOSITORY_ID.fullmatch(value)]
            errors += [
                f'"{field}" with value "{value}" is not valid. Use an id from https://hf.co.' for value in wrong
            ]
    return errors + model_index_errors(metadata.get("model-index", []))


def model_index_errors(index: Any) -> list[str]:
    """What is wrong with `model-index`: its form is in https://github.com/huggingface/hub-docs/blob/main/modelcard.md."""
    errors: list[str] = []

    def check(where: str, holder: Any, field: str, kinds: type | tuple[type, ...]) -> Any:
        value = holder.get(field) if isinstance(holder, dict) else None
        if not isinstance(value, kinds) or isinstance(value, bool) or value == "":
            errors.append(f'"{where}.{field}" is missing or of the wrong type')
            return [] if kinds is list else {}
        return value

    if not isinstance(index, list):
        return ['"model-index" must be a list']
    for i, model in enumerate(index):
        check(f"model-index[{i}]", model, "name", str)
        for j, result in enumerate(check(f"model-index[{i}]", model, "results", list)):
            where = f"model-index[{i}].results[{j}]"
            check(f"{where}.task", check(where, result, "task", dict), "type", str)
            dataset = check(where, result, "dataset", dict)
            check(f"{where}.dataset", dataset, "type", str)
            check(f"{where}.dataset", dataset, "name", str)
            for k, metric in enumerate(check(where, result, "metrics", list)):
                check(f"{where}.metrics[{k}]", metric, "type", str)
                check(f"{where}.metrics[{k}]", metric, "value", (int, float, str, dict, list))
    return errors
