"""The pairs of `speed.py`: models of published sizes, and everything that is made of them before anything is timed."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import logging
import pathlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from generate_overhead import T5_LARGE, T5_SMALL, T5_V1_1, smollm2_config
from speed_rivals import CTranslate2Process, convert_to_ctranslate2
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    T5Config,
)

from transformers_llm2slm import LLM2SLMForConditionalGeneration
from transformers_llm2slm.contestants import Conditions
from transformers_llm2slm.exported import LLM2SLMExportedModel

# Models ------------------------------------------------------------------------------------------------------------------
FLAN_T5_XL = T5_V1_1 | {"d_model": 2048, "d_ff": 5120, "num_layers": 24, "num_heads": 32}


def qwen3_config() -> Qwen3Config:
    """The size of Qwen3-0.6B."""
    return Qwen3Config(
        vocab_size=151936,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=40960,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
        tie_word_embeddings=True,
    )


# Configurations by the names of their repositories.
MODELS: dict[str, Callable[[], PreTrainedConfig]] = {
    "t5-v1_1-large": lambda: T5Config(**T5_LARGE),
    "t5-v1_1-small": lambda: T5Config(**T5_SMALL),
    "flan-t5-xl": lambda: T5Config(**FLAN_T5_XL),
    "SmolLM2-135M": smollm2_config,
    "Qwen3-0.6B": qwen3_config,
}
TINY_T5 = {"d_model": 32, "d_ff": 64, "d_kv": 8, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4}
TINY_LLAMA = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 6, "num_attention_heads": 4}
TINY_LLAMA |= {"num_key_value_heads": 2, "head_dim": 8}


@dataclass(frozen=True)
class SpeedPair:
    """
    An LLM and an SLM.

    Args:
        llm, slm (`str`): Names in `MODELS`; without an SLM, it is cut from the LLM, its top `slm_layers` layers.
        fusion (`str`, *optional*): See [`LLM2SLMConfig`].
        llm_dtype (`torch.dtype`): That of the LLM; one in float32 takes part in bfloat16 too.
        sweeps, exports (`bool`): Whether it takes part under other conditions than the base, and in other runtimes.
    """

    llm: str
    slm: str | None
    slm_layers: int | None = None
    fusion: str | None = None
    llm_dtype: torch.dtype = torch.float32
    sweeps: bool = False
    exports: bool = True

    @property
    def name(self) -> str:
        return f"{self.llm} -> {self.slm or f'its top {self.slm_layers} layers'}"

    @property
    def one_tokenizer(self) -> bool:
        return self.fusion != "align"


PAIRS = {
    pair.name: pair
    for pair in (
        SpeedPair("t5-v1_1-large", "t5-v1_1-small", fusion="add", sweeps=True),
        SpeedPair("SmolLM2-135M", None, slm_layers=4, fusion="replace"),
        SpeedPair("flan-t5-xl", "t5-v1_1-small", fusion="add", llm_dtype=torch.bfloat16, exports=False),
        SpeedPair("Qwen3-0.6B", "SmolLM2-135M", fusion="align"),
    )
}
T5_PAIR = "t5-v1_1-large -> t5-v1_1-small"


def cells(sweeps: bool, tiny: bool) -> list[Conditions]:
    """The base, then those that differ from it in one thing."""
    if tiny:
        base = {"prompt_length": 16, "new_tokens": 8}
        changes: list[dict[str, int]] = [{"new_tokens": 4}, {"batch_size": 2}, {"num_beams": 2}]
    else:
        base = {"prompt_length": 128, "new_tokens": 128}
        changes = [{"prompt_length": n} for n in (32, 512)]
        changes += [{"new_tokens": n} for n in (16, 64, 256)]
        changes += [{"batch_size": n} for n in (8, 32)] + [{"num_beams": 4}]
    return [Conditions(**base)] + [Conditions(**base | change) for change in changes if sweeps]


# Making ------------------------------------------------------------------------------------------------------------------
EXPORTS = [(format, int8) for format in ("onnx", "openvino") for int8 in (False, True)]


def export_label(format: str, int8: bool) -> str:
    return f"{format} {'int8' if int8 else 'float32'}"


def save_model(name: str, folder: pathlib.Path, given: pathlib.Path | None, dtype: torch.dtype, tiny: bool) -> str:
    """
    A model with tokenizer in `folder`: the checkpoint of that name in the folder `given`, or random weights of its size.

    Returns:
        Which of the two.
    """
    source = None if given is None else given / name
    if source is not None and (source / "config.json").exists():
        config = PreTrainedConfig.from_pretrained(source)
        auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        model = auto.from_pretrained(source, dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(source)
    else:
        source, config = None, MODELS[name]()
        if tiny:
            sizes = TINY_T5 if config.is_encoder_decoder else TINY_LLAMA
            changed = config.to_dict() | sizes | {"vocab_size": 512 if name != "Qwen3-0.6B" else 600}
            changed |= {"layer_types": None} if "layer_types" in changed else {}
            config = type(config).from_dict(changed)
        auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        model, tokenizer = auto.from_config(config, dtype=dtype), word_tokenizer(config.vocab_size)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return "random weights" if source is None else "checkpoint"


def word_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """A tokenizer with so many words, as CTranslate2 takes tokens by their names."""
    special = ["<pad>", "</s>", "<unk>"]
    vocabulary = {special[i] if i < len(special) else f"w{i}": i for i in range(vocab_size)}
    names = {"pad_token": "<pad>", "eos_token": "</s>", "bos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def prepare(pair: SpeedPair, folder: pathlib.Path, given: pathlib.Path | None, tiny: bool) -> dict[str, Any]:
    """
    Write everything that contestants are loaded from into `folder`.

    Returns:
        `dict`: `sources` and `parameters` of the models, `seconds` to export and convert, `failures` by what was to be made,
        and `bytes` on disk.
    """
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    torch.manual_seed(0)
    sources = {pair.llm: save_model(pair.llm, folder / "llm", given, pair.llm_dtype, tiny)}
    if pair.slm is not None:
        sources[pair.slm] = save_model(pair.slm, folder / "slm", given, torch.float32, tiny)
    options: dict[str, Any] = {"slm_layers": pair.slm_layers, "fusion": pair.fusion}
    options = {name: value for name, value in options.items() if value is not None}
    slm = None if pair.slm is None else str(folder / "slm")
    model = LLM2SLMForConditionalGeneration.from_llm_slm_pretrained(
        str(folder / "llm"), slm, load_llm="whole", **options
    )
    model.save_pretrained(folder / "hybrid")
    if slm is None:
        model.slm.save_pretrained(folder / "slm")
    sizes = {part: getattr(model, part).num_parameters() for part in ("llm", "slm")}
    sizes |= {"whole llm": model.model.whole_llm.num_parameters()}
    sizes |= {"projector": sum(parameter.numel() for parameter in model.projector.parameters())}
    seconds: dict[str, float] = {}
    failures: dict[str, str] = {}

    def attempt(name: str, make: Callable[[], Any]) -> None:
        began = time.perf_counter()
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # converters tell every step
                make()
        except Exception as error:  # the others are measured all the same
            failures[name] = f"{type(error).__name__}: {error}"[:2000]
        else:
            seconds[name] = time.perf_counter() - began
        done = f"FAILED: {failures[name][:200]}" if name in failures else f"{seconds[name]:.0f} s"
        print(f"  made {name}: {done}", flush=True)

    if pair.exports:
        for format, int8 in EXPORTS:
            label = export_label(format, int8)
            attempt(label, lambda: model.export(folder / label, format=format, int8=int8))  # noqa: B023
        attempt("ctranslate2 int8", lambda: convert_to_ctranslate2(folder / "llm", folder / "ctranslate2"))
    if pair.llm_dtype == torch.float32:
        halved = copy.deepcopy(model.model.whole_llm).to(torch.bfloat16)
        halved.save_pretrained(folder / "llm-bfloat16")
    prepared = {"sources": sources, "parameters": sizes, "seconds": seconds, "failures": failures}
    prepared["bytes"] = bytes_on_disk(model, folder)
    (folder / "prepared.json").write_text(json.dumps(prepared))
    return prepared


def bytes_on_disk(model: LLM2SLMForConditionalGeneration, folder: pathlib.Path) -> dict[str, int]:
    """Of what contestants need. Of an encoder-decoder LLM a hybrid needs the encoder, which is counted alone."""
    found = {
        path.name: sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        for path in folder.iterdir()
        if path.is_dir()
    }
    read = sum(parameter.numel() for parameter in model.llm.parameters())
    found["reading part"] = read * model.llm.dtype.itemsize
    found["reading part, bfloat16"] = read * torch.bfloat16.itemsize
    return found


# Loading -----------------------------------------------------------------------------------------------------------------
@dataclass
class Loaded:
    """
    What the contestants of a pair are made of, all in one process. `halved` are LLM and hybrid with the LLM in bfloat16;
    they share the SLM with `model`.
    """

    pair: SpeedPair
    folder: pathlib.Path
    model: LLM2SLMForConditionalGeneration
    halved: LLM2SLMForConditionalGeneration | None
    exported: dict[str, LLM2SLMExportedModel]
    ctranslate2: CTranslate2Process | None

    @property
    def llm(self) -> PreTrainedModel:
        return self.model.model.whole_llm


def load(pair: SpeedPair, folder: pathlib.Path) -> Loaded:
    """Load what `prepare` has made."""
    model = load_hybrid(folder, "llm", load_llm="whole")
    halved = None
    if pair.llm_dtype == torch.float32:
        halved = load_hybrid(folder, "llm-bfloat16", load_llm="whole")
        halved.model.slm, halved.model.projector = model.model.slm, model.model.projector
    for writer in [part for it in (model, halved) if it is not None for part in (it.slm, it.model.whole_llm)]:
        # Where an argument of `generate` does not reach: an assistant asks its own configuration.
        writer.generation_config.eos_token_id = None
    labels = [export_label(*kind) for kind in EXPORTS]
    exported = {
        label: LLM2SLMExportedModel.from_pretrained(folder / label)
        for label in labels
        if label in json.loads((folder / "prepared.json").read_text())["seconds"]
    }
    ct2 = CTranslate2Process(converted) if (converted := folder / "ctranslate2").exists() else None
    return Loaded(pair, folder, model, halved, exported, ct2)


def load_hybrid(folder: pathlib.Path, llm: str, **options: Any) -> LLM2SLMForConditionalGeneration:
    """The hybrid with the LLM in a subfolder; its SLM in float32, the LLM as it is there."""
    return LLM2SLMForConditionalGeneration.from_pretrained(
        folder / "hybrid", llm_name_or_path=str(folder / llm), llm_dtype="auto", **options
    ).eval()
