"""Whether a conversion loses anything of a network.

Every floating-point tensor of the network must be used, or provably have no effect on features. Owns these proofs. What
a conversion uses is asked of autograd, so that no conversion has to be known.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Optional

import torch

from .grids import Grids, placed, resampled
from .layouts import converted
from .networks import Tensors

__all__ = ['FLOATS', 'Account', 'account_for', 'identity']

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# first parts of names that follow a backbone: projections, predictors, decoders, queues, and MTE's own
HEADS = re.compile(
    r'(?i)head|proj|predict|decod|classif|prototype|last_layer|queue|center|loss|criteri|logit|^fc$|^mlp$|metric'
    r'|^(aux|aux_cls|ten|pool)$|student|teacher|momentum|_k$|target|^ema'
)
MASK_TOKENS = re.compile(r'(^|\.)mask(ed)?_(token|embed)s?$')


class Account(NamedTuple):
    """What becomes of a network's tensors."""

    state: Tensors  # by timm's names
    missing: list[str]  # names in timm that nothing is for
    misshapen: list[str]
    heads: list[str]  # names in the file: they follow the backbone
    without_effect: dict[str, str]  # names in the file, and why
    lost: list[str]  # names in the file

    @property
    def fits(self) -> bool:
        return not (self.missing or self.misshapen or self.lost)


def account_for(
    own: Tensors, target: Any, grids: Optional[Grids] = None, drop: Sequence[str] = (), buffers_of: Any = None
) -> Account:
    """Converts a network and says what became of each of its tensors.

    Args:
        own: The network's tensors by their names in the file.
        target: timm model that is to take them.
        grids: As :func:`compare_grids` found them.
        drop: Beginnings of names that the user declares to be no part of the backbone.
        buffers_of: Model whose buffers are compared with the file's, where ``target`` is on the meta device.

    Raises:
        Exception: whatever timm's conversion raises on tensors that it was not made for.
    """

    def convert(tensors: Tensors) -> Tensors:
        return resampled(converted(placed(tensors, grids), target), tensors, grids)

    wanted = target.state_dict()
    state = convert(own)
    # integers and masks are made anew by the model, as are counts of batches, which evaluation never reads
    missing = [k for k, v in wanted.items() if k not in state and v.is_floating_point()]
    misshapen = [k for k, v in wanted.items() if k in state and state[k].shape != v.shape]
    unused = _unused(own, {k: state[k] for k in wanted if k in state}, convert, wanted)
    used_firsts = {k.split('.')[0] for k in own if k not in unused}
    has_prefix = len(used_firsts) == 1 and used_firsts.isdisjoint(k.split('.')[0] for k in wanted)
    classifiers = (getattr(target, 'pretrained_cfg', None) or {}).get('classifier') or ()
    classifiers = (classifiers,) if isinstance(classifiers, str) else tuple(classifiers)
    heads, without_effect, lost = [], {}, []
    for name, part in unused.items():
        first = name.split('.')[0]
        if any(name.startswith(beginning) for beginning in drop):
            without_effect[name] = 'dropped on request'
        elif any(f'{name}.'.startswith(f'{c}.') for c in classifiers) or 'pre_logits' in name:
            heads.append(name)
        elif MASK_TOKENS.search(name):
            without_effect[name] = 'used in pre-training only'
        elif why := _recomputed(name, own[name], target if buffers_of is None else buffers_of):
            without_effect[name] = why
        elif name.endswith('bias') and not own[name][part].any():
            whole = bool(part.all())
            without_effect[name] = 'is 0' if whole else f'{int(part.sum())} of its values, which are 0'
        elif first not in used_firsts and (HEADS.search(first) or has_prefix):
            heads.append(name)  # or a tower beside the one whose prefix the conversion has taken away
        else:
            lost.append(name)
    return Account(state, missing, misshapen, heads, without_effect, lost)


def identity(tensor: torch.Tensor) -> tuple[int, int]:
    """The same for two tensors of the same elements in memory."""
    return (tensor.data_ptr() if tensor.layout == torch.strided else id(tensor)), tensor.numel()


def _unused(
    own: Tensors, state: Tensors, convert: Callable[[Tensors], Tensors], wanted: Tensors
) -> dict[str, torch.Tensor]:
    """Floating-point tensors of ``own`` that ``state`` is not made of, each with a mask of those elements."""
    whole = {identity(v) for v in state.values()}
    suspects = [k for k, v in own.items() if v.is_floating_point() and v.numel() and identity(v) not in whole]
    leaves = {k: own[k].detach().float().requires_grad_() for k in suspects}
    with torch.enable_grad():
        made = convert({**own, **leaves})
        weighed = {k: torch.rand(v.shape) + 0.5 for k, v in made.items() if k in wanted and v.requires_grad}
        total = sum(((made[k] * w).sum() for k, w in weighed.items()), torch.zeros(()))
        gradients = (
            torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
            if total.requires_grad
            else [None] * len(leaves)
        )
    unused = {}
    for name, gradient in zip(leaves, gradients):
        mask = torch.ones_like(leaves[name], dtype=torch.bool) if gradient is None else gradient == 0
        if not mask.any():
            continue
        copied = gradient is not None and torch.isin(
            torch.unique(gradient[~mask]), torch.cat([w.flatten() for w in weighed.values()])
        )
        # an interpolation to fewer points skips some; what is merely cut, copied and joined must be used whole
        if gradient is None or not (~mask).any() or bool(torch.as_tensor(copied).all()):
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
    if torch.allclose(made[0].float(), value.float(), rtol=2**-8, atol=1e-6):
        return 'the model computes the same'
    return ''
