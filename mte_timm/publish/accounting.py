"""Whether a conversion loses anything of a network, and which argument or architecture would lose nothing.

Every floating-point tensor of the network must be used, or provably have no effect on features. Owns these proofs.
Autograd says what a conversion uses, so that no conversion has to be known.
"""

import difflib
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Optional

import timm
import torch

from ..utils import classifier_names
from .codebases import Origin
from .conversion import Grids, compare_grids, converted, timm_names
from .loading import CheckpointError
from .search import Tensors

__all__ = ['Account', 'account_for', 'advice', 'check', 'identity']

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# first parts of names that follow a backbone: projections, predictors, decoders, queues
HEADS = re.compile(
    r'(?i)head|proj|predict|decod|classif|prototype|last_layer|queue|center|loss|criteri|logit|^fc$|^mlp$|metric'
    r'|student|teacher|momentum|_k$|target|^ema'
)
MASK_TOKENS = re.compile(r'(^|\.)mask(ed)?_(token|embed)s?$')
DINOV3_NORM = {'rope_embed.periods', 'local_cls_norm.weight', 'local_cls_norm.bias'}  # of local crops, in training


class Account(NamedTuple):
    """What becomes of a network's tensors."""

    state: Tensors  # by timm's names
    missing: list[str]  # names in timm that nothing is for
    misshapen: list[str]
    heads: list[str]  # names in the file: they follow the backbone
    without_effect: dict[str, str]  # names in the file, and why
    lost: list[str]  # names in the file


def account_for(
    own: Tensors, target: Any, grids: Optional[Grids] = None, drop: Sequence[str] = (), buffers_of: Any = None
) -> Account:
    """Converts a network and says what became of each of its tensors.

    What ``drop`` names is no part of the backbone. Where ``target`` is on the meta device, buffers are compared with
    those of ``buffers_of``. Raises whatever timm's conversion raises on tensors that it was not made for.
    """
    wanted = target.state_dict()
    state = converted(own, target, grids)
    # integers and masks are made anew by the model, as are counts of batches, which evaluation never reads
    missing = [k for k, v in wanted.items() if k not in state and v.is_floating_point()]
    misshapen = [k for k, v in wanted.items() if k in state and state[k].shape != v.shape]
    taken = {k: state[k] for k in wanted if k in state}
    unused = _unused(own, taken, lambda tensors: converted(tensors, target, grids), wanted)
    used_firsts = {k.split('.')[0] for k in own if k not in unused}
    has_prefix = len(used_firsts) == 1 and used_firsts.isdisjoint(k.split('.')[0] for k in wanted)
    classifiers = classifier_names(target)
    heads, without_effect, lost = [], {}, []
    for name, part in unused.items():
        first = name.split('.')[0]
        if any(name.startswith(beginning) for beginning in drop):
            without_effect[name] = 'dropped on request'
        elif any(f'{name}.'.startswith(f'{c}.') for c in classifiers) or 'pre_logits' in name:
            heads.append(name)
        elif MASK_TOKENS.search(name) or (first == 'local_cls_norm' and own.keys() >= DINOV3_NORM):
            without_effect[name] = 'used in pre-training only'
        elif why := _recomputed(name, own[name], target if buffers_of is None else buffers_of):
            without_effect[name] = why
        elif name.endswith('bias') and not own[name][part].any():
            without_effect[name] = 'is 0' if part.all() else f'{int(part.sum())} of its values, which are 0'
        elif first not in used_firsts and (HEADS.search(first) or has_prefix):
            heads.append(name)  # or a tower beside the one whose prefix the conversion has taken away
        else:
            lost.append(name)
    return Account(state, missing, misshapen, heads, without_effect, lost)


def identity(tensor: torch.Tensor) -> tuple[int, int]:
    """Equal for two tensors of the same elements in memory."""
    return (tensor.data_ptr() if tensor.layout == torch.strided else id(tensor)), tensor.numel()


def _unused(
    own: Tensors, taken: Tensors, convert: Callable[[Tensors], Tensors], wanted: Tensors
) -> dict[str, torch.Tensor]:
    """Floating-point tensors of ``own`` that ``taken`` is not made of, each with a mask of those elements."""
    whole = {identity(v) for v in taken.values()}
    suspects = [k for k, v in own.items() if v.is_floating_point() and v.numel() and identity(v) not in whole]
    leaves = {k: own[k].detach().float().requires_grad_() for k in suspects}
    gradients: Sequence[Optional[torch.Tensor]] = [None] * len(leaves)
    with torch.enable_grad():
        made = convert({**own, **leaves})
        weights = {k: torch.rand(v.shape) + 0.5 for k, v in made.items() if k in wanted and v.requires_grad}
        if weights:
            total = torch.stack([(made[k] * w).sum() for k, w in weights.items()]).sum()
            gradients = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    unused = {}
    for name, gradient in zip(leaves, gradients):
        mask = torch.ones_like(leaves[name], dtype=torch.bool) if gradient is None else gradient == 0
        if not mask.any():
            continue
        # an interpolation to fewer points skips some; what is merely cut, copied and joined must be used whole
        drawn = torch.cat([w.flatten() for w in weights.values()]) if weights else mask
        if gradient is None or mask.all() or torch.isin(torch.unique(gradient[~mask]), drawn).all():
            unused[name] = mask
    return unused


