"""The texts of a model card's sections: lists and tables of what is known of a model and of what was measured."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from .card_metadata import is_dataset_id, is_hub_id, metric_name, source_names
from .configuration_llm2slm import LLM2SLMConfig
from .loading import llm_skeleton, quantization_of
from .measurements import TRAINING, Record, without_path
from .speed import THIS_MODEL

if TYPE_CHECKING:
    from .modeling_llm2slm import LLM2SLMForConditionalGeneration

NOT_MEASURED = "Not measured."
_FUSION_TEXTS = {
    "add": "projected LLM states, added to the SLM's embeddings of the same tokens.",
    "replace": "projected LLM states in place of the SLM's embeddings of the prompt.",
    "llm-embed": "projected LLM states, added to the LLM's own embeddings through a linear map.",
    "kv": "keys and values that the LLM's layers made of the prompt, through linear maps, as the SLM's cache.",
    "align": "the prompt in the SLM's tokens, each added to the projected state of the LLM token over the same characters.",
}
_LIMITS = (
    "It writes what it was trained for: text unlike the training data is likely to be answered worse than by the LLM.",
    "What the LLM and the SLM get wrong, their biases included, is in this model too. Check what it writes before use.",
)

# Figures by the name of what was measured, for one contestant or for several: {"rougeL": 30.1} or
# {"this model": {"rougeL": 30.1}, "LLM": {"rougeL": 31.4}}.
Figures = Mapping[str, Any]


# The model ---------------------------------------------------------------------------------------------------------------
def summary_text(config: LLM2SLMConfig) -> str:
    """What the model is, and what its checkpoint holds."""
    if config.llm_in_checkpoint:
        held = "LLM, projector and SLM."
    else:
        held = "projector and SLM; the LLM is\nloaded from the place that its configuration names."
    return (
        "An LLM-to-SLM model: a frozen large language model (LLM) reads the prompt once, in parallel; a projector carries "
        "its\nstates over; a small language model (SLM) writes the answer, token by token. The method is that of\n"
        f"[Think Big, Generate Quick](https://arxiv.org/abs/2402.16844). This checkpoint holds {held}"
    )


def parts_text(model: LLM2SLMForConditionalGeneration, base_models: Sequence[str]) -> str:
    """A table of LLM, projector and SLM with their numbers of parameters, and how they are joined."""
    config = model.config
    llm, slm = model_links(config, base_models)
    states = ", ".join(map(str, config.llm_layers))
    llm_states = "its last layer" if config.llm_layers == [-1] else f"its hidden states {states}"
    if config.fusion == "kv":
        llm_states = f"keys and values of its layers {ranges(config.llm_layers)}"
    parts = {
        "LLM": (f"{llm} (`{config.llm_config.model_type}`), {llm_states}", _counted_llm(model)),
        "projector": (f"{len(model.projector.layers)} linear layers", model.projector),
        "SLM": (f"{slm} (`{config.slm_config.model_type}`)", model.slm),
    }
    rows = {name: {"what it is": what, **count_parameters(module)} for name, (what, module) in parts.items()}
    lines = [
        f"- **Fusion**: `{config.fusion}`: {_FUSION_TEXTS[config.fusion]}",
        f"- **Projector**: {_projector_text(config)}",
    ]
    if config.llm_revision:
        lines.append(f"- **Revision of the LLM**: `{config.llm_revision}`")
    if config.llm_fingerprint:
        lines.append(f"- **Fingerprint of the LLM's weights**: `{config.llm_fingerprint}`")
    return f"{table(rows, 'part')}\n\n" + "\n".join(lines)


def model_links(config: LLM2SLMConfig, base_models: Sequence[str]) -> list[str]:
    """LLM and SLM as links to the Hub or, where that does not know them, by name."""
    names = source_names(config)
    names[: len(base_models[:2])] = base_models[:2]
    llm, slm = (f"[{n}](https://huggingface.co/{n})" if n and is_hub_id(n) else without_path(n) for n in names)
    if config.slm_layers is not None:
        slm = f"cut from the LLM: its layers {ranges(config.slm_layers)}, embeddings and head"
    return [llm or "a model in memory", slm or "a model in memory"]


def _counted_llm(model: LLM2SLMForConditionalGeneration) -> nn.Module | None:
    """The LLM, or its skeleton where it is not loaded or quantised, which packs several weights into one number."""
    if model.llm is not None and quantization_of(model.llm) is None:
        return model.llm
    try:
        return llm_skeleton(model.config.llm_config).requires_grad_(False)
    except ValueError:  # its code is in its own repository, and is not run for a card
        return None


def count_parameters(module: nn.Module | None) -> dict[str, int]:
    """Numbers of parameters: all, those that training changes, and the frozen ones; none of a part that is not known."""
    if module is None:
        return {}
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in module.parameters()]
    trainable = sum(size for size, requires_grad in sizes if requires_grad)
    total = sum(size for size, _ in sizes)
    return {"parameters": total, "trainable": trainable, "frozen": total - trainable}


def ranges(numbers: Sequence[int]) -> str:
    """`[0, 4, 5, 6]` as `0, 4-6`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs)


