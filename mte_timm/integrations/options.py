"""The flags ``--mte`` and ``--mte_options`` that patches add, and the key ``mte`` in configs of DINOv2 and DINOv3."""

import argparse
import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from ..auxiliary import MTEConfig
from ..backbones import find_adapter
from ..losses import check_weight
from ..publish.loading import read_checkpoint

__all__ = [
    'allow_host_checkpoints', 'config_and_weight', 'config_for', 'parse_options', 'refuse_plain_checkpoint',
    'weight_of',
]  # fmt: skip

WEIGHT = 'weight'


def parse_options(given: Iterable[str]) -> dict[str, Any]:
    """Reads ``['n_cls=4,n_pool=6', 'weight=0.5']``: fields of :class:`~mte_timm.MTEConfig`, and the weight of L_dist.

    >>> parse_options(['', 'n_cls=2,ten=false,weight=0.5'])
    {'n_cls': 2, 'ten': False, 'weight': 0.5}

    Args:
        given: What the flags left in ``args.mte``: ``--mte`` an empty string, ``--mte_options`` its value.

    Raises:
        ValueError: a name that is no option, or a value of another type.
    """
    types = {f.name: f.type for f in dataclasses.fields(MTEConfig)} | {WEIGHT: float}
    options: dict[str, Any] = {}
    for item in filter(None, ','.join(given).split(',')):
        name, equals, value = item.partition('=')
        if not equals or name not in types:
            raise ValueError(
                f'--mte_options: unknown option {item!r}; expected e.g. n_cls=4,n_pool=6. Options: {", ".join(types)}'
            )
        kind: Any = types[name]
        try:
            options[name] = _boolean(value) if kind is bool else kind(value)
        except ValueError as e:
            raise ValueError(f'--mte_options: {name} takes a {kind.__name__}, not {value!r}') from e
    return options


def config_for(backbone: torch.nn.Module, given: Iterable[str]) -> MTEConfig:
    """The options in ``given`` for ``backbone``.

    Auxiliary CLS tokens are 4 by default where the backbone has an attention stream, else 0.
    """
    options = parse_options(given)
    options.pop(WEIGHT, None)
    options.setdefault('n_cls', 4 if find_adapter(backbone).attends else 0)
    return MTEConfig(**options)


def weight_of(given: Iterable[str]) -> float:
    """The weight of L_dist in ``given``, 1 by default."""
    return parse_options(given).get(WEIGHT, 1.0)


def config_and_weight(given: Any) -> tuple[MTEConfig, float]:
    """Options, and the weight of L_dist, that ``mte=true`` or ``mte.n_cls=4 mte.weight=1`` puts into a config.

    >>> config_and_weight({'n_cls': 2, 'n_pool': 0, 'weight': 0.5})[1]
    0.5

    Raises:
        ValueError: a name that is no option, a value out of range, or anything but true and options.
    """
    if given is not True and not isinstance(given, Mapping):
        raise ValueError(f'mte={given!r}: pass mte=true, or options one by one, as mte.n_cls=4')
    options = dict(given) if isinstance(given, Mapping) else {}
    weight = options.pop(WEIGHT, 1.0)
    known = [field.name for field in dataclasses.fields(MTEConfig)]
    if unknown := [name for name in options if name not in known]:
        raise ValueError(f'mte.{unknown[0]}: unknown option; there are {", ".join([*known, WEIGHT])}')
    check_weight(weight)
    return MTEConfig(**options), weight


def allow_host_checkpoints() -> None:
    """Lets ``torch.load`` read what the repositories put beside the tensors: their arguments and numpy's numbers.

    Their scripts are older than torch 2.6, which refuses by default all but tensors. Nothing here runs code.
    """
    from numpy import dtype, float64, generic

    scalar = float64(0).__reduce__()[0]
    torch.serialization.add_safe_globals([argparse.Namespace, scalar, dtype, type(dtype('float64')), generic])


def refuse_plain_checkpoint(path: Path) -> None:
    """Keeps a run with the flag from going on from a checkpoint without: the scripts would take the backbone alone.

    Raises:
        ValueError: the student at ``path`` has no auxiliary heads.
    """
    if path.is_file() and not any('aux.' in n or 'aux_' in n for n in read_checkpoint(path).get('student', {})):
        raise ValueError(
            f'--mte: {path} is of a run without --mte, whose heads and optimizer do not fit; '
            'choose another --output_dir, or leave --mte out to go on with that run'
        )


def _boolean(value: str) -> bool:
    known = {'1': True, 'true': True, '0': False, 'false': False}
    if value.lower() not in known:
        raise ValueError(value)
    return known[value.lower()]
