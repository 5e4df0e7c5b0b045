"""Running a criterion without a change to its state.

Owns what the state of a criterion is. Knows nothing of losses.
"""

import copy
import dis
import inspect
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from types import CellType, CodeType, FunctionType, ModuleType
from typing import Any, NamedTuple, Union

import torch
import torch.distributed as dist
from torch import nn

__all__ = ['preserve_state', 'used_by']

_MODULE_PARTS = frozenset(vars(nn.Module()))  # parameters, hooks, ...: no state of the criterion's own
_NOT_OURS = sys.stdlib_module_names | {'torch'}  # locks, loggers, process groups, ...


class _Name(NamedTuple):
    """A variable of a function: a name in its module, or the cell of a closure."""

    space: Union[dict[str, Any], CellType]
    name: str

    @property
    def value(self) -> Any:
        return self.space.cell_contents if isinstance(self.space, CellType) else self.space[self.name]

    def put(self, value: Any) -> None:
        if isinstance(self.space, CellType):
            self.space.cell_contents = value
        else:
            self.space[self.name] = value


def used_by(*values: Any) -> list[Any]:
    """What functions, and partials of them, use from where they were written; torch.compile cannot find that out."""
    used: list[Any] = []
    for value in values:
        if isinstance(value, partial):
            used += used_by(value.func, *value.args, *value.keywords.values())
        elif inspect.isfunction(value) and _is_users(value.__module__):
            used += _values(value, _names_of(value))
    return used


@contextmanager
def preserve_state(criterion: Any, used: Sequence[Any] = ()) -> Iterator[None]:
    """Runs the body on a copy of the criterion's state, which stays as it was.

    Its state is its tensors without gradient, numbers, and collections of these: attributes of a module and its parts,
    or of another object that is called or whose method is, of helpers that are no modules, and of the modules that
    these hold or that functions name, in their own code or in that of functions of yours that they name; and what
    these functions' closures and globals hold themselves. What learns stays what it is. Reductions under way are
    waited for. A compiled loss has the state of modules and of what ``used`` has.

    Args:
        criterion: A callable, or a collection of them.
        used: What :func:`used_by` found before this was compiled.
    """
    found: dict[int, Any] = {}
    _collect(criterion, found, 2)
    _collect(used, found, 1)
    names = [(name, name.value) for of in found.values() if isinstance(of, list) for name in of]
    objects = [o for o in found.values() if not isinstance(o, list)]
    states = [d for o in objects for d in (vars(o), *(vars(o).get(n, {}) for n in ('_buffers', '_parameters')))]
    for value in (v for state in states for v in state.values()):
        if dist.is_available() and isinstance(value, dist.Work):
            value.wait()
    before = [dict(d) for d in states]
    copies: dict[int, Any] = {}
    try:
        for state in states:
            state.update({k: _copy(v, copies) for k, v in state.items() if k not in _MODULE_PARTS})
        for name, value in names:
            name.put(_copy(value, copies))
        yield
    finally:
        for state, was in zip(states, before):
            state.clear()
            state.update(was)
        for name, value in names:
            name.put(value)


def _collect(value: Any, found: dict[int, Any], depth: int) -> None:
    """Adds what has state: modules, names of functions, and ``depth`` levels of other objects."""
    if isinstance(value, partial):
        for part in (value.func, *value.args, *value.keywords.values()):
            _collect(part, found, depth)
    elif isinstance(value, (list, tuple, set, deque, dict)):
        parts = value.values() if isinstance(value, dict) else value
        if not _are_plain(parts):
            for part in parts:
                _collect(part, found, depth)
    elif isinstance(value, torch.jit.ScriptModule):
        if any(True for _ in value.buffers()):
            raise TypeError('criterion: the state of a scripted module cannot be kept; pass the module that it is of')
    elif isinstance(value, nn.Module):
        for module in value.modules():
            _add(module, found, 1)
            _collect(type(module).forward, found, min(depth, 1))
    elif inspect.ismethod(value):  # of a trainer, perhaps, whose loggers and loaders are not the criterion's
        owner = value.__self__
        for part in owner.modules() if isinstance(owner, nn.Module) else [owner]:
            _add(part, found, 0)
        _collect(value.__func__, found, 0)
    elif inspect.isfunction(value):
        if not torch.compiler.is_compiling() and id(value) not in found and _is_users(value.__module__):
            found[id(value)] = _names_of(value)
            for part in _values(value, found[id(value)]):
                _collect(part, found, min(depth, 1))
    elif depth and _has_attributes(value) and type(value).__module__.partition('.')[0] not in _NOT_OURS:
        _add(value, found, depth - 1)
        _collect(type(value).__call__, found, depth - 1)


