"""The Hub over HTTP, with the real client: push in one process, load in another, online, offline, and cut off half way."""

from __future__ import annotations

import json
import pathlib
import signal
import struct
import subprocess
import sys

import pytest
from hub_endpoints import OWNER_TOKEN, STRANGER_TOKEN

FOLDER = pathlib.Path(__file__).parent
ONE, TWO = "trip/one", "trip/two"  # one tokenizer and an encoder-decoder SLM; two, a decoder-only SLM, shards, private
MODELS = {ONE: ["trip/llm", "trip/slm"], TWO: ["trip/other-llm", "trip/causal-slm"]}


class Client:
    """A process that does what it is told by `hub_client.py`. It may be given several calls, and its cache is `home`."""

    def __init__(self, hub, home, token=None, **settings):
        self.home = home
        self.process = subprocess.Popen(
            [sys.executable, str(FOLDER / "hub_client.py")],
            env=hub.environment(home, token, **settings),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def send(self, function, *args, **kwargs):
        self.process.stdin.write(json.dumps([function, args, kwargs]) + "\n")
        self.process.stdin.flush()

    def __call__(self, function, *args, **kwargs):
        """What a function gives. An error becomes a `RuntimeError` with its class and text."""
        self.send(function, *args, **kwargs)
        answer = json.loads(self.process.stdout.readline())
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer["result"]

    def close(self):
        self.process.kill()
        self.process.communicate()


@pytest.fixture(scope="module")
def start(hub):
    """Starts clients that live as long as the module."""
    clients = []

    def started(*args, **settings):
        clients.append(Client(hub, *args, **settings))
        return clients[-1]

    yield started
    for client in clients:
        client.close()


@pytest.fixture(scope="module")
def homes(tmp_path_factory):
    return tmp_path_factory.mktemp("homes")


@pytest.fixture(scope="module")
def writer(start, homes):
    """One who has logged in."""
    return start(homes / "writer", OWNER_TOKEN)


@pytest.fixture(scope="module")
def reader(start, homes):
    """Another, who has not, and whose cache is empty."""
    return start(homes / "reader")


@pytest.fixture(scope="module")
def offline(start, reader):
    """One on the reader's machine, without the Hub."""
    return start(reader.home, HF_HUB_OFFLINE="1")


@pytest.fixture(scope="module")
def pushed(hub, zoo, writer, reader, offline):
    """What the models answer that were pushed, and the requests that took. All clients start meanwhile."""
    hub.add_folder("trip/llm", pathlib.Path(zoo.checkpoint("t5", "bpe", "llm")))
    hub.add_folder("trip/slm", pathlib.Path(zoo.checkpoint("t5", "bpe", "slm")))
    hub.add_folder("trip/other-llm", pathlib.Path(zoo.checkpoint("llama", "unigram", "llm")))
    hub.add_folder("trip/causal-slm", pathlib.Path(zoo.checkpoint("llama", "bpe", "slm")))
    found = {}
    for name, pushing in {ONE: {}, TWO: {"max_shard_size": "100KB", "private": True}}.items():
        with hub.record() as requests:
            found[name] = writer("push", name, MODELS[name], pushing)
        found[name, "requests"] = requests
    return found


def files(hub, name, revision="main"):
    """The contents of the files of a repository."""
    return {path: file.content for path, file in hub.repositories[name].resolve(revision).files.items()}


def tensors(content):
    """The tensors of a safetensors file, as bytes."""
    (length,) = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    header.pop("__metadata__", None)
    return {key: data[slice(*tensor["data_offsets"])] for key, tensor in header.items()}


def paths(requests):
    return [f"{request.method} {request.path.split('?')[0]}" for request in requests]


def test_bytes_of_a_push(hub, pushed):
    """Projector and SLM go over the wire once, beside small files; nothing of the LLM does."""
    for name, models in MODELS.items():
        held = files(hub, name)
        weights = {path: content for path, content in held.items() if path.endswith(".safetensors")}
        bodies = {method: 0 for method in ("GET", "HEAD", "POST", "PUT")}
        for request in pushed[name, "requests"]:
            bodies[request.method] += request.received
        assert bodies["PUT"] == sum(map(len, weights.values()))
        # In base64, with metadata that is sent before and checked by the Hub.
        assert bodies["POST"] < 4 * sum(len(content) for path, content in held.items() if path not in weights)

        sent = {key: data for content in weights.values() for key, data in tensors(content).items()}
        assert {".".join(key.split(".")[:2]) for key in sent} == {"model.projector", "model.slm"}
        size = sum(map(len, sent.values()))
        assert sum(map(len, weights.values())) < size + 250 * len(sent)  # and the headers of the files
        llm = {data for data in tensors(files(hub, models[0])["model.safetensors"]).values() if len(set(data)) > 4}
        assert len(llm) > 20 and not llm & set(sent.values())
    assert sum(path.startswith("model-0") for path in files(hub, TWO)) > 2


def test_load_in_another_process(hub, pushed, reader):
    """By every loader, from an empty cache, with the LLM at the commit it was composed with."""
    commit = hub.repositories["trip/llm"].resolve("main").id
    with hub.record() as requests:
        assert reader("load", ONE) == pushed[ONE]
    assert pushed[ONE]["llm"] == ["trip/llm", commit]
    assert f"GET /trip/llm/resolve/{commit}/config.json" in paths(requests)
    assert not [request for request in requests if request.path.startswith("/api/models/trip/llm")]
    assert reader("load", ONE, loader="AutoModelForSeq2SeqLM") == pushed[ONE]
    assert reader("load", ONE, loader="pipeline") == pushed[ONE]
    assert reader("config", ONE) == ["llm2slm", "trip/llm", commit]


def test_a_full_cache_is_asked_first(hub, pushed, reader):
    """With everything in the cache, only what transformers asks anew each time goes to the Hub."""
    reader("load", ONE)
    with hub.record() as requests:
        reader("load", ONE)
    asked = paths(requests)
    assert asked.count(f"GET /api/models/{ONE}") == 2  # which commit: the model, the processor
    # Lists of files, for the processor and its tokenizer.
    assert all(path.startswith(f"GET /api/models/{ONE}/tree/") for path in asked if path != f"GET /api/models/{ONE}")
    assert len(asked) <= 6


def test_a_private_repository(hub, pushed, reader, tmp_path):
    """The token reaches every loader and `cache_dir` takes every file; without the token, the error says what to do."""
    for arguments in ({}, {"token": STRANGER_TOKEN}):
        with pytest.raises(RuntimeError, match=f"(?s)OSError: {TWO} is not .* private repository.*`token="):
            reader("load", TWO, **arguments)
    place = {"token": OWNER_TOKEN, "cache_dir": str(tmp_path / "cache")}
    piped = {"token": OWNER_TOKEN, "model_kwargs": {"cache_dir": str(tmp_path / "piped")}}
    repositories = [hub.repositories[name] for name in ("trip/other-llm", "trip/causal-slm")]
    for repository in repositories:
        repository.private = True
    try:
        with hub.record() as requests:
            assert reader("load", TWO, **place) == pushed[TWO]
            assert reader("load", TWO, loader="pipeline", **piped) == pushed[TWO]
            assert reader("load", TWO, force_download=True, **place) == pushed[TWO]
            assert reader("push", "trip/mine", MODELS[TWO], {"token": OWNER_TOKEN, "private": True}, **place)
        # transformers asks for the files beside a tokenizer without the token, and goes on without the answer.
        assert not [request for request in requests if request.status == 401 and "/tree/" not in request.path]
        with hub.record() as more:
            assert reader("load", TWO, local_files_only=True, **place) == pushed[TWO]
            mine = {"token": OWNER_TOKEN, "private": True}
            assert reader("push", "trip/mine", MODELS[TWO], mine, local_files_only=True, **place) == pushed[TWO]
        assert not [request for request in more if any(name in request.path for name in (TWO, *MODELS[TWO]))]
    finally:
        for repository in repositories:
            repository.private = False
    for folder in ("cache", "piped"):
        assert {path.name for path in (tmp_path / folder).glob("models--*")} >= {
            "models--trip--two",
            "models--trip--other-llm",
        }
    # `force_download` fetched the weights of both again.
    fetched = paths(requests)
    weights = [path for path in fetched if path.startswith("GET /storage/trip/other-llm")]
    assert len(weights) == 3
    # Of what the Auto classes look for first, an adapter, the default cache knows that there is none.
    default = {path.name: {inner.name for inner in path.iterdir()} for path in reader.home.glob("hub/models--trip--*")}
    assert not default["models--trip--two"] & {"blobs", "snapshots"}
    assert not default.keys() & {"models--trip--other-llm", "models--trip--causal-slm"}


def test_branch_and_tag(hub, pushed, writer, reader, offline):
    """A revision is that of model, processor and pipeline, whatever the main branch holds."""
    name = "trip/revisions"
    first = writer("push", name, MODELS[TWO], {})
    hub.repositories[name].tags["v1"] = hub.repositories[name].branches["main"]
    second = writer("push", name, MODELS[TWO], {"revision": "dev"}, seed=1)
    assert first == pushed[TWO] != second
    hub.add_files(name, {"processor_config.json": b"{}", "config.json": b"{}"})  # whoever takes these fails
    for revision, expected in {"v1": first, "dev": second}.items():
        for loader in ("AutoModel", "pipeline", "pipeline of a model"):
            assert reader("load", name, loader=loader, revision=revision) == expected
    with hub.record() as requests:
        for client, arguments in ((offline, {}), (reader, {"local_files_only": True})):
            for loader in ("AutoModel", "pipeline", "pipeline of a model"):
                assert client("load", name, loader=loader, revision="v1", **arguments) == first
        printed = reader("run", "info", name, "--revision", "dev", "--local-files-only", "--json")
        assert json.loads(printed)["parts"]["llm"]["revision"] == first["llm"][1]
    assert requests == []


def test_offline(hub, pushed, reader, offline):
    """What was loaded once is loaded again without a single request."""
    reader("load", ONE)
    with hub.record() as requests:
        for client, arguments in ((offline, {}), (reader, {"local_files_only": True})):
            for loader in ("AutoModel", "AutoModelForSeq2SeqLM", "pipeline", "pipeline of a model"):
                assert client("load", ONE, loader=loader, **arguments) == pushed[ONE]
        command = ["run", "generate", ONE, "Hello", "--max-new-tokens", "4"]
        assert offline(*command) == reader(*command, "--local-files-only")
        with pytest.raises(RuntimeError, match="OSError: .*couldn't find them in the cached files"):
            offline("load", "trip/nowhere")
    assert requests == []


def test_adapter(hub, pushed, writer, reader, offline):
    """The adapter alone is pushed, and loaded in a fresh process with the base that it names."""
    name = "trip/adapter"
    expected = writer("push_adapter", name, ONE)
    assert set(files(hub, name)) == {".gitattributes", "README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert expected["texts"] != pushed[ONE]["texts"]
    for loader in ("AutoModel", "PeftModel", "pipeline"):
        base = None if loader == "pipeline" else ONE
        assert reader("load", name, loader=loader, base=base) == expected
    with hub.record() as requests:
        for loader in ("AutoModel", "PeftModel", "pipeline"):
            assert offline("load", name, loader=loader, base=None if loader == "pipeline" else ONE) == expected
        assert reader("load", name, base=ONE, local_files_only=True) == expected
        assert reader("load", name, loader="pipeline", local_files_only=True) == expected
    assert requests == []


def test_subfolders(hub, pushed, reader, writer, tmp_path):
    """LLM and SLM in subfolders of one repository, and a checkpoint in a subfolder of its own, tokenizers too."""
    both = {f"large/{path}": content for path, content in files(hub, "trip/other-llm").items()}
    hub.add_files("trip/both", both | {f"small/{path}": c for path, c in files(hub, "trip/causal-slm").items()})
    places = {"llm_subfolder": "large", "slm_subfolder": "small"}
    composed = writer("push", "trip/of-subfolders", ["trip/both", "trip/both"], {}, **places)
    assert composed["texts"] == pushed[TWO]["texts"] and composed["llm"][0] == "trip/both"
    assert reader("load", "trip/of-subfolders") == composed
    cut = {"llm_subfolder": "large", "slm_layers": 1, "fusion": "replace"}
    cut |= {"projector_init": "fit", "fit_prompts": ["Hello", "there"]}
    assert writer("push", "trip/of-layers", ["trip/both", None], {}, **cut) == reader("load", "trip/of-layers")

    hub.add_files("trip/nested", {f"a/b/{path}": content for path, content in files(hub, TWO).items()})
    assert reader("load", "trip/nested", subfolder="a/b") == pushed[TWO]
    assert reader("load", "trip/nested", loader="pipeline of a model", subfolder="a/b") == pushed[TWO]
    assert reader("load", "trip/nested", loader="pipeline", model_kwargs={"subfolder": "a/b"}) == pushed[TWO]
    with hub.record() as requests:
        assert reader("load", "trip/nested", subfolder="a/b", local_files_only=True) == pushed[TWO]
    assert requests == []


def test_a_checkpoint_with_its_llm(hub, pushed, writer, reader, tmp_path):
    """Pushed while it is saved, it needs no other repository."""
    expected = writer("push_with_llm", "trip/whole", ONE, str(tmp_path / "whole"))
    with hub.record() as requests:
        assert reader("load", "trip/whole") == expected == pushed[ONE]
    assert not [request for request in requests if "trip/llm" in request.path]


def test_trainer(hub, pushed, writer, reader, tmp_path):
    expected = writer("train", "trip/trained", ONE, str(tmp_path / "run"))
    assert expected["logits"] != pushed[ONE]["logits"]
    held = files(hub, "trip/trained")
    assert {key.split(".")[1] for key in tensors(held["model.safetensors"])} == {"projector", "slm"}
    assert reader("load", "trip/trained") == expected


def test_commands(hub, pushed, reader, tmp_path):
    """Revision, token and cache of the command line reach every loader."""
    hub.repositories[TWO].tags["v1"] = hub.repositories[TWO].branches["main"]
    place = ["--revision", "v1", "--token", OWNER_TOKEN, "--cache-dir", str(tmp_path / "cache")]
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "Hello", "completion": "Hi"}) + "\n")
    commands = [
        ["generate", TWO, "Hello", "--max-new-tokens", "4"],
        ["info", TWO],
        ["evaluate", TWO, "--file", str(rows), "--max-new-tokens", "4", "--predictions", str(tmp_path / "out.jsonl")],
    ]
    printed = [reader("run", *command, *place) for command in commands]
    assert json.loads((tmp_path / "out.jsonl").read_text())["prediction"] == printed[0].rstrip("\n")
    with hub.record() as requests:
        assert [reader("run", *command, *place, "--local-files-only") for command in commands[:2]] == printed[:2]
    assert requests == []
    assert not (reader.home / "hub" / "models--trip--two" / "snapshots").exists()


