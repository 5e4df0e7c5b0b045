"""Cost against numbers of tokens, image size and depth."""

import argparse
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.speed.steps import Row, make_step
from benchmarks.speed.timing import interleaved, summary

__all__ = ['draw_scaling', 'measure_scaling']


def measure_scaling(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Cost against numbers of tokens, image size and depth, of a small model."""
    base = Row('ViT-Ti/16', 'dino', 16, (224, 224), 1024)
    changes: list[tuple[str, float, dict[str, Any]]] = []
    changes += [('n_cls', n, {'n_cls': n}) for n in (0, 4, 16, 64)]
    changes += [('n_pool', n, {'n_pool': n}) for n in (0, 6, 16, 64)]
    changes += [('image size', s, {'views': (s, s), 'model_kwargs': (('img_size', s),)}) for s in (224, 288, 384, 512)]
    changes += [('depth', d, {'model_kwargs': (('depth', d),)}) for d in (3, 6, 12, 24)]
    rows = []
    for axis, value, change in tqdm(changes, desc='scaling', leave=False):
        row = base._replace(**change)
        steps = {v: make_step(row, v, args.device, args.compile, args.dtype) for v in ('plain', 'mte')}
        operations = {v: step.operations() for v, step in steps.items()}
        seconds = interleaved(steps, args.rounds, args.device)
        ratio = operations['mte'] / operations['plain']
        rows.append(
            {'axis': axis, 'value': value, 'operations_ratio': ratio, **summary(seconds['mte'], seconds['plain'])}
        )
    return rows


def draw_scaling(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib.pyplot as plt

    axes_of = {axis: [r for r in rows if r['axis'] == axis] for axis in dict.fromkeys(r['axis'] for r in rows)}
    fig, axes = plt.subplots(1, len(axes_of), figsize=(3.2 * len(axes_of), 2.8), sharey=True, layout='constrained')
    for ax, (name, points) in zip(axes, axes_of.items()):
        x = [p['value'] for p in points]
        spread = [[p['ratio'] - p['low'] for p in points], [p['high'] - p['ratio'] for p in points]]
        ax.errorbar(x, [p['ratio'] for p in points], spread, marker='o', capsize=3, label='time, with quartiles')
        ax.plot(x, [p['operations_ratio'] for p in points], '--s', color='0.4', label='operations')
        ax.axhline(1, color='0.8', linewidth=1, zorder=0)
        ax.set_xlabel({'image size': 'image size (pixels)'}.get(name, name))
        ax.set_xticks(x)
    axes[0].set_ylabel('step with MTE / plain step')
    axes[0].legend(frameon=False, fontsize=8)
    fig.savefig(path, dpi=130)
    plt.close(fig)
