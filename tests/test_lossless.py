"""Lossless mode: the output is the LLM's own, whatever the SLM drafts."""

from __future__ import annotations

import copy
import importlib
import json
import pathlib
import sys

import pytest
import torch
from conftest import PROMPTS, Pair
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    LlamaConfig,
    LogitsProcessorList,
)

from transformers_llm2slm import LLM2SLMForConditionalGeneration
from transformers_llm2slm.lossless import (
    EXPLORE_AFTER,
    MAX_DRAFT,
    PRIOR_RATE,
    STRETCH,
    DraftLength,
    best_draft_length,
    generate_lossless,
    writing_parameters,
)

# Both kinds of LLM with both kinds of SLM; every fusion; encoder kept and skipped; sliding windows; layers below the last.
LOSSLESS_PAIRS = [
    Pair("t5", "t5", "add"),
    Pair("bart", "qwen3", "replace"),
    Pair("t5gemma", "gemma3", "add"),
    Pair("t5", "gpt2", "align"),
    Pair("llama", "t5", "replace", (("slm_encoder", "skip"), ("llm_layer", 2))),
    Pair("gpt2", "gpt-neo", "add", (("projector_num_layers", 3),)),
    Pair("gemma3", "mistral", "llm-embed", (("llm_layer", (1, -1)),)),
    Pair("qwen3", "qwen3", "align", (("projector_num_layers", 1),)),
    Pair("llama", "qwen3", "kv"),
]


def whole_llm(zoo, pair):
    source = zoo.sources(pair)[0]
    seq2seq = AutoConfig.from_pretrained(source).is_encoder_decoder
    return (AutoModelForSeq2SeqLM if seq2seq else AutoModelForCausalLM).from_pretrained(source).eval()


def own_output(llm, ids, **kwargs):
    """What the LLM itself writes, without the prompt."""
    sequences = llm.generate(ids, attention_mask=torch.ones_like(ids), **kwargs)
    return sequences if llm.config.is_encoder_decoder else sequences[:, ids.shape[1] :]


def nearly_the_llm(llm, noise):
    """An LLM-to-SLM model whose SLM has all layers of the LLM, and so drafts what it writes, but for some noise."""
    model = LLM2SLMForConditionalGeneration.from_llm_slm_pretrained(
        copy.deepcopy(llm), slm_layers=llm.config.num_hidden_layers, fusion="replace"
    )
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.slm.parameters():
            parameter.add_(noise * torch.randn_like(parameter) * parameter.std())
    return model


@pytest.mark.parametrize("pair", LOSSLESS_PAIRS, ids=str)
@pytest.mark.parametrize("draft_length", [None, 3])
def test_greedy_output_is_the_llms_own(zoo, pair, draft_length):
    model, processor = zoo.compose(pair)
    llm = whole_llm(zoo, pair)
    for prompt in PROMPTS:
        batch = processor(text=[prompt], return_tensors="pt")
        expected = own_output(llm, batch["input_ids"], max_new_tokens=16, min_new_tokens=12, do_sample=False)
        options = {} if draft_length is None else {"num_assistant_tokens": draft_length}
        written = generate_lossless(
            model, llm, batch, max_new_tokens=16, min_new_tokens=12, do_sample=False, **options
        )
        assert torch.equal(written, expected)


@pytest.mark.parametrize("noise", [0.0, 0.1, 1.0])
def test_drafts_that_are_mostly_accepted(zoo, noise):
    """Equal for every quality of the drafts, and the better they are, the fewer passes of the LLM it takes."""
    llm = whole_llm(zoo, Pair("llama", "llama", "add"))
    model = nearly_the_llm(llm, noise)
    passes = []
    for seed in range(8):
        torch.manual_seed(seed)
        ids = torch.randint(5, 90, (1, 9))
        expected = own_output(llm, ids, max_new_tokens=24, min_new_tokens=24, do_sample=False)
        count = []
        hook = llm.register_forward_hook(lambda *_, count=count: count.append(1))
        written = generate_lossless(
            model, llm, {"input_ids": ids}, max_new_tokens=24, min_new_tokens=24, do_sample=False,
            num_assistant_tokens=4, return_dict_in_generate=True,
        )  # fmt: skip
        hook.remove()
        assert torch.equal(written.sequences, expected)
        assert len(count) == 24 - written.num_accepted
        passes.append(len(count))
    assert {0.0: passes == [1 + 5] * 8, 0.1: sum(passes) < 8 * 20, 1.0: sum(passes) > 8 * 20}[noise]


