"""Linear layers for the few rows of a step of generation."""

from __future__ import annotations

import pytest
import torch
from conftest import PROMPTS, Pair
from torch import nn
from torch.nn import functional

from transformers_llm2slm import few_rows
from transformers_llm2slm.few_rows import MOST_ROWS, SLICES, FewRowLinear, few_row_linear, few_row_linears

needs_mkl = pytest.mark.skipif(
    not torch.backends.mkl.is_available(), reason="PyTorch without MKL computes them as ever"
)


@pytest.fixture
def products(monkeypatch):
    """The shapes of the first operands of `torch.bmm`, as they come."""
    shapes, bmm = [], torch.bmm
    monkeypatch.setattr(
        few_rows.torch, "bmm", lambda left, right: shapes.append(tuple(left.shape)) or bmm(left, right)
    )
    return shapes


@needs_mkl
@pytest.mark.parametrize("out_features", [SLICES, 64, 101])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (MOST_ROWS, 1), (1, 3), (2, 1, 2)])
def test_few_rows_are_multiplied_by_slices(products, out_features, bias, shape):
    layer = nn.Linear(24, out_features, bias=bias)
    input = torch.randn(*shape, 24)
    found = few_row_linear(input, layer.weight, layer.bias)
    assert products == [(SLICES, out_features // SLICES, 24)]
    torch.testing.assert_close(found, layer(input))
    assert found.shape == (*shape, out_features)


@pytest.mark.parametrize(
    ("input", "weight"),
    [
        (torch.randn(MOST_ROWS + 1, 24), torch.randn(64, 24)),
        (torch.randn(0, 24), torch.randn(64, 24)),
        (torch.randn(1, 24), torch.randn(SLICES - 1, 24)),
        (torch.randn(1, 24), torch.randn(24, 64).t()),
        (torch.randn(1, 24).bfloat16(), torch.randn(64, 24).bfloat16()),
        (torch.randn(1, 24).double(), torch.randn(64, 24).double()),
    ],
    ids=["many rows", "no rows", "few columns", "other layout", "bfloat16", "float64"],
)
def test_what_gains_nothing_is_left_to_torch(products, input, weight):
    assert torch.equal(few_row_linear(input, weight), functional.linear(input, weight))
    assert not products


def test_autocast_compiled_and_exported_code_is_left_to_torch(products):
    layer = nn.Linear(24, 64)
    layer.__class__ = FewRowLinear
    row = torch.randn(1, 24)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(row).dtype == torch.bfloat16
    exported = torch.export.export(
        layer, (torch.randn(6, 24),), dynamic_shapes=({0: torch.export.Dim("rows", min=1)},)
    )
    torch.testing.assert_close(exported.module()(row), functional.linear(row, layer.weight, layer.bias))
    torch.jit.trace(layer, row, check_trace=False)
    assert not products


@needs_mkl
def test_gradients_flow(products):
    layer, row = nn.Linear(24, 101), torch.randn(2, 24)
    few_row_linear(row, layer.weight, layer.bias).square().sum().backward()
    assert products
    found = [parameter.grad.clone() for parameter in layer.parameters()]
    layer.zero_grad()
    layer(row).square().sum().backward()
    torch.testing.assert_close(found, [parameter.grad for parameter in layer.parameters()])


def test_a_model_has_them_in_the_block_alone():
    class Own(nn.Linear):
        pass

    model = nn.Sequential(nn.Linear(4, 32), Own(32, 32), nn.Linear(32, 4))
    with few_row_linears(model), few_row_linears(model):
        assert [type(module) for module in model] == [FewRowLinear, Own, FewRowLinear]
    assert [type(module) for module in model] == [nn.Linear, Own, nn.Linear]
    with pytest.raises(RuntimeError, match="broken"), few_row_linears(model):
        raise RuntimeError("broken")
    assert [type(module) for module in model] == [nn.Linear, Own, nn.Linear]


@needs_mkl
@pytest.mark.parametrize("options", [{}, {"num_beams": 4}, {"num_beams": 2, "num_return_sequences": 2}])
@pytest.mark.parametrize("slm", ["t5", "llama", "gpt2"])
def test_generate_writes_the_same(zoo, products, monkeypatch, slm, options):
    model, processor = zoo.compose(Pair("llama", slm, "replace"))
    batch = processor(text=PROMPTS[:1], return_tensors="pt")
    options = options | {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    found = model.generate(**batch, **options)
    assert products
    assert not any(type(module) is FewRowLinear for module in model.modules())
    monkeypatch.setattr(few_rows, "MOST_ROWS", 0)
    assert torch.equal(model.generate(**batch, **options), found)
