"""The paper's experiments on photographs, the runs that tell most first.

Ablations are of MoCo v3, whose steps cost least, and have the schedule of its pair, so that they share its runs.
"""

from typing import Any

from benchmarks.study.plan import (
    CLS,
    DEFAULT,
    GAIN,
    LOSS,
    ONE_POOLED,
    POOLED,
    Comparison,
    Experiment,
    Plan,
    Variant,
    pair,
)  # fmt: skip

__all__ = ['PLAN']

COMMON: dict[str, Any] = {'model': 'photo_vit_12', 'epochs': 12}
CLUSTERING: dict[str, Any] = {
    'momentum': 0.97,
    'prototypes': 512,
    'batch_norm': True,
    'frozen_epochs': 0,
    'teacher_temp': 0.05,
    'center_momentum': 0.8,
    'global_scale': (0.4, 1.0),
    'local_scale': (0.1, 0.4),
    'local_views': 2,
    'blur': (0.0, 0.0, 0.0),
    'solarization': 0.0,
}
CONTRASTIVE: dict[str, Any] = {'momentum': 0.9, 'global_scale': (0.2, 1.0), 'gray': 0.0, 'jitter': 0.2}
SETTINGS: dict[str, dict[str, Any]] = {
    'moco_v3': {**COMMON, 'settings': {**CONTRASTIVE, 'predicts': False}},
    'dino': {**COMMON, 'settings': CLUSTERING},
    'ibot': {**COMMON, 'settings': CLUSTERING},
    'byol': {**COMMON, 'settings': CONTRASTIVE},
    'moby': {**COMMON, 'model': 'swin', 'settings': CONTRASTIVE},
    'supervised': {**COMMON, 'epochs': 30, 'settings': {'global_scale': (0.35, 1.0), 'jitter': 0.4}},
}
TUNING: dict[str, dict[str, dict[str, Any]]] = {
    'moco_v3': {
        'alone-momentum-0.9': {},
        'alone': {'settings': {'momentum': 0.95}},
        'alone-momentum-0.99': {'settings': {'momentum': 0.99}},
        'alone-gray': {'settings': {'momentum': 0.95, 'gray': 0.2, 'jitter': 0.4}},
        'alone-jitter-0.4': {'settings': {'momentum': 0.95, 'jitter': 0.4}},
        'alone-16': {'model': 'photo_vit', 'settings': {'momentum': 0.95}},
        'alone-lr-2e-3': {'lr': 2e-3, 'settings': {'momentum': 0.95}},
    },
    'dino': {
        'base': {},
        'colors': {'settings': {'gray': 0.0, 'jitter': 0.2}},
        'momentum-0.9': {'settings': {'momentum': 0.9}},
        'temp-0.04': {'settings': {'teacher_temp': 0.04}},
    },
}
METHOD = 'moco_v3'


def _of(name: str, options: Any, paper: Any = None, **settings: Any) -> Variant:
    return Variant(METHOD, name, options, paper or {}, settings)


