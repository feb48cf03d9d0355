"""Linear layers of a step of generation: few rows times a matrix, in float32 on a CPU.

PyTorch leaves this product to MKL, which reads the matrix far slower than the memory gives it: for one row by one thread, for two
rows twice. As a batch of slices of the matrix (`torch.bmm`) the same product reads it once and by all threads, and nothing of the
model has to be stored otherwise. How much faster that is, `benchmarks/few_rows.py` measures; for more than four rows it no longer
always is, and in bfloat16, where oneDNN computes it, never.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn import functional

# Slices of a matrix, enough to keep the memory of a machine busy, and rows that are few.
SLICES = 16
MOST_ROWS = 4


def few_row_linear(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`torch.nn.functional.linear`, with the same result but for rounding; faster for few rows where it is slow."""
    if not _gains(input, weight):
        return functional.linear(input, weight, bias)
    out_features, in_features = weight.shape
    rows, size = input.numel() // in_features, out_features // SLICES
    sliced = SLICES * size
    flat = input.reshape(rows, in_features)
    columns = flat.t().expand(SLICES, in_features, rows)
    output = torch.bmm(weight[:sliced].view(SLICES, size, in_features), columns).view(sliced, rows).t()
    if sliced < out_features:
        output = torch.cat((output, functional.linear(flat, weight[sliced:])), dim=1)
    if bias is not None:
        output = output + bias
    return output.reshape(*input.shape[:-1], out_features)


def _gains(input: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether slices are faster."""
    # What is compiled or exported has kernels of its own, and must not hang on the number of rows: these come first.
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    return (
        0 < input.numel() <= MOST_ROWS * weight.shape[1]
        and weight.shape[0] >= SLICES
        and input.dtype == weight.dtype == torch.float32
        and weight.device.type == "cpu"
        and weight.is_contiguous()
        and torch.backends.mkl.is_available()
        and not torch.is_autocast_enabled("cpu")
    )


class FewRowLinear(nn.Linear):
    """A linear layer by [`few_row_linear`]."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return few_row_linear(input, self.weight, self.bias)


@contextmanager
def few_row_linears(model: nn.Module) -> Iterator[None]:
    """
    A model with the linear layers of this module, for as long as the block runs. Subclasses of `nn.Linear`, and weights that are
    more than plain tensors (quantised, distributed), are left as they are.
    """
    # By their class, as what is set on a module itself would hide the hooks of others, and have compiled models compiled anew.
    changed = [
        module
        for module in model.modules()
        if type(module) is nn.Linear and type(module.weight) is nn.Parameter and module.weight.device.type == "cpu"
    ]
    for module in changed:
        module.__class__ = FewRowLinear
    try:
        yield
    finally:
        for module in changed:
            module.__class__ = nn.Linear
