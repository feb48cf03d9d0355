"""Which layers of an LLM an SLM is best cut from: those that change most what passes through them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cosine_similarity
from transformers import PreTrainedModel

from .loading import decoder_layers
from .probes import eval_mode
from .processing_llm2slm import response_text
from .rows import prompt_and_completion


@torch.no_grad()
def block_influence(llm: PreTrainedModel, tokenizer: Any, rows: Sequence[Mapping[str, Any]]) -> list[float]:
    """
    How much each layer of a decoder-only LLM changes what passes through it: 1 - the cosine of a token's state before the layer
    and behind it, the mean over the tokens of the completions (Men et al., 2024, [arXiv
    2403.03853](https://arxiv.org/abs/2403.03853)).

    Args:
        llm ([`~transformers.PreTrainedModel`]): The LLM.
        tokenizer: Its tokenizer.
        rows: Some dozens of rows of the task, each with a `"prompt"` and a `"completion"`, or with `"messages"`, for a tokenizer with a
            chat template.

    Returns:
        `list[float]`: For each layer, the first one first. The layers for `slm_layers=` are the largest of these; with
        `fusion="kv"` they need not be neighbours.

    Raises:
        ValueError: for a row that lacks something, if there are no tokens to measure on, or if the LLM has an encoder.
    """
    if llm.config.is_encoder_decoder:
        raise ValueError(f"`block_influence` is for decoder-only LLMs; a {type(llm).__name__} has an encoder.")
    layers: Any = llm.get_submodule(decoder_layers(llm)[0])
    sums, count = torch.zeros(len(layers)), 0
    changes: dict[int, torch.Tensor] = {}

    def hook(index: int) -> Any:
        def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            before, behind = args[0] if args else kwargs["hidden_states"], output
            if isinstance(behind, tuple):
                behind = behind[0]
            changes[index] = 1 - cosine_similarity(before.float(), behind.float(), dim=-1)[0]

        return after

    hooks = [layer.register_forward_hook(hook(index), with_kwargs=True) for index, layer in enumerate(layers)]
    try:
        with eval_mode(llm):
            for number, row in enumerate(rows):
                prompt, completion = prompt_and_completion(row, f"Row {number} (the first is 0)")
                if chat := not isinstance(prompt, str):
                    prompt = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
                    completion = response_text(completion)
                prompt = tokenizer(prompt, add_special_tokens=not chat, truncation=True)["input_ids"]
                completion = tokenizer(completion, add_special_tokens=False, truncation=True)["input_ids"]
                if completion:
                    llm(input_ids=torch.tensor([prompt + completion], device=llm.device), use_cache=False)
                    for index, change in changes.items():
                        sums[index] += change[-len(completion) :].sum().cpu()
                    count += len(completion)
    finally:
        for handle in hooks:
            handle.remove()
    if count == 0:
        raise ValueError(f"There are no tokens to measure on: got {len(rows)} rows, and no completion has any.")
    return (sums / count).tolist()


def influential_layers(
    llm: PreTrainedModel, tokenizer: Any, rows: Sequence[Mapping[str, Any]], count: int
) -> list[int]:
    """
    The layers to cut an SLM from, for `slm_layers=`: those with the largest [`block_influence`], in the LLM's order.

    Args:
        llm, tokenizer, rows: As for [`block_influence`].
        count (`int`): How many.

    Raises:
        ValueError: as [`block_influence`], and for a count that the LLM doesn't have.
    """
    _, total = decoder_layers(llm)
    if not 1 <= count <= total:
        raise ValueError(f"`count` must lie in [1, {total}] for this LLM, got {count}.")
    influence = block_influence(llm, tokenizer, rows)
    return sorted(sorted(range(total), key=lambda layer: -influence[layer])[:count])
