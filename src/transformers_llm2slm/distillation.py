"""Distillation: a mix-in by which the `Trainer` teaches the SLM the distribution of the whole LLM."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from .modeling_llm2slm import LLM2SLMForConditionalGeneration
from .processing_llm2slm import LLM2SLMProcessor
from .prompt import check_response_length
from .structure import accepts, mask_positions, move_padding

if TYPE_CHECKING:
    from transformers import Trainer as _Trainer
else:
    _Trainer = object


class LogitDistillationMixin(_Trainer):
    """
    Adds to the loss of a `Trainer` or `Seq2SeqTrainer` how far the SLM's distribution is from that of the whole LLM.

    In training the loss is

        (1 - weight) * loss + weight * temperature^2 * KL(teacher || student)

    where `loss` is the trainer's own, both distributions are softened by the temperature, and the divergence is averaged
    over the scored tokens in the way that `loss` is. The evaluation loss stays the plain one. The trainer's logs hold the
    second part, without its weight, as `distillation_loss`: the mean over the tokens since the last log.

    This is the distillation of Hinton et al. (2015), *Distilling the Knowledge in a Neural Network*, section 2
    (arXiv 1503.02531); the factor `temperature^2` keeps the size of its gradients when the temperature changes.

    Each step costs one more forward pass of the LLM, over prompt and response and with its head. The teacher needs no
    second copy of the weights if the model was composed of it in memory: `model.llm` shares them then. LLM and SLM must
    have one tokenizer.

    Args:
        teacher (`PreTrainedModel`): The whole LLM with its LM head (`AutoModelForCausalLM` or `AutoModelForSeq2SeqLM`). It
            is frozen, and moved to the trainer's device unless it was loaded with a `device_map`.
        distillation_temperature (`float`, defaults to 2.0): What both models' logits are divided by; above 0.
        distillation_weight (`float`, defaults to 0.5): Share of the divergence in the loss, in [0, 1].
        args, kwargs: The trainer's. `processing_class` should be the [`LLM2SLMProcessor`]: it tells which logits are of
            tokens and which only pad the matrix.

    Raises:
        ValueError: for a temperature or weight out of range, a teacher without LM head, models without a shared
            vocabulary, several GPUs in one process, or (in training) an inner trainer that gives no logits.
        TypeError: if the model that is trained is no [`LLM2SLMForConditionalGeneration`].

    Example:

    ```python
    >>> class DistillationTrainer(LogitDistillationMixin, Seq2SeqTrainer): ...
    >>> llm = AutoModelForSeq2SeqLM.from_pretrained("google/flan-t5-large")
    >>> model = LLM2SLMForConditionalGeneration.from_llm_slm_pretrained(llm, "google-t5/t5-small")
    >>> trainer = DistillationTrainer(
    ...     model, args, train_dataset=rows, data_collator=collator, processing_class=processor, teacher=llm
    ... )
    ```
    """

    def __init__(
        self,
        *args: Any,
        teacher: PreTrainedModel,
        distillation_temperature: float = 2.0,
        distillation_weight: float = 0.5,
        **kwargs: Any,
    ):
        if not distillation_temperature > 0:
            raise ValueError(f"`distillation_temperature` must be above 0, got {distillation_temperature}.")
        if not 0 <= distillation_weight <= 1:
            raise ValueError(f"`distillation_weight` must lie in [0, 1], got {distillation_weight}.")
        super().__init__(*args, **kwargs)
        if self.args.n_gpu > 1:
            raise ValueError(
                f"One process has {self.args.n_gpu} GPUs, and `nn.DataParallel` would leave the teacher on the first. "
                "Start one process for each GPU (`accelerate launch` or `torchrun`), or set `CUDA_VISIBLE_DEVICES`."
            )
        student = self.accelerator.unwrap_model(self.model)
        student = student.get_base_model() if hasattr(student, "get_base_model") else student
        if not isinstance(student, LLM2SLMForConditionalGeneration):
            raise TypeError(
                f"The model to train must be an LLM2SLMForConditionalGeneration, got {type(student).__name__}."
            )
        self.distillation_vocab_size = shared_vocab_size(self.processing_class, teacher, student)
        self.distillation_temperature = distillation_temperature
        self.distillation_weight = distillation_weight
        self.teacher = teacher.requires_grad_(False).eval()
        if getattr(teacher, "hf_device_map", None) is None:
            self.teacher.to(self.args.device)
        # Sum of the divergences, and number of their tokens, since the last log.
        self._distilled: torch.Tensor | None = None

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """See `Trainer.compute_loss`."""
        labels = inputs.get("labels")  # label smoothing takes them out
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        if model.training:
            logits = getattr(outputs, "logits", None)
            if logits is None or not logits.requires_grad:
                raise ValueError(
                    "Distillation needs the SLM's logits with their gradients, but this trainer gives "
                    f"{type(outputs).__name__} without them, as TRL's SFTTrainer does with its fused LM head. Use "
                    "`Trainer` or `Seq2SeqTrainer`."
                )
            divergence = self._divergence(logits, labels, inputs, num_items_in_batch)
            loss = (1 - self.distillation_weight) * loss + self.distillation_weight * divergence
        return (loss, outputs) if return_outputs else loss

    def _divergence(
        self,
        logits: torch.Tensor,
        labels: Any,
        inputs: dict[str, Any],
        num_items_in_batch: torch.Tensor | int | None,
    ) -> torch.Tensor:
        """temperature^2 * KL(teacher || student), averaged as `Trainer.compute_loss` (transformers 5.20 to 5.23) does."""
        if inputs.get("input_ids") is None:
            raise ValueError(
                f"The teacher reads the prompt's `input_ids`, but the batch holds only {', '.join(sorted(inputs))}. "
                "Distil from batches of prompts in text, not of cached LLM states alone."
            )
        scored = (labels != -100).to(logits.device)
        expected = response_logits(self.teacher, inputs["input_ids"], inputs.get("attention_mask"), labels)
        found, expected = (
            (part.to(logits.device)[scored][:, : self.distillation_vocab_size].float() / self.distillation_temperature)
            for part in (logits, expected)
        )
        total = self.distillation_temperature**2 * nn.functional.kl_div(
            found.log_softmax(-1), expected.log_softmax(-1), reduction="sum", log_target=True
        )
        distilled = torch.stack([total.detach(), scored.sum()])
        self._distilled = distilled if self._distilled is None else self._distilled + distilled
        if num_items_in_batch is None:
            return total / scored.sum()
        if self.args.average_tokens_across_devices:
            # The tokens of all processes are counted, over which the gradients are averaged afterwards.
            total = total * (self.accelerator.num_processes // self.get_tp_size())
        return total / num_items_in_batch

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """See `Trainer.log`."""
        if "loss" in logs and self._distilled is not None:
            total, count = self.accelerator.reduce(self._distilled, "sum").tolist()
            logs["distillation_loss"] = total / count
            self._distilled = None
        super().log(logs, *args, **kwargs)


def shared_vocab_size(processing_class: Any, teacher: PreTrainedModel, student: PreTrainedModel) -> int:
    """
    Number of tokens that teacher and student both score. Models may pad their matrices beyond it, to different widths.

    Raises:
        ValueError: if they have no vocabulary in common, or the teacher has no LM head.
    """
    if teacher.get_output_embeddings() is None:
        raise ValueError(
            f"The teacher must score tokens, but a {type(teacher).__name__} has no LM head. Load the LLM with "
            "`AutoModelForCausalLM` or `AutoModelForSeq2SeqLM`."
        )
    widths = [model.get_output_embeddings().weight.shape[0] for model in (teacher, student)]
    otherwise = "Use an SLM of the LLM's tokenizer, or let the LLM answer the prompts and train on its answers."
    if isinstance(processing_class, LLM2SLMProcessor):
        if not processing_class.shared_tokenizer:
            raise ValueError(
                "Distillation compares the two models token by token, so they must have one tokenizer; the processor "
                f"has {len(processing_class.llm_tokenizer)} tokens for the LLM and {len(processing_class.tokenizer)} others "
                f"for the SLM. {otherwise}"
            )
        vocab_size = max(processing_class.tokenizer.get_vocab().values()) + 1
        if min(widths) < vocab_size:
            raise ValueError(
                f"The tokenizer has {vocab_size} tokens, but the teacher scores {widths[0]} and the SLM {widths[1]}: one "
                "of them belongs to another tokenizer."
            )
        return vocab_size
    if widths[0] != widths[1]:
        raise ValueError(
            f"The teacher scores {widths[0]} tokens and the SLM {widths[1]}, and without an LLM2SLMProcessor as "
            f"`processing_class` nothing says which of them are the same. Pass the processor. {otherwise}"
        )
    return widths[0]


@torch.no_grad()
def response_logits(
    model: PreTrainedModel, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, labels: torch.Tensor
) -> torch.Tensor:
    """
    The logits with which a whole LLM scores a response to a prompt.

    Args:
        model (`PreTrainedModel`): With LM head; an encoder-decoder reads the prompt with its encoder.
        input_ids (`torch.LongTensor` of shape `(batch_size, prompt_length)`): The prompt, padded on either side.
        attention_mask (`torch.Tensor` of shape `(batch_size, prompt_length)`, *optional*): 1 for real tokens.
        labels (`torch.LongTensor` of shape `(batch_size, response_length)`): The response, padded with -100 on the right.

    Returns:
        `torch.Tensor` of shape `(batch_size, response_length, vocab_size)`; `[:, t]` scores `labels[:, t]`.

    Raises:
        ValueError: if prompt and response are too long for a decoder-only model.
    """
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    input_ids, mask, labels = (tensor.to(model.device) for tensor in (input_ids, mask, labels))
    # An encoder's absolute positions count from the first column; a response follows its prompt at once.
    side: Literal["left", "right"] = "right" if model.config.is_encoder_decoder else "left"
    input_ids, mask = (move_padding(tensor, mask, side) for tensor in (input_ids, mask))
    if model.config.is_encoder_decoder:
        # Given labels, each family shifts them behind its own start token.
        return model(input_ids=input_ids, attention_mask=mask, labels=labels, use_cache=False, return_dict=True).logits
    response = labels.masked_fill(labels == -100, 0)[:, :-1]
    tokens = torch.cat([input_ids, response], dim=1)
    mask = torch.cat([mask, torch.ones_like(response, dtype=mask.dtype)], dim=1)
    check_response_length(response.shape[1], input_ids.shape[1], model, "teacher")
    length = labels.shape[1]
    kwargs: dict[str, Any] = {"logits_to_keep": length} if accepts(model.forward, "logits_to_keep") else {}
    if accepts(model.forward, "position_ids"):
        kwargs["position_ids"] = mask_positions(mask)
    outputs = model(input_ids=tokens, attention_mask=mask, use_cache=False, return_dict=True, **kwargs)
    return outputs.logits[:, -length:]


__all__ = ["LogitDistillationMixin"]
