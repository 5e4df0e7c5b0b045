"""Images of the study: any ImageFolder or torchvision dataset, a sample of Fashion-MNIST by default.

Owns where images come from and how they are split and normalised. Knows nothing of views, methods or models.
"""

import inspect
from pathlib import Path
from typing import Any, NamedTuple, Optional

import torch
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision import datasets, transforms

from benchmarks.demo import Sample

__all__ = ['Images', 'open_images']

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Images(NamedTuple):
    """Two labelled splits. Each is opened with a transform, as torchvision's datasets are."""

    name: str
    source: str
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    limits: tuple[Optional[int], Optional[int]] = (None, None)

    def split(self, which: str, transform: Any) -> Dataset:
        """The ``train`` or ``test`` split, at most as many images as the limit of that split."""
        dataset = self._open(which, transform)
        limit = self.limits[which == 'test']
        if limit is None or limit >= len(dataset):
            return dataset
        picked = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))[:limit]
        return Subset(dataset, sorted(picked.tolist()))

    def _open(self, which: str, transform: Any) -> Any:
        if self.source == 'sample':
            return Sample(which, transform)
        if self.source.startswith('torchvision:'):
            _, name, root = self.source.split(':', 2)
            kind = getattr(datasets, name)
            takes = inspect.signature(kind).parameters
            chosen = {'train': which == 'train'} if 'train' in takes else {'split': which}
            try:
                return kind(root, transform=transform, **chosen)
            except (TypeError, ValueError, RuntimeError) as e:  # other arguments, other splits, or not downloaded
                raise ValueError(f'--data {self.source}: {e}; or make a folder of it with train and val') from e
        names = ('train',) if which == 'train' else ('val', 'test')
        folder = next((f for n in names if (f := Path(self.source, n)).is_dir()), None)
        if folder is None:
            wanted = ' or '.join(names)
            raise ValueError(f'--data {self.source}: has no folder {wanted}; it needs train, and val or test')
        return datasets.ImageFolder(folder, transform)

    @property
    def channels(self) -> int:
        return len(self.mean)

    def plain(self) -> Any:
        """The transform of evaluation."""
        steps = [transforms.Resize(self.size), transforms.CenterCrop(self.size)]
        return transforms.Compose([*steps, transforms.ToTensor(), transforms.Normalize(self.mean, self.std)])

    def loader(self, which: str, batch_size: int = 256, workers: int = 0) -> DataLoader:
        """Images and labels of a split in order, as evaluation sees them."""
        return DataLoader(self.split(which, self.plain()), batch_size, num_workers=workers)


def open_images(source: str, size: Optional[int], limits: tuple[Optional[int], Optional[int]]) -> Images:
    """Images from ``source``.

    Args:
        source: ``sample``, ``torchvision:CLASS:ROOT`` (a dataset with ``train=`` or ``split=``), or a folder with
            ``train`` and ``val`` (or ``test``), each with a folder of images for every class.
        size: Side of the images in pixels; by default 28 for the sample and Fashion-MNIST, else 224.
        limits: Most images of the training and of the test split.

    Raises:
        ValueError: no such source.
    """
    kind = source.removeprefix('torchvision:').split(':')[0]
    grey = source == 'sample' or kind in ('MNIST', 'FashionMNIST', 'KMNIST', 'QMNIST', 'EMNIST')
    mean, std = ((0.286,), (0.353,)) if grey else IMAGENET
    if source.startswith('torchvision:') and (source.count(':') < 2 or not hasattr(datasets, kind)):
        raise ValueError(f'--data {source}: must be torchvision:CLASS:ROOT with a class of torchvision.datasets')
    name = 'fashion-mnist-sample' if source == 'sample' else Path(kind).name
    return Images(name, source, size or (28 if grey else 224), mean, std, limits)
