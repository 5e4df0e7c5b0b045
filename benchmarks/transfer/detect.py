"""Detection: torchvision's Faster R-CNN, or Mask R-CNN where there are masks, on a pyramid of a backbone's maps.

Owns pictures with boxes, the network and its mean average precision. Knows nothing of where the backbone is from.
"""

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm.data
import torch
from timm.layers import LayerNorm2d
from torch import nn
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.datasets import CocoDetection, wrap_dataset_for_transforms_v2
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork
from torchvision.transforms import v2
from torchvision.utils import draw_bounding_boxes, make_grid, save_image
from tqdm import tqdm

from benchmarks.transfer.backbone import STRIDES, Maps
from benchmarks.transfer.training import Recipe, batches, fit
from benchmarks.transfer.voc import to_coco

__all__ = ['Boxed', 'detect', 'open_boxed']


class Boxed(Dataset):
    """Pictures in [0, 1] with targets as torchvision's detectors take them; classes count from 1, by ``classes``.

    Args:
        pictures: Folder of pictures.
        annotations: File in COCO's format.
        flips: Flip half of the pictures.
        crowds: Keep regions of many objects, marked, for testing; no box of one object is learnt from them.

    Raises:
        ValueError: a box is not inside its picture, or of no category.
    """

    def __init__(self, pictures: Path, annotations: Path, flips: bool = False, crowds: bool = False) -> None:
        coco: Any = CocoDetection(str(pictures), str(annotations))
        for a in coco.coco.anns.values():
            if a['category_id'] not in coco.coco.cats:
                raise ValueError(f'--data: {annotations}: annotation {a["id"]} has no category {a["category_id"]}')
            (x, y, w, h), image = a['bbox'], coco.coco.imgs[a['image_id']]
            inside = x > -1 and y > -1 and x + w < image['width'] + 1 and y + h < image['height'] + 1
            if not inside:
                raise ValueError(
                    f'--data: box {a["bbox"]} (x, y, width, height; annotation {a["id"]} of {annotations}) is '
                    f'not inside {image["file_name"]}, which is {image["width"]} x {image["height"]}'
                )
            a.setdefault('iscrowd', 0)
        empty = {a['id'] for a in coco.coco.anns.values() if min(a['bbox'][2:]) <= 0}
        if empty:  # COCO itself has two
            print(f'{annotations}: {len(empty)} boxes without area are left out', file=sys.stderr)
            for i in coco.ids:
                coco.coco.imgToAnns[i] = [a for a in coco.coco.imgToAnns[i] if a['id'] not in empty]
        categories = sorted(coco.coco.cats)
        self.classes = [coco.coco.cats[c]['name'] for c in categories]
        self.numbers = torch.zeros(max(categories) + 1, dtype=torch.long)
        self.numbers[categories] = torch.arange(len(categories)) + 1
        self.has_masks = bool(coco.coco.anns) and all(a.get('segmentation') for a in coco.coco.anns.values())
        keys = ['boxes', 'labels', 'iscrowd'] + ['masks'] * self.has_masks
        self.pictures = wrap_dataset_for_transforms_v2(coco, target_keys=keys)
        self.crowds = crowds
        flip = [v2.RandomHorizontalFlip()] if flips else []
        self.transform = v2.Compose([*flip, v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, dict[str, Any]]:
        picture, target = self.pictures[i]
        picture = picture.convert('RGB')
        if 'boxes' not in target:  # a picture of nothing shows what is background
            size = picture.size[::-1]
            boxes = tv_tensors.BoundingBoxes(torch.zeros(0, 4), format='XYXY', canvas_size=size)
            target = {'boxes': boxes, 'labels': torch.zeros(0, dtype=torch.long), 'iscrowd': []}
            if self.has_masks:
                target['masks'] = tv_tensors.Mask(torch.zeros(0, *size, dtype=torch.uint8))
        crowd = torch.tensor(target.pop('iscrowd'), dtype=torch.bool)
        target['labels'] = self.numbers[target['labels']]
        picture, target = self.transform(picture, target)
        if self.crowds:
            return picture, {**target, 'iscrowd': crowd.long()}
        return picture, {k: v[~crowd] for k, v in target.items()}


def open_boxed(root: str) -> tuple[Boxed, Boxed]:
    """Pictures to train on and to test on: COCO's folders, or those of Pascal VOC.

    Raises:
        ValueError: ``root`` is neither, or classes differ.
    """
    place = Path(root)
    if Path(place, 'ImageSets/Main').is_dir():
        with tempfile.TemporaryDirectory() as folder:
            files = to_coco(place, Path(folder))
            data = [Boxed(place / 'JPEGImages', f, flips=i == 0, crowds=i == 1) for i, f in enumerate(files)]
    elif found := sorted(place.glob('annotations/instances_train*.json')):
        year = found[0].stem.removeprefix('instances_train')
        files = [place / 'annotations' / f'instances_{which}{year}.json' for which in ('train', 'val')]
        folders = [place / f'{which}{year}' for which in ('train', 'val')]
        if lacking := [p for p in (*files, *folders) if not p.exists()]:
            raise ValueError(f'--data {root}: has no {lacking[0]}')
        data = [Boxed(p, f, flips=i == 0, crowds=i == 1) for i, (p, f) in enumerate(zip(folders, files))]
    else:
        raise ValueError(
            f'--data {root}: has neither annotations/instances_train*.json, as COCO, nor ImageSets/Main, as Pascal VOC'
        )
    train, test = data
    if train.has_masks != test.has_masks:
        raise ValueError(f'--data {root}: not all annotations have masks in training as in testing')
    if train.classes != test.classes:
        raise ValueError(f'--data {root}: is trained with classes {train.classes} and tested with {test.classes}')
    return train, test


class Pyramid(nn.Module):
    """Maps of one width for a detector, by name: a feature pyramid (https://arxiv.org/abs/1612.03144)."""

    def __init__(self, maps: Maps, channels: int) -> None:
        super().__init__()
        self.maps, self.out_channels = maps, channels
        self.fpn = FeaturePyramidNetwork(maps.widths, channels, norm_layer=LayerNorm2d)

    def forward(self, x: torch.Tensor) -> Any:
        return self.fpn({str(i): m for i, m in enumerate(self.maps(x))})


def make_detector(maps: Maps, data: Boxed, size: tuple[int, int], channels: int) -> Any:
    """Anchors have eight times the stride of their map, as FPN's."""
    cfg = timm.data.resolve_model_data_config(maps.backbone)
    kind = MaskRCNN if data.has_masks else FasterRCNN
    return kind(
        Pyramid(maps, channels),
        num_classes=len(data.classes) + 1,
        image_mean=cfg['mean'],
        image_std=cfg['std'],
        fixed_size=size[::-1],  # torchvision's is width, height
        size_divisible=1,
        rpn_anchor_generator=AnchorGenerator(tuple((8 * s,) for s in STRIDES), ((0.5, 1.0, 2.0),) * len(STRIDES)),
        rpn_pre_nms_top_n_train=1000,
        rpn_post_nms_top_n_train=1000,
        box_batch_size_per_image=256,
    )


def detect(
    maps: Maps,
    data: tuple[Boxed, Boxed],
    size: tuple[int, int],
    channels: int,
    recipe: Recipe,
    device: str,
    workers: int,
    name: str,
    picture: Path,
) -> dict[str, Any]:
    """COCO's mean average precision in percent of boxes, and of masks where there are any."""
    train, test = data
    if any(s % STRIDES[-1] for s in size):
        print(f'--size {size[0]} {size[1]}: anchors drift unless both are divisible by {STRIDES[-1]}', file=sys.stderr)
    model = make_detector(maps, train, size, channels).to(device)
    loader = batches(train, recipe, workers, collate=list)

    def loss_of(batch: Any) -> torch.Tensor:
        pictures = [x.to(device) for x, _ in batch]
        targets = [
            {k: torch.Tensor(v).to(device) if k == 'boxes' else v.to(device) for k, v in t.items()} for _, t in batch
        ]
        return sum(model(pictures, targets).values())

    fit(model, maps.backbone, loader, loss_of, recipe, name)
    return tested(lambda image: model([image.to(device)])[0], test, size, picture)


@torch.no_grad()
def tested(
    find: Callable[[torch.Tensor], dict[str, torch.Tensor]], data: Boxed, size: tuple[int, int], picture: Path
) -> dict[str, Any]:
    """Mean average precision of what ``find`` finds in pictures (3, H, W); draws some in ``size``."""
    from torchmetrics.detection import MeanAveragePrecision

    kinds = {'bbox': 'bbox_', 'segm': 'segm_'} if data.has_masks else {'bbox': ''}
    metric = MeanAveragePrecision(iou_type=tuple(kinds))
    shown = []
    for i in tqdm(range(len(data)), desc='testing', leave=False):
        image, truth = data[i]
        found = {k: v.cpu() for k, v in find(image).items()}
        if data.has_masks:
            found['masks'] = found['masks'][:, 0] > 0.5
            truth['masks'] = truth['masks'].bool()
        metric.update([found], [truth])
        if i % -(-len(data) // 4) == 0:
            sure = {k: v[found['scores'] > 0.5] for k, v in found.items()}
            shown += [boxed(image, target, size) for target in (truth, sure)]
    save_image(make_grid(shown, nrow=2), picture)
    values = metric.compute()
    result: dict[str, Any] = {}
    for kind, prefix in kinds.items():
        of = 'map' if kind == 'bbox' else 'mask map'
        result |= {of: 100 * values[f'{prefix}map'].item(), f'{of} 50': 100 * values[f'{prefix}map_50'].item()}
    return result


def boxed(image: torch.Tensor, target: dict[str, Any], size: tuple[int, int]) -> torch.Tensor:
    """``image`` with boxes in the colors of their classes."""
    picture = (255 * image).byte()
    colors = ['red', 'deepskyblue', 'yellow', 'lime', 'magenta', 'white']
    of_each = [colors[(int(c) - 1) % len(colors)] for c in target['labels']]
    if of_each:
        picture = draw_bounding_boxes(picture, target['boxes'], colors=of_each, width=2)
    return v2.functional.resize(picture, list(size)) / 255