# Connections that break ----------------------------------------------------------------------------------------------


def kill_half_way(client, transfer, *call, **kwargs):
    """Kill a client in the middle of a call, when half of a file has been sent."""
    client.send(*call, **kwargs)
    assert transfer.reached.wait(60)
    client.process.send_signal(signal.SIGKILL)
    client.process.wait()


def test_upload_that_is_cut(hub, pushed, writer, start, homes):
    """Cut once, the client goes on by itself. Killed half way, nothing shows in the repository, and the next push is whole."""
    cut = hub.interrupt("PUT", "/storage/trip/cut/")
    assert writer("push", "trip/cut", MODELS[ONE], {}) == pushed[ONE]
    assert cut.reached.is_set() and files(hub, "trip/cut")["model.safetensors"] == files(hub, ONE)["model.safetensors"]

    transfer = hub.interrupt("PUT", "/storage/trip/killed/", silent=True)
    kill_half_way(start(homes / "sender", OWNER_TOKEN), transfer, "push", "trip/killed", MODELS[ONE], {})
    assert set(files(hub, "trip/killed")) == {".gitattributes"}
    assert writer("push", "trip/killed", MODELS[ONE], {}) == pushed[ONE]
    assert files(hub, "trip/killed")["model.safetensors"] == files(hub, ONE)["model.safetensors"]


