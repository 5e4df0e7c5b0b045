"""What to do about a network that an architecture has no place for.

Owns the errors and the advice in them, which is found by trying.
"""

import difflib
import math
from collections.abc import Sequence
from typing import Any

import timm
import torch

from .accounting import FLOATS, Account, account_for
from .codebases import Origin
from .grids import compare_grids
from .layouts import timm_names
from .loading import CheckpointError
from .networks import Tensors

__all__ = ['advice', 'check']


def check(account: Account, own: Tensors, target: Any, model: str, kwargs: dict[str, Any]) -> None:
    """Holds an account to lose nothing.

    Raises:
        CheckpointError: something is missing, of another shape or kind, or has no place in the model.
    """
    wanted = target.state_dict()
    problem = ''
    if account.missing:
        hint = ' (num_classes=0 leaves the classifier out)' if kwargs.get('num_classes') else ''
        problem = f'{len(account.missing)} of the {len(wanted)} tensors of {model} are missing: '
        problem += _listed(account.missing) + hint
        if account.lost:
            problem += f'. It has {_listed(account.lost)} instead'
    elif account.misshapen:
        k = account.misshapen[0]
        problem = (
            f'{len(account.misshapen)} tensors have another shape than in {model}, e.g. {k} '
            f'{tuple(account.state[k].shape)} instead of {tuple(wanted[k].shape)}'
        )
    elif account.lost:
        problem = f'{model} as made here has no place for {_listed(account.lost)}, so it would compute something else'
    if problem:
        found = advice(own, target, model, kwargs)
        remedy = found or '. Name the architecture and arguments that were trained'
        first = (account.lost or [''])[0].split('.')[0]
        if account.lost and not found and not any(k.split('.')[0] == first for k in wanted):
            remedy += f'; or, if features do not depend on it, drop=({first!r},), --drop {first}'
        raise CheckpointError(problem + remedy)
    wrong = [k for k, v in wanted.items() if k in account.state]
    wrong = [k for k in wrong if wanted[k].is_floating_point() != (account.state[k].dtype in FLOATS)]
    if wrong:
        raise CheckpointError(
            f'{wrong[0]} is of {account.state[wrong[0]].dtype}, not of {wanted[wrong[0]].dtype} or another size of it; '
            'these weights were quantized or converted, take the checkpoint that training wrote'
        )


def advice(own: Tensors, tried: Any, model: str, kwargs: dict[str, Any], of_grids: bool = False) -> str:
    """The argument or the architecture that has a place for all of the network, found by trying.

    Args:
        own: The network's tensors.
        tried: The model that has not.
        model: Its name.
        kwargs: Its arguments.
        of_grids: Whether it failed for the number of patches.
    """
    blocks = {int(k.split('.')[1]) for k in own if k.startswith('blocks.') and k.split('.')[1].isdecimal()}
    registers = [v.shape[1] for k, v in own.items() if k in ('reg_token', 'register_tokens') and v.ndim == 3]
    arguments: list[dict[str, Any]] = [
        {'init_values': 1e-5},
        {'qk_norm': True},
        {'global_pool': 'avg'},
        {'global_pool': 'map'},
        {'fc_norm': False},
        {'pre_norm': True},
        {'qkv_bias': False},
        {'pos_embed': 'none'},
        {'class_token': False, 'global_pool': 'avg'},
        *({'no_embed_class': embedded} for embedded in (True, False) if registers),
        *({'in_chans': v.shape[1]} for k, v in own.items() if k == 'patch_embed.proj.weight' and v.ndim == 4),
        *({'depth': max(blocks) + 1} for _ in [0] if blocks),
        *({'reg_tokens': n} for n in registers),
        *({'reg_tokens': n, 'no_embed_class': True} for n in registers),
        *({'init_values': 1e-5, 'reg_tokens': n, 'no_embed_class': True} for n in registers),
    ]
    names = [n for n in timm.list_models(f'{model.split("_")[0]}_*') if n != model]
    names = difflib.get_close_matches(model, names, n=8, cutoff=0.5)
    others: list[tuple[str, dict[str, Any]]] = [(model, a) for a in arguments] + [(n, {}) for n in names]
    for name, more in others:
        try:
            target = _unfilled(name, {**kwargs, **more})
            if of_grids and _num_prefix(target) == _num_prefix(tried):
                continue
            grids = compare_grids(timm_names(own, target), target, Origin(crops_are_square=True), None, False)
            if account_for(own, target, grids, buffers_of=tried).fits:
                said = ', '.join(f'{k}={v!r}' for k, v in more.items()) or f'model={name!r}'
                return f'. {"If these were squares, " * of_grids}{said} has a place for all of it'
        except Exception:
            continue
    return ''


def _unfilled(name: str, kwargs: dict[str, Any]) -> Any:
    """A model whose weights are of no interest, without memory for them where this timm can."""
    try:
        with torch.device('meta'):
            return timm.create_model(name, **kwargs)
    except RuntimeError:  # older timm reads numbers of tensors while it builds
        return timm.create_model(name, **kwargs)


def _num_prefix(model: Any) -> int:
    """Rows of a position embedding before those of patches."""
    return int(model.pos_embed.shape[1] - math.prod(model.patch_embed.grid_size))


def _listed(names: Sequence[str]) -> str:
    return ', '.join(names[:6]) + (f' and {len(names) - 6} more' if len(names) > 6 else '')
