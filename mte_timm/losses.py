"""Losses of MTE (paper eqs. 4-6 and 7-9) around any criterion.

Owns how one criterion becomes the loss of the ensemble and the loss of distillation. Knows nothing of
models: it takes their outputs.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Optional

import timm.loss
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_map

from .auxiliary import MTEOutput
from .criteria import preserve_state, used_by

__all__ = ['MTECrossEntropy', 'MTELoss']

Criterion = Callable[..., Any]
_ONE_LABEL = (
    'SoftTargetCrossEntropy', 'LabelSmoothingCrossEntropy', 'JsdCrossEntropy', 'PolyCrossEntropy',
    'AsymmetricLossSingleLabel',
)  # fmt: skip  # those of timm's losses, old and new, that are no questions of several labels


class _Distilling(nn.Module):
    """What both losses share: the weight of L_dist, and the last values of the parts."""

    def __init__(self, criterion: Criterion, weight: float) -> None:
        super().__init__()
        if not callable(criterion):
            raise TypeError(f'criterion: must be callable, got {type(criterion).__name__}')
        check_weight(weight)
        self.criterion, self.weight = criterion, weight
        self._last: Any = ()

    @property
    def parts(self) -> dict[str, float]:
        """L_aux and L_dist of the last call, as ``ensemble`` and ``distillation``, for a log; empty before the first.

        Of a criterion that returns several losses, one entry each: ``ensemble NAME``. Reading waits for the device.
        """
        named = zip(('ensemble', 'distillation'), self._last)
        return {name: value for part, loss in named for name, value in _floats(loss, part)}

    def combine(self, ensemble: Any, distill: Any) -> Any:
        """(L_aux + w L_dist) / (1 + w), entry by entry; what is no tensor is the ensemble's.

        Raises:
            TypeError: there is no tensor.
        """
        self._last = _detached(ensemble), _detached(distill)
        if not _holds_tensor(distill):
            what = f'returned a {type(distill).__name__}; MTE combines tensors, and dicts, tuples and lists of them'
            raise TypeError(f'criterion: {what}, so return one of these')
        return _mean(ensemble, distill, self.weight)

    def extra_repr(self) -> str:
        return f'weight={self.weight}'


class MTELoss(_Distilling):
    """Ensemble and distillation loss of MTE from the host method's own criterion, paper eqs. 4 to 6.

    >>> import torch, mte_timm as mte
    >>> model = mte.wrap('test_vit', num_classes=0)
    >>> loss_fn = mte.MTELoss(torch.nn.MSELoss())
    >>> student, teacher = model(torch.randn(2, 3, 160, 160)), model(torch.randn(2, 3, 160, 160))
    >>> loss_fn(student, teacher).shape
    torch.Size([])

    With L the criterion, a the fused auxiliary output, h the global token's, s and t student and teacher:
    L_aux = L(a_s, a_t), L_dist = L(h_s, a_t), and the loss is (L_aux + w L_dist) / (1 + w). The mean, not the
    sum, keeps learning rate and gradient clipping of the host valid. The teacher of L_dist gets no gradient,
    which matters only where student and teacher are one network.

    The criterion's state (center, queue, pointer) advances once a call, by L_aux. L_dist is computed first, on a copy
    of that state, so both see the same; see :func:`preserve_state`.
    Pass the criterion itself rather than a trainer's method or a function that uses your networks, of which the tensors
    of every module are copied.

    Args:
        criterion: The host's loss, called as ``criterion(student, teacher, *args, **kwargs)``. Returns a tensor,
            or a dict, tuple or list of tensors, which are combined entry by entry.
        weight: w, the weight of L_dist.
        call: For a criterion with another order of arguments, ``call(criterion, student, teacher, *args,
            **kwargs)``, e.g. for lightly's DINOLoss
            ``lambda loss, s, t: loss(list(t.chunk(2)), list(s.chunk(8)))``.
    """

    def __init__(self, criterion: Criterion, weight: float = 1.0, call: Optional[Callable[..., Any]] = None) -> None:
        super().__init__(criterion, weight)
        self.call = call
        self._used = used_by(criterion, call)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in vars(self).items() if k != '_used'}  # which may hold what cannot be copied

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._used = used_by(self.criterion, self.call)

    def forward(self, student: MTEOutput, teacher: MTEOutput, *args: Any, **kwargs: Any) -> Any:
        """The loss of two outputs of wrapped models.

        Args:
            student: Output of the student, with gradient.
            teacher: Output of the teacher; only its ``aux`` is read.
            args: Go on to the criterion, e.g. the epoch.
            kwargs: Likewise.

        Returns:
            What the criterion returns, combined.

        Raises:
            TypeError: where an argument is no :class:`MTEOutput`.
            ValueError: where ``student`` is a teacher's.
        """
        _check_output('student', student)
        _check_output('teacher', teacher)
        if student.output is student.aux:
            raise ValueError("student: this is a teacher's output; call the loss with the student's first")
        call = self.call or (lambda criterion, s, t, *a, **k: criterion(s, t, *a, **k))
        with preserve_state((self.criterion, self.call, args, kwargs), self._used):
            target = teacher.aux.detach().clone()  # which a criterion may write into
            distill = call(self.criterion, student.output, target, *args, **kwargs)
        return self.combine(call(self.criterion, student.aux, teacher.aux, *args, **kwargs), distill)


class MTECrossEntropy(_Distilling):
    """Supervised loss of MTE, paper eq. 9: labels teach the ensemble, the ensemble teaches the global token.

    >>> import torch, mte_timm as mte
    >>> model = mte.wrap('test_vit', num_classes=10)
    >>> loss = mte.MTECrossEntropy()(model(torch.randn(2, 3, 160, 160)), torch.tensor([3, 7]))

    The loss is (CE(aux, y) + w CE(global, softmax(aux))) / (1 + w), without gradient through softmax(aux). With a
    binary cross entropy both are binary, with sigmoid(aux). Distillation has the criterion's ``reduction``, else
    it is the mean.

    Args:
        criterion: Loss of the auxiliary logits and the target, ``nn.CrossEntropyLoss()`` by default, which takes
            labels (B,) and soft targets (B, K) as mixup makes them; or any other.
        weight: w, the weight of distillation.
        binary: Whether each class is a question of its own, as for images with several labels. It is known of
            the losses of timm and torch; of others it must be said where targets are (B, K) or there is one logit.
    """

    def __init__(
        self, criterion: Optional[Criterion] = None, weight: float = 1.0, binary: Optional[bool] = None
    ) -> None:
        super().__init__(nn.CrossEntropyLoss() if criterion is None else criterion, weight)
        self.binary = _is_binary(self.criterion) if binary is None else binary

    def forward(self, output: MTEOutput, target: torch.Tensor) -> torch.Tensor:
        """The loss of a wrapped model's ``output`` for labels (B,) or soft targets (B, K); a scalar.

        Raises:
            TypeError: where ``output`` is no :class:`MTEOutput`.
            ValueError: where it has no logits: the model has no classifier; or ``binary`` must be said.
        """
        _check_output('output', output)
        if self.binary is None and target.ndim > 1:
            what = 'for several labels an image pass binary=True, for soft targets of one label binary=False'
            raise ValueError(f'criterion: whether it takes classes apart is not known of {self.criterion}; {what}')
        if not isinstance(output.output, torch.Tensor) or output.output.shape != output.aux.shape:
            raise ValueError(
                'output: global and auxiliary logits differ in shape; wrap a model with num_classes > 0 '
                'that returns one tensor (set_distilled_training(False) for distilled models)'
            )
        if output.tokens is not None and output.output is output.tokens.global_token:
            raise ValueError('output: the model has no classifier, these are features; wrap one with num_classes > 0')
        if output.aux.shape[-1] == 1 and not self.binary:
            what = 'take a binary cross entropy, and say so by binary=True'
            raise ValueError(f'criterion: the softmax of one logit is always 1; {what}')
        ensemble = self.criterion(output.aux, target)
        loss: torch.Tensor = self.combine(ensemble, self._distill(output.output, output.aux.detach()))
        return loss

    def _distill(self, logits: torch.Tensor, ensemble: torch.Tensor) -> torch.Tensor:
        """Cross entropy with the ensemble's prediction, of one kind and reduction with the criterion."""
        summed = type(self.criterion).__name__ == 'AsymmetricLossMultiLabel'  # of older timm
        reduction = getattr(self.criterion, 'reduction', 'sum' if summed else 'mean')
        if not self.binary:
            reduction = reduction if reduction in ('none', 'sum') else 'mean'
            return F.cross_entropy(logits, ensemble.softmax(dim=-1), reduction=reduction)
        each = F.binary_cross_entropy_with_logits(logits, ensemble.sigmoid(), reduction='none')
        if reduction == 'batchmean' or getattr(self.criterion, 'sum_classes', False):
            return each.sum(dim=-1).mean()
        if isinstance(self.criterion, nn.MultiLabelSoftMarginLoss):
            each = each.mean(dim=-1)
        return each if reduction == 'none' else each.sum() if reduction == 'sum' else each.mean()


