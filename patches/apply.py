"""Applies a patch to a repository: python patches/apply.py dino FOLDER

The patches hold added lines only, so git cannot tell by their context whether they fit. This checks first that each
file is the one that the patch was made for.
"""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Optional

COMMITS = {
    'dino': 'facebookresearch/dino at 7c446df5b9f45747937fb0d72314eb9f7b66930a',
    'ibot': 'bytedance/ibot at da316d82636a7a7356835ef224b13d5f3ace0489',
    'moco-v3': 'facebookresearch/moco-v3 at c349e6e24f40d3fedb22d973f92defa4cedf37a7',
    'moby': 'SwinTransformer/Transformer-SSL at 4510de1f21ee6f9810a74494c254081dd8f2c383',
}


def git(folder: str, *args: str, env: Optional[dict[str, str]] = None) -> str:
    done = subprocess.run(['git', '-C', folder, *args], capture_output=True, text=True, env=env)
    return done.stdout.strip() if done.returncode == 0 else done.stderr.strip()


def files_of(patch: Path) -> list[tuple[str, str]]:
    """The files that ``patch`` was made for, as (name, hash)."""
    return re.findall(r'^diff --git a/(\S+) .*\nindex (\w+)\.\.', patch.read_text(), re.MULTILINE)


def differing(patch: Path, folder: str) -> list[str]:
    """Those of them that ``folder`` has otherwise."""
    return [name for name, blob in files_of(patch) if git(folder, 'hash-object', name) != blob]


def main(name: str, folder: str) -> None:
    patch = Path(__file__).resolve().parent / f'{name}.patch'
    if name not in COMMITS:
        sys.exit(f'{name}: no such patch; there are {", ".join(COMMITS)}')
    if not Path(folder).is_dir():
        sys.exit(f'{folder}: no such folder; clone {COMMITS[name].split()[0]} there')
    files = differing(patch, folder)
    if files:
        sys.exit(
            f'{", ".join(files)} in {folder} differ from {COMMITS[name]}, for which {patch.name} was made. Check out '
            'that commit, or add the lines of the patch by hand where it has them. Nothing was changed.'
        )
    # inside another repository git would skip the files without a word, so it must not see that one
    environment = {**os.environ, 'GIT_CEILING_DIRECTORIES': str(Path(folder).resolve().parent)}
    problem = git(folder, 'apply', '--unidiff-zero', str(patch), env=environment)
    if problem or len(differing(patch, folder)) != len(files_of(patch)):
        sys.exit(problem or f'git apply left files in {folder} unchanged; is it part of another repository?')


if __name__ == '__main__':
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
