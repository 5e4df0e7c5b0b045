"""Files that are written whole or not at all, whatever happens to the process or the disk.

Owns the folder in which an export is made, and how it takes its place. Knows nothing of models.
"""

import contextlib
import filecmp
import hashlib
import itertools
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Optional

import torch

__all__ = ['digest', 'keep', 'move', 'staging']


@contextlib.contextmanager
def staging(directory: Path) -> Iterator[Path]:
    """A folder to make an export in, on the filesystem of ``directory``; those of killed processes are removed.

    It is in ``directory``, or where that is not there yet beside it, so that it can become it.
    """
    fresh = not directory.exists()
    place = directory.parent if fresh else directory
    for left in place.glob('.mte-timm-*'):
        with contextlib.suppress(OSError), _locked(left, wait=False) as ours:
            if ours and time.time() - left.stat().st_mtime > 60:  # a younger one may be about to be locked
                _restore(left, place)
                shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix='.mte-timm-', dir=place) as tmp, _locked(Path(tmp)):
        made = Path(tmp)
        if fresh:
            made /= 'export'
            made.mkdir()  # with the permissions of any new folder, unlike the temporary one
        yield made


def move(source: Path, target: Path) -> None:
    """Moves an export from its :func:`staging` to ``target``, over what is there; all, or on an error nothing."""
    for path in source.iterdir():
        with path.open('rb') as file:
            os.fsync(file.fileno())
    if source.parent != target:
        try:
            os.rename(source, target)
        except OSError:
            if not target.is_dir():
                raise
            with staging(target) as inside:  # another process has made it since
                for path in source.iterdir():
                    os.rename(path, inside / path.name)
                move(inside, target)
        return
    weights, config = (target / name for name in ('model.safetensors', 'config.json'))
    new_weights, new_config = source / weights.name, source / config.name
    with _locked(target):
        previous = source / 'previous'
        previous.mkdir()
        for path in (weights, config):
            if path.exists():
                try:
                    os.link(path, previous / path.name)
                except OSError:  # a filesystem without links
                    shutil.copy2(path, previous / path.name)
        try:
            # at no time weights beside the config of another model; of the same model, it may name their digests later
            if config.exists() and _said(config) != _said(new_config):
                config.unlink()
            os.replace(new_weights, weights)
            os.replace(new_config, config)
        except BaseException:
            config.unlink(missing_ok=True)
            for path in (weights, config):
                if (previous / path.name).exists():
                    os.replace(previous / path.name, path)
                else:
                    path.unlink(missing_ok=True)
            raise


def _said(config: Path) -> Any:
    """What a config says of the model, digests apart, which change with its weights; None where it can't be read."""
    try:
        said = json.loads(config.read_text(encoding='utf-8'))
        return {k: v for k, v in said.items() if not k.startswith('sha256')}
    except (OSError, ValueError, AttributeError):
        return None


def _restore(left: Path, directory: Path) -> None:
    """Puts back the export that a process, killed while it wrote another in ``left``, has left without its config."""
    names = ('model.safetensors', 'config.json')  # weights first: a config is never beside others
    previous = [left / 'previous' / name for name in names]
    if all(path.exists() for path in previous):
        with _locked(directory):
            if not (directory / 'config.json').exists():
                for path in previous:
                    os.replace(path, directory / path.name)


def keep(state: dict[str, Any], directory: Optional[Path]) -> Optional[Path]:
    """Saves weights beside ``directory``, or else with temporary files; where, or None where nothing can be written."""
    name = f'{(directory and directory.name) or "weights"}-not-exported.pth'
    with contextlib.suppress(OSError, RuntimeError):  # RuntimeError is torch's for a full disk
        if directory is not None:
            directory.parent.mkdir(parents=True, exist_ok=True)
            return _saved(state, directory.parent / name)
    with contextlib.suppress(OSError, RuntimeError):
        made = Path(tempfile.mkdtemp(prefix='mte-timm-'))
        try:
            return _saved(state, made / name)
        except (OSError, RuntimeError):
            made.rmdir()
    return None


def _saved(state: dict[str, Any], path: Path) -> Path:
    """Saves as ``path``, or with a number where other weights are kept there already; where."""
    temporary = path.with_name(f'.{path.name}.{os.getpid()}')
    try:
        torch.save(state, temporary)
        with _locked(path.parent):
            numbered = (path.with_stem(f'{path.stem}-{n}') for n in itertools.count(2))
            names = itertools.chain([path], numbered)  # the same again takes no more room
            free = next(p for p in names if not p.exists() or filecmp.cmp(p, temporary, shallow=False))
            os.replace(temporary, free)
    finally:
        temporary.unlink(missing_ok=True)
    return free


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open('rb') as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


@contextlib.contextmanager
def _locked(folder: Path, wait: bool = True) -> Iterator[bool]:
    """Holds the lock of ``folder`` as long as the process lives; whether it was had."""
    try:
        import fcntl

        descriptor = os.open(folder, os.O_RDONLY)
    except (ImportError, OSError):  # no such locks here, or the folder is gone
        yield wait
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        ours = True
    except OSError:
        ours = wait  # a filesystem without locks
    try:
        yield ours
    finally:
        os.close(descriptor)
