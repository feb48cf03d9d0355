"""What `llm2slm info` tells: what a checkpoint is made of, from its configs and the headers of its files."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text
from torch import nn

from ..checkpoint_files import llm_files_bytes, safetensors_headers
from ..configuration_llm2slm import LLM_SUBFOLDER
from ..loading import llm_skeleton
from ..model_card import checkpoint_skeleton
from ..processing_llm2slm import LLM2SLMProcessor
from ..reference import pin_revision
from .shared import check_checkpoint

# Names in safetensors headers and in torch.
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I8": "int8", "U8": "uint8"}
# What is fetched of a hub repository.
CHECKPOINT_FILES = ["*.json", "*.jinja", "*.model", "*.txt", "*.safetensors"]


def checkpoint_info(name_or_path: str, **hub: Any) -> dict[str, Any]:
    """
    What a checkpoint is made of. The LLM's weights are not loaded: its parameters are counted on the meta device.

    Args:
        name_or_path (`str`): Local folder or hub id of the checkpoint.
        hub: `revision`, `token`, `cache_dir`, `local_files_only`.

    Returns:
        `dict`: `parts` (`llm`, `projector`, `slm`, each with class, parameters, dtype, source, revision and bytes),
        `total`, and what the configuration says of fusion, layers, projector and tokenizers. Plain values, for JSON.

    Raises:
        ValueError: if it is no checkpoint of this kind.
        OSError: if there is none, or it has no weights.
    """
    pin_revision(name_or_path, hub)
    check_checkpoint(name_or_path, **hub)
    folder = Path(name_or_path)
    if not folder.is_dir():
        ignored = [f"{LLM_SUBFOLDER}/*", "checkpoint-*/*"]
        folder = Path(snapshot_download(name_or_path, allow_patterns=CHECKPOINT_FILES, ignore_patterns=ignored, **hub))
    model = checkpoint_skeleton(folder)
    config = model.config
    tensors = safetensors_headers(folder.glob("*.safetensors"))
    if not tensors:
        raise OSError(f"{name_or_path!r} holds no *.safetensors files, so there are no weights to tell of.")
    llm = llm_skeleton(config.llm_config)
    llm_files = safetensors_headers((folder / LLM_SUBFOLDER).glob("*.safetensors")) if config.llm_in_checkpoint else {}
    parts: dict[str, dict[str, Any]] = {
        "llm": {
            "class": type(llm).__name__,
            "parameters": sum(parameter.numel() for parameter in llm.parameters()),
            "trainable": False,
            "dtype": config.llm_dtype or "as stored",
            "quantization": str((config.llm_quantization_config or {}).get("quant_method", "")) or None,
            "source": config.llm_name_or_path,
            "revision": config.llm_revision,
            "fingerprint": config.llm_fingerprint,
            "source_bytes": llm_files_bytes(config, hub.get("cache_dir")),
            "checkpoint_bytes": sum(tensor["bytes"] for tensor in llm_files.values()),
        }
    }
    for name, module in (("projector", model.projector), ("slm", model.slm)):
        parts[name] = _checkpoint_part(f"model.{name}.", module, tensors)
    parts["slm"] |= {"source": config.slm_name_or_path, "revision": config.slm_revision}
    return {
        "checkpoint": str(name_or_path),
        "fusion": config.fusion,
        "llm_layer": config.llm_layer,
        "llm_num_layers": config.num_llm_layers,
        "llm_in_checkpoint": config.llm_in_checkpoint,
        "slm_encoder": config.slm_encoder if config.slm_config.is_encoder_decoder else None,
        "slm_layers": config.slm_layers,
        "projector": {
            "widths": [layer.in_features for layer in model.projector.layers[: config.projector_num_layers]]
            + [config.slm_state_size],
            "activation": config.projector_activation,
            "norm": config.projector_norm,
            "residual": config.projector_residual,
            "init": config.projector_init,
        },
        "tokenizers": _tokenizers(folder),
        "parts": parts,
        "total": {
            "parameters": sum(part["parameters"] for part in parts.values()),
            "trainable_parameters": sum(part["parameters"] for part in parts.values() if part["trainable"]),
            "checkpoint_bytes": sum(part["checkpoint_bytes"] for part in parts.values()),
        },
    }


def _checkpoint_part(prefix: str, module: nn.Module, tensors: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """A part that the checkpoint holds: as its class says, and as the files say."""
    held = {key: tensor for key, tensor in tensors.items() if key.startswith(prefix)}
    names = {prefix + name for name, _ in module.named_parameters(remove_duplicate=False)}
    found = sum(tensor["numel"] for key, tensor in held.items() if key in names)
    dtypes = sorted({DTYPES.get(tensor["dtype"], tensor["dtype"].lower()) for tensor in held.values()})
    parameters = sum(parameter.numel() for parameter in module.parameters())
    return {
        "class": type(module).__name__,
        "parameters": parameters,
        "missing_parameters": parameters - found,
        "trainable": True,
        "dtype": " ".join(dtypes) or None,
        "checkpoint_bytes": sum(tensor["bytes"] for tensor in held.values()),
    }


def _tokenizers(folder: Path) -> dict[str, Any] | None:
    """Classes and sizes of the tokenizers; `None` for a checkpoint without a processor."""
    if not (folder / "processor_config.json").is_file():
        return None
    processor = LLM2SLMProcessor.from_pretrained(folder)
    tokenizers = {"llm": processor.llm_tokenizer, "slm": processor.tokenizer}
    return {
        "shared": processor.shared_tokenizer,
        "max_prompt_length": processor.max_prompt_length,
        **{name: {"class": type(part).__name__, "tokens": len(part)} for name, part in tokenizers.items()},
    }


# The table ---------------------------------------------------------------------------------------------------------------
def show_info(info: dict[str, Any], console: Console) -> None:
    """Print what [`checkpoint_info`] tells, fit for 80 columns."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for name in ("part", "class"):
        table.add_column(name, overflow="fold")
    table.add_column("parameters", justify="right", no_wrap=True)
    table.add_column("training")
    table.add_column("dtype")
    table.add_column("saved", justify="right", no_wrap=True)
    for name, part in info["parts"].items():
        size = format_bytes(part["checkpoint_bytes"]) if part["checkpoint_bytes"] else "-"
        table.add_row(
            name,
            part["class"],
            f"{part['parameters']:,}",
            "trainable" if part["trainable"] else "frozen",
            part["dtype"] or "-",
            size,
            end_section=name == "slm",
        )
    total = info["total"]
    table.add_row(
        "total", "", f"{total['parameters']:,}", "", "", format_bytes(total["checkpoint_bytes"]), style="bold"
    )
    console.print(table)
    lines = Table.grid(padding=(0, 2))
    lines.add_column(no_wrap=True)
    lines.add_column(overflow="fold")
    for name, value in _lines(info):
        lines.add_row(name, Text(value))
    console.print(Padding(lines, (0, 0, 0, 1)))


