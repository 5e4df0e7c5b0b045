"""Networks whose global token is the mean of their patches, as pooled tokens are. Our question.

    python -m benchmarks.study --only "Mean of patches"

Pooled tokens bring most of the gain, so it may be one of pooling, which a network can have without MTE.
Here: not run yet.
"""

from typing import Any

from benchmarks.study.experiment import GAIN, MTE, Comparison, Experiment, Variant

__all__ = ['experiment']


def experiment(method: str, **fields: Any) -> Experiment:
    mean = {'run': {'model': 'photo_vit_12_mean'}}
    return Experiment(
        'Mean of patches',
        'MTE helps a network whose global token is the mean of its patches',
        'Our question. Names with mean are of such networks, the others have a class token.',
        (
            Variant(method, 'plain', None),
            Variant(method, 'plain-mean', None, **mean),
            Variant(method, 'mte-mean', MTE, **mean),
        ),
        reference='plain',
        expected=GAIN,
        versus=(
            Comparison(method, 'mte-mean', 'plain-mean', {}),
            Comparison(method, 'plain-mean', 'plain', {}),
        ),
        exploratory=True,
        **fields,
    )
