"""Cached LLM states: what is stored, what is trained on it, what an interruption costs, and which caches are refused."""

from __future__ import annotations

import copy
import json
import logging
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import caching_run
import pytest
import torch
from conftest import PROMPTS, RESPONSES, Pair
from datasets import Dataset, DatasetDict
from test_trainer import losses
from transformers import AutoModel, Seq2SeqTrainer, Seq2SeqTrainingArguments

from transformers_llm2slm import (
    LLM2SLMDataCollator,
    cache_error,
    cache_llm_states,
    llm_states_cache,
)

ROWS = [{"prompt": p, "completion": c, "id": i} for i, (p, c) in enumerate(zip(PROMPTS, RESPONSES, strict=True))]
ROWS += [{"prompt": PROMPTS[0], "completion": "Again.", "id": 3}, {"prompt": "One more?", "completion": "", "id": 4}]
PAIRS = [
    Pair("t5", "t5", "add"),
    Pair("bert", "t5", "align"),
    Pair("mt5", "mt5", "replace", (("llm_layer", (0, 1, -1)),)),
    Pair("llama", "llama", "align"),
    Pair("mt5", "llama", "llm-embed"),
    Pair("llama", "qwen3", "kv"),
]


def count_read(model):
    """Prompts that the LLM reads from now on: a list of batch sizes."""
    body, batches = model.llm.get_encoder() if model.llm.config.is_encoder_decoder else model.llm, []
    body.register_forward_pre_hook(lambda _, args, kwargs: batches.append(len(kwargs["input_ids"])), with_kwargs=True)
    return batches


@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_states_are_those_of_the_llm(pair, zoo, tmp_path):
    """Whatever the padding of the batch; identical prompts are read once, and what is there is not read again."""
    model, processor = zoo.compose(pair)
    read = count_read(model)
    rows = cache_llm_states(ROWS, model, processor, tmp_path, dtype="float32", batch_size=8)
    assert read == [1, 4, 4]  # two to tell how long it takes
    assert rows.column_names[:3] == ["prompt", "completion", "id"] and rows["id"] == [0, 1, 2, 3, 4]
    assert cache_error(tmp_path) == 0
    collator = LLM2SLMDataCollator(processor)
    batch, live = collator([rows[i] for i in range(5)]), collator(ROWS)
    states = batch.pop("llm_hidden_states")
    for name, column in live.items():
        assert torch.equal(batch[name], column), name
    own = model.model.llm_states(live["input_ids"], live["attention_mask"])
    mask = live["attention_mask"].bool()
    assert states.shape == own.shape and torch.allclose(states[mask], own[mask], atol=1e-5)
    assert not states[~mask].any()
    with torch.no_grad():
        assert torch.allclose(model(**batch, llm_hidden_states=states).loss, model(**live).loss, atol=1e-5)
    read.clear()
    more = cache_llm_states(
        [*ROWS[:2], {"prompt": "New.", "completion": ""}], model, processor, tmp_path, dtype="float32"
    )
    assert read == [1, 1, 1] and torch.equal(more[1]["llm_hidden_states"], rows[1]["llm_hidden_states"])


@pytest.mark.parametrize(
    ("dtype", "tolerance", "error"),
    [
        ("float32", 1e-4, (0, 0)),
        ("float16", 1e-2, (1e-5, 1e-3)),
        ("bfloat16", 1e-2, (1e-4, 3e-3)),
        ("int8", 5e-2, (1e-3, 2e-2)),
    ],
)
@pytest.mark.parametrize("pair", [PAIRS[0], PAIRS[3]], ids=str)
def test_training_is_that_with_the_llm(pair, dtype, tolerance, error, zoo, tmp_path):
    """Same seed, dropout and all: the losses are those with the LLM, which is not there. The last step is not the first."""
    model, processor = zoo.compose(pair)
    model.save_pretrained(tmp_path / "model")
    rows = cache_llm_states(ROWS, model, processor, tmp_path / "cache", dtype=dtype)
    assert error[0] <= cache_error(tmp_path / "cache") <= error[1]
    assert rows[0]["llm_hidden_states"].dtype == {"int8": torch.float32}.get(dtype, getattr(torch, dtype))
    without = AutoModel.from_pretrained(tmp_path / "model", load_llm=False)
    assert without.llm is None
    # The cache does for a model without the LLM too, as it holds all prompts.
    rows = cache_llm_states(ROWS, without, processor, tmp_path / "cache", dtype=dtype)

    def train(model, rows):
        arguments = Seq2SeqTrainingArguments(
            str(tmp_path / "out"),
            learning_rate=1e-3,
            lr_scheduler_type="constant",
            per_device_train_batch_size=2,
            max_steps=6,
            logging_steps=1,
            save_strategy="no",
            remove_unused_columns=False,
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        )
        collator = LLM2SLMDataCollator(processor)
        trainer = Seq2SeqTrainer(model, arguments, train_dataset=rows, data_collator=collator)
        trainer.train()
        return losses(trainer)

    cached, live = train(without, rows), train(model, Dataset.from_list(ROWS))
    assert len(live) == 6 and abs(live[-1] - live[0]) > 0.1
    assert cached == pytest.approx(live, abs=tolerance)


