"""Checkpoints: the LLM by exact reference, errors that say what was expected, found and to be done."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap

import pytest
import torch
from conftest import PROMPTS, SMALL, SMALL_CAUSAL, Pair
from transformers import AutoModel, AutoModelForCausalLM

from transformers_llm2slm import LLM2SLMForConditionalGeneration, loading
from transformers_llm2slm import checkpoint as checkpoint_module
from transformers_llm2slm.checkpoint import checkpoint_state_dict, is_checkpoint_key

load = LLM2SLMForConditionalGeneration.from_pretrained


def test_state_dict_holds_each_module_once(zoo):
    """T5's embedding has three names and one module; its LM head is another module with the same matrix."""
    model, _ = zoo.compose(Pair("llama", "t5", "replace"))
    names = {name for name in model.state_dict() if model.get_parameter(name) is model.slm.shared.weight}
    assert names == {"model.slm.shared.weight", "model.slm.lm_head.weight"}
    assert model.load_state_dict(model.state_dict()) == ([], [])
    # What is gathered from several processes no longer shows what is tied.
    gathered = {name: value.clone() for name, value in model.state_dict().items()}
    assert gathered.keys() - checkpoint_state_dict(model, gathered).keys() == {"model.slm.lm_head.weight"}


def test_loading_from_memory(small):
    """A configuration and a state dict in place of a name, as any `from_pretrained` takes them."""
    model, _ = small
    loaded = load(None, config=model.config, state_dict=model.state_dict())
    assert torch.equal(loaded.projector.layers[0].weight, model.projector.layers[0].weight)
    assert torch.equal(next(loaded.llm.parameters()), next(model.llm.parameters()))


def test_layers_of_both_parts(zoo):
    """What FSDP shards one by one and device maps keep together: the layers that there are, as long as they are."""
    model, _ = zoo.compose(Pair("llama", "bart", "replace", (("slm_encoder", "skip"),)))
    assert model._no_split_modules == model.model._no_split_modules == {"LlamaDecoderLayer", "BartDecoderLayer"}
    model.model.attach_llm(None)
    assert model._no_split_modules == {"BartDecoderLayer"}


def test_fsdp_that_would_lose_the_llm_is_refused(checkpoint, monkeypatch):
    """accelerate's loading by the first process only: asked for before the model is loaded, or after."""
    whole = load(checkpoint).to("meta")
    with pytest.raises(ValueError, match="Set `fsdp_cpu_ram_efficient_loading: false`"):
        whole.state_dict()
    assert load(checkpoint, load_llm=False).to("meta").state_dict()["model.slm.shared.weight"].is_meta
    monkeypatch.setattr("transformers_llm2slm.loading.is_fsdp_enabled", lambda: True)
    with pytest.raises(ValueError, match="`load_llm=False`"):
        load(checkpoint)


@pytest.fixture
def checkpoint(zoo, tmp_path):
    """A checkpoint whose LLM is a copy of its own, so that a test may spoil it."""
    llm, slm = zoo.sources(Pair("llama", "t5", "replace"))
    shutil.copytree(llm, tmp_path / "llm-repository")
    model = LLM2SLMForConditionalGeneration.from_llm_slm_pretrained(
        str(tmp_path / "llm-repository"), slm, fusion="replace"
    )
    model.save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def spoil(folder, change):
    """Load the LLM of a folder, change it, save it again."""
    llm = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        change(llm)
    llm.save_pretrained(folder)


def test_is_checkpoint_key():
    assert is_checkpoint_key("projector.layers.0.weight") and is_checkpoint_key("slm.lm_head.weight")
    assert not is_checkpoint_key("llm.layers.0.weight")


def test_other_weights_under_the_same_name_are_refused(checkpoint):
    """Changed as little as a fine-tuning does it: one value in a hundred of each matrix by one percent."""

    def change(llm):
        for parameter in llm.parameters():
            parameter.flatten()[::97] *= 1.01

    spoil(checkpoint.parent / "llm-repository", change)
    message = (
        r"The LLM is not the one this model was trained with: expected weights of .*llm-repository' with fingerprint "
        r"bf16-sample:\w{32}, found .*llm-repository' with bf16-sample:\w{32}\. Pass the right LLM with `llm_name_or_path="
    )
    with pytest.raises(ValueError, match=message):
        load(checkpoint)
    assert load(checkpoint, llm_check_fingerprint=False).llm is not None