def _recomputed(name: str, value: torch.Tensor, target: Any) -> str:
    """Why a buffer that the model makes anew is not needed, or ''."""
    last = name.split('.')[-1]
    buffers = dict(target.named_buffers())
    if last == 'attn_mask' and set(torch.unique(value).tolist()) <= {0.0, -100.0} and name in buffers:
        return 'the model computes it from the image size'  # Swin's shifted windows
    made = [buffers[name]] if name in buffers else [b for n, b in buffers.items() if n.split('.')[-1] == last]
    if last in ('freqs_cos', 'freqs_sin') and hasattr(target, 'rope'):  # EVA-02 repeats them in every block
        made = [target.rope.get_embed().chunk(2, dim=-1)[last == 'freqs_cos']]
    if not made or made[0].shape != value.shape:
        return ''
    if last == 'periods' and value.numel() > 1 and torch.unique(value).numel() == 1:
        return 'was never filled in'
    # bfloat16 keeps eight bits, and some repositories keep buffers in it
    same = torch.allclose(made[0].float(), value.float(), rtol=2**-8, atol=1e-6)
    return 'the model computes the same' if same else ''


def check(account: Account, own: Tensors, target: Any, model: str, kwargs: dict[str, Any]) -> None:
    """Refuses an account in which something is missing, of another shape or kind, or lost.

    Raises:
        CheckpointError: with the name, and the argument or architecture that has a place for it.
    """
    wanted, state = target.state_dict(), account.state
    problem = ''
    if account.missing:
        problem = f'{len(account.missing)} of the {len(wanted)} tensors of {model} are missing: '
        problem += _listed(account.missing)
        problem += ' (num_classes=0 leaves the classifier out)' * bool(kwargs.get('num_classes'))
        problem += f'. It has {_listed(account.lost)} instead' * bool(account.lost)
    elif account.misshapen:
        k = account.misshapen[0]
        shapes = f'{tuple(state[k].shape)} instead of {tuple(wanted[k].shape)}'
        problem = f'{len(account.misshapen)} tensors have another shape than in {model}, e.g. {k} {shapes}'
    elif account.lost:
        problem = f'{model} as made here has no place for {_listed(account.lost)}, so it would compute something else'
    if problem:
        remedy, first = advice(own, target, model, kwargs), (account.lost or [''])[0].split('.')[0]
        if not remedy:
            remedy = '. Name the architecture and arguments that were trained'
            if first and not any(k.split('.')[0] == first for k in wanted):
                remedy += f'; or, if features do not depend on it, drop=({first!r},), --drop {first}'
        raise CheckpointError(problem + remedy)
    for k, v in wanted.items():
        if k in state and v.is_floating_point() != (state[k].dtype in FLOATS):
            raise CheckpointError(f'{k} is {state[k].dtype}: quantized or converted; take what training wrote')


def advice(own: Tensors, tried: Any, model: str, kwargs: dict[str, Any], of_grids: bool = False) -> str:
    """The argument or the architecture that has a place for all of the network, found by trying.

    ``tried`` is ``model`` made with ``kwargs``, which failed; if ``of_grids``, for the number of patches.
    """
    blocks = [int(k.split('.')[1]) for k in own if re.match(r'blocks\.\d+\.', k)]
    kernel = own.get('patch_embed.proj.weight')
    arguments: list[dict[str, Any]] = [
        dict(init_values=1e-5), dict(qk_norm=True), dict(global_pool='avg'), dict(global_pool='map'),
        dict(fc_norm=False), dict(pre_norm=True), dict(qkv_bias=False), dict(pos_embed='none'),
        dict(class_token=False, global_pool='avg'),
    ]  # fmt: skip
    if kernel is not None and kernel.ndim == 4:
        arguments.append(dict(in_chans=kernel.shape[1]))
    if blocks:
        arguments.append(dict(depth=max(blocks) + 1))
    for n in [v.shape[1] for k, v in own.items() if k in ('reg_token', 'register_tokens') and v.ndim == 3]:
        arguments += [dict(no_embed_class=True), dict(no_embed_class=False), dict(reg_tokens=n)]
        arguments += [dict(reg_tokens=n, no_embed_class=True, **more) for more in ({}, dict(init_values=1e-5))]
    names = [n for n in timm.list_models(f'{model.split("_")[0]}_*') if n != model]
    names = difflib.get_close_matches(model, names, n=8, cutoff=0.5)
    for name, more in [*((model, a) for a in arguments), *((n, {}) for n in names)]:
        try:
            target = _without_weights(name, {**kwargs, **more})
            if of_grids and _num_prefix(target) == _num_prefix(tried):
                continue
            grids = compare_grids(timm_names(own, target), target, Origin(crops_are_square=True), None, False)
            account = account_for(own, target, grids, buffers_of=tried)
        except Exception:
            continue
        if not (account.missing or account.misshapen or account.lost):
            said = ', '.join(f'{k}={v!r}' for k, v in more.items()) or f'model={name!r}'
            return f'. {"If these were squares, " * of_grids}{said} has a place for all of it'
    return ''


def _without_weights(name: str, kwargs: dict[str, Any]) -> Any:
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
