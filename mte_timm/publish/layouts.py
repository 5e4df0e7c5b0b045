"""timm's names for the tensors of a network: layouts of other codebases, then timm's own conversion.

Owns what timm's ``checkpoint_filter_fn`` of an architecture doesn't know. Changes no weight.
"""

import re
import sys
from contextlib import redirect_stdout
from io import StringIO
from typing import Any

import torch
from torch import nn

from .networks import Tensors

__all__ = ['converted', 'timm_names', 'with_masks']

CHUNKED = re.compile(r'^blocks\.\d+\.(?=\d+\.)')


def converted(own: Tensors, target: nn.Module) -> Tensors:
    """A network's tensors by their names in ``target``, or as near to them as timm's conversion comes.

    Raises whatever that conversion raises on tensors that it was not made for.
    """
    named = timm_names(own, target)
    wanted: Any = target.state_dict()
    if all(k in named and named[k].shape == v.shape for k, v in wanted.items() if v.is_floating_point()):
        return named
    convert = getattr(sys.modules[type(target).__module__], 'checkpoint_filter_fn', None)
    if convert is None:
        return named
    with redirect_stdout(StringIO()):  # timm prints what it tries
        return dict(convert(dict(named), target))


def timm_names(own: Tensors, target: nn.Module) -> Tensors:
    """Layouts that timm's conversions don't know, by the names that they do."""
    wanted = target.state_dict().keys()
    children = [name for name, _ in target.named_children()]
    nested = any(CHUNKED.match(name) for name in wanted)
    named: Tensors = {}
    for name, tensor in own.items():
        first, _, rest = name.partition('.')
        if first.isdecimal() and int(first) < len(children):  # nn.Sequential(*model.children()), as in lightly
            name = f'{children[int(first)]}.{rest}'
        if not nested:  # DINOv2's block_chunks
            name = CHUNKED.sub('blocks.', name)
        if name not in wanted and '.module.' in name:  # parts wrapped one by one
            name = next((n for n in (name.replace('.module.', '.'),) if n in wanted), name)
        if re.search(r'\.gamma_\d$', name) and name not in wanted:  # DeiT III, BEiT
            scale = re.sub(r'\.gamma_(\d)$', r'.ls\1.gamma', name)
            name = scale if scale in wanted else name
        named[name] = tensor
    if 'register_tokens' in named and 'mask_token' not in named:  # timm knows DINOv2 by its mask token
        named['mask_token'] = torch.zeros(1, 1)
    return named


def with_masks(own: Tensors) -> Tensors:
    """``own`` with biases multiplied by the masks beside them, as DINOv3's attention does."""
    masked = dict(own)
    for name in [n for n in own if n.endswith('.bias_mask')]:
        bias, mask = own.get(name.removesuffix('_mask')), own[name]
        if bias is not None and bias.shape == mask.shape and mask.isfinite().all():
            masked[name.removesuffix('_mask')] = bias * mask
            del masked[name]
    return masked
