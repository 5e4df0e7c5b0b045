"""Writes the tables of README.md, benchmarks/README.md and docs/ from benchmarks/results/.

python -m benchmarks.tables README.md benchmarks/README.md
"""

import itertools
import json
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks import sweep
from benchmarks.sweep import GROUPS, RESULTS


def support(rows: list[dict[str, str]]) -> str:
    """A row for each group of architectures."""
    lines = [f'| timm {rows[0]["timm"]} | architectures |', '|---|---:|']
    counts = Counter(row['group'] for row in rows)
    return '\n'.join([*lines, *(f'| {GROUPS[group]} | {counts[group]} |' for group in ('cls+pool', 'pool', 'refused'))])


def classes(rows: list[dict[str, str]]) -> str:
    """A row for each group of architectures, with their classes in timm and how many architectures each has."""
    lines = [f'| timm {rows[0]["timm"]} | classes |', '|---|---|']
    for group in ('cls+pool', 'pool', 'refused'):
        counts = Counter(row['class'] for row in rows if row['group'] == group).most_common()
        lines.append(f'| {GROUPS[group]} | {", ".join(f"{name} {count}" for name, count in counts)} |')
    return '\n'.join(lines)


def demo(result: dict[str, Any]) -> str:
    """A row for each row that the demo printed."""
    lines = ['| | k-NN accuracy | training |', '|---|---:|---:|']
    for name, accuracy, seconds in result['rows']:
        lines.append(f'| {name} | {accuracy:.1f}% | {f"{seconds:.0f} s" if seconds else ""} |')
    return '\n'.join(lines)


def steps(result: dict[str, Any]) -> str:
    """A row for each row of the benchmark: ratios to the plain step."""
    lines = [
        '| model, method, images | form | GMACs | ratio | time | ratio (quartiles) | time to GMACs | memory |',
        '|---|---|---:|---:|---:|---:|---:|---:|',
    ]
    for row in result['rows'].values():
        what = f'{row["model"]}, {row["method"]}, {row["batch"]} x {_views(row["views"])}'
        plain = row['variants']['plain']
        for variant, r in row['variants'].items():
            cells = [what if variant == 'plain' else '', {'mte': 'MTE'}.get(variant, variant)]
            cells += [f'{r["operations"]:.0f}', f'{r["operations_ratio"]:.3f}', f'{r["seconds"]:.2f} s']
            spread = '' if variant == 'plain' else f' ({r["low"]:.3f} to {r["high"]:.3f})'
            cells += [f'{r["ratio"]:.3f}{spread}', f'{r["ratio"] / r["operations_ratio"]:.3f}']
            cells.append(f'{r["peak_mib"] / plain["peak_mib"]:.2f}' if 'peak_mib' in r else '')
            lines.append(f'| {" | ".join(cells)} |')
    return '\n'.join(lines)


def cost(result: dict[str, Any]) -> str:
    """MTE beside plain, a line for each row of the benchmark."""
    lines = ['| step with MTE, to the plain step | GMACs | time (quartiles) |', '|---|---:|---:|']
    for row in result['rows'].values():
        r = row['variants']['mte']
        what = f'{row["model"]}, {row["method"]}, {row["batch"]} x {_views(row["views"])}'
        spread = f'{r["ratio"]:.2f} ({r["low"]:.2f} to {r["high"]:.2f})'
        lines.append(f'| {what} | {r["operations_ratio"]:.2f} | {spread} |')
    return '\n'.join(lines)


def main_costs(result: dict[str, Any]) -> str:
    """The first row of each method, and of Swin."""
    rows = {(r['method'], 'Swin' in r['model']): r for r in reversed(result['rows'].values()) if r['method'] != 'demo'}
    return cost({'rows': {str(k): rows[k] for k in reversed(rows)}})


def _views(sizes: list[int]) -> str:
    counts = Counter(sizes)
    return ' + '.join(f'{n}x{size}' for size, n in counts.items())


def parts(result: dict[str, Any]) -> str:
    """The share of the plain step that each part takes."""
    names = list(next(iter(result['parts'].values())))
    lines = [f'| share of the plain step | {" | ".join(names)} |', f'|---|{"---:|" * len(names)}']
    for what, shares in result['parts'].items():
        lines.append(f'| {what} | {" | ".join(f"{100 * shares[n]:.1f}%" for n in names)} |')
    return '\n'.join(lines)


