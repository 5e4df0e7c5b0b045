"""Tab. 7: fine-tuning of the whole network.

    python -m benchmarks.study --only "Tab. 7"

The paper, iBOT: +0.3. Here: Fashion-MNIST, iBOT +0.6 ± 0.3 (2 seeds).
"""

from typing import Any

from benchmarks.study.experiment import Experiment, pair

__all__ = ['experiment']


def experiment(**fields: Any) -> Experiment:
    return Experiment(
        'Tab. 7',
        'MTE improves fine-tuning of the whole network',
        'The paper: iBOT, ViT-S/16, 100 epochs.',
        pair('ibot', **{'fine-tuned': 0.3}),
        reference='plain',
        expected={'fine-tuned': 1},
        **fields,
    )