def _is_binary(criterion: Any) -> Optional[bool]:
    """Whether a loss takes the classes apart; None where that is not known."""
    one = (nn.CrossEntropyLoss, *(getattr(timm.loss, name, ()) for name in _ONE_LABEL))
    several = nn.BCEWithLogitsLoss, nn.MultiLabelSoftMarginLoss
    if isinstance(criterion, one) or criterion is F.cross_entropy:
        return False
    if isinstance(criterion, several) or type(criterion).__module__.startswith('timm.loss.'):
        return True
    return True if criterion in (F.binary_cross_entropy_with_logits, F.multilabel_soft_margin_loss) else None


def _mean(ensemble: Any, distill: Any, weight: float) -> Any:
    if isinstance(ensemble, torch.Tensor):
        return (ensemble + weight * distill) / (1 + weight)
    if isinstance(ensemble, Mapping):
        return {k: _mean(v, distill[k], weight) for k, v in ensemble.items()}
    if isinstance(ensemble, (tuple, list)):
        items = [_mean(e, d, weight) for e, d in zip(ensemble, distill)]
        return type(ensemble)(*items) if hasattr(ensemble, '_fields') else type(ensemble)(items)
    return ensemble


def _holds_tensor(loss: Any) -> bool:
    if isinstance(loss, (Mapping, tuple, list)):
        return any(map(_holds_tensor, loss.values() if isinstance(loss, Mapping) else loss))
    return isinstance(loss, torch.Tensor)


def _detached(loss: Any) -> Any:
    return tree_map(lambda value: value.detach() if isinstance(value, torch.Tensor) else value, loss)


def _floats(loss: Any, name: str) -> Iterator[tuple[str, float]]:
    """The numbers in a loss by name."""
    if isinstance(loss, (Mapping, tuple, list)):
        for key, part in loss.items() if isinstance(loss, Mapping) else enumerate(loss):
            yield from _floats(part, f'{name} {key}')
    elif isinstance(loss, (int, float)) or (isinstance(loss, torch.Tensor) and loss.numel() == 1):
        yield name, float(loss)


def _check_output(name: str, out: Any) -> None:
    if not isinstance(out, MTEOutput):
        raise TypeError(f'{name}: pass what a wrapped model returns, an MTEOutput, got {type(out).__name__}')


def check_weight(weight: float) -> None:
    if not isinstance(weight, (int, float)) or not 0 <= weight < math.inf:
        raise ValueError(f'weight={weight!r}: must be a number of 0 or more')
