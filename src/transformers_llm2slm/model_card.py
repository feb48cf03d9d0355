"""The model card of a checkpoint: what is known of the model and what was measured, and nothing else.

A card is written once and updated in place from then on, see [`write_model_card`]. `model_cards/README.md` in the project's
repository documents every field.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import ModelCard, ModelCardData

from . import card_text
from .card_metadata import (
    eval_results,
    is_dataset_id,
    is_hub_id,
    license_of,
    merge_metadata,
    new_metadata,
    source_names,
)
from .card_sections import Section, marked, read_sections, replace_sections
from .checkpoint_files import checkpoint_bytes, checkpoint_fingerprint, llm_files_bytes
from .configuration_llm2slm import LLM2SLMConfig
from .measurements import QUALITY, SPEED, TRAINING, Record, read_records
from .push import CARD_NAME

if TYPE_CHECKING:
    from .modeling_llm2slm import LLM2SLMForConditionalGeneration

logger = logging.getLogger(__name__)

_TEMPLATE_NAME = "model_card_template.md"
_EARLIER_WEIGHTS = "_Of earlier weights than those that lie here now; so is what the metadata say of results._"
# Sections with figures of the weights, which are out of date once these are others.
_OF_THE_WEIGHTS = ("training", "results", "speed")
_PIPELINE = re.compile(r'model=("(?:[^"\\]|\\.)*")\)\nprint\(pipe\(("(?:[^"\\]|\\.)*")\)\)')


def write_model_card(
    directory: str | os.PathLike,
    model: LLM2SLMForConditionalGeneration,
    *,
    dataset: str | None = None,
    training: Mapping[str, Any] | None = None,
    metrics: card_text.Figures | None = None,
    speed: card_text.Figures | None = None,
    notes: Mapping[str, str] | None = None,
    limits: Sequence[str] = (),
    example: str | None = None,
    repo_id: str | None = None,
    base_model: str | Sequence[str] | None = None,
    license: str | None = None,
    language: str | Sequence[str] | None = None,
    tags: Sequence[str] = (),
    records: Sequence[Record] | None = None,
    online: bool = False,
    token: str | bool | None = None,
) -> Path:
    """
    Write the model card of a saved checkpoint, or update the one that is there.

    Every number is counted from `model` and the files in `directory`, recorded there by who measured it, or passed in.

    Of a card that is there, only what stands between the markers `<!-- llm2slm:NAME -->` and `<!-- /llm2slm:NAME -->` is
    replaced, and only by what is known now: figures that are not known now stay, with a line that says so where they are of
    other weights. The metadata are merged: lists are united, and what is set stays, unless it is passed here. Of a card
    without such markers, only the metadata are updated; the untouched ones that transformers, its `Trainer` and TRL write
    of themselves are replaced.

    Args:
        directory (`str` or `os.PathLike`): The checkpoint's folder; made if missing.
        model ([`LLM2SLMForConditionalGeneration`]): The model.
        dataset (`str`, *optional*): Hub id of the training data, or a few words about it. Of a path, the last part is
            named.
        training (`Mapping`, *optional*): Settings and figures of the training, for a list.
        metrics, speed (`Mapping`, *optional*): Measured figures by name, or such a mapping for each contestant, for a
            table. Units belong into the names.
        notes (`Mapping[str, str]`, *optional*): A sentence on how something was measured, with the keys `"metrics"` and
            `"speed"`.
        limits (`Sequence[str]`, *optional*): What else this model can't do, for a list.
        example (`str`, *optional*): A prompt like those of the training; by default that of the card that is there.
        repo_id (`str`, *optional*): Hub id of the checkpoint; by default that of the card that is there, or the folder's
            name.
        base_model (`str` or `Sequence[str]`, *optional*): Hub ids of the two models, if the configuration names local
            copies.
        license (`str`, *optional*): The checkpoint's licence, as the Hub writes it; left out if not given.
        language (`str` or `Sequence[str]`, *optional*): The languages it writes, as the Hub writes them (`"de"`).
        tags (`Sequence[str]`, *optional*): Tags for the Hub, beside `"llm2slm"`.
        records (`Sequence[Mapping]`, *optional*): Records of training, quality and speed, see `measurements.py`; by
            default those in `directory` that are of its weights.
        online (`bool`, defaults to `False`): Ask the Hub for the base models' licences where they are not known here.
        token (`str` or `bool`, *optional*): The Hub's token for that.

    Returns:
        `Path` of the card.

    Raises:
        ValueError: if a card is there whose metadata can't be read, or records that are none.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / CARD_NAME
    weights = checkpoint_fingerprint(directory)
    records = list(read_records(directory, weights) if records is None else records)
    old_text, old = _read_card(path)
    sections = {} if old is None else read_sections(old.text)
    repository, prompt = _named_in(sections.get("usage"))
    repository = repo_id or repository or directory.resolve().name
    base_models = [base_model] if isinstance(base_model, str) else list(base_model or ())
    dataset = dataset or _trained_on(records)
    texts = _model_texts(model, directory, base_models, _licenses(model, base_models, online, token))
    texts["usage"] = _usage(model.config, directory, base_models, repository, example or prompt or "Your prompt")
    texts["data"] = card_text.data_text(dataset) if dataset else ""
    texts |= _measured_texts(records, training or _training(records), metrics, speed, notes or {})
    texts["versions"] = card_text.versions_text(_config_file(directory), records)
    texts["limits"] = card_text.limits_text(limits) if limits or "limits" not in sections else ""
    known = {name: Section(text, weights if name in _OF_THE_WEIGHTS else None) for name, text in texts.items() if text}
    title = repository.rpartition("/")[2]
    metadata = new_metadata(
        base_models or [name for name in source_names(model.config) if name and is_hub_id(name)],
        name=title,
        datasets=[dataset] if dataset and is_dataset_id(dataset) else [],
        results=[result for record in records if record["kind"] == QUALITY for result in eval_results(record)],
        license=license,
        language=language,
        tags=tags,
    )
    passed = [name for name, value in (("license", license), ("language", language)) if value is not None]
    if old is None or is_boilerplate(old):
        if old is not None:
            merge_metadata(old.data, metadata, passed)
            metadata = old.data
        return _write(path, f"{_new_card(metadata, title, known)}\n")
    header = old_text.removesuffix(old.text)
    changed = merge_metadata(old.data, metadata, passed)
    old.text = replace_sections(old.text, known | _out_of_date(sections, known, weights))
    return _write(path, str(old) if changed else header + old.text)


