"""What an experiment is: which runs answer which of the paper's claims.

Owns how experiments become runs. Knows nothing of which there are (``configs``), nor of how runs are trained or shown.
"""

from typing import Any, NamedTuple, Optional

from benchmarks.study.train import Run

__all__ = [
    'CLS', 'GAIN', 'LOSS', 'MTE', 'ONE_POOLED', 'POOLED', 'TITLES', 'Comparison', 'Experiment', 'Plan', 'Variant',
    'pair', 'runs_of', 'tuning_runs',
]  # fmt: skip

MTE: dict[str, Any] = {'n_cls': 4, 'n_pool': 6}
CLS: dict[str, Any] = {'n_cls': 4, 'n_pool': 0}
POOLED: dict[str, Any] = {'n_cls': 0, 'n_pool': 6}  # where there is no class token
ONE_POOLED: dict[str, Any] = {'n_cls': 0, 'n_pool': 1}
GAIN = {'knn': 1, 'linear': 1}
LOSS = {'knn': -1, 'linear': -1}
TITLES = {
    'byol': 'BYOL',
    'dino': 'DINO',
    'hssl': 'HSSL',
    'ibot': 'iBOT',
    'moby': 'MoBY (Swin)',
    'moco_v3': 'MoCo v3',
    'supervised': 'supervised',
}


class Variant(NamedTuple):
    """A way to train a method."""

    method: str
    name: str
    options: Optional[dict[str, Any]]  # of mte.wrap, None for the plain method
    paper: dict[str, float] = {}  # noqa: RUF012  # difference to the reference by accuracy; 'top1' where it isn't said which
    settings: dict[str, Any] = {}  # noqa: RUF012  # of the method, over its own
    longer: float = 1.0  # times the epochs
    run: dict[str, Any] = {}  # noqa: RUF012  # fields of the run


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
    reference: str  # the variant of the same method that others are compared with
    expected: dict[str, int]  # accuracy -> sign of the claimed difference to the reference, 0 for none
    seeds: int = 3
    short: bool = False  # ablations have a third of the epochs (the paper's have 300 of 1,000 classes)
    versus: tuple[Comparison, ...] = ()  # where not every variant is compared with the reference
    decides: tuple[str, ...] = ()  # accuracies that the claim is about, where the others are shown only
    exploratory: bool = False  # asked after other results were seen

    def called(self, variant: str) -> str:
        """What results call ``variant`` as trained here."""
        return f'{variant}-short' if self.short else variant

    @property
    def comparisons(self) -> tuple[Comparison, ...]:
        """What is compared with what."""
        others = (v for v in self.variants if v.name != self.reference)
        return self.versus or tuple(Comparison(v.method, v.name, self.reference, v.paper) for v in others)


class Plan(NamedTuple):
    """Experiments on one kind of images, in the order in which their runs are worth most."""

    experiments: tuple[Experiment, ...]
    settings: dict[str, dict[str, Any]]  # of each method's runs
    tuned: tuple[str, ...]  # by plain runs of their own; the others have the settings of these
    how_tuned: str
    pairs: tuple[str, ...]  # experiments of whose runs features are put side by side
    watch_every: int = 1  # epochs
    tuning: dict[str, dict[str, dict[str, Any]]] = {}  # noqa: RUF012  # method -> name -> changes that were tried


def pair(method: str, options: Optional[dict[str, Any]] = None, **paper: float) -> tuple[Variant, Variant]:
    """Plain and MTE."""
    return Variant(method, 'plain', None), Variant(method, 'mte', options or MTE, paper)


def runs_of(experiment: Experiment, plan: Plan, **changes: Any) -> list[Run]:
    """Its runs, seed by seed, with ``changes`` to all."""
    runs = []
    for seed in range(experiment.seeds):
        for v in experiment.variants:
            fields = {**plan.settings[v.method], **v.run, **changes}
            fields['epochs'] = max(1, round(v.longer * fields['epochs'] / (3 if experiment.short else 1)))
            fields['settings'] = {**fields.get('settings', {}), **v.settings} or None
            runs.append(Run(v.method, v.options, seed, variant=experiment.called(v.name), **fields))
    return runs


def tuning_runs(plan: Plan, epochs: int = 4, **changes: Any) -> list[Run]:
    """Plain runs, each with one setting changed."""
    runs = []
    for method, tried in plan.tuning.items():
        for name, change in tried.items():
            fields = {**plan.settings[method], **change, 'epochs': epochs, **changes}
            fields['settings'] = {**plan.settings[method]['settings'], **change.get('settings', {})}
            runs.append(Run(method, None, variant=name, **fields))
    return runs
