"""Backbones with a spatial map that are not timm's: torchvision's ResNet, the Swin of iBOT and Transformer-SSL."""

import inspect
from typing import Any, Optional

import torch
from torch import nn

from .base import Family, Stream, check_run, grid_of, input_size, refuse

__all__ = ['SSLSwinFamily', 'TorchvisionResNetFamily']


class SSLSwinFamily(Family):
    """Microsoft's SwinTransformer as iBOT and Transformer-SSL (MoBY) carry it; the global token is the mean.

    Raises:
        ValueError: the model's own forward computes something else than its parts in turn.
    """

    def __init__(self, model: Any) -> None:
        self.dim = self.out_dim = model.num_features
        # iBOT's forward gives all tokens when asked
        self.gives_tokens = 'return_all_tokens' in inspect.signature(model.forward).parameters
        if not self.gives_tokens:
            check_run(self, model, input_size(model))

    @staticmethod
    def takes(model: Any) -> bool:
        layers = getattr(model, 'layers', None)
        return (
            isinstance(layers, nn.ModuleList)
            and all(isinstance(getattr(layer, 'blocks', None), nn.ModuleList) for layer in layers)
            and isinstance(getattr(model, 'avgpool', None), nn.AdaptiveAvgPool1d)
            and all(isinstance(getattr(model, name, None), nn.Module) for name in ('patch_embed', 'pos_drop', 'norm'))
            and not callable(getattr(model, 'forward_head', None))
        )

    def run(
        self, model: Any, x: torch.Tensor, observers: Optional[torch.Tensor], see_global: bool, **inputs: Any
    ) -> Stream:
        size = (x.shape[-2], x.shape[-1])
        if self.gives_tokens:
            # its script hands a mask over in any case, and its ViT, unlike its Swin, looks whether to use it
            features = model(x, return_all_tokens=True, **(inputs if model.masked_im_modeling else {}))
        else:
            refuse(inputs, model)
            x = model.patch_embed(x)
            if model.ape:
                x = x + model.absolute_pos_embed
            x = model.pos_drop(x)
            for layer in model.layers:
                x = layer(x)
            x = model.norm(x)
            features = torch.cat([model.avgpool(x.transpose(1, 2)).transpose(1, 2), x], dim=1)
        patches = features[:, 1:]
        return Stream(features, patches, None, grid_of(patches.shape[1], size))

    def normalise(self, model: Any, tokens: torch.Tensor) -> torch.Tensor:
        return tokens

    def num_classes(self, model: Any) -> int:
        return _classes(model.head) if not self.gives_tokens else 0  # iBOT's forward never runs the head

    def output(self, model: Any, features: torch.Tensor) -> torch.Tensor:
        return features[:, 0] if self.gives_tokens else model.head(features[:, 0])

    def pre_logits(self, model: Any, features: torch.Tensor) -> torch.Tensor:
        return features[:, 0]


class TorchvisionResNetFamily(Family):
    """torchvision's ResNet, as the DINO, iBOT and MoCo v3 repositories and lightly's examples use it.

    Raises:
        ValueError: the model's own forward computes something else than its parts in turn.
    """

    stages = ('conv1', 'bn1', 'relu', 'maxpool', 'layer1', 'layer2', 'layer3', 'layer4')

    def __init__(self, model: Any) -> None:
        convs = [m for m in model.layer4.modules() if isinstance(m, nn.Conv2d)]
        self.dim = self.out_dim = convs[-1].out_channels
        check_run(self, model, (model.conv1.in_channels, 64, 64))

    @classmethod
    def takes(cls, model: Any) -> bool:
        parts = (*cls.stages, 'avgpool', 'fc')
        return all(isinstance(getattr(model, part, None), nn.Module) for part in parts) and not callable(
            getattr(model, 'forward_head', None)
        )

    def run(
        self, model: Any, x: torch.Tensor, observers: Optional[torch.Tensor], see_global: bool, **inputs: Any
    ) -> Stream:
        refuse(inputs, model)
        for stage in self.stages:
            x = getattr(model, stage)(x)
        return Stream(x, x.flatten(2).transpose(1, 2), None, (x.shape[2], x.shape[3]))

    def normalise(self, model: Any, tokens: torch.Tensor) -> torch.Tensor:
        return tokens

    def num_classes(self, model: Any) -> int:
        return _classes(model.fc)

    def output(self, model: Any, features: torch.Tensor) -> torch.Tensor:
        return model.fc(self.pre_logits(model, features))

    def pre_logits(self, model: Any, features: torch.Tensor) -> torch.Tensor:
        return model.avgpool(features).flatten(1)


def _classes(head: nn.Module) -> int:
    """Outputs of what stands in the classifier's place, 0 for nothing."""
    widths = [m.out_features for m in head.modules() if isinstance(m, nn.Linear)]
    return widths[-1] if widths else 0
