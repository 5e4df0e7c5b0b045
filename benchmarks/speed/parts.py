"""What each part of MTE takes of a step, pooling in its two forms, and inference after strip."""

import argparse
import copy
import statistics
from collections.abc import Callable
from typing import Any

import timm
import torch

import mte_timm as mte
from benchmarks.speed.steps import MODELS, DirectPooling, Row, make_step
from benchmarks.speed.timing import interleaved, summary
from mte_timm.tokens import AdaptivePooling

__all__ = ['measure_inference', 'measure_parts', 'measure_pooling']


def measure_parts(row: Row, args: argparse.Namespace) -> dict[str, float]:
    """Share of the plain step that each part of MTE takes in the student, forward and backward, timed on its own."""
    plain, step = (make_step(row, v, args.device, False, args.dtype) for v in ('plain', 'mte'))
    model, backbone = step.student, step.student.backbone
    x = torch.cat([v for v in step.views if v.shape[-1] == row.views[0]])
    with torch.no_grad():
        tokens = model(x).tokens
    z, aux = tokens.patches, tokens.auxiliary
    both = step.student(step.views)
    both = type(both)(both.output.detach(), both.aux.detach(), both.tokens)
    targets = step.teach(step.views[:2])

    def both_ways(function: Callable[..., Any], *inputs: torch.Tensor) -> Callable[[], None]:
        def run() -> None:
            leaves = [t.detach().requires_grad_() for t in inputs]
            with torch.autocast(args.device, args.dtype, enabled=args.dtype is not None):
                out = function(*leaves)
            out.float().sum().backward()

        return run

    def observed(x: torch.Tensor) -> torch.Tensor:
        out = model.adapter(backbone, x, model.aux.tokens(len(x)))
        return out.patches.sum() + out.features.sum() + (0 if out.aux_cls is None else out.aux_cls.sum())

    runs = {
        'step': plain,
        'blocks': both_ways(backbone.forward_features, x),
        'blocks with observers': both_ways(observed, x),
        'pooling': both_ways(lambda z: model.aux.pool(z, tokens.grid), z),
        'heads': both_ways(lambda t: model.aux.project(None, tokens._replace(aux_cls=t[:, :0], pooled=t)).aux, aux),
        'loss': both_ways(lambda o, a: step.criterion(both._replace(output=o, aux=a), targets), both.output, both.aux),
        'plain loss': both_ways(lambda o: plain.criterion(o, targets.aux), both.output),
    }
    if model.aux.ten is not None:
        runs['TEN'] = both_ways(model.aux.ten, tokens.aux_cls, z)
    median = {k: statistics.median(s) for k, s in interleaved(runs, 2 * args.rounds, args.device).items()}
    shares = {
        'observers in the blocks': median['blocks with observers'] - median['blocks'] if row.n_cls != 0 else 0.0,
        'TEN': median.get('TEN', 0.0),
        'pooling': median['pooling'],
        'heads': median['heads'],
        'loss': median['loss'] - median['plain loss'],
    }
    return {name: seconds / median['step'] for name, seconds in shares.items()}


def measure_pooling(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The pooling alone, forward and backward: ours, and through the maps of weights."""
    rows = []
    for dim, side, batch in ((384, 14, 16), (96, 7, 128), (768, 7, 16)):
        forms = {}
        for name, n_pool in (('1', 1), ('6', 6), ('64', 64), ('6 through maps', 6)):
            pool: torch.nn.Module = AdaptivePooling(dim, n_pool).to(args.device)
            forms[name] = _both_ways(DirectPooling(pool) if 'maps' in name else pool, dim, side, batch, args.device)
        seconds = interleaved(forms, 2 * args.rounds, args.device)
        rows.append({
            'dim': dim, 'side': side, 'batch': batch,
            **{name: summary(s, seconds['6']) for name, s in seconds.items()},
            '64 to 1': summary(seconds['64'], seconds['1']),
        })  # fmt: skip
    return rows


def _both_ways(pool: torch.nn.Module, dim: int, side: int, batch: int, device: str) -> Callable[[], None]:
    z = torch.randn(batch, side * side, dim, device=device, requires_grad=True)

    def run() -> None:
        pool.zero_grad(set_to_none=True)
        pool(z, (side, side)).sum().backward()

    return run


def measure_inference(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The stripped model beside the plain one."""
    rows = []
    for name in ('ViT-S/16', 'Swin-T'):
        architecture, kwargs = MODELS[name]
        plain = timm.create_model(architecture, num_classes=0, **kwargs).to(args.device).eval()
        stripped = mte.strip(mte.wrap(copy.deepcopy(plain), n_cls=0 if 'Swin' in name else 4)).eval()
        x = torch.randn(8, 3, 224, 224, device=args.device)
        with torch.inference_mode():
            seconds = interleaved({'plain': lambda: plain(x), 'mte': lambda: stripped(x)}, 4 * args.rounds, args.device)  # noqa: B023
            same = torch.equal(plain(x), stripped(x))
        rows.append({'model': name, 'same_features': same, **summary(seconds['mte'], seconds['plain'])})
    return rows
