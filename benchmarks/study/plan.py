"""Which runs answer which of the paper's claims.

Owns the list of experiments with the paper's figures, and the settings of the methods, which were tuned on the plain
runs alone. Knows nothing of how runs are trained, evaluated or shown.
"""

from typing import Any, NamedTuple, Optional

from benchmarks.study.train import Run

__all__ = ['EXPERIMENTS', 'PAIRS', 'TITLES', 'Comparison', 'Experiment', 'Variant', 'runs_of']

DEFAULT: dict[str, Any] = {'n_cls': 4, 'n_pool': 6}
CLS: dict[str, Any] = {'n_cls': 4, 'n_pool': 0}
POOLED: dict[str, Any] = {'n_cls': 0, 'n_pool': 6}  # where there is no class token
ONE_POOLED: dict[str, Any] = {'n_cls': 0, 'n_pool': 1}
GAIN = {'knn': 1, 'linear': 1}
LOSS = {'knn': -1, 'linear': -1}
PAIRS = ('Tab. 5', 'Tab. 5, further methods')  # of whose runs features are put side by side
TITLES = {
    'byol': 'BYOL',
    'dino': 'DINO',
    'hssl': 'HSSL',
    'ibot': 'iBOT',
    'moby': 'MoBY (Swin)',
    'moco_v3': 'MoCo v3',
    'supervised': 'supervised',
}

CLUSTERING: dict[str, Any] = {  # of DINO and of what stands on it
    'momentum': 0.9,
    'hidden': 512,
    'bottleneck': 128,
    'prototypes': 256,
    'batch_norm': True,
    'frozen_epochs': 0,
    'teacher_temp': 0.06,
    'center_momentum': 0.5,
    'global_scale': (0.75, 1.0),
    'local_scale': (0.25, 0.6),
    'jitter': 0.6,
    'blur': (0.0, 0.0, 0.0),
    'solarization': 0.0,
}
BOOTSTRAP: dict[str, Any] = {
    'momentum': 0.97,
    'hidden': 1024,
    'out': 256,
    'global_scale': (0.6, 1.0),
    'jitter': 0.2,
    'predictor_lr': 10.0,
}
SETTINGS: dict[str, dict[str, Any]] = {
    'dino': {'epochs': 12, 'batch_size': 32, 'settings': CLUSTERING},
    'ibot': {'epochs': 6, 'batch_size': 32, 'settings': CLUSTERING},
    'hssl': {'epochs': 6, 'batch_size': 32, 'settings': CLUSTERING},
    'byol': {'epochs': 30, 'batch_size': 32, 'settings': BOOTSTRAP},
    'moco_v3': {'epochs': 12, 'lr': 1e-3, 'settings': {'momentum': 0.95, 'global_scale': (0.75, 1.0)}},
    'moby': {'epochs': 10, 'model': 'swin', 'settings': {'momentum': 0.95, 'global_scale': (0.75, 1.0)}},
    'supervised': {'epochs': 24, 'batch_size': 32, 'settings': {'global_scale': (0.8, 1.0)}},
}
# tuned by plain runs of their own; the others have the settings of these
TUNED = ('dino', 'moco_v3', 'byol', 'supervised')
# times the epochs of MTE's run: ratios of steps without reading images, as costs.json had them when the runs began
EQUAL_TIME = {'dino': 2.1, 'moco_v3': 1.33}


class Variant(NamedTuple):
    """A way to train a method."""

    method: str
    name: str
    options: Optional[dict[str, Any]]  # of mte.wrap, None for the plain method
    paper: dict[str, float] = {}  # noqa: RUF012  # difference to the reference by accuracy; 'top1' where it isn't said which
    settings: dict[str, Any] = {}  # noqa: RUF012  # of the method, over its own
    longer: float = 1.0  # times the epochs


class Comparison(NamedTuple):
    """A variant beside another of the same method."""

    method: str
    variant: str
    reference: str
    paper: dict[str, float]
    expected: Optional[dict[str, int]] = None  # other than its experiment's