def _lines(info: dict[str, Any]) -> Iterable[tuple[str, str]]:
    """What stands below the table, as name and value."""
    llm, slm, projector = info["parts"]["llm"], info["parts"]["slm"], info["projector"]
    where = f"{format_bytes(llm['source_bytes'])} on this machine" if llm["source_bytes"] else "not on this machine"
    if info["llm_in_checkpoint"]:
        where = "in the checkpoint"
    if llm["quantization"]:
        where += f", quantised on loading: {llm['quantization']}"
    yield "llm", f"{_source(llm, 'a model in memory')} ({where})"
    if info["slm_layers"] is not None:
        yield "slm", f"cut from the LLM, layers {', '.join(map(str, info['slm_layers']))}"
    else:
        yield "slm", _source(slm, "a model in memory")
    fusion = info["fusion"] + (f", slm_encoder {info['slm_encoder']}" if info["slm_encoder"] else "")
    yield "fusion", fusion
    layers = info["llm_layer"] if isinstance(info["llm_layer"], list) else [info["llm_layer"]]
    mixed = ", a learned mix" if isinstance(info["llm_layer"], list) else ""
    yield "llm_layer", f"{', '.join(map(str, layers))} of {info['llm_num_layers']}{mixed}"
    text = f" -> {projector['activation']} -> ".join(
        f"Linear({i}, {o})" for i, o in zip(projector["widths"], projector["widths"][1:], strict=False)
    )
    text += f", norm {projector['norm']}, init {projector['init']}" + (", residual" if projector["residual"] else "")
    yield "projector", text
    total = info["total"]
    share = total["trainable_parameters"] / total["parameters"]
    yield "trainable", f"{total['trainable_parameters']:,} parameters, {share:.1%} of all"
    yield "tokenizers", _tokenizer_line(info["tokenizers"])
    for name, part in info["parts"].items():
        if part.get("missing_parameters"):
            yield "INCOMPLETE", f"the files lack {part['missing_parameters']:,} of the parameters of {name}"


def _source(part: dict[str, Any], otherwise: str) -> str:
    revision = f" @ {part['revision']}" if part["revision"] else ""
    return f"{part['source']}{revision}" if part["source"] else otherwise


def _tokenizer_line(tokenizers: dict[str, Any] | None) -> str:
    if tokenizers is None:
        return "none in the checkpoint: save a processor beside the model"
    llm, slm = (f"{tokenizers[name]['class']}, {tokenizers[name]['tokens']:,} tokens" for name in ("llm", "slm"))
    text = f"one: {slm}" if tokenizers["shared"] else f"LLM {llm}; SLM {slm}"
    limit = tokenizers["max_prompt_length"]
    return text + (f"; prompts up to {limit:,}" if limit else "")


def format_bytes(size: float) -> str:
    """Bytes as people read them: `1.5 MB` is 1,500,000 bytes."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
