"""Tab. 3: what patch tokens gain, beside the class token.

    python -m benchmarks.study --only "Tab. 3"

The paper, iBOT: patches +7.0 k-NN, the class token +2.1.
Here: Fashion-MNIST contradicts it for iBOT, where the class token gains more, and decides nothing for DINO; Imagenette
contradicts it for MoCo v3, whose patches gain less than half of what the class token does.
"""

from typing import Any

from benchmarks.study.experiment import Experiment, pair

__all__ = ['experiment']


def experiment(*others: str, **fields: Any) -> Experiment:
    return Experiment(
        'Tab. 3',
        'patch tokens gain more than the class token',
        'The paper: k-NN, iBOT, 300 epochs.',
        (
            *pair('ibot', knn=2.1, **{'patches/all': 7.0, 'patches/all - knn': 4.9}),
            *pair('dino'),
            *(v for m in others for v in pair(m)),
        ),
        reference='plain',
        expected={'knn': 1, 'patches/all': 1, 'patches/all - knn': 1},
        decides=('patches/all - knn',),
        **fields,
    )
