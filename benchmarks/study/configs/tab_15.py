"""Tab. 15: one pooled token, adaptive, average or maximum.

    python -m benchmarks.study --only "Tab. 15"

The paper, DINO: average -1.3, maximum -1.1 to adaptive pooling.
Here (3 seeds): Fashion-MNIST, DINO, k-NN -8.3 ± 3.1 and -9.2 ± 2.6; Imagenette, MoCo v3, k-NN -1.8 ± 1.9 and
-1.1 ± 4.2, linear -2.8 ± 3.3 and -2.4 ± 0.5.
"""

from typing import Any

from benchmarks.study.experiment import LOSS, ONE_POOLED, Experiment, Variant

__all__ = ['experiment']


def experiment(method: str, **fields: Any) -> Experiment:
    return Experiment(
        'Tab. 15',
        'adaptive pooling is better than average and max pooling',
        'The paper: DINO, 300 classes, 100 epochs; the paper calls it Top-1. One pooled token, which is all that '
        'average and max pooling give.',
        (
            Variant(method, 'one-pooled', ONE_POOLED),
            Variant(method, 'average-pooling', {**ONE_POOLED, 'pooling': 'avg'}, {'top1': -1.3}),
            Variant(method, 'max-pooling', {**ONE_POOLED, 'pooling': 'max'}, {'top1': -1.1}),
        ),
        reference='one-pooled',
        expected=LOSS,
        **fields,
    )
