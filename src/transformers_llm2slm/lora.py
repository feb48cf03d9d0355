"""PEFT: the LoRA configuration that adapts the SLM, trains the projector in full and leaves the frozen LLM alone."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from .evaluation import require_extra
from .structure import reader

if TYPE_CHECKING:
    from peft import LoraConfig

    from .modeling_llm2slm import LLM2SLMForConditionalGeneration

logger = logging.getLogger(__name__)

# PEFT takes `modules_to_save` by how their names end.
_PROJECTOR = "model.projector"
_SLM = "model.slm"


def lora_config(
    model: LLM2SLMForConditionalGeneration,
    r: int = 16,
    lora_alpha: int = 32,
    lora_dropout: float = 0.0,
    **kwargs: Any,
) -> LoraConfig:
    """
    The `peft.LoraConfig` for a model: adapters on all linear layers of its SLM but the LM head, and its projector in full.

    Nothing of the LLM is adapted (PEFT's own `"all-linear"` would). An adapter holds the projector too, and names the model
    as its base by the place it was loaded from: save a model that was composed, and load it, before you adapt it.

    ```python
    >>> model = get_peft_model(model, lora_config(model))
    >>> trainer = Seq2SeqTrainer(model, ...)  # SFTTrainer(model, peft_config=lora_config(model), ...) does both
    >>> model.save_pretrained("adapter")
    >>> model.push_to_hub("org/adapter")  # the adapter alone
    >>> model = AutoPeftModel.from_pretrained("adapter", import_allowlist=["transformers_llm2slm"])
    >>> model.merge_and_unload().save_pretrained("merged")  # an ordinary checkpoint
    ```

    Args:
        model ([`LLM2SLMForConditionalGeneration`]): The model, not yet wrapped.
        r (`int`, defaults to 16), lora_alpha (`int`, defaults to 32), lora_dropout (`float`, defaults to 0): See
            `peft.LoraConfig`.
        kwargs: Other fields of `peft.LoraConfig`. `target_modules` and `modules_to_save` mean modules of the SLM: a list
            names them by how their names end, a string for `target_modules` is a regular expression for their full names
            (`model.slm...`). The projector is in `modules_to_save` in any case. With `task_type="SEQ_2_SEQ_LM"`, which is not
            needed, `AutoPeftModelForSeq2SeqLM` loads the adapter, and `AutoPeftModel` doesn't.

    Raises:
        ImportError: without the extra `peft`.
        ValueError: for modules that the SLM has not, and for another `task_type`.
    """
    require_extra("peft", "peft")
    from peft import LoraConfig

    if kwargs.get("task_type") not in (None, "SEQ_2_SEQ_LM"):
        raise ValueError(
            f"`task_type={kwargs['task_type']!r}` makes an adapter that PEFT can't load with its base model, which is one for "
            '`AutoModelForSeq2SeqLM`, whatever its SLM. Leave it out, or take "SEQ_2_SEQ_LM".'
        )
    if not model.name_or_path:
        logger.warning(
            "This model was composed and not loaded from anywhere, so an adapter of it will name no base model. Save it, "
            "load it with `from_pretrained` and adapt that, or keep its checkpoint beside the adapter."
        )
    targets = kwargs.pop("target_modules", None)
    if targets in (None, "all-linear"):
        pattern = _pattern_of(_linear_layers(model))
    else:
        if not isinstance(targets, str):
            _modules_of_slm(model, "target_modules", targets)  # says which of them there are not
            targets = rf".*\.(?:{'|'.join(map(re.escape, targets))})"
        pattern = rf"(?={re.escape(_SLM)}\.)(?:{targets})"
    adapted = [module for name, module in model.named_modules() if re.fullmatch(pattern, name)]
    kwargs.setdefault("fan_in_fan_out", any(isinstance(module, Conv1D) for module in adapted))
    saved = _modules_of_slm(model, "modules_to_save", kwargs.pop("modules_to_save", None) or ())
    return LoraConfig(
        r=r,
        lora_alpha=lora_alpha,
        lora_dropout=lora_dropout,
        target_modules=pattern,
        modules_to_save=[_PROJECTOR, *saved],
        **kwargs,
    )


def _linear_layers(model: LLM2SLMForConditionalGeneration) -> list[str]:
    """Names of the linear layers by which the SLM reads and writes text, without its LM head."""
    slm = model.slm
    parts = (reader(slm), slm.get_decoder())
    used = {id(module) for part in parts for module in part.modules()} - {id(slm.get_output_embeddings())}
    return [
        f"{_SLM}.{name}"
        for name, module in slm.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and id(module) in used
    ]


def _modules_of_slm(model: LLM2SLMForConditionalGeneration, argument: str, endings: Iterable[str]) -> list[str]:
    """Full names of the SLM's modules whose names end so."""
    names = [f"{_SLM}.{name}" for name, _ in model.slm.named_modules()]
    found = []
    for ending in endings:
        matches = [name for name in names if name.endswith(f".{ending}")]
        if not matches:
            known = sorted({name.rpartition(".")[2] for name in _linear_layers(model)})
            raise ValueError(
                f"`{argument}` names {ending!r}, which the SLM ({type(model.slm).__name__}) has not. Its linear layers are "
                f"{', '.join(known)}; the projector is trained anyway, and the LLM is not."
            )
        found += matches
    return found


def _pattern_of(names: Iterable[str]) -> str:
    """A regular expression for these names, with any number where they have one: short, and the same for every layer."""
    patterns = dict.fromkeys(re.sub(r"\.\d+(?=\.|$)", r".\\d+", name).replace(".", r"\.") for name in names)
    return "|".join(patterns)


__all__ = ["lora_config"]
