"""The exact reference to an LLM: which commit a checkpoint names, and what is refused in its place."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import Pair
from transformers import AutoModel, AutoModelForCausalLM

from transformers_llm2slm import LLM2SLMForConditionalGeneration
from transformers_llm2slm.fingerprint import hub_hashes

OLD, NEW = "a" * 40, "b" * 40
REPOSITORY = "org/llm"


class Cache:
    """A cache of the Hub, of one repository with two commits; the main branch is at the newer."""

    def __init__(self, root: Path, llm: str):
        self.root = root
        tuned = root / "tuned"
        shutil.copytree(llm, tuned)
        model = AutoModelForCausalLM.from_pretrained(tuned)
        with torch.no_grad():
            model.get_parameter("model.layers.0.mlp.up_proj.weight").mul_(1.02)
        model.save_pretrained(tuned)
        self.repository = root / "models--org--llm"
        self.commits = {OLD: self.add(OLD, Path(llm)), NEW: self.add(NEW, tuned)}
        (self.repository / "refs").mkdir()
        (self.repository / "refs" / "main").write_text(NEW)

    def add(self, commit: str, folder: Path) -> Path:
        """Put the files of a folder there as the Hub's client does: blobs named by their hashes, and links to them."""
        blobs, snapshot = self.repository / "blobs", self.repository / "snapshots" / commit
        blobs.mkdir(parents=True, exist_ok=True)
        snapshot.mkdir(parents=True)
        for file in folder.iterdir():
            weights = file.suffix == ".safetensors"
            name = (hashlib.sha256 if weights else hashlib.sha1)(file.read_bytes()).hexdigest()
            shutil.copy(file, blobs / name)
            (snapshot / file.name).symlink_to(Path("..") / ".." / "blobs" / name)
        return snapshot

    @property
    def arguments(self) -> dict[str, object]:
        return {"cache_dir": str(self.root), "local_files_only": True}


@pytest.fixture
def cache(zoo, tmp_path):
    return Cache(tmp_path / "cache", zoo.checkpoint("llama", "bpe", "llm"))


def sha256(snapshot: Path) -> str:
    return hashlib.sha256((snapshot / "model.safetensors").read_bytes()).hexdigest()


def compose(zoo, cache, llm=REPOSITORY, **kwargs):
    slm = zoo.sources(Pair("llama", "t5", "replace"))[1]
    return LLM2SLMForConditionalGeneration.from_llm_slm_pretrained(
        llm, slm, fusion="replace", **cache.arguments, **kwargs
    )


def load(folder, cache, **kwargs):
    return LLM2SLMForConditionalGeneration.from_pretrained(folder, **(cache.arguments | kwargs))


def first_layer(model):
    return model.llm.get_parameter("layers.0.mlp.up_proj.weight")


def test_commit_and_files_are_recorded(zoo, cache):
    config = compose(zoo, cache).config
    assert (config.llm_name_or_path, config.llm_revision) == (REPOSITORY, NEW)
    assert config.llm_files == {"model.safetensors": sha256(cache.commits[NEW])}
    assert compose(zoo, cache, llm_revision=OLD).config.llm_files == {"model.safetensors": sha256(cache.commits[OLD])}


def test_hashes_of_a_local_folder_are_not_known(zoo):
    assert hub_hashes(Path(zoo.checkpoint("llama", "bpe", "llm")).glob("*.safetensors")) == {}


def test_main_moves_on(zoo, cache, tmp_path):
    """The recorded commit is loaded; the other one is refused where it is asked for."""
    model = compose(zoo, cache, llm_revision=OLD)
    model.save_pretrained(tmp_path / "checkpoint")
    loaded = load(tmp_path / "checkpoint", cache)
    assert torch.equal(first_layer(loaded), first_layer(model))
    message = rf"expected weights of 'org/llm' at {OLD} with fingerprint bf16-sample:\w+, found 'org/llm' at {NEW} with bf16-sample:"
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "checkpoint", cache, llm_revision=NEW)
    accepted = load(tmp_path / "checkpoint", cache, llm_revision=NEW, llm_check_fingerprint=False)
    assert not torch.equal(first_layer(accepted), first_layer(model))


