"""What MTE costs a training step, measured beside the plain step in one run.

    make bench                                       # everything, on the CPU: an hour and more on two cores
    python -m benchmarks.overhead --device cuda --amp bf16 --compile --resume     # killed, it goes on
    python -m benchmarks.overhead --only pooling

Steps of all variants are interleaved, round by round; a ratio is the median of the rounds' ratios, so that what the
machine does besides falls on all of them alike. Operations are multiply-adds; benchmarks/steps.py says how they are
counted. Results go to benchmarks/results/overhead-DEVICE.json, tables of them into benchmarks/README.md.

On the CPU, `make bench` sets MALLOC_TRIM_THRESHOLD_ and MALLOC_MMAP_THRESHOLD_, by which the C library keeps freed
memory, but for blocks above 32 MiB. By default it hands much of it back after each step, and each form pays for
fetching it again page by page, an amount that changes from run to run. Without the two variables results go to a file
of their own. Each form has its own loss: the plain one is the repository's, pair by pair, MTE's is the library's.
"""

import argparse
import copy
import json
import multiprocessing
import os
import re
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Optional

import timm
import torch
from tqdm import tqdm

import mte_timm as mte
from benchmarks.steps import MODELS, DirectPooling, Row, make_step
from mte_timm.tokens import AdaptivePooling

LEAST_SECONDS = 30
RESULTS = Path(__file__).parent / 'results'
MULTI_CROP = (224,) * 2 + (96,) * 8
VARIANTS = ('plain', 'mte', 'straightforward')
PARTS = ('rows', 'memory', 'parts', 'pooling', 'inference', 'scaling')
ROWS = {
    'cpu': [
        (Row('ViT-S/16', 'ibot', 8, (224, 224), 8192), VARIANTS),
        (Row('ViT-S/16', 'dino', 8, MULTI_CROP, 65536), VARIANTS),
        (Row('ViT-S/16', 'dino', 16, MULTI_CROP, 65536), ('plain', 'mte')),
        (Row('ViT-S/16', 'moco v3', 8, (224, 224)), VARIANTS),
        (Row('ViT-S/16', 'supervised', 16, (224,)), VARIANTS),
        (Row('ViT-S/16', 'dino', 4, (224, 224), 8192), ('plain', 'mte', '11 heads', '2 nets')),
        (Row('ViT-Ti/16', 'ibot', 8, (224, 224), 8192), VARIANTS),
        (Row('ViT-B/16', 'ibot', 4, (224, 224), 8192), VARIANTS),
        (Row('DINOv3 ViT-S/16', 'dino', 4, (224, 224), 8192), VARIANTS),
        (Row('Swin-T', 'dino', 8, (224, 224), 8192, 0), VARIANTS),
        (Row('demo ViT', 'demo', 64, (28, 28)), VARIANTS),
    ],
    'cuda': [
        (Row('ViT-S/16', 'ibot', 64, (224, 224), 8192), VARIANTS),
        (Row('ViT-S/16', 'dino', 64, MULTI_CROP, 65536), VARIANTS),
        (Row('ViT-S/16', 'moco v3', 128, (224, 224)), VARIANTS),
        (Row('ViT-S/16', 'supervised', 128, (224,)), VARIANTS),
        (Row('ViT-S/16', 'dino', 64, (224, 224), 8192), ('plain', 'mte', '11 heads', '2 nets')),
        (Row('ViT-B/16', 'ibot', 64, (224, 224), 8192), VARIANTS),
        (Row('DINOv3 ViT-S/16', 'dino', 64, (224, 224), 8192), VARIANTS),
        (Row('Swin-T', 'dino', 64, (224, 224), 8192), VARIANTS),
    ],
}


def synchronise(device: str) -> None:
    if device == 'cuda':
        torch.cuda.synchronize()


def interleaved(runs: dict[str, Callable[[], Any]], rounds: int, device: str = 'cpu') -> dict[str, list[float]]:
    """Seconds of each run in each round, after one round to warm up; every other round in reverse order.

    At least ``rounds`` of them, and where a run is short so many that they take half a minute.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    i, begin = 0, time.perf_counter()
    while i <= rounds or time.perf_counter() - begin < LEAST_SECONDS:
        for name in list(runs) if i % 2 else reversed(list(runs)):
            synchronise(device)
            start = time.perf_counter()
            runs[name]()
            synchronise(device)
            if i:
                seconds[name].append(time.perf_counter() - start)
        i += 1
    return seconds


def summary(seconds: list[float], plain: list[float]) -> dict[str, float]:
    """Median and quartiles of the time, and of the ratio to the plain form in the same round."""
    ratios = [s / p for s, p in zip(seconds, plain)]
    low, _, high = statistics.quantiles(ratios, n=4)
    return {'seconds': statistics.median(seconds), 'ratio': statistics.median(ratios), 'low': low, 'high': high}


def measure_row(row: Row, variants: tuple[str, ...], args: argparse.Namespace) -> dict[str, Any]:
    steps = {v: make_step(row, v, args.device, args.compile, args.dtype) for v in variants}
    operations = {v: step.operations() for v, step in steps.items()}
    seconds = interleaved(steps, args.rounds, args.device)
    del steps
    result = {**row._asdict(), 'variants': {}}
    for variant in variants:
        result['variants'][variant] = {
            'operations': operations[variant],
            'operations_ratio': operations[variant] / operations['plain'],
            **summary(seconds[variant], seconds['plain']),
        }
    return result


def peak(row: Row, variant: str, args: argparse.Namespace) -> Optional[float]:
    """Most memory in use in two steps, in MiB: the GPU's, or of a process of its own on the CPU."""
    if args.device == 'cuda':
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        step = make_step(row, variant, args.device, args.compile, args.dtype)
        step(), step()
        return torch.cuda.max_memory_allocated() / 2**20
    context = multiprocessing.get_context('spawn')
    with context.Pool(1) as pool:
        return pool.apply(_resident, (row, variant, args.dtype, torch.get_num_threads()))


