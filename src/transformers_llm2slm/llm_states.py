"""Reading: what the frozen LLM makes of a prompt."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from .configuration_llm2slm import LLM2SLMConfig
from .prompt import check_prompt_length
from .structure import accepts, embed_tokens


@torch.no_grad()
def read_llm_states(
    llm: PreTrainedModel, config: LLM2SLMConfig, input_ids: torch.Tensor, attention_mask: torch.Tensor
) -> torch.Tensor:
    """
    Run the frozen LLM over a batch of prompts that is padded on the right.

    Args:
        llm (`PreTrainedModel`): The LLM's reading part.
        config ([`LLM2SLMConfig`]): Says which states the projector takes.
        input_ids, attention_mask (`torch.LongTensor` of shape `(batch_size, prompt_length)`).

    Returns:
        `torch.Tensor` of shape `(batch_size, prompt_length, num_llm_states, llm_hidden_size)`: the layers of
        `config.llm_layer` and, for `fusion="llm-embed"`, the tokens' embeddings.

    Raises:
        ValueError: for prompts that are longer than the LLM can read.
    """
    check_prompt_length(input_ids, llm, "LLM")
    body = llm.get_encoder() if llm.config.is_encoder_decoder else llm
    last_only = config.llm_layers in ([-1], [config.num_llm_layers])
    kwargs = {"use_cache": False} if accepts(body.forward, "use_cache") else {}
    device = body.get_input_embeddings().weight.device
    outputs = body(
        input_ids=input_ids.to(device),
        attention_mask=attention_mask.to(device),
        output_hidden_states=not last_only,
        return_dict=True,
        **kwargs,
    )
    states = (
        [outputs.last_hidden_state] if last_only else [outputs.hidden_states[layer] for layer in config.llm_layers]
    )
    if config.fusion == "llm-embed":
        states.append(embed_tokens(llm, input_ids).to(states[0].device))
    return torch.stack(states, dim=2)
