"""Pictures of the measures: each ``plot_*`` takes what its twin takes and returns a matplotlib Figure."""

from typing import Any, Optional

import torch

from ..model import MTE
from .extra import extra
from .measures import (
    Collapse,
    Predict,
    Tokens,
    accuracy_by_class,
    cka,
    knn_predict,
    pair_accuracy,
    pair_nmi,
    pooling_kernels,
    pooling_maps,
    winners,
)

__all__ = [
    'plot_accuracy_by_class',
    'plot_cka',
    'plot_collapse',
    'plot_kernels',
    'plot_pair_accuracy',
    'plot_pair_nmi',
    'plot_pooling',
]


def _pyplot() -> Any:
    with extra():
        import matplotlib.pyplot as plt
    return plt


def plot_cka(tokens: Tokens) -> Any:
    """:func:`cka` as a matrix of colours."""
    return _matrix(cka(tokens), tokens.names, 'linear CKA', '{:.2f}')


def plot_pooling(model: MTE, images: torch.Tensor, pictures: Optional[torch.Tensor] = None) -> Any:
    """:func:`pooling_maps` over the images, a row for each.

    Args:
        model: Wrapped, with adaptive pooling.
        images: (B, C, H, W) as the model takes them.
        pictures: The same to look at, in [0, 1]; by default each image stretched to that range.
    """
    plt = _pyplot()

    maps, images = pooling_maps(model, images).float().cpu(), images.float()
    if pictures is None:
        low, high = (f(images.flatten(1), dim=1)[(...,) + 3 * (None,)] for f in (torch.amin, torch.amax))
        pictures = (images - low) / (high - low).clamp(min=1e-12)
    n = maps.shape[1]
    fig, axes = plt.subplots(len(maps), 1 + n, figsize=(1.3 * (1 + n), 1.3 * len(maps)), squeeze=False)
    for row, picture, of_tokens in zip(axes, pictures.float().cpu(), maps):
        array = picture.permute(1, 2, 0).clamp(0, 1).numpy()
        extent = (-0.5, array.shape[1] - 0.5, array.shape[0] - 0.5, -0.5)  # of the picture's pixels
        for i, ax in enumerate(row):
            ax.imshow(array, cmap='gray')
            if i:
                most = of_tokens.max().item()  # the same colours for all tokens of an image
                ax.imshow(
                    of_tokens[i - 1], cmap='inferno', vmin=0, vmax=most, alpha=0.65, extent=extent,
                    interpolation='bilinear',
                )  # fmt: skip
            ax.set_axis_off()
    for i, ax in enumerate(axes[0]):
        ax.set_title(f'pooled {i}' if i else 'image', fontsize=9)
    fig.tight_layout(pad=0.4)
    return fig


def plot_kernels(model: MTE, channels: int = 8) -> Any:
    """:func:`pooling_kernels`: a row for each token, the same ``channels`` channels in each."""
    plt = _pyplot()

    kernels = pooling_kernels(model).float().cpu()
    n, dim = kernels.shape[:2]
    picked = torch.linspace(0, dim - 1, min(channels, dim)).long()
    fig, axes = plt.subplots(n, len(picked), figsize=(1.1 * len(picked), 1.15 * n), squeeze=False)
    for i, row in enumerate(axes):
        for channel, ax in zip(picked, row):
            limit = kernels[:, channel].abs().max()
            ax.imshow(kernels[i, channel], cmap='RdBu', vmin=-limit, vmax=limit)
            ax.set_xticks([])
            ax.set_yticks([])
            if i == 0:
                ax.set_title(f'channel {channel}', fontsize=7)
        row[0].set_ylabel(f'pooled {i + 1}', fontsize=8)
    fig.tight_layout(pad=0.4)
    return fig


def plot_accuracy_by_class(
    train: Tokens, test: Tokens, predict: Predict = knn_predict, classes: Optional[list[str]] = None
) -> Any:
    """:func:`accuracy_by_class` as a matrix, and :func:`winners` beside it."""
    plt = _pyplot()

    values = accuracy_by_class(train, test, predict)
    names = classes or [str(c) for c in range(values.shape[1])]
    width = 3 + 0.55 * len(names)
    fig, (left, right) = plt.subplots(
        1, 2, figsize=(width + 2.4, 1.2 + 0.32 * len(values)), width_ratios=(width, 2.4), layout='constrained'
    )
    deviation = (values - values.mean(dim=0)).nan_to_num()  # NaN where a class has no images
    limit = max(deviation.abs().max().item(), 1e-9)
    image = left.imshow(deviation, cmap='RdBu', vmin=-limit, vmax=limit, aspect='auto')
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            colour = 'w' if deviation[i, j].abs() > 0.6 * limit else 'k'
            left.text(j, i, '' if value.isnan() else f'{value:.0f}', ha='center', va='center', fontsize=7, color=colour)
    left.set_xticks(range(len(names)), names, rotation=45, ha='right', fontsize=8)
    left.set_yticks(range(len(train.names)), train.names, fontsize=8)
    fig.colorbar(image, ax=left, label='points from the mean of the tokens')
    count = winners(values, train.names)
    right.barh(range(len(count)), list(count.values()), color='0.4')
    right.set_yticks(range(len(count)), list(count), fontsize=8)
    right.invert_yaxis()
    right.set_xlabel('classes won', fontsize=8)
    right.xaxis.get_major_locator().set_params(integer=True)
    return fig


def plot_pair_accuracy(train: Tokens, test: Tokens, predict: Predict = knn_predict) -> Any:
    """:func:`pair_accuracy` as a matrix of colours."""
    return _matrix(pair_accuracy(train, test, predict), train.names[1:], 'accuracy of pairs (%)', '{:.1f}')


def plot_pair_nmi(tokens: Tokens, model: MTE, clusters: Optional[int] = None) -> Any:
    """:func:`pair_nmi` as a matrix of colours."""
    return _matrix(pair_nmi(tokens, model, clusters), tokens.names[1:], 'NMI of pairs', '{:.2f}')


def plot_collapse(history: list[Collapse], every: int = 1) -> Any:
    """The course of :func:`collapse` over training.

    Args:
        history: One for each check.
        every: Steps between checks.
    """
    plt = _pyplot()

    steps = [i * every for i in range(len(history))]
    fig, axes = plt.subplots(1, 4, figsize=(12, 2.4), layout='constrained')
    titles = ('entropy of the mean prediction', 'mean entropy of predictions', 'effective rank', 'spread')
    for ax, title, values in zip(axes, titles, zip(*history)):
        ax.plot(steps, values, color='0.2')
        ax.set_title(title, fontsize=9)
        ax.set_xlabel('step', fontsize=8)
        ax.set_ylim(0, 1.05 * max(1.0, *(v for v in values if v == v)))
    return fig


def _matrix(values: torch.Tensor, names: tuple[str, ...], title: str, form: str) -> Any:
    plt = _pyplot()

    side = 2.2 + 0.42 * len(names)
    fig, ax = plt.subplots(figsize=(side + 0.8, side), layout='constrained')
    image = ax.imshow(values, cmap='viridis')
    middle = (values.max() + values.min()) / 2
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            ax.text(
                j, i, form.format(value), ha='center', va='center', fontsize=7, color='k' if value > middle else 'w'
            )
    ax.set_xticks(range(len(names)), names, rotation=45, ha='right', fontsize=8)
    ax.set_yticks(range(len(names)), names, fontsize=8)
    ax.set_title(title, fontsize=9)
    fig.colorbar(image, ax=ax, shrink=0.8)
    return fig
