"""Whether the outputs of a training batch, or one token of it, have collapsed: numbers for a training loop's log."""

import math
from typing import NamedTuple, Optional

import torch

from ..auxiliary import MTEOutput
from ..heads import prototypes_of
from ..model import MTE
from ..utils import evaluating

__all__ = ['Collapse', 'Health', 'collapse', 'health']


class Health(NamedTuple):
    """Two numbers for each token of a batch, from :func:`health`."""

    spread: dict[str, float]
    """Length of the token's centered projections over that of the projections: near 0 where all images have one."""
    top: dict[str, float]
    """Share of the images that get the token's most frequent prototype; empty where there are no prototypes."""

    @property
    def collapsed(self) -> tuple[str, ...]:
        """Names of the tokens with one projection or one prototype for nearly all images, or NaN."""
        return tuple(n for n, s in self.spread.items() if not s >= 0.01 or self.top.get(n, 0.0) > 0.95)

    def floats(self) -> dict[str, float]:
        """All numbers by name, e.g. ``'spread/cls 1'``, as loggers take them."""
        return {f'{kind}/{name}': v for kind, values in self._asdict().items() for name, v in values.items()}


@torch.no_grad()
def health(model: MTE, output: MTEOutput, max_images: int = 256) -> Health:
    """How much each token's outputs differ between the images of a batch.

        if step % 100 == 0:
            log(**analysis.health(student, out).floats(), **criterion.parts)

    The fused output can look alive while tokens in it are dead; this looks at each before the fusion. A network that
    has not learned yet may well give all images one prototype: watch whether it stays so. The heads run once more, on
    at most ``max_images``; called each hundred steps, that is below 1% of the operations of training.

    Args:
        model: The wrapped model.
        output: What it returned for a batch.
        max_images: Images, or views, that are looked at.

    Returns:
        Numbers of ``global`` (not of a teacher), of each auxiliary token, and of ``ensemble``, the mean of their
        projections.

    Raises:
        ValueError: fewer than two images.
    """
    auxiliary = output.tokens.auxiliary[:max_images]
    if len(auxiliary) < 2:
        raise ValueError(f'output: has {len(auxiliary)} images; it takes two to differ')
    like = next((p for p in model.aux.heads.parameters()), auxiliary)  # tokens of a step in mixed precision are mixed
    with evaluating(model):  # batch statistics stay as they are
        projections = model.aux.heads.project(auxiliary.to(like.dtype))  # n, B, K
    prototypes = prototypes_of(model.aux.global_head)
    auxiliaries = dict(zip(token_names(model)[1:], projections)) | {'ensemble': projections.mean(dim=0)}
    everything = ({} if model.aux.is_teacher else {'global': output.output[:max_images]}) | auxiliaries
    spread = {name: _spread(x) for name, x in everything.items()}
    if prototypes is None:
        return Health(spread, {})
    logits = {name: x if name == 'global' else prototypes(x) for name, x in everything.items()}
    return Health(spread, {n: float(torch.bincount(x.argmax(dim=1)).max() / len(x)) for n, x in logits.items()})


def token_names(model: MTE) -> tuple[str, ...]:
    """``global``, then ``cls 1``, ... and ``pooled 1``, ..."""
    numbered = (('cls', model.config.n_cls), ('pooled', model.config.n_pool))
    return ('global', *(f'{kind} {i + 1}' for kind, n in numbered for i in range(n)))


def _spread(x: torch.Tensor) -> float:
    x = x.double()
    return float((x - x.mean(dim=0)).norm() / x.norm().clamp(min=1e-300))


class Collapse(NamedTuple):
    """Signs of collapse in outputs of a batch, from :func:`collapse`. Entropies of embeddings are NaN."""

    entropy_of_mean: float
    """Entropy of the mean prediction over log K: near 0 where all images get one prediction."""
    mean_entropy: float
    """Mean entropy of the predictions over log K: near 1 where every prediction is uniform."""
    rank: float
    """Effective rank of the centered outputs, exp of the entropy of their singular values: near 1 where they lie on a
    line, at most min(B - 1, K)."""
    spread: float = math.nan
    """Length of the centered outputs over that of the outputs: near 0 where all images have nearly one output."""
    most: float = math.inf
    """What ``rank`` can be at most."""

    @property
    def collapsed(self) -> bool:
        """Whether a batch like this teaches nothing: one prediction for all, uniform ones, or outputs on a line.

        Nearly one prediction for all shows where the entropy of the mean hardly exceeds the mean entropy: the
        difference is the mutual information of image and prediction. Two classes, and batches of three, lie nearly on
        a line always, so their rank tells nothing.
        """
        on_a_line = self.rank < 2 < self.most
        if math.isnan(self.mean_entropy):
            return self.spread < 0.01 or on_a_line
        same = self.entropy_of_mean < 0.05 or self.entropy_of_mean - self.mean_entropy < 0.001
        return same or self.mean_entropy > 0.999 or on_a_line


@torch.no_grad()
def collapse(outputs: torch.Tensor, temperature: Optional[float] = 0.1) -> Collapse:
    """Checks a batch of outputs for collapse, e.g. ``analysis.collapse(out.aux)`` every hundred steps of training.

    Args:
        outputs: (B, K), logits or embeddings; B of at least 2.
        temperature: Of the softmax that makes predictions of logits; None for embeddings (BYOL, MoCo), of which only
            rank and spread are looked at.

    Raises:
        ValueError: another shape, or outputs that are not finite.
    """
    if outputs.ndim != 2 or min(outputs.shape) < 2:
        raise ValueError(f'outputs: must be (B, K) with both of at least 2, got {tuple(outputs.shape)}')
    x = outputs.double()
    if not x.isfinite().all():
        raise ValueError('outputs: not finite')
    singular = torch.linalg.svdvals(x - x.mean(dim=0))
    total, most = singular.sum(), min(len(x) - 1, x.shape[1])
    rank = torch.special.entr(singular / total).sum().exp().item() if total > 1e-6 * x.abs().max() else 0.0
    if temperature is None:
        return Collapse(math.nan, math.nan, rank, _spread(x), most)
    p = (x / temperature).softmax(dim=1)
    of_mean, mean = (torch.special.entr(q).sum(dim=-1).mean().item() / math.log(x.shape[1]) for q in (p.mean(dim=0), p))
    return Collapse(of_mean, mean, rank, _spread(x), most)
