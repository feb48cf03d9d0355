"""The model card of a checkpoint: what is known of the model and what was measured, and nothing else."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath, PureWindowsPath
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from torch import nn

from .configuration_llm2slm import LLM2SLMConfig

if TYPE_CHECKING:
    from .modeling_llm2slm import LLM2SLMForConditionalGeneration

CARD_NAME = "README.md"
PIPELINE_TAG = "text2text-generation"
_TEMPLATE = Path(__file__).with_name("model_card_template.md")
_FUSION_TEXTS = {
    "add": "projected LLM states, added to the SLM's embeddings of the same tokens.",
    "replace": "projected LLM states in place of the SLM's embeddings of the prompt.",
    "llm-embed": "projected LLM states, added to the LLM's own embeddings through a linear map.",
    "align": "the prompt in the SLM's tokens, each added to the projected state of the LLM token over the same characters.",
}
_DATA_SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".parquet", ".txt", ".arrow", ".gz", ".zst")

# Figures by the name of what was measured, for one contestant or for several: {"rougeL": 30.1} or
# {"this model": {"rougeL": 30.1}, "LLM": {"rougeL": 31.4}}.
Figures = Mapping[str, Any]


def write_model_card(
    directory: str | os.PathLike,
    model: LLM2SLMForConditionalGeneration,
    *,
    dataset: str | None = None,
    training: Mapping[str, Any] | None = None,
    metrics: Figures | None = None,
    speed: Figures | None = None,
    notes: Mapping[str, str] | None = None,
    limits: Sequence[str] = (),
    example: str = "Your prompt",
    repo_id: str | None = None,
    base_model: str | Sequence[str] | None = None,
    license: str | None = None,
) -> Path:
    """
    Write the model card of a saved checkpoint. Every number in it is counted from `model` or passed in.

    Args:
        directory (`str` or `os.PathLike`): The checkpoint's folder; made if missing. A card in it is overwritten.
        model ([`LLM2SLMForConditionalGeneration`]): The model.
        dataset (`str`, *optional*): Hub id of the training data, or a few words about it. Of a path, the last part is
            named.
        training (`Mapping`, *optional*): Settings and figures of the training, for a list.
        metrics, speed (`Mapping`, *optional*): Measured figures by name, or such a mapping for each contestant, for a
            table. Units belong into the names.
        notes (`Mapping[str, str]`, *optional*): A sentence on how something was measured, with the keys `"metrics"` and
            `"speed"`.
        limits (`Sequence[str]`, *optional*): What else this model can't do, for a list.
        example (`str`, defaults to `"Your prompt"`): A prompt like those of the training.
        repo_id (`str`, *optional*): Hub id of the checkpoint; by default the folder's name stands in the examples.
        base_model (`str` or `Sequence[str]`, *optional*): Hub ids of the two models, if the configuration names local
            copies.
        license (`str`, *optional*): The checkpoint's licence, as the Hub writes it; left out if not known.

    Returns:
        `Path` of the card.
    """
    config = model.config
    directory = Path(directory)
    repository = repo_id or directory.resolve().name
    given = [base_model] if isinstance(base_model, str) else list(base_model or ())
    base_models = given or [name for name in _names(config) if name and is_hub_id(name)]
    dataset_is_hub_id = dataset is not None and "/" in dataset and is_hub_id(dataset)
    notes = notes or {}
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag=PIPELINE_TAG,
        tags=["llm2slm"],
        base_model=list(dict.fromkeys(base_models)) or None,
        datasets=[dataset] if dataset is not None and dataset_is_hub_id else None,
        license=license,
    )
    card = ModelCard.from_template(
        data,
        template_str=_TEMPLATE.read_text(encoding="utf-8"),
        title=repository.rpartition("/")[2],
        repository=_quoted(repository),
        example=_quoted(example),
        held="LLM, projector and SLM" if config.llm_in_checkpoint else "projector and SLM",
        llm_held=config.llm_in_checkpoint,
        parts=_table(_parts(model, given), "part"),
        fusion=config.fusion,
        fusion_text=_FUSION_TEXTS[config.fusion],
        projector=_projector_text(config),
        revision=config.llm_revision,
        fingerprint=config.llm_fingerprint,
        dataset=_hub_link(dataset) if dataset is not None and dataset_is_hub_id else without_path(dataset),
        training="\n".join(f"- {name}: {_shown(value)}" for name, value in (training or {}).items()),
        metrics=_section(metrics, notes.get("metrics")),
        speed=_section(speed, notes.get("speed")),
        limits=list(limits),
    )
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / CARD_NAME
    card.save(path)
    return path


def is_hub_id(name: str) -> bool:
    """Whether `name` can be the id of a repository on the Hub, and is no file or folder on this machine."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not os.path.exists(name) and not name.endswith(_DATA_SUFFIXES)


