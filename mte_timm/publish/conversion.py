"""A network's tensors as a timm model takes them: layouts of other codebases, timm's conversion, grids of patches.

Owns names and grids that timm's ``checkpoint_filter_fn`` doesn't know. Changes no weight but a position embedding that
is brought to another grid, and guesses no grid where more than one is possible.
"""

import math
import re
import sys
from contextlib import redirect_stdout
from io import StringIO
from typing import Any, NamedTuple, Optional

import torch
from timm.layers import resample_abs_pos_embed

from .codebases import Origin, Size
from .loading import CheckpointError
from .search import Tensors

__all__ = ['Grids', 'compare_grids', 'converted', 'size_of', 'timm_names', 'with_masks']

CHUNKED = re.compile(r'^blocks\.\d+\.(?=\d+\.)')


def timm_names(own: Tensors, target: Any) -> Tensors:
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
        # parts wrapped one by one; LayerScale of DeiT III and BEiT
        others = name.replace('.module.', '.'), re.sub(r'\.gamma_(\d)$', r'.ls\1.gamma', name)
        named[name if name in wanted else next((n for n in others if n in wanted), name)] = tensor
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


class Grids(NamedTuple):
    """Grids (H, W) of patches."""

    trained: Size
    wanted: Size
    assumed: bool = False  # only the number of patches tells the trained one

    def __str__(self) -> str:
        old, new = ('x'.join(map(str, grid)) for grid in (self.trained, self.wanted))
        return old if old == new else f'{old} -> {new}'


def compare_grids(
    own: Tensors, target: Any, origin: Origin, trained_size: Optional[Size], requested: bool
) -> Optional[Grids]:
    """The grid that ``own['pos_embed']`` was trained with, beside that of ``target``; None without one.

    Users may say the ``trained_size`` of the images, and may have ``requested`` the size of ``target``.

    Raises:
        CheckpointError: more than one grid is possible, or the number of patches contradicts ``trained_size``.
    """
    theirs, ours = own.get('pos_embed'), getattr(target, 'pos_embed', None)
    grid = tuple(getattr(getattr(target, 'patch_embed', None), 'grid_size', None) or ())
    if theirs is None or len(grid) != 2 or not isinstance(ours, torch.Tensor) or theirs.ndim != ours.ndim:
        return None
    if ours.ndim == 4:  # B, H, W, D tells its grid
        return Grids((theirs.shape[1], theirs.shape[2]), (ours.shape[1], ours.shape[2]))
    if ours.ndim != 3:
        return None
    # DINOv2's embedding has one row for the class token and none for registers
    num_prefix = 1 if {'register_tokens', 'cls_token'} <= own.keys() else ours.shape[1] - math.prod(grid)
    rows = theirs.shape[1] - num_prefix
    kernel, strides = own.get('patch_embed.proj.weight'), _strides(target)
    if kernel is not None and kernel.ndim == 4 and strides == tuple(target.patch_embed.patch_size):
        strides = kernel.shape[2], kernel.shape[3]  # trained with patches of another size
    for size in filter(None, (trained_size, origin.img_size)):
        trained = size[0] // strides[0], size[1] // strides[1]
        if math.prod(trained) == rows:
            return Grids(trained, (grid[0], grid[1]))
        if size is trained_size:
            raise CheckpointError(
                f'trained_size={size}: gives {trained[0]}x{trained[1]} patches, but the position embedding has {rows}; '
                'name the (height, width) in training, and the architecture with its patch size'
            )
    assumed = not origin.crops_are_square
    if rows == math.prod(grid):
        return Grids((grid[0], grid[1]), (grid[0], grid[1]), assumed)
    side = math.isqrt(max(rows, 0))
    if side and side * side == rows and not (assumed and requested):  # kept, not resampled
        return Grids((side, side), (grid[0], grid[1]), assumed)
    possible = [f'{h}x{rows // h}' for h in range(1, rows + 1) if rows % h == 0]
    raise CheckpointError(
        f'the position embedding is of {rows} patches and nothing tells their grid, which may be {", ".join(possible)}'
        ': pass trained_size=(H, W), the size of the images in training (--trained-size H W)'
    )


def _strides(target: Any) -> Size:
    h, w = (s // g for s, g in zip(target.patch_embed.img_size, target.patch_embed.grid_size))
    return h, w


def size_of(grids: Grids, target: Any) -> Size:
    """(H, W) of images that give ``target`` the trained grid."""
    strides = _strides(target)
    return grids.trained[0] * strides[0], grids.trained[1] * strides[1]


def converted(own: Tensors, target: Any, grids: Optional[Grids] = None) -> Tensors:
    """A network's tensors by their names in ``target``, or as near to them as timm's conversion comes.

    timm's conversions take any grid for a square. So an embedding that is to be resampled is replaced by zeros of the
    wanted grid for them, and resampled afterwards. Raises whatever they raise on tensors that they were not made for.
    """
    if grids is None or grids.trained == grids.wanted:
        return _by_timm(own, target)
    old, new = math.prod(grids.trained), math.prod(grids.wanted)
    embedding = own['pos_embed']
    rows = embedding.flatten(1, -2)  # B, prefix + H * W, D
    prefix, patches = rows[:, : rows.shape[1] - old], rows[:, rows.shape[1] - old :]
    blank = torch.cat([prefix, patches.new_zeros(1, new, patches.shape[2])], dim=1)
    if embedding.ndim == 4:
        blank = blank.view(1, *grids.wanted, -1)
    state = _by_timm({**own, 'pos_embed': blank}, target)
    if 'pos_embed' not in state:
        return state
    patches = resample_abs_pos_embed(patches, list(grids.wanted), list(grids.trained), num_prefix_tokens=0)
    if embedding.ndim == 4:
        return {**state, 'pos_embed': patches.view(1, *grids.wanted, -1)}
    made = state['pos_embed']
    return {**state, 'pos_embed': torch.cat([made[:, : made.shape[1] - new], patches], dim=1)}


def _by_timm(own: Tensors, target: Any) -> Tensors:
    named = timm_names(own, target)
    wanted: Tensors = target.state_dict()
    if all(k in named and named[k].shape == v.shape for k, v in wanted.items() if v.is_floating_point()):
        return named
    convert = getattr(sys.modules[type(target).__module__], 'checkpoint_filter_fn', None)
    if convert is None:
        return named
    with redirect_stdout(StringIO()):  # timm prints what it tries
        return dict(convert(dict(named), target))