def test_llm_of_another_width_is_refused(checkpoint, zoo):
    other = zoo.checkpoint("qwen3", "unigram", "llm")
    with pytest.raises(
        ValueError, match="trained with: expected `model_type` 'llama' .*, found 'qwen3' .*Pass the right"
    ):
        load(checkpoint, llm_name_or_path=other)
    config_file = checkpoint.parent / "llm-repository" / "config.json"
    config = json.loads(config_file.read_text()) | {"hidden_size": 64}
    config_file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="expected `hidden_size` 48 .*, found 64 "):
        load(checkpoint)


def test_llm_checkpoint_that_lacks_weights_is_refused(checkpoint):
    from safetensors.torch import load_file, save_file

    file = checkpoint.parent / "llm-repository" / "model.safetensors"
    weights = load_file(file)
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match="does not hold the whole LLM LlamaModel: missing layers.1.mlp.up_proj.weight"
    ):
        load(checkpoint)


def test_a_local_copy_a_model_in_memory_and_another_precision(checkpoint):
    logits = load(checkpoint)(input_ids=torch.tensor([[5, 6]])).logits
    moved = checkpoint.parent / "moved"
    (checkpoint.parent / "llm-repository").rename(moved)
    for arguments in (
        {"llm_name_or_path": str(moved)},
        {"llm_model": AutoModel.from_pretrained(moved)},
        {"llm_model": AutoModelForCausalLM.from_pretrained(moved)},
    ):
        model = load(checkpoint, **arguments)
        torch.testing.assert_close(model(input_ids=torch.tensor([[5, 6]])).logits, logits, rtol=0, atol=1e-6)
    through_auto = AutoModel.from_pretrained(checkpoint, llm_name_or_path=str(moved), llm_dtype=torch.bfloat16)
    assert through_auto.llm.dtype is torch.bfloat16 and through_auto.dtype is torch.float32
    # float16 rounds otherwise than the fingerprint; it is then taken from the files.
    assert load(checkpoint, llm_name_or_path=str(moved), llm_dtype=torch.float16).llm.dtype is torch.float16


def test_an_error_that_passes_is_told(checkpoint, monkeypatch):
    """A second try might succeed, and would load an LLM that nothing was compared with."""
    real, calls = loading.load_config, []

    def load_config(*arguments):
        calls.append(arguments)
        if len(calls) == 1:
            raise OSError("503 Server Error")
        return real(*arguments)

    for module in (checkpoint_module, loading):
        monkeypatch.setattr(module, "load_config", load_config)
    with pytest.raises(OSError, match=r"The frozen LLM .* could not be loaded: 503 Server Error\nPass a local copy"):
        load(checkpoint)
    assert load(checkpoint).llm is not None


def test_load_llm_false(checkpoint):
    shutil.rmtree(checkpoint.parent / "llm-repository")
    model = load(checkpoint, load_llm=False)
    assert model.llm is None
    with pytest.raises(
        ValueError, match=r"loaded without its LLM \(`load_llm=False`\).*`llm_hidden_states=`.*`prompt=`"
    ):
        model(input_ids=torch.tensor([[5, 6]]))
    states = torch.randn(1, 2, 48)
    assert model.generate(llm_hidden_states=states, max_new_tokens=3).shape[0] == 1


def test_checkpoint_of_a_nameless_llm(zoo, tmp_path):
    llm = AutoModelForCausalLM.from_config(
        AutoModelForCausalLM.from_pretrained(zoo.checkpoint("llama", "bpe", "llm")).config
    )
    llm.name_or_path = ""
    slm = zoo.checkpoint("t5", "bpe", "slm")
    model = LLM2SLMForConditionalGeneration.from_llm_slm_pretrained(llm, slm, fusion="replace")
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="names no LLM: it was composed of a model in memory. Pass .*`llm_model=`"):
        load(tmp_path)
    assert load(tmp_path, llm_model=llm).llm is not None


def test_incomplete_checkpoint_of_another_configuration(checkpoint):
    config_file = checkpoint / "config.json"
    config_file.write_text(json.dumps(json.loads(config_file.read_text()) | {"projector_hidden_size": 8}))
    with pytest.raises((ValueError, RuntimeError), match="size|shape"):
        load(checkpoint, load_llm=False)