def _projector_text(config: LLM2SLMConfig) -> str:
    if config.fusion == "kv":
        added = ", added to the LLM's own" if config.projector_residual else ""
        widths = f"{config.llm_state_size} to {config.slm_state_size}"
        return (
            f"{config.num_llm_states} linear maps of widths {widths}{added}; initialised as `{config.projector_init}`."
        )
    hidden = config.projector_hidden_size or max(config.llm_hidden_size, config.slm_hidden_size)
    sizes = [config.llm_hidden_size, *[hidden] * (config.projector_num_layers - 1), config.slm_hidden_size]
    shape = " to ".join(map(str, sizes))
    activation = f", `{config.projector_activation}` between them" if config.projector_num_layers > 1 else ""
    norm = f", `{config.projector_norm}` before them" if config.projector_norm != "none" else ""
    residual = ", added to the LLM's states" if config.projector_residual else ""
    return f"linear layers of widths {shape}{activation}{norm}{residual}; initialised as `{config.projector_init}`."


# Using it ----------------------------------------------------------------------------------------------------------------
def usage_text(repository: str, example: str, auto_map: Mapping[str, Any] | None, llm_to_pass: str | None) -> str:
    """
    Code that runs, and what else must be said.

    Args:
        repository (`str`): What to load.
        example (`str`): A prompt.
        auto_map (`Mapping`, *optional*): That of the checkpoint's `config.json`, if its code lies in the repository.
        llm_to_pass (`str`, *optional*): What to load as the LLM where the configuration names a folder of one machine;
            `"..."` if its id is not known.
    """
    model, prompt = quoted(repository), quoted(example)
    text = (
        "```python\nimport transformers_llm2slm  # registers the model with transformers\n"
        f'from transformers import pipeline\n\npipe = pipeline("text2text-generation", model={model})\n'
        f"print(pipe({prompt}))\n```\n\n"
        f"Or, with the parts at hand: `AutoModel.from_pretrained({model})` gives the model, which has `generate`, and\n"
        f"`AutoProcessor.from_pretrained({model})` its processor."
    )
    if auto_map:
        text += (
            "\n\nWithout the package: the modelling code lies in the repository. Read it, and add `trust_remote_code=True` "
            "to each of\nthese calls, without the import."
        )
    if llm_to_pass is not None:
        llm = "..." if llm_to_pass == "..." else quoted(llm_to_pass)
        text += (
            "\n\nThe configuration names the LLM by a folder of the machine that made this checkpoint, so its place must be "
            f"passed:\n`AutoModel.from_pretrained({model}, llm_name_or_path={llm})`, or "
            f'`pipeline(..., model_kwargs={{"llm_name_or_path": {llm}}})`.'
        )
    return text


def quoted(text: str) -> str:
    """`text` as a Python string in double quotes, on one line."""
    return json.dumps(text, ensure_ascii=False)


# Training, results, speed ------------------------------------------------------------------------------------------------
def data_text(dataset: str | None) -> str:
    """What the model was trained on."""
    if dataset is None:
        return "The data is not recorded. The LLM's weights were not changed."
    named = (
        f"[{dataset}](https://huggingface.co/datasets/{dataset})" if is_dataset_id(dataset) else without_path(dataset)
    )
    return f"Trained on {named}. The LLM's weights were not changed."


def training_text(settings: Mapping[str, Any]) -> str:
    """A list of settings and figures."""
    return "\n".join(f"- {name}: {shown(value)}" for name, value in settings.items()) or "Not recorded."


def figures_text(figures: Figures | None, note: str | None) -> str:
    """A table of figures with the sentence on how they were measured."""
    if not figures:
        return ""
    nested = all(isinstance(value, Mapping) for value in figures.values())
    rows = table(figures if nested else {name: {"value": value} for name, value in figures.items()}, "")
    return f"{note}\n\n{rows}" if note else rows


def quality_text(record: Record) -> str:
    """A record of quality: on what, by which command, and the metrics, beside those of other models if there are any."""
    data = record.get("data") or {}
    where = [str(without_path(data["name"]))] if data.get("name") else []
    where += [f"configuration {data['config']}"] if data.get("config") else []
    where += [f"split {data['split']}"] if data.get("split") else []
    where += [f"{shown(data['rows'])} rows"] if data.get("rows") is not None else []
    rows = {THIS_MODEL: record["metrics"], **record.get("beside", {})}
    named = {name: {metric_name(key): value for key, value in row.items()} for name, row in rows.items()}
    heading = f"On {', '.join(where)}" if where else "On data that are not recorded"
    return f"{heading}{_measured(record)}:{_note(record)}\n\n{table(named, '')}{_timing(record)}"


