"""Running a criterion without a change to its state.

Owns what the state of a criterion is. Knows nothing of losses.
"""

import copy
import inspect
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

__all__ = ['preserve_state', 'used_by']

_MODULE_PARTS = frozenset(vars(nn.Module()))  # parameters, hooks, ...: no state of the criterion's own
_NOT_OURS = sys.stdlib_module_names | {'torch'}  # locks, loggers, process groups, ...


def used_by(function: Any) -> list[Any]:
    """What a function, or a partial of one, uses from where it was written; torch.compile cannot find that out."""
    if isinstance(function, partial):
        return [each for part in (function.func, *function.args, *function.keywords.values()) for each in used_by(part)]
    if not inspect.isfunction(function) or str(function.__module__).partition('.')[0] in _NOT_OURS:
        return []
    try:
        used = inspect.getclosurevars(function)
    except ValueError:  # a variable that has no value yet
        return []
    return [*used.nonlocals.values(), *used.globals.values()]


@contextmanager
def preserve_state(criterion: Callable[..., Any], used: Sequence[Any] = ()) -> Iterator[None]:
    """Runs the body on a copy of the criterion's state, which stays as it was.

    Its state is its tensors without gradient, numbers, and collections of these: attributes of a module and its parts,
    or of another object that is called or whose method is, of the modules that this holds or that a function uses from
    where it was written, and of helpers that are no modules. What learns stays what it is. Reductions under way are
    waited for.

    Args:
        criterion: A callable.
        used: What :func:`used_by` found before this was compiled.
    """
    found: dict[int, Any] = {}
    _collect(criterion, found, 2)
    _collect(used, found, 1)
    states = [d for o in found.values() for d in (vars(o), *(vars(o).get(n, {}) for n in ('_buffers', '_parameters')))]
    for value in (v for state in states for v in state.values()):
        if dist.is_available() and isinstance(value, dist.Work):
            value.wait()
    before = [dict(d) for d in states]
    for state in states:
        state.update({k: _copy(v) for k, v in state.items() if k not in _MODULE_PARTS})
    try:
        yield
    finally:
        for state, was in zip(states, before):
            state.clear()
            state.update(was)


def _collect(value: Any, found: dict[int, Any], depth: int) -> None:
    """Adds the objects whose attributes are state: modules, and ``depth`` levels of others that are no modules."""
    if isinstance(value, partial):
        for part in (value.func, *value.args, *value.keywords.values()):
            _collect(part, found, depth)
    elif isinstance(value, (list, tuple, set, deque, dict)):
        for part in value.values() if isinstance(value, dict) else value:
            _collect(part, found, depth)
    elif isinstance(value, nn.Module):
        for module in value.modules():
            _add(module, found, 1)
    elif inspect.ismethod(value):  # of a trainer, perhaps, whose loggers and loaders are not the criterion's
        owner = value.__self__
        for part in owner.modules() if isinstance(owner, nn.Module) else [owner]:
            _add(part, found, 0)
    elif inspect.isfunction(value):
        for part in used_by(value) if depth and not torch.compiler.is_compiling() else ():
            _collect(part, found, depth - 1)
    elif depth and _has_attributes(value) and type(value).__module__.partition('.')[0] not in _NOT_OURS:
        _add(value, found, depth - 1)


def _has_attributes(value: Any) -> bool:
    """Whether it is an object with attributes of its own, and no tensor, function or class."""
    return hasattr(value, '__dict__') and not (
        isinstance(value, torch.Tensor) or inspect.isroutine(value) or inspect.isclass(value)
    )


def _add(value: Any, found: dict[int, Any], depth: int) -> None:
    if id(value) not in found and _has_attributes(value):
        found[id(value)] = value
        for name, part in vars(value).items():
            if name not in _MODULE_PARTS:
                _collect(part, found, depth)


def _copy(value: Any) -> Any:
    """``value`` with new tensors and collections; what learns and all other objects stay the same."""
    if isinstance(value, torch.Tensor) and not value.requires_grad:
        copied = value.clone()
        return nn.Parameter(copied, False) if isinstance(value, nn.Parameter) else copied
    if isinstance(value, dict):
        made = copy.copy(value)  # a defaultdict keeps its default
        made.update((k, _copy(v)) for k, v in value.items())
        return made
    if type(value) is deque:
        return deque((_copy(v) for v in value), value.maxlen)
    if isinstance(value, tuple) and hasattr(value, '_fields'):
        return type(value)(*map(_copy, value))
    return type(value)(_copy(v) for v in value) if type(value) in (list, set, tuple) else value
