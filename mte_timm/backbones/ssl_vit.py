"""The VisionTransformer of the DINO and iBOT repositories, whose blocks take no mask."""

import inspect
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import nn

from ..observers import ObserverMask, observer_mask
from .base import Family, Stream, check_same

__all__ = ['SSLViTFamily']


class SSLViTFamily(Family):
    """Recognised by its parts; its blocks are run by a step of the library's own, on fused attention.

    The blocks themselves are never called, so wrappers around single blocks (FSDP's, activation checkpointing's) don't
    take part: shard the wrapped model as a whole.

    Raises:
        ValueError: a block does something else than the step; found by running both once.
    """

    attends = True
    num_prefix = num_class = 1

    def __init__(self, model: Any) -> None:
        self.dim = self.out_dim = model.embed_dim
        self.num_heads = model.blocks[0].attn.num_heads
        self.masks = 'mask' in inspect.signature(model.prepare_tokens).parameters
        blocks = model.blocks
        check_same(model, (2, 3, self.dim), lambda x: [(_step(block, x, None), block(x)) for block in blocks])

    @staticmethod
    def takes(model: Any) -> bool:
        blocks = getattr(model, 'blocks', None)
        return (
            callable(getattr(model, 'prepare_tokens', None))
            and isinstance(blocks, nn.ModuleList)
            and all(isinstance(getattr(model, name, None), nn.Module) for name in ('patch_embed', 'norm'))
            and all(isinstance(getattr(getattr(b, 'attn', None), 'qkv', None), nn.Linear) for b in blocks)
        )

    def run(
        self, model: Any, x: torch.Tensor, observers: Optional[torch.Tensor], see_global: bool, **inputs: Any
    ) -> Stream:
        own = model.prepare_tokens(x, **self._mask(model, **inputs))
        num_own, seen = own.shape[1], None
        joint, mask = own, None
        if observers is not None:
            joint = torch.cat([own, observers.to(own.dtype).expand(len(own), -1, -1)], dim=1)
            num_hidden = 0 if see_global else self.num_class
            mask = observer_mask(num_own, observers.shape[1], num_hidden, device=x.device)
        for block in model.blocks:
            joint = _step(block, joint, mask)
        features = model.norm(joint[:, :num_own])
        if observers is not None:
            seen = model.norm(joint[:, num_own:])
        if getattr(model, 'fc_norm', None) is not None:  # iBOT with mean pooling
            pooled = model.fc_norm(features[:, 1:].mean(dim=1, keepdim=True))
            features = torch.cat([pooled, features[:, 1:]], dim=1)
        size = model.patch_embed.patch_size
        height, width = size if isinstance(size, tuple) else (size, size)
        return Stream(features, features[:, 1:], seen, (x.shape[-2] // height, x.shape[-1] // width))

    def _mask(self, model: Any, mask: Optional[torch.Tensor] = None) -> dict[str, torch.Tensor]:
        """Which patches are masked, as the model's own forward decides it."""
        if not self.masks:
            if mask is not None:
                raise ValueError(f'mask: {type(model).__name__} has no masked image modelling')
            return {}
        if not model.masked_im_modeling:
            return {}
        if mask is None:
            raise ValueError('mask: this model was made with masked_im_modeling=True; pass a mask (B, H, W) of patches')
        return {'mask': mask}

    def normalise(self, model: Any, tokens: torch.Tensor) -> torch.Tensor:
        norm = getattr(model, 'fc_norm', None)
        return tokens if norm is None else norm(tokens)

    def num_classes(self, model: Any) -> int:
        return 0  # its forward never runs its head

    def output(self, model: Any, features: torch.Tensor) -> torch.Tensor:
        return features[:, 0]


def _step(block: Any, x: torch.Tensor, mask: Optional[ObserverMask]) -> torch.Tensor:
    """One block on tokens (B, L, D) of which the last are observers, if there is a ``mask``."""
    attn = block.attn
    qkv = attn.qkv(block.norm1(x)).unflatten(-1, (3, attn.num_heads, -1))
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    drop = attn.attn_drop.p if attn.training else 0.0
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=drop, scale=attn.scale)
    y = attn.proj_drop(attn.proj(y.transpose(1, 2).flatten(2)))
    gamma_1, gamma_2 = getattr(block, 'gamma_1', None), getattr(block, 'gamma_2', None)
    x = x + block.drop_path(y if gamma_1 is None else gamma_1 * y)
    y = block.mlp(block.norm2(x))
    return x + block.drop_path(y if gamma_2 is None else gamma_2 * y)