@pytest.mark.parametrize("pair", [LOSSLESS_PAIRS[0], LOSSLESS_PAIRS[4]], ids=str)
def test_everything_is_read_once(zoo, pair):
    """The LLM's encoder (or its pass over the prompt) serves LLM and projector, and the SLM's encoder runs once too."""
    model, processor = zoo.compose(pair)
    llm = whole_llm(zoo, pair)
    runs = {"llm": [], "own llm": [], "slm encoder": []}
    reading = llm.get_encoder() if llm.config.is_encoder_decoder else llm.base_model

    def count(name, module):
        module.register_forward_pre_hook(
            lambda _, args, kwargs: runs[name].append((args[0] if args else kwargs["input_ids"]).shape[1]),
            with_kwargs=True,
        )

    count("llm", reading)
    model.llm.register_forward_pre_hook(lambda *_: runs["own llm"].append(1))
    if model.config.slm_encoder == "keep":
        model.slm.get_encoder().register_forward_pre_hook(lambda *_: runs["slm encoder"].append(1))
    batch = processor(text=[PROMPTS[0]], return_tensors="pt")
    generate_lossless(model, llm, batch, max_new_tokens=8, min_new_tokens=8, do_sample=False, num_assistant_tokens=2)
    length = batch["input_ids"].shape[1]
    assert runs["own llm"] == [] and len(runs["slm encoder"]) <= 1
    if llm.config.is_encoder_decoder:
        assert runs["llm"] == [length]
    else:
        assert runs["llm"][0] == length and max(runs["llm"][1:]) <= 3


def chi_square(counts, probabilities):
    expected = probabilities * counts.sum()
    return ((counts - expected) ** 2 / expected).sum().item()


def small_vocabulary_pair(size):
    """An LLM and a model with an SLM that knows nothing of it, with distributions that are far from uniform and each other."""
    models = []
    for seed, num_hidden_layers in ((0, 6), (1, 1)):
        make = LlamaConfig(
            vocab_size=size, hidden_size=16, intermediate_size=16, num_hidden_layers=num_hidden_layers,
            num_attention_heads=2, bos_token_id=None, eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        torch.manual_seed(seed)
        models.append(AutoModelForCausalLM.from_config(make).eval())
        for parameter in models[-1].parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.35)
    llm, slm = models
    return llm, LLM2SLMForConditionalGeneration.from_llm_slm_pretrained(copy.deepcopy(llm), slm, fusion="replace")


@pytest.mark.parametrize("draft_length", [None, 2])
def test_samples_are_the_llms_own(draft_length):
    """The second and third tokens of many samples have the LLM's distribution, not the SLM's that they were drafted by."""
    size, num_samples = 6, 800
    llm, model = small_vocabulary_pair(size)
    ids = torch.tensor([[1, 2, 3]])

    @torch.no_grad()
    def marginals():
        first = llm(ids).logits[0, -1].softmax(-1)
        after_one = llm(torch.cat([ids.repeat(size, 1), torch.arange(size)[:, None]], 1)).logits[:, -1].softmax(-1)
        pairs = torch.cartesian_prod(torch.arange(size), torch.arange(size))
        after_two = llm(torch.cat([ids.repeat(len(pairs), 1), pairs], 1)).logits[:, -1].softmax(-1)
        joint = first[:, None] * after_one
        return joint.sum(0), (joint.reshape(-1, 1) * after_two).sum(0)

    torch.manual_seed(7)
    options = {"max_new_tokens": 4, "do_sample": True, "top_k": 0, "return_dict_in_generate": True}
    if draft_length is not None:
        options["num_assistant_tokens"] = draft_length
    outputs = [generate_lossless(model, llm, {"input_ids": ids}, **options) for _ in range(num_samples)]
    drafted, accepted = (sum(getattr(o, name) for o in outputs) for name in ("num_drafted", "num_accepted"))
    assert num_samples < drafted and 0.1 < accepted / drafted < 0.9
    samples = torch.cat([output.sequences for output in outputs])
    for position, probabilities in zip((1, 2), marginals(), strict=True):
        counts = torch.bincount(samples[:, position], minlength=size).float()
        # Five degrees of freedom: beyond 25.7 in one of ten thousand runs.
        assert chi_square(counts, probabilities) < 25.7
        uniform = torch.full((size,), 1 / size)
        assert chi_square(counts, uniform) > 25.7  # the test can tell distributions apart


