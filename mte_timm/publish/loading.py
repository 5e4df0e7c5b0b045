"""Opening training checkpoints without running code from them.

Owns what such files hold beside tensors. Knows nothing of models.
"""

import argparse
import json
import pickle
import re
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Union

import safetensors.torch
import torch
from torch import nn

from .writing import digest

__all__ = ['CheckpointError', 'read_checkpoint']


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or holds no backbone of the wanted architecture."""


class _Ignored:
    """Takes the place of a value that is no tensor and tells nothing of the weights."""

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def _stand_in(path: str, make: Callable[[], Any]) -> type:
    """A class that takes the place of the one at ``path`` in a file: unpickled, it is what ``make`` makes.

    So neither the package of that class is needed nor any of its code run.
    """
    module, name = path.rsplit('.', 1)
    if make is _Ignored:
        return type(name, (_Ignored,), {'__module__': module})
    return type(name, (), {'__module__': module, '__new__': lambda cls, *args: make()})


# what codebases save beside their weights: settings, metrics, paths
_STAND_INS: dict[str, Callable[[], Any]] = {
    'yacs.config.CfgNode': OrderedDict,  # MoBY
    'lightning.fabric.utilities.data.AttributeDict': OrderedDict,
    'lightning_fabric.utilities.data.AttributeDict': OrderedDict,
    'pytorch_lightning.utilities.parsing.AttributeDict': OrderedDict,
    'collections.defaultdict': OrderedDict,
    'builtins.dict': OrderedDict,
    'collections.deque': list,
    'builtins.list': list,
    'builtins.int': _Ignored,
    'builtins.float': _Ignored,
    'pathlib.PosixPath': _Ignored,
    'pathlib.WindowsPath': _Ignored,
    'pathlib._local.PosixPath': _Ignored,
    'pathlib._local.WindowsPath': _Ignored,
    '_codecs.encode': _Ignored,  # bytes of numpy scalars
    'numpy.dtype': _Ignored,
    'numpy.ndarray': _Ignored,
    'numpy.core.multiarray.scalar': _Ignored,
    'numpy._core.multiarray.scalar': _Ignored,
    'numpy.core.multiarray._reconstruct': _Ignored,
    'numpy._core.multiarray._reconstruct': _Ignored,
}
_SAFE: list[Any] = [argparse.Namespace, *(_stand_in(path, make) for path, make in _STAND_INS.items())]


def read_checkpoint(path: Union[str, Path], trust: bool = False) -> Mapping[str, Any]:
    """Opens a checkpoint on the CPU without running code from it, unless ``trust``.

    Raises:
        FileNotFoundError: no file at ``path``.
        CheckpointError: the file is empty, truncated, no checkpoint, or needs more than tensors and settings.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f'{path}: {_what_is_there(path)}')
    if path.stat().st_size == 0:
        raise CheckpointError(f'{path}: is empty, its run was probably cut off; take an earlier checkpoint')
    checkpoint: Any
    try:
        if path.suffix == '.safetensors':
            has_sums, checkpoint = _check_digest(path), safetensors.torch.load_file(path)
        else:
            has_sums, checkpoint = _check_sums(path), _load(path, trust)
    except CheckpointError:
        raise
    except ModuleNotFoundError as e:
        raise CheckpointError(f'{path}: holds objects of the package {e.name}, which is not installed here') from e
    except pickle.UnpicklingError as e:
        needs = _unsafe_globals(path, str(e))
        if not needs:
            raise CheckpointError(f'{path}: is damaged or no PyTorch checkpoint ({first_line(e)})') from e
        raise CheckpointError(
            f'{path}: holds more than tensors and settings ({", ".join(needs[:6])}{", ..." * (len(needs) > 6)}), and '
            'loading those runs code from the file. Only if you trust whoever made it: trust=True (--trust)'
        ) from e
    except Exception as e:  # whatever a damaged file sets off in the readers
        raise CheckpointError(
            f'{path}: is damaged, truncated or no checkpoint ({type(e).__name__}: {first_line(e)}); copy it again'
        ) from e
    if isinstance(checkpoint, nn.Module):  # a whole pickled model, which the caller trusts
        checkpoint = {'model': checkpoint}
    if not isinstance(checkpoint, Mapping):
        raise CheckpointError(f'{path}: holds a {type(checkpoint).__name__}, not a checkpoint or state dict')
    if not has_sums:
        warnings.warn(
            f'{path}: has no checksums (safetensors, torch before 1.6, or set_crc32_options(False)), so damage to its '
            'weights would not be seen; look at what comes of them',
            stacklevel=3,
        )
    return checkpoint