def test_download_that_is_cut(hub, pushed, reader, tmp_path):
    """Cut once, the client fetches the file again. Cut until it gives up, there is an error, nothing half is loaded, the next call works."""
    llm, place = MODELS[ONE][0], {"cache_dir": str(tmp_path / "cache")}
    cuts = [hub.interrupt("GET", f"/storage/{name}/") for name in (ONE, llm)]
    assert reader("load", ONE, cache_dir=str(tmp_path / "resumed")) == pushed[ONE]
    assert all(cut.reached.is_set() for cut in cuts)

    hub.interrupt("GET", f"/storage/{llm}/", times=6)
    with pytest.raises(RuntimeError, match=rf"OSError: The frozen LLM '{llm}' \(revision \w+\) could not be loaded"):
        reader("load", ONE, **place)
    with pytest.raises(RuntimeError, match=f"OSError: The frozen LLM '{llm}'"):
        reader("load", ONE, local_files_only=True, **place)
    assert reader("load", ONE, **place) == pushed[ONE]


def test_download_that_is_killed(hub, pushed, reader, start, homes):
    """What was there of a file is not taken for it."""
    place, transfer = {"cache_dir": str(homes / "shared")}, hub.interrupt("GET", f"/storage/{ONE}/", silent=True)
    kill_half_way(start(homes / "receiver"), transfer, "load", ONE, **place)
    with pytest.raises(RuntimeError, match="OSError: .*model.safetensors"):
        reader("load", ONE, local_files_only=True, **place)
    assert reader("load", ONE, **place) == pushed[ONE]
