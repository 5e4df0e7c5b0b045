"""REPORT.md of the study's results: for each claim the paper's figure, ours with seeds and interval, and what follows.

    python -m benchmarks.study.report               # benchmarks/REPORT.md, of benchmarks/results/study

Owns statistics and words. Knows nothing of how results came about but their files.
"""

import argparse
import itertools
import json
import math
import statistics
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple, Optional

from benchmarks.study import draw
from benchmarks.study.methods import ABLATIONS
from benchmarks.study.plan import EXPERIMENTS, TITLES, Experiment

__all__ = ['Difference', 'arranged', 'difference', 'load', 'report', 'values']

RESULTS = Path(__file__).parents[1] / 'results' / 'study'
METRICS = {
    'knn': 'k-NN',
    'linear': 'linear',
    'top1': 'classifier',
    'patches/all': 'k-NN, mean of patches',
    'fine-tuned': 'fine-tuned',
    'knn with tokens': 'k-NN, tokens present',
    'knn of the ensemble': 'k-NN of the ensemble',
    'knn of the ensemble - knn': 'k-NN, ensemble minus global',
    'knn with tokens - knn': 'k-NN, lost by removal',
    'patches/all - knn': 'k-NN, patches minus class token',
}
SIDE_BY_SIDE = 'two networks side by side are better than one'
RANDOM_TOKENS = 'a better encoder improves tokens that were never trained'
Found = dict[tuple[str, str], dict[int, dict[str, Any]]]  # (method, variant) -> seed -> result


class Difference(NamedTuple):
    """Of two variants with the same seeds."""

    mean: float
    half_width: float  # of the 95% interval, infinite for one seed
    seeds: int

    def __str__(self) -> str:
        return f'{self.mean:+.1f}' + ('' if math.isinf(self.half_width) else f' ± {self.half_width:.1f}')

    def verdict(self, expected: int = 1) -> str:
        """Whether the difference has the sign that is claimed; 0 claims none."""
        if math.isinf(self.half_width):
            return 'one seed: undecided'
        if abs(self.mean) <= self.half_width:
            if expected == 0:
                return 'no difference seen'
            return 'undecided, as claimed on average' if self.mean * expected > 0 else 'undecided'
        if expected == 0:
            return 'contradicted'
        return 'confirmed' if self.mean * expected > 0 else 'contradicted'


class Row(NamedTuple):
    """A variant beside its reference, in one accuracy."""

    method: str
    variant: str
    reference_variant: str
    metric: str
    paper: Optional[float]
    reference: float
    ours: float
    difference: Difference
    verdict: str


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


def load(folder: Path) -> Found:
    """The results in ``folder``."""
    return arranged(json.loads(path.read_text()) for path in sorted(folder.glob('*-seed*.json')))


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
    for method, variant, against, paper in experiment.comparisons:
        for i, (metric, expected) in enumerate(experiment.expected.items()):
            ours, reference = (
                values(found.get((method, experiment.called(name)), {}), metric) for name in (variant, against)
            )
            diff = difference(ours, reference)
            if diff is None:
                continue
            common = ours.keys() & reference.keys()
            means = (statistics.mean(of[s] for s in common) for of in (reference, ours))
            said = paper.get(metric)
            if i == 0 and 'top1' not in experiment.expected:  # the paper doesn't say which
                said = paper.get('top1', said)
            rows.append(Row(method, variant, against, metric, said, *means, diff, diff.verdict(expected)))
    return rows


def table(experiment: Experiment, rows: list[Row]) -> list[str]:
    if not rows:
        return ['Not run yet.']
    lines = [
        '| method | variant | against | accuracy | against | variant | difference | paper | seeds | claim |',
        '|---|---|---|---|---:|---:|---:|---:|---:|---|',
    ]
    for r in rows:
        cells = (
            TITLES[r.method], r.variant, r.reference_variant, METRICS[r.metric], f'{r.reference:.1f}', f'{r.ours:.1f}',
            str(r.difference), '' if r.paper is None else f'{r.paper:+.1f}', str(r.difference.seeds), r.verdict,
        )  # fmt: skip
        lines.append(f'| {" | ".join(cells)} |')
    return lines


def epochs_of(experiment: Experiment, found: Found) -> str:
    """How long its runs were."""
    epochs: dict[str, set[int]] = {}
    for v in experiment.variants:
        for result in found.get((v.method, experiment.called(v.name)), {}).values():
            epochs.setdefault(TITLES[v.method], set()).add(result['run']['epochs'])
    each = (f'{method} {" and ".join(map(str, sorted(numbers)))}' for method, numbers in epochs.items())
    return f'Epochs here: {", ".join(each)}.' if epochs else ''


