"""The loop that all tasks train with.

Owns optimizer, layer-wise decay and schedule. Knows nothing of what a model or a batch is.
"""

import sys
from collections.abc import Callable
from typing import Any, NamedTuple, Optional

import torch
from timm.optim import param_groups_layer_decay
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from benchmarks.common import schedule

__all__ = ['Recipe', 'batches', 'fit']


class Recipe(NamedTuple):
    """AdamW with weight decay on all parameters, warm-up over a tenth, then a half cosine."""

    epochs: int
    batch_size: int
    lr: float
    layer_decay: float = 0.75  # of the learning rate from one of the backbone's layers to the one below
    weight_decay: float = 0.05


def batches(data: Dataset, recipe: Recipe, workers: int, collate: Optional[Callable[..., Any]] = None) -> DataLoader:
    """Whole batches in another order each epoch."""
    options: dict[str, Any] = {'shuffle': True, 'drop_last': True, 'num_workers': workers, 'collate_fn': collate}
    return DataLoader(data, recipe.batch_size, **options)


def fit(
    model: nn.Module, backbone: Any, loader: Any, loss_of: Callable[[Any], torch.Tensor], recipe: Recipe, name: str
) -> None:
    """Trains ``model``; parameters of its ``backbone`` that learn do so at rates that fall towards its first layers.

    Raises:
        ValueError: there is no whole batch, or no epoch.
        FloatingPointError: the loss is NaN or infinite.
    """
    if not len(loader) or recipe.epochs < 1:
        raise ValueError(
            f'{name}: {len(loader)} batches of {recipe.batch_size} and {recipe.epochs} epochs; it takes one'
        )
    ours = {id(p) for p in backbone.parameters()}
    groups: list[dict[str, Any]] = [
        {'params': [p for p in model.parameters() if p.requires_grad and id(p) not in ours], 'lr_scale': 1.0}
    ]
    if any(p.requires_grad for p in backbone.parameters()):
        groups += param_groups_layer_decay(backbone, recipe.weight_decay, layer_decay=recipe.layer_decay)
    for group in groups:
        group['lr'] = recipe.lr * group['lr_scale']
    optimizer = torch.optim.AdamW(groups, weight_decay=recipe.weight_decay)
    total = recipe.epochs * len(loader)

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule(step, total))
    model.train()
    with tqdm(total=total, desc=name, unit='step', leave=False, file=sys.stderr) as bar:
        for _ in range(recipe.epochs):
            for batch in loader:
                loss = loss_of(batch)
                if not loss.isfinite():
                    raise FloatingPointError(f'{name}: the loss is {loss.item()}; try a lower --lr')
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_([p for group in groups for p in group['params']], 3.0)
                optimizer.step()
                scheduler.step()
                bar.update()
                bar.set_postfix(loss=f'{loss.item():.3f}')
    model.eval()
