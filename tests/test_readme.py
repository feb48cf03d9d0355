"""The figures in the documents are those of `benchmarks/results`."""

import pathlib
import re
import sys

import pytest

PROJECT = pathlib.Path(__file__).resolve().parent.parent
DOCUMENTS = {name: (PROJECT / name).read_text(encoding="utf-8") for name in ("README.md", "benchmarks/quality.md")}
README = DOCUMENTS["README.md"]


@pytest.fixture(scope="module")
def on_path():
    sys.path.insert(0, str(PROJECT / "benchmarks"))
    yield
    sys.path.remove(str(PROJECT / "benchmarks"))


@pytest.fixture(scope="module")
def readme(on_path):
    import readme

    return readme


@pytest.mark.parametrize("name", DOCUMENTS)
def test_figures_are_those_of_the_results(readme, name):
    """`python benchmarks/readme.py` writes them."""
    assert readme.with_figures(DOCUMENTS[name]) == DOCUMENTS[name]


def test_every_block_stands_in_one_document(readme):
    found = [name for text in DOCUMENTS.values() for name in re.findall(r"<!-- figures: ([\w-]+) -->", text)]
    assert sorted(found) == sorted(readme.BLOCKS)
    assert sum(text.count("<!-- end of figures -->") for text in DOCUMENTS.values()) == len(readme.BLOCKS)


def test_a_changed_figure_is_noticed(readme):
    figure = re.search(r"<!-- figures: .*?\| (\d+\.\d+) \|", README, re.DOTALL)
    changed = README[: figure.start(1)] + "999.9" + README[figure.end(1) :]
    assert changed != README == readme.with_figures(changed)


def test_cards_of_the_table_of_quality_have_its_figures(on_path):
    """`make cards` writes them, one for each hybrid that was trained."""
    import model_cards

    from transformers_llm2slm.card_text import quality_text, speed_text, training_text

    kinds = {
        "training": lambda record: training_text(record["settings"]),
        "quality": quality_text,
        "speed": speed_text,
    }
    files = set()
    for file, row in model_cards.quality_cards():
        card = file.read_text(encoding="utf-8")
        for record in model_cards.quality_records(row):
            assert kinds[record["kind"]](record) in card, file.name
        files.add(file.name)
    demonstration = "llm2slm-smollm2-135m-synopsis.md"
    assert files | {demonstration, "README.md", "template.md"} == {file.name for file in model_cards.CARDS.iterdir()}
    listed = (model_cards.CARDS / "README.md").read_text(encoding="utf-8")
    assert all(f"({name})" in listed for name in files)
