"""What the study's runs say of each other: which is compared with which, in what, and with what verdict.

Knows nothing of words or pictures.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple, Optional

from benchmarks import records
from benchmarks.intervals import Difference, difference
from benchmarks.study.experiment import Experiment

__all__ = ['SAME', 'Found', 'Row', 'arranged', 'load', 'rows_of', 'values']

SAME = 'same features with tokens'
Found = dict[tuple[str, str], dict[int, dict[str, Any]]]  # (method, variant) -> seed -> result


class Row(NamedTuple):
    """A variant beside its reference, in one accuracy."""

    method: str
    variant: str
    reference_variant: str
    metric: str
    paper: Optional[float]
    difference: Difference
    verdict: str  # '' where the claim is not about this accuracy


def load(path: Path) -> Found:
    """The runs of a data set."""
    return arranged(line for line in records.read(path).values() if 'run' in line)


def arranged(results: Iterable[dict[str, Any]]) -> Found:
    """Results of runs by method, variant and seed."""
    found: Found = {}
    for result in results:
        run = result['run']
        found.setdefault((run['method'], run['variant']), {})[run['seed']] = result
    return found


def values(results: dict[int, dict[str, Any]], metric: str) -> dict[int, float]:
    """Seed -> the accuracy that is called ``metric``, where there is one.

    ``a/b`` is ``b`` among ``a``, ``a - b`` a difference.
    """
    if ' - ' in metric:
        a, b = (values(results, part) for part in metric.split(' - '))
        return {seed: a[seed] - b[seed] for seed in a.keys() & b.keys()}
    first, _, second = metric.partition('/')
    out = {}
    for seed, result in results.items():
        value = result['accuracy'].get(first)
        value = value.get(second) if second and value is not None else value
        if value is not None:
            out[seed] = value
    return out


def rows_of(experiment: Experiment, found: Found) -> list[Row]:
    """Each variant that was run beside its reference."""
    rows = []
    for method, variant, against, paper, expected_here in experiment.comparisons:
        for metric, expected in (expected_here or experiment.expected).items():
            ours, reference = (
                values(found.get((method, experiment.called(name)), {}), metric) for name in (variant, against)
            )
            diff = difference(ours, reference)
            if diff is None:
                continue
            said = paper.get(metric)
            if 'top1' not in experiment.expected:  # the paper says Top-1, of k-NN or of linear probing
                said = paper.get('top1', said)
            decides = not experiment.exploratory and (not experiment.decides or metric in experiment.decides)
            verdict = diff.verdict(expected) if decides else ''
            rows.append(Row(method, variant, against, metric, said, diff, verdict))
    return rows