def pooling(result: dict[str, Any]) -> str:
    """The pooling alone, in ratios."""
    lines = [
        '| width, grid, images | 6 tokens | through maps, to ours | 64 tokens to 1 token |',
        '|---|---:|---:|---:|',
    ]
    for r in result['pooling']:
        what = f'{r["dim"]}, {r["side"]}x{r["side"]}, {r["batch"]}'
        cells = [
            what,
            f'{1e3 * r["6"]["seconds"]:.0f} ms',
            f'{r["6 through maps"]["ratio"]:.1f}',
            f'{r["64 to 1"]["ratio"]:.2f}',
        ]
        lines.append(f'| {" | ".join(cells)} |')
    return '\n'.join(lines)


def inference(result: dict[str, Any]) -> str:
    """The stripped model beside the plain one."""
    lines = ['| model | features | time ratio (quartiles) |', '|---|---|---:|']
    for r in result['inference']:
        same = 'the same, to the bit' if r['same_features'] else 'DIFFERENT'
        lines.append(f'| {r["model"]} | {same} | {r["ratio"]:.3f} ({r["low"]:.3f} to {r["high"]:.3f}) |')
    return '\n'.join(lines)


def scaling(result: dict[str, Any]) -> str:
    """Cost against sizes."""
    lines = ['| | | operations ratio | time ratio (quartiles) |', '|---|---:|---:|---:|']
    for r in result['scaling']:
        spread = f'{r["ratio"]:.3f} ({r["low"]:.3f} to {r["high"]:.3f})'
        lines.append(f'| {r["axis"]} | {r["value"]} | {r["operations_ratio"]:.3f} | {spread} |')
    return '\n'.join(lines)


def consumers(result: dict[str, Any]) -> str:
    """A row for each test of a library that loads exports."""
    lines = ['| loaded by | models | outcome |', '|---|---|---|']
    found: dict[str, dict[str, str]] = {}
    for test, outcome in result['outcomes'].items():
        name, _, model = test.split('::test_')[1].partition('[')
        found.setdefault(name, {})[model.rstrip(']')] = outcome
    for name, models in found.items():
        outcomes = sorted(set(models.values()))
        lines.append(f'| {name.replace("_", " ")} | {", ".join(filter(None, models))} | {", ".join(outcomes)} |')
    versions = ', '.join(f'{name} {version}' for name, version in result['versions'].items() if version)
    return '\n'.join([*lines, '', f'With {versions}.'])


def layouts(result: dict[str, Any]) -> str:
    """A row for each kind of checkpoint that strip was tried on."""
    lines = [
        '| checkpoint | read as | largest difference of features | taken from, or why it is refused |',
        '|---|---|---:|---|',
    ]
    for name, architecture, gap, where in result['properties']:
        difference = 'refused' if gap is None else '0' if gap == 0 else f'{gap:.0e}'
        lines.append(f'| {name} | `{architecture}` | {difference} | {where} |')
    return '\n'.join(lines)


def sizes(result: dict[str, Any]) -> str:
    """Parameters that learn and the checkpoint, plain and in each form; operations as ratios."""
    forms = list(next(iter(result['rows'].values())))
    lines = [f'| | {" | ".join(forms)} |', '|---|' + '---:|' * len(forms)]
    for name, row in result['rows'].items():
        plain = row['plain']['operations']
        cells = []
        for form in forms:
            r = row[form]
            ratio = '' if form == 'plain' else f', x{r["operations"] / plain:.2f}'
            cells.append(f'{r["parameters"] / 1e6:.0f}M, {r["checkpoint"] / 1e6:,.0f} MB{ratio}')
        lines.append(f'| {name} | {" | ".join(cells)} |')
    return '\n'.join(lines)


def host_steps(result: dict[str, Any]) -> str:
    """Operations of a step of DINOv2 and DINOv3."""
    lines = ['| | plain, GMACs an image | with MTE |', '|---|---:|---:|']
    for name, r in result['steps'].items():
        lines.append(f'| {name} | {r["plain"] / 1e9:,.0f} | x{r["mte"] / r["plain"]:.3f} |')
    return '\n'.join(lines)


def versions(results: list[dict[str, Any]]) -> str:
    """A row for each environment that all tests ran in."""
    named = ('python', 'torch', 'timm')
    lines = [
        f'| {" | ".join(named)} | passed | skipped | failed | time |',
        f'|{"---|" * len(named)}---:|---:|---:|---:|',
    ]
    for r in sorted(results, key=lambda r: [int(n) for n in r['versions']['python'].split('.')]):
        cells = [r['versions'][name] for name in named]
        cells += [str(r['counts'].get(outcome, 0)) for outcome in ('passed', 'skipped', 'failed')]
        lines.append(f'| {" | ".join(cells)} | {r["seconds"] / 60:.0f} min |')
    return '\n'.join(lines)