PLAIN, MTE = pair(METHOD)
EXPERIMENTS = (
    Experiment(
        'Tab. 5',
        'MTE improves self-supervised methods',
        'The paper: ImageNet-1K, ViT-S/16; DINO 100 epochs, MoCo v3 300.',
        (*pair('moco_v3', linear=0.8), *pair('dino', knn=5.4, linear=2.8)),
        3,
        'plain',
        GAIN,
    ),
    Experiment(
        'Auxiliary CLS tokens',
        'auxiliary CLS tokens that start far apart stay different, and help',
        'Our question. Without pooled tokens; the number is the standard deviation of the tokens at the start, '
        'which is 0.02 where none is given. One thing is changed at a time.',
        (
            PLAIN,
            _of('cls', CLS),
            _of('cls-1', CLS, cls_init=1.0),
            _of('cls-orthogonal', CLS, cls_init='orthogonal'),
            _of('cls-3', CLS, cls_init=3.0),
            _of('cls-0.3', CLS, cls_init=0.3),
            _of('cls-weight-3', CLS, weight=3.0),
            _of('cls-ten-0', CLS, ten_scale=0.0),
            _of('cls-see-class', {**CLS, 'see_global': True}),
            _of('plain-class-1', None, class_init=1.0),
            _of('cls-class-1', CLS, class_init=1.0),
            Variant(METHOD, 'plain-twice', None, longer=2.0),
            Variant(METHOD, 'cls-twice', CLS, longer=2.0),
        ),
        1,
        'plain',
        GAIN,
        versus=(
            *(
                Comparison(METHOD, f'cls{n}', 'plain', {})
                for n in (
                    '',
                    '-1',
                    '-orthogonal',
                    '-3',
                    '-0.3',
                    '-weight-3',
                    '-ten-0',
                    '-see-class',
                )
            ),
            Comparison(METHOD, 'cls-class-1', 'plain-class-1', {}),
            Comparison(METHOD, 'cls-twice', 'plain-twice', {}),
        ),
        exploratory=True,
    ),
    Experiment(
        'Tab. 13',
        'auxiliary CLS tokens, TEN and pooled tokens each help',
        'The paper: DINO, 300 classes, 100 epochs; the paper calls it Top-1.',
        (PLAIN, _of('pooled', POOLED), _of('cls', CLS), _of('cls-no-ten', {**CLS, 'ten': False}), MTE),
        3,
        'plain',
        GAIN,
        versus=(
            Comparison(METHOD, 'cls-no-ten', 'plain', {'top1': 2.2}),
            Comparison(METHOD, 'cls', 'cls-no-ten', {'top1': 1.0}),
            Comparison(METHOD, 'pooled', 'plain', {'top1': 5.5}),
            Comparison(METHOD, 'mte', 'pooled', {'top1': 0.8}),
            Comparison(METHOD, 'mte', 'cls', {'top1': 3.1}),
            Comparison(METHOD, 'mte', 'plain', {'top1': 6.3}),
        ),
    ),
    Experiment(
        'Tab. 15',
        'adaptive pooling is better than average and max pooling',
        'The paper: DINO, 300 classes, 100 epochs; the paper calls it Top-1. One pooled token, which is all that '
        'average and max pooling give.',
        (
            _of('one-pooled', ONE_POOLED),
            _of('average-pooling', {**ONE_POOLED, 'pooling': 'avg'}, {'top1': -1.3}),
            _of('max-pooling', {**ONE_POOLED, 'pooling': 'max'}, {'top1': -1.1}),
        ),
        3,
        'one-pooled',
        LOSS,
    ),
    Experiment(
        'Tab. 2',
        'independent projection heads are better than a shared one',
        'The paper: DINO, ViT-S/16, 100 epochs.',
        (MTE, _of('shared-head', {**DEFAULT, 'independent_heads': False}, {'knn': -2.7, 'linear': -1.0})),
        3,
        'mte',
        LOSS,
    ),
    Experiment(
        'Tab. 16',
        'without cutting attention off, removing the auxiliary tokens costs accuracy',
        'The paper: DINO, 300 classes, 100 epochs; the paper calls it Top-1.',
        (
            MTE,
            _of(
                'attention-not-cut',
                DEFAULT,
                {'knn': -2.8, 'knn with tokens': -0.2, 'knn with tokens - knn': 2.6},  # its Top-1
                cuts=False,
            ),
        ),
        3,
        'mte',
        {'knn': -1, 'knn with tokens': 0, 'knn with tokens - knn': 1},
        decides=('knn with tokens - knn',),
    ),
    Experiment(
        'Equal time',
        'MTE is better than the plain method trained for the same time',
        'Our question. The plain run has more epochs, by the ratio of the measured steps.',
        (Variant(METHOD, 'plain-equal-time', None, longer=1.3), MTE),
        3,
        'plain-equal-time',
        GAIN,
    ),
    Experiment(
        'Fig. 13',
        'distillation closes the gap between ensemble and global token, and improves the ensemble too',
        'The paper: DINO; a figure without numbers.',
        (MTE, _of('no-distillation', DEFAULT, distils=False)),
        3,
        'mte',
        {'knn of the ensemble - knn': 1, 'knn': -1, 'knn of the ensemble': -1},
    ),
    Experiment(
        'Fig. 15',
        'more tokens help, up to four auxiliary CLS and six pooled tokens (MTE)',
        'The paper: DINO, 300 classes; a figure without numbers, saturated from four and six on.',
        (
            MTE,
            _of('1-1-tokens', {'n_cls': 1, 'n_pool': 1}),
            _of('2-3-tokens', {'n_cls': 2, 'n_pool': 3}),
            _of('8-12-tokens', {'n_cls': 8, 'n_pool': 12}),
        ),
        3,
        '1-1-tokens',
        GAIN,
        versus=(
            Comparison(METHOD, '2-3-tokens', '1-1-tokens', {}),
            Comparison(METHOD, 'mte', '2-3-tokens', {}),
            Comparison(METHOD, '8-12-tokens', 'mte', {}, {'knn': 0, 'linear': 0}),
        ),
    ),
    Experiment(
        'Tab. 5, further methods',
        'MTE improves further self-supervised methods',
        'The paper: ImageNet-1K; ViT-S/16, 100 epochs; MoBY Swin-T, 300.',
        (
            *pair('ibot', knn=3.6, linear=1.8),
            *pair('byol', knn=9.4, linear=5.6),
            *pair('moby', POOLED, knn=4.0, linear=0.8),
        ),
        3,
        'plain',
        GAIN,
    ),
    Experiment(
        'Tab. 8',
        'MTE improves supervised training',
        'The paper: ImageNet-1K, ViT-B/16, 300 epochs; accuracy of the classifier (ViT-S/16: +0.6).',
        pair('supervised', top1=0.4),
        3,
        'plain',
        {'top1': 1, 'knn': 1, 'linear': 1},
        decides=('top1',),
    ),
    Experiment(
        'Tab. 3',
        'patch tokens gain more than the class token',
        'The paper: k-NN, iBOT, 300 epochs.',
        (*pair('ibot', knn=2.1, **{'patches/all': 7.0, 'patches/all - knn': 4.9}), *pair('dino')),
        3,
        'plain',
        {'knn': 1, 'patches/all': 1, 'patches/all - knn': 1},
        decides=('patches/all - knn',),
    ),
)
PLAN = Plan(
    EXPERIMENTS,
    SETTINGS,
    ('moco_v3',),
    'Tuned ones were chosen by k-NN of plain runs of 4 epochs with seed 0 on a sixth of the training images that was '
    'held out for it, then kept for both. MoCo v3 has no predictor, with which 4 epochs end lower: below, names of its '
    'runs without one begin with alone. Of the others the plain run may be weaker than it could be.',
    ('Tab. 5',),
    watch_every=2,
    tuning=TUNING,
)
