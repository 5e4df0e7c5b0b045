"""Tab. 16: own tokens that see the auxiliary CLS tokens, which are then taken away.

    python -m benchmarks.study --only "Tab. 16"

The paper, DINO: -0.2 with the tokens present, -2.8 once they are removed.
Here: Fashion-MNIST, DINO, k-NN -0.6 ± 0.5 and -1.1 ± 2.0 (3 seeds); photographs not run yet.
"""

from typing import Any

from benchmarks.study.experiment import MTE, Experiment, Variant

__all__ = ['experiment']


def experiment(method: str, **fields: Any) -> Experiment:
    paper = {'knn': -2.8, 'knn with tokens': -0.2, 'knn with tokens - knn': 2.6}  # its Top-1
    return Experiment(
        'Tab. 16',
        'without cutting attention off, removing the auxiliary tokens costs accuracy',
        'The paper: DINO, 300 classes, 100 epochs; the paper calls it Top-1.',
        (
            Variant(method, 'mte', MTE),
            Variant(method, 'attention-not-masked', MTE, paper, settings={'mask_attention': False}),
        ),
        reference='mte',
        expected={'knn': -1, 'knn with tokens': 0, 'knn with tokens - knn': 1},
        decides=('knn with tokens - knn',),
        **fields,
    )
