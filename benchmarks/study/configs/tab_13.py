"""Tab. 13: auxiliary CLS tokens without and with TEN, pooled tokens, all together.

    python -m benchmarks.study --only "Tab. 13"

The paper, DINO, to the plain method: CLS tokens +2.2, with TEN +3.2, pooled tokens +5.5, all +6.3.
Here: Fashion-MNIST, DINO, k-NN: -2.1 ± 3.4, -1.5 ± 4.1, +8.1 ± 2.1, +6.6 ± 2.0 (3 seeds), so pooled tokens bring the
whole gain. Imagenette, MoCo v3, k-NN (3 seeds): CLS tokens -0.4 ± 0.7, with TEN -0.2 ± 0.8, pooled +2.9 ± 1.5,
all +0.5 ± 0.3 more than pooled alone.
"""

from typing import Any

from benchmarks.study.experiment import CLS, GAIN, MTE, POOLED, Comparison, Experiment, Variant, pair

__all__ = ['experiment']


def experiment(method: str, **fields: Any) -> Experiment:
    return Experiment(
        'Tab. 13',
        'auxiliary CLS tokens, TEN and pooled tokens each help',
        'The paper: DINO, 300 classes, 100 epochs; the paper calls it Top-1.',
        (
            Variant(method, 'plain', None),
            Variant(method, 'pooled', POOLED),
            Variant(method, 'cls', CLS),
            Variant(method, 'cls-no-ten', {**CLS, 'ten': False}),
            Variant(method, 'mte', MTE),
        ),
        reference='plain',
        expected=GAIN,
        versus=(
            Comparison(method, 'cls-no-ten', 'plain', {'top1': 2.2}),
            Comparison(method, 'cls', 'cls-no-ten', {'top1': 1.0}),
            Comparison(method, 'pooled', 'plain', {'top1': 5.5}),
            Comparison(method, 'mte', 'pooled', {'top1': 0.8}),
            Comparison(method, 'mte', 'cls', {'top1': 3.1}),
            Comparison(method, 'mte', 'plain', {'top1': 6.3}),
        ),
        **fields,
    )


def tried(method: str, **fields: Any) -> Experiment:
    """What was tried on 28-pixel images after CLS tokens had brought nothing; :mod:`cls_tokens` has photographs."""
    changed = (
        Variant(method, 'cls-weight-0.3', CLS, settings={'weight': 0.3}),
        Variant(method, 'cls-weight-3', CLS, settings={'weight': 3.0}),
        Variant(method, 'cls-shared-head', {**CLS, 'independent_heads': False}),
    )
    cold = {'teacher_temp': 0.04}
    return Experiment(
        'Tab. 13, what was tried',
        'auxiliary CLS tokens alone help with another temperature, weight of distillation or head',
        'Asked after Tab. 13 was seen, and looked at on the same test images. The temperature of the teacher is 0.04 '
        'instead of 0.06, for both; the weight of distillation 0.3 or 3 instead of 1; one head, prototypes included, '
        'for all tokens.',
        (
            Variant(method, 'plain', None),
            Variant(method, 'cls', CLS),
            Variant(method, 'plain-cold-teacher', None, settings=cold),
            Variant(method, 'cls-cold-teacher', CLS, settings=cold),
            *changed,
        ),
        reference='plain',
        expected=GAIN,
        versus=(
            Comparison(method, 'cls', 'plain', {}),
            Comparison(method, 'cls-cold-teacher', 'plain-cold-teacher', {}),
            *(Comparison(method, v.name, 'plain', {}) for v in changed),
        ),
        exploratory=True,
        **fields,
    )


def longer(method: str, **fields: Any) -> Experiment:
    """The same with the schedule of Tab. 5."""
    return Experiment(
        'Tab. 13, three times as long',
        'auxiliary CLS tokens, TEN and pooled tokens each help in a longer schedule',
        'Asked after Tab. 13 was seen, and looked at on the same test images.',
        (*pair(method), Variant(method, 'cls', CLS), Variant(method, 'pooled', POOLED)),
        reference='plain',
        expected=GAIN,
        versus=tuple(
            Comparison(method, variant, reference, {})
            for variant, reference in (('cls', 'plain'), ('pooled', 'plain'), ('mte', 'pooled'), ('mte', 'cls'))
        ),
        exploratory=True,
        **fields,
    )