def _names_of(function: FunctionType) -> list[_Name]:
    """The variables of closures and modules that its code names, or what is defined in it."""
    variables, attributes = _words(function.__code__)
    own = function.__globals__
    modules = [own[n] for n in sorted(variables & own.keys()) if isinstance(own[n], ModuleType)]
    of_modules = [(vars(m), attributes & vars(m).keys()) for m in modules if _is_users(m.__name__)]
    cells = [_Name(c, n) for n, c in zip(function.__code__.co_freevars, function.__closure__ or ()) if _is_set(c)]
    spaces = [(own, variables & own.keys()), *of_modules]
    return [*cells, *(_Name(space, name) for space, names in spaces for name in sorted(names))]


def _values(function: FunctionType, names: list[_Name]) -> list[Any]:
    """What the names stand for, and its defaults."""
    values = [v for name in names if not isinstance(v := name.value, ModuleType)]
    return [*values, *(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]


@cache
def _words(code: CodeType) -> tuple[frozenset[str], frozenset[str]]:
    """The global variables that it names, and the attributes."""
    names = frozenset(i.argval for i in dis.get_instructions(code) if i.opname in ('LOAD_GLOBAL', 'STORE_GLOBAL'))
    within = [_words(c) for c in code.co_consts if isinstance(c, CodeType)]
    return names.union(*(w[0] for w in within)), frozenset(code.co_names).union(*(w[1] for w in within))


def _is_set(cell: CellType) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:  # a variable that has no value yet
        return False


@cache
def _is_users(module: Any) -> bool:
    """Whether a module of this name is the user's, not of an installed package, whose functions keep no center."""
    if str(module).partition('.')[0] in _NOT_OURS:
        return False
    file = getattr(sys.modules.get(module), '__file__', None) or ''
    return 'site-packages' not in file and 'dist-packages' not in file


def _has_attributes(value: Any) -> bool:
    """Whether it is an object with attributes of its own, and no tensor, function or class."""
    return hasattr(value, '__dict__') and not (
        isinstance(value, (torch.Tensor, ModuleType)) or inspect.isroutine(value) or inspect.isclass(value)
    )


def _add(value: Any, found: dict[int, Any], depth: int) -> None:
    if id(value) not in found and _has_attributes(value):
        found[id(value)] = value
        for name, part in vars(value).items():
            if name not in _MODULE_PARTS:
                _collect(part, found, depth)


def _are_plain(values: Any) -> bool:
    """Whether there are numbers and words alone, as in a schedule for each step."""
    return set(map(type, values)) <= {int, float, bool, str}


def _copy(value: Any, copies: dict[int, Any]) -> Any:
    """``value`` with new tensors and collections; what learns and all other objects stay the same."""
    if torch.compiler.is_compiling():
        return _copied(value, copies)
    if id(value) not in copies:
        copies[id(value)] = _copied(value, copies)
    return copies[id(value)]


def _copied(value: Any, copies: dict[int, Any]) -> Any:
    if isinstance(value, torch.Tensor) and not value.requires_grad:
        copied = value.clone()
        return nn.Parameter(copied, False) if isinstance(value, nn.Parameter) else copied
    if isinstance(value, dict):
        made = copy.copy(value)  # a defaultdict keeps its default
        for k, v in value.items():  # not by update, which a Counter takes to add
            made[k] = _copy(v, copies)
        return made
    if type(value) in (list, tuple) and _are_plain(value):
        return value[:]
    if type(value) is deque:
        return deque((_copy(v, copies) for v in value), value.maxlen)
    if isinstance(value, tuple) and hasattr(value, '_fields'):
        return type(value)(*(_copy(v, copies) for v in value))
    return type(value)(_copy(v, copies) for v in value) if type(value) in (list, set, tuple) else value
