"""Labeled images: any ImageFolder or torchvision dataset, a sample of Fashion-MNIST by default.

Owns where images come from, how they are split, decoded once and normalized. Knows nothing of views, methods or models.
"""

import hashlib
import inspect
import json
import os
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, Optional

import numpy as np
import torch
from torch.utils.data import Dataset, Subset
from torchvision import datasets, transforms
from tqdm import tqdm

from benchmarks.common import Sample

__all__ = ['CACHE', 'Images', 'open_images']

CACHE = Path('~/.cache/mte-timm').expanduser()
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HELD_OUT = 6  # one of so many training images, for choosing settings


class Images(NamedTuple):
    """Two labeled splits, decoded once: uint8 in a file that is mapped into memory."""

    name: str
    source: str
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    limits: tuple[Optional[int], Optional[int]] = (None, None)
    held_out: bool = False  # both splits are of the training images
    cache: Path = CACHE

    def identity(self) -> dict[str, Any]:
        """What decides results, and no folder of a machine."""
        kind = self.source.split(':')[0]
        kept = self._asdict() | {'source': kind if kind in ('sample', 'torchvision') else 'folder'}
        del kept['cache']
        if not self.held_out:
            del kept['held_out']
        return kept

    def split(self, which: str, transform: Any = None) -> Dataset:
        """The ``train`` or ``test`` split, at most as many images as the limit of that split."""
        dataset = self._open('train' if self.held_out else which, transform)
        picked = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))
        if self.held_out:
            count = len(dataset) // HELD_OUT
            picked = picked[:count] if which == 'test' else picked[count:]
        limit = self.limits[which == 'test']
        if len(picked) == len(dataset) and (limit is None or limit >= len(dataset)):
            return dataset
        return Subset(dataset, sorted(picked[:limit].tolist()))

    def _open(self, which: str, transform: Any) -> Any:
        if self.source == 'sample':
            return Sample(which, transform)
        if self.source.startswith('torchvision:'):
            _, name, root = self.source.split(':', 2)
            kind = getattr(datasets, name)
            takes = inspect.signature(kind).parameters
            choices: list[dict[str, Any]] = [{'split': which}]
            if which == 'test':
                choices.append({'split': 'val'})
            if 'train' in takes:
                choices = [{'train': which == 'train'}]
            elif 'version' in takes:  # INaturalist
                choices = [{'version': '2021_train' if which == 'train' else '2021_valid'}]
            for i, chosen in enumerate(choices):
                try:
                    return kind(root, transform=transform, **chosen)
                except (TypeError, ValueError, RuntimeError) as e:  # other arguments, splits, or not downloaded
                    if i + 1 == len(choices):
                        raise ValueError(f'--data {self.source}: {e}; or make a folder with train and val') from e
        names = ('train',) if which == 'train' else ('val', 'test')
        folder = next((f for n in names if (f := Path(self.source, n)).is_dir()), None)
        if folder is None:
            wanted = ' or '.join(names)
            raise ValueError(f'--data {self.source}: has no folder {wanted}; it needs train, and val or test')
        trained = {p.name for p in Path(self.source, 'train').glob('*/')}
        if trained and trained != {p.name for p in folder.glob('*/')}:
            raise ValueError(f'--data {self.source}: {folder.name} has other folders of classes than train')
        return datasets.ImageFolder(folder, transform)

    @property
    def channels(self) -> int:
        return len(self.mean)

    @property
    def train_side(self) -> int:
        """Of the images that views are cropped from: a sixth more than a view has, for photographs."""
        return self.size if self.size <= 32 else self.size * 7 // 6

    def pixels(self, which: str, side: int) -> tuple[torch.Tensor, torch.Tensor]:
        """uint8 (N, C, side, side), the middle square of each image, and labels (N,)."""
        return _decoded(self, which, side)

    def normalized(self, pixels: torch.Tensor) -> torch.Tensor:
        """float32, as networks take them."""
        mean, std = (torch.tensor(v, device=pixels.device).view(-1, 1, 1) for v in (self.mean, self.std))
        return (pixels / 255 - mean) / std

    def loader(self, which: str, batch_size: int = 256, device: str = 'cpu') -> Iterator[Any]:
        """Images and labels of a split in order, as evaluation sees them."""
        pixels, labels = self.pixels(which, self.size)
        for x, y in zip(pixels.split(batch_size), labels.split(batch_size)):
            yield self.normalized(x.to(device)), y


def open_images(
    source: str,
    size: Optional[int],
    limits: tuple[Optional[int], Optional[int]],
    held_out: bool = False,
    cache: Path = CACHE,
) -> Images:
    """Images from ``source``.

    Args:
        source: ``sample``, ``torchvision:CLASS:ROOT`` (a dataset with ``train=`` or ``split=``), or a folder with
            ``train`` and ``val`` (or ``test``), each with a folder of images for every class.
        size: Side of the images in pixels; by default 28 for the sample and Fashion-MNIST, else 224.
        limits: Most images of the training and of the test split.
        held_out: A sixth of the training images takes the place of the test images.
        cache: Folder of decoded images.

    Raises:
        ValueError: no such source.
    """
    kind = source.removeprefix('torchvision:').split(':')[0]
    gray = source == 'sample' or kind in ('MNIST', 'FashionMNIST', 'KMNIST', 'QMNIST', 'EMNIST')
    mean, std = ((0.286,), (0.353,)) if gray else IMAGENET
    if source.startswith('torchvision:') and (source.count(':') < 2 or not hasattr(datasets, kind)):
        raise ValueError(f'--data {source}: must be torchvision:CLASS:ROOT with a class of torchvision.datasets')
    name = 'fashion-mnist-sample' if source == 'sample' else Path(kind).name.lower()
    return Images(name, source, size or (28 if gray else 224), mean, std, limits, held_out, cache)


@lru_cache(maxsize=8)
def _decoded(images: Images, which: str, side: int) -> tuple[torch.Tensor, torch.Tensor]:
    color = transforms.Grayscale() if images.channels == 1 else transforms.Lambda(lambda x: x.convert('RGB'))
    steps = [color, transforms.Resize(side), transforms.CenterCrop(side), transforms.PILToTensor()]
    dataset: Any = images.split(which, transforms.Compose(steps))
    shape = (len(dataset), images.channels, side, side)
    if images.source == 'sample':
        x, y = zip(*dataset)
        return torch.stack(x), torch.tensor(y)
    files = getattr(getattr(dataset, 'dataset', dataset), 'samples', ())
    stamps = [(os.path.abspath(path), os.stat(path).st_mtime_ns) for path, _ in files if os.path.exists(path)]
    of = hashlib.sha256(repr((images, which, side, stamps)).encode()).hexdigest()[:12]
    path = images.cache / f'{images.name}-{which}-{side}-{of}.npy'
    labels = path.with_suffix('.labels.json')
    if not labels.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary, found = path.with_suffix(f'.{os.getpid()}.tmp'), []
        array = np.lib.format.open_memmap(temporary, 'w+', np.uint8, shape)
        for i, (x, y) in enumerate(tqdm(dataset, desc=f'decoding {which}', leave=False)):
            array[i] = x.numpy()
            found.append(y)
        array.flush()
        temporary.replace(path)
        labels.write_text(json.dumps(found))
    return torch.from_numpy(np.load(path, mmap_mode='c')), torch.tensor(json.loads(labels.read_text()))