# The draft length ----------------------------------------------------------------------------------------------------------
def test_best_draft_length():
    """Theorem 3.8 of the paper, and what it takes for drafting to pay at all."""
    assert best_draft_length(0.0, 0.1) == 0
    assert best_draft_length(0.0, 0.1, shortest=1) == 1
    assert best_draft_length(1.0, 0.01) == MAX_DRAFT
    assert best_draft_length(0.8, 1.0) == 0
    lengths = [best_draft_length(rate / 10, 0.1) for rate in range(11)]
    assert lengths == sorted(lengths) and lengths[7] in (3, 4, 5)
    # By hand, for a = 0.7 and c = 0.3: three tokens bring 2.533 in 1.5 + 0.9, two bring 2.19 in 1.5 + 0.6, and none 1 in 1.
    assert best_draft_length(0.7, 0.3, verification=1.5) == 3
    assert best_draft_length(0.6, 0.3, verification=1.5) == 0  # 1.96 tokens in 2.1


def lengths_of(schedule, rounds, rate, draft=0.2, alone=1.0, verify=1.5):
    """The lengths that a schedule chooses where a share `rate` of the drafts is right as a whole and the rest at once wrong."""
    lengths = []
    for number in range(rounds):
        lengths.append(schedule.choose())
        if length := lengths[-1]:
            right = int((number + 1) * rate) > int(number * rate)
            schedule.add_draft(length if right else 0, length if right else 1)
            schedule.add_time("draft", draft)
        schedule.add_time("verify" if length else "alone", verify if length else alone)
    return lengths


def test_drafts_are_as_long_as_pays():
    """The first pass is measured without a draft. Then good drafts get longer, and bad ones end, but for a try now and then."""
    good = lengths_of(DraftLength(cost=0.2, timed=True), 40, rate=1.0)
    assert good[0] == 0 < good[1] < good[2] <= good[3] == MAX_DRAFT
    assert [number for number, length in enumerate(good) if length == 0] == [
        0,
        1 + EXPLORE_AFTER,
        2 + 2 * EXPLORE_AFTER,
    ]
    schedule = DraftLength(cost=0.2, timed=True)
    bad = lengths_of(schedule, 4 * (EXPLORE_AFTER + 1), rate=0.0)
    assert 4 <= sum(length > 0 for length in bad) <= 6
    assert MAX_DRAFT in lengths_of(schedule, 8 * EXPLORE_AFTER, rate=1.0)  # they have become good


def test_times_decide_where_they_are_measured():
    """What parameters promise doesn't count where the clock says otherwise, nor a single disturbed pass."""
    lengths = lengths_of(DraftLength(cost=0.05, timed=True), 12, rate=1.0, draft=0.95, verify=1.0)
    assert lengths[:2] == [0, STRETCH * best_draft_length(PRIOR_RATE, 0.05)] and lengths[-1] == 0
    lengths = lengths_of(DraftLength(cost=0.95, timed=True), 40, rate=1.0, draft=0.05, verify=1.0)
    assert lengths[-1] == MAX_DRAFT
    schedule = DraftLength(cost=0.2, timed=True)
    lengths_of(schedule, 12, rate=1.0)
    before = schedule.best(shortest=0)
    for kind in ("draft", "verify"):
        schedule.add_time(kind, 1000.0)
    assert schedule.best(shortest=0) == before > 0
    untimed, same = DraftLength(cost=0.2, timed=False), DraftLength(cost=0.2, timed=False)
    assert lengths_of(untimed, 40, 0.7) == lengths_of(same, 40, 0.7, draft=9.0, verify=99.0)


@pytest.mark.parametrize("do_sample", [False, True])
def test_output_does_not_depend_on_the_clock(zoo, monkeypatch, do_sample):
    """Draft lengths follow the clock, greedy tokens don't; and with a seed, samples repeat, drafts and all."""
    llm = whole_llm(zoo, Pair("llama", "llama", "add"))
    model = nearly_the_llm(llm, 0.02)
    with torch.no_grad():
        model.slm.lm_head.weight.mul_(30.0)  # else it is never sure, and drafts single tokens
    written, drafted = [], []
    add_time = DraftLength.add_time
    for draft in (0.01, 0.5, 2.0):
        seconds = {"draft": draft, "alone": 1.0, "verify": 1.0}
        monkeypatch.setattr(
            DraftLength, "add_time", lambda self, kind, _, seconds=seconds: add_time(self, kind, seconds[kind])
        )
        torch.manual_seed(0)
        outputs = generate_lossless(
            model, llm, {"input_ids": torch.tensor([[5, 6, 7]])}, max_new_tokens=40, min_new_tokens=40,
            do_sample=do_sample, return_dict_in_generate=True,
        )  # fmt: skip
        written.append(outputs.sequences)
        drafted.append((outputs.num_drafted, outputs.num_accepted))
    assert all(torch.equal(written[0], other) for other in written)
    assert drafted[0][0] > 0 and (len(set(drafted)) == 1) == do_sample


