"""Starts in closed form: of a projector, so that the SLM gets inputs that it knows, and of a cut SLM's embeddings."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from .alignment import align_tokens
from .llm_states import hidden_states
from .probes import eval_mode
from .structure import accepts, embed_tokens, embedding_scale, move_padding, reader

if TYPE_CHECKING:
    from .modeling_llm2slm import LLM2SLMForConditionalGeneration
    from .processing_llm2slm import LLM2SLMProcessor

logger = logging.get_logger(__name__)


@torch.no_grad()
def fit_projector(
    model: LLM2SLMForConditionalGeneration,
    processor: LLM2SLMProcessor,
    prompts: Sequence[str],
    target: str | int = "embeddings",
    ridge: float = 1e-3,
    batch_size: int = 16,
    slm: PreTrainedModel | None = None,
) -> float:
    """
    Set the projector's last linear layer so that the fused prompt comes as near as it can to what the SLM itself makes
    of the same text.

    For every position of a fused prompt the goal is the SLM's own embedding, or its own state at a layer, of the token
    there (where tokens differ, of the one that covers the same characters), less what the fusion adds anyway. The layers
    before the last are left as they are: the features of a random layer, from which the last one is solved in closed
    form.

    Args:
        model: A model with its LLM.
        processor: Its processor, with fast tokenizers.
        prompts (`Sequence[str]`): A few hundred prompts like those of the task.
        target (`str` or `int`, defaults to `"embeddings"`): `"embeddings"`, or the index of a hidden state of the SLM's
            encoder (encoder-decoder) or of the SLM (decoder-only); -1 is what its last layer gives.
        ridge (`float`, defaults to 1e-3): Regularisation, relative to the mean square of the features.
        batch_size (`int`, defaults to 16): Prompts at a time.
        slm (`PreTrainedModel`, *optional*): The SLM to take goals from, if the model's own has lost its encoder.

    Returns:
        `float`: The share of the goals' variance that the fit explains (R squared), on the same prompts.

    Raises:
        ValueError: if there are no prompts, or no such goals.
    """
    if isinstance(prompts, str) or not prompts:
        raise ValueError(f"`prompts` must be a list of texts to fit to, a few hundred of them, got {prompts!r:.80}.")
    if model.config.fusion == "kv":
        raise ValueError(
            '`fusion="kv"` hands over keys and values, which are not fitted: start from `"identity"` or `"random"`.'
        )
    slm = model.slm if slm is None else slm
    projector = model.projector
    last: nn.Linear = projector.layers[-1]  # type: ignore[assignment]
    size = last.in_features + 1
    products = torch.zeros(size, size, dtype=torch.float64)
    moments = torch.zeros(size, last.out_features, dtype=torch.float64)
    goals_square, goals_sum, count = 0.0, torch.zeros(last.out_features, dtype=torch.float64), 0
    with eval_mode(model), eval_mode(slm):  # dropout is no goal
        for features, goals in _pairs(model, processor, slm, prompts, target, batch_size):
            features = torch.cat([features, torch.ones_like(features[:, :1])], dim=1)
            products += features.T @ features
            moments += features.T @ goals
            goals_square += float(goals.square().sum())
            goals_sum += goals.sum(dim=0)
            count += len(goals)
    penalty = ridge * products.diagonal()[:-1].mean() * torch.eye(size, dtype=torch.float64)
    penalty[-1, -1] = 0  # the bias is free
    solution = torch.linalg.solve(products + penalty + 1e-8 * torch.eye(size, dtype=torch.float64), moments)
    last.weight.copy_(solution[:-1].T)
    last.bias.copy_(solution[-1])
    error = goals_square - 2 * float((solution * moments).sum()) + float((solution * (products @ solution)).sum())
    variance = goals_square - float(goals_sum.square().sum()) / count
    explained = 1 - error / variance if variance > 0 else 1.0
    logger.info(f"Projector fitted on {count} tokens of {len(prompts)} prompts: R squared {explained:.3f}.")
    return explained


@torch.no_grad()
def fit_slm_embeddings(
    model: LLM2SLMForConditionalGeneration,
    processor: LLM2SLMProcessor,
    prompts: Sequence[str],
    prior: float = 10.0,
    ridge: float = 0.01,
    batch_size: int = 16,
) -> None:
    """
    Start the input embeddings of an SLM cut from the LLM's upper layers where those layers expect them.

    In the LLM its lowest layer got the states of the layers below. The tokens that it writes come as bare embeddings, which are
    many times shorter and point elsewhere. So each token gets the mean of its states in some prompts, drawn (with the weight of
    `prior` tokens) to a ridge regression of these means on the embeddings, which also serves the tokens of no prompt. The LM
    head keeps the embeddings as they were: the two are no longer tied.

    Args:
        model: A model with its LLM, and an SLM cut from it (`slm_layers=`), whatever its fusion and its projector.
        processor: Its processor.
        prompts (`Sequence[str]`): A few hundred prompts like those of the task.
        prior (`float`, defaults to 10): Weight of the regression against a token's own mean, in tokens.
        ridge (`float`, defaults to 0.01): Regularisation, relative to the mean square of the embeddings.
        batch_size (`int`, defaults to 16): Prompts at a time.

    Raises:
        ValueError: if the SLM was not cut from its LLM.
    """
    if model.config.slm_layers is None or model.llm is None or model.slm.config.is_encoder_decoder:
        raise ValueError(
            "`fit_slm_embeddings` starts a decoder-only SLM cut from its LLM: compose the model with `slm_layers=`."
        )
    embedding = model.slm.get_input_embeddings()
    embeddings = embedding.weight.detach().float()
    sums, counts = torch.zeros_like(embeddings), embeddings.new_zeros(len(embeddings), 1)
    prompts = sorted(prompts, key=len)
    for start in range(0, len(prompts), batch_size):
        batch = processor(text=prompts[start : start + batch_size], padding=True, truncation=True, return_tensors="pt")
        ids, mask = (batch[name].to(model.device) for name in ("input_ids", "attention_mask"))
        ids, mask = (move_padding(tensor, mask, "right") for tensor in (ids, mask))
        real = mask.bool()
        real[:, 0] = False  # a first token's state is like no other: much of the attention rests on it
        states = _states_at_cut(model, ids, mask)[real].float()
        sums.index_add_(0, ids[real], states)
        counts.index_add_(0, ids[real], counts.new_ones(len(states), 1))
    seen, features = counts[:, 0] > 0, nn.functional.pad(embeddings, (0, 1), value=1.0)
    weighted, goals = features[seen] * counts[seen].sqrt(), sums[seen] / counts[seen].sqrt()
    products = weighted.T @ weighted
    products += ridge * products.diagonal().mean() * torch.eye(len(products), device=products.device)
    fitted = features @ torch.linalg.solve(products, weighted.T @ goals)
    weight = (sums + prior * fitted) / (counts + prior) / embedding_scale(model.slm)
    embedding.weight = nn.Parameter(weight.to(embedding.weight.dtype))
    model.slm.config.tie_word_embeddings = False
    for part in (model.slm, model.model, model):  # by these a checkpoint leaves out what is tied
        part.all_tied_weights_keys = part.get_expanded_tied_weights_keys(all_submodels=True)


def _states_at_cut(model: LLM2SLMForConditionalGeneration, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """What the SLM's first layer got of a prompt in the LLM."""
    lowest = model.config.slm_layers[0]  # type: ignore[index]  # there are some, or it is no cut
    inputs = {"input_ids": ids, "attention_mask": mask, "use_cache": False, "return_dict": True}
    llm: nn.Module = model.llm  # type: ignore[assignment]  # there is one, or `fit_slm_embeddings` raised
    return hidden_states(llm, [lowest], model.config.num_llm_layers, inputs)[0].to(model.device)


