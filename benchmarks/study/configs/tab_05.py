"""Tab. 5: self-supervised methods, plain and with MTE.

    python -m benchmarks.study --only "Tab. 5"

The paper, k-NN and linear: DINO +5.4 and +2.8, iBOT +3.6 and +1.8, BYOL +9.4 and +5.6, HSSL +2.0 and +1.0, MoBY +4.0
and +0.8, MoCo v3 +0.8 linear.
Here: README and REPORT.md open with what came out.
"""

from typing import Any

from benchmarks.study.experiment import GAIN, POOLED, Experiment, pair

__all__ = ['experiment']


PAPER: dict[str, dict[str, float]] = {
    'dino': {'knn': 5.4, 'linear': 2.8},
    'moco_v3': {'linear': 0.8},
    'ibot': {'knn': 3.6, 'linear': 1.8},
    'byol': {'knn': 9.4, 'linear': 5.6},
    'hssl': {'knn': 2.0, 'linear': 1.0},
    'moby': {'knn': 4.0, 'linear': 0.8},
}


def experiment(*methods: str, further: bool = False, **fields: Any) -> Experiment:
    """Of ``methods``; ``further`` ones come later, and have a row of their own in the report."""
    variants = [v for m in methods for v in pair(m, POOLED if m == 'moby' else None, **PAPER[m])]
    return Experiment(
        'Tab. 5, further methods' if further else 'Tab. 5',
        f'MTE improves {"further " if further else ""}self-supervised methods',
        'The paper: ImageNet-1K, ViT-S/16, 100 epochs (MoCo v3 300; MoBY Swin-T, 300).'
        + ' HSSL here is with the loss of DINO, and its heterogeneous token one more of the ensemble; the paper does '
        'not say how it puts MTE into it.' * ('hssl' in methods),
        tuple(variants),
        reference='plain',
        expected=GAIN,
        **fields,
    )