def test_a_file_that_is_not_the_one(zoo, cache, tmp_path):
    """Other bytes under the recorded commit are refused, even where no sampled weight differs."""
    compose(zoo, cache, llm_revision=OLD).save_pretrained(tmp_path / "checkpoint")
    link = cache.commits[OLD] / "model.safetensors"
    data = bytearray(link.read_bytes())
    data[-4] ^= 1  # the last bit of a float32, which bfloat16 has not
    blob = link.resolve().with_name(hashlib.sha256(data).hexdigest())
    blob.write_bytes(data)
    link.unlink()
    link.symlink_to(blob)
    message = rf"of 'org/llm' at {OLD} with model.safetensors with sha256 \w{{64}}, found {blob.name} there"
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "checkpoint", cache)


def test_the_very_files_need_no_sample(zoo, cache, tmp_path, monkeypatch):
    """Where the files are those recorded, no weight is looked at."""
    compose(zoo, cache).save_pretrained(tmp_path / "checkpoint")

    def refuse(*_, **__):
        raise AssertionError("the weights were sampled")

    monkeypatch.setattr("transformers_llm2slm.reference.llm_fingerprint", refuse)
    assert load(tmp_path / "checkpoint", cache).llm is not None
    with pytest.raises(AssertionError, match="sampled"):
        load(tmp_path / "checkpoint", cache, llm_name_or_path=zoo.checkpoint("llama", "bpe", "llm"))


@pytest.mark.parametrize("place", ["local copy", "shards", "bfloat16"])
def test_the_same_weights_elsewhere(zoo, cache, tmp_path, place):
    """A local copy, other shards and another precision have other files or none that are known, and the same weights."""
    model = compose(zoo, cache, llm_revision=OLD)
    model.save_pretrained(tmp_path / "checkpoint")
    whole = AutoModelForCausalLM.from_pretrained(zoo.checkpoint("llama", "bpe", "llm"))
    whole = whole.to(torch.bfloat16) if place == "bfloat16" else whole
    whole.save_pretrained(tmp_path / "copy", max_shard_size="20kB" if place == "shards" else "1GB")
    loaded = load(tmp_path / "checkpoint", cache, llm_name_or_path=str(tmp_path / "copy"))
    torch.testing.assert_close(
        first_layer(loaded), first_layer(model), rtol=0, atol=1e-2 if place == "bfloat16" else 0
    )


@pytest.mark.parametrize("commit", [OLD, NEW])
def test_a_model_in_memory_is_known_by_its_weights(zoo, cache, commit):
    """Nothing in it tells of which commit it is but its weights, and the main branch may have moved on."""
    llm = AutoModel.from_pretrained(REPOSITORY, revision=commit, **cache.arguments)
    config = compose(zoo, cache, llm).config
    assert (config.llm_name_or_path, config.llm_revision) == (REPOSITORY, commit)
    assert config.llm_files == {"model.safetensors": sha256(cache.commits[commit])}


def test_a_model_in_memory_that_was_changed_is_not_named(zoo, cache, tmp_path, caplog):
    llm = AutoModel.from_pretrained(REPOSITORY, **cache.arguments)
    with torch.no_grad():
        llm.norm.weight.mul_(1.5)
    with caplog.at_level(logging.WARNING, logger="transformers_llm2slm.reference"):
        model = compose(zoo, cache, llm)
    assert "has other weights than 'org/llm'" in caplog.text
    assert (model.config.llm_name_or_path, model.config.llm_revision, model.config.llm_files) == (None, None, None)
    model.save_pretrained(tmp_path / "checkpoint")
    with pytest.raises(ValueError, match="The checkpoint names no LLM"):
        load(tmp_path / "checkpoint", cache)
    assert load(tmp_path / "checkpoint", cache, llm_model=llm).llm is not None