def _resident(row: Row, variant: str, dtype: Optional[torch.dtype], threads: int) -> float:
    torch.set_num_threads(threads)
    step = make_step(row, variant, 'cpu', False, dtype)
    step(), step()
    # not getrusage, whose figure a process takes over from the one that started it
    status = Path('/proc/self/status').read_text()
    return int(re.search(r'VmHWM:\s+(\d+) kB', status)[1]) / 2**10


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
        'heads': both_ways(lambda t: model.aux.fuse(None, tokens._replace(aux_cls=t[:, :0], pooled=t)).aux, aux),
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--compile', action='store_true', help='compile student and teacher')
    parser.add_argument('--amp', choices=('bf16',), help='autocast')
    parser.add_argument('--rounds', type=int, default=7)
    parser.add_argument('--threads', type=int, help='of the CPU')
    parser.add_argument('--only', nargs='+', choices=PARTS)
    parser.add_argument('--resume', action='store_true', help='keep what the results have of an earlier call')
    parser.add_argument('--row', type=int, nargs='+', help='numbers of the rows, from 0')
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    args.dtype = torch.bfloat16 if args.amp else None
    keeps_memory = {'MALLOC_TRIM_THRESHOLD_', 'MALLOC_MMAP_THRESHOLD_'} <= os.environ.keys()
    how = [args.amp, 'compiled' if args.compile else None]
    if args.device == 'cpu' and not keeps_memory:
        how.append('default-malloc')
    name = '-'.join(filter(None, ['overhead', args.device, *how]))
    path = RESULTS / f'{name}.json'
    result = json.loads(path.read_text()) if path.exists() else {}
    result['machine'] = {
        'torch': torch.__version__,
        'timm': timm.__version__,
        'device': torch.cuda.get_device_name() if args.device == 'cuda' else f'{torch.get_num_threads()} CPU threads',
        'freed memory': 'kept' if keeps_memory else 'as the C library does by default',
    }
    wanted = [p for p in args.only or PARTS if not (args.resume and p in set(result) - {'rows'})]
    chosen = [r for i, r in enumerate(ROWS[args.device]) if args.row is None or i in args.row]
    if 'rows' in wanted:
        rows = result.setdefault('rows', {})
        for row, variants in tqdm(chosen, desc='steps', file=sys.stderr):
            if args.resume and row.key in rows:
                continue
            rows[row.key] = measure_row(row, variants, args)
            times = {
                v: (round(r['ratio'], 3), round(r['operations_ratio'], 3)) for v, r in rows[row.key]['variants'].items()
            }
            tqdm.write(f'{row.key}: (time, operations) {times}')
            save(result, path)
    if 'memory' in wanted:
        for row, variants in tqdm(chosen, desc='memory', file=sys.stderr):
            of_row = result.get('rows', {}).get(row.key, {'variants': {}})['variants']
            for variant in set(variants) & set(of_row):
                if args.resume and 'peak_mib' in of_row[variant]:
                    continue
                of_row[variant]['peak_mib'] = peak(row, variant, args)
            save(result, path)
    if 'parts' in wanted:
        picked = [r for r, _ in ROWS[args.device] if r.method in ('dino', 'demo') and len(set(r.views)) == 1]
        result['parts'] = {r.model: measure_parts(r, args) for r in tqdm(picked, desc='parts', file=sys.stderr)}
        print(result['parts'])
        save(result, path)
    if 'pooling' in wanted:
        result['pooling'] = measure_pooling(args)
        print(result['pooling'])
        save(result, path)
    if 'inference' in wanted:
        result['inference'] = measure_inference(args)
        print(result['inference'])
        save(result, path)
    if 'scaling' in wanted:
        result['scaling'] = measure_scaling(args)
        draw_scaling(result['scaling'], RESULTS / f'{name.replace("overhead", "scaling")}.png')
    save(result, path)


def save(result: dict[str, Any], path: Path) -> None:
    temporary = path.with_suffix('.tmp')
    temporary.write_text(json.dumps(result, indent=1) + '\n')
    temporary.replace(path)


if __name__ == '__main__':
    main()
