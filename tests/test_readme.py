"""The figures in the documents are those of `benchmarks/results`."""

import pathlib
import re
import sys

import pytest

PROJECT = pathlib.Path(__file__).resolve().parent.parent
DOCUMENTS = {name: (PROJECT / name).read_text(encoding="utf-8") for name in ("README.md", "benchmarks/quality.md")}
README = DOCUMENTS["README.md"]


@pytest.fixture(scope="module")
def readme():
    sys.path.insert(0, str(PROJECT / "benchmarks"))
    import readme

    yield readme
    sys.path.remove(str(PROJECT / "benchmarks"))


@pytest.mark.parametrize("name", DOCUMENTS)
def test_figures_are_those_of_the_results(readme, name):
    """`python benchmarks/readme.py` writes them."""
    assert readme.with_figures(DOCUMENTS[name]) == DOCUMENTS[name]


def test_every_block_stands_in_the_readme(readme):
    assert set(re.findall(r"<!-- figures: ([\w-]+) -->", README)) == readme.BLOCKS.keys()
    assert README.count("<!-- figures:") == README.count("<!-- end of figures -->") == len(readme.BLOCKS)


def test_a_changed_figure_is_noticed(readme):
    figure = re.search(r"<!-- figures: .*?\| (\d+\.\d+) \|", README, re.DOTALL)
    changed = README[: figure.start(1)] + "999.9" + README[figure.end(1) :]
    assert changed != README == readme.with_figures(changed)
