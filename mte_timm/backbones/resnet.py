"""torchvision's ResNet, as the DINO, iBOT and MoCo v3 repositories and lightly's examples use it."""

from typing import Any, Optional

import torch
from torch import nn

from .base import Adapter, BackboneOutput, check_same, refuse

__all__ = ['ResNetAdapter']

STAGES = ('conv1', 'bn1', 'relu', 'maxpool', 'layer1', 'layer2', 'layer3', 'layer4')


class ResNetAdapter(Adapter):
    """Recognized by its parts; the last map is read as patches."""

    def __init__(self, model: Any) -> None:
        convs = [m for m in model.layer4.modules() if isinstance(m, nn.Conv2d)]
        self.dim = self.out_dim = convs[-1].out_channels
        check_same(model, (2, model.conv1.in_channels, 64, 64), lambda x: [(self(model, x).output, model(x))])

    @staticmethod
    def takes(model: Any) -> bool:
        parts = all(isinstance(getattr(model, part, None), nn.Module) for part in (*STAGES, 'avgpool', 'fc'))
        return parts and not callable(getattr(model, 'forward_head', None))

    def __call__(
        self, model: Any, x: torch.Tensor, aux_cls: Optional[torch.Tensor] = None, see_global: bool = False, **more: Any
    ) -> BackboneOutput:
        refuse(more, model)
        for stage in STAGES:
            x = getattr(model, stage)(x)
        features = model.avgpool(x).flatten(1)
        return BackboneOutput(
            model.fc(features), features, x.flatten(2).transpose(1, 2), None, (x.shape[2], x.shape[3])
        )

    def num_classes(self, model: Any) -> int:
        return out_features(model.fc)


def out_features(head: nn.Module) -> int:
    """Outputs of what stands in the classifier's place, 0 for nothing."""
    widths = [m.out_features for m in head.modules() if isinstance(m, nn.Linear)]
    return widths[-1] if widths else 0
