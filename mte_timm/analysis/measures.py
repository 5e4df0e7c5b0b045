"""Measures of what the tokens of a wrapped model know (paper section 4), as plain tensors.

Knows nothing of training, or of how its figures are drawn.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, Optional, Union

import torch
import torch.nn.functional as F

from ..heads import prototypes_of
from ..model import MTE
from ..tokens import AdaptivePooling
from ..utils import evaluating
from .health import token_names
from .predict import Predict, knn_predict, needed

__all__ = [
    'Tokens', 'accuracy', 'accuracy_by_class', 'cka', 'collect', 'pair_accuracy', 'pair_nmi', 'pooling_kernels',
    'pooling_maps', 'winners',
]  # fmt: skip


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
    like, count = next(model.parameters()), 0
    batches: list[Any] = []
    with evaluating(model):
        for batch in loader:
            images, labels, *_ = (*batch, None) if isinstance(batch, (tuple, list)) else (batch, None)
            _check_batch(images, labels)
            tokens = model(images.to(device or like.device, like.dtype)).tokens
            features = tokens.global_token, *tokens.auxiliary.unbind(1)
            projections = model.aux.heads.project(tokens.auxiliary)
            labels = torch.full((len(images),), -1) if labels is None else labels.cpu().long()
            # clones, since a class token is a view of all patches
            batches.append((*([t.clone().float().cpu() for t in part] for part in (features, projections)), labels))
            count += len(images)
            if max_images is not None and count >= max_images:
                break
    if not count:
        raise ValueError('loader: gives no images')
    all_features, all_projections, all_labels = zip(*batches)

    def joined(parts: Iterable[Any]) -> tuple[torch.Tensor, ...]:
        return tuple(torch.cat(part)[:max_images] for part in zip(*parts))

    return Tokens(token_names(model), joined(all_features), joined(all_projections), torch.cat(all_labels)[:max_images])


def _check_batch(images: Any, labels: Any) -> None:
    if not isinstance(images, torch.Tensor):
        raise ValueError(
            f'loader: gives a {type(images).__name__} in place of images (B, C, H, W); take a transform of one view'
        )
    ok = labels is None or (isinstance(labels, torch.Tensor) and labels.shape == images.shape[:1])
    if not ok or (labels is not None and labels.is_floating_point()):
        shape = tuple(getattr(labels, 'shape', ()))
        raise ValueError(f'loader: gives labels {shape} for images {tuple(images.shape)}; they must be (B,) integers')


# --- difference (paper Fig. 7) -----------------------------------------------------------------------------------


def cka(tokens: Tokens) -> torch.Tensor:
    """Linear CKA between all tokens, (n, n) float64, 1 on the diagonal: low where tokens differ (paper Fig. 7).

    Centered kernel alignment of linear kernels, https://arxiv.org/abs/1905.00414, eq. (3): with X and Y centered,
    ||Y^T X||^2 / (||X^T X|| ||Y^T Y||), Frobenius norms. A token that is the same for all images is like no other: 0;
    one that is NaN gives NaN.
    """
    centered = [f.double() - f.double().mean(dim=0) for f in tokens.features]
    own = [(f.T @ f).norm() for f in centered]

    def alignment(i: int, j: int) -> float:
        scale = own[i] * own[j]
        return 1.0 if i == j else 0.0 if scale == 0 else float((centered[j].T @ centered[i]).square().sum() / scale)

    return _symmetric(len(own), alignment)


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
        z = tokens.patches.transpose(1, 2).unflatten(2, tokens.grid).unsqueeze(1)  # B, 1, D, H, W
        return (pool.weight_maps(tokens.patches, tokens.grid) * z).norm(dim=2)


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
    ensemble = (torch.cat(_normalized(t), dim=1) for t in (train, test))
    pairs = (*zip(train.features, test.features), tuple(ensemble))
    return {n: _percent(train, test, predict, *pair) for n, pair in zip((*test.names, 'ensemble'), pairs)}


def accuracy_by_class(train: Tokens, test: Tokens, predict: Predict = knn_predict) -> torch.Tensor:
    """Percent right of each token in each class, (n, classes); NaN for one without test images (paper Fig. 8 a).

    Args:
        train: Tokens of labeled images to classify by.
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
    best = by_class[kept] == by_class[kept].amax(dim=0)
    counted = best & ((best.sum(dim=0) > 1) == tied)
    return {names[i]: int(row.sum()) for i, row in zip(kept, counted)}


def pair_accuracy(train: Tokens, test: Tokens, predict: Predict = knn_predict) -> torch.Tensor:
    """Percent right of pairs of auxiliary tokens, concatenated, (n, n); single ones on the diagonal (paper Fig. 9).

    The paper's is linear probing: ``predict=linear_predict``. Features are normalized before they are joined.
    """
    _check_labels(train, test)
    tokens = _normalized(train), _normalized(test)

    def of_pair(i: int, j: int) -> float:
        x, q = (torch.cat([part[k] for k in {i, j}], dim=1) for part in tokens)
        return _percent(train, test, predict, x, q)

    return _symmetric(len(tokens[0]), of_pair)


def _normalized(tokens: Tokens) -> list[torch.Tensor]:
    return [F.normalize(f, dim=1) for f in tokens.features[1:]]


def _percent(train: Tokens, test: Tokens, predict: Predict, x: torch.Tensor, q: torch.Tensor) -> float:
    return 100 * (predict(x, train.labels, q) == test.labels).double().mean().item()


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
    score = needed('sklearn.metrics').normalized_mutual_info_score
    _check_labels(tokens, tokens)
    prototypes: Any = prototypes_of(model.aux.global_head)
    if prototypes is None and clusters is None:
        raise ValueError('model: its heads have no prototype layer; pass clusters=..., and k-means gives pseudo-labels')
    labels, like = tokens.labels, next(model.parameters())
    if shuffled:
        labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))]

    def nmi(i: int, j: int) -> float:
        mean = (tokens.projections[i] + tokens.projections[j]) / 2
        if clusters is not None:
            pseudo = needed('sklearn.cluster').KMeans(clusters, n_init=4, random_state=0).fit_predict(mean.numpy())
        else:
            pseudo = torch.cat([prototypes(m.to(like)).argmax(dim=1).cpu() for m in torch.split(mean, 1000)]).numpy()
        return float(score(labels.numpy(), pseudo))

    return _symmetric(len(tokens.projections), nmi)


def _symmetric(n: int, value: Callable[[int, int], float]) -> torch.Tensor:
    out = torch.empty(n, n, dtype=torch.float64)
    for i in range(n):
        for j in range(i + 1):
            out[i, j] = out[j, i] = value(i, j)
    return out
