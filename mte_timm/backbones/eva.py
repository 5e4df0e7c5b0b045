"""timm's Eva: EVA, EVA-02, RoPE ViTs (axial, mixed), Perception Encoder, DINOv3, ..."""

from typing import Any, Optional

import torch
from timm.models import Eva

from .vit import ViTAdapter

__all__ = ['EvaAdapter']


class EvaAdapter(ViTAdapter):
    """As a ViT, with rotary embeddings, which do not rotate auxiliary CLS tokens."""

    @staticmethod
    def takes(model: Any) -> bool:
        return isinstance(model, Eva)

    def tokenize(self, model: Any, x: torch.Tensor) -> tuple[torch.Tensor, Optional[torch.Tensor]]:
        x, rope = model._pos_embed(model.patch_embed(x))
        return model.norm_pre(x), rope
