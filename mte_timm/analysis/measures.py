"""Measures of what the tokens of a wrapped model know (paper section 4), as plain tensors.

Knows nothing of training, or of how its figures are drawn.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, Optional, Union

import torch
import torch.nn.functional as F

from ..utils import evaluating
from ..heads import prototypes_of
from ..model import MTE
from ..tokens import AdaptivePooling
from .extra import extra
from .predict import Predict, knn_predict

__all__ = [
    'Tokens',
    'accuracy',
    'accuracy_by_class',
    'cka',
    'collect',
    'pair_accuracy',
    'pair_nmi',
    'pooling_kernels',
    'pooling_maps',
    'winners',
]


class Tokens(NamedTuple):
    """Tokens of N images, from :func:`collect`."""

    names: tuple[str, ...]
    """``global``, then ``cls 1``, ... and ``pooled 1``, ...: one for each token."""
    features: tuple[torch.Tensor, ...]
    """(N, D) of each token, as the backbone gives it; the global one may be wider."""
    projections: tuple[torch.Tensor, ...]
    """(N, K) of each auxiliary token after its own head, without prototypes; the global token's are not among them."""
    labels: torch.Tensor
    """(N,), long; -1 where the loader gives none."""


@torch.no_grad()
def collect(
    model: MTE,
    loader: Iterable[Any],
    device: Optional[Union[str, torch.device]] = None,
    max_images: Optional[int] = None,
) -> Tokens:
    """Runs ``model`` in eval mode over the images of ``loader``.

    Args:
        model: A wrapped model; its mode is put back.
        loader: Batches (images, labels) or images (B, C, H, W), e.g. a DataLoader without shuffling; one view of each
            image. Images are brought to the model's precision.
        device: Where images are moved; by default where the model is.
        max_images: Stop after this many.

    Returns:
        Everything on the CPU, float32.

    Raises:
        TypeError: ``model`` is not a wrapped one.
        ValueError: ``loader`` gives nothing, several views, or labels that are not one integer for each image.
    """
    if not isinstance(model, MTE):
        raise TypeError(f'model: pass a wrapped model, mte.wrap(model, ...), got {type(model).__name__}')
    like = next(model.parameters())
    device = device or like.device
    features: list[list[torch.Tensor]] = []
    projections: list[list[torch.Tensor]] = []
    labels, count = [], 0
    with evaluating(model):
        for batch in loader:
            images, target, *_ = (*batch, None) if isinstance(batch, (tuple, list)) else (batch, None)
            _check_batch(images, target)
            tokens = model(images.to(device, like.dtype)).tokens
            features.append([tokens.global_token, *tokens.auxiliary.unbind(1)])
            projections.append(list(model.aux.heads.project(tokens.auxiliary)))
            labels.append(torch.full((len(images),), -1) if target is None else target.cpu().long())
            count += len(images)
            if max_images is not None and count >= max_images:
                break
    if not count:
        raise ValueError('loader: gives no images')
    n_cls, n_pool = model.config.n_cls, model.config.n_pool
    names = ('global', *(f'cls {i + 1}' for i in range(n_cls)), *(f'pooled {i + 1}' for i in range(n_pool)))

    def joined(batches: list[list[torch.Tensor]]) -> tuple[torch.Tensor, ...]:
        return tuple(torch.cat(parts).float().cpu()[:max_images] for parts in zip(*batches))

    return Tokens(names, joined(features), joined(projections), torch.cat(labels)[:max_images])


def _check_batch(images: Any, labels: Any) -> None:
    if not isinstance(images, torch.Tensor):
        raise ValueError(
            f'loader: gives a {type(images).__name__} in place of images (B, C, H, W); take a transform of one view'
        )
    if labels is None:
        return
    if not isinstance(labels, torch.Tensor) or labels.shape != images.shape[:1] or labels.is_floating_point():
        shape = tuple(getattr(labels, 'shape', ()))
        raise ValueError(f'loader: gives labels {shape} for images {tuple(images.shape)}; they must be (B,) integers')