def test_rows_go_through_what_data_sets_do(small, tmp_path):
    """Selected, shuffled: a row keeps its states."""
    model, processor = small
    rows = cache_llm_states(Dataset.from_list(ROWS), model, processor, tmp_path, dtype="float32")
    states = [row["llm_hidden_states"] for row in rows]
    shuffled = rows.shuffle(seed=1).select([4, 0, 2])
    for row in shuffled:
        assert torch.equal(row["llm_hidden_states"], states[row["id"]])
    again = cache_llm_states(rows.select([2]), model, processor, tmp_path, dtype="float32")
    assert torch.equal(again[0]["llm_hidden_states"], states[2])
    unread = cache_llm_states(rows, model, processor, tmp_path, dtype="float32")
    shutil.rmtree(tmp_path)
    with pytest.raises(ValueError, match="are gone. Make them again"):
        unread[0]


# In a process of its own: where OpenVINO has run before, as in a test of exports, what workers hand over is overwritten.
LOADED_BY_WORKERS = """
import json, pathlib, sys
import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import AutoModel, AutoProcessor
from transformers_llm2slm import LLM2SLMDataCollator, cache_llm_states

folder = pathlib.Path(sys.argv[1])
model, processor = AutoModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
rows = Dataset.from_list(json.loads((folder / "rows.json").read_text()))
rows = cache_llm_states(rows, model, processor, folder / "states", dtype="float32").shuffle(seed=1)
collator = LLM2SLMDataCollator(processor)
expected = [collator([rows[start], rows[start + 1]])["llm_hidden_states"] for start in range(0, 10, 2)]
batches = iter(DataLoader(rows, batch_size=2, num_workers=1, collate_fn=collator))
for states in expected:
    assert torch.equal(next(batches)["llm_hidden_states"], states)
print("as expected")
"""


def test_rows_loaded_by_workers_keep_their_states(folder):
    done = subprocess.run([sys.executable, "-c", LOADED_BY_WORKERS, str(folder)], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1:] == ["as expected"], done.stderr


def test_conversations(small_causal, tmp_path):
    model, processor = small_causal
    processor.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    talk = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
    rows = cache_llm_states([{"messages": talk}], model, processor, tmp_path, dtype="float32")
    batch = processor(text=["user: Hello\n"], add_special_tokens=False, return_tensors="pt")
    expected = model.model.llm_states(batch["input_ids"], batch["attention_mask"])[0]
    assert torch.allclose(rows[0]["llm_hidden_states"], expected, atol=1e-6)


# Long runs ---------------------------------------------------------------------------------------------------------------
@pytest.fixture
def folder(small, tmp_path):
    """A folder with a model, its processor and eleven rows with ten prompts."""
    model, processor = small
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    rows = [{"prompt": f"Question {'more ' * (i % 4)}{i}?", "completion": "x"} for i in range(10)]
    (tmp_path / "rows.json").write_text(json.dumps([rows[0], *rows]))
    return tmp_path


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if not file.name.startswith(".")}


def test_killed_and_started_again(folder):
    """`kill -9` in the middle costs the file that was being written; the result is that of an unbroken run, byte for byte."""
    process = subprocess.Popen(
        [sys.executable, caching_run.__file__, str(folder), "broken"], stderr=subprocess.PIPE, text=True
    )
    try:
        deadline = time.monotonic() + 120
        while len(list((folder / "broken").glob(".states-*"))) == 0 or (
            len(list((folder / "broken").glob("states-*"))) < caching_run.HANG_AT
        ):
            assert process.poll() is None and time.monotonic() < deadline, process.stderr.read()
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert len(list((folder / "broken").glob("states-*"))) == 3
    (left,) = (folder / "broken").glob(".*")
    day_ago = time.time() - 25 * 3600  # as another process may be writing what is younger
    os.utime(left, (day_ago, day_ago))
    unbroken = caching_run.run(folder, "unbroken")
    assert len(unbroken) == 1 + 5 and unbroken[0] == "cache.json"
    assert caching_run.run(folder, "broken") == unbroken[-2:]
    assert contents(folder / "broken") == contents(folder / "unbroken")
    assert not list((folder / "broken").glob(".*"))  # what was left half written is gone