def test_a_draft_ends_where_the_drafter_is_unsure(zoo):
    """A tiny untrained model gives no token 20 %, so drafts are one token long, unless their length is given."""
    llm = whole_llm(zoo, Pair("llama", "llama", "add"))
    model = nearly_the_llm(llm, 0.0)
    sure = nearly_the_llm(llm, 0.0)
    with torch.no_grad():
        sure.slm.lm_head.weight.mul_(1000.0)
    options = {"max_new_tokens": 30, "min_new_tokens": 30, "do_sample": True, "top_k": 0, "temperature": 1.0}
    lengths = {}
    for name, drafter, given in (
        ("unsure", model, {}),
        ("given", model, {"num_assistant_tokens": 4}),
        ("sure", sure, {}),
    ):
        passes = []
        hook = llm.register_forward_pre_hook(
            lambda _, args, kwargs, passes=passes: passes.append(kwargs["input_ids"].shape[1]), with_kwargs=True
        )
        torch.manual_seed(0)
        generate_lossless(drafter, llm, {"input_ids": torch.tensor([[5, 6, 7]])}, **options, **given)
        hook.remove()
        lengths[name] = [length - 1 for length in passes[1:]]
    assert max(lengths["unsure"]) == 1 and lengths["given"][0] == 4 and max(lengths["sure"]) > 1


def test_a_draft_that_ends_the_response_is_counted(zoo):
    """An end-of-sequence token that was drafted and accepted counts, so a drafter that is never wrong has a rate of 1."""
    llm = whole_llm(zoo, Pair("llama", "llama", "add"))
    model = nearly_the_llm(llm, 0.0)
    ids = torch.tensor([[5, 6, 7]])
    free = own_output(llm, ids, max_new_tokens=12, min_new_tokens=12, do_sample=False)[0].tolist()
    end = next(index for index in range(3, 12) if free[index] not in free[:index])
    outputs = generate_lossless(
        model, llm, {"input_ids": ids}, max_new_tokens=12, do_sample=False, eos_token_id=free[end],
        num_assistant_tokens=8, return_dict_in_generate=True,
    )  # fmt: skip
    assert outputs.sequences[0].tolist() == free[: end + 1]
    assert outputs.num_drafted == outputs.num_accepted == end  # all but the first, which comes with the reading


def test_no_more_is_drafted_than_the_slm_has_positions_for(zoo):
    """The LLM goes on alone."""
    pair = LOSSLESS_PAIRS[5]
    llm = whole_llm(zoo, pair)
    limit = 24
    small = AutoModelForCausalLM.from_config(
        AutoConfig.from_pretrained(zoo.sources(pair)[1], max_position_embeddings=limit)
    ).eval()
    model = LLM2SLMForConditionalGeneration.from_llm_slm_pretrained(copy.deepcopy(llm), small, fusion="replace")
    ids = torch.tensor([[5, 6, 7, 8]])
    positions = []
    small.transformer.wpe.register_forward_pre_hook(lambda _, args: positions.append(int(args[0].max())))
    options = {"max_new_tokens": 40, "min_new_tokens": 40, "do_sample": False}
    expected = own_output(llm, ids, **options)
    assert torch.equal(generate_lossless(model, llm, {"input_ids": ids}, num_assistant_tokens=3, **options), expected)
    assert limit - 3 <= max(positions) < limit


def test_the_slm_computes_logits_for_one_token(zoo):
    """Not for the prompt, nor for the token before the last one where a step takes two."""
    llm = whole_llm(zoo, Pair("llama", "llama", "add"))
    model = nearly_the_llm(llm, 0.0)
    shapes = []
    model.slm.lm_head.register_forward_hook(lambda _, args, output: shapes.append(output.shape[1]))
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "num_assistant_tokens": 3}
    generate_lossless(model, llm, {"input_ids": torch.tensor([[5, 6, 7]])}, **options)
    assert len(shapes) >= 6 and set(shapes) == {1}


