"""REPORT.md of a study's results: for each claim the paper's figure, ours with seeds and interval, and what follows.

Owns statistics and words. Knows nothing of how results came about but their files.
"""

import json
import math
import statistics
from pathlib import Path
from typing import Any, NamedTuple, Optional

from benchmarks.study.plan import EXPERIMENTS, Experiment

__all__ = ['Difference', 'difference', 'report']

METRICS = {'knn': 'k-NN', 'linear': 'linear', 'top1': 'top-1'}


class Difference(NamedTuple):
    """Of two variants with the same seeds."""

    mean: float
    half_width: float  # of the 95% interval, infinite for one seed
    seeds: int

    def verdict(self, expected: int = 1) -> str:
        """Whether the difference has the sign that is claimed; 0 claims none."""
        if math.isinf(self.half_width):
            return 'one seed: undecided'
        if abs(self.mean) <= self.half_width:
            return 'within the interval' if expected == 0 else 'undecided: the interval holds 0'
        if expected == 0:
            return 'contradicted'
        return 'confirmed' if self.mean * expected > 0 else 'contradicted'


def difference(ours: dict[int, float], reference: dict[int, float]) -> Optional[Difference]:
    """Mean and 95% interval (Student's t) of the paired differences, seed by seed; None without a common seed."""
    pairs = [ours[s] - reference[s] for s in sorted(ours.keys() & reference.keys())]
    if not pairs:
        return None
    if len(pairs) == 1:
        return Difference(pairs[0], math.inf, 1)
    from scipy.stats import t

    error = statistics.stdev(pairs) / math.sqrt(len(pairs))
    return Difference(statistics.mean(pairs), float(t.ppf(0.975, len(pairs) - 1)) * error, len(pairs))


def load(folder: Path) -> dict[tuple[str, str], dict[int, dict[str, Any]]]:
    """(method, variant) -> seed -> result."""
    found: dict[tuple[str, str], dict[int, dict[str, Any]]] = {}
    for path in sorted(folder.glob('*-seed*.json')):
        result = json.loads(path.read_text())
        run = result['run']
        found.setdefault((run['method'], run['variant']), {})[run['seed']] = result
    return found


def values(results: dict[int, dict[str, Any]], metric: str) -> dict[int, float]:
    return {seed: r['accuracy'][metric] for seed, r in results.items() if metric in r['accuracy']}


def table(experiment: Experiment, found: dict[tuple[str, str], dict[int, dict[str, Any]]]) -> list[str]:
    """Lines of a table: a row for each variant, compared with the experiment's reference."""
    rows = []
    for method, variant, _ in experiment.runs:
        results = found.get((method, variant), {})
        if not results or (method, variant) == (method, experiment.reference):
            continue
        reference = found.get((method, experiment.reference), {})
        for metric, title in METRICS.items():
            ours, theirs = values(results, metric), values(reference, metric)
            diff = difference(ours, theirs)
            if diff is None:
                continue
            width = '' if math.isinf(diff.half_width) else f' ± {diff.half_width:.1f}'
            cells = (
                method,
                variant,
                title,
                f'{statistics.mean(theirs[s] for s in ours.keys() & theirs.keys()):.1f}',
                f'{statistics.mean(ours[s] for s in ours.keys() & theirs.keys()):.1f}',
                f'{diff.mean:+.1f}{width}',
                str(diff.seeds),
                diff.verdict(experiment.expected),
            )
            rows.append(f'| {" | ".join(cells)} |')
    if not rows:
        return ['Not run.']
    return [
        f'| method | variant | accuracy | {experiment.reference} | variant | difference | seeds | claim |',
        '|---|---|---|---:|---:|---:|---:|---|',
        *rows,
    ]


def report(folder: Path) -> str:
    """The report of the results in ``folder``, as Markdown."""
    found = load(folder)
    references = json.loads((folder / 'references.json').read_text())
    untrained = statistics.mean(references['untrained'])
    lines = [
        f'## {folder.name}',
        '',
        f'k-NN of raw pixels {references["raw pixels"]["knn"]:.1f}%, of untrained networks {untrained:.1f}%. Intervals '
        "are of 95% (Student's t), of differences between runs with the same seed, data order and initial backbone.",
    ]  # fmt: skip
    for experiment in EXPERIMENTS:
        lines += ['', f'### {experiment.name}: {experiment.claim}', '', f'The paper: {experiment.paper}', '']
        lines += table(experiment, found)
    return '\n'.join(lines) + '\n'
