"""What MTE adds in parameters, checkpoint and operations, for docs/where-to-start.md and pages of codebases.

    python -m benchmarks.speed.sizes      # seconds: models are made without memory

A checkpoint holds student, teacher and AdamW's two moments of what learns, in float32.
"""

import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Optional

import timm
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import mte_timm as mte
from benchmarks.speed.steps import MODELS, PrototypeHead, bn_mlp

RESULTS = Path(__file__).parents[1] / 'results' / 'sizes.json'
Head = Optional[Callable[[int], nn.Module]]
ROWS: dict[str, tuple[str, Head]] = {
    'ViT-Ti/16, DINO, 2,048 prototypes': ('ViT-Ti/16', partial(PrototypeHead, prototypes=2048)),
    'ViT-S/16, DINO, 65,536 prototypes': ('ViT-S/16', partial(PrototypeHead, prototypes=65536)),
    'ViT-B/16, DINO, 65,536 prototypes': ('ViT-B/16', partial(PrototypeHead, prototypes=65536)),
    'ViT-S/16, iBOT, 8,192 prototypes': ('ViT-S/16', partial(PrototypeHead, prototypes=8192)),
    'ViT-S/16, MoCo v3': ('ViT-S/16', partial(bn_mlp, 3)),
    'ViT-S/16, small head (2 layers of 512)': (
        'ViT-S/16',
        lambda dim: nn.Sequential(nn.Linear(dim, 512), nn.GELU(), nn.Linear(512, 128)),
    ),
    'ViT-S/16, supervised, 1,000 classes': ('ViT-S/16', None),
    'Swin-T, DINO, 65,536 prototypes': ('Swin-T', partial(PrototypeHead, prototypes=65536)),
}
FORMS: dict[str, dict[str, Any]] = {
    '4 + 6 tokens': {},
    '6 pooled tokens': {'n_cls': 0},
    '1 pooled token': {'n_cls': 0, 'n_pool': 1},
    '4 + 6, one shared head': {'independent_heads': False},
}

# a step of DINOv2 and DINOv3: two crops of 16 x 16 patches, eight of 7 x 7, which learn, and a teacher of the two
STEPS: dict[str, tuple[str, int, int, int]] = {  # architecture, prototypes, hidden width and bottleneck of the head
    'ViT-S/14, 65,536 prototypes': ('vit_small_patch14_dinov2', 65536, 2048, 256),
    'ViT-B/14, 65,536 prototypes': ('vit_base_patch14_dinov2', 65536, 2048, 256),
    'ViT-L/14, 131,072 prototypes': ('vit_large_patch14_dinov2', 131072, 2048, 384),
    'ViT-g/14, 131,072 prototypes': ('vit_giant_patch14_dinov2', 131072, 2048, 384),
    'ViT-L/16 of DINOv3, 65,536 prototypes': ('vit_large_patch16_dinov3_qkvb', 65536, 2048, 256),
    'ViT-7B/16 of DINOv3, 262,144 prototypes': ('vit_7b_patch16_dinov3', 262144, 8192, 512),
}


def measure_step(architecture: str, prototypes: int, hidden: int, bottleneck: int) -> dict[str, float]:
    """Multiply-adds for an image, plain and with MTE, without the loss of masked patches, which both have."""
    head = partial(PrototypeHead, prototypes=prototypes, hidden=hidden, bottleneck=bottleneck)
    with torch.device('meta'):
        backbone: Any = timm.create_model(architecture, num_classes=0, dynamic_img_size=True).eval()
        patch = backbone.patch_embed.patch_size[0]
        large, small = (torch.randn(2, 3, n * patch, n * patch, device='meta') for n in (16, 7))
        plain, model = nn.Sequential(backbone, head(backbone.num_features)), mte.wrap(backbone, head=head)
        teacher = mte.make_teacher(model)

    def operations(*calls: Callable[[], Any]) -> float:
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
            for call in calls:
                call()
        return counter.get_total_flops() / 2 / len(large)

    views = [large] * 2 + [small] * 8
    learns = operations(*(partial(plain, x) for x in views)), operations(partial(model, views))
    teaches = operations(*(partial(plain, x) for x in views[:2])), operations(partial(teacher, views[:2]))
    return {name: 3 * s + t for name, s, t in zip(('plain', 'mte'), learns, teaches)}


def measure(name: str, head: Head) -> dict[str, Any]:
    """Parameters, bytes of a checkpoint and multiply-adds of a forward of one image, plain and in each form."""
    architecture, kwargs = MODELS[name]
    classes = 0 if head else 1000
    x = torch.randn(2, 3, 224, 224, device='meta')

    def of(model: Any, run: Callable[[], Any]) -> dict[str, float]:
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
            run()
        learnt = sum(p.numel() for p in model.parameters())
        copies = 4 if head else 3  # student, teacher, two moments
        return {
            'parameters': learnt,
            'checkpoint': 4 * copies * learnt,
            'operations': counter.get_total_flops() / 2 / len(x),
        }

    with torch.device('meta'):
        plain = timm.create_model(architecture, num_classes=classes, **kwargs).eval()
        pair = nn.ModuleList([plain, *([head(plain.num_features)] if head else [])]).eval()
        found = {'plain': of(pair, lambda: nn.Sequential(*pair)(x))}
        for form, options in FORMS.items():
            if not hasattr(plain, 'blocks'):
                options = {**options, 'n_cls': 0}
            backbone = timm.create_model(architecture, num_classes=classes, **kwargs)
            model = mte.wrap(backbone, head=head, **options).eval()
            found[form] = of(model, partial(model, x))
    return found


if __name__ == '__main__':
    results = {name: measure(*row) for name, row in ROWS.items()}
    steps = {name: measure_step(*row) for name, row in STEPS.items()}
    temporary = RESULTS.with_suffix('.tmp')
    temporary.write_text(json.dumps({'timm': timm.__version__, 'rows': results, 'steps': steps}, indent=1) + '\n')
    os.replace(temporary, RESULTS)
