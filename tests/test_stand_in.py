"""Stand-ins: their weights, their layers, how they are timed, and that every family's `generate` takes what they are given."""

from __future__ import annotations

import pytest
import torch
from conftest import FAMILIES
from torch import nn
from transformers import Cache

from transformers_llm2slm import stand_in as module
from transformers_llm2slm.stand_in import (
    LayerStack,
    Timing,
    Workload,
    Writer,
    fill_weights,
    lengthened,
    parts,
    stand_in,
    take_times,
)
from transformers_llm2slm.structure import reader

WRITERS = ["t5", "bart", "t5gemma", "gpt2", "opt", "llama", "gemma3", "mistral", "phi3"]


# Weights -------------------------------------------------------------------------------------------------------------
def test_layers_share_memory_from_the_limit_on():
    model = nn.Sequential(*[nn.ModuleDict({"linear": nn.Linear(4, 4)}) for _ in range(5)])
    model = nn.ModuleDict({"layers": model, "head": nn.Linear(4, 8)})
    fill_weights(model, distinct_bytes=2 * 4 * (16 + 4))  # of two layers, weights and biases
    weights = [layer["linear"].weight.data_ptr() for layer in model["layers"]]
    assert len(set(weights)) == 2
    assert weights == [weights[0], weights[1], weights[0], weights[1], weights[0]]
    assert model["head"].weight.data_ptr() not in weights
    assert model["head"].weight.std().item() == pytest.approx(0.02, rel=0.5)
    assert torch.equal(model["head"].bias, torch.ones(8))


