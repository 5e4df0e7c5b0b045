"""The image size that a position embedding was trained with, and bringing it to another one.

Owns grids of patches. Guesses none where more than one is possible.
"""

import math
from typing import Any, NamedTuple, Optional

import torch
from timm.layers import resample_abs_pos_embed

from .codebases import Origin, Size
from .loading import CheckpointError
from .networks import Tensors

__all__ = ['Grids', 'compare_grids', 'placed', 'resampled', 'size_of']


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
    """The grid that the position embedding ``own['pos_embed']`` was trained with, beside that of ``target``.

    Args:
        own: Tensors of the network.
        target: timm model to load them into.
        origin: What is known of the training.
        trained_size: (H, W) of the images, where the user says so.
        requested: Whether the user asked for the size of ``target``.

    Returns:
        None where there is no such embedding.

    Raises:
        CheckpointError: more than one grid is possible, or the number of patches contradicts ``trained_size``.
    """
    embedding = own.get('pos_embed')
    grid = tuple(getattr(getattr(target, 'patch_embed', None), 'grid_size', None) or ())
    own_embedding = getattr(target, 'pos_embed', None)
    if embedding is None or len(grid) != 2 or not isinstance(own_embedding, torch.Tensor):
        return None
    if embedding.ndim == own_embedding.ndim == 4:  # B, H, W, D tells its grid
        return Grids((embedding.shape[1], embedding.shape[2]), (own_embedding.shape[1], own_embedding.shape[2]))
    if embedding.ndim != 3 or own_embedding.ndim != 3:
        return None
    rows = embedding.shape[1] - _num_prefix(own, target, grid)
    for size in filter(None, (trained_size, origin.img_size)):
        trained = _grid_of(size, own, target, grid)
        if trained[0] * trained[1] == rows:
            return Grids(trained, (grid[0], grid[1]))
        if size is trained_size:
            raise CheckpointError(
                f'trained_size={size}: gives {trained[0]}x{trained[1]} patches, but the position embedding has {rows}; '
                'name the height and width of the images in training, and the architecture with its patch size'
            )
    if rows == grid[0] * grid[1]:
        return Grids((grid[0], grid[1]), (grid[0], grid[1]), assumed=not origin.crops_are_square)
    side = math.isqrt(max(rows, 0))
    if side and side * side == rows and (origin.crops_are_square or not requested):  # kept, not resampled
        return Grids((side, side), (grid[0], grid[1]), assumed=not origin.crops_are_square)
    possible = [f'{h}x{rows // h}' for h in range(1, rows + 1) if rows % h == 0]
    raise CheckpointError(
        f'the position embedding is of {rows} patches and nothing tells their grid, which may be {", ".join(possible)}'
        ': pass trained_size=(H, W), the size of the images in training (--trained-size H W)'
    )


def _num_prefix(own: Tensors, target: Any, grid: Any) -> int:
    """Rows of the file's embedding that belong to class tokens and registers."""
    if 'register_tokens' in own and 'cls_token' in own:  # DINOv2 adds one row to the class token, none to registers
        return 1
    return int(target.pos_embed.shape[1] - grid[0] * grid[1])


def _grid_of(size: Size, own: Tensors, target: Any, grid: Any) -> Size:
    """Patches of an image of ``size``."""
    kernel = own.get('patch_embed.proj.weight')
    strides = [s // g for s, g in zip(target.patch_embed.img_size, grid)]
    patch = tuple(target.patch_embed.patch_size)
    if kernel is not None and kernel.ndim == 4 and tuple(strides) == patch:  # trained with patches of another size
        strides = list(kernel.shape[-2:])
    return size[0] // strides[0], size[1] // strides[1]


def size_of(grids: Grids, target: Any) -> Size:
    """(H, W) of images that give ``target`` the trained grid."""
    strides = [s // g for s, g in zip(target.patch_embed.img_size, grids.wanted)]
    return grids.trained[0] * strides[0], grids.trained[1] * strides[1]


def placed(own: Tensors, grids: Optional[Grids]) -> Tensors:
    """``own`` with zeros of the wanted grid in place of the embedding's patches, for conversions that take any grid
    for a square."""
    if grids is None or grids.trained == grids.wanted:
        return own
    embedding = own['pos_embed']
    if embedding.ndim == 4:
        return {**own, 'pos_embed': embedding.new_zeros(1, *grids.wanted, embedding.shape[3])}
    prefix = embedding[:, : embedding.shape[1] - math.prod(grids.trained)]
    patches = embedding.new_zeros(1, math.prod(grids.wanted), embedding.shape[2])
    return {**own, 'pos_embed': torch.cat([prefix, patches], dim=1)}


def resampled(state: Tensors, own: Tensors, grids: Optional[Grids]) -> Tensors:
    """``state`` of :func:`placed` tensors with the true patches, brought to the wanted grid as timm does."""
    if grids is None or grids.trained == grids.wanted or 'pos_embed' not in state:
        return state
    embedding, made = own['pos_embed'], state['pos_embed']
    patches = embedding.flatten(1, 2) if embedding.ndim == 4 else embedding
    patches = patches[:, patches.shape[1] - math.prod(grids.trained) :]
    patches = resample_abs_pos_embed(patches, list(grids.wanted), list(grids.trained), num_prefix_tokens=0)
    if embedding.ndim == 4:
        return {**state, 'pos_embed': patches.unflatten(1, grids.wanted)}
    return {**state, 'pos_embed': torch.cat([made[:, : made.shape[1] - math.prod(grids.wanted)], patches], dim=1)}
