"""Scores of many answers at once, and what resampling the test rows says about them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

import numpy as np
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU, CHRF
from sacrebleu.metrics.base import Metric

RESAMPLES = 2000
Interval = tuple[float, float]


class RowScores:
    """
    Scores of one contestant, mean over its seeds, on any choice of test rows.

    Args:
        answers (`Sequence[Sequence[str]]`): For each seed its answers.
        references (`Sequence[str]`): In the same order.
    """

    def __init__(self, answers: Sequence[Sequence[str]], references: Sequence[str]):
        self.answers, self.references = answers, references

    @cached_property
    def _rouge(self) -> dict[str, np.ndarray]:
        """F-measures in percent by row, mean over the seeds."""
        kinds = ["rouge1", "rouge2", "rougeL"]
        scorer = RougeScorer(kinds, use_stemmer=True)
        scored = [
            [scorer.score(reference, text) for reference, text in zip(self.references, texts, strict=True)]
            for texts in self.answers
        ]
        return {
            kind: np.mean([[100 * row[kind].fmeasure for row in rows] for rows in scored], axis=0) for kind in kinds
        }

    @cached_property
    def _statistics(self) -> dict[str, tuple[Metric, list[np.ndarray]]]:
        """What sacreBLEU counts in each row, for each seed: a corpus' score is made of the rows' sums."""
        metrics: dict[str, Metric] = {"bleu": BLEU(force=True), "chrf": CHRF()}
        return {
            name: (
                metric,
                [
                    np.array(metric._extract_corpus_statistics(list(texts), [list(self.references)]))
                    for texts in self.answers
                ],
            )
            for name, metric in metrics.items()
        }

    def on(self, metric: str, rows: np.ndarray | None = None) -> float:
        """The score on these rows, by default all: `rouge1`, `rouge2`, `rougeL`, `bleu` or `chrf`."""
        rows = np.arange(len(self.references)) if rows is None else rows
        if metric in self._rouge:
            return float(self._rouge[metric][rows].mean())
        scorer, statistics = self._statistics[metric]
        return float(np.mean([scorer._aggregate_and_compute([part[rows].sum(axis=0)]).score for part in statistics]))


def interval(
    function: Callable[[np.ndarray], float], count: int, resamples: int = RESAMPLES, level: float = 0.95
) -> Interval:
    """
    The percentile bootstrap's interval of a figure, over test rows drawn with replacement.

    Args:
        function: From row numbers to the figure. One that compares two contestants gets the same rows for both (paired).
        count: Number of rows.
    """
    generator = np.random.default_rng(0)
    values = [function(generator.integers(count, size=count)) for _ in range(resamples)]
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