def _what_is_there(path: Path) -> str:
    if (path / '.metadata').is_file():  # reading it runs code from it
        return (
            'is a folder of torch.distributed.checkpoint; make a file of it with '
            f'`python -m torch.distributed.checkpoint.format_utils dcp_to_torch {path} {path}.pth`'
        )
    return 'is a folder, name a file in it' if path.is_dir() else 'no such file'


def _load(path: Path, trust: bool) -> Any:
    if trust:
        return torch.load(path, map_location='cpu', weights_only=False)
    with _safe_globals():
        return torch.load(path, map_location='cpu', weights_only=True)


def _check_digest(path: Path) -> bool:
    """Holds the weights of an export to the SHA-256 in its config; whether there is one."""
    config = path.with_name('config.json')
    if path.name != 'model.safetensors' or not config.is_file():
        return False
    expected = None
    with suppress(ValueError, AttributeError):  # somebody else's config
        expected = json.loads(config.read_text(encoding='utf-8')).get('sha256')
    if expected not in (None, digest(path)):
        raise CheckpointError(f'{path}: has changed since it was exported with {config}; copy or export it again')
    return expected is not None


def _check_sums(path: Path) -> bool:
    """Holds the records of a torch.save file to their checksums, which torch doesn't look at; whether it has any."""
    if not zipfile.is_zipfile(path):  # torch before 1.6
        return False
    wrong, right = [], 0
    with zipfile.ZipFile(path) as archive:
        for record in archive.infolist():
            try:
                with archive.open(record) as file:
                    while file.read(1 << 20):
                        pass
                right += bool(record.file_size)  # nothing is right of an empty one whatever its sum
            except zipfile.BadZipFile:
                wrong.append(record.filename)
    if wrong and right:  # all are wrong where torch.serialization.set_crc32_options(False) was called
        raise CheckpointError(f'{path}: is damaged, {wrong[0]} has changed since it was written; copy it again')
    return not wrong


def first_line(e: BaseException) -> str:
    """The beginning of an error's message."""
    return (str(e).strip().splitlines() or [''])[0][:200]


def reason(e: BaseException) -> str:
    """What torch says beneath the headline of an error on loading."""
    lines = [line.strip() for line in str(e).splitlines() if line.strip()]
    return ' '.join(lines[1:2] or lines[:1])[:300]


@contextmanager
def _safe_globals() -> Iterator[None]:
    """torch.serialization.safe_globals for `_SAFE`, which torch 2.4 has not; what the user allowed stays allowed.

    But where a script allowed one of our stand-ins' originals, say numpy's scalar, ours take its place: mixed with them
    it fails.
    """
    before = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals([*(g for g in before if _name_of(g) not in _STAND_INS), *_SAFE])
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


def _name_of(allowed: Any) -> str:
    """Name of an allowed object, which newer torch lets users give themselves."""
    if isinstance(allowed, tuple):
        return str(allowed[1])
    return f'{allowed.__module__}.{getattr(allowed, "__qualname__", allowed.__name__)}'


def _unsafe_globals(path: Path, message: str) -> list[str]:
    """Names of what a file needs beyond tensors and `_SAFE`; from torch's ``message`` where it can't list them."""
    try:
        allowed = {'argparse.Namespace', *_STAND_INS}
        return sorted(set(torch.serialization.get_unsafe_globals_in_checkpoint(path)) - allowed)
    except Exception:  # torch before 2.6, files of old format or damaged ones
        named = re.findall(r'(?:GLOBAL|class|function) ([\w.]+)', message)[:1]
        return named or ['objects that torch does not name'] * zipfile.is_zipfile(path)
