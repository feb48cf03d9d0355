"""The estimate: what follows from measured times, memory and lengths, and the command."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from conftest import FAMILIES, llama_like, t5_like
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, BitsAndBytesConfig, MambaConfig, XLNetConfig

from transformers_llm2slm import LLM2SLMForConditionalGeneration
from transformers_llm2slm.cli import main
from transformers_llm2slm.estimate import (
    BreakEven,
    Speed,
    Times,
    Workload,
    WriterTimes,
    break_even,
    check_lengths,
    dtype_of,
    estimate,
    hybrid_config,
    memories,
    speeds,
)

LENGTHS = {"prompt_length": 6, "output_length": 5}
LLAMA, T5 = FAMILIES["llama"], FAMILIES["t5"]


def wide_t5():
    config = t5_like("T5Config")()
    config.d_model = 48
    return config


# Times ---------------------------------------------------------------------------------------------------------------
ENCODER_DECODERS = Times(
    read=1.0,
    project=0.25,
    llm=WriterTimes(encode=1.5, first=0.5, further=0.5, cache_bytes=800),
    slm=WriterTimes(encode=0.25, first=0.125, further=0.125, cache_bytes=40),
)
DECODERS = Times(
    read=0.75,
    project=0.25,
    llm=WriterTimes(encode=0.0, first=1.0, further=0.5, cache_bytes=800),
    slm=WriterTimes(encode=0.0, first=0.25, further=0.25, cache_bytes=40),
)


def test_speed_of_encoder_decoders():
    found = speeds(ENCODER_DECODERS, Workload(prompt_length=7, output_length=9, batch_size=2, num_beams=3))
    assert found == {
        "llm": Speed(1.5, 0.0, 2.0, 0.5, 6.0, 3.0, 1.0),
        "slm": Speed(0.25, 0.0, 0.375, 0.125, 1.375, 18 / 1.375, 6 / 1.375),
        "hybrid": Speed(1.0, 0.25, 1.625, 0.125, 2.625, 18 / 2.625, 6 / 2.625),
    }


def test_an_encoder_that_is_skipped_takes_no_time():
    found = speeds(ENCODER_DECODERS, Workload(7, 9), slm_encoder="skip")
    assert found["hybrid"].first_token_seconds == 1.375
    assert found["slm"].first_token_seconds == 0.375


def test_with_keys_and_values_the_slm_reads_no_prompt():
    found = speeds(ENCODER_DECODERS, Workload(7, 9), fusion="kv")
    assert found["hybrid"] == Speed(1.0, 0.25, 1.375, 0.125, 2.375, 9 / 2.375, 6 / 2.375)
    assert found["slm"].first_token_seconds == 0.375


def test_speed_of_decoders():
    found = speeds(DECODERS, Workload(7, 1))
    assert found == {
        "llm": Speed(1.0, 0.0, 1.0, 0.5, 1.0, 1.0, 1.0),
        "slm": Speed(0.25, 0.0, 0.25, 0.25, 0.25, 4.0, 4.0),
        "hybrid": Speed(0.75, 0.25, 1.25, 0.25, 1.25, 0.8, 0.8),
    }


def at(first: float, further: float) -> Speed:
    return Speed(0.0, 0.0, first, further, 0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("llm", "hybrid", "from_tokens", "to_tokens"),
    [
        (at(2.0, 0.5), at(1.0, 0.25), 1, None),
        (at(1.0, 0.5), at(1.0, 0.25), 2, None),
        (at(1.0, 0.5), at(1.5, 0.25), 4, None),  # as fast with 3
        (at(1.0, 0.5), at(1.625, 0.25), 4, None),
        (at(1.0, 0.5), at(1.5, 0.5), None, None),
        (at(1.0, 0.25), at(1.0, 0.5), None, None),
        (at(2.0, 0.25), at(1.0, 0.25), 1, None),
        (at(2.0, 0.25), at(1.0, 0.5), 1, 4),  # as fast with 5
        (at(2.0, 0.25), at(0.875, 0.5), 1, 5),
    ],
)
def test_break_even(llm, hybrid, from_tokens, to_tokens):
    found = break_even(llm, hybrid)
    assert (found.from_tokens, found.to_tokens) == (from_tokens, to_tokens)
    assert found.most_gained == llm.further_token_seconds / hybrid.further_token_seconds
    for length in range(1, 9):
        faster = hybrid.first_token_seconds + (length - 1) * hybrid.further_token_seconds < (
            llm.first_token_seconds + (length - 1) * llm.further_token_seconds
        )
        assert faster == (from_tokens is not None and from_tokens <= length <= (to_tokens or 9))


def test_break_even_says_why():
    assert break_even(at(1.25, 0.5), at(0.5, 0.125)) == BreakEven(
        1,
        None,
        "The hybrid takes 500 ms to the first token, the LLM 1.25 s, and 125 ms for each further one, the LLM 500 ms.",
        4.0,
    )


# Memory --------------------------------------------------------------------------------------------------------------
def parameters(*modules: torch.nn.Module) -> int:
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


def saved_bytes(folder) -> int:
    """Bytes of the tensors in a checkpoint."""
    with safe_open(folder / "model.safetensors", "pt") as file:
        return sum(file.get_tensor(key).nbytes for key in file.keys())


@pytest.mark.parametrize("kind", ["t5", "llama", "cut t5", "cut llama"])
def test_memory_and_checkpoint_are_those_of_the_composed_model(kind, tmp_path):
    if kind.endswith("t5"):
        llm, slm = AutoModelForSeq2SeqLM.from_config(wide_t5()), AutoModelForSeq2SeqLM.from_config(T5())
        reading = [llm.shared, *llm.encoder.block, llm.encoder.final_layer_norm]
    else:
        llm = AutoModelForCausalLM.from_config(LLAMA())
        slm = AutoModelForCausalLM.from_config(llama_like("LlamaConfig", 40, tie_word_embeddings=True)())
        reading = [llm.model]
    options = {"slm_layers": 2} if kind.startswith("cut") else {}
    slm_config = None if options else slm.config
    config = hybrid_config(llm.config, slm_config, **options)
    found, checkpoint_bytes = memories(config, ENCODER_DECODERS, torch.bfloat16, torch.float32)
    fusion = {} if options else {"fusion": "add"}
    model = LLM2SLMForConditionalGeneration.from_llm_slm_pretrained(llm, None if options else slm, **fusion, **options)
    alone = type(llm)(config.slm_config) if options else slm
    sizes = {name: dataclasses.asdict(memory) for name, memory in found.items()}
    assert sizes["llm"] == {
        "llm_bytes": 2 * parameters(llm),
        "projector_bytes": 0,
        "slm_bytes": 0,
        "cache_bytes": 800,
        "total_bytes": 2 * parameters(llm) + 800,
    }
    hybrid = {"llm_bytes": 2 * parameters(*reading), "projector_bytes": 4 * parameters(model.projector)}
    hybrid |= {"slm_bytes": 4 * parameters(model.slm), "cache_bytes": 40}
    assert sizes["hybrid"] == hybrid | {"total_bytes": sum(hybrid.values())}
    assert (sizes["slm"]["llm_bytes"], sizes["slm"]["slm_bytes"]) == (0, 4 * parameters(alone))
    for field in ("fusion", "llm_layer", "slm_encoder", "slm_layers"):
        assert getattr(config, field) == getattr(model.config, field)
    model.save_pretrained(tmp_path)
    assert checkpoint_bytes == saved_bytes(tmp_path)


# What is asked -------------------------------------------------------------------------------------------------------
def test_a_layer_below_the_top_is_taken_over():
    config = hybrid_config(LLAMA(), LLAMA(), llm_layer=[1, -1])
    assert (config.llm_layers, config.fusion, config.num_llm_layers) == ([1, -1], "add", 3)
    assert hybrid_config(LLAMA(), T5(), slm_encoder="skip").fusion == "replace"


@pytest.mark.parametrize(
    ("llm", "slm", "options", "text"),
    [
        (FAMILIES["mpnet"], LLAMA, {}, "A `mpnet` model can't be the LLM that is compared with: .* so it can't write"),
        (LLAMA, FAMILIES["mpnet"], {}, "A `mpnet` model can't be the SLM: .* so it can't write"),
        (LLAMA, None, {}, "Give either an SLM, or `slm_layers`"),
        (LLAMA, LLAMA, {"slm_layers": 2}, "Give either an SLM, or `slm_layers`"),
        (LLAMA, None, {"slm_layers": 4}, r"`slm_layers` must lie in \[1, 3\]"),
        (LLAMA, LLAMA, {"llm_layer": 4}, r"`llm_layer` must lie in \[-4, 3\]"),
        (LLAMA, LLAMA, {"slm_encoder": "skip"}, "needs an encoder-decoder SLM"),
    ],
)
def test_models_that_can_not_be_joined(llm, slm, options, text):
    with pytest.raises(Exception, match=text):
        estimate(llm(), None if slm is None else slm(), **LENGTHS, **options)


def test_a_quantised_model():
    config = LLAMA()
    config.quantization_config = BitsAndBytesConfig(load_in_8bit=True)
    with pytest.raises(ValueError, match="The LLM is quantised, .* repository that it was quantised from"):
        estimate(config, LLAMA(), **LENGTHS)


@pytest.mark.parametrize(
    ("llm", "slm", "prompt_length", "output_length", "text"),
    [
        ("llama", "llama", 129, 1, "The prompt is 129 tokens long, but the LLM takes at most 128"),
        ("llama", "t5", 100, 29, "The prompt with the response is 129 tokens long, but the LLM takes at most 128"),
        ("t5", "llama", 100, 29, "The prompt with the response is 129 tokens long, but the SLM takes at most 128"),
        ("t5", "bart", 129, 5, "The prompt is 129 tokens long, but the SLM takes at most 128"),
        ("bart", "t5", 5, 129, "The response is 129 tokens long, but the LLM takes at most 128"),
    ],
)
def test_lengths_that_a_model_does_not_take(llm, slm, prompt_length, output_length, text):
    config = hybrid_config(FAMILIES[llm](), FAMILIES[slm]())
    with pytest.raises(ValueError, match=text):
        check_lengths(config, Workload(prompt_length, output_length))
    check_lengths(config, Workload(min(prompt_length, 100), min(output_length, 28)))


def test_precision():
    config = LLAMA()
    assert dtype_of(config, None) is torch.float32
    config.dtype = "bfloat16"
    assert dtype_of(config, None) is dtype_of(config, "auto") is torch.bfloat16
    assert dtype_of(config, "float16") is dtype_of(config, torch.float16) is torch.float16


# All of it -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "llm",
    [
        MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=3, state_size=4),
        XLNetConfig(vocab_size=64, d_model=32, n_layer=3, n_head=4, d_inner=48),  # takes no cache
    ],
    ids=lambda config: config.model_type,
)
def test_a_cut_of_an_llm_that_keeps_no_keys_and_values(llm):
    assert hybrid_config(llm, slm_layers=2).fusion == "replace"


@pytest.mark.parametrize("fusion", ["kv", "replace"])
def test_estimate_of_a_cut(fusion):
    found = estimate(LLAMA(), slm_layers=2, **LENGTHS, fusion=None if fusion == "kv" else fusion, seconds=0.2)
    assert (found.fusion, found.llm_layer) == (fusion, [1, 2] if fusion == "kv" else 1)
    hybrid = found.speed["hybrid"]
    # Of a prompt of keys and values the first token takes no more than others do.
    first = hybrid.first_token_seconds - hybrid.encode_seconds - hybrid.project_seconds
    assert (first == pytest.approx(hybrid.further_token_seconds)) == (fusion == "kv")


@pytest.mark.parametrize(("llm", "slm"), [("t5", "t5"), ("llama", "gpt2"), ("t5gemma", "gemma3")])
def test_estimate(llm, slm):
    found = estimate(
        FAMILIES[llm](), FAMILIES[slm](), **LENGTHS, batch_size=2, num_beams=2, llm_dtype="bfloat16", seconds=0.2
    )
    assert (found.llm_dtype, found.slm_dtype, found.llm_layer) == ("bfloat16", "float32", -1)
    assert found.threads == torch.get_num_threads() and found.measuring_seconds > 0.1
    for speed in found.speed.values():
        assert 0 < speed.encode_seconds <= speed.first_token_seconds < speed.total_seconds
        assert speed.total_seconds == speed.first_token_seconds + 4 * speed.further_token_seconds
        assert speed.tokens_per_second == 10 / speed.total_seconds
    hybrid, llm_speed = found.speed["hybrid"], found.speed["llm"]
    assert hybrid.encode_seconds + hybrid.project_seconds < hybrid.first_token_seconds
    assert hybrid.further_token_seconds == found.speed["slm"].further_token_seconds
    assert found.break_even == break_even(llm_speed, hybrid)
    assert hybrid.times_llm == llm_speed.total_seconds / hybrid.total_seconds
    assert json.loads(json.dumps(dataclasses.asdict(found)))["workload"] == {
        **LENGTHS,
        "batch_size": 2,
        "num_beams": 2,
    }


@pytest.mark.parametrize("fusion", ["align", "llm-embed"])
def test_estimate_of_other_fusions(fusion):
    found = estimate(T5(), LLAMA(), **LENGTHS, fusion=fusion, seconds=0.1)
    assert found.fusion == fusion and found.speed["hybrid"].project_seconds > 0


def test_keys_and_values():
    """By hand: two layers, 4 heads of 8, for 5 tokens of a response and 6 of a prompt; 3 layers, 2 heads, 6 + 5 - 1 tokens."""
    found = estimate(T5(), LLAMA(), **LENGTHS, batch_size=3, num_beams=2, llm_dtype="bfloat16", seconds=0.1)
    assert found.memory["llm"].cache_bytes == 2 * 6 * 2 * 2 * 4 * 8 * (5 + 6)
    assert found.memory["hybrid"].cache_bytes == 4 * 6 * 2 * 3 * 2 * 8 * 10 == found.memory["slm"].cache_bytes


# The command ---------------------------------------------------------------------------------------------------------
@pytest.fixture
def run(capsys, monkeypatch):
    """Runs the command; gives its exit code, and what it wrote to stdout and stderr."""
    from transformers.utils import logging

    monkeypatch.setenv("COLUMNS", "80")
    verbosity = logging.get_verbosity()

    def run(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main(["estimate", *map(str, arguments)])
        return ended.value.code, *capsys.readouterr()

    yield run
    logging.set_verbosity(verbosity)
    logging.enable_progress_bar()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Configurations alone, without weights or tokenizers."""
    folders = {}
    for name in ("t5", "llama"):
        folders[name] = tmp_path_factory.mktemp("estimate") / name
        FAMILIES[name]().save_pretrained(folders[name])
    return folders