def test_two_processes_at_once(small, tmp_path):
    """While one writes a file, another begins and ends with the same: both succeed, and neither leaves half a file."""
    model, processor = small
    other, read = copy.deepcopy(model), []

    def cache_the_same(*_):
        read.append(list(tmp_path.glob(".states-*")))
        if len(read) == 3:  # two to tell how long it takes, and the file that is being written
            cache_llm_states(ROWS, other, processor, tmp_path, dtype="float32")

    model.llm.get_encoder().register_forward_pre_hook(cache_the_same)
    rows = cache_llm_states(ROWS, model, processor, tmp_path, dtype="float32")
    assert len(read) == 3 and len(read[2]) == 1
    assert len(contents(tmp_path)) == 2 and len(list(tmp_path.iterdir())) == 2
    assert len(rows[0]["llm_hidden_states"]) == len(processor(text=PROMPTS[0])["input_ids"])


def test_killed_while_it_wrote_the_settings(small, tmp_path):
    model, processor = small
    left, day_ago = tmp_path / ".cache.json.0123.part", time.time() - 25 * 3600
    left.write_text("{")
    cache_llm_states(ROWS, model, processor, tmp_path)
    assert left.exists()  # another process may be writing it
    os.utime(left, (day_ago, day_ago))
    assert len(cache_llm_states(ROWS, model, processor, tmp_path)) == 5
    assert not left.exists() and len(contents(tmp_path)) == 2


def test_a_write_that_fails_leaves_nothing(small, tmp_path):
    model, processor = small
    model.llm.get_encoder().final_layer_norm.weight.data *= 1e6
    with pytest.raises(ValueError, match="more than float16 holds"):
        cache_llm_states(ROWS, model, processor, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["cache.json"]


def test_ray_workers(folder):
    """Two Ray actors write the files that one process writes, byte for byte."""
    ray = pytest.importorskip("ray")
    caching_run.run(folder, "one")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        caching_run.run(folder, "two", num_workers=2)
    finally:
        ray.shutdown()
    assert len(contents(folder / "one")) == 6 and contents(folder / "one") == contents(folder / "two")


def test_announces_what_it_takes(small, tmp_path, caplog):
    model, processor = small
    with caplog.at_level(logging.INFO, logger="transformers_llm2slm"):
        cache_llm_states(ROWS, model, processor, tmp_path, dtype="float32")
    tokens = sum(map(len, processor(text=sorted({row["prompt"] for row in ROWS}))["input_ids"]))
    text = caplog.messages[0]
    assert text.startswith(
        f"The LLM's states of 4 prompts ({tokens} tokens) take {(tokens * 32 * 4 + 320) / 1e3:.0f} kB"
    )
    assert text.endswith("s to encode.") and "Relative error of the stored states: 0" in caplog.text
    stored = sum(file.stat().st_size for file in tmp_path.glob("states-*"))
    assert tokens * 32 * 4 < stored < 1.5 * tokens * 32 * 4 + 5000


# Errors ------------------------------------------------------------------------------------------------------------------
def test_caches_of_others_are_refused(small, zoo, tmp_path):
    model, processor = small
    cache_llm_states(ROWS, model, processor, tmp_path)
    before = contents(tmp_path)

    def refused(match, model=model, processor=processor, **kwargs):
        with pytest.raises(ValueError, match=match):
            cache_llm_states(ROWS, model, processor, tmp_path, **kwargs)
        assert contents(tmp_path) == before

    refused(r"made with another maximum prompt length: expected 16, found None", max_prompt_length=16)
    refused(r"made with another dtype of the states: expected int8, found float16", dtype="int8")
    other = copy.deepcopy(model)
    other.config.llm_layer = 1
    refused(r"made with another LLM layer: expected \[1\], found \[3\]", model=other)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.llm.get_input_embeddings().weight += 0.1
    refused(
        r"made with another LLM: expected bf16-sample:\w+, found bf16-sample:\w+\. .* another `cache_dir`", model=other
    )
    refused(
        r"made with another LLM dtype: expected bfloat16, found float32", model=copy.deepcopy(model).to(torch.bfloat16)
    )
    two, unigram = zoo.compose(Pair("t5", "gpt2", "align"))
    refused(r"made with another tokenizer", processor=unigram)
    # -1 is the last of three layers.
    same = copy.deepcopy(model)
    same.config.llm_layer = 3
    assert len(cache_llm_states(ROWS, same, processor, tmp_path)) == 5


def test_a_disk_that_is_too_small(small, tmp_path, monkeypatch):
    model, processor = small
    usage = shutil._ntuple_diskusage(100, 99, 1000) if hasattr(shutil, "_ntuple_diskusage") else (100, 99, 1000)
    monkeypatch.setattr(llm_states_cache.shutil, "disk_usage", lambda folder: usage)
    error = r"take \d+ kB in float32, but the disk of .* has 1 kB left\. Choose another `cache_dir`, dtype=\"int8\""
    with pytest.raises(OSError, match=error):
        cache_llm_states(ROWS, model, processor, tmp_path, dtype="float32")
    assert not list(tmp_path.glob("*states*"))


def test_what_float16_does_not_hold(small, tmp_path):
    model, processor = small
    model.llm.get_encoder().final_layer_norm.weight.data *= 1e6
    with pytest.raises(ValueError, match=r'more than float16 holds. Store them in "bfloat16" or "int8"'):
        cache_llm_states(ROWS, model, processor, tmp_path)
    cache_llm_states(ROWS, model, processor, tmp_path / "int8", dtype="int8")
    assert 0 < cache_error(tmp_path / "int8") < 0.02


def test_bad_input(small, tmp_path):
    model, processor = small
    with pytest.raises(ValueError, match=r"Row 1 \(the first is 0\) has no text in column 'prompt'"):
        cache_llm_states([ROWS[0], {"text": "a", "prompt": None, "completion": "b"}], model, processor, tmp_path / "a")
    with pytest.raises(ValueError, match=r"`rows` is empty"):
        cache_llm_states([], model, processor, tmp_path / "a")
    with pytest.raises(TypeError, match=r"must be a `datasets.Dataset` or a list of dicts, got a DatasetDict"):
        cache_llm_states(DatasetDict(), model, processor, tmp_path / "a")
    with pytest.raises(ValueError, match=r"stored in one of float32, .*, got 'int4'"):
        cache_llm_states(ROWS, model, processor, tmp_path / "a", dtype="int4")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"is not empty, and no cache of LLM states"):
        cache_llm_states(ROWS, model, processor, tmp_path / "b")
    cache_llm_states(ROWS[:1], model, processor, tmp_path / "c")
    model.model.attach_llm(None)
    with pytest.raises(ValueError, match=r"3 of 4 prompts are not in the cache .* without its LLM"):
        cache_llm_states(ROWS, model, processor, tmp_path / "c")


