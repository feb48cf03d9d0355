"""Model cards on a Hub: written by the first push, updated in place by the next, over HTTP with the real client."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Pair, Zoo
from hub_endpoints import OWNER_TOKEN
from hub_server import HubServer
from huggingface_hub import ModelCard

CLIENT = """
import json, logging, sys
from pathlib import Path
import torch
from huggingface_hub import HfApi, ModelCard
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments
from transformers_llm2slm import (
    LLM2SLMDataCollator, LLM2SLMForConditionalGeneration, LLM2SLMModelCardMixin, LLM2SLMProcessor
)
from transformers_llm2slm.measurements import write_record

class Warnings(logging.Handler):
    def emit(self, record):
        warnings.append(record.getMessage())

folder, local_llm = map(Path, sys.argv[1:])
warnings, cards = [], {}
logging.getLogger("transformers_llm2slm").addHandler(Warnings())
api = HfApi()

def note(name, repository="owner/mine"):
    card = ModelCard.load(repository)
    card.validate()
    cards[name] = Path(api.hf_hub_download(repository, "README.md")).read_bytes().decode()

model = LLM2SLMForConditionalGeneration.from_llm_slm_pretrained("org/llm", "org/slm", fusion="add")
processor = LLM2SLMProcessor.from_llm_slm_pretrained("org/llm", "org/slm", fusion="add")
processor.push_to_hub("owner/mine")
note("boilerplate")
model.push_to_hub("owner/mine", tags=["given"])
note("first")
processor.push_to_hub("owner/mine")
note("after the processor")
text = cards["first"].replace("## Limits", "## What I know\\n\\nIt sings.\\n\\n## Limits")
text = text.replace("tags:", "license: mit\\nmine: 1\\ntags:\\n- mine").replace("<!-- /llm2slm:limits -->", "By me.")
api.upload_file(path_or_fileobj=text.encode(), path_in_repo="README.md", repo_id="owner/mine")
cards["edited"] = text
model.save_pretrained(folder / "mine")
quality = {"kind": "quality", "data": {"name": "org/rows"}, "metrics": {"rougeL": 12.25}}
write_record(folder / "mine", quality)
LLM2SLMForConditionalGeneration.from_pretrained(folder / "mine").push_to_hub("owner/mine")
note("with the records of the folder it was loaded from")
with torch.no_grad():
    model.projector.layers[0].weight.add_(1)
model.name_or_path = str(folder / "mine")
model.push_to_hub("owner/mine")
note("trained on")

(folder / "local").mkdir()
(folder / "local" / "README.md").write_text(text.replace("It sings.", "It dances."))
assert not warnings
model.config.llm_name_or_path = str(local_llm)
model.save_pretrained(folder / "local", push_to_hub=True, repo_id="owner/local")
note("local", "owner/local")

class CardTrainer(LLM2SLMModelCardMixin, Seq2SeqTrainer):
    pass

options = {"max_steps": 1, "report_to": "none", "use_cpu": True, "remove_unused_columns": False, "disable_tqdm": True}
args = Seq2SeqTrainingArguments(str(folder / "run"), hub_model_id="owner/trained", **options)
rows = [{"prompt": "Hello there!", "completion": "Hi"}]
collator = LLM2SLMDataCollator(processor)
trainer = CardTrainer(model, args, train_dataset=rows, data_collator=collator, processing_class=processor)
trainer.train()
trainer.push_to_hub(dataset="org/rows", license="mit")
note("trainer", "owner/trained")

held = []
model.config.llm_name_or_path = "org/llm"
for size in ("50KB", "50GB", "50KB"):
    model.push_to_hub("owner/resharded", max_shard_size=size)
    held.append([file for file in api.list_repo_files("owner/resharded") if "safetensors" in file])
print(json.dumps([cards, warnings, held]))
"""


@pytest.fixture(scope="module")
def pushed(
    hub: HubServer, zoo: Zoo, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, str], list[str], list[list[str]], str]:
    """The cards that a person and a model's pushes make one after another, warnings, weights, and the local LLM's folder."""
    llm, slm = zoo.sources(Pair("t5", "t5", "add"))
    for name, folder, license in (("org/llm", llm, "apache-2.0"), ("org/slm", slm, "mit")):
        hub.create(name)
        hub.add_folder(name, Path(folder))
        hub.add_files(name, {"README.md": f"---\nlicense: {license}\n---\n".encode()})
    home = tmp_path_factory.mktemp("card_push")
    command = [sys.executable, "-c", CLIENT, str(home), llm]
    environment = hub.environment(home / "home", OWNER_TOKEN)
    client = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert client.returncode == 0, client.stderr
    return *json.loads(client.stdout.splitlines()[-1]), llm


def test_the_first_push_replaces_the_boilerplate(pushed: tuple) -> None:
    cards = pushed[0]
    assert "Model Card for Model ID" in cards["boilerplate"]
    card = ModelCard(cards["first"])
    assert "[More Information Needed]" not in card.text and card.text.lstrip().startswith("# mine\n")
    assert 'pipeline("text2text-generation", model="owner/mine")' in card.text
    assert (card.data.base_model, card.data.tags) == (["org/llm", "org/slm"], ["given", "llm2slm"])
    assert "- LLM: [org/llm](https://huggingface.co/org/llm): `apache-2.0`\n- SLM: " in card.text
    assert cards["after the processor"] == cards["first"]


def test_later_pushes_keep_what_a_person_wrote(pushed: tuple) -> None:
    cards = pushed[0]
    edited, later = ModelCard(cards["edited"]), ModelCard(cards["with the records of the folder it was loaded from"])
    new = later.text.partition("<!-- llm2slm:results")[2].partition("<!-- /llm2slm:results")[0]
    assert "12.25" in new and "12.25" in str(later.data)
    # Nothing else in the text has changed.
    start = "<!-- llm2slm:results -->\nNot measured.\n"
    assert later.text.replace(f"<!-- llm2slm:results{new}", start) == edited.text
    assert (later.data.license, later.data.mine, later.data.tags) == ("mit", 1, ["mine", "given", "llm2slm"])
    # Weights that were not measured are not said to have been.
    stale = ModelCard(cards["trained on"]).text
    assert "_Of earlier weights" in stale and "12.25" in stale and "It sings." in stale and "By me." in stale


def test_a_local_card_is_what_a_new_repository_gets(pushed: tuple) -> None:
    cards, warnings, _, llm = pushed
    card = ModelCard(cards["local"])
    assert "It dances." in card.text and card.data.license == "mit" and "owner/local" in card.text
    assert len(warnings) == 1 and "names its LLM by a folder of this machine" in warnings[0]
    assert "`save_llm=True`" in warnings[0] and llm in warnings[0]
    assert str(Path(llm).parent) not in cards["local"] and "llm_name_or_path=..." in card.text


def test_a_trainer_pushes_our_card(pushed: tuple) -> None:
    card = ModelCard(pushed[0]["trainer"])
    assert (card.data.datasets, card.data.license) == (["org/rows"], "mit")
    assert "- steps: 1\n" in card.text and 'model="owner/trained"' in card.text
    assert "- Weights of this checkpoint: " in card.text and "generated_from_trainer" not in str(card)


def test_weights_of_an_earlier_push_go(pushed: tuple) -> None:
    """In other files, they would be loaded in the place of the newer ones."""
    shards, whole, again = pushed[2]
    assert whole == ["model.safetensors"] and shards == again and "model.safetensors.index.json" in shards