def test_a_model_in_memory_without_files_to_compare(zoo, cache, tmp_path):
    """Loaded into another cache: its name is taken, and no commit is guessed."""
    llm = AutoModel.from_pretrained(REPOSITORY, **cache.arguments)
    slm = zoo.checkpoint("t5", "bpe", "slm")
    arguments = {"cache_dir": str(tmp_path / "empty"), "local_files_only": True}
    model = LLM2SLMForConditionalGeneration.from_llm_slm_pretrained(llm, slm, fusion="replace", **arguments)
    assert (model.config.llm_name_or_path, model.config.llm_revision) == (REPOSITORY, None)


# Over HTTP -----------------------------------------------------------------------------------------------------------------
CLIENT = """
import json, sys
from transformers import AutoModel
import transformers_llm2slm

results = []
for checkpoint, kwargs in json.loads(sys.argv[1]):
    try:
        model = AutoModel.from_pretrained(checkpoint, **kwargs)
        results.append(model.llm.get_parameter("layers.0.mlp.up_proj.weight").double().sum().item())
    except (OSError, ValueError) as error:
        results.append(str(error))
print(json.dumps(results))
"""


def client(hub, home, *loads):
    """What a fresh process gets that loads these checkpoints with these arguments: a sum of weights, or an error."""
    done = subprocess.run(
        [sys.executable, "-c", CLIENT, json.dumps(loads)],
        env=hub.environment(home),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_repository_of_the_llm_moves_on(zoo, cache, hub, tmp_path):
    """A new commit with other weights: the old one is loaded. The old one gone: the error names both."""
    model = compose(zoo, cache, llm_revision=OLD)
    expected = pytest.approx(first_layer(model).double().sum().item())
    commits = {}
    for name in ("reference/changed", "reference/same"):
        commits[name] = hub.add_folder(name, cache.commits[OLD])
        model.config.llm_name_or_path, model.config.llm_revision = name, commits[name]
        model.save_pretrained(tmp_path / name)
    changed, same = (str(tmp_path / name) for name in commits)

    hub.add_folder("reference/changed", cache.commits[NEW])
    warm, empty = {"cache_dir": str(tmp_path / "warm")}, {"cache_dir": str(tmp_path / "empty")}
    assert client(hub, tmp_path / "home", (changed, warm)) == [expected]

    new, again = hub.squash("reference/changed"), hub.squash("reference/same")
    with hub.record() as requests:
        results = client(
            hub,
            tmp_path / "home",
            (changed, empty),
            (changed, empty | {"llm_revision": new}),
            (changed, empty | {"llm_revision": "main", "llm_check_fingerprint": False}),
            (changed, warm),
            (changed, warm | {"load_llm": "whole"}),
            (same, empty),
            (same, empty | {"llm_revision": again}),
        )
    old = commits["reference/changed"]
    gone, refused, accepted, cached, whole, gone_too, found = results
    assert (
        f"The commit {old} of 'reference/changed', the LLM this model was trained with, is gone from the Hub" in gone
    )
    assert (
        f"The main branch is at {new}, and its weight files are others. Pass a copy of the LLM with `llm_name" in gone
    )
    assert f"expected weights of 'reference/changed' at {old}" in refused
    assert f"found 'reference/changed' at {new} with" in refused
    assert isinstance(accepted, float) and accepted != expected
    assert cached == whole == expected
    assert not list((tmp_path / "home").glob("hub/models--*"))  # `cache_dir` is where everything was looked for
    assert f"The main branch is at {again}, and its weight files are the same" in gone_too and found == expected
    # Nothing was downloaded to know that the weights are others.
    downloads = [i for i, request in enumerate(requests) if request.path.endswith("model.safetensors")]
    questions = [i for i, request in enumerate(requests) if "api/models/reference/changed?blobs" in request.path]
    assert questions[0] < downloads[0]