def test_collator_of_another_length(small, tmp_path):
    model, processor = small
    rows = cache_llm_states(ROWS, model, processor, tmp_path, max_prompt_length=8)
    assert LLM2SLMDataCollator(processor, 8)([rows[0]])["llm_hidden_states"].shape == (1, 8, 1, 32)
    with pytest.raises(
        ValueError, match=r"states of \d\d prompt tokens, found those of 8 tokens. The cache was made with another"
    ):
        LLM2SLMDataCollator(processor)([rows[0]])
    with pytest.raises(ValueError, match=r"Row 1 of the batch needs the LLM's states .* found none"):
        LLM2SLMDataCollator(processor, 8)([rows[0], ROWS[1]])


@pytest.mark.parametrize("length", [None, 6, 12])
def test_prompts_are_cut_as_by_the_collator(small, tmp_path, length):
    """Also to a length beyond what the tokenizer says: T5's says 512, and T5 reads more."""
    model, processor = small
    processor.max_prompt_length = 8
    rows = cache_llm_states(ROWS, model, processor, tmp_path, max_prompt_length=length)
    batch = LLM2SLMDataCollator(processor, length)([rows[0]])
    assert batch["llm_hidden_states"].shape[:2] == batch["input_ids"].shape == (1, length or 8)


def test_a_cache_that_grows_under_earlier_rows(small, tmp_path):
    """Rows that were cached first keep their own states when the cache takes in the prompts of other rows."""
    model, processor = small
    parts = [[{"prompt": f"{prompt} {i}", "completion": "x"} for prompt in PROMPTS] for i in range(6)]
    cached = [cache_llm_states(part, model, processor, tmp_path / "states", dtype="float32") for part in parts]
    for part, rows in zip(parts, cached, strict=True):
        for row, plain in zip(rows, part, strict=True):
            inputs = processor(text=[plain["prompt"]], return_tensors="pt")
            expected = model.model.llm_states(inputs["input_ids"], inputs["attention_mask"])[0]
            torch.testing.assert_close(torch.as_tensor(row["llm_hidden_states"]), expected, rtol=0, atol=1e-5)