def test_parameters_that_a_step_reads(zoo):
    """Embeddings are looked up, not read; a head that is tied to them is read."""
    llm = whole_llm(zoo, Pair("llama", "llama", "add"))
    layers = sum(p.numel() for p in llm.model.layers.parameters()) + llm.model.norm.weight.numel()
    assert writing_parameters(llm) == layers + llm.lm_head.weight.numel()
    t5 = whole_llm(zoo, Pair("t5", "t5", "add"))
    decoder = sum(p.numel() for name, p in t5.decoder.named_parameters() if "embed_tokens" not in name)
    assert writing_parameters(t5) == decoder + t5.lm_head.weight.numel()


def test_logits_processors_shape_drafts_and_output(zoo):
    """A processor that forbids most tokens is obeyed, and drafts that obey it too are accepted."""
    llm = whole_llm(zoo, Pair("llama", "llama", "add"))
    model = nearly_the_llm(llm, 0.0)

    def only_even(input_ids, scores):
        return scores.masked_fill(torch.arange(scores.shape[-1]) % 2 == 1, float("-inf"))

    options = {"max_new_tokens": 12, "do_sample": False, "logits_processor": LogitsProcessorList([only_even])}
    ids = torch.tensor([[5, 6, 7]])
    expected = own_output(llm, ids, **options)
    written = generate_lossless(
        model, llm, {"input_ids": ids}, num_assistant_tokens=4, return_dict_in_generate=True, **options
    )
    assert torch.equal(written.sequences, expected) and bool((expected % 2 == 0).all())
    assert written.num_accepted == written.num_drafted > 0


def test_padding_of_the_one_prompt_is_left_out(zoo):
    model, processor = zoo.compose(LOSSLESS_PAIRS[4])
    llm = whole_llm(zoo, LOSSLESS_PAIRS[4])
    ids = processor(text=[PROMPTS[0]], return_tensors="pt")["input_ids"]
    padded = {
        "input_ids": torch.cat([torch.ones_like(ids[:, :2]), ids, torch.ones_like(ids[:, :3])], dim=1),
        "attention_mask": torch.tensor([[0] * 2 + [1] * ids.shape[1] + [0] * 3]),
    }
    expected = own_output(llm, ids, max_new_tokens=8, do_sample=False)
    assert torch.equal(generate_lossless(model, llm, padded, max_new_tokens=8, do_sample=False), expected)


# Through the public surface ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("pair", [LOSSLESS_PAIRS[0], LOSSLESS_PAIRS[4]], ids=str)
def test_generate_of_a_loaded_checkpoint(zoo, tmp_path, pair):
    """`load_llm="whole"` and `mode="lossless"`; a checkpoint stays as slim as ever, and a self-contained one holds it all."""
    model, processor = zoo.compose(pair)
    model.save_pretrained(tmp_path / "slim")
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "slim", load_llm="whole")
    batch = processor(text=[PROMPTS[0]], return_tensors="pt")
    options = {"max_new_tokens": 10, "do_sample": False}
    expected = own_output(whole_llm(zoo, pair), batch["input_ids"], **options)
    assert torch.equal(loaded.generate(**batch, mode="lossless", **options), expected)
    assert torch.equal(loaded.generate(**batch, **options), model.generate(**batch, **options))
    written = loaded.generate(**batch, mode="lossless", return_dict_in_generate=True, **options)
    assert 0 <= written.num_accepted <= written.num_drafted

    assert not any(parameter.requires_grad for parameter in loaded.model.whole_llm.parameters())
    assert not loaded.train().model.whole_llm.training
    assert loaded.state_dict().keys() == model.state_dict().keys()
    loaded.save_pretrained(tmp_path / "again")
    size = (tmp_path / "again" / "model.safetensors").stat().st_size
    assert size == (tmp_path / "slim" / "model.safetensors").stat().st_size
    loaded.save_pretrained(tmp_path / "all", save_llm=True)
    alone = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "all", load_llm="whole")
    assert torch.equal(alone.generate(**batch, mode="lossless", **options), expected)


