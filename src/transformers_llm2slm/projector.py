"""The projector: carries the LLM's states into the SLM's input space. It is what is always trained."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import init
from transformers.activations import ACT2FN

from .configuration_llm2slm import LLM2SLMConfig
from .structure import floating_dtype


class LLM2SLMProjector(nn.Module):
    """
    Maps the LLM's states into the SLM's input space: `Linear -> activation -> Linear` in the paper (section 3).

    Shapes:
        input: `(batch_size, prompt_length, num_llm_states, llm_hidden_size)`
        output: `(batch_size, prompt_length, slm_hidden_size)`
    """

    def __init__(self, config: LLM2SLMConfig):
        super().__init__()
        llm_size, slm_size = config.llm_hidden_size, config.slm_hidden_size
        hidden_size = config.projector_hidden_size or max(llm_size, slm_size)
        self.num_layers_mixed = len(config.llm_layers)
        self.layer_weights = nn.Parameter(torch.zeros(self.num_layers_mixed)) if self.num_layers_mixed > 1 else None
        norms: dict[str, Callable[[int], nn.Module]] = {"layer_norm": nn.LayerNorm, "rms_norm": nn.RMSNorm}
        self.norm = norms[config.projector_norm](llm_size) if config.projector_norm in norms else nn.Identity()
        sizes = [llm_size, *[hidden_size] * (config.projector_num_layers - 1), slm_size]
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in zip(sizes, sizes[1:], strict=False))
        self.activation = ACT2FN[config.projector_activation]
        self.residual = config.projector_residual
        self.embed_projection = nn.Linear(llm_size, slm_size) if config.fusion == "llm-embed" else None
        self.reset_parameters(config.projector_init)

    def mix(self, llm_states: torch.Tensor) -> torch.Tensor:
        """The (weighted) state of each token, `(batch_size, prompt_length, llm_hidden_size)`."""
        states = llm_states[:, :, : self.num_layers_mixed].to(floating_dtype(self.layers[0]))
        if self.layer_weights is None:
            return states[:, :, 0]
        return torch.einsum("bpsd,s->bpd", states, self.layer_weights.softmax(dim=0))

    def features(self, llm_states: torch.Tensor) -> torch.Tensor:
        """What the last linear layer gets, `(batch_size, prompt_length, hidden_size)`."""
        hidden = self.norm(self.mix(llm_states))
        for layer in self.layers[:-1]:
            hidden = self.activation(layer(hidden))
        return hidden

    def forward(self, llm_states: torch.Tensor) -> torch.Tensor:
        projected = self.layers[-1](self.features(llm_states))
        if self.residual:
            projected = projected + self.mix(llm_states)
        if self.embed_projection is not None:
            projected = projected + self.embed_projection(llm_states[:, :, -1].to(projected.dtype))
        return projected

    @torch.no_grad()
    def reset_parameters(self, kind: str) -> None:
        """Initialise: `"random"` (also the start of a fit), or `"zero"` and `"identity"` with a last layer of zeros."""
        layers: list[nn.Linear] = [*self.layers]
        for layer in layers:
            init.kaiming_uniform_(layer.weight, a=5**0.5)
            init.zeros_(layer.bias)
        if kind in ("zero", "identity"):
            init.zeros_(layers[-1].weight)
        if self.layer_weights is not None:
            init.zeros_(self.layer_weights)
        if isinstance(self.norm, (nn.LayerNorm, nn.RMSNorm)):
            init.ones_(self.norm.weight)
            if isinstance(self.norm, nn.LayerNorm):
                init.zeros_(self.norm.bias)
        if self.embed_projection is not None:
            (init.zeros_ if kind != "random" else init.xavier_uniform_)(self.embed_projection.weight)
            init.zeros_(self.embed_projection.bias)