def in_words(verdicts: Iterable[str]) -> str:
    """How often a claim was confirmed."""
    counts = Counter(verdicts)
    return ', '.join(f'{n} {verdict}' for verdict, n in counts.most_common()) if counts else 'not run'


def mean_of(values: Any) -> str:
    values = list(values)
    if not values:
        return ''
    return f'{statistics.mean(values):.1f}' + (f' ({min(values):.1f} to {max(values):.1f})' if len(values) > 1 else '')


def baselines(found: Found, references: dict[str, Any]) -> list[str]:
    """Whether the plain runs learned."""
    lines = [
        '| method, plain | epochs | k-NN | k-NN, untrained | gain | linear | classifier |',
        '|---|---:|---:|---:|---:|---:|---:|',
    ]
    for method, variant in itertools.product(TITLES, ('plain', 'plain, short')):
        results = found.get((method, variant))
        if not results:
            continue
        run = next(iter(results.values()))['run']
        untrained = references['untrained'].get(run['model'])
        knn = values(results, 'knn').values()
        gain = f'{statistics.mean(knn) - statistics.mean(untrained):+.1f}' if untrained else ''
        lines.append(
            f'| {TITLES[method]} | {run["epochs"]} | {mean_of(knn)} | {mean_of(untrained or [])} | {gain} | '
            f'{mean_of(values(results, "linear").values())} | {mean_of(values(results, "top1").values())} |'
        )
    return lines


def lossless(found: Found) -> list[str]:
    """Tab. 16 to the last digit."""
    pairs = [
        (accuracy['knn'], accuracy['knn with tokens'])
        for (_, variant), results in found.items()
        for accuracy in (r['accuracy'] for r in results.values())
        if not variant.startswith('attention not cut') and 'knn with tokens' in accuracy
    ]
    same = sum(a == b for a, b in pairs)
    said = f'in {same} of {len(pairs)} runs with auxiliary tokens, those of all tables'
    return ['', f'With attention cut off, k-NN with and without the tokens is the same to the last digit {said}.']


def ensembles(folder: Path) -> tuple[list[str], str]:
    """Tab. 4, and its verdict: networks that were trained apart, so that a pair of theirs is one observation."""
    path = folder / 'concatenated.json'
    if not path.exists():
        return ['Not run yet.'], 'not run'
    found = load(folder)
    lines = [
        '| method | one network, k-NN | two networks side by side | difference (range) | pairs | claim |',
        '|---|---:|---:|---:|---:|---|',
    ]
    verdicts = []
    for name, pairs in json.loads(path.read_text()).items():
        if not pairs:  # of one seed so far
            continue
        method, variant = name.split(', ', 1)
        single = values(found[method, variant], 'knn')
        differences = [pairs[key] - statistics.mean(single[int(s)] for s in key.split('+')) for key in pairs]
        better = sum(d > 0 for d in differences)
        verdicts.append(f'better in {better} of {len(pairs)} pairs')
        spread = f' ({min(differences):+.1f} to {max(differences):+.1f})' if len(pairs) > 1 else ''
        lines.append(
            f'| {TITLES[method]}, {variant} | {mean_of(single.values())} | {mean_of(pairs.values())} | '
            f'{statistics.mean(differences):+.1f}{spread} | {len(pairs)} | {verdicts[-1]} |'
        )
    note = 'Pairs of the same networks are not independent, so there is no interval.'
    return [*lines, '', note], in_words(verdicts)


def random_tokens(found: Found, references: dict[str, Any]) -> tuple[list[str], str]:
    """Fig. 12, and its verdict."""
    trained = {seed: r['accuracy']['random tokens'] for seed, r in found.get(('dino', 'plain'), {}).items()}
    if not trained:
        return ['Not run yet.'], 'not run'
    lines = [
        '| token | on untrained networks | on plain DINO | difference | seeds | claim |',
        '|---|---:|---:|---:|---:|---|',
    ]
    before = dict(enumerate(references['random tokens']))
    names = {'ensemble': lambda t: t['knn of the ensemble']}
    names |= {n: lambda t, n=n: t['knn of tokens'][n] for n in next(iter(trained.values()))['knn of tokens']}
    verdicts = []
    for name, of in names.items():
        a, b = ({seed: of(t) for seed, t in some.items()} for some in (before, trained))
        diff = difference(b, a)
        if diff is None:
            continue
        verdicts.append(diff.verdict())
        common = a.keys() & b.keys()
        means = (statistics.mean(some[seed] for seed in common) for some in (a, b))
        lines.append(f'| {name} | {" | ".join(f"{m:.1f}" for m in means)} | {diff} | {diff.seeds} | {verdicts[-1]} |')
    return lines, in_words(verdicts)


