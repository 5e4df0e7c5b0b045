"""Tab. 2: a projection head for each auxiliary token, or one for all.

    python -m benchmarks.study --only "Tab. 2"

The paper, DINO: one head for all loses 2.7 points of k-NN and 1.0 linear.
Here: Fashion-MNIST, DINO -4.5 ± 4.2 and -3.0 ± 4.6 (3 seeds); photographs not run yet.
"""

from typing import Any

from benchmarks.study.experiment import LOSS, MTE, Experiment, Variant

__all__ = ['experiment']


def experiment(method: str, **fields: Any) -> Experiment:
    one = Variant(method, 'shared-head', {**MTE, 'independent_heads': False}, {'knn': -2.7, 'linear': -1.0})
    return Experiment(
        'Tab. 2',
        'independent projection heads are better than a shared one',
        'The paper: DINO, ViT-S/16, 100 epochs.',
        (Variant(method, 'mte', MTE), one),
        reference='mte',
        expected=LOSS,
        **fields,
    )
