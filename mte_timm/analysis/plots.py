"""Pictures of the measures: each ``plot_*`` takes what its twin takes and returns a matplotlib Figure."""

import math
from collections.abc import Iterable
from typing import Any, Optional

import torch

from ..model import MTE
from ..utils import evaluating
from . import measures
from .health import Collapse
from .measures import Tokens
from .predict import Predict, knn_predict, needed

__all__ = [
    'plot_accuracy', 'plot_accuracy_by_class', 'plot_cka', 'plot_collapse', 'plot_kernels', 'plot_pair_accuracy',
    'plot_pair_nmi', 'plot_pooling',
]  # fmt: skip


def _figure(rows: int, columns: int, width: float, height: float, **options: Any) -> Any:
    plt = needed('matplotlib.pyplot')
    return plt.subplots(rows, columns, figsize=(width, height), layout='constrained', squeeze=False, **options)


def plot_cka(tokens: Tokens) -> Any:
    """:func:`cka` as a matrix of colors, from 0 to 1."""
    return _matrix(measures.cka(tokens), tokens.names, 'linear CKA', '{:.2f}', (0, 1))


def plot_accuracy(
    model: MTE, train_loader: Iterable[Any], test_loader: Iterable[Any], predict: Predict = knn_predict
) -> Any:
    """What the tokens know and what is left of it after strip: :func:`accuracy` with 95% intervals of sampling.

    Args:
        model: A wrapped model.
        train_loader: Labeled images to classify by, as :func:`collect` takes them.
        test_loader: Images to classify.
        predict: As in :func:`accuracy_by_class`.
    """
    train, test = measures.collect(model, train_loader), measures.collect(model, test_loader)
    (x, labels), (q, truth) = _stripped(model, train_loader), _stripped(model, test_loader)
    after = 100 * (predict(x, labels, q) == truth).double().mean().item()
    values = {'after strip': after} | measures.accuracy(train, test, predict)
    chance = 100 * torch.bincount(test.labels).max().item() / len(test.labels)
    errors = [_margin(v, len(test.labels)) for v in values.values()]
    colors = ['C0', 'C0', *['0.6'] * (len(values) - 3), '0.3']
    fig, [[ax]] = _figure(1, 1, 5, 1.2 + 0.26 * len(values))
    ax.barh(list(values), list(values.values()), xerr=errors, color=colors, error_kw={'lw': 1})
    ax.axvline(chance, color='C3', lw=1, ls='--', label='most frequent class')
    for i, value in enumerate(values.values()):
        ax.text(0.5, i, f'{value:.1f}', va='center', fontsize=7, color='w')
    ax.invert_yaxis()
    ax.set_xlabel('accuracy (%), 95% interval', fontsize=8)
    ax.tick_params(labelsize=8)
    ax.legend(fontsize=7, loc='lower right')
    return fig