class Experiment(NamedTuple):
    """A table or figure of the paper, or a question of ours."""

    name: str
    claim: str
    source: str  # of the paper's figures, or why we ask
    variants: tuple[Variant, ...]
    seeds: int
    reference: str  # the variant of the same method that others are compared with
    expected: dict[str, int]  # accuracy -> sign of the claimed difference to the reference, 0 for none
    short: bool = False  # ablations have a third of the epochs (the paper's have 300 of 1,000 classes)
    versus: tuple[Comparison, ...] = ()  # where not every variant is compared with the reference
    decides: tuple[str, ...] = ()  # accuracies that the claim is about, where the others are shown only
    exploratory: bool = False  # asked after other results were seen

    def called(self, variant: str) -> str:
        """What results call ``variant`` as trained here."""
        return f'{variant}, short' if self.short else variant

    @property
    def comparisons(self) -> tuple[Comparison, ...]:
        """What is compared with what."""
        others = (v for v in self.variants if v.name != self.reference)
        return self.versus or tuple(Comparison(v.method, v.name, self.reference, v.paper) for v in others)


def _pair(method: str, **paper: float) -> tuple[Variant, Variant]:
    options = POOLED if SETTINGS[method].get('model') == 'swin' else DEFAULT
    return Variant(method, 'plain', None), Variant(method, 'mte', options, paper)


def _against_mte(method: str, *others: Variant) -> tuple[Variant, ...]:
    return (Variant(method, 'mte', DEFAULT), *others)


