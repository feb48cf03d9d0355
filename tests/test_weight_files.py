"""Files of weights: safetensors only, of their own repository, for checkpoints, LLMs, SLMs and adapters."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
from conftest import Pair
from safetensors.torch import load_file
from transformers import AutoModel

from transformers_llm2slm import LLM2SLMForConditionalGeneration, lora_config
from transformers_llm2slm.validation import check_weight_index
from transformers_llm2slm.weight_files import replacing_weights, stale_weights

load = LLM2SLMForConditionalGeneration.from_pretrained
PAIR = Pair("llama", "t5", "replace")


@pytest.fixture
def folders(zoo, tmp_path):
    """Copies of an LLM and an SLM, and a checkpoint of the two."""
    llm, slm = (
        shutil.copytree(source, tmp_path / name)
        for source, name in zip(zoo.sources(PAIR), ("llm", "slm"), strict=True)
    )
    LLM2SLMForConditionalGeneration.from_llm_slm_pretrained(str(llm), str(slm), fusion="replace").save_pretrained(
        tmp_path / "checkpoint", max_shard_size="100kB"
    )
    return llm, slm, tmp_path / "checkpoint"


def pickle_weights(folder, name="pytorch_model.bin"):
    weights = load_file(folder / "model.safetensors")
    torch.save(weights, folder / name)
    (folder / "model.safetensors").unlink()


def unsharded(checkpoint):
    load(checkpoint).save_pretrained(checkpoint)


def test_only_safetensors_are_written(folders, tmp_path):
    model = load(folders[2])
    model.save_pretrained(tmp_path / "saved", save_llm=True, safe_serialization=False)
    endings = {file.suffix for file in (tmp_path / "saved").rglob("*") if file.is_file()}
    assert endings == {".json", ".safetensors"}


def test_weights_of_an_earlier_save_go(folders):
    """Saved in one file over shards, and in shards over one file: the others would be read, or fill the disk."""
    checkpoint = folders[2]
    model = load(checkpoint)
    (checkpoint / "model_of_mine.safetensors").write_bytes(b"")
    sharded = {file.name for file in checkpoint.glob("model-*")}
    assert len(sharded) > 2
    with torch.no_grad():
        model.projector.layers[0].bias.add_(1)
    model.save_pretrained(checkpoint)
    assert {file.name for file in checkpoint.glob("model*")} == {"model.safetensors", "model_of_mine.safetensors"}
    assert torch.equal(load(checkpoint).projector.layers[0].bias, model.projector.layers[0].bias)
    model.save_pretrained(checkpoint, max_shard_size="100kB")
    index = {"model.safetensors.index.json", "model_of_mine.safetensors"}
    assert {file.name for file in checkpoint.glob("model*")} == sharded | index


def test_only_the_main_process_deletes(tmp_path):
    """What another process finds changed, the main process has written, or is about to."""
    old, new = (tmp_path / name for name in ("model-00001-of-00001.safetensors", "model.safetensors"))
    old.write_bytes(b"old")
    for is_main_process in (False, True):
        with replacing_weights(tmp_path, is_main_process):
            new.write_bytes(b"new")
        assert old.exists() is not is_main_process
        new.unlink()


def test_weights_that_are_there_twice_are_refused(folders):
    checkpoint = folders[2]
    shutil.copy(next(iter(checkpoint.glob("model-*"))), checkpoint / "model.safetensors")
    with pytest.raises(ValueError, match="holds weights twice, in 'model.safetensors' and in the shards of .* Delete"):
        load(checkpoint)


def test_stale_weights():
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"]
    held = [*shards, "model.safetensors", "model.fp16.safetensors", "llm/model.safetensors", "README.md"]
    assert stale_weights(held, ["model.safetensors", "config.json"]) == shards
    assert stale_weights(held, [*shards, "config.json"]) == ["model.safetensors"]
    assert stale_weights(held, ["config.json"]) == []  # nothing of weights was written


def test_pickles_are_refused(folders, monkeypatch):
    """Of a checkpoint always; of LLM and SLM unless they are asked for, which transformers reads with `weights_only`."""
    llm, slm, checkpoint = folders
    unsharded(checkpoint)
    logits = load(checkpoint)(input_ids=torch.tensor([[5, 6]])).logits
    for folder in folders:
        pickle_weights(folder)
    message = r"found its weights are pickles \(pytorch_model.bin\), which can run code when they are read. Convert them with"
    for loading in (load, AutoModel.from_pretrained, lambda folder: load(folder, use_safetensors=False)):
        with pytest.raises(
            OSError, match=rf"Expected weights of '.*checkpoint' in .*, {message} `save_pretrained`\.$"
        ):
            loading(checkpoint)
    (checkpoint / "pytorch_model.bin").rename(checkpoint / "pytorch_model-00001-of-00001.bin")
    (checkpoint / "pytorch_model.bin.index.json").write_text("{}")
    with pytest.raises(OSError, match="found its weights are pickles"):
        load(checkpoint)
    compose = LLM2SLMForConditionalGeneration.from_llm_slm_pretrained
    with pytest.raises(OSError, match=rf"(?s){message} .*, or accept them with `llm_use_safetensors=False`\."):
        compose(str(llm), str(slm), fusion="replace")
    with pytest.raises(OSError, match=rf"{message} .*, or accept them with `slm_use_safetensors=False`\."):
        compose(str(llm), str(slm), fusion="replace", llm_use_safetensors=False)
    model = compose(str(llm), str(slm), fusion="replace", llm_use_safetensors=False, slm_use_safetensors=False)
    model.save_pretrained(checkpoint)
    with pytest.raises(OSError, match="`llm_use_safetensors=False`"):
        load(checkpoint)
    assert load(checkpoint, llm_use_safetensors=False)(input_ids=torch.tensor([[5, 6]])).logits.shape == logits.shape


def test_what_a_trainer_leaves_is_not_read(folders):
    """`training_args.bin`, `optimizer.pt` and the like lie beside the weights of every checkpoint of a Trainer."""
    for name in ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "scaler.pt"):
        (folders[2] / name).write_bytes(b"no pickle that could be read")
    assert load(folders[2]).llm is not None


def test_no_weights_at_all(folders):
    for file in folders[2].glob("*.safetensors*"):
        file.unlink()
    with pytest.raises(OSError, match=r"in 'model.safetensors' or 'model.safetensors.index.json', found none\.$"):
        load(folders[2])


def test_files_that_are_cut_off_or_not_safetensors(folders):
    shard = sorted(folders[2].glob("*.safetensors"))[-1]
    whole = shard.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"\x80\x04K\x01."):
        shard.write_bytes(content)
        with pytest.raises(
            OSError, match=rf"{shard.name}' can't be read as safetensors: .*\. Delete it, and download"
        ):
            load(folders[2])


def test_processes_checkpoints_are_not_read(folders):
    (folders[2] / "shard-00000-model-00001-of-00001.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="of a checkpoint that several processes wrote, which is not read"):
        load(folders[2])


def test_weights_outside_of_the_repository(folders, tmp_path):
    """Safetensors elsewhere on this machine are not taken for weights of the checkpoint, nor of an LLM."""
    llm, _, checkpoint = folders
    index_file = checkpoint / "model.safetensors.index.json"
    index = json.loads(index_file.read_text())
    key, shard = next(iter(index["weight_map"].items()))
    shutil.move(checkpoint / shard, tmp_path / shard)
    for outside in (f"../{shard}", str(tmp_path / shard)):
        index["weight_map"] = {name: outside if file == shard else file for name, file in index["weight_map"].items()}
        index_file.write_text(json.dumps(index))
        with pytest.raises(
            ValueError, match=re.escape(f"The file of {key!r} in 'model.safetensors.index.json' must lie")
        ):
            load(checkpoint)
        index["weight_map"] = {name: shard if file == outside else file for name, file in index["weight_map"].items()}
    shutil.move(tmp_path / shard, checkpoint / shard)
    index_file.write_text(json.dumps(index))
    shutil.move(llm / "model.safetensors", tmp_path / "elsewhere.safetensors")
    (llm / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": {"model.norm.weight": "../elsewhere.safetensors"}})
    )
    with pytest.raises(ValueError, match=r"must lie inside its repository, got '\.\./elsewhere"):
        load(checkpoint)


@pytest.mark.parametrize(
    ("index", "text"),
    [
        ([], "is no index of weights"),
        ({"metadata": {}, "weight_map": {}}, "is no index of weights"),
        ({"weight_map": {"a": "model.safetensors"}}, "must hold the objects `metadata` and `weight_map`"),
        ({"metadata": {}, "weight_map": {"a": 5}}, "The file of 'a' in 'index' must lie inside its repository, got 5"),
        ({"metadata": {}, "weight_map": {"a": "model.bin"}}, "must be safetensors, got 'model.bin'"),
    ],
)
def test_indices(index, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        check_weight_index(index, "index")


# PEFT 0.21 asks by the old name what transformers 5.23 calls `activation_checkpointing`.
@pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing:FutureWarning")
def test_adapters(folders, tmp_path):
    """An adapter that is a pickle is refused where we load it, by class and by `AutoModel`; its base is checked too."""
    peft = pytest.importorskip("peft")
    checkpoint, adapter = folders[2], tmp_path / "adapter"
    model = load(checkpoint)
    peft.get_peft_model(model, lora_config(model)).save_pretrained(adapter)
    for loader in (LLM2SLMForConditionalGeneration, AutoModel):
        assert loader.from_pretrained(adapter).llm is not None
    config_file = checkpoint / "config.json"
    config = config_file.read_text()
    config_file.write_text(json.dumps(json.loads(config) | {"projector_num_layers": 10_000}))
    for loader in (LLM2SLMForConditionalGeneration, AutoModel):
        with pytest.raises(ValueError, match=r"`projector_num_layers` must lie in \[0, 1,000\]"):
            loader.from_pretrained(adapter)
    config_file.write_text(config)
    torch.save(load_file(adapter / "adapter_model.safetensors"), adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    for loader in (LLM2SLMForConditionalGeneration, AutoModel):
        with pytest.raises(
            OSError, match="The adapter .* has no 'adapter_model.safetensors'; pickles, which can run code"
        ):
            loader.from_pretrained(adapter)