@torch.no_grad()
def _stripped(model: MTE, loader: Iterable[Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Features (N, D) of the plain model alone, before its classifier, and the labels (N,) in the same order."""
    plain: Any = model.backbone
    like, features, labels = next(plain.parameters()), [], []
    with evaluating(plain):
        for images, target, *_ in loader:
            out = model.adapter(plain, images.to(like.device, like.dtype))
            features.append(out.features.clone().float().cpu())
            labels.append(target.cpu().long())
    return torch.cat(features), torch.cat(labels)


def _margin(percent: float, n: int) -> float:
    """Half the 95% interval of a percentage of ``n`` images."""
    return 196 * math.sqrt(percent / 100 * (1 - percent / 100) / n)


def plot_pooling(model: MTE, images: torch.Tensor, pictures: Optional[torch.Tensor] = None) -> Any:
    """:func:`pooling_maps` over the images, a row for each.

    Args:
        model: Wrapped, with adaptive pooling.
        images: (B, C, H, W) as the model takes them.
        pictures: The same to look at, in [0, 1]; by default each image stretched to that range.
    """
    maps, images = measures.pooling_maps(model, images).float().cpu(), images.float().cpu()
    if pictures is None:
        low, high = (f(images.flatten(1), dim=1)[(...,) + 3 * (None,)] for f in (torch.amin, torch.amax))
        pictures = (images - low) / (high - low).clamp(min=1e-12)
    n = maps.shape[1]
    fig, axes = _figure(len(maps), 1 + n, 1.3 * (1 + n), 1.3 * len(maps))
    for row, picture, of_tokens in zip(axes, pictures.float().cpu(), maps):
        array = picture.permute(1, 2, 0).clamp(0, 1).numpy()
        extent = (-0.5, array.shape[1] - 0.5, array.shape[0] - 0.5, -0.5)  # of the picture's pixels
        overlay = {'cmap': 'inferno', 'vmin': 0, 'vmax': of_tokens.max().item(), 'alpha': 0.65, 'extent': extent}
        for i, ax in enumerate(row):
            ax.imshow(array, cmap='gray')
            if i:  # the same colors for all tokens of an image
                ax.imshow(of_tokens[i - 1], interpolation='bilinear', **overlay)
            ax.set_axis_off()
    for i, ax in enumerate(axes[0]):
        ax.set_title(f'pooled {i}' if i else 'image', fontsize=9)
    return fig


def plot_kernels(model: MTE, channels: int = 8) -> Any:
    """:func:`pooling_kernels`: a row for each token, the same ``channels`` channels in each."""
    kernels = measures.pooling_kernels(model).float().cpu()
    n, dim = kernels.shape[:2]
    picked = torch.linspace(0, dim - 1, min(channels, dim)).long()
    fig, axes = _figure(n, len(picked), 1.1 * len(picked), 1.15 * n)
    for i, row in enumerate(axes):
        for channel, ax in zip(picked, row):
            limit = kernels[:, channel].abs().max()
            ax.imshow(kernels[i, channel], cmap='RdBu', vmin=-limit, vmax=limit)
            ax.set(xticks=[], yticks=[])
            if i == 0:
                ax.set_title(f'channel {channel}', fontsize=7)
        row[0].set_ylabel(f'pooled {i + 1}', fontsize=8)
    return fig


def plot_accuracy_by_class(
    train: Tokens, test: Tokens, predict: Predict = knn_predict, classes: Optional[list[str]] = None
) -> Any:
    """:func:`accuracy_by_class` as a matrix, and :func:`winners` beside it."""
    values = measures.accuracy_by_class(train, test, predict)
    names = classes or [str(c) for c in range(values.shape[1])]
    width = 3 + 0.55 * len(names)
    fig, [[left, right]] = _figure(1, 2, width + 2.4, 1.2 + 0.32 * len(values), width_ratios=(width, 2.4))
    deviation = (values - values.mean(dim=0)).nan_to_num()  # NaN where a class has no images
    # colors must not make differences of what sampling alone would show
    count = torch.bincount(test.labels, minlength=len(names)).clamp(min=1)
    noise = max(_margin(v, n) for v, n in zip(values.mean(dim=0).nan_to_num().tolist(), count))
    limit = max(deviation.abs().max().item(), noise, 1e-9)
    image = left.imshow(deviation, cmap='RdBu', vmin=-limit, vmax=limit, aspect='auto')
    _write(left, values, '{:.0f}', deviation.abs() > 0.6 * limit)
    _label(left, names, train.names)
    fig.colorbar(image, ax=left, label=f'points from the mean of the tokens (95% of sampling: {noise:.1f})')
    won, tied = (measures.winners(values, train.names, tied) for tied in (False, True))
    right.barh(list(won), list(won.values()), color='0.4', label='alone')
    right.barh(list(won), list(tied.values()), left=list(won.values()), color='0.8', label='tied')
    right.legend(fontsize=6)
    right.invert_yaxis()
    right.set_xlabel('classes won', fontsize=8)
    right.xaxis.get_major_locator().set_params(integer=True)
    return fig


def plot_pair_accuracy(train: Tokens, test: Tokens, predict: Predict = knn_predict) -> Any:
    """:func:`pair_accuracy` as a matrix of colors, whose range is at least the sampling error."""
    values = measures.pair_accuracy(train, test, predict)
    middle = values.mean().item()
    reach = max((values - middle).abs().max().item(), margin := _margin(middle, len(test.labels)))
    title = f'accuracy of pairs (%, 95% of sampling: {margin:.1f})'
    return _matrix(values, train.names[1:], title, '{:.1f}', (middle - reach, middle + reach))


def plot_pair_nmi(
    tokens: Tokens, model: MTE, clusters: Optional[int] = None, untrained: Optional[tuple[Tokens, MTE]] = None
) -> Any:
    """:func:`pair_nmi` as a matrix of colors, with what shuffled labels and an untrained model reach.

    Args:
        tokens: From :func:`collect`.
        model: The model they are of.
        clusters: As in :func:`pair_nmi`.
        untrained: Tokens of the same images from the model before training, and that model.
    """
    chance = measures.pair_nmi(tokens, model, clusters, shuffled=True).mean().item()
    title = f'NMI of pairs (shuffled labels: {chance:.2f}'
    if untrained is not None:
        title += f', untrained: {measures.pair_nmi(*untrained, clusters).mean().item():.2f}'
    return _matrix(measures.pair_nmi(tokens, model, clusters), tokens.names[1:], f'{title})', '{:.2f}')


def plot_collapse(history: list[Collapse], every: int = 1) -> Any:
    """The course of :func:`collapse` over training.

    Args:
        history: One for each check.
        every: Steps between checks.
    """
    fig, [axes] = _figure(1, 4, 12, 2.4)
    titles = ('entropy of the mean prediction', 'mean entropy of predictions', 'effective rank', 'spread')
    for ax, title, values in zip(axes, titles, zip(*history)):
        ax.plot([i * every for i in range(len(history))], values, color='0.2')
        ax.set_title(title, fontsize=9)
        ax.set_xlabel('step', fontsize=8)
        ax.set_ylim(0, 1.05 * max(1.0, *(v for v in values if v == v)))
    return fig


def _matrix(
    values: torch.Tensor, names: tuple[str, ...], title: str, form: str, limits: Optional[tuple[float, float]] = None
) -> Any:
    side = 2.2 + 0.42 * len(names)
    low, high = limits or (values.min().item(), values.max().item())
    fig, [[ax]] = _figure(1, 1, side + 0.8, side)
    image = ax.imshow(values, cmap='viridis', vmin=low, vmax=high)
    _write(ax, values, form, values <= (low + high) / 2)
    _label(ax, names, names)
    ax.set_title(title, fontsize=9)
    fig.colorbar(image, ax=ax, shrink=0.8)
    return fig


def _write(ax: Any, values: torch.Tensor, form: str, on_dark: torch.Tensor) -> None:
    """Each value in its cell."""
    for (i, j), value in zip(torch.cartesian_prod(*map(torch.arange, values.shape)).tolist(), values.flatten()):
        text = '' if value.isnan() else form.format(value)
        ax.text(j, i, text, ha='center', va='center', fontsize=7, color='w' if on_dark[i, j] else 'k')


def _label(ax: Any, columns: Any, rows: Any) -> None:
    ax.set_xticks(range(len(columns)), columns, rotation=45, ha='right', fontsize=8)
    ax.set_yticks(range(len(rows)), rows, fontsize=8)