EXPERIMENTS = (
    Experiment(
        'Tab. 5',
        'MTE improves self-supervised methods',
        'The paper: ImageNet-1K, ViT-S/16; DINO 100 epochs, MoCo v3 300.',
        (*_pair('dino', knn=5.4, linear=2.8), *_pair('moco_v3', linear=0.8)),
        3,
        'plain',
        GAIN,
    ),
    Experiment(
        'Tab. 5, further methods',
        'MTE improves further self-supervised methods',
        'The paper: ImageNet-1K; ViT-S/16, 100 epochs; MoBY Swin-T, 300. HSSL here is with the loss of DINO; the paper '
        'does not say how it puts MTE into it: here its heterogeneous token is one more of the ensemble.',
        (
            *_pair('byol', knn=9.4, linear=5.6),
            *_pair('ibot', knn=3.6, linear=1.8),
            *_pair('hssl', knn=2.0, linear=1.0),
            *_pair('moby', knn=4.0, linear=0.8),
        ),
        2,
        'plain',
        GAIN,
    ),
    Experiment(
        'Tab. 8',
        'MTE improves supervised training',
        'The paper: ImageNet-1K, ViT-B/16, 300 epochs; accuracy of the classifier (ViT-S/16: +0.6).',
        _pair('supervised', top1=0.4),
        3,
        'plain',
        {'top1': 1, 'knn': 1, 'linear': 1},
        decides=('top1',),
    ),
    Experiment(
        'Tab. 8, what was tried',
        'MTE improves supervised training, with another weight of distillation or a longer schedule',
        'Asked after Tab. 8 was seen, and looked at on the same test images. Weight 3 instead of 1; twice the epochs '
        'for both.',
        (
            *_pair('supervised'),
            Variant('supervised', 'mte, weight 3', DEFAULT, settings={'weight': 3.0}),
            Variant('supervised', 'plain, twice as long', None, longer=2.0),
            Variant('supervised', 'mte, twice as long', DEFAULT, longer=2.0),
        ),
        2,
        'plain',
        {'top1': 1, 'knn': 1, 'linear': 1},
        versus=(
            Comparison('supervised', 'mte, weight 3', 'plain', {}),
            Comparison('supervised', 'mte, twice as long', 'plain, twice as long', {}),
        ),
        exploratory=True,
    ),
    Experiment(
        'Equal time',
        'MTE is better than the plain method trained for the same time',
        'Our question. The paper has k-NN of MTE with 300 epochs at or above plain DINO and iBOT with 800. Plain runs '
        f'have {EQUAL_TIME["dino"]} (DINO) and {EQUAL_TIME["moco_v3"]} (MoCo v3) times the epochs, the ratio of steps '
        'without reading images, which takes both the same; so plain has somewhat more than equal time. Heads and '
        'batches are small here: for ViT-S/16 with iBOT or DINO it is 1.01 to 1.23 ([benchmarks](README.md)).',
        tuple(
            variant
            for method, longer in EQUAL_TIME.items()
            for variant in (
                Variant(method, 'plain, equal time', None, longer=longer),
                Variant(method, 'mte', DEFAULT),
            )
        ),
        2,
        'plain, equal time',
        GAIN,
    ),
    Experiment(
        'Tab. 3',
        'patch tokens gain more than the class token',
        'The paper: k-NN, iBOT, 300 epochs.',
        (*_pair('ibot', knn=2.1, **{'patches/all': 7.0, 'patches/all - knn': 4.9}), *_pair('dino')),
        2,
        'plain',
        {'knn': 1, 'patches/all': 1, 'patches/all - knn': 1},
        decides=('patches/all - knn',),
    ),
    Experiment(
        'Tab. 7',
        'MTE improves fine-tuning of the whole network',
        'The paper: iBOT, ViT-S/16, 100 epochs.',
        _pair('ibot', **{'fine-tuned': 0.3}),
        2,
        'plain',
        {'fine-tuned': 1},
    ),
    Experiment(
        'Tab. 2',
        'independent projection heads are better than a shared one',
        'The paper: DINO, ViT-S/16, 100 epochs.',
        _against_mte(
            'dino',
            Variant('dino', 'shared head', {**DEFAULT, 'independent_heads': False}, {'knn': -2.7, 'linear': -1.0}),
        ),
        2,
        'mte',
        LOSS,
        short=True,
    ),
    Experiment(
        'Tab. 13',
        'auxiliary CLS tokens, TEN and pooled tokens each help',
        'The paper: DINO, 300 classes, 100 epochs; the paper calls it Top-1.',
        _against_mte(
            'dino',
            Variant('dino', 'plain', None),
            Variant('dino', 'CLS tokens', {**CLS, 'ten': False}),
            Variant('dino', 'CLS tokens, TEN', CLS),
            Variant('dino', 'pooled tokens', POOLED),
        ),
        2,
        'plain',
        GAIN,
        versus=(
            Comparison('dino', 'CLS tokens', 'plain', {'top1': 2.2}),
            Comparison('dino', 'CLS tokens, TEN', 'CLS tokens', {'top1': 1.0}),
            Comparison('dino', 'pooled tokens', 'plain', {'top1': 5.5}),
            Comparison('dino', 'mte', 'pooled tokens', {'top1': 0.8}),
            Comparison('dino', 'mte', 'CLS tokens, TEN', {'top1': 3.1}),
            Comparison('dino', 'mte', 'plain', {'top1': 6.3}),
        ),
        short=True,
    ),
    Experiment(
        'Tab. 13, what was tried',
        'auxiliary CLS tokens alone help with another temperature, weight of distillation or head',
        'Asked after Tab. 13 was seen, and looked at on the same test images. The temperature of the teacher is 0.04 '
        'instead of 0.06, for both; the weight of distillation 0.3 or 3 instead of 1; one head, prototypes included, '
        'for all tokens.',
        (
            Variant('dino', 'plain', None),
            Variant('dino', 'CLS tokens, TEN', CLS),
            Variant('dino', 'plain, cold teacher', None, settings={'teacher_temp': 0.04}),
            Variant('dino', 'CLS tokens, TEN, cold teacher', CLS, settings={'teacher_temp': 0.04}),
            Variant('dino', 'CLS tokens, TEN, weight 0.3', CLS, settings={'weight': 0.3}),
            Variant('dino', 'CLS tokens, TEN, weight 3', CLS, settings={'weight': 3.0}),
            Variant('dino', 'CLS tokens, TEN, shared head', {**CLS, 'independent_heads': False}),
        ),
        2,
        'plain',
        GAIN,
        versus=(
            Comparison('dino', 'CLS tokens, TEN', 'plain', {}),
            Comparison('dino', 'CLS tokens, TEN, cold teacher', 'plain, cold teacher', {}),
            Comparison('dino', 'CLS tokens, TEN, weight 0.3', 'plain', {}),
            Comparison('dino', 'CLS tokens, TEN, weight 3', 'plain', {}),
            Comparison('dino', 'CLS tokens, TEN, shared head', 'plain', {}),
        ),
        short=True,
        exploratory=True,
    ),
    Experiment(
        'Tab. 13, three times as long',
        'auxiliary CLS tokens, TEN and pooled tokens each help in a longer schedule',
        'Asked after Tab. 13 was seen, and looked at on the same test images.',
        (
            *_pair('dino'),
            Variant('dino', 'CLS tokens, TEN', CLS),
            Variant('dino', 'pooled tokens', POOLED),
        ),
        2,
        'plain',
        GAIN,
        versus=(
            Comparison('dino', 'CLS tokens, TEN', 'plain', {}),
            Comparison('dino', 'pooled tokens', 'plain', {}),
            Comparison('dino', 'mte', 'pooled tokens', {}),
            Comparison('dino', 'mte', 'CLS tokens, TEN', {}),
        ),
        exploratory=True,
    ),
    Experiment(
        'Tab. 14',
        'independent classifiers are better than a shared one',
        'The paper: supervised; accuracy of the classifier.',
        _against_mte(
            'supervised', Variant('supervised', 'shared head', {**DEFAULT, 'independent_heads': False}, {'top1': -0.4})
        ),
        2,
        'mte',
        {'top1': -1, 'knn': -1, 'linear': -1},
        decides=('top1',),
    ),
    Experiment(
        'Tab. 15',
        'adaptive pooling is better than average and max pooling',
        'The paper: DINO, 300 classes, 100 epochs; the paper calls it Top-1. One pooled token, which is all that '
        'average and max pooling give.',
        (
            Variant('dino', 'one pooled token', ONE_POOLED),
            Variant('dino', 'average pooling', {**ONE_POOLED, 'pooling': 'avg'}, {'top1': -1.3}),
            Variant('dino', 'max pooling', {**ONE_POOLED, 'pooling': 'max'}, {'top1': -1.1}),
        ),
        2,
        'one pooled token',
        LOSS,
        short=True,
    ),
    Experiment(
        'Tab. 16',
        'without cutting attention off, removing the auxiliary tokens costs accuracy',
        'The paper: DINO, 300 classes, 100 epochs; the paper calls it Top-1.',
        _against_mte(
            'dino',
            Variant(
                'dino',
                'attention not cut',
                DEFAULT,
                {'knn': -2.8, 'knn with tokens': -0.2, 'knn with tokens - knn': 2.6},  # its Top-1
                settings={'cuts': False},
            ),
        ),
        2,
        'mte',
        {'knn': -1, 'knn with tokens': 0, 'knn with tokens - knn': 1},
        decides=('knn with tokens - knn',),
        short=True,
    ),
    Experiment(
        'Fig. 13',
        'distillation closes the gap between ensemble and global token, and improves the ensemble too',
        'The paper: DINO; a figure without numbers.',
        _against_mte('dino', Variant('dino', 'no distillation', DEFAULT, settings={'distils': False})),
        2,
        'mte',
        {'knn of the ensemble - knn': 1, 'knn': -1, 'knn of the ensemble': -1},
        short=True,
    ),
    Experiment(
        'Fig. 15',
        'more tokens help, up to four auxiliary CLS and six pooled tokens (MTE)',
        'The paper: DINO, 300 classes; a figure without numbers, saturated from four and six on.',
        _against_mte(
            'dino',
            Variant('dino', '1 + 1 tokens', {'n_cls': 1, 'n_pool': 1}),
            Variant('dino', '2 + 3 tokens', {'n_cls': 2, 'n_pool': 3}),
            Variant('dino', '8 + 12 tokens', {'n_cls': 8, 'n_pool': 12}),
        ),
        2,
        '1 + 1 tokens',
        GAIN,
        versus=(
            Comparison('dino', '2 + 3 tokens', '1 + 1 tokens', {}),
            Comparison('dino', 'mte', '2 + 3 tokens', {}),
            Comparison('dino', '8 + 12 tokens', 'mte', {}, {'knn': 0, 'linear': 0}),
        ),
        short=True,
    ),
)


def runs_of(experiment: Experiment, **changes: Any) -> list[Run]:
    """Its runs, seed by seed, with ``changes`` to all."""
    runs = []
    for seed in range(experiment.seeds):
        for v in experiment.variants:
            fields = {**SETTINGS[v.method], **changes}
            fields['epochs'] = max(1, round(v.longer * fields['epochs'] / (3 if experiment.short else 1)))
            fields['settings'] = {**fields.get('settings', {}), **v.settings} or None
            runs.append(Run(v.method, v.options, seed, variant=experiment.called(v.name), **fields))
    return runs
