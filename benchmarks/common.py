"""What several benchmarks share: the sample of images, a contrastive loss, a plain network with heads, a schedule."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Optional

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset

__all__ = ['Plain', 'Sample', 'features', 'info_nce', 'schedule']

SAMPLE = Path(__file__).parent / 'data' / 'fashion_mnist.npz'


class Sample(Dataset):
    """A split of the Fashion-MNIST sample beside this file, as a torchvision dataset would give it."""

    def __init__(self, split: str, transform: Any) -> None:
        with np.load(SAMPLE) as arrays:
            self.images, self.labels = arrays[f'{split}_images'], arrays[f'{split}_labels']
        self.transform = transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[Any, int]:
        return self.transform(Image.fromarray(self.images[i])), int(self.labels[i])


class Plain(nn.Module):
    """Backbone and head of the host method, views of one size together; ``heads`` of them averaged for scale."""

    def __init__(self, backbone: nn.Module, head: Optional[Callable[[int], nn.Module]], width: int, heads: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.heads = nn.ModuleList(head(width) for _ in range(heads)) if head else None

    def forward(self, views: list[torch.Tensor]) -> torch.Tensor:
        sizes = sorted({v.shape[-1] for v in views}, reverse=True)
        x = torch.cat([self.backbone(torch.cat([v for v in views if v.shape[-1] == size])) for size in sizes])
        return x if self.heads is None else torch.stack([head(x) for head in self.heads]).mean(dim=0)


def info_nce(student: torch.Tensor, teacher: torch.Tensor, temperature: float = 0.2) -> torch.Tensor:
    """InfoNCE of two views each, (2B, K) and (2B, K): every view of the student against the teacher's other one."""
    s, t = F.normalize(student, dim=-1), F.normalize(teacher, dim=-1)
    target = torch.arange(len(s) // 2, device=s.device)
    logits = [a @ b.T / temperature for a, b in zip(s.chunk(2), reversed(t.chunk(2)))]
    return sum(F.cross_entropy(x, target) for x in logits) / 2


def schedule(step: int, total: int) -> float:
    """Factor of the learning rate at ``step`` of ``total``: warm-up over a tenth, then a half cosine."""
    return min(1.0, (step + 1) / (0.1 * total)) * 0.5 * (1 + math.cos(math.pi * step / total))


@torch.no_grad()
def features(model: nn.Module, loader: DataLoader, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(N, D) features and (N,) labels."""
    model.eval().to(device)
    pairs = [(model(x.to(device)).cpu(), y) for x, y in loader]
    return tuple(map(torch.cat, zip(*pairs)))
