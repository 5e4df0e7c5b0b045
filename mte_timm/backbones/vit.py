"""timm's VisionTransformer: ViT, DeiT, CLIP, SigLIP, DINOv2, FlexiViT, hybrids, ..."""

from typing import Any, Optional

import torch
from timm.models import VisionTransformer, checkpoint
from torch import nn

from ..observers import observer_mask
from .base import Family, Stream, grid_of, refuse

__all__ = ['ViTFamily', 'run_blocks']


class ViTFamily(Family):
    """Observers stand at the end of the sequence and pass through the model's own blocks."""

    attends = True

    def __init__(self, model: Any) -> None:
        self.dim = self.out_dim = model.embed_dim
        self.num_prefix = model.num_prefix_tokens
        self.num_heads = next(m.num_heads for m in model.blocks.modules() if hasattr(m, 'num_heads'))
        # class token, and DeiT's distillation token, which is a class token with a second teacher
        self.num_class = sum(getattr(model, t, None) is not None for t in ('cls_token', 'dist_token'))

    @staticmethod
    def takes(model: nn.Module) -> bool:
        return isinstance(model, VisionTransformer)

    def tokenise(self, model: Any, x: torch.Tensor) -> tuple[torch.Tensor, Optional[torch.Tensor]]:
        """Images (B, C, H, W) to the tokens that enter the first block (B, L, D), and rotary embeddings if any."""
        x = model._pos_embed(model.patch_embed(x))
        return model.norm_pre(model.patch_drop(x)), None

    def embedding(self, model: Any) -> Any:
        """The module that knows the grid of images."""
        return model.patch_embed

    def run(
        self, model: Any, x: torch.Tensor, observers: Optional[torch.Tensor], see_global: bool, **inputs: Any
    ) -> Stream:
        refuse(inputs, model)
        size = (x.shape[-2], x.shape[-1])
        if observers is None:
            features, seen = model.forward_features(x), None
            num_own = features.shape[1]
        else:
            own, rope = self.tokenise(model, x)
            num_own = own.shape[1]
            num_hidden = 0 if see_global else self.num_class
            joint = run_blocks(model, own, observers, num_hidden, rope)
            # strides as the plain model's, since they decide how later sums are rounded
            out, seen = torch.split(joint, [num_own, joint.shape[1] - num_own], dim=1)
            out = out.contiguous() if own.is_contiguous() else torch.empty_like(own).copy_(out)
            features, seen = model.norm(out), model.norm(seen)
        patches = features[:, self.num_prefix :]
        embed = self.embedding(model)
        grid = embed.dynamic_feat_size(size) if hasattr(embed, 'dynamic_feat_size') else None
        if grid is None or grid[0] * grid[1] != patches.shape[1]:  # a stem that pads, or dropped patches
            grid = grid_of(patches.shape[1], size)
        return Stream(features, patches, seen, (int(grid[0]), int(grid[1])))

    def normalise(self, model: Any, tokens: torch.Tensor) -> torch.Tensor:
        return model.fc_norm(tokens) if hasattr(model, 'fc_norm') else tokens


def run_blocks(
    model: Any,
    own: torch.Tensor,
    observers: torch.Tensor,
    num_hidden: int,
    rope: Optional[torch.Tensor],
) -> torch.Tensor:
    """Runs timm's blocks over own tokens and observers.

    Args:
        model: Backbone with ``blocks`` whose forward takes ``attn_mask``, and ``grad_checkpointing``.
        own: Tokens of the model, (B, L, D).
        observers: Auxiliary CLS tokens, (1, n_cls, D).
        num_hidden: How many of the first own tokens observers don't see.
        rope: Rotary embeddings of the patches (..., N, 2 * head_dim); with one leading entry for each block
            where the model has ``rope_mixed``.

    Returns:
        Tokens (B, L + n_cls, D) after the last block, before the final norm.
    """
    x = torch.cat([own, observers.to(own.dtype).expand(own.shape[0], -1, -1)], dim=1)
    mask = observer_mask(own.shape[1], observers.shape[1], num_hidden, device=x.device)
    if rope is not None:
        rope = add_identity_rows(rope, observers.shape[1])
    for i, block in enumerate(model.blocks):
        kwargs: dict[str, Any] = {'attn_mask': mask}
        if rope is not None:
            kwargs['rope'] = rope[i] if getattr(model, 'rope_mixed', False) else rope
        if model.grad_checkpointing and torch.is_grad_enabled():
            x = checkpoint(block, x, **kwargs)
        else:
            x = block(x, **kwargs)
    return x


def add_identity_rows(rope: torch.Tensor, n: int) -> torch.Tensor:
    """Appends to (..., N, sin | cos) rotary embeddings ``n`` rows that rotate nothing: sin 0, cos 1."""
    sin = rope.new_zeros(*rope.shape[:-2], n, rope.shape[-1] // 2)
    return torch.cat([rope, torch.cat([sin, sin + 1], dim=-1)], dim=-2)
