"""REPORT.md of the study's results: for each claim the paper's figure, ours with seeds and interval, and what follows.

    python -m benchmarks.study.report               # benchmarks/REPORT.md, of benchmarks/results/study

Owns words. Knows nothing of how results came about but their files.
"""

import argparse
import itertools
import os
import statistics
from pathlib import Path
from typing import Any, Optional

from benchmarks import records
from benchmarks.intervals import MARGIN, difference
from benchmarks.study import draw
from benchmarks.study.compare import SAME, Found, Row, load, rows_of, values
from benchmarks.study.experiment import TITLES, Experiment, Plan, Variant
from benchmarks.study.methods import ABLATIONS
from benchmarks.study.plans import plan_of
from benchmarks.study.plans.fashion_mnist import PLAN as FASHION
from benchmarks.transfer import report as transfer

__all__ = ['METRICS', 'report']

RESULTS = Path(__file__).parents[1] / 'results' / 'study'
SOURCES = {
    'imagenette': 'Imagenette, photographs of ten classes of ImageNet, 9,469 for training and 3,925 for testing',
    'cifar10': 'CIFAR-10, photographs of ten classes, 50,000 for training and 10,000 for testing',
    'fashion-mnist-sample': 'a sample of Fashion-MNIST, 6,000 for training and 2,000 for testing',
}
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