def test_generate_of_a_composed_model(zoo):
    """By name, from a model in memory, and with an SLM that is cut from the LLM."""
    llm, slm = zoo.sources(LOSSLESS_PAIRS[4])
    whole = whole_llm(zoo, LOSSLESS_PAIRS[4])
    ids = torch.tensor([[5, 6, 7, 8]])
    expected = own_output(whole, ids, max_new_tokens=8, do_sample=False)
    compose = LLM2SLMForConditionalGeneration.from_llm_slm_pretrained
    for model in (
        compose(llm, slm, fusion="replace", load_llm="whole"),
        compose(whole, slm, fusion="replace", load_llm="whole"),
        compose(llm, slm_layers=2, load_llm="whole"),
        compose(llm, slm_layers=2, load_llm="whole", llm_dtype="float32"),
    ):
        written = model.generate(input_ids=ids, mode="lossless", max_new_tokens=8, do_sample=False)
        assert torch.equal(written, expected)


def test_lossless_errors(zoo, tmp_path):
    pair = LOSSLESS_PAIRS[4]
    llm, slm = zoo.sources(pair)
    model, processor = zoo.compose(pair)
    batch = processor(text=PROMPTS[:2], padding=True, return_tensors="pt")
    with pytest.raises(
        ValueError, match='this model holds the part of it that reads. Load the model with `load_llm="whole"`'
    ):
        model.generate(**batch, mode="lossless")
    with pytest.raises(ValueError, match="`mode` must be one of 'hybrid', 'lossless', got 'fast'"):
        model.generate(**batch, mode="fast")
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="`load_llm` must be one of True, False, 'whole', got 'all'"):
        AutoModelForSeq2SeqLM.from_pretrained(tmp_path, load_llm="all")
    whole = AutoModelForSeq2SeqLM.from_pretrained(tmp_path, load_llm="whole")
    with pytest.raises(ValueError, match="takes one prompt at a time, got 2"):
        whole.generate(**batch, mode="lossless")
    with pytest.raises(ValueError, match="pass `input_ids`, not what it has read"):
        whole.generate(prompt=whole.encode_prompt(**batch), mode="lossless")
    one = {key: value[:1] for key, value in batch.items()}
    with pytest.raises(ValueError, match="without beams, got `num_beams=2`"):
        whole.generate(**one, mode="lossless", num_beams=2, max_new_tokens=4)
    with pytest.raises(ValueError, match="the output would not be the LLM's own"):
        whole.generate(**one, mode="lossless", assistant_ensemble_weight=0.5, max_new_tokens=4)
    body = AutoModel.from_pretrained(llm)
    with pytest.raises(ValueError, match="A LlamaModel can't verify what the SLM drafts: it has no LM head"):
        AutoModelForSeq2SeqLM.from_pretrained(tmp_path, load_llm="whole", llm_model=body)
    bert = zoo.sources(Pair("bert", "t5", "replace"))
    with pytest.raises(ValueError, match="does not hold the whole LLM BertLMHeadModel: missing cls"):
        LLM2SLMForConditionalGeneration.from_llm_slm_pretrained(*bert, fusion="replace", load_llm="whole")


# The benchmark -------------------------------------------------------------------------------------------------------------
BENCHMARKS = pathlib.Path(__file__).parent.parent / "benchmarks"


@pytest.mark.skipif(not BENCHMARKS.is_dir(), reason="the benchmarks are not part of a release")
@pytest.mark.parametrize("exact", [True, False])
def test_benchmark(monkeypatch, tmp_path, exact):
    """It reports equal tokens, one reading and a sound distribution; and where tokens differ, it says so and fails."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    benchmark = importlib.import_module("lossless")
    output = tmp_path / "lossless.json"
    options = "--count 2 --new-tokens 10 --samples 40 --assisted-count 1 --small --output".split()
    monkeypatch.setattr(sys, "argv", ["lossless.py", *options, str(output)])
    if not exact:
        own_tokens = benchmark.own_tokens
        monkeypatch.setattr(benchmark, "own_tokens", lambda *args, **kwargs: own_tokens(*args, **kwargs) ^ 1)
    assert benchmark.main() == (0 if exact else 1)
    report = json.loads(output.read_text())
    assert report["lossless"] == exact and set(report["greedy"]) == set(report["samples"])
    for result in report["greedy"].values():
        assert result["tokens"] == 20 and result["prompt_read_once"] and result["most_readings"] == 1
        if exact:
            assert result["differing"] == 0
        else:
            # The lowest bit of each token is another, so that the LLM finds it less probable than what it wrote.
            assert result["differences"][0]["position"] == 0 and result["differences"][0]["logit gap"] < 0
    for result in report["samples"].values():
        assert result["passed"] and result["second_token_against_uniform"]["p"] < result["second_token"]["p"]