def evidence(results: dict[str, list[dict[str, Any]]]) -> str:
    """Plain and with MTE at equal epochs and at equal time, on photographs and for some methods on 28-pixel images."""
    from benchmarks.intervals import difference
    from benchmarks.study.compare import arranged, values
    from benchmarks.study.experiment import TITLES

    lines = [
        '| images | raw pixels | method | equal | k-NN, plain to MTE | difference | linear, plain to MTE | difference '
        '| seeds |',
        '|---|---:|---|---|---:|---:|---:|---:|---:|',
    ]
    chosen = ('byol', 'ibot', 'supervised')
    for images, title, methods in (
        ('imagenette', 'Imagenette, 96 pixels', TITLES),
        ('cifar10', 'CIFAR-10, 32 pixels', TITLES),
        ('fashion-mnist-sample', 'Fashion-MNIST, 28 pixels', chosen),
    ):
        found = arranged(r for r in results.get(images, []) if 'run' in r)
        references = next((r for r in results.get(images, []) if r['name'] == 'references'), {})
        pixels = (references.get('raw pixels') or {}).get('knn')
        for method, against in itertools.product(methods, ('plain', 'plain-equal-time')):
            plain, ours = (found.get((method, variant), {}) for variant in (against, 'mte'))
            metrics = 'knn', 'top1' if method == 'supervised' else 'linear'
            gains = [difference(values(ours, metric), values(plain, metric)) for metric in metrics]
            if not all(gain and gain.seeds >= 3 for gain in gains):
                continue
            name = TITLES[method]
            if method == 'supervised':
                name += ', classifier for linear'
            elif next(iter(ours.values()))['settings'].get('predicts') is False:
                name += ', no predictor'
            cells = [title, '' if pixels is None else f'{pixels:.1f}', name, 'time' if 'time' in against else 'epochs']
            for gain in gains:
                cells += [f'{gain.reference:.1f} to {gain.ours:.1f}', str(gain)]
            lines.append(f'| {" | ".join([*cells, str(gains[0].seeds)])} |')
    return '\n'.join(lines)


OVERHEAD = RESULTS.with_name('overhead-cpu.json')
TABLES = {
    'support': (support, RESULTS),
    'classes': (classes, RESULTS),
    'demo': (demo, RESULTS.with_name('demo.json')),
    'cost': (cost, OVERHEAD),
    'main-costs': (main_costs, OVERHEAD),
    'steps': (steps, OVERHEAD),
    'parts': (parts, OVERHEAD),
    'pooling': (pooling, OVERHEAD),
    'inference': (inference, OVERHEAD),
    'scaling': (scaling, OVERHEAD),
    'consumers': (consumers, RESULTS.with_name('consumers.json')),
    'layouts': (layouts, RESULTS.with_name('layouts.json')),
    'host-steps': (host_steps, RESULTS.with_name('sizes.json')),
    'sizes': (sizes, RESULTS.with_name('sizes.json')),
    'versions': (versions, RESULTS.with_name('versions')),
    'evidence': (evidence, RESULTS.parent / 'study'),
}


def read(path: Path) -> Any:
    """The result at ``path``, or all those in a folder, the lines of JSONL files by name."""
    if path.suffix == '.csv':
        return sweep.read(path)
    if path.name == 'study':
        return {p.stem: [json.loads(line) for line in p.read_text().splitlines()] for p in path.glob('*.jsonl')}
    if path.is_dir():
        return [json.loads(p.read_text()) for p in sorted(path.glob('*.json'))]
    return json.loads(path.read_text())


def with_tables(text: str) -> str:
    """``text`` with each table between its two marks.

    Raises:
        ValueError: a mark that has no table, or no end.
    """
    for name in re.findall(r'<!-- ([\w-]+): made by benchmarks/tables.py -->', text):
        if name not in TABLES:
            raise ValueError(f'no table is named {name}; there are {", ".join(TABLES)}')
        make, path = TABLES[name]
        begin, end = f'<!-- {name}: made by benchmarks/tables.py -->', f'<!-- /{name} -->'
        pattern = re.compile(re.escape(begin) + '.*?' + re.escape(end), re.DOTALL)
        if not pattern.search(text):
            raise ValueError(f'the text has no end for the table: {begin} ... {end}')
        text = pattern.sub(f'{begin}\n{make(read(path))}\n{end}', text)
    return text


if __name__ == '__main__':
    for path in map(Path, sys.argv[1:]):
        path.write_text(with_tables(path.read_text()))