def update_pushed_card(
    model: LLM2SLMForConditionalGeneration,
    folder: str | os.PathLike,
    repo_id: str,
    token: str | bool | None = None,
    local_card: str | None = None,
) -> None:
    """
    Update the card in a folder that is about to be uploaded, or put ours in place of transformers' boilerplate.

    Records come from the folder, and from that which the model was loaded from if they are of these very weights. A
    folder that holds an adapter is left alone: its card is that of PEFT.

    Args:
        model: The model that is pushed.
        folder (`str` or `os.PathLike`): What is uploaded, with the repository's card or a boilerplate in it.
        repo_id (`str`): Where to.
        token (`str` or `bool`, *optional*): The Hub's token.
        local_card (`str`, *optional*): The card that lay in the folder before. It is taken where the repository has none.
    """
    folder = Path(folder)
    if (folder / "adapter_config.json").exists():
        return
    config = model.config
    if _llm_is_local(config):
        logger.warning(
            f"The checkpoint names its LLM by a folder of this machine ({config.llm_name_or_path!r}), so others can't load it "
            "from the Hub as it is: they will have to pass `llm_name_or_path=`. Set `model.config.llm_name_or_path` to "
            "the LLM's id on the Hub before you push, or push with `save_llm=True`."
        )
    old = _read_card(folder / CARD_NAME)[1]
    if local_card is not None and (old is None or is_boilerplate(old)):
        _write(folder / CARD_NAME, local_card)
    weights = checkpoint_fingerprint(folder)
    records = read_records(folder, weights)
    source = Path(model.name_or_path or "")
    if model.name_or_path and source.is_dir() and source.resolve() != folder.resolve():
        records = [*read_records(source, weights), *records]
    write_model_card(folder, model, repo_id=repo_id, records=records, online=True, token=token)


