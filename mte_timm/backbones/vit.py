"""timm's VisionTransformer: ViT, DeiT, CLIP, SigLIP, DINOv2, FlexiViT, hybrids, ..."""

from typing import Any, Optional

import torch
from timm.models import VisionTransformer, checkpoint

from ..attention import observer_mask
from .base import Adapter, BackboneOutput, grid_of, refuse

__all__ = ['ViTAdapter']


class ViTAdapter(Adapter):
    """Auxiliary CLS tokens stand at the end of the sequence and pass through the model's own blocks."""

    attends = True

    def __init__(self, model: Any) -> None:
        self.dim = self.out_dim = model.embed_dim
        self.num_prefix = model.num_prefix_tokens
        self.num_heads = next(m.num_heads for m in model.blocks.modules() if hasattr(m, 'num_heads'))
        # class token, and DeiT's distillation token, which is a class token with a second teacher
        self.num_class = sum(getattr(model, t, None) is not None for t in ('cls_token', 'dist_token'))

    @staticmethod
    def takes(model: Any) -> bool:
        return isinstance(model, VisionTransformer)

    def tokenize(self, model: Any, x: torch.Tensor) -> tuple[torch.Tensor, Optional[torch.Tensor]]:
        """Images (B, C, H, W) to the tokens (B, L, D) that enter the first block, and rotary embeddings if any."""
        x = model._pos_embed(model.patch_embed(x))
        return model.norm_pre(model.patch_drop(x)), None

    def embedding(self, model: Any) -> Any:
        """The module that knows the grid of images."""
        return model.patch_embed

    def __call__(
        self, model: Any, x: torch.Tensor, aux_cls: Optional[torch.Tensor] = None, see_global: bool = False, **more: Any
    ) -> BackboneOutput:
        refuse(more, model)
        size = (x.shape[-2], x.shape[-1])
        if aux_cls is None:
            features = model.forward_features(x)
        else:
            own, rope = self.tokenize(model, x)
            joint = run_blocks(model, own, aux_cls, 0 if see_global else self.num_class, rope)
            out, seen = torch.split(joint, [own.shape[1], aux_cls.shape[1]], dim=1)
            # strides as the plain model's, since they decide how later sums are rounded
            out = out.contiguous() if own.is_contiguous() else torch.empty_like(own).copy_(out)
            aux_cls = _final_norm(model, model.norm(seen))
            features = model.norm(out)  # last, which is what a hook that keeps its output keeps
        patches = _final_norm(model, features[:, self.num_prefix :])
        embed = self.embedding(model)
        grid = embed.dynamic_feat_size(size) if hasattr(embed, 'dynamic_feat_size') else None
        if grid is None or grid[0] * grid[1] != patches.shape[1]:  # a stem that pads, or dropped patches
            grid = grid_of(patches.shape[1], size)
        return BackboneOutput(*self.head(model, features), patches, aux_cls, (int(grid[0]), int(grid[1])))


def _final_norm(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    return model.fc_norm(tokens) if hasattr(model, 'fc_norm') else tokens


def run_blocks(
    model: Any,
    own: torch.Tensor,  # B, L, D
    observers: torch.Tensor,  # B, n_cls, D
    num_hidden: int,
    rope: Optional[torch.Tensor],  # ..., N, 2 * head_dim; one leading entry a block where the model has rope_mixed
) -> torch.Tensor:
    """Own tokens and observers after timm's last block, (B, L + n_cls, D), before the final norm."""
    x = torch.cat([own, observers.to(own.dtype)], dim=1)
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
    """Appends ``n`` rows that rotate nothing, sin 0 and cos 1, to rotary embeddings (..., N, sin | cos)."""
    sin = rope.new_zeros(*rope.shape[:-2], n, rope.shape[-1] // 2)
    return torch.cat([rope, torch.cat([sin, sin + 1], dim=-1)], dim=-2)
