"""Why auxiliary CLS tokens are copies of each other, and what makes them differ. Our question.

    python -m benchmarks.study --only "Auxiliary CLS tokens"

One thing is changed at a time; the number is the tokens' standard deviation at the start, 0.02 where none is given.
Here: Imagenette, MTE's runs of Tab. 5 (3 seeds): CKA at the end among auxiliary CLS tokens is 0.78 to 0.96, with the
class token 0.88 to 0.93, so they are no copies as on Fashion-MNIST (0.98 to 1.00). Without pooled tokens
(3 seeds): k-NN 47.4 plain, 47.2 with CLS tokens, 47.0 without TEN; one seed has 47.8 instead of 47.5 if these start
with a standard deviation of 1, which brings CKA to 0.73 to 0.88 and the single tokens from 45 to 46 down to 39 to 43:
different, but not better. Beside pooled tokens they bring +0.5 ± 0.3 (Tab. 13).
"""

from typing import Any

from benchmarks.study.experiment import CLS, GAIN, Comparison, Experiment, Variant

__all__ = ['experiment']

INITIAL: tuple[tuple[str, Any], ...] = (('1', 1.0), ('orthogonal', 'orthogonal'), ('3', 3.0), ('0.3', 0.3))


def experiment(method: str, **fields: Any) -> Experiment:
    alone = (
        Variant(method, 'cls', CLS),
        *(Variant(method, f'cls-{std}', CLS, settings={'cls_init': v}) for std, v in INITIAL),
        Variant(method, 'cls-weight-3', CLS, settings={'weight': 3.0}),
        Variant(method, 'cls-ten-0', CLS, settings={'ten_scale': 0.0}),
        Variant(method, 'cls-see-class', {**CLS, 'see_global': True}),
        Variant(method, 'cls-no-ten', {**CLS, 'ten': False}),
        Variant(method, 'heads-alone', {**CLS, 'ten': False}, settings={'cls_init': 'class'}),
        Variant(method, 'cls-ten-xavier', CLS, settings={'ten_scale': 'xavier'}),
    )
    deep = {'run': {'model': 'photo_vit_12_deep'}}
    return Experiment(
        'Auxiliary CLS tokens',
        'auxiliary CLS tokens that start far apart stay different, and help',
        'Our question. Without pooled tokens; the number is the standard deviation of the tokens at the start, '
        'which is 0.02 where none is given. One thing is changed at a time. heads-alone has four heads on the class '
        'token and no auxiliary tokens; deep ViTs have 10 blocks.',
        (
            Variant(method, 'plain', None),
            *alone,
            Variant(method, 'plain-class-1', None, settings={'class_init': 1.0}),
            Variant(method, 'cls-class-1', CLS, settings={'class_init': 1.0}),
            Variant(method, 'plain-twice', None, longer=2.0),
            Variant(method, 'cls-twice', CLS, longer=2.0),
            Variant(method, 'plain-deep', None, **deep),
            Variant(method, 'cls-deep', CLS, **deep),
            Variant(method, 'cls-deep-1', CLS, settings={'cls_init': 1.0}, **deep),
        ),
        reference='plain',
        expected=GAIN,
        versus=(
            *(Comparison(method, v.name, 'plain', {}) for v in alone),
            Comparison(method, 'cls-class-1', 'plain-class-1', {}),
            Comparison(method, 'cls-twice', 'plain-twice', {}),
            *(Comparison(method, name, 'plain-deep', {}) for name in ('cls-deep', 'cls-deep-1')),
        ),
        exploratory=True,
        **fields,
    )