def _pairs(
    model: LLM2SLMForConditionalGeneration,
    processor: LLM2SLMProcessor,
    slm: PreTrainedModel,
    prompts: Sequence[str],
    target: str | int,
    batch_size: int,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Features before the last layer, and goals for its output, both `(tokens, width)` in float64 on the CPU."""
    projector, fusion = model.projector, model.config.fusion
    aligner = processor
    if fusion != "align":
        aligner = copy.copy(processor)
        aligner.fusion = "align"
    for start in range(0, len(prompts), batch_size):
        chunk = list(prompts[start : start + batch_size])
        batch = aligner(text=chunk, truncation=True)
        for row in range(len(chunk)):
            ids = torch.tensor([batch["input_ids"][row]], device=model.device)
            slm_ids = torch.tensor([batch["slm_input_ids"][row]], device=model.device)
            states = model.model.llm_states(ids, torch.ones_like(ids)).to(model.device)
            features = projector.features(states)[0]
            rest = projector(states)[0] - projector.layers[-1](features)
            goals = _slm_states(slm, slm_ids, target)[0]
            alignment = torch.tensor(batch["alignment"][row], device=model.device)
            if fusion == "align":
                features, rest = features[alignment], rest[alignment] + embed_tokens(slm, slm_ids)[0]
            else:
                if fusion == "add":
                    rest = rest + embed_tokens(slm, ids)[0]
                # The goal of each LLM token is that of the SLM token that covers its last character.
                goals = goals[_reverse(processor, chunk[row], batch["input_ids"][row], batch["slm_input_ids"][row])]
            yield features.double().cpu(), (goals - rest).double().cpu()


def _reverse(processor: LLM2SLMProcessor, prompt: str, llm_ids: list[int], slm_ids: list[int]) -> list[int]:
    """For each LLM token of a prompt, the SLM token that covers the same characters."""
    if processor.shared_tokenizer and len(llm_ids) == len(slm_ids):
        return list(range(len(llm_ids)))
    offsets = [
        tokenizer(prompt, return_offsets_mapping=True, verbose=False)["offset_mapping"][: len(ids)]
        for tokenizer, ids in ((processor.llm_tokenizer, llm_ids), (processor.tokenizer, slm_ids))
    ]
    return align_tokens(*offsets)


def _slm_states(slm: PreTrainedModel, input_ids: torch.Tensor, target: str | int) -> torch.Tensor:
    """What the SLM makes of a prompt: its embeddings, or its states at a layer; `(1, length, width)`."""
    if target == "embeddings":
        return embed_tokens(slm, input_ids)
    if not isinstance(target, int):
        raise ValueError(f'`target` must be "embeddings" or the index of a layer of the SLM, got {target!r}.')
    part = reader(slm)
    if slm.config.is_encoder_decoder and part is not slm.get_encoder():
        raise ValueError(
            f"`target={target}` asks for the states of the SLM's encoder, but the encoder of this SLM was dropped "
            '(`slm_encoder="skip"`). Pass the whole SLM as `slm=`, or take `target="embeddings"`.'
        )
    kwargs = {"use_cache": False} if accepts(part.forward, "use_cache") else {}
    states = part(input_ids=input_ids, output_hidden_states=True, return_dict=True, **kwargs).hidden_states
    if not -len(states) <= target < len(states):
        raise ValueError(f"`target` must lie in [{-len(states)}, {len(states) - 1}] for this SLM, got {target}.")
    return states[target]
