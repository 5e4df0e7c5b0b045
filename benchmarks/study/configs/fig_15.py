"""Fig. 15: the number of tokens.

    python -m benchmarks.study --only "Fig. 15"

The paper, DINO: a figure without numbers, saturated from four auxiliary CLS and six pooled tokens on.
Here: Fashion-MNIST, DINO (2 seeds): 1 + 1, 2 + 3, 4 + 6 and 8 + 12 tokens have 73.9, 74.0, 74.3 and 74.2 k-NN, all
differences within their intervals; photographs not run yet.
"""

from typing import Any

from benchmarks.study.experiment import GAIN, MTE, Comparison, Experiment, Variant

__all__ = ['experiment']


def experiment(method: str, **fields: Any) -> Experiment:
    counts = ((1, 1), (2, 3), (8, 12))
    return Experiment(
        'Fig. 15',
        'more tokens help, up to four auxiliary CLS and six pooled tokens (MTE)',
        'The paper: DINO, 300 classes; a figure without numbers, saturated from four and six on.',
        (
            Variant(method, 'mte', MTE),
            *(Variant(method, f'{cls}-{pool}-tokens', {'n_cls': cls, 'n_pool': pool}) for cls, pool in counts),
        ),
        reference='1-1-tokens',
        expected=GAIN,
        versus=(
            Comparison(method, '2-3-tokens', '1-1-tokens', {}),
            Comparison(method, 'mte', '2-3-tokens', {}),
            Comparison(method, '8-12-tokens', 'mte', {}, {'knn': 0, 'linear': 0}),
        ),
        **fields,
    )
