"""Pictures of the study: accuracy by epoch and by time, patches by attention, and what the tokens of a run look like.

Owns what is drawn. Knows nothing of how accuracies come about.
"""

import statistics
from pathlib import Path
from typing import Any

import matplotlib
import torch

from benchmarks.images import Images
from benchmarks.study.experiment import TITLES
from mte_timm import analysis
from mte_timm.heads import prototypes_of

matplotlib.use('Agg')

__all__ = ['figures', 'looks']

COLORS = {
    'plain': 'tab:grey', 'mte': 'tab:blue', 'plain, equal time': 'tab:orange', 'plain-equal-time': 'tab:orange',
    'two networks': 'tab:green',
}  # fmt: skip
LABELS = {'mte': 'MTE', 'two networks': 'two plain networks side by side'}
TIME = 'k-NN accuracy against the time of training; bands are from the lowest to the highest seed'
LOOKS = {
    'pooling.png': 'Fig. 6: what pooled tokens look at',
    'kernels.png': 'Fig. 6: their kernels, of eight channels',
    'cka.png': 'Fig. 7: linear CKA between tokens',
    'classes.png': 'Fig. 8: accuracy by class, and where each token is best',
    'pairs.png': 'Fig. 9: k-NN accuracy of pairs of tokens',
    'nmi.png': 'Fig. 10: NMI of pseudo-labels from pairs of tokens',
}
OF_SOME = {'pooling.png', 'nmi.png'}  # the sample's images, and heads with prototypes


def figures(
    found: dict[tuple[str, str], dict[int, dict[str, Any]]], costs: dict[str, Any], networks: dict[str, Any], to: Path
) -> dict[str, str]:
    """Draws what results allow into ``to``; name of each picture -> caption, those of ``looks`` too."""
    drawn = {}
    curves = {m: {v: found[m, v] for v in COLORS if (m, v) in found} for m in TITLES if (m, 'plain') in found}
    if curves:
        to.mkdir(parents=True, exist_ok=True)
        epochs_and_time(curves, costs, to / 'curves.png')
        drawn['curves.png'] = 'Accuracy by epoch and by time'
    watched = {m: variants for m, variants in curves.items() if m in costs and 'watched' in first(variants['plain'])}
    if watched:
        time_to_accuracy(watched, costs, networks, to / 'time.png')
        drawn = {'time.png': TIME, **drawn}
    patches = {(m, v): r for (m, v), r in found.items() if v in ('plain', 'mte') and 'patches' in first(r)['accuracy']}
    if patches:
        by_attention(patches, to / 'patches.png')
        drawn['patches.png'] = 'Fig. 14: k-NN of the patches with the highest attention'
    return drawn | {name: caption for name, caption in LOOKS.items() if (to / name).exists()}


def first(results: dict[int, Any]) -> Any:
    return results[min(results)]


def curve(result: dict[str, Any]) -> list[tuple[int, float]]:
    """(epochs, k-NN) of a run; the first runs of Fashion-MNIST have one value for each epoch."""
    if 'watched' in result:
        return [(w['epoch'], w['knn']) for w in result['watched']]
    return list(enumerate(result['knn by epoch'], 1))


def time_to_accuracy(curves: dict[str, Any], costs: dict[str, Any], networks: dict[str, Any], path: Path) -> None:
    """k-NN against time, with bands from the lowest to the highest seed."""
    plt = _pyplot()
    size = (4.2 * len(curves), 3.2)
    figure, axes = plt.subplots(1, len(curves), figsize=size, squeeze=False, layout='constrained')
    for axis, (method, variants) in zip(axes[0], curves.items()):
        result = first(variants['plain'])
        steps = result['steps'] / result['run']['epochs']  # of an epoch
        minutes = {v: steps * (c['seconds'] + c.get('reading', 0)) / 60 for v, c in costs[method].items()}
        lines = {v: [curve(r) for r in results.values()] for v, results in variants.items() if v in minutes}
        pairs = networks.get(f'{method}, plain', {}).get('by epoch', {}).values()
        lines['two networks'] = [[(int(e), knn) for e, knn in pair.items()] for pair in pairs]
        minutes['two networks'] = 2 * minutes['plain']
        for name, each in lines.items():
            points = [[epoch for epoch, _ in each[0]], *([knn for _, knn in one] for one in each)] if each else []
            if len(points) < 2 or not points[0]:
                continue
            x, values = [minutes[name] * epoch for epoch in points[0]], list(zip(*points[1:]))
            color, label = COLORS[name], f'{LABELS.get(name, name)}, {len(each)}'
            axis.plot(x, [statistics.mean(v) for v in values], color=color, label=label, marker='.')
            axis.fill_between(x, list(map(min, values)), list(map(max, values)), color=color, alpha=0.2)
        axis.set(title=TITLES[method], xlabel='minutes of training')
        axis.legend(fontsize=7, loc='lower right')
    axes[0, 0].set_ylabel('k-NN accuracy, %')
    _save(figure, path)