def without_path(value: Any) -> Any:
    """`value`, or its last part if it is the absolute path of something on a machine."""
    if isinstance(value, (str, os.PathLike)):
        text = os.fspath(value)
        for kind in (PurePath, PureWindowsPath):
            if kind(text).is_absolute() or os.path.exists(text):
                return kind(text).name or text
    return value


def _names(config: LLM2SLMConfig) -> list[Any]:
    """Where LLM and SLM are from, as far as the configuration knows."""
    return [os.fspath(name) if name else None for name in (config.llm_name_or_path, config.slm_name_or_path)]


def _parts(model: LLM2SLMForConditionalGeneration, base_models: Sequence[str]) -> dict[str, dict[str, Any]]:
    """For LLM, projector and SLM: what it is, and its numbers of parameters."""
    config = model.config
    names = _names(config)
    for index, name in enumerate(base_models[:2]):
        names[index] = name
    llm, slm = (_hub_link(name) if name and is_hub_id(name) else without_path(name) for name in names)
    if config.slm_layers is not None:
        slm = f"cut from the LLM: its layers {_ranges(config.slm_layers)}, embeddings and head"
    llm_states = (
        "its last layer"
        if config.llm_layers == [-1]
        else f"its hidden states {', '.join(map(str, config.llm_layers))}"
    )
    parts = {
        "LLM": (f"{llm or 'a model in memory'} (`{config.llm_config.model_type}`), {llm_states}", model.llm),
        "projector": (f"{config.projector_num_layers} linear layers", model.projector),
        "SLM": (f"{slm or 'a model in memory'} (`{config.slm_config.model_type}`)", model.slm),
    }
    return {name: {"what it is": what, **_parameters(module)} for name, (what, module) in parts.items()}


def _ranges(numbers: Sequence[int]) -> str:
    """`[0, 4, 5, 6]` as `0, 4-6`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs)


def _parameters(module: nn.Module | None) -> dict[str, int | None]:
    """Numbers of parameters, trained and frozen; unknown for an LLM that was not loaded."""
    if module is None:
        return {"parameters": None, "trained": None, "frozen": None}
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in module.parameters()]
    trained = sum(size for size, requires_grad in sizes if requires_grad)
    total = sum(size for size, _ in sizes)
    return {"parameters": total, "trained": trained, "frozen": total - trained}


def _projector_text(config: LLM2SLMConfig) -> str:
    hidden = config.projector_hidden_size or max(config.llm_hidden_size, config.slm_hidden_size)
    sizes = [config.llm_hidden_size, *[hidden] * (config.projector_num_layers - 1), config.slm_hidden_size]
    shape = " to ".join(map(str, sizes))
    activation = f", `{config.projector_activation}` between them" if config.projector_num_layers > 1 else ""
    norm = f", `{config.projector_norm}` before them" if config.projector_norm != "none" else ""
    residual = ", added to the LLM's states" if config.projector_residual else ""
    return f"linear layers of widths {shape}{activation}{norm}{residual}; initialised as `{config.projector_init}`."


def _section(figures: Figures | None, note: str | None) -> str:
    """A table of figures with the sentence on how they were measured."""
    if not figures:
        return ""
    nested = all(isinstance(value, Mapping) for value in figures.values())
    table = _table(figures if nested else {name: {"value": value} for name, value in figures.items()}, "")
    return f"{note}\n\n{table}" if note else table


def _table(rows: Mapping[str, Mapping[str, Any]], corner: str) -> str:
    """A Markdown table: a row for each key, a column for each key of the inner mappings."""
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    lines = [[corner, *columns], ["---"] * (len(columns) + 1)]
    lines += [[name, *(_shown(row.get(column)) for column in columns)] for name, row in rows.items()]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def _shown(value: Any) -> str:
    """A value as text: floats to four significant digits or one tenth, integers with separators, paths by last part."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.1f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(without_path(value))


def _hub_link(name: str | None) -> str:
    return f"[{name}](https://huggingface.co/{name})"


def _quoted(text: str) -> str:
    """`text` as a Python string in double quotes, on one line."""
    return json.dumps(text, ensure_ascii=False)


__all__ = ["write_model_card"]
