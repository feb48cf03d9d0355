"""The harness of `benchmarks/quality.py`: its cells, its scores and its intervals."""

import functools
import json
import pathlib
import sys

import numpy as np
import pytest
import sacrebleu

from transformers_llm2slm.evaluation import text_scores

BENCHMARKS = pathlib.Path(__file__).resolve().parent.parent / "benchmarks"
REFERENCES = ["a server for small files", "tools for fonts", "library for reading maps", "game of chess"]
ANSWERS = ["a server for files", "fonts", "library for maps", "a game of chess for two"]


@pytest.fixture(scope="module", autouse=True)
def benchmarks_on_path():
    sys.path.insert(0, str(BENCHMARKS))
    yield
    sys.path.remove(str(BENCHMARKS))


def test_cells_have_names_of_their_own_and_stand_in_one_file_each():
    from quality_tables import TABLES, TASKS, cells_of

    cells = cells_of(TABLES, tuple(TASKS))
    assert len({(cell.task, cell.name) for cell in cells}) == len(cells) > 10
    assert all(len(cell.name) < 200 and "/" not in cell.name for cell in cells)


def test_only_the_main_table_is_measured_on_test_rows():
    from quality_tables import ABLATIONS, MAIN

    assert {cell.split for rows in MAIN.values() for row in rows for cell in row.cells} == {"test"}
    factors = [row for tables in ABLATIONS.values() for rows in tables.values() for row in rows]
    assert {cell.split for row in factors for cell in row.cells} == {"validation"}


def test_a_hybrid_is_compared_with_an_slm_trained_alike():
    from quality_tables import HYBRID, MAIN

    for rows in MAIN.values():
        alone = {row.name: row.cells[0] for row in rows}
        for row in rows:
            cell = row.cells[0]
            if cell.contestant == HYBRID and row.beside is not None:
                other = alone[row.beside]
                trained = ("steps", "rows", "batch_size", "learning_rate")
                assert all(getattr(cell, name) == getattr(other, name) for name in trained)
                assert cell.slm_layers in (other.slm_layers, len(other.slm_layers))


def test_name_says_what_differs_from_the_defaults():
    from quality_cells import HYBRID, Cell

    cell = Cell("synopsis", HYBRID, slm_layers=(0, 29), fusion="kv", seed=1)
    assert cell.name == "LLM-to-SLM_slm_layers=0+29_fusion=kv_seed=1"


@pytest.mark.parametrize("metric", ["rouge1", "rouge2", "rougeL", "bleu", "chrf"])
def test_scores_on_all_rows_are_those_of_text_scores(metric):
    from quality_scores import RowScores

    expected = text_scores(ANSWERS, REFERENCES)[metric]
    assert RowScores([ANSWERS], REFERENCES).on(metric) == pytest.approx(expected)
    # Two seeds: the mean.
    both = RowScores([ANSWERS, REFERENCES], REFERENCES).on(metric)
    assert both == pytest.approx((expected + text_scores(REFERENCES, REFERENCES)[metric]) / 2)


def test_scores_on_drawn_rows_count_a_row_as_often_as_it_was_drawn():
    from quality_scores import RowScores

    rows = np.array([0, 0, 3, 1])
    drawn = [[texts[row] for row in rows] for texts in (ANSWERS, REFERENCES)]
    found = RowScores([ANSWERS], REFERENCES).on("chrf", rows)
    assert found == pytest.approx(sacrebleu.corpus_chrf(drawn[0], [drawn[1]]).score)


def test_interval_is_as_wide_as_the_standard_error_says():
    from quality_scores import interval

    values = np.random.default_rng(1).normal(10.0, 3.0, size=400)
    low, high = interval(lambda rows: float(values[rows].mean()), 400)
    error = values.std() / 20
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.05)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.05)


def test_interval_of_a_difference_is_paired():
    from quality_scores import interval

    values = np.random.default_rng(1).normal(10.0, 3.0, size=100)
    # One contestant is better by one in every row: of that, resampling the rows leaves nothing to doubt.
    assert interval(lambda rows: float((values + 1)[rows].mean() - values[rows].mean()), 100) == pytest.approx((1, 1))


def test_stored_results_have_an_answer_for_each_row(monkeypatch):
    from nltk.stem.porter import PorterStemmer
    from quality_models import read_rows

    stem = functools.cache(PorterStemmer().stem)  # ROUGE stems the same words again and again
    monkeypatch.setattr(PorterStemmer, "stem", lambda self, word: stem(word))
    files = sorted((BENCHMARKS / "results" / "quality").glob("*/*.json"))
    assert files
    for file in files:
        result = json.loads(file.read_text(encoding="utf-8"))
        split = result["settings"].get("split", "test")
        assert len(result["answers"]) == len(read_rows(result["task"], split)), file
        references = [" ".join(row["completion"].split()) for row in read_rows(result["task"], split)]
        scores = text_scores(result["answers"], references)
        assert {name: round(value, 3) for name, value in scores.items()}.items() <= result["metrics"].items(), file


def test_verdict_says_what_is_sure_and_what_was_missed():
    from quality_report import verdicts
    from quality_speed import ALIKE

    alone = "SLM alone, 4 layers"
    row = {
        "beside": alone,
        "above the SLM alone": 2.0,
        "above the SLM alone, interval": [-0.5, 4.5],
        "gap closed, %": 40.0,
        "gap closed, interval": [-10.0, 80.0],
        "of the LLM's score, %": 98.5,
    }
    decoding = "decoding, times the LLM"
    speed = {"synopsis": {name: {decoding: x, ALIKE: x} for name, x in {alone: 5.0, "LLM-to-SLM": 4.5}.items()}}
    text = verdicts("synopsis", {alone: {}, "LLM-to-SLM": row}, speed)
    assert "not surely above `SLM alone, 4 layers`, +2.0 ROUGE-L (-0.5 to 4.5), at 0.90 x its decoding speed" in text
    assert "40 % (-10 % to 80 %)" in text and "98 % at 4 x: reached." in text
    speed["synopsis"]["LLM-to-SLM"] = {decoding: 3.9, ALIKE: 2.6}
    text = verdicts("synopsis", {alone: {}, "LLM-to-SLM": row}, speed)
    assert "at 3.90 x its decoding speed, 2.60 x alike. The aim, 98 % at 4 x: missed." in text
    below = row | {"above the SLM alone, interval": [-4.5, -0.5]}
    assert "surely below `SLM alone, 4 layers`" in verdicts("synopsis", {"LLM-to-SLM": below}, speed)
    assert "missed." in verdicts("synopsis", {"LLM-to-SLM": row | {"above the SLM alone, interval": [0.1, 1]}}, speed)
    assert verdicts("synopsis", {"LLM-to-SLM": row}, {}) == ""
    text = verdicts("synopsis", {"LLM-to-SLM": {"of the LLM's score, %": 98.5}}, speed)
    assert "`LLM-to-SLM`: its SLM alone has not been trained. It has 98.5 %" in text


def test_every_stored_result_stands_in_a_table():
    from quality import file_of
    from quality_tables import TABLES, TASKS, cells_of

    stored = set((BENCHMARKS / "results" / "quality").glob("*/*.json"))
    assert stored <= {file_of(cell) for cell in cells_of(TABLES, tuple(TASKS))}
