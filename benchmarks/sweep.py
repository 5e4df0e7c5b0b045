"""Wraps every architecture of timm, runs a forward, strips, and writes what is supported.

    python -m benchmarks.sweep            # all, a quarter of an hour on two cores; `make sweep`
    python -m benchmarks.sweep 'swin*'    # some

Models are made on the meta device, so sizes cost nothing; what has no meta kernel runs on the CPU. Then the
smallest of each class takes a training step on the CPU beside the plain model, whose output and batch statistics
must be the same to the bit. Results go to benchmarks/results/sweep.csv: a row an architecture with its group, and for
a refused one the reason.
"""

import argparse
import copy
import csv
import multiprocessing
import os
from collections import Counter
from pathlib import Path
from typing import Any

import timm
import torch
from tqdm import tqdm

import mte_timm as mte
from mte_timm.utils import input_size

RESULTS = Path(__file__).parent / 'results' / 'sweep.csv'
FIELDS = ('name', 'class', 'group', 'layout', 'grid', 'params_m', 'device', 'checked', 'reason', 'timm', 'torch')
GROUPS = {
    'cls+pool': 'auxiliary CLS tokens and pooled tokens',
    'pool': 'pooled tokens (`n_cls=0`)',
    'refused': 'refused',
    'failed': 'failed',
}


def try_model(name: str, device: str) -> dict[str, Any]:
    """One architecture on ``device``: its group, and class or reason. Shapes are all that is looked at."""
    with torch.device(device):
        model = timm.create_model(name).eval()
    params = round(sum(p.numel() for p in model.parameters()) / 1e6, 2)
    row = {'name': name, 'class': type(model).__name__, 'device': device, 'params_m': params}
    try:
        wrapped, group = wrap_as_can_be(model)
    except (ValueError, TypeError) as e:
        return {**row, 'group': 'refused', 'reason': str(e)}
    with torch.no_grad():
        x = torch.zeros(2, *input_size(model), device=device)
        out = wrapped(x)
        plain = model(x)
    assert out.output.shape == out.aux.shape == plain.shape, (out.output.shape, out.aux.shape, plain.shape)
    assert out.tokens.pooled.shape == (2, 6, wrapped.adapter.dim)
    assert out.tokens.aux_cls.shape[1] == (4 if group == 'cls+pool' else 0)
    assert out.tokens.grid[0] * out.tokens.grid[1] == out.tokens.patches.shape[1]
    assert mte.strip(wrapped) is model
    layout = getattr(wrapped.adapter, 'layout', 'tokens')
    return {**row, 'group': group, 'layout': layout, 'grid': 'x'.join(map(str, out.tokens.grid))}


def wrap_as_can_be(model: torch.nn.Module) -> tuple[mte.MTE, str]:
    """The model with all kinds of tokens that it can have, and the name of that group."""
    try:
        return mte.wrap(model), 'cls+pool'
    except ValueError as e:
        if 'n_cls=0' not in str(e):
            raise
        return mte.wrap(model, n_cls=0), 'pool'


def check_one(name: str) -> str:
    """A training step of one architecture on the CPU beside the plain model's: 'same as plain', or what differs."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5).train()
    x = torch.randn(2, *input_size(model))
    before = copy.deepcopy(model.state_dict())
    torch.manual_seed(1)
    plain = model(x)
    after = copy.deepcopy(model.state_dict())
    model.load_state_dict(before)
    wrapped = wrap_as_can_be(model)[0].train()
    if not all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values())):
        return 'wrapping changed the weights'
    torch.manual_seed(1)
    out = wrapped(x)
    if isinstance(plain, tuple):  # of distilled models
        plain, out = plain[0], out._replace(output=out.output[0])
    if not torch.equal(out.output, plain):
        return f'the output differs by {(out.output - plain).abs().max():.2g}'
    if not all(torch.equal(a, b) for a, b in zip(after.values(), model.state_dict().values())):
        return 'the batch statistics differ'
    (out.output.sum() + out.aux.square().sum()).backward()
    if not all(p.grad.isfinite().all() for p in wrapped.parameters() if p.grad is not None):
        return 'a gradient is not finite'
    return 'same as plain'


def sweep_one(name: str) -> dict[str, Any]:
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


def check_or_say(name: str) -> str:
    try:
        return check_one(name)
    except Exception as e:
        return f'{type(e).__name__}: {str(e)[:300]}'


def smallest_of_each_class(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    supported = [row for row in rows if row['group'] in ('cls+pool', 'pool') and float(row['params_m']) < 60]
    return list({r['class']: r for r in sorted(supported, key=lambda r: -float(r['params_m']))}.values())


def write(rows: list[dict[str, Any]], path: Path) -> None:
    versions = {'timm': timm.__version__, 'torch': torch.__version__.split('+')[0]}
    path.parent.mkdir(parents=True, exist_ok=True)
    written = path.with_suffix('.tmp')
    with written.open('w', newline='') as file:
        table = csv.DictWriter(file, FIELDS)
        table.writeheader()
        table.writerows({**row, **versions} for row in sorted(rows, key=lambda r: r['name']))
    os.replace(written, path)


def read(path: Path = RESULTS) -> list[dict[str, str]]:
    """The rows that :func:`write` wrote."""
    with path.open(newline='') as file:
        return list(csv.DictReader(file))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('pattern', nargs='?', default='', help='of names, as in timm.list_models; default all')
    parser.add_argument('--workers', type=int, default=os.cpu_count())
    parser.add_argument('-o', '--output', type=Path, help=f'default {RESULTS.name} for all, nothing for some')
    args = parser.parse_args()
    output = args.output or (RESULTS if not args.pattern else None)
    names = timm.list_models(args.pattern)
    with multiprocessing.get_context('spawn').Pool(args.workers, maxtasksperchild=100) as pool:
        rows = list(tqdm(pool.imap(sweep_one, names), total=len(names)))
        if output:
            write(rows, output)
        checked = smallest_of_each_class(rows)
        checks = pool.imap(check_or_say, [row['name'] for row in checked])
        for row, check in zip(checked, tqdm(checks, total=len(checked))):
            row['checked'] = check
    if output:
        write(rows, output)
    counts = Counter(row['group'] for row in rows)
    for group, text in GROUPS.items():
        print(f'{counts[group]:5d} {text}')
    for row in rows:
        if row['group'] in ('refused', 'failed'):
            print(f'{row["name"]}: {row["group"]}: {row["reason"]}')
    differ = [row for row in checked if row['checked'] != 'same as plain']
    print(f'{len(checked)} classes checked on the CPU, {len(differ)} differ from plain')
    for row in differ:
        print(f'{row["name"]}: {row["checked"]}')
    raise SystemExit(1 if counts['failed'] or differ else 0)


if __name__ == '__main__':
    main()
