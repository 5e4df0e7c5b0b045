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
    'dinov2': 'facebookresearch/dinov2 at b8931f7bf91576930313be2c6d6af376033b35f0',
    'dinov3': 'facebookresearch/dinov3 at 6876159a11b4df116f30f667f8c9888617df0751',
    'timm-train': 'huggingface/pytorch-image-models at 8ef73809f622e0031bd7f4940265734aef8b9978',  # v1.0.28
}


def git(folder: str, *args: str, env: Optional[dict[str, str]] = None) -> str:
    done = subprocess.run(['git', '-C', folder, *args], capture_output=True, text=True, env=env)
    return done.stdout.strip() if done.returncode == 0 else done.stderr.strip()


def files_of(patch: Path) -> list[tuple[str, str, str]]:
    """The files that ``patch`` was made for, as (name, hash, hash with the patch)."""
    return re.findall(r'^diff --git a/(\S+) .*\nindex (\w+)\.\.(\w+)', patch.read_text(), re.MULTILINE)


def main(name: str, folder: str) -> None:
    patch = Path(__file__).resolve().parent / f'{name}.patch'
    if name not in COMMITS:
        sys.exit(f'{name}: no such patch; there are {", ".join(COMMITS)}')
    if not Path(folder).is_dir():
        sys.exit(f'{folder}: no such folder; clone {COMMITS[name].split()[0]} there')
    files = files_of(patch)
    names = ', '.join(file for file, *_ in files)
    if is_applied(files, folder):
        print(f'{patch.name} is already applied to {names} in {folder}')
        return
    different = [file for file, blob, _ in files if git(folder, 'hash-object', file) != blob]
    if different:
        sys.exit(
            f'{", ".join(different)} in {folder} differ from {COMMITS[name]}, for which {patch.name} was made. Check '
            'out that commit, or add the lines of the patch by hand where it has them. Nothing was changed.'
        )
    # inside another repository git would skip the files without a word, so it must not see that one
    environment = {**os.environ, 'GIT_CEILING_DIRECTORIES': str(Path(folder).resolve().parent)}
    problem = git(folder, 'apply', '--unidiff-zero', str(patch), env=environment)
    if problem or not is_applied(files, folder):
        sys.exit(problem or f'git apply left files in {folder} unchanged; is it part of another repository?')
    lines = len(re.findall(r'^\+(?!\+\+ )', patch.read_text(), re.MULTILINE))
    print(f'{patch.name}: added {lines} lines to {names} in {folder}')


def is_applied(files: list[tuple[str, str, str]], folder: str) -> bool:
    return all(git(folder, 'hash-object', file) == blob for file, _, blob in files)


if __name__ == '__main__':
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
