"""timm's NaFlexVit, fed with images; its batches of patches with coordinates are not taken."""

from typing import Any, Optional

import timm.models
import torch
from torch import nn

from .vit import ViTFamily

__all__ = ['NaFlexFamily']

NaFlexVit = getattr(timm.models, 'NaFlexVit', None)  # since timm 1.0.16


class NaFlexFamily(ViTFamily):
    """As a ViT, whose embedding is a module of its own; rotary embeddings as in Eva."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.num_class = int(getattr(model.embeds, 'cls_token', None) is not None)

    @staticmethod
    def takes(model: nn.Module) -> bool:
        if NaFlexVit is None or not isinstance(model, NaFlexVit):
            return False
        # timm 1.0.18 and newer can be asked for the embeddings alone
        return hasattr(model, '_forward_embeds') and not getattr(model, 'rope_is_mixed', False)

    def embedding(self, model: Any) -> Any:
        return model.embeds

    def tokenise(self, model: Any, x: torch.Tensor) -> tuple[torch.Tensor, Optional[torch.Tensor]]:
        embedded = model._forward_embeds(x, None, None, None)
        return embedded['patches'], embedded['rope_embeds']
