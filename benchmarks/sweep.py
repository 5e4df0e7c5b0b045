"""Wraps every architecture of timm, runs a forward, strips, and writes what is supported.

    python -m benchmarks.sweep            # all, a quarter of an hour on two cores; `make sweep`
    python -m benchmarks.sweep 'swin*'    # some

Models are made on the meta device, so sizes cost nothing; what has no meta kernel runs on the CPU. Results
go to benchmarks/results/sweep.json: a row an architecture with its group, and for a refused one the reason.
"""

import argparse
import json
import multiprocessing
import os
from collections import Counter
from pathlib import Path

import timm
import torch
from tqdm import tqdm

import mte_timm as mte
from mte_timm.backbones import input_size

RESULTS = Path(__file__).parent / 'results' / 'sweep.json'
GROUPS = {
    'cls+pool': 'auxiliary CLS tokens and pooled tokens',
    'pool': 'pooled tokens (`n_cls=0`)',
    'refused': 'refused',
    'failed': 'failed',
}


def try_model(name: str, device: str) -> dict[str, str]:
    """One architecture on ``device``: its group, and class or reason."""
    with torch.device(device):
        model = timm.create_model(name).eval()
    row = {'name': name, 'class': type(model).__name__, 'device': device}
    try:
        try:
            wrapped = mte.wrap(model)
            group = 'cls+pool'
        except ValueError as e:
            if 'n_cls=0' not in str(e):
                raise
            wrapped = mte.wrap(model, n_cls=0)
            group = 'pool'
    except (ValueError, TypeError) as e:
        return {**row, 'group': 'refused', 'reason': str(e)}
    c, h, w = input_size(model)
    with torch.no_grad():
        x = torch.zeros(2, c, h, w, device=device)
        out = wrapped(x)
        plain = model(x)
    assert out.output.shape == out.aux.shape == plain.shape, (out.output.shape, out.aux.shape, plain.shape)
    assert out.tokens.pooled.shape == (2, 6, wrapped.family.dim)
    assert out.tokens.aux_cls.shape[1] == (4 if group == 'cls+pool' else 0)
    assert out.tokens.grid[0] * out.tokens.grid[1] == out.tokens.patches.shape[1]
    if device == 'cpu':
        torch.testing.assert_close(out.output, plain, rtol=0, atol=0)
    assert mte.strip(wrapped) is model
    layout = getattr(wrapped.family, 'layout', 'tokens')
    return {**row, 'group': group, 'layout': layout, 'grid': 'x'.join(map(str, out.tokens.grid))}


def sweep_one(name: str) -> dict[str, str]:
    torch.set_num_threads(1)
    errors = []
    for device in ('meta', 'cpu'):  # the second for what has no meta kernel
        try:
            row = try_model(name, device)
            if device == 'cpu' or 'meta' not in row.get('reason', '').lower():
                return row
        except Exception as e:
            errors.append(f'{device}: {type(e).__name__}: {str(e)[:300]}')
    return {'name': name, 'group': 'failed', 'reason': '; '.join(errors)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('pattern', nargs='?', default='', help='of names, as in timm.list_models; default all')
    parser.add_argument('--workers', type=int, default=os.cpu_count())
    parser.add_argument('-o', '--output', type=Path, help=f'default {RESULTS.name} for all, nothing for some')
    args = parser.parse_args()
    names = timm.list_models(args.pattern)
    with multiprocessing.get_context('spawn').Pool(args.workers, maxtasksperchild=100) as pool:
        rows = list(tqdm(pool.imap(sweep_one, names), total=len(names)))
    counts = Counter(row['group'] for row in rows)
    for group, text in GROUPS.items():
        print(f'{counts[group]:5d} {text}')
    for row in rows:
        if row['group'] in ('refused', 'failed'):
            print(f'{row["name"]}: {row["group"]}: {row["reason"]}')
    output = args.output or (RESULTS if not args.pattern else None)
    if output:
        result = {
            'timm': timm.__version__,
            'torch': torch.__version__.split('+')[0],
            'counts': {g: counts[g] for g in GROUPS},
            'models': sorted(rows, key=lambda r: r['name']),
        }
        output.parent.mkdir(parents=True, exist_ok=True)
        written = output.with_suffix('.tmp')
        written.write_text(json.dumps(result, indent=1))
        os.replace(written, output)
    raise SystemExit(1 if counts['failed'] else 0)


if __name__ == '__main__':
    main()
