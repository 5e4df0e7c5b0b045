"""Which runs answer which of the paper's claims.

Owns the list of experiments and the settings of the methods, which were tuned on the plain runs alone. Knows nothing of
how runs are trained, evaluated or shown.
"""

from typing import Any, NamedTuple, Optional

from benchmarks.study.train import Run

__all__ = ['EXPERIMENTS', 'Experiment', 'runs_of']

DEFAULT: dict[str, Any] = {'n_cls': 4, 'n_pool': 6}
PLAIN: Optional[dict[str, Any]] = None

SETTINGS: dict[str, dict[str, Any]] = {
    'dino': {'epochs': 10, 'lr': 1e-3},
    'ibot': {'epochs': 10, 'lr': 1e-3},
    'byol': {'epochs': 10, 'lr': 1e-3},
    'moco_v3': {'epochs': 10, 'lr': 1e-3},
    'moby': {'epochs': 10, 'lr': 1e-3, 'model': 'swin'},
    'supervised': {'epochs': 10, 'lr': 1e-3},
}


class Experiment(NamedTuple):
    """A table or figure of the paper."""

    name: str
    claim: str
    paper: str
    runs: tuple[tuple[str, str, Optional[dict[str, Any]]], ...]  # method, variant, options of mte.wrap
    seeds: int
    reference: str = 'mte'  # the variant that others are compared with
    expected: int = -1  # sign of the difference to it that is claimed, 0 for none


def _both(*methods: str) -> tuple[tuple[str, str, Optional[dict[str, Any]]], ...]:
    no_cls = {'n_cls': 0, 'n_pool': 6}
    return tuple(
        run
        for m in methods
        for run in ((m, 'plain', PLAIN), (m, 'mte', no_cls if SETTINGS[m].get('model') == 'swin' else DEFAULT))
    )


def _default(method: str, *others: tuple[str, dict[str, Any]]) -> tuple[tuple[str, str, Optional[dict[str, Any]]], ...]:
    return ((method, 'mte', DEFAULT), *((method, variant, options) for variant, options in others))


EXPERIMENTS = (
    Experiment(
        'Tab. 5',
        'MTE improves each method',
        'k-NN and linear probing on ImageNet-1K, 300 epochs: DINO +2.9 and +1.2, MoCo v3 +0.8 (linear).',
        _both('dino', 'moco_v3'),
        3,
        'plain',
        1,
    ),
    Experiment(
        'Tab. 5, further methods',
        'MTE improves each method',
        'iBOT +2.1 and +0.6, MoBY with Swin +4.0 and +0.8.',
        _both('byol', 'ibot', 'moby'),
        2,
        'plain',
        1,
    ),
    Experiment(
        'Tab. 8', 'MTE improves supervised training', 'ViT-B/16, 300 epochs: +0.4.', _both('supervised'), 3, 'plain', 1
    ),
    Experiment(
        'Tab. 2',
        'independent heads are better than a shared one',
        'the global token is better with independent heads.',
        _default('dino', ('shared head', {**DEFAULT, 'independent_heads': False})),
        2,
    ),
    Experiment(
        'Tab. 13',
        'auxiliary CLS tokens, TEN and pooled tokens each help',
        'each helps, TEN by 1.0.',
        _default(
            'dino',
            ('cls', {'n_cls': 4, 'n_pool': 0, 'ten': False}),
            ('cls, TEN', {'n_cls': 4, 'n_pool': 0}),
            ('pooled', {'n_cls': 0, 'n_pool': 6}),
        ),
        2,
    ),
    Experiment(
        'Tab. 14',
        'independent classifiers are better than a shared one',
        'independent classifiers are better.',
        _default('supervised', ('shared head', {**DEFAULT, 'independent_heads': False})),
        2,
    ),
    Experiment(
        'Tab. 15',
        'adaptive pooling is better than average and max pooling',
        'adaptive pooling is better than both, which give one token only.',
        _default(
            'dino',
            ('average pooling', {'n_cls': 4, 'n_pool': 1, 'pooling': 'avg'}),
            ('max pooling', {'n_cls': 4, 'n_pool': 1, 'pooling': 'max'}),
            ('adaptive pooling, 1', {'n_cls': 4, 'n_pool': 1}),
        ),
        2,
    ),
    Experiment(
        'Fig. 15',
        'more tokens help, up to four and six',
        'saturation with four auxiliary CLS tokens and six pooled tokens.',
        _default(
            'dino',
            ('1 + 1 tokens', {'n_cls': 1, 'n_pool': 1}),
            ('2 + 3 tokens', {'n_cls': 2, 'n_pool': 3}),
            ('8 + 12 tokens', {'n_cls': 8, 'n_pool': 12}),
        ),
        2,
    ),
)


def runs_of(experiment: Experiment, **changes: Any) -> list[Run]:
    """Its runs, seed by seed, with ``changes`` to all."""
    return [
        Run(method, options, seed=seed, variant=variant, **{**SETTINGS[method], **changes})
        for seed in range(experiment.seeds)
        for method, variant, options in experiment.runs
    ]
