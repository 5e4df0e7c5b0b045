"""What MTE costs a training step, measured beside the plain step in one run.

    make bench                                       # everything, on the CPU: an hour and more on two cores
    python -m benchmarks.speed --device cuda --amp bf16 --compile --resume     # killed, it goes on
    python -m benchmarks.speed --only pooling

Steps of all variants are interleaved, round by round; a ratio is the median of the rounds' ratios, so that what the
machine does besides falls on all of them alike. Operations are multiply-adds; steps.py says how they are counted.
Results go to benchmarks/results/overhead-DEVICE.json, tables of them into benchmarks/README.md.

On the CPU, `make bench` sets MALLOC_TRIM_THRESHOLD_ and MALLOC_MMAP_THRESHOLD_, by which the C library keeps freed
memory, but for blocks above 32 MiB. By default it hands much of it back after each step, and each form pays for
fetching it again page by page, an amount that changes from run to run. Without the two variables results go to a file
of their own. Each form has its own loss: the plain one is the repository's, pair by pair, MTE's is the library's.
"""

import argparse
import json
import multiprocessing
import os
import re
import sys
from pathlib import Path
from typing import Any, Optional

import timm
import torch
from tqdm import tqdm

from benchmarks.speed.parts import measure_inference, measure_parts, measure_pooling
from benchmarks.speed.scaling import draw_scaling, measure_scaling
from benchmarks.speed.steps import Row, make_step
from benchmarks.speed.timing import interleaved, summary

RESULTS = Path(__file__).parents[1] / 'results'
MULTI_CROP = (224,) * 2 + (96,) * 8
VARIANTS = ('plain', 'mte', 'naive')
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
