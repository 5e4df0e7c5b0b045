"""timm's CaiT and XCiT: patches first, then blocks in which a class token alone attends."""

from typing import Any, Optional

import torch
from timm.models import Cait, Xcit, checkpoint, checkpoint_seq

from ..utils import input_size
from .base import Adapter, BackboneOutput, check_same, refuse

__all__ = ['CaitAdapter', 'XcitAdapter']


class ClassAttentionAdapter(Adapter):
    """Auxiliary CLS tokens join in the class-attention blocks, each as a class token of its own.

    A block takes one class token and what it attends to. So it is called once for the model's class token, as the
    plain model does, and once for each auxiliary token, which attends to itself, the other auxiliary tokens and the
    patches. That costs each of them the keys and values of the patches in those (two) blocks.
    """

    attends = True

    def __init__(self, model: Any) -> None:
        self.dim = self.out_dim = model.embed_dim
        self.num_heads = next(m.num_heads for m in model.blocks.modules() if hasattr(m, 'num_heads'))
        check_same(model, (2, *input_size(model)), lambda x: [(self(model, x).output, model(x))])

    def patches(self, model: Any, x: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int]]:
        """Images (B, C, H, W) to the patches (B, N, D) that class attention begins with, and their grid."""
        raise NotImplementedError

    def blocks(self, model: Any) -> Any:
        """The class-attention blocks."""
        raise NotImplementedError

    def step(self, block: Any, token: torch.Tensor, rest: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """``token`` (B, 1, D) after a block in which it attends to itself and ``rest`` (B, M, D), and the rest."""
        raise NotImplementedError

    def __call__(
        self, model: Any, x: torch.Tensor, aux_cls: Optional[torch.Tensor] = None, see_global: bool = False, **more: Any
    ) -> BackboneOutput:
        refuse(more, model)
        x, grid = self.patches(model, x)
        token, entered = model.cls_token.expand(len(x), -1, -1), []  # what enters each block
        for block in self.blocks(model):
            entered.append((token, x))
            token, x = self.step(block, token, x)
        features = model.norm(torch.cat([token, x], dim=1))
        if aux_cls is not None:  # after the model's own tokens, which draw their stochastic depth first
            each = list(torch.split(aux_cls.to(x.dtype), 1, dim=1))
            for block, (token, x) in zip(self.blocks(model), entered):
                own = [token, x] if see_global else [x]
                each = [
                    self.step(block, t, torch.cat([*each[:i], *each[i + 1 :], *own], dim=1))[0]
                    for i, t in enumerate(each)
                ]
            aux_cls = model.norm(torch.cat(each, dim=1))
        return BackboneOutput(*self.head(model, features), features[:, 1:], aux_cls, grid)


class CaitAdapter(ClassAttentionAdapter):
    """Patches stay as they are in class attention."""

    @staticmethod
    def takes(model: Any) -> bool:
        return isinstance(model, Cait) and bool(model.blocks_token_only)

    def patches(self, model: Any, x: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int]]:
        x = model.pos_drop(model.patch_embed(x) + model.pos_embed)
        checkpointing = model.grad_checkpointing and torch.is_grad_enabled()
        x = checkpoint_seq(model.blocks, x) if checkpointing else model.blocks(x)
        return x, tuple(model.patch_embed.grid_size)

    def blocks(self, model: Any) -> Any:
        return model.blocks_token_only

    def step(self, block: Any, token: torch.Tensor, rest: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return block(rest, token), rest


class XcitAdapter(ClassAttentionAdapter):
    """Blocks take and return the whole sequence."""

    @staticmethod
    def takes(model: Any) -> bool:
        return isinstance(model, Xcit) and bool(model.cls_attn_blocks)

    def patches(self, model: Any, x: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int]]:
        x, (h, w) = model.patch_embed(x)
        if model.pos_embed is not None:
            x = x + model.pos_embed(len(x), h, w).reshape(len(x), -1, x.shape[1]).permute(0, 2, 1)
        x = model.pos_drop(x)
        checkpointing = model.grad_checkpointing and torch.is_grad_enabled()
        for block in model.blocks:
            x = checkpoint(block, x, h, w) if checkpointing else block(x, h, w)
        return x, (int(h), int(w))

    def blocks(self, model: Any) -> Any:
        return model.cls_attn_blocks

    def step(self, block: Any, token: torch.Tensor, rest: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = block(torch.cat([token, rest], dim=1))
        return x[:, :1], x[:, 1:]
