"""How the LLM's states are stored: exactly, in half precision, or in int8 with a scale for every 64 values."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch.nn import functional as F

DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int8": torch.int8,
}
# Values that share a scale: a few large channels, which most LLMs have, then cost only their neighbours precision. The
# idea is that of GGML's Q8_0.
_GROUP = 64


def check_dtype(dtype: str) -> str:
    """`dtype`, if states can be stored in it. Raises a `ValueError` if not."""
    if dtype not in DTYPES:
        raise ValueError(f"States are stored in one of {', '.join(DTYPES)}, got {dtype!r}.")
    return dtype


def bytes_per_token(num_llm_states: int, llm_state_size: int, dtype: str) -> int:
    """Bytes that the states of one token take on disk."""
    if dtype == "int8":
        return num_llm_states * math.ceil(llm_state_size / _GROUP) * (_GROUP + 4)
    return num_llm_states * llm_state_size * DTYPES[dtype].itemsize


def encode_states(states: torch.Tensor, dtype: str) -> tuple[bytes, float, float]:
    """
    The states of a prompt as bytes.

    Args:
        states (`torch.Tensor` of shape `(prompt_length, num_llm_states, llm_state_size)`), on the CPU.
        dtype (`str`): How to store them.

    Returns:
        The bytes, the sum of the squared errors that this makes, and the sum of the squared values.

    Raises:
        ValueError: for states that are not finite, or beyond what `dtype` holds.
    """
    exact = states.to(torch.float32)
    if dtype == "int8":
        groups = F.pad(exact, (0, -exact.shape[-1] % _GROUP)).unflatten(-1, (-1, _GROUP))
        scales = groups.abs().amax(dim=-1, keepdim=True) / 127
        integers = (groups / scales.clamp(min=torch.finfo(torch.float32).tiny)).round().to(torch.int8)
        data = integers.numpy().tobytes() + scales.numpy().tobytes()
    else:
        # numpy knows no bfloat16.
        data = states.to(DTYPES[dtype]).contiguous().view(torch.uint8).numpy().tobytes()
    stored = decode_states(data, (states.shape[1], states.shape[2]), dtype).to(torch.float32)
    if not bool(stored.isfinite().all()):
        if not bool(exact.isfinite().all()):
            raise ValueError("The LLM's states are not finite. Load it in another dtype: `llm_dtype`.")
        raise ValueError(
            f'The LLM\'s states reach {exact.abs().max():.3g}, more than {dtype} holds. Store them in "bfloat16" or "int8".'
        )
    return data, float((stored - exact).double().square().sum()), float(exact.double().square().sum())


def decode_states(data: bytes, shape: tuple[int, int], dtype: str) -> torch.Tensor:
    """
    What [`encode_states`] made into bytes.

    Args:
        data (`bytes`): The states of one prompt.
        shape (`tuple[int, int]`): `(num_llm_states, llm_state_size)`.
        dtype (`str`): How they were stored.

    Returns:
        `torch.Tensor` of shape `(prompt_length, num_llm_states, llm_state_size)`, in `dtype`; in float32 for `"int8"`.
    """
    array = torch.from_numpy(np.frombuffer(data, dtype=np.uint8).copy())
    if dtype != "int8":
        return array.view(DTYPES[dtype]).view(-1, *shape)
    groups = math.ceil(shape[1] / _GROUP)
    split = len(array) // (_GROUP + 4) * _GROUP
    integers = array[:split].view(torch.int8).view(-1, shape[0], groups, _GROUP)
    scales = array[split:].view(torch.float32).view(-1, shape[0], groups, 1)
    return (integers * scales).flatten(-2)[..., : shape[1]]