# --- difference (paper Fig. 7) -----------------------------------------------------------------------------------


def cka(tokens: Tokens) -> torch.Tensor:
    """Linear CKA between all tokens, (n, n) float64, 1 on the diagonal: low where tokens differ (paper Fig. 7).

    Centred kernel alignment of linear kernels, https://arxiv.org/abs/1905.00414, eq. (3): with X and Y centred,
    ||Y^T X||^2 / (||X^T X|| ||Y^T Y||), Frobenius norms. A token that is the same for all images is like no other: 0.
    """
    centred = [f.double() - f.double().mean(dim=0) for f in tokens.features]
    own = [(f.T @ f).norm() for f in centred]
    out = torch.ones(len(centred), len(centred), dtype=torch.float64)
    for i, x in enumerate(centred):
        for j, y in enumerate(centred[:i]):
            scale = own[i] * own[j]
            out[i, j] = out[j, i] = (y.T @ x).square().sum() / scale if scale > 0 else 0.0
    return out


# --- pooling (paper Fig. 6) --------------------------------------------------------------------------------------


@torch.no_grad()
def pooling_maps(model: MTE, images: torch.Tensor) -> torch.Tensor:
    """How much each pooled token takes from each position, (B, n_pool, H, W): the length of W_i * z there.

    The paper's Fig. 6 draws the weights W_i; this is what they make of the features, so that positions of one map and
    maps of one image can be compared.

    Args:
        model: Wrapped, with adaptive pooling.
        images: (B, C, H', W').
    """
    pool, like = _pooling(model), next(model.parameters())
    with evaluating(model):
        tokens = model(images.to(like.device, like.dtype)).tokens
        z = tokens.patches
        maps = pool.weight_maps(z, tokens.grid)
        return (maps * z.transpose(1, 2).reshape(len(z), 1, -1, *tokens.grid)).norm(dim=2)


def pooling_kernels(model: MTE) -> torch.Tensor:
    """The depth-wise kernels of the pooled tokens, (n_pool, D, k, k)."""
    convs: Any = _pooling(model).dw
    return torch.stack([dw.weight.detach()[:, 0] for dw in convs])


def _pooling(model: MTE) -> AdaptivePooling:
    pool = model.aux.pool if isinstance(model, MTE) else None
    if not isinstance(pool, AdaptivePooling):
        raise ValueError('model: has no adaptively pooled tokens; wrap it with n_pool=6')
    return pool


# --- accuracy (paper Figs. 8 and 9) ------------------------------------------------------------------------------


def accuracy(train: Tokens, test: Tokens, predict: Predict = knn_predict) -> dict[str, float]:
    """Percent right of each token, and of ``ensemble``, all auxiliary ones normalized and joined."""
    _check_labels(train, test)

    def percent(x: torch.Tensor, q: torch.Tensor) -> float:
        return 100 * (predict(x, train.labels, q) == test.labels).double().mean().item()

    each = {name: percent(x, q) for name, x, q in zip(test.names, train.features, test.features)}
    joined = (torch.cat([F.normalize(f, dim=1) for f in t.features[1:]], dim=1) for t in (train, test))
    return each | {'ensemble': percent(*joined)}


def accuracy_by_class(train: Tokens, test: Tokens, predict: Predict = knn_predict) -> torch.Tensor:
    """Percent right of each token in each class, (n, classes); NaN for one without test images (paper Fig. 8 a).

    Args:
        train: Tokens of labelled images to classify by.
        test: Tokens of the images to classify.
        predict: :func:`knn_predict` or :func:`linear_predict`, or a function like these.
    """
    _check_labels(train, test)
    right = [predict(x, train.labels, q) == test.labels for x, q in zip(train.features, test.features)]
    classes = range(int(test.labels.max()) + 1)
    return torch.stack([torch.stack([100 * r[test.labels == c].double().mean() for c in classes]) for r in right])