def checkpoint_skeleton(folder: str | os.PathLike) -> LLM2SLMForConditionalGeneration:
    """
    The model of a checkpoint's configuration, without its LLM and without memory for weights: enough for its card.

    Raises:
        OSError: if there is no configuration.
    """
    from .modeling_llm2slm import LLM2SLMForConditionalGeneration

    with torch.device("meta"):
        return LLM2SLMForConditionalGeneration(LLM2SLMConfig.from_pretrained(folder))


def card_template() -> str:
    """The template of a new card."""
    return Path(__file__).with_name(_TEMPLATE_NAME).read_text(encoding="utf-8")


# What is there already ---------------------------------------------------------------------------------------------------
def _read_card(path: Path) -> tuple[str, ModelCard | None]:
    """The text of a card and the card, with the line breaks that it has; no card if there is none."""
    if not path.is_file():
        return "", None
    with path.open(encoding="utf-8-sig", newline="") as file:
        text = file.read()
    return text, ModelCard(text)


def _write(path: Path, text: str) -> Path:
    """Write a card with the line breaks that it has."""
    with path.open("w", encoding="utf-8", newline="") as file:
        file.write(text)
    return path


def is_boilerplate(card: ModelCard) -> bool:
    """Whether a card is one that transformers, its `Trainer` or TRL made of itself, and that nobody has worked on."""
    from transformers.modelcard import AUTOGENERATED_TRAINER_COMMENT

    text = card.text.replace("\r\n", "\n").strip()
    if text.startswith(AUTOGENERATED_TRAINER_COMMENT.strip()):  # which asks who completes the card to remove it
        return text.count("More information needed") == 3
    headings = re.findall(r"^#+ .*", text, re.MULTILINE)
    if "It has been trained using [TRL](https://github.com/huggingface/trl)." in text:
        return headings[1:] == ["## Quick start", "## Training procedure", "### Framework versions", "## Citations"]
    if "This is the model card of a 🤗 transformers model that has been pushed on the Hub." not in text:
        return False
    said = re.search(r"^This is the model card of a 🤗 transformers model.*$", text, re.MULTILINE)
    pristine = ModelCard.from_template(ModelCardData(), model_description=said[0] if said else None)
    return text == pristine.text.strip()


def _named_in(usage: Section | None) -> tuple[str | None, str | None]:
    """Repository and example prompt of the section on usage, as far as it has them."""
    found = _PIPELINE.search(usage.text) if usage is not None else None
    return (None, None) if found is None else (json.loads(found[1]), json.loads(found[2]))


def _out_of_date(
    sections: Mapping[str, Section], known: Mapping[str, Section], weights: str | None
) -> dict[str, Section]:
    """The sections of a card with figures of other weights than the present ones, with a line that says so."""
    return {
        name: Section(f"{_EARLIER_WEIGHTS}\n\n{old.text}", old.weights)
        for name, old in sections.items()
        if name not in known
        and weights is not None
        and old.weights not in (None, weights)
        and not old.text.startswith(_EARLIER_WEIGHTS)
    }


