"""The example that lets a whole LLM answer the prompts: what it writes, in which order, and after having been killed."""

from __future__ import annotations

import importlib.util
import json
import pathlib
import subprocess
import sys

import pytest
import torch
from conftest import train_tokenizer
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

SCRIPT = pathlib.Path(__file__).parents[1] / "examples" / "generate_teacher_labels.py"
PROMPTS = [
    "Hello there!",
    "translate English to German: The house is wonderful.",
    "What writes quickly?",
    "Hello there!",
    "naïve, 12 tokens",
    "A small model writes, naïve but quick, 12 tokens a second. A large one reads.",
    "Hi",
]
# Runs the script in a process that kills itself in the middle of its third batch.
KILLED = """
import os, runpy, signal, sys
from transformers import GenerationMixin
generate, calls = GenerationMixin.generate, []
def third_time_killed(*args, **kwargs):
    calls.append(1)
    if len(calls) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return generate(*args, **kwargs)
GenerationMixin.generate = third_time_killed
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("generate_teacher_labels", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture(params=["llama", "t5"])
def llm(request, zoo):
    return zoo.checkpoint(request.param, "bpe", "llm")


@pytest.fixture
def prompts(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"text": prompt, "completion": "old"}) + "\n" for prompt in PROMPTS))
    return file


def command(llm, prompts, output_file, *more):
    settings = {
        "model_name_or_path": llm,
        "train_file": prompts,
        "prompt_column": "text",
        "output_file": output_file,
        "max_new_tokens": 6,
        "batch_size": 2,
    }
    return [f"--{name}={value}" for name, value in settings.items()] + list(more)


def rows_of(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def answer_by_hand(llm, text, **kwargs):
    """The greedy answer to one text alone."""
    tokenizer = AutoTokenizer.from_pretrained(llm)
    auto = AutoModelForSeq2SeqLM if "t5" in llm else AutoModelForCausalLM
    model = auto.from_pretrained(llm)
    ids = tokenizer(text, return_tensors="pt", **kwargs)["input_ids"]
    sequence = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)[0]
    return tokenizer.decode(sequence[0 if "t5" in llm else ids.shape[1] :], skip_special_tokens=True).strip()


# Answers -----------------------------------------------------------------------------------------------------------------
def test_answers_in_the_order_of_the_rows(script, llm, prompts, tmp_path, capsys, monkeypatch):
    """Batched by length and padded, every row gets the answer that its prompt gets alone; the same prompt is asked once."""
    asked = []
    answer = script.answer
    monkeypatch.setattr(script, "answer", lambda *args: asked.append(args[2]) or answer(*args))
    file = tmp_path / "answers.jsonl"
    script.main(command(llm, prompts, file))
    expected = [{"prompt": prompt, "completion": answer_by_hand(llm, prompt)} for prompt in PROMPTS]
    assert rows_of(file) == [row for row in expected if row["completion"]] and len(expected[0]["completion"]) > 2
    assert [len(batch) for batch in asked] == [2, 2, 2]
    assert asked[0][0] == PROMPTS[5] and asked[2][1] == "Hi"
    assert "7 rows, 6 different prompts." in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["answers.jsonl", "prompts.jsonl"]


def test_templates(script, zoo, prompts, tmp_path):
    """The instruction stays when the prompt is cut; the chat's tokens are not doubled; the output has the row's prompt."""
    llm = tmp_path / "llm"
    AutoModelForCausalLM.from_pretrained(zoo.checkpoint("llama", "bpe", "llm")).save_pretrained(llm)
    tokenizer = train_tokenizer("bpe")
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.chat_template = "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
    tokenizer.save_pretrained(llm)
    words = ["--prompt_template=Shorter: {prompt}!", "--max_prompt_length=3", "--max_samples=2"]
    beginnings = [tokenizer.decode(tokenizer(text)["input_ids"][:3]) for text in PROMPTS[:2]]
    assert all(text.startswith(start) and start != text for text, start in zip(PROMPTS, beginnings, strict=False))

    plain, chat = tmp_path / "plain.jsonl", tmp_path / "chat.jsonl"
    script.main(command(llm, prompts, plain, *words, "--keep_template"))
    expected = [answer_by_hand(str(llm), f"Shorter: {start}!") for start in beginnings]
    assert rows_of(plain) == [
        {"prompt": f"Shorter: {prompt}!", "completion": text} for prompt, text in zip(PROMPTS, expected, strict=False)
    ]
    script.main(command(llm, prompts, chat, *words, "--apply_chat_template", "--system_prompt=Be brief."))
    expected = [
        answer_by_hand(
            str(llm), f"<s>system: Be brief.\n<s>user: Shorter: {start}!\nassistant:", add_special_tokens=False
        )
        for start in beginnings
    ]
    assert rows_of(chat) == [
        {"prompt": prompt, "completion": text} for prompt, text in zip(PROMPTS, expected, strict=False)
    ]


def test_empty_and_cut_answers_are_counted(script, zoo, prompts, tmp_path, capsys, monkeypatch):
    """Of six prompts' answers one is empty, two end, and three don't: the row without an answer is left out."""
    llm = zoo.checkpoint("llama", "bpe", "llm")
    tokenizer = AutoTokenizer.from_pretrained(llm)
    answers = {"Hi": "</s>", "What writes quickly?": "Hi</s></s></s>", "naïve, 12 tokens": " Hi </s>"}

    def generate(self, input_ids, **kwargs):
        texts = [text.strip() for text in tokenizer.batch_decode(input_ids, skip_special_tokens=True)]
        ids = [tokenizer(answers.get(text, "A small model"), add_special_tokens=False)["input_ids"] for text in texts]
        longest = max(map(len, ids))
        written = torch.tensor([row + [tokenizer.pad_token_id] * (longest - len(row)) for row in ids])
        return torch.cat([input_ids, written], dim=1)

    monkeypatch.setattr("transformers.GenerationMixin.generate", generate)
    file = tmp_path / "answers.jsonl"
    script.main(command(llm, prompts, file))
    expected = [(prompt, "Hi" if prompt in answers else "A small model") for prompt in PROMPTS if prompt != "Hi"]
    assert [(row["prompt"], row["completion"]) for row in rows_of(file)] == expected
    out = capsys.readouterr().out
    assert (
        "6 rows, 6 different prompts.\n1 rows are left out: their answers are empty.\n3 answers were cut short" in out
    )


# Killed and started again ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("sampling", [[], ["--do_sample", "--temperature=2", "--top_p=0.9"]])
def test_resumed_run_writes_the_same_file(script, zoo, prompts, tmp_path, sampling, monkeypatch):
    """Killed in the third batch, with a line half written besides: byte for byte the file of a run that was not."""
    llm = zoo.checkpoint("llama", "bpe", "llm")
    whole, file = tmp_path / "whole.jsonl", tmp_path / "answers.jsonl"
    script.main(command(llm, prompts, whole, "--batch_size=1", *sampling))
    arguments = command(llm, prompts, file, "--batch_size=1", *sampling)
    killed = subprocess.run([sys.executable, "-c", KILLED, str(SCRIPT), *arguments], capture_output=True)
    assert killed.returncode == -9, killed.stderr
    partial = tmp_path / "answers.jsonl.partial"
    assert not file.exists() and len(rows_of(partial)) == 3  # the settings and two batches
    with partial.open("a") as torn:
        torn.write('{"batch": 2, "rows": [1], "comp')

    batches = []
    answer = script.answer
    monkeypatch.setattr(script, "answer", lambda *args: batches.append(args[2]) or answer(*args))
    script.main(arguments)
    assert len(batches) == 4 and file.read_bytes() == whole.read_bytes() and not partial.exists()


def test_other_settings_are_refused(script, zoo, prompts, tmp_path):
    llm = zoo.checkpoint("llama", "bpe", "llm")
    file = tmp_path / "answers.jsonl"
    arguments = command(llm, prompts, file)
    for seed, answers in (
        (8, []),
        (42, [(["Hi", "Ho"], 0)]),
    ):  # the first run ends without an answer, and binds nobody
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(script, "answer", lambda *_, answers=answers: answers.pop())
            with pytest.raises(IndexError):
                script.main([*arguments, f"--seed={seed}"])
    with pytest.raises(
        SystemExit, match="made with other settings: num_beams was 1, is 2; seed was 42, is 7. Go on with"
    ):
        script.main([*arguments, "--num_beams=2", "--seed=7"])
    prompts.write_text(prompts.read_text().replace("Hello", "Good day"))
    with pytest.raises(SystemExit, match="made with other settings: SHA-256 of the prompts was [0-9a-f]{64}, is"):
        script.main(arguments)
    file.write_text("precious")
    with pytest.raises(SystemExit, match="answers.jsonl exists already: remove it, or choose another --output_file"):
        script.main(arguments)
    assert file.read_text() == "precious"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            ["--prompt_template=Translate"],
            "error: --prompt_template must say where the prompt goes, {prompt}: 'Translate'",
        ),
        (["--system_prompt=Be brief."], "--system_prompt is a message of a chat: add --apply_chat_template"),
        (["--top_p=0.5"], "--temperature and --top_p belong to sampling: add --do_sample"),
        (["--batch_size=0"], "--batch_size must be above 0, got 0"),
        (["--max_prompt_length=0"], "--max_prompt_length must be above 0, got 0"),
        (["--prompt_column=prompt"], "has no column 'prompt'; its columns are text, completion"),
        (["--apply_chat_template"], "has no chat template: leave --apply_chat_template out"),
    ],
)
def test_arguments_that_make_no_sense(script, zoo, prompts, tmp_path, more, message):
    llm = zoo.checkpoint("llama", "bpe", "llm")
    with pytest.raises(SystemExit, match=message):
        script.main(command(llm, prompts, tmp_path / "answers.jsonl", *more))
    assert [path.name for path in tmp_path.iterdir()] == ["prompts.jsonl"]