def _timing(record: Record) -> str:
    """How long the writing of what was scored took, with the settings of generation."""
    if not (timing := record.get("timing")):
        return ""
    settings = ", ".join(f"{name.replace('_', ' ')}: {shown(v)}" for name, v in record.get("generation", {}).items())
    return (
        f"\n\nThis model wrote {shown(timing['new_tokens'])} tokens in {shown(timing['seconds'])} seconds, "
        f"{shown(timing['tokens_per_second'])} a second ({settings})."
    )


def speed_text(record: Record) -> str:
    """A record of speed: under which conditions, by which command, on which machine, and the figures of each model."""
    settings = ", ".join(f"{name}: {shown(value)}" for name, value in record["settings"].items())
    return f"{settings[:1].upper()}{settings[1:]}{_measured(record)}:{_note(record)}\n\n{table(record['figures'], '')}"


def _measured(record: Record) -> str:
    """When, by what and where something was measured, as far as that is recorded."""
    found = f"; measured on {record['date'][:10]}" if record.get("date") else ""
    if command := record.get("command"):
        found += f"{' by' if found else '; measured by'} `{command}`"
    if machine := record.get("machine"):
        count = machine.get("threads")
        threads = f", {count} thread{'' if count == 1 else 's'}" if count else ""
        devices = ", ".join([f"{machine.get('cpu') or 'a CPU'}{threads}", *machine.get("gpus", [])])
        found += f" on {devices}" if found else f"; on {devices}"
    return found


def _note(record: Record) -> str:
    return f" {record['note']}" if record.get("note") else ""


# Sizes, versions, licences, limits ---------------------------------------------------------------------------------------
def size_text(checkpoint_bytes: int | None) -> str:
    """Bytes of the checkpoint's weights."""
    return "" if checkpoint_bytes is None else f"- Weights of this checkpoint: {shown(checkpoint_bytes)} bytes"


def llm_size_text(llm_bytes: int | None) -> str:
    """Bytes of the LLM's own weight files."""
    return (
        ""
        if llm_bytes is None
        else f"- The LLM's own weight files, where this card was written: {shown(llm_bytes)} bytes"
    )


def versions_text(config: Mapping[str, Any], records: Sequence[Record]) -> str:
    """Versions of libraries: those that wrote the checkpoint, and those with which something was trained or measured."""
    lines: list[tuple[str, dict[str, str]]] = []
    if "transformers_version" in config:
        lines.append(("Saved by", {"transformers": config["transformers_version"]}))
    for record in records:
        what, found = "Trained with" if record["kind"] == TRAINING else "Measured with", record.get("versions") or {}
        for title, versions in lines:
            if title == what and all(found.get(name, version) == version for name, version in versions.items()):
                versions |= found
                break
        else:
            if found:
                lines.append((what, dict(found)))
    return "\n".join(f"- {what}: {', '.join(f'{n} {version}' for n, version in of.items())}" for what, of in lines)


def licenses_text(config: LLM2SLMConfig, base_models: Sequence[str], licenses: Sequence[str | None]) -> str:
    """The base models with the licences that their own cards state, as far as they are known."""
    links = model_links(config, base_models)
    roles = ("LLM", "SLM") if config.slm_layers is None else ("LLM, of which the SLM is a part",)
    known = [
        f"- {role}: {link}: `{found}`" for role, link, found in zip(roles, links, licenses, strict=False) if found
    ]
    return "\n".join(["Of the base models, as their own cards state them:", "", *known]) if known else ""


def limits_text(limits: Sequence[str]) -> str:
    """What the model can't do."""
    return "\n".join(f"- {limit}" for limit in (*_LIMITS, *limits))


# Tables ------------------------------------------------------------------------------------------------------------------
def table(rows: Mapping[str, Mapping[str, Any]], corner: str) -> str:
    """A Markdown table: a row for each key, a column for each key of the inner mappings."""
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    lines = [[corner, *columns], ["---"] * (len(columns) + 1)]
    lines += [[name, *(shown(row.get(column)) for column in columns)] for name, row in rows.items()]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def shown(value: Any) -> str:
    """A value as text: floats to four significant digits or one tenth, integers with separators, paths by last part."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.1f}" if abs(value) >= 1000 else f"{value:.4g}"
    return " ".join(str(without_path(value)).split("\n"))