# What is known -----------------------------------------------------------------------------------------------------------
def _new_card(metadata: Any, title: str, known: Mapping[str, Section]) -> ModelCard:
    unknown = {
        "data": card_text.data_text(None),
        "training": card_text.training_text({}),
        "results": card_text.NOT_MEASURED,
        "speed": card_text.NOT_MEASURED,
        "size": "The weights of this checkpoint were not counted.",
        "llm-size": "The LLM's own weight files were not at hand to be counted.",
        "versions": "Not recorded.",
        "licenses": "Those of the base models are not known here; their own cards state them.",
    }
    texts = {name: Section(text) for name, text in unknown.items()} | dict(known)
    variables = {name.replace("-", "_"): marked(name, section) for name, section in texts.items()}
    return ModelCard.from_template(metadata, template_str=card_template(), title=title, **variables)


def _model_texts(
    model: LLM2SLMForConditionalGeneration, directory: Path, base_models: Sequence[str], licenses: Sequence[str | None]
) -> dict[str, str]:
    """The sections on what the model is; empty where nothing is known."""
    return {
        "summary": card_text.summary_text(model.config),
        "parts": card_text.parts_text(model, base_models),
        "size": card_text.size_text(checkpoint_bytes(directory)),
        "llm-size": card_text.llm_size_text(llm_files_bytes(model.config, model.checkpoint_location.get("cache_dir"))),
        "licenses": card_text.licenses_text(model.config, base_models, licenses),
    }


def _usage(config: LLM2SLMConfig, directory: Path, base_models: Sequence[str], repository: str, example: str) -> str:
    llm_to_pass = (base_models or ["..."])[0] if _llm_is_local(config) else None
    return card_text.usage_text(repository, example, _config_file(directory).get("auto_map"), llm_to_pass)


def _measured_texts(
    records: Sequence[Record],
    training: Mapping[str, Any],
    metrics: card_text.Figures | None,
    speed: card_text.Figures | None,
    notes: Mapping[str, str],
) -> dict[str, str]:
    """The sections on training, results and speed; empty where nothing is known."""
    quality, timing = (
        card_text.figures_text(figures, notes.get(name)) for figures, name in ((metrics, "metrics"), (speed, "speed"))
    )
    return {
        "training": card_text.training_text(training) if training else "",
        "results": _joined(quality, QUALITY, records, card_text.quality_text),
        "speed": _joined(timing, SPEED, records, card_text.speed_text),
    }


def _joined(figures: str, kind: str, records: Sequence[Record], text_of: Any) -> str:
    """Figures that were passed in, and those of all records of a kind, below each other."""
    return "\n\n".join(filter(None, [figures, *(text_of(record) for record in records if record["kind"] == kind)]))


def _trained_on(records: Sequence[Record]) -> str | None:
    names = [(record.get("data") or {}).get("name") for record in records if record["kind"] == TRAINING]
    return next((name for name in reversed(names) if name), None)


def _training(records: Sequence[Record]) -> Mapping[str, Any]:
    return next((record["settings"] for record in reversed(records) if record["kind"] == TRAINING), {})


def _licenses(
    model: LLM2SLMForConditionalGeneration, base_models: Sequence[str], online: bool, token: str | bool | None
) -> list[str | None]:
    """The licences of LLM and SLM, by their own cards: where they lie here, else on the Hub."""
    config, found = model.config, []
    place: dict[str, Any] = {
        "online": online,
        "token": token,
        "cache_dir": model.checkpoint_location.get("cache_dir"),
    }
    for index, (name, revision) in enumerate(
        zip(source_names(config), (config.llm_revision, config.slm_revision), strict=True)
    ):
        license = license_of(name, revision, **place)
        if license is None and index < len(base_models):
            license = license_of(base_models[index], **place)
        found.append(license)
    return found


def _llm_is_local(config: LLM2SLMConfig) -> bool:
    """Whether the LLM can't be had but from this machine."""
    name = config.llm_name_or_path
    return not config.llm_in_checkpoint and name is not None and not is_hub_id(os.fspath(name))


def _config_file(directory: Path) -> dict[str, Any]:
    """What the checkpoint's `config.json` holds; empty without one."""
    path = directory / "config.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


__all__ = ["write_model_card"]