@pytest.mark.parametrize("family", ["t5", "llama"])
def test_stand_in_is_a_model_of_its_configuration(family):
    config = FAMILIES[family]()
    config.tie_word_embeddings = True
    model = stand_in(config, torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    logits = model(
        input_ids=torch.tensor([[3, 4]]), **({"decoder_input_ids": torch.tensor([[0]])} if family == "t5" else {})
    ).logits
    assert logits.isfinite().all() and logits.float().std() > 0


# Layers and clocks ---------------------------------------------------------------------------------------------------
class Clock:
    """Stands still but for what is said to take time."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


class SlowLayer(nn.Module):
    def __init__(self, clock: Clock, seconds: float):
        super().__init__()
        self.clock, self.seconds = clock, seconds
        # Inside of a layer, as experts are.
        self.experts = nn.ModuleList(nn.Identity() for _ in range(20))

    def forward(self, states):
        self.clock.now += self.seconds
        return states


class SlowModel(nn.Module):
    """Takes `base` seconds, and some for each layer."""

    def __init__(self, clock: Clock, base: float, seconds: list[float]):
        super().__init__()
        self.clock, self.base = clock, base
        self.layers = nn.ModuleList(SlowLayer(clock, layer) for layer in seconds)

    def forward(self, states):
        self.clock.now += self.base
        for layer in self.layers:
            states = layer(states)
        return states


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def timing(model: SlowModel) -> Timing:
    def run(depth: int) -> list[float]:
        assert len(model.layers) == depth
        start = model.clock.now
        model(torch.zeros(1))
        return [model.clock.now - start]

    return Timing(LayerStack(model), run)


def test_layers_that_are_left_out_are_added(clock):
    # The first layer takes longer, the others differ.
    model = SlowModel(clock, 2.0, [1.0, 0.25, 0.5, 0.25, 0.5, 0.25])
    timed = timing(model)
    timed.depth = 3
    for _ in range(2):
        timed.sample()
    assert timed.layer_times == [[1.0, 0.25, 0.5]] * 2
    assert timed.layer_seconds() == 0.375
    assert timed.seconds() == 2.0 + 1.75 + 3 * 0.375
    assert timed.seconds(2) == 2.0 + 1.75 - 0.375
    assert len(model.layers) == 6 and len(timed.stack) == 6


def test_what_is_done_beside_the_layers_for_each_is_added(clock):
    model = SlowModel(clock, 2.0, [0.25] * 6)
    timed = timing(model)

    def run(depth: int) -> list[float]:
        model(torch.zeros(1))
        clock.now += 0.5 * depth  # as beams change places in a cache
        timed.stack.beside.append(0.5 * depth)
        return [2.0 + 0.75 * depth]

    timed.run, timed.depth = run, 2
    timed.sample()
    assert timed.layer_seconds() == 0.75
    assert timed.seconds() == 2.0 + 6 * 0.75


@pytest.mark.parametrize(
    ("seconds", "depth", "samples"),
    [
        (3.0, 2, 1),  # a third of it is not enough for two layers: what was found out with has to do
        (9.0, 4, 1),  # 1 + 4 * 0.5 = 3; two probes of 2 and one of 3, and no time for another
        (30.0, 8, 5),  # all, 5 s each: 30 - 4
        (300.0, 8, 59),
    ],
)
def test_as_many_layers_as_there_is_time_for(clock, seconds, depth, samples):
    timed = timing(SlowModel(clock, 1.0, [0.5] * 8))
    take_times([timed], seconds)
    assert (timed.depth, len(timed.times)) == (depth, samples)
    assert timed.seconds() == 5.0


def test_everything_is_timed_within_its_share(clock):
    quick, slow = timing(SlowModel(clock, 0.0, [0.25])), timing(SlowModel(clock, 1.0, [1.0] * 30))
    take_times([quick, slow], 40.0)
    assert (quick.spent, slow.spent) == (20.0, 18.0)
    assert (quick.seconds(), slow.seconds()) == (0.25, 31.0)


def test_a_model_without_layers():
    with pytest.raises(ValueError, match="Found no list of layers in a Linear"):
        LayerStack(nn.Linear(2, 2))


# Writing -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("field", ["prompt_length", "output_length", "batch_size", "num_beams"])
def test_lengths_are_positive(field):
    with pytest.raises(ValueError, match=f"`{field}` must be at least 1, got 0"):
        Workload(**{"prompt_length": 4, "output_length": 4} | {field: 0})


@pytest.mark.parametrize("num_beams", [1, 2])
@pytest.mark.parametrize("family", WRITERS)
def test_every_part_of_generate_is_timed(family, num_beams):
    """Against the cache and the calls of the model's own `generate`."""
    model = stand_in(FAMILIES[family](), torch.float32)
    workload = Workload(prompt_length=20, output_length=11, batch_size=2, num_beams=num_beams)
    writer = Writer(model, workload)
    lengths: list[int] = []

    def note(_, args, kwargs):
        ids = kwargs["decoder_input_ids" if writer.is_encoder_decoder else "input_ids"]
        cache = parts(kwargs[writer.cache_argument])[0]
        lengths.append(cache.get_seq_length() + ids.shape[1])

    def seen(what: str) -> list[int]:
        lengths.clear()
        timings[what].depth = len(timings[what].stack)
        timings[what].sample()
        return lengths.copy()

    timings = writer.timings()
    with pytest.MonkeyPatch.context() as patch:
        timings["near"].depth = len(timings["near"].stack)
        timings["near"].sample()  # makes the cache that others start from
        hook = model.register_forward_pre_hook(note, with_kwargs=True)
        patch.setattr(module, "STEPS", 3)
        timings = writer.timings()
        before = 1 if writer.is_encoder_decoder else 20
        assert seen("first") == [before]
        # After 11 tokens were written, 10 were read; the first of the steps is not timed.
        assert seen("far")[-1] == before + 10
        near = seen("near")
        assert near == list(range(max(before, 2), max(before, 2) + 4))
        assert len(timings["near"].times) == 3
        # Beams change places in the cache after every token, the last one too.
        assert len(timings["near"].beside) == (4 if num_beams > 1 else 0)
        hook.remove()
    cache = made_by_generate(model, writer, workload)
    size = sum(
        layer.keys.nbytes + layer.values.nbytes
        for part in parts(cache)
        for layer in part.layers
        if layer.is_initialized
    )
    assert writer.cache_bytes() == size


def made_by_generate(model, writer, workload) -> Cache:
    """The cache when the model has written all tokens."""
    held = []
    hook = model.register_forward_pre_hook(
        lambda _, args, kwargs: held.append(kwargs[writer.cache_argument]), with_kwargs=True
    )
    writer.generate({"input_ids": writer.tokens(workload.batch_size, workload.prompt_length)}, workload.output_length)
    hook.remove()
    return held[-1]


def test_steps_stay_within_the_positions_that_there_are():
    config = FAMILIES["gpt2"]()
    config.n_positions = 24
    writer = Writer(stand_in(config, torch.float32), Workload(prompt_length=20, output_length=4))
    timings = writer.timings()
    for timed in timings.values():
        timed.sample()
    assert len(timings["far"].times) == module.STEPS


def test_reading_runs_the_encoder_or_the_body():
    for family in ("t5", "llama"):
        model = stand_in(FAMILIES[family](), torch.float32)
        calls = []
        reader(model).register_forward_hook(lambda _, args, output, calls=calls: calls.append(output[0].shape))
        timed = Writer(model, Workload(5, 2, batch_size=3, num_beams=2)).timings()["read"]
        timed.sample()
        assert calls == [(3, 5, model.config.hidden_size)]
        assert len(timed.times) == 1 and timed.times[0] > 0


def test_a_cache_is_lengthened_for_both_attentions():
    writer = Writer(stand_in(FAMILIES["t5"](), torch.float32), Workload(7, 9, batch_size=2, num_beams=3))
    seed = writer.cache(1)
    cache = lengthened(seed, 5, 7)
    assert [part.layers[0].keys.shape for part in parts(cache)] == [(6, 4, 5, 8), (6, 4, 7, 8)]
    assert [part.layers[0].keys.shape[2] for part in parts(seed)] == [1, 1]