def winners(by_class: torch.Tensor, names: tuple[str, ...], tied: bool = False) -> dict[str, int]:
    """In how many classes each auxiliary token is better than every other one (paper Fig. 8 b).

    Args:
        by_class: From :func:`accuracy_by_class`.
        names: Of the tokens; ``global`` takes no part.
        tied: Count instead the classes in which a token is best together with others.
    """
    kept = [i for i, name in enumerate(names) if name != 'global']
    auxiliary = by_class[kept]
    best = auxiliary == auxiliary.amax(dim=0)
    counted = best & ((best.sum(dim=0) > 1) == tied)
    return {names[i]: int(row.sum()) for i, row in zip(kept, counted)}


def pair_accuracy(train: Tokens, test: Tokens, predict: Predict = knn_predict) -> torch.Tensor:
    """Percent right of pairs of auxiliary tokens, concatenated, (n, n); single ones on the diagonal (paper Fig. 9).

    The paper's is linear probing: ``predict=linear_predict``. Features are normalised before they are joined.
    """
    _check_labels(train, test)
    x, q = ([F.normalize(f, dim=1) for f in t.features[1:]] for t in (train, test))

    def accuracy(i: int, j: int) -> float:
        joined = (torch.cat([part[i], part[j]], dim=1) if i != j else part[i] for part in (x, q))
        a, b = joined
        return 100 * (predict(a, train.labels, b) == test.labels).double().mean().item()

    return _symmetric(len(x), accuracy)


def _check_labels(train: Tokens, test: Tokens) -> None:
    for name, tokens in (('train', train), ('test', test)):
        if (tokens.labels < 0).any():
            raise ValueError(f'{name}: has no labels; collect from a loader that gives (images, labels)')
    if train.names != test.names:
        raise ValueError('train, test: of different models')


# --- pseudo-labels (paper Fig. 10) -------------------------------------------------------------------------------


@torch.no_grad()
def pair_nmi(tokens: Tokens, model: MTE, clusters: Optional[int] = None, shuffled: bool = False) -> torch.Tensor:
    """NMI of labels and pseudo-labels of pairs of auxiliary tokens, (n, n); single ones on the diagonal.

    The projections of two tokens are averaged and given to the prototype layer; the best prototype is the
    pseudo-label (paper Fig. 10).

    Args:
        tokens: From :func:`collect`, with labels.
        model: The model they are of.
        clusters: Of k-means on the averaged projections, in place of prototypes: for heads that have none.
        shuffled: Shuffle the labels: what as many pseudo-labels reach by chance.

    Raises:
        ValueError: no prototype layer, and no ``clusters``.
    """
    with extra():
        from sklearn.cluster import KMeans
        from sklearn.metrics import normalized_mutual_info_score

    _check_labels(tokens, tokens)
    prototypes = prototypes_of(model.aux.global_head)
    if prototypes is None and clusters is None:
        raise ValueError('model: its heads have no prototype layer; pass clusters=..., and k-means gives pseudo-labels')

    labels = tokens.labels
    if shuffled:
        labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))]

    def nmi(i: int, j: int) -> float:
        mean = (tokens.projections[i] + tokens.projections[j]) / 2
        if clusters is not None:
            pseudo = KMeans(clusters, n_init=4, random_state=0).fit_predict(mean.numpy())
        else:
            like = next(model.parameters())
            pseudo = torch.cat([prototypes(m.to(like)).argmax(dim=1).cpu() for m in torch.split(mean, 1000)]).numpy()  # type: ignore[misc]
        return float(normalized_mutual_info_score(labels.numpy(), pseudo))

    return _symmetric(len(tokens.projections), nmi)


def _symmetric(n: int, value: Callable[[int, int], float]) -> torch.Tensor:
    out = torch.empty(n, n, dtype=torch.float64)
    for i in range(n):
        for j in range(i + 1):
            out[i, j] = out[j, i] = value(i, j)
    return out
