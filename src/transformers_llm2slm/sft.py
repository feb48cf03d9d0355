"""TRL: what the plain `SFTTrainer` must be told to train an LLM-to-SLM model."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch

from .evaluation import require_extra

if TYPE_CHECKING:
    from trl import SFTConfig

    from .modeling_llm2slm import LLM2SLMForConditionalGeneration

# Options that change how a data set is made into token rows, or how the loss is shifted. Our collator makes the batches,
# and its labels stand where they are scored.
_PREPARATION = "the rows are made into batches by `LLM2SLMDataCollator`, which takes its own lengths"
_UNSUPPORTED = {
    "packing": "prompt and response are no one sequence that could be packed",
    "padding_free": "prompt and response are no one sequence that could be flattened",
    "assistant_only_loss": "only the response is scored anyway",
    "label_smoothing_factor": "TRL shifts the labels for it, and ours stand where they are scored; use `Seq2SeqTrainer`",
    "eos_token": _PREPARATION,
    "chat_template_path": _PREPARATION,
    "pad_to_multiple_of": _PREPARATION,
}


def prepare_sft_config(args: SFTConfig, model: LLM2SLMForConditionalGeneration) -> SFTConfig:
    """
    A copy of `args` with which TRL's `SFTTrainer` trains `model` on what [`LLM2SLMDataCollator`] makes of the rows.

    It sets `remove_unused_columns=False` and `dataset_kwargs={"skip_prepare_dataset": True}`: the rows stay as they are,
    and the collator tokenizes them. `max_length` is the collator's business too, so it is `None`. For `fusion="kv"` it turns
    gradient checkpointing off, which `SFTConfig` turns on: a model that uses it takes no cache, where the prompt is then.

    ```python
    >>> trainer = SFTTrainer(
    ...     model,
    ...     prepare_sft_config(SFTConfig("out", learning_rate=1e-4), model),
    ...     train_dataset=rows,
    ...     data_collator=LLM2SLMDataCollator(processor),
    ...     processing_class=processor,
    ... )
    ```

    Args:
        args (`trl.SFTConfig`): The user's arguments.
        model ([`LLM2SLMForConditionalGeneration`]): The model, also one that PEFT has wrapped.

    Raises:
        ValueError: for options that can't work with two models and a prompt that is read apart, and for an SLM that adds
            a bias of its own to its logits, which TRL's fused LM head leaves out.
    """
    require_extra("trl", "trl")
    for name, reason in _UNSUPPORTED.items():
        value = getattr(args, name, None)
        if value not in (None, False, 0, 0.0):
            raise ValueError(f"`{name}={value!r}` does not go with an LLM-to-SLM model: {reason}. Leave it out.")
    if args.completion_only_loss is False:
        raise ValueError(
            "`completion_only_loss=False` does not go with an LLM-to-SLM model: its SLM learns to write responses, and the "
            "prompt is read by the LLM. Leave it out."
        )
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    bias = getattr(base.slm, "final_logits_bias", None)
    if isinstance(bias, torch.Tensor) and bool(bias.any()):
        raise ValueError(
            f"{type(base.slm).__name__} adds a `final_logits_bias` to its logits, which the fused LM head of `SFTTrainer` "
            "leaves out, so its loss would be wrong. Use `Seq2SeqTrainer`."
        )
    prepared = copy.copy(args)
    given = args.dataset_kwargs if isinstance(args.dataset_kwargs, dict) else {}
    prepared.dataset_kwargs = given | {"skip_prepare_dataset": True}
    prepared.remove_unused_columns = False
    prepared.max_length = None
    if base.config.fusion == "kv":
        # transformers says `activation_checkpointing` since 5.24.
        for name in ("gradient_checkpointing", "activation_checkpointing"):
            if getattr(prepared, name, False):
                setattr(prepared, name, False)
    return prepared


__all__ = ["prepare_sft_config"]