def cost_table(folder: Path) -> list[str]:
    """Tab. 12."""
    path = folder / 'costs.json'
    if not path.exists():
        return ['Not run yet.']
    lines = [
        '| method | parameters that learn, plain | with MTE | step, plain | with MTE | ratio (quartiles) |',
        '|---|---:|---:|---:|---:|---:|',
    ]
    for method, forms in json.loads(path.read_text()).items():
        plain, ours = forms['plain'], forms['mte']
        low, median, high = ours['ratios']
        lines.append(
            f'| {TITLES[method]} | {plain["parameters"] / 1e6:.2f}M | {ours["parameters"] / 1e6:.2f}M | '
            f'{plain["seconds"]:.3f} s | {ours["seconds"]:.3f} s | {median:.2f} ({low:.2f} to {high:.2f}) |'
        )
    return lines


def settings(found: Found) -> list[str]:
    """What plain and MTE runs of a method have in common."""
    lines = ['| method | settings |', '|---|---|']
    for method, title in TITLES.items():
        results = found.get((method, 'plain'))
        if results:
            result = next(iter(results.values()))
            run = {k: result['run'][k] for k in ('model', 'epochs', 'batch_size', 'lr', 'weight_decay', 'precision')}
            own = {k: v for k, v in result['settings'].items() if k not in ABLATIONS}
            lines.append(f'| {title} | {", ".join(f"{k} {v}" for k, v in {**run, **own}.items())} |')
    return lines


def report(folder: Path, pictures: Optional[Path] = None) -> str:
    """The report of the results in ``folder``, as Markdown.

    Args:
        folder: Of one dataset.
        pictures: Where figures are written and how the text refers to them; None for none.
    """
    found = load(folder)
    references = json.loads((folder / 'references.json').read_text())
    pixels = references['raw pixels']
    rows = {e.name: rows_of(e, found) for e in EXPERIMENTS}
    pairs, said_of_pairs = ensembles(folder)
    untrained_tokens, said_of_random = random_tokens(found, references)
    lines = [
        f'## {folder.name}',
        '',
        (f'k-NN of raw pixels: {pixels["knn"]:.1f}%. ' if pixels else '') + "Intervals are of 95% (Student's t), of "
        'differences between runs with the same seed, data order and initial backbone. *Confirmed* and *contradicted* '
        'are said where the interval leaves 0 out; with two seeds it is wide.',
        '',
        '| | claim | here |',
        '|---|---|---|',
        *(f'| {e.name} | {e.claim} | {in_words(r.verdict for r in rows[e.name])} |' for e in EXPERIMENTS),
        f'| Tab. 4 | {SIDE_BY_SIDE} | {said_of_pairs} |',
        f'| Fig. 12 | {RANDOM_TOKENS} | {said_of_random} |',
        '',
        '### Whether the plain runs learned',
        '',
        *baselines(found, references),
    ]  # fmt: skip
    for e in EXPERIMENTS:
        lines += ['', f'### {e.name}: {e.claim}', '', f'{e.source} {epochs_of(e, found)}'.rstrip(), '']
        lines += table(e, rows[e.name])
        if e.name == 'Tab. 16':
            lines += lossless(found)
    lines += [
        '', f'### Tab. 4: {SIDE_BY_SIDE}', '', 'The paper: DINO with MTE 66.6, two of them 67.1 (k-NN).', '',
        *pairs, '', f'### Fig. 12: {RANDOM_TOKENS}', '',
        'k-NN of auxiliary tokens of random parameters, the same for all networks, on untrained and trained encoders.',
        '', *untrained_tokens, '', '### Tab. 12: costs', '',
        'Steps taken in turn in one run, without reading images; the network after strip is the plain one. Larger '
        'models: [benchmarks/README.md](README.md).', '', *cost_table(folder), '', '### Settings', '',
        'Chosen by k-NN of the plain runs, seed 0, on the test images, then kept for MTE: what that gains by chance is '
        "the plain method's.", '', *settings(found),
    ]  # fmt: skip
    if pictures is not None:
        for name, caption in draw.figures(found, folder, pictures).items():
            lines += ['', f'### {caption}', '', f'![{caption}](results/study/{folder.name}/{name})']
    return '\n'.join(lines) + '\n'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--results', type=Path, default=RESULTS)
    parser.add_argument('-o', '--output', type=Path, default=RESULTS.parents[1] / 'REPORT.md')
    args = parser.parse_args()
    folders = sorted(p.parent for p in args.results.glob('*/references.json'))
    if not folders:
        parser.error(f'--results {args.results}: holds no results; run python -m benchmarks.study first')
    parts = ['# What of the paper holds, measured with this library\n', *(report(f, f) for f in folders)]
    temporary = args.output.with_suffix('.tmp')
    temporary.write_text('\n'.join(parts))
    temporary.replace(args.output)
    print(f'written: {args.output}')


if __name__ == '__main__':
    main()
