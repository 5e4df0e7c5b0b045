"""Results: a JSONL file for each data set, with a line for each run, and one each for what several runs share.

Owns the file. Knows nothing of what a line says but its name.
"""

import fcntl
import json
import os
from pathlib import Path
from typing import Any

__all__ = ['put', 'read']


def read(path: Path) -> dict[str, dict[str, Any]]:
    """Name -> line."""
    if not path.exists():
        return {}
    lines = map(json.loads, path.read_text().splitlines())
    return {line['name']: line for line in lines}


def put(path: Path, name: str, content: dict[str, Any]) -> None:
    """Writes a line, in the place of the one of the same name; several processes may do so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        lines = {**read(path), name: {'name': name, **content}}
        temporary = path.with_suffix('.tmp')
        temporary.write_text(''.join(f'{json.dumps(line)}\n' for line in lines.values()))
        temporary.replace(path)
    finally:
        os.close(folder)
