"""Semantic segmentation: UPerNet, or a linear layer, on a backbone's maps.

Owns pictures with masks, the network and its mean IoU. Knows nothing of where the backbone is from.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import timm.data
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.utils import draw_segmentation_masks, make_grid, save_image
from tqdm import tqdm

from benchmarks.transfer.backbone import Maps
from benchmarks.transfer.training import Recipe, batches, fit

__all__ = ['Masked', 'Segmenter', 'open_masked', 'segment']

IGNORED = -1  # in masks, after reading
# pictures and masks for training, then for testing, and the value that is no class: ADE20K, CamVid, any other
LAYOUTS: dict[tuple[str, str, str, str], int] = {
    ('images/training', 'annotations/training', 'images/validation', 'annotations/validation'): 0,
    ('train', 'trainannot', 'test', 'testannot'): 11,
    ('train', 'trainannot', 'val', 'valannot'): 11,
    ('images/train', 'masks/train', 'images/val', 'masks/val'): 255,
}


class Masked(Dataset):
    """Pictures with masks: PNGs of one channel, of the same names, whose values are numbers of classes.

    Args:
        pictures: Folder of pictures.
        masks: Folder of masks.
        void: Values that are no class.
        classes: Values that are; by default all that occur.

    Raises:
        ValueError: a picture has no mask, one of another size, or one with values that are none of ``classes``.
    """

    def __init__(self, pictures: Path, masks: Path, void: tuple[int, ...], classes: tuple[int, ...] = ()) -> None:
        by_name = {p.stem: p for p in sorted(masks.glob('*.png'))}
        self.pictures = sorted(p for p in pictures.iterdir() if p.suffix.lower() in ('.jpg', '.jpeg', '.png'))
        if lacking := [p for p in self.pictures if p.stem not in by_name]:
            raise ValueError(f'--data: {lacking[0]} has no mask {lacking[0].stem}.png in {masks}')
        if not self.pictures:
            raise ValueError(f'--data: {pictures} has no pictures')
        self.masks = [by_name[p.stem] for p in self.pictures]
        self.transform: Any = None  # of a picture and its mask (H, W) of int64
        found: set[int] = set()
        for picture, path in zip(self.pictures, tqdm(self.masks, desc='masks', leave=False)):
            values, size = self._values(path), Image.open(picture).size
            if values.shape != size[::-1]:
                raise ValueError(f'--data: {path} is of {values.shape}, its picture of {size[::-1]}')
            found |= (of_mask := set(np.unique(values).tolist()) - set(void))
            if classes and (unknown := sorted(of_mask - set(classes))):
                raise ValueError(
                    f'--data: {path} has {unknown}, which no training mask has; --void {unknown[0]} leaves that out'
                )
        self.void, self.classes = void, classes or tuple(sorted(found))
        if len(self.classes) < 2:
            raise ValueError(f'--data: masks in {masks} have the classes {self.classes}; it takes two')
        self.numbers = np.full(max(*self.classes, *void) + 1, IGNORED)
        self.numbers[list(self.classes)] = range(len(self.classes))

    @staticmethod
    def _values(path: Path) -> np.ndarray:
        mask = Image.open(path)
        if mask.mode not in ('1', 'L', 'P', 'I', 'I;16'):
            raise ValueError(f'--data: {path} is {mask.mode}; a mask has one channel, of the numbers of classes')
        return np.asarray(mask).astype(np.int64)

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        mask = torch.from_numpy(self.numbers[self._values(self.masks[i])])
        pair = tv_tensors.Image(Image.open(self.pictures[i]).convert('RGB')), tv_tensors.Mask(mask)
        return pair if self.transform is None else self.transform(*pair)


def open_masked(root: str, void: tuple[int, ...]) -> tuple[Masked, Masked]:
    """Pictures to train on and to test on.

    Raises:
        ValueError: ``root`` has none of the layouts that are known.
    """
    for layout, usual in LAYOUTS.items():
        folders = [Path(root, name) for name in layout]
        if all(f.is_dir() for f in folders):
            train = Masked(folders[0], folders[1], void or (usual,))
            return train, Masked(folders[2], folders[3], train.void, train.classes)
    raise ValueError(f'--data {root}: has none of {"; ".join(" ".join(names) for names in LAYOUTS)}')


class Segmenter(nn.Module):
    """Logits of each pixel.

    Args:
        maps: Of the backbone.
        classes: How many.
        head: ``'upernet'`` (https://arxiv.org/abs/1807.10221), or ``'linear'`` on the last map.
        channels: Width of UPerNet.
    """

    def __init__(self, maps: Maps, classes: int, head: str, channels: int) -> None:
        super().__init__()
        from segmentation_models_pytorch.decoders.upernet.decoder import UPerNetDecoder

        self.maps, last = maps, maps.widths[-1]
        if head == 'linear':
            self.decoder: Any = None
            self.head = nn.Sequential(nn.BatchNorm2d(last), nn.Conv2d(last, classes, 1))
        else:
            self.decoder = UPerNetDecoder((0, 0, *maps.widths), decoder_channels=channels)
            self.head = nn.Sequential(nn.Dropout2d(0.1), nn.Conv2d(channels, classes, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        seen = self.maps.last(x) if self.decoder is None else self.decoder([x, x, *self.maps(x)])
        return F.interpolate(self.head(seen), size=x.shape[-2:], mode='bilinear', align_corners=False)


def segment(
    maps: Maps,
    data: tuple[Masked, Masked],
    size: tuple[int, int],
    head: str,
    channels: int,
    recipe: Recipe,
    device: str,
    workers: int,
    name: str,
    picture: Path,
) -> dict[str, Any]:
    """Mean IoU in percent, of masks in their own size, and that of each class; None for one that is nowhere."""
    train, test = data
    cfg = timm.data.resolve_model_data_config(maps.backbone)
    to_float = [
        v2.ToDtype({tv_tensors.Image: torch.float32, 'others': None}, scale=True),
        v2.Normalize(cfg['mean'], cfg['std']),
    ]
    fill: Any = {tv_tensors.Image: 0, tv_tensors.Mask: IGNORED}
    train.transform = v2.Compose(
        [
            v2.ScaleJitter(size[::-1], (0.5, 2.0)),  # it takes width, height
            v2.RandomCrop(size, pad_if_needed=True, fill=fill),
            v2.RandomHorizontalFlip(),
            v2.ColorJitter(0.4, 0.4, 0.4),
            *to_float,
        ]
    )
    model = Segmenter(maps, len(train.classes), head, channels).to(device)
    loader = batches(train, recipe, workers)

    def loss_of(batch: Any) -> torch.Tensor:
        x, y = batch
        return F.cross_entropy(model(x.to(device)), y.to(device), ignore_index=IGNORED)

    fit(model, maps.backbone, loader, loss_of, recipe, name)
    prepare = v2.Compose([v2.Resize(size), *to_float])
    return tested(lambda image: model(prepare(image)[None].to(device))[0].cpu(), test, size, picture)


@torch.no_grad()
def tested(
    logits_of: Callable[[torch.Tensor], torch.Tensor], data: Masked, size: tuple[int, int], picture: Path
) -> dict[str, Any]:
    """IoU of pictures (3, H, W) whose logits are (classes, h, w); draws some in ``size``."""
    from torchmetrics.classification import MulticlassJaccardIndex

    metric = MulticlassJaccardIndex(len(data.classes), average=None, zero_division=float('nan'))
    shown = []
    for i in tqdm(range(len(data)), desc='testing', leave=False):
        image, truth = data[i]
        logits = F.interpolate(logits_of(image)[None], size=truth.shape, mode='bilinear', align_corners=False)
        predicted, counted = logits[0].argmax(dim=0), truth != IGNORED
        metric.update(predicted[counted], truth[counted])
        if i % -(-len(data) // 4) == 0:
            shown += [image, *(painted(image, mask, len(data.classes)) for mask in (truth, predicted))]
    save_image(make_grid([v2.functional.resize(s, list(size)) / 255 for s in shown], nrow=3), picture)
    of_each = 100 * metric.compute()
    return {'miou': of_each.nanmean().item(), 'iou': [None if v != v else round(v, 1) for v in of_each.tolist()]}


def painted(image: torch.Tensor, mask: torch.Tensor, classes: int) -> torch.Tensor:
    """``image`` under the colors of the classes; what is no class is left as it is."""
    colors = [tuple((np.array([37, 91, 151]) * (c + 1) % 256).tolist()) for c in range(classes)]
    each = mask == torch.arange(classes)[:, None, None]
    return draw_segmentation_masks(image, each, alpha=0.6, colors=colors)
