"""Finding the part of a training step that first gives NaN or infinity.

Owns the hooks and what they say. Knows nothing of tokens, models or losses: any module will do.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

__all__ = ['check_finite']


@contextmanager
def check_finite(*modules: nn.Module, gradients: bool = False) -> Iterator[None]:
    """Within it, the first part of ``modules`` that gives NaN or infinity is an error that names it.

    >>> import torch, mte_timm as mte
    >>> model = mte.wrap('test_vit', num_classes=0)
    >>> _ = model.backbone.blocks[1].mlp.fc1.weight.data.fill_(float('inf'))
    >>> with mte.check_finite(model):
    ...     model(torch.randn(1, 3, 160, 160))
    Traceback (most recent call last):
        ...
    FloatingPointError: MTE: backbone.blocks.1.mlp.fc1 (Linear) gives NaN or infinity ...

    Every output is looked at, which waits for the device at every part, and so are the parameters that no part of its
    own holds, such as tokens and position embeddings: for finding a fault, not for every step. A module inside
    torch.compile is not looked into.

    Args:
        modules: Models and criteria, e.g. student, teacher and ``MTELoss``.
        gradients: Look at the gradients of parameters too. With a GradScaler infinite ones are normal.

    Raises:
        FloatingPointError: from within the body.
        TypeError: an argument is no module.
    """
    for module in modules:
        if not isinstance(module, nn.Module):
            raise TypeError(
                f'modules: pass modules, such as models and criteria, not a {type(module).__name__}; a function can be '
                'looked into as mte.MTELoss(function)'
            )
    kinds = [type(top).__name__ for top in modules]
    handles = []
    try:
        for i, (top, kind) in enumerate(zip(modules, kinds)):
            if kinds.count(kind) > 1:
                kind = f'{kind} (argument {i + 1})'
            handles.append(top.register_forward_pre_hook(_Parameters(kind)))
            for name, module in top.named_modules():
                place = f'{kind}: {name} ({type(module).__name__})' if name else kind
                handles.append(module.register_forward_hook(_Outputs(place), with_kwargs=True))
            if gradients:
                for name, parameter in top.named_parameters():
                    if parameter.requires_grad:
                        hook = _Gradient(f'{kind}: the gradient of {name}')
                        handles.append(parameter.register_post_accumulate_grad_hook(hook))  # type: ignore[no-untyped-call]
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Parameters:
    """Those that stand beside a module's parts, such as tokens; of parts the outputs tell."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __call__(self, top: nn.Module, args: Any) -> None:
        for owner, module in top.named_modules():
            if module is not top and not list(module.children()):
                continue
            for name, parameter in module.named_parameters(owner, recurse=False):
                if not parameter.isfinite().all():
                    raise FloatingPointError(f'{self.kind}: {name} has {_count([parameter])}')


class _Outputs:
    def __init__(self, place: str) -> None:
        self.place = place

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        bad = [t for t in _tensors(output) if not t.isfinite().all()]
        if bad:
            inputs = all(t.isfinite().all() for t in _tensors((args, kwargs)))
            parameters = [n for n, p in module.named_parameters() if not p.isfinite().all()]
            why = 'its inputs are finite' if inputs else 'its inputs have it already: what feeds it is no module'
            if parameters:
                why += f'; so has its parameter {parameters[0]}'
            raise FloatingPointError(f'{self.place} gives {_count(bad)}; {why}')


class _Gradient:
    def __init__(self, place: str) -> None:
        self.place = place

    def __call__(self, parameter: torch.Tensor) -> None:
        if parameter.grad is not None and not parameter.grad.isfinite().all():
            raise FloatingPointError(f'{self.place} has {_count([parameter.grad])}')


def _count(tensors: list[torch.Tensor]) -> str:
    nan, infinite, total = (sum(int(n) for n in counts) for counts in zip(*map(_counts, tensors)))
    return f'NaN or infinity ({nan} and {infinite} of {total} values)'


def _counts(tensor: torch.Tensor) -> tuple[Any, Any, int]:
    return tensor.isnan().sum(), tensor.isinf().sum(), tensor.numel()


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from _tensors(part)
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _tensors(part)
