"""A published backbone for pictures of one size, and its maps for tasks that ask what is where.

Owns how weights become a timm model and four maps. Knows nothing of tasks or data.
"""

from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import nn

__all__ = ['STRIDES', 'Maps', 'load']

STRIDES = 4, 8, 16, 32  # pixels; what necks of detectors and segmenters take


def load(weights: str, size: tuple[int, int], pretrained: bool = True) -> Any:
    """The timm model of an export, without classifier, for pictures of ``size`` (H, W).

    Args:
        weights: Folder of ``mte.save_pretrained``, ``hf-hub:user/name``, or a name of timm's.
        size: Position embeddings are resampled to it by timm; it must be a multiple of the patches.
        pretrained: Or the same architecture with new weights.

    Raises:
        ValueError: there are no such weights, or the model can't have this size.
    """
    if Path(weights).is_dir() or weights.startswith(('.', '/')):
        if not Path(weights, 'config.json').is_file():
            raise ValueError(f'--weights {weights}: has no config.json; name a folder of mte.save_pretrained')
        weights = f'local-dir:{weights}'
    elif ':' not in weights and not timm.is_model(weights.partition('.')[0]):
        raise ValueError(f'--weights {weights}: neither a folder, nor hf-hub:user/name, nor a model of timm')
    try:
        model = timm.create_model(weights, pretrained=pretrained, num_classes=0, img_size=size)
    except TypeError as e:
        if 'img_size' not in str(e):
            raise
        model = timm.create_model(weights, pretrained=pretrained, num_classes=0)  # takes any
    patch = getattr(getattr(model, 'patch_embed', None), 'patch_size', (1, 1))
    if size[0] % patch[0] or size[1] % patch[1]:
        near = tuple(max(1, round(n / p)) * p for n, p in zip(size, patch))
        raise ValueError(f'--size {size[0]} {size[1]}: no multiple of patches of {patch[0]}; try {near[0]} {near[1]}')
    return model


class Maps(nn.Module):
    """Images (B, C, H, W) to four maps (B, D, H/s, W/s), for s of ``STRIDES``.

    Of a network with stages these are its last four; of one whose blocks all have the same grid, such as a ViT, four
    blocks in even distance or the last one, resampled.

    Args:
        backbone: A timm model.
        size: (H, W) of the images.
        only_last: Take the last block alone where all have the same grid, as ViTDet does
            (https://arxiv.org/abs/2203.16527).
        frozen: Leave the backbone as it is, in eval mode.
    """

    def __init__(self, backbone: Any, size: tuple[int, int], only_last: bool = False, frozen: bool = False) -> None:
        super().__init__()
        strides = [info['reduction'] for info in getattr(backbone, 'feature_info', None) or ()]
        if not strides or not hasattr(backbone, 'forward_intermediates'):
            raise ValueError(f'--weights: {type(backbone).__name__} gives no maps; take a ViT, Swin, ConvNeXt, ...')
        n = len(strides)
        if len(set(strides)) > 1:
            self.blocks = [max(0, n - 4 + i) for i in range(4)]
        else:
            self.blocks = [n - 1 if only_last else max(0, n * (i + 1) // 4 - 1) for i in range(4)]
        self.backbone, self.frozen = backbone.requires_grad_(not frozen), frozen
        channels = next(m.in_channels for m in backbone.modules() if isinstance(m, nn.Conv2d))
        with torch.no_grad():
            maps = self.eval()._of_blocks(torch.zeros(1, channels, *size))
        self.widths = [m.shape[1] for m in maps]

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [resampled(m, (-(-x.shape[-2] // s), -(-x.shape[-1] // s))) for m, s in zip(self._of_blocks(x), STRIDES)]

    def last(self, x: torch.Tensor) -> torch.Tensor:
        """The last map (B, D, h, w) as it is."""
        return self._of_blocks(x)[-1]

    def _of_blocks(self, x: torch.Tensor) -> list[torch.Tensor]:
        taken = sorted(set(self.blocks))
        options: dict[str, Any] = {'norm': True, 'output_fmt': 'NCHW', 'intermediates_only': True}
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            maps = self.backbone.forward_intermediates(x, indices=taken, **options)
        return [maps[taken.index(block)] for block in self.blocks]

    def train(self, mode: bool = True) -> 'Maps':
        super().train(mode)
        if self.frozen:
            self.backbone.eval()
        return self


def resampled(x: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    if x.shape[-2:] == size:
        return x
    smaller = x.shape[-2] > size[0]
    return F.interpolate(x, size=size, mode='bilinear', align_corners=False, antialias=smaller)
