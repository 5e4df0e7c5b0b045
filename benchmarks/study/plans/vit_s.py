"""ViT-S/16 on photographs, for a GPU: DINO and iBOT, plain and with MTE, seed by seed.

The settings are those of the two methods' authors for ViT-S/16 with few epochs, but for batch, prototypes and momentum,
which are smaller for 9,469 photographs than for 1.3 million.
"""

from typing import Any

from benchmarks.study.configs import tab_05
from benchmarks.study.experiment import Plan

__all__ = ['PLAN']

CLUSTERING: dict[str, Any] = {
    'momentum': 0.99,
    'hidden': 2048,
    'bottleneck': 256,
    'prototypes': 4096,
    'frozen_epochs': 1,
    'teacher_temp': 0.04,
    'center_momentum': 0.9,
    'global_scale': (0.25, 1.0),
    'local_scale': (0.05, 0.25),
    'local_views': 6,
    'blur': (1.0, 0.1, 0.5),
    'solarization': 0.2,
}
COMMON: dict[str, Any] = {
    'model': 'vit_small_patch16_224',
    'epochs': 100,
    'batch_size': 128,
    'lr': 5e-4,
    'weight_decay': 0.1,
    'settings': CLUSTERING,
}
PLAN = Plan(
    (tab_05.experiment('dino', 'ibot'),),
    {'dino': COMMON, 'ibot': {**COMMON, 'settings': {**CLUSTERING, 'local_views': 4}}},
    (),
    'Nothing was tuned.',
    ('Tab. 5',),
    watch_every=10,
)
