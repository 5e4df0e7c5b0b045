"""Writes the tables of the README from benchmarks/results/.

python -m benchmarks.tables README.md
"""

import json
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.sweep import GROUPS, RESULTS


def support(result: dict[str, Any]) -> str:
    """A row for each group of architectures, with their classes in timm and how many architectures each has."""
    lines = [f'| timm {result["timm"]} | architectures | classes |', '|---|---:|---|']
    for group in ('cls+pool', 'pool', 'refused'):
        rows = [row for row in result['models'] if row['group'] == group]
        classes = Counter(row['class'] for row in rows).most_common()
        names = ', '.join(f'{name} {count}' for name, count in classes)
        lines.append(f'| {GROUPS[group]} | {len(rows)} | {names} |')
    return '\n'.join(lines)


def demo(result: dict[str, Any]) -> str:
    """A row for each row that the demo printed."""
    lines = ['| | k-NN accuracy | training |', '|---|---:|---:|']
    for name, accuracy, seconds in result['rows']:
        lines.append(f'| {name} | {accuracy:.1f}% | {f"{seconds:.0f} s" if seconds else ""} |')
    return '\n'.join(lines)


TABLES = {'support': (support, RESULTS), 'demo': (demo, RESULTS.with_name('demo.json'))}


def with_tables(text: str) -> str:
    """``text`` with each table between its two marks."""
    for name, (make, path) in TABLES.items():
        begin, end = f'<!-- {name}: made by benchmarks/tables.py -->', f'<!-- /{name} -->'
        table = make(json.loads(path.read_text()))
        pattern = re.compile(re.escape(begin) + '.*?' + re.escape(end), re.DOTALL)
        if not pattern.search(text):
            raise ValueError(f'the text has no place for the table: {begin} ... {end}')
        text = pattern.sub(f'{begin}\n{table}\n{end}', text)
    return text


if __name__ == '__main__':
    for path in map(Path, sys.argv[1:]):
        path.write_text(with_tables(path.read_text()))
