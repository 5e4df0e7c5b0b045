"""timm's Eva: EVA, EVA-02, RoPE ViTs (axial, mixed), Perception Encoder, DINOv3, ..."""

from typing import Any, Optional

import torch
from timm.models import Eva
from torch import nn

from .vit import ViTFamily

__all__ = ['EvaFamily']


class EvaFamily(ViTFamily):
    """As a ViT, with rotary embeddings: observers get rows that rotate nothing."""

    @staticmethod
    def takes(model: nn.Module) -> bool:
        return isinstance(model, Eva)

    def tokenise(self, model: Any, x: torch.Tensor) -> tuple[torch.Tensor, Optional[torch.Tensor]]:
        x, rope = model._pos_embed(model.patch_embed(x))
        return model.norm_pre(x), rope