def run(code: str, **environment: str) -> str:
    """Run code in a fresh process and return what it prints."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(("names", "online"), [(("org/gated", "org/missing"), True), (("org/offline",), False)])
def test_llm_that_can_not_be_reached(checkpoint, hub, names, online, tmp_path):
    """Gated, not there, or offline: the error names the LLM and says how to pass a local copy."""
    config = json.loads((checkpoint / "config.json").read_text())
    for name in names:
        shutil.copytree(checkpoint, tmp_path / name)
        names_it = config | {"llm_name_or_path": name, "llm_revision": "a" * 40}
        (tmp_path / name / "config.json").write_text(json.dumps(names_it))
    code = f"""
        import json, transformers_llm2slm
        from transformers import AutoModel
        errors = []
        for name in {names!r}:
            try:
                AutoModel.from_pretrained({str(tmp_path)!r} + "/" + name)
            except OSError as error:
                errors.append(str(error))
        print(json.dumps(errors))
    """
    hub.create("org/gated", gated=True)
    errors = json.loads(run(code, **hub.environment(tmp_path / "cache", HF_HUB_OFFLINE="0" if online else "1")))
    for name, error in zip(names, errors, strict=True):
        assert f"The frozen LLM {name!r} (revision {'a' * 40}) could not be loaded" in error
        assert "Pass a local copy with `llm_name_or_path=`" in error and "`load_llm=False`" in error
        assert ("gated" in error.replace(name, "")) == (name == "org/gated")


def test_loads_in_another_process(zoo, tmp_path):
    """Import, AutoModel, AutoProcessor, pipeline: the same text as the model in memory, for one tokenizer and two."""
    folders, expected = [], []
    for pair in (SMALL, SMALL_CAUSAL):
        folders.append(str(tmp_path / pair.fusion))
        model, processor = zoo.compose(pair)
        model.save_pretrained(folders[-1])
        processor.save_pretrained(folders[-1])
        inputs = processor(text=PROMPTS[0], return_tensors="pt")
        expected += 2 * [processor.decode(model.generate(**inputs, max_new_tokens=8)[0], skip_special_tokens=True)]
    printed = run(
        f"""
        import json, transformers_llm2slm
        from transformers import AutoModel, AutoProcessor, pipeline
        texts = []
        for folder in {folders!r}:
            model = AutoModel.from_pretrained(folder)
            processor = AutoProcessor.from_pretrained(folder)
            inputs = processor(text={PROMPTS[0]!r}, return_tensors="pt")
            texts.append(processor.decode(model.generate(**inputs, max_new_tokens=8)[0], skip_special_tokens=True))
            pipe = pipeline("text2text-generation", model=folder)
            texts.append(pipe({PROMPTS[0]!r}, max_new_tokens=8)[0]["generated_text"])
        print(json.dumps(texts))
        """
    )
    assert json.loads(printed) == expected


def test_loading_takes_little_more_memory_than_the_parts(tmp_path):
    """Peak memory over a process that only imports: at most 1.2 x the parts, and no decoder of an encoder-decoder LLM."""
    from transformers import T5Config, T5ForConditionalGeneration

    big = T5Config(vocab_size=8000, d_model=512, d_ff=2048, num_layers=6, num_heads=8, decoder_start_token_id=0)
    small = T5Config(vocab_size=8000, d_model=256, d_ff=1024, num_layers=4, num_heads=4, decoder_start_token_id=0)
    T5ForConditionalGeneration(big).save_pretrained(tmp_path / "llm")
    T5ForConditionalGeneration(small).save_pretrained(tmp_path / "slm")
    model = LLM2SLMForConditionalGeneration.from_llm_slm_pretrained(
        str(tmp_path / "llm"), str(tmp_path / "slm"), fusion="replace"
    )
    model.save_pretrained(tmp_path / "checkpoint")
    printed = run(
        f"""
        import json
        import torch, transformers_llm2slm
        from transformers import AutoModel

        def peak():
            return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))

        AutoModel.from_pretrained({str(tmp_path / "slm")!r})  # what transformers imports on its first load
        before = peak()
        model = AutoModel.from_pretrained({str(tmp_path / "checkpoint")!r})
        touched = sum(float(p.sum()) for p in model.parameters())  # every page is read in
        sizes = [sum(p.numel() * 4 for p in part.parameters()) for part in (model.llm, model.projector, model.slm)]
        print(json.dumps([peak() - before, sizes]))
        """
    )
    grown, (llm, projector, slm) = json.loads(printed)
    assert llm < 0.5 * (tmp_path / "llm" / "model.safetensors").stat().st_size
    assert grown <= 1.2 * (llm + projector + slm)
