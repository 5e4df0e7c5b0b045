"""Plain runs with as many more epochs as take the time of MTE's run. Our question.

    python -m benchmarks.study --only "Equal time"

Here: Fashion-MNIST (3 seeds): DINO +0.7 ± 1.6 k-NN and +0.7 ± 2.1 linear; MoCo v3 confirmed for both, see REPORT.md.
Imagenette, MoCo v3 (4 seeds): k-NN +2.5 ± 1.6, linear +2.5 ± 1.7, patches +0.0 ± 1.1; of the three seeds that were
planned +2.3 ± 2.8 and +2.6 ± 3.1, undecided. DINO (3 seeds) -0.4 ± 1.9 and -0.5 ± 1.9: nothing gained, where its ten
heads make 1.47 of a step.
"""

from typing import Any

from benchmarks.study.experiment import GAIN, MTE, Experiment, Variant

__all__ = ['experiment']


def experiment(ratios: dict[str, float], **fields: Any) -> Experiment:
    """Method -> how many times the epochs of MTE's run the plain one has."""
    times = ', '.join(f'{ratio} ({method})' for method, ratio in ratios.items())
    return Experiment(
        'Equal time',
        'MTE is better than the plain method trained for the same time',
        'Our question. The paper has k-NN of MTE with 300 epochs at or above plain DINO and iBOT with 800. Plain runs '
        f'have {times} times the epochs, the ratio of steps without reading images. For ViT-S/16 with iBOT or DINO '
        'that is 1.01 to 1.23 ([benchmarks](README.md)).',
        tuple(
            variant
            for method, longer in ratios.items()
            for variant in (Variant(method, 'plain-equal-time', None, longer=longer), Variant(method, 'mte', MTE))
        ),
        reference='plain-equal-time',
        expected={**GAIN, 'patches/all': 1},
        **fields,
    )