def table(experiment: Experiment, rows: list[Row]) -> list[str]:
    lines = [
        '| method | variant | against | accuracy | against | variant | difference | paper | seeds | claim |',
        '|---|---|---|---|---:|---:|---:|---:|---:|---|',
    ]
    for r in rows:
        diff, paper = r.difference, '' if r.paper is None else f'{r.paper:+.1f}'
        cells = (
            TITLES[r.method], r.variant, r.reference_variant, METRICS[r.metric], f'{diff.reference:.1f}',
            f'{diff.ours:.1f}', str(diff), paper, str(diff.seeds), r.verdict,
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


def in_words(experiment: Experiment, rows: list[Row]) -> str:
    """What became of a claim, comparison by comparison."""
    if experiment.exploratory:
        return 'no verdict; the table has what came out' if rows else 'not run'
    several = len({(r.variant, r.reference_variant) for r in rows}) > 1
    each: dict[str, list[str]] = {}
    for r in rows:
        if r.verdict:
            name = TITLES[r.method] if not several else f'{r.variant} / {r.reference_variant}'
            each.setdefault(name, []).append(f'{METRICS[r.metric]} {r.verdict}')
    return '; '.join(f'**{name}**: {", ".join(said)}' for name, said in each.items()) or 'not run'


def mean_of(values: Any) -> str:
    values = list(values)
    if not values:
        return ''
    return f'{statistics.mean(values):.1f}' + (f' ({min(values):.1f} to {max(values):.1f})' if len(values) > 1 else '')


def baselines(found: Found, references: dict[str, Any]) -> list[str]:
    """Whether the plain runs learned."""
    lines = [
        '| method, plain | epochs | k-NN | untrained | gain by seed (least) | to raw pixels | linear | classifier |',
        '|---|---:|---:|---:|---:|---:|---:|---:|',
    ]
    pixels = (references.get('raw pixels') or {}).get('knn')
    for method, variant in itertools.product(TITLES, ('plain', 'plain-short')):
        results = found.get((method, variant))
        if not results:
            continue
        run = next(iter(results.values()))['run']
        untrained = references.get('untrained', {}).get(run['model'], [])
        knn = values(results, 'knn')
        mean = statistics.mean(knn.values())
        gains = [value - untrained[seed] for seed, value in knn.items() if seed < len(untrained)]
        gain = f'{statistics.mean(gains):+.1f} ({min(gains):+.1f})' if gains else ''
        name = TITLES[method] + (', short' if 'short' in variant else '')
        lines.append(
            f'| {name} | {run["epochs"]} | {mean_of(knn.values())} | {mean_of(untrained)} | {gain} | '
            f'{"" if pixels is None else f"{mean - pixels:+.1f}"} | '
            f'{mean_of(values(results, "linear").values())} | {mean_of(values(results, "top1").values())} |'
        )
    return lines


def without_gain(plan: Plan, rows: dict[str, list[Row]]) -> list[str]:
    """Where MTE is not shown to be better than plain, what is only not known for sure, and what was tried."""
    none, unsure, tried = [], [], []
    for e in plan.experiments:
        for r in rows[e.name]:
            seeds = f'{r.difference.seeds} seed{"s" * (r.difference.seeds > 1)}'
            said = f'{TITLES[r.method]}, {METRICS[r.metric]}: {r.difference} ({seeds})'
            if e.exploratory:
                tried.append(f'- {e.name}: {r.variant} to {r.reference_variant}, {said}')
            elif r.reference_variant.startswith('plain') and ' - ' not in r.metric and r.verdict != 'confirmed':
                few = r.verdict in ('one seed', 'two seeds')
                lean = r.verdict.endswith('leaning for') or (few and r.difference.mean > 0)
                line = f'- {e.name}: {"" if r.variant == "mte" else f"{r.variant}, "}{said}'
                if r.verdict:
                    (unsure if lean else none).append(line)
    parts = {
        'No gain was seen': none,
        'A gain was seen, but the interval holds 0, or there are fewer than three seeds': unsure,
        'What was tried, after no gain was seen': tried,
    }
    lines = [line for title, some in parts.items() if some for line in (f'{title}:', '', *some, '')]
    return lines[:-1] or ['Nowhere among the comparisons with the plain method.']


def ensemble_and_global(found: Found) -> list[str]:
    """Whether the token that is kept is as good as the ensemble that taught it."""
    said = []
    for method, title in TITLES.items():
        runs = found.get((method, 'mte'), {})
        if diff := difference(values(runs, 'knn of the ensemble'), values(runs, 'knn')):
            said.append(f'{title} {diff}')
    what = 'k-NN of the ensemble of auxiliary tokens less that of the global token'
    return ['', f'{what}: {"; ".join(said)}.'] if said else []


def lossless(found: Found) -> list[str]:
    """Tab. 16 to the last digit, and to the last bit where features were compared."""
    accuracies = [
        r['accuracy']
        for (_, variant), results in found.items()
        for r in results.values()
        if r.get('settings', {}).get('mask_attention', True) and (r['run']['mte'] or {}).get('n_cls')
    ]
    pairs = [(a['knn'], a['knn with tokens']) for a in accuracies if 'knn with tokens' in a]
    same = sum(a == b for a, b in pairs)
    compared = [a[SAME] for a in accuracies if SAME in a]
    text = (
        'With attention cut off, k-NN with and without the tokens is the same to the last digit in '
        f'{same} of {len(pairs)} runs with auxiliary CLS tokens, those of all tables'
    )
    if compared:
        text += (
            f'; and in {sum(compared)} of {len(compared)} whose features of the test images were compared these are '
            'the same to the last bit'
        )
    return ['', f'{text}.']


def ensembles(found: Found, networks: dict[str, Any]) -> tuple[list[str], str]:
    """Tab. 4, and its verdict: networks that were trained apart, so that a pair of theirs is one observation."""
    if not networks:
        return [], 'not run'
    lines = [
        '| method | one network, k-NN | two networks side by side | difference (range) | pairs | claim |',
        '|---|---:|---:|---:|---:|---|',
    ]
    verdicts = []
    for name, entry in networks.items():
        pairs = entry['pairs']
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
        verdicts[-1] = f'**{TITLES[method]}, {variant}**: {verdicts[-1]}'
    note = 'Pairs of the same networks are not independent, so there is no interval.'
    return [*lines, '', note], '; '.join(verdicts)


def random_tokens(found: Found, references: dict[str, Any]) -> tuple[list[str], str]:
    """Fig. 12, and its verdict."""
    key = 'random tokens'
    trained = {s: r['accuracy'][key] for s, r in found.get(('dino', 'plain'), {}).items() if key in r['accuracy']}
    before = dict(enumerate(references.get('random tokens', ())))
    if not (trained and before):
        return [], 'not run'
    lines = [
        '| token | on untrained networks | on plain DINO | difference | seeds | claim |',
        '|---|---:|---:|---:|---:|---|',
    ]
    names = {'ensemble': lambda t: t['knn of the ensemble']}
    names |= {n: lambda t, n=n: t['knn of tokens'][n] for n in next(iter(trained.values()))['knn of tokens']}
    said = 'not run'
    for name, of in names.items():
        a, b = ({seed: of(t) for seed, t in some.items()} for some in (before, trained))
        diff = difference(b, a)
        if diff is None:
            continue
        verdict = diff.verdict() if name == 'ensemble' else ''  # the tokens are of the same networks
        said = verdict or said
        lines.append(f'| {name} | {diff.reference:.1f} | {diff.ours:.1f} | {diff} | {diff.seeds} | {verdict} |')
    return lines, said


def cost_table(costs: dict[str, Any]) -> list[str]:
    """Tab. 12."""
    read = any('reading' in forms['plain'] for forms in costs.values())
    views = ' views, of the plain step with them |' if read else ''
    lines = [
        '| method | parameters that learn, plain | with MTE | operations of a step, plain | with MTE | step, plain '
        f'| with MTE | ratio (quartiles) |{views}',
        f'|---|---:|---:|---:|---:|---:|---:|---:|{"---:|" * read}',
    ]
    for method, forms in costs.items():
        plain, ours = forms['plain'], forms['mte']
        low, median, high = ours['ratios']
        reading = plain.get('reading', 0)
        lines.append(
            f'| {TITLES[method]} | {plain["parameters"] / 1e6:.2f}M | {ours["parameters"] / 1e6:.2f}M | '
            f'{plain["operations"]:.2f}G | {ours["operations"]:.2f}G | '
            f'{plain["seconds"]:.3f} s | {ours["seconds"]:.3f} s | {median:.2f} ({low:.2f} to {high:.2f}) |'
            + f' {100 * reading / (reading + plain["seconds"]):.0f}% |'
            * read
        )
    return lines


def settings(plan: Plan, found: Found) -> list[str]:
    """What plain and MTE runs of a method have in common."""
    lines = ['| method | | settings |', '|---|---|---|']
    for method, title in TITLES.items():
        results = found.get((method, 'plain'))
        if results:
            result = next(iter(results.values()))
            run = {k: result['run'][k] for k in ('model', 'epochs', 'batch_size', 'lr', 'weight_decay', 'precision')}
            own = {k: v for k, v in result['settings'].items() if k not in ABLATIONS}
            how = 'tuned' if method in plan.tuned else "taken over from DINO's or MoCo v3's, not tuned"
            lines.append(f'| {title} | {how} | {", ".join(f"{k} {v}" for k, v in {**run, **own}.items())} |')
    return lines


PLANNED = 3  # seeds, before results were seen
SUMMARY = f"""
Plain and with MTE at equal epochs, and plain with as many more epochs as take the time of MTE's run (equal time). k-NN
and linear accuracy are of the global token of the stripped network. {PLANNED} seeds were planned; where there are more,
they came after those were seen, and the last column has the difference without them.
"""
HOW_TO_READ = """
Accuracies are percentages of the test images and of the plain network: k-NN (k = 10, cosine similarity, temperature
0.07), linear (scikit-learn's logistic regression on standardized features, where the paper probes with SGD), classifier
(its own). DINO, iBOT and HSSL are evaluated by their teacher, the others by the network that learns. Ablations, called
short, have a third of the epochs. Fine-tuning is 5 epochs without augmentation. Fig. 12 adds random tokens to networks
that were trained without.
"""
INTERVALS = f"""
Differences are of runs with the same seed, data order and initial backbone, with 95% intervals (Student's t) over
seeds. They say nothing of other images; of as many intervals as there are here one in twenty misses by chance.
*Confirmed* and *contradicted*: the interval of three seeds or more leaves 0 out. *Undecided, leaning*: the sign of the
mean. Where the claim is no difference, *confirmed* is an interval within {MARGIN:.0f} point of 0. Rows without a
verdict show what the claim is not about, or what was asked later.
"""
CAVEAT = """
**Before you believe a gain here**: raw pixels have {pixels}, self-supervised plain runs {plain} k-NN and with MTE
{ours}. The class token of an untrained network has {untrained}{patches}. Auxiliary tokens of random weights on that
network have {random} together: pooled ones weight features by a convolution of features, so they are of second order.
MTE distills such tokens; where they are near the plain runs, a part of its gain may come from what the tokens are
rather than from how they learn; read Tab. 13 and 15 with that in mind.
"""


TOKENS = """
k-NN of auxiliary tokens of random parameters, the same for all networks, on untrained and trained encoders.
"""
COSTS = """
Operations are multiply-adds of convolutions and matrix products for an image, all its views, forward and backward.
Steps are taken in turn in one run, without reading images. The network after strip is the plain one, so at inference
both cost the same. Larger models: [benchmarks/README.md](README.md).
"""


def section(title: str, text: str, lines: list[str]) -> list[str]:
    return ['', f'### {title}', '', ' '.join(text.split()), '', *lines]


def how_to_read(found: Found, references: dict[str, Any]) -> list[str]:
    """What the words and figures below mean, and what must be known before they are believed."""
    result = next((r for results in found.values() for r in results.values()), None)
    lines = []
    if result:
        images = result['images']
        limits = f', at most {images["limits"][0]} and {images["limits"][1]}' if any(images['limits']) else ''
        lines.append(f'Images: {SOURCES.get(images["name"], images["name"])}{limits}; {images["size"]} pixels.')
    lines[-1:] = [' '.join([*lines[-1:], *HOW_TO_READ.split()]), '', ' '.join(INTERVALS.split())]
    commits = sorted(
        {r.get('made by', {}).get('commit') or 'before they were noted' for rs in found.values() for r in rs.values()}
    )
    lines += ['', f'Runs are of commits {", ".join(commits)}.']
    pixels, random = references.get('raw pixels'), references.get('random tokens')
    if not (pixels and random):
        return lines
    untrained = next(values for model, values in references['untrained'].items() if 'vit' in model)

    def of(variant: str) -> str:
        runs = [r for (m, v), rs in found.items() if v == variant and m != 'supervised' for r in rs.values()]
        knn = [r['accuracy']['knn'] for r in runs]
        return f'{min(knn):.1f} to {max(knn):.1f}%' if knn else 'none yet'

    patches = references.get('untrained patches')
    text = CAVEAT.format(
        pixels=f'{pixels["knn"]:.1f}% k-NN' + (f' and {pixels["linear"]:.1f}% linear' if 'linear' in pixels else ''),
        plain=of('plain'),
        ours=of('mte'),
        untrained=f'{statistics.mean(untrained):.1f}%',
        patches=f', the mean of its patches {statistics.mean(patches):.1f}%' if patches else '',
        random=f'{statistics.mean(t["knn of the ensemble"] for t in random):.1f}%',
    )
    return [*lines, '', ' '.join(text.split())]


def summary(found: Found) -> list[str]:
    """Plain, MTE and their difference, for each method that was run."""
    lines = [
        f'| method | accuracy | compared with | plain | MTE | difference | seeds | seeds 0 to {PLANNED - 1} |',
        '|---|---|---|---:|---:|---:|---:|---:|',
    ]
    references = {'plain': 'equal epochs', 'plain-equal-time': 'equal time'}
    for (method, title), (reference, called), metric in itertools.product(
        TITLES.items(), references.items(), ('knn', 'linear', 'top1')
    ):
        plain, ours = (values(found.get((method, v), {}), metric) for v in (reference, 'mte'))
        diff = difference(ours, plain)
        if diff is not None:
            means = f'{diff.reference:.1f}', f'{diff.ours:.1f}'
            first = difference({s: v for s, v in ours.items() if s < PLANNED}, plain)
            cells = title, METRICS[metric], called, *means, str(diff), str(diff.seeds), str(first or '')
            lines.append(f'| {" | ".join(cells)} |')
    return lines


def tokens_over_training(found: Found, experiment: Experiment) -> list[str]:
    """How alike auxiliary CLS tokens are, and what each knows, at the first and the last epoch that was watched."""
    lines = [
        '| variant | seed | epochs | CKA among CLS tokens | with the class token | k-NN of the class token '
        '| of CLS tokens | of pooled tokens |',
        '|---|---:|---|---:|---:|---:|---|---|',
    ]

    def span(x: list[float], digits: int) -> str:
        return f'{min(x):.{digits}f} to {max(x):.{digits}f}' if x else ''

    variants = [Variant(v.method, 'mte', None) for v in experiment.variants[:1]] + list(experiment.variants)
    for v in variants:
        for seed, result in found.get((v.method, v.name), {}).items():
            seen = [w for w in result.get('watched', ()) if 'cls 1' in w.get('tokens', ())]
            for w in seen[:: max(1, len(seen) - 1)]:
                each = {kind: [x for t, x in w['tokens'].items() if t.startswith(kind)] for kind in ('cls', 'pool')}
                n = len(each['cls']) + 1
                among = [w['cka'][i][j] for i in range(1, n) for j in range(1, i)]
                cells = (
                    v.name, str(seed), f'{w["epoch"]} of {result["run"]["epochs"]}', span(among, 2),
                    span(w['cka'][0][1:n], 2), f'{w["knn"]:.1f}', span(each['cls'], 1), span(each['pool'], 1),
                )  # fmt: skip
                lines.append(f'| {" | ".join(cells)} |')
    return lines if len(lines) > 2 else []


def tuning_table(path: Path) -> list[str]:
    """What was tried on images that are held out."""
    tried = [r for r in records.read(path.with_name(f'{path.stem}-tuning.jsonl')).values() if 'run' in r]
    if not tried:
        return []
    lines = ['', 'What was tried, k-NN of the held-out images:', '', '| method | settings | k-NN |', '|---|---|---:|']
    for r in tried:
        lines.append(f'| {TITLES[r["run"]["method"]]} | {r["run"]["variant"]} | {r["accuracy"]["knn"]:.1f} |')
    return lines


def report(path: Path, pictures: Optional[Path] = None, link: str = '') -> str:
    """The report of the results in ``path``, as Markdown.

    Args:
        path: Of one dataset.
        pictures: Where figures are written; None for none.
        link: What stands before their names in the text.
    """
    found, lines_of = load(path), records.read(path)
    references = lines_of.get('references', {})
    plan = plan_of(next(iter(next(iter(found.values())).values()))['images'], path.stem)
    networks = lines_of.get('side-by-side', {}).get('networks', {})
    costs = lines_of.get('costs', {}).get('methods', {})
    rows = {e.name: rows_of(e, found) for e in plan.experiments}
    pairs, said_of_pairs = ensembles(found, networks)
    untrained_tokens, said_of_random = random_tokens(found, references)
    drawn = {} if pictures is None else draw.figures(found, costs, networks, pictures)
    figures = [['', f'### {caption}', '', f'![{caption}]({link}{name})'] for name, caption in drawn.items()]
    opening: list[str] = []
    if plan is not FASHION:
        first = [line for name, part in zip(drawn, figures) if name == 'time.png' for line in (*part[3:], '')]
        opening = [' '.join(SUMMARY.split()), '', *summary(found), '', *first]
        figures = [part for name, part in zip(drawn, figures) if name != 'time.png']
    lines = [
        f'## {path.stem}',
        '',
        *opening,
        *how_to_read(found, references),
        '',
        '| | claim | here |',
        '|---|---|---|',
        *(f'| {e.name} | {e.claim} | {in_words(e, rows[e.name])} |' for e in plan.experiments),
        f'| Tab. 4 | {SIDE_BY_SIDE} | {said_of_pairs} |',
        f'| Fig. 12 | {RANDOM_TOKENS} | {said_of_random} |',
        '',
        '### Whether the plain runs learned',
        '',
        *baselines(found, references),
        '',
        '### Where MTE is not shown to help',
        '',
        *without_gain(plan, rows),
    ]  # fmt: skip
    for e in plan.experiments:
        tokens = tokens_over_training(found, e) if e.name == 'Auxiliary CLS tokens' else []
        compared = table(e, rows[e.name]) if rows[e.name] else []
        if compared or tokens:
            between = [''] if compared and tokens else []
            text = f'{e.source} {epochs_of(e, found)}'
            lines += section(f'{e.name}: {e.claim}', text, [*compared, *between, *tokens])
        if e.name == 'Tab. 5':
            lines += [*ensemble_and_global(found), *lossless(found)]
    if pairs:
        lines += section(f'Tab. 4: {SIDE_BY_SIDE}', 'The paper: DINO with MTE 66.6, two of them 67.1 (k-NN).', pairs)
    if untrained_tokens:
        lines += section(f'Fig. 12: {RANDOM_TOKENS}', TOKENS, untrained_tokens)
    if costs:
        lines += section('Tab. 12: costs', COSTS, cost_table(costs))
    clipped = "Gradients are clipped together, MTE's parameters with the backbone's."
    lines += section('Settings', f'{plan.how_tuned} {clipped}', settings(plan, found))
    lines += tuning_table(path)
    lines += [line for part in figures for line in part]
    return '\n'.join(lines) + '\n'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--results', type=Path, default=RESULTS)
    parser.add_argument('-o', '--output', type=Path, default=RESULTS.parents[1] / 'REPORT.md')
    args = parser.parse_args()
    paths = sorted(p for p in args.results.glob('*.jsonl') if not p.stem.endswith('-tuning') and load(p))
    if not paths:
        parser.error(f'--results {args.results}: holds no results; run python -m benchmarks.study first')
    paths.sort(key=lambda path: list(SOURCES).index(path.stem) if path.stem in SOURCES else -1)
    where = args.output.resolve().parent
    links = [f'{os.path.relpath(path.resolve().with_suffix(""), where)}/' for path in paths]
    texts = [report(path, path.with_suffix(''), link) for path, link in zip(paths, links)]
    photographs = sum(not p.stem.startswith('fashion') for p in paths)
    texts[photographs:photographs] = transfer.report(args.results.parent / 'transfer.jsonl')
    parts = ['# What of the paper holds, measured with this library\n', *texts]
    temporary = args.output.with_suffix('.tmp')
    temporary.write_text('\n'.join(parts))
    temporary.replace(args.output)
    print(f'written: {args.output}')


if __name__ == '__main__':
    main()
