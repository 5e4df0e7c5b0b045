"""Classification: k-NN and logistic regression of features, and fine-tuning.

Owns what is measured on labeled images. Knows nothing of where the backbone is from.
"""

from pathlib import Path
from typing import Any

import timm.data
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from benchmarks.common import features
from benchmarks.images import Images
from benchmarks.transfer.training import Recipe, batches, fit
from mte_timm.analysis import knn_predict, linear_predict

__all__ = ['finetune', 'of_features']

SHOWN = 24


def of_features(task: str, model: Any, images: Images, device: str, picture: Path) -> dict[str, float]:
    """``knn``, weighted and of 10 neighbors as DINO's, or ``linear``: percent right."""
    train, test = (features(model, images.loader(which), device) for which in ('train', 'test'))
    predicted = {'knn': knn_predict, 'linear': linear_predict}[task](*train, test[0])
    shown = spread(len(predicted))
    pixels = images.pixels('test', images.size)[0][shown]
    draw(pixels, predicted[shown], test[1][shown], names_of(images.split('test')), picture)
    return {'top1': 100 * (predicted == test[1]).double().mean().item()}


def finetune(
    model: Any, images: Images, recipe: Recipe, device: str, workers: int, name: str, picture: Path
) -> dict[str, float]:
    """Percent right of all parameters fine-tuned, with timm's augmentation (RandAugment, erasing)."""
    cfg: dict[str, Any] = {'input_size': (images.channels, images.size, images.size)}
    cfg |= {'mean': images.mean, 'std': images.std}
    # at magnitudes near 9, timm's posterizing asks for 0 bits, which Pillow refuses
    augment = timm.data.create_transform(
        **cfg, is_training=True, auto_augment='rand-m7-mstd0.5-inc1', re_prob=0.25, scale=(0.3, 1.0)
    )
    plain = timm.data.create_transform(**cfg, crop_pct=1.0)
    color = v2.Grayscale() if images.channels == 1 else v2.Lambda(lambda x: x.convert('RGB'))
    train, test = (
        images.split(*how) for how in (('train', v2.Compose([color, augment])), ('test', v2.Compose([color, plain])))
    )
    names = names_of(train)
    model.reset_classifier(len(names))
    model.to(device)
    loader = batches(train, recipe, workers)

    def loss_of(batch: Any) -> torch.Tensor:
        x, y = batch
        return F.cross_entropy(model(x.to(device)), y.to(device), label_smoothing=0.1)

    fit(model, model, loader, loss_of, recipe, name)
    logits, truth = features(model, DataLoader(test, 256, num_workers=workers), device)
    predicted, shown = logits.argmax(dim=1), spread(len(truth))
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (images.mean, images.std))
    pixels = torch.stack([((test[i][0] * std + mean) * 255).byte() for i in shown])
    draw(pixels, predicted[shown], truth[shown], names, picture)
    return {'top1': 100 * (predicted == truth).double().mean().item()}


def names_of(dataset: Any) -> list[str]:
    """Names of the classes of a torchvision dataset, or of a part of one."""
    while hasattr(dataset, 'dataset'):
        dataset = dataset.dataset
    for name in ('classes', 'all_categories'):
        if found := getattr(dataset, name, None):
            return [str(c) for c in found]
    raise ValueError(f'--data: {type(dataset).__name__} does not say its classes; make a folder with train and val')


def spread(count: int) -> list[int]:
    """Some of ``count`` images from all classes, of which datasets are in order."""
    return torch.linspace(0, count - 1, min(SHOWN, count)).long().tolist()


def draw(pixels: torch.Tensor, predicted: torch.Tensor, truth: torch.Tensor, names: list[str], to: Path) -> None:
    """Images with what they were taken for: black if right, else red with what they are."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(4, 6, figsize=(9, 7), squeeze=False)
    for ax in axes.flat:
        ax.axis('off')
    for ax, image, p, t in zip(axes.flat, pixels, predicted.tolist(), truth.tolist()):
        ax.imshow(v2.functional.to_pil_image(image), cmap='gray')
        title = names[p] if p == t else f'{names[p]}\nis {names[t]}'
        ax.set_title(title, fontsize=7, color='black' if p == t else 'red')
    figure.tight_layout()
    figure.savefig(to, dpi=120)
    plt.close(figure)