def epochs_and_time(curves: dict[str, Any], costs: dict[str, Any], path: Path) -> None:
    """k-NN of the mean over seeds after each epoch; below by time in epochs of the plain method."""
    plt = _pyplot()
    timed = bool(costs)
    figure, axes = plt.subplots(
        1 + timed,
        len(curves),
        figsize=(2.6 * len(curves), 2.6 * (1 + timed)),
        squeeze=False,
        sharey='col',
        layout='constrained',
    )
    for column, (method, variants) in enumerate(curves.items()):
        for variant, results in variants.items():
            each = [curve(r) for r in results.values()]
            epochs = [epoch for epoch, _ in each[0]]
            mean = [statistics.mean(knn for _, knn in points) for points in zip(*each)]
            label = f'{variant}, {len(each)} seed{"s" * (len(each) > 1)}'
            style = {'color': COLORS[variant], 'label': label, 'marker': '.'}
            axes[0, column].plot(epochs, mean, **style)
            if method in costs:
                ratio = costs[method]['mte']['ratios'][1] if variant == 'mte' else 1.0
                axes[1, column].plot([ratio * e for e in epochs], mean, **style)
        axes[0, column].set(title=TITLES[method], xlabel='epoch')
        axes[0, column].legend(fontsize=6, loc='lower right')
        if timed:
            axes[1, column].set(xlabel='time of steps, in plain epochs')
            axes[1, column].set_visible(method in costs)
    for row in axes:
        row[0].set_ylabel('k-NN accuracy, %')
    _save(figure, path)


def by_attention(patches: dict[tuple[str, str], Any], path: Path) -> None:
    """k-NN accuracy of averaged patches, by how many of them."""
    plt = _pyplot()
    methods = [m for m in TITLES if any(m == method for method, _ in patches)]
    figure, axes = plt.subplots(1, len(methods), figsize=(2.6 * len(methods), 2.6), squeeze=False, layout='constrained')
    for axis, method in zip(axes[0], methods):
        for variant in ('plain', 'mte'):
            results = patches.get((method, variant))
            if results is None:
                continue
            names = [n for n in first(results)['accuracy']['patches'] if n.startswith('top')]
            mean = [statistics.mean(r['accuracy']['patches'][n] for r in results.values()) for n in names]
            axis.plot([int(n.split()[1]) for n in names], mean, color=COLORS[variant], label=variant, marker='.')
        axis.set(title=TITLES[method], xlabel='patches')
        axis.legend(fontsize=6)
    axes[0, 0].set_ylabel('k-NN accuracy, %')
    _save(figure, path)


def looks(network: Any, images: Images, to: Path) -> None:
    """Draws Fig. 6 to 10 of a network with MTE into ``to``, those ``OF_SOME`` where they apply."""
    to.mkdir(parents=True, exist_ok=True)
    train, test = (analysis.collect(network, images.loader(which)) for which in ('train', 'test'))
    drawn = {
        'kernels.png': analysis.plot_kernels(network),
        'cka.png': analysis.plot_cka(test),
        'classes.png': analysis.plot_accuracy_by_class(train, test),
        'pairs.png': analysis.plot_pair_accuracy(train, test),
    }
    if images.source == 'sample':
        batch = next(iter(images.loader('test', 6)))[0]
        scale, shift = (torch.tensor(v).view(1, -1, 1, 1) for v in (images.std, images.mean))
        drawn['pooling.png'] = analysis.plot_pooling(network, batch, batch * scale + shift)
    if prototypes_of(network.aux.global_head) is not None:
        drawn['nmi.png'] = analysis.plot_pair_nmi(test, network)
    for name, figure in drawn.items():
        _save(figure, to / name)


def _pyplot() -> Any:
    import matplotlib.pyplot as plt

    return plt


def _save(figure: Any, path: Path) -> None:
    temporary = path.with_suffix('.tmp.png')
    figure.savefig(temporary, dpi=110)
    temporary.replace(path)
    _pyplot().close(figure)
