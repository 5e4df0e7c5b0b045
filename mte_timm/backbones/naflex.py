"""timm's NaFlexVit, fed with images; its batches of patches with coordinates are not taken."""

from typing import Any, Optional

import timm.models
import torch

from .vit import ViTAdapter

__all__ = ['NaFlexAdapter']


class NaFlexAdapter(ViTAdapter):
    """As a ViT, whose embedding is a module of its own, with rotary embeddings as Eva's."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.num_class = int(getattr(model.embeds, 'cls_token', None) is not None)

    @staticmethod
    def takes(model: Any) -> bool:
        # timm 1.0.18 and newer can be asked for the embeddings alone
        known = isinstance(model, timm.models.NaFlexVit) and hasattr(model, '_forward_embeds')
        return known and not getattr(model, 'rope_is_mixed', False)

    def embedding(self, model: Any) -> Any:
        return model.embeds

    def tokenize(self, model: Any, x: torch.Tensor) -> tuple[torch.Tensor, Optional[torch.Tensor]]:
        embedded = model._forward_embeds(x, None, None, None)
        return embedded['patches'], embedded['rope_embeds']
