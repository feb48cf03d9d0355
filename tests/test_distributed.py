"""Training in two processes under `accelerate launch`, DDP and FSDP2: the same run as in one process."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import distributed_run
import pytest
import torch
from conftest import PROMPTS, RESPONSES, Pair
from safetensors.torch import load_file
from transformers import AutoModel

CONFIGS = pathlib.Path(__file__).parent.parent / "examples" / "accelerate"
# One SLM of each kind: T5 has one matrix under four names, Llama's LLM another dtype; and an SLM that trains without its
# LLM, on states from a file.
MODELS = {
    "encoder-decoder": (Pair("llama", "t5", "align"), {}, None),
    "decoder-only": (Pair("llama", "llama", "align"), {"llm_dtype": "bfloat16"}, None),
    "without-llm": (Pair("gpt2", "t5", "replace", (("slm_encoder", "skip"),)), {}, "states.pt"),
}
STEPS = range(1, distributed_run.MAX_STEPS + 1)


@dataclasses.dataclass
class Run:
    """What a run left behind in its folder."""

    folder: pathlib.Path

    @property
    def checkpoint(self) -> pathlib.Path:
        return self.folder / f"checkpoint-{distributed_run.MAX_STEPS}"

    @property
    def state(self) -> dict:
        return json.loads((self.checkpoint / "trainer_state.json").read_text())

    @property
    def losses(self) -> dict[int, list[float]]:
        """Loss and gradient norm of each step."""
        return {log["step"]: [log["loss"], log["grad_norm"]] for log in self.state["log_history"] if "loss" in log}


def make_folder(zoo, kind, folder):
    """A model without dropout, with rows and the LLM's states for them."""
    pair, options, _ = MODELS[kind]
    model, processor = zoo.compose(pair, **options)
    model.config.slm_config.dropout_rate = 0.0
    rows = [
        {"prompt": f"{prompt} {index}", "completion": response[: 4 + 5 * index]}
        for index in range(4)
        for prompt, response in zip(PROMPTS, RESPONSES, strict=True)
    ]
    states = []
    for row in rows:
        batch = processor(text=[row["prompt"]], return_tensors="pt")
        states.append(model.model.llm_states(batch["input_ids"], batch["attention_mask"])[0].float())
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    (folder / "rows.json").write_text(json.dumps(rows))
    torch.save(states, folder / "states.pt")


@pytest.fixture(scope="module")
def folders(zoo, tmp_path_factory):
    """A folder for each model, with its runs in one process."""
    root = tmp_path_factory.mktemp("distributed")
    for kind, (_, _, states) in MODELS.items():
        make_folder(zoo, kind, root / kind)
        distributed_run.run(root / kind, "one", states=states)
    return root


@pytest.fixture(scope="module", params=["ddp_cpu", "fsdp2"])
def launched(request, folders):
    """All runs of one configuration, and those that resume them, in one pair of processes."""
    runs, name = [], request.param
    for kind, (_, _, states) in MODELS.items():
        runs.append({"folder": str(folders / kind), "name": name, "states": states})
        checkpoint = f"{name}/checkpoint-{distributed_run.SAVE_STEPS}"
        runs.append(runs[-1] | {"name": f"{name}-resumed", "resume_from": checkpoint})
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", CONFIGS / f"{request.param}.yaml"]
    command += ["--main_process_port", "0", "--num_processes", "2"]
    result = subprocess.run(
        [*command, distributed_run.__file__, json.dumps(runs)],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return request.param


@pytest.mark.parametrize("kind", MODELS)
def test_two_processes_are_one(folders, launched, kind):
    """Losses, gradients and weights are those of one process with the same global batch; so are they once resumed."""
    one, two, resumed = (Run(folders / kind / name) for name in ("one", launched, f"{launched}-resumed"))
    assert (one.state["train_batch_size"], two.state["train_batch_size"]) == (4, 2)
    assert list(one.losses) == list(STEPS) and len({loss for loss, _ in one.losses.values()}) == len(STEPS)
    expected = load_file(one.checkpoint / "model.safetensors")
    for run in (two, resumed):
        assert (run.checkpoint / "rng_state_1.pth").exists()
        assert (run.checkpoint / "pytorch_model_fsdp.bin").exists() == (launched == "fsdp2")
        assert list(run.losses) == list(STEPS)
        for step in STEPS:
            assert run.losses[step] == pytest.approx(one.losses[step], abs=1e-3), step
        torch.testing.assert_close(load_file(run.checkpoint / "model.safetensors"), expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("kind", MODELS)
def test_checkpoint_is_slim(folders, launched, kind):
    """Two processes leave one checkpoint, of projector and SLM, each tensor once; it loads, and finds its LLM."""
    folder = folders / kind / launched
    assert [file.name for file in folder.glob("*.safetensors")] == ["model.safetensors"]
    weights = load_file(folder / "model.safetensors")
    assert weights.keys() == load_file(folders / kind / "model.safetensors").keys()
    assert {name.split(".")[1] for name in weights} == {"projector", "slm"}
    if launched == "fsdp2":
        for_resuming = torch.load(folder / f"checkpoint-{distributed_run.MAX_STEPS}" / "pytorch_model_fsdp.bin")
        assert {name.split(".")[1] for name in for_resuming} == {"projector", "slm"}
    loaded, one = (AutoModel.from_pretrained(folders / kind / name) for name in (launched, "one"))
    assert loaded.llm is not None
    torch.testing.assert_close(loaded.state_dict(), one.state_dict(), rtol=0, atol=1e-3)
    untrained = AutoModel.from_pretrained(folders / kind).projector.state_dict()
    assert [name for name, value in loaded.projector.state_dict().items() if torch.equal(value, untrained[name])] == []
