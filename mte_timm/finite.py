"""Finding the part of a training step that first gives NaN or infinity. Any modules will do."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

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

    It looks at every output, which waits for the device at every part, and at parameters that belong to no single
    part, such as tokens and position embeddings: for finding a fault, not for every step. It does not look inside
    torch.compile.

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
    with ExitStack() as stack:
        for i, (top, kind) in enumerate(zip(modules, kinds)):
            if kinds.count(kind) > 1:
                kind = f'{kind} (argument {i + 1})'
            stack.callback(top.register_forward_pre_hook(_own_parameters(kind)).remove)
            for name, module in top.named_modules():
                place = f'{kind}: {name} ({type(module).__name__})' if name else kind
                stack.callback(module.register_forward_hook(_outputs(place), with_kwargs=True).remove)
            for name, parameter in top.named_parameters() if gradients else ():
                if parameter.requires_grad:
                    hook: Any = _gradient(f'{kind}: the gradient of {name}')
                    stack.callback(parameter.register_post_accumulate_grad_hook(hook).remove)  # type: ignore[no-untyped-call]
        yield


def _own_parameters(kind: str) -> Any:
    def hook(top: nn.Module, args: Any) -> None:
        for owner, module in top.named_modules():
            if module is top or list(module.children()):
                for name, parameter in module.named_parameters(owner, recurse=False):
                    if bad := _bad(parameter):
                        raise FloatingPointError(f'{kind}: {name} has {bad}')

    return hook


def _outputs(place: str) -> Any:
    def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if bad := _bad(output):
            why = (
                'its inputs have it already: what feeds it is no module'
                if _bad((args, kwargs))
                else ('its inputs are finite')
            )
            parameter = next((f'; so has its parameter {n}' for n, p in module.named_parameters() if _bad(p)), '')
            raise FloatingPointError(f'{place} gives {bad}; {why}{parameter}')

    return hook


def _gradient(place: str) -> Any:
    def hook(parameter: torch.Tensor) -> None:
        if bad := _bad(parameter.grad):
            raise FloatingPointError(f'{place} has {bad}')

    return hook


def _bad(value: Any) -> str:
    """How many NaN and infinities the tensors in ``value`` have, '' for none."""
    tensors = [t for t in tree_leaves(value) if isinstance(t, torch.Tensor) and t.is_floating_point()]
    nan, infinite = (sum(int(f(t).sum()) for t in tensors) for f in (torch.isnan, torch.isinf))
    total = sum(t.numel() for t in tensors)
    return f'NaN or infinity ({nan} and {infinite} of {total} values)' if nan + infinite else ''
