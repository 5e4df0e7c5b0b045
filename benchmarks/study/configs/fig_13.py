"""Fig. 13: without distillation, the global token has the plain method's loss.

    python -m benchmarks.study --only "Fig. 13"

The paper, DINO: a figure without numbers; distillation closes the gap to the ensemble.
Here: Fashion-MNIST, DINO, k-NN -7.9 ± 7.7, gap to the ensemble 13.3 instead of 5.9 (3 seeds); photographs not run yet.
"""

from typing import Any

from benchmarks.study.experiment import MTE, Experiment, Variant

__all__ = ['experiment']


def experiment(method: str, **fields: Any) -> Experiment:
    return Experiment(
        'Fig. 13',
        'distillation closes the gap between ensemble and global token, and improves the ensemble too',
        'The paper: DINO; a figure without numbers.',
        (Variant(method, 'mte', MTE), Variant(method, 'no-distillation', MTE, settings={'distill': False})),
        reference='mte',
        expected={'knn of the ensemble - knn': 1, 'knn': -1, 'knn of the ensemble': -1},
        **fields,
    )