SHORT = ("--prompt-length", 6, "--output-length", 5, "--seconds", 0.2)


def test_command_tells_json(run, folders):
    code, out, _ = run(
        folders["t5"], folders["llama"], *SHORT, "--batch", 2, "--beams", 3, "--llm-dtype", "bfloat16", "--json"
    )
    told = json.loads(out)
    assert code == 0
    assert told["workload"] == {"prompt_length": 6, "output_length": 5, "batch_size": 2, "num_beams": 3}
    assert (told["llm_dtype"], told["slm_dtype"]) == ("bfloat16", "float32")
    assert set(told["speed"]) == set(told["memory"]) == {"llm", "slm", "hybrid"}
    assert told["speed"]["llm"]["times_llm"] == 1.0


def test_command_tells_a_table(run, folders):
    code, out, _ = run(folders["llama"], "--slm-layers", 1, *SHORT)
    lines = out.splitlines()
    assert code == 0 and max(map(len, lines)) <= 80
    assert lines[0].strip() == "prompts of 6 tokens, responses of 5, batch 1, greedy"
    rows = {line.rsplit(maxsplit=3)[0].strip(): line.split()[-3:] for line in lines if line.strip()}
    assert rows["project"][:2] == ["0.0", "0.0"]
    assert rows["times the LLM"][0] == "1.00"
    text = " ".join(out.split())
    assert "The hybrid is faster for" in text
    assert "The hybrid takes keys and values of the LLM's layers 2 of 3. Its checkpoint takes" in text
    assert "LLM in float32, SLM in float32; measured in" in text


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["a", "b", "c"], "`estimate` takes an LLM and an SLM, got 3 names."),
        (["a"], "Name an SLM after the LLM, or cut one from the LLM with `--slm-layers`, and not both."),
        (["a", "b", "--slm-layers", "2"], "and not both."),
        (["a", "--slm-layers", "two"], "`--slm-layers` takes a number or a list of them"),
        (
            ["a", "b", "--llm-dtype", "int8"],
            "`--llm-dtype` must be one of float32, bfloat16, float16, auto, got 'int8'.",
        ),
    ],
)
def test_command_refuses(run, folders, arguments, text):
    named = [folders["llama"] if argument in "abc" else argument for argument in arguments]
    code, out, err = run(*named, *SHORT)
    assert (code, out) == (2, "") and err.startswith("error: ") and text in err


def test_command_needs_lengths(run, folders):
    assert "Missing option '--output-length'" in run(folders["t5"], folders["t5"], "--prompt-length", 6)[2]
    assert "'--prompt-length'" in run(folders["t5"], folders["t5"], "--prompt-length", 0, "--output-length", 5)[2]
