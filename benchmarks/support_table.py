"""Writes the table of supported architectures into a text, from benchmarks/results/sweep.json.

python -m benchmarks.support_table README.md
"""

import json
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.sweep import GROUPS, RESULTS

BEGIN, END = '<!-- support: made by benchmarks/support_table.py -->', '<!-- /support -->'


def table(result: dict[str, Any]) -> str:
    """A row for each group of architectures, with their classes in timm and how many architectures each has."""
    lines = [f'| timm {result["timm"]} | architectures | classes |', '|---|---:|---|']
    for group in ('cls+pool', 'pool', 'refused'):
        rows = [row for row in result['models'] if row['group'] == group]
        classes = Counter(row['class'] for row in rows).most_common()
        names = ', '.join(f'{name} {count}' for name, count in classes)
        lines.append(f'| {GROUPS[group]} | {len(rows)} | {names} |')
    return '\n'.join(lines)


def with_table(text: str, result: dict[str, Any]) -> str:
    """``text`` with the table between its two marks."""
    pattern = re.compile(re.escape(BEGIN) + '.*?' + re.escape(END), re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f'the text has no place for the table: {BEGIN} ... {END}')
    return pattern.sub(lambda _: f'{BEGIN}\n{table(result)}\n{END}', text)


if __name__ == '__main__':
    for path in map(Path, sys.argv[1:]):
        path.write_text(with_table(path.read_text(), json.loads(RESULTS.read_text())))
