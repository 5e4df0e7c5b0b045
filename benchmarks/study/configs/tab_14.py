"""Tab. 14: a classifier for each auxiliary token, or one for all.

    python -m benchmarks.study --only "Tab. 14"

The paper, supervised: one for all loses 0.4. Here: Fashion-MNIST -0.0 ± 3.1 (3 seeds), which decides nothing.
"""

from typing import Any

from benchmarks.study.experiment import MTE, Experiment, Variant

__all__ = ['experiment']


def experiment(**fields: Any) -> Experiment:
    one = Variant('supervised', 'shared-head', {**MTE, 'independent_heads': False}, {'top1': -0.4})
    return Experiment(
        'Tab. 14',
        'independent classifiers are better than a shared one',
        'The paper: supervised; accuracy of the classifier.',
        (Variant('supervised', 'mte', MTE), one),
        reference='mte',
        expected={'top1': -1, 'knn': -1, 'linear': -1},
        decides=('top1',),
        **fields,
    )
