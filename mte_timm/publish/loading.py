"""Reading training checkpoints without running code from them.

Owns what such files hold beside tensors. Knows nothing of models.
"""

import argparse
import pickle
import re
import tempfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Union

import safetensors.torch
import torch
from torch import nn

__all__ = ['CheckpointError', 'read_checkpoint']


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or holds no backbone of the wanted architecture."""


class _Ignored:
    """Takes the place of a non-tensor value that says nothing about the weights."""

    def __setstate__(self, state: Any) -> None:
        pass


# what codebases save beside their weights: settings, metrics, paths
_STAND_INS: dict[Callable[[], Any], tuple[str, ...]] = {
    OrderedDict: (
        *('yacs.config.CfgNode', 'collections.defaultdict', 'builtins.dict'),
        *(f'{module}.utilities.data.AttributeDict' for module in ('lightning.fabric', 'lightning_fabric')),
        'pytorch_lightning.utilities.parsing.AttributeDict',
    ),
    list: ('collections.deque', 'builtins.list'),
    _Ignored: (
        *('builtins.int', 'builtins.float', '_codecs.encode', 'numpy.dtype', 'numpy.ndarray'),
        *(f'{module}.{name}Path' for module in ('pathlib', 'pathlib._local') for name in ('Posix', 'Windows')),
        *(f'numpy.{core}.multiarray.{name}' for core in ('core', '_core') for name in ('scalar', '_reconstruct')),
    ),
}


def _stand_in(path: str, make: Callable[[], Any]) -> type:
    """A class of that name that unpickles to what ``make`` returns, without the package and its code."""
    module, name = path.rsplit('.', 1)
    return type(name, (), {'__module__': module, '__new__': lambda cls, *args: make()})


_SAFE: list[Any] = [_stand_in(path, make) for make, paths in _STAND_INS.items() for path in paths]
_SAFE += [argparse.Namespace, _Ignored]


def read_checkpoint(path: Union[str, Path], trust: bool = False) -> Mapping[str, Any]:
    """Reads a checkpoint to the CPU without running code from it, unless ``trust``.

    Raises:
        FileNotFoundError: no file at ``path``.
        CheckpointError: the file is empty, truncated, no checkpoint, or needs more than tensors and settings.
    """
    path = Path(path)
    sharded = (path / '.metadata').is_file()
    if sharded and not trust:
        raise CheckpointError(
            f'{path}: is a folder of torch.distributed.checkpoint, whose index runs code when it is read. Only if you '
            'trust whoever made it: trust=True (--trust)'
        )
    if not sharded and not path.is_file():
        raise FileNotFoundError(f'{path}: {"is a folder; name a file in it" if path.is_dir() else "no such file"}')
    if path.stat().st_size == 0:
        raise CheckpointError(f'{path}: is empty; its run was probably cut off, so take an earlier checkpoint')
    try:
        if path.suffix == '.safetensors':
            checkpoint: Any = safetensors.torch.load_file(path)
        else:
            checkpoint = _load_shards(path) if sharded else _load(path, trust)
    except Exception as e:  # a damaged file sets off all kinds
        named = re.search(r'(?:GLOBAL|class|function) ([\w.]+)', str(e))
        if isinstance(e, pickle.UnpicklingError) and (named or zipfile.is_zipfile(path)):
            what = named[1] if named else 'objects that torch does not name'
            raise CheckpointError(
                f'{path}: holds more than tensors and settings ({what}), and loading that runs code from the file. '
                'Only if you trust whoever made it: trust=True (--trust)'
            ) from e
        raise CheckpointError(f'{path}: damaged, truncated or no checkpoint ({in_short(e)})') from e
    if isinstance(checkpoint, nn.Module):  # a whole pickled model, which the caller trusts
        checkpoint = {'model': checkpoint}
    if not isinstance(checkpoint, Mapping):
        raise CheckpointError(f'{path}: holds a {type(checkpoint).__name__}, not a checkpoint or state dict')
    return checkpoint


def _load(path: Path, trust: bool) -> Any:
    if trust:
        return torch.load(path, map_location='cpu', weights_only=False)
    before = torch.serialization.get_safe_globals()  # beside our stand-ins, numpy's own would fail
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals(_SAFE)
    try:
        return torch.load(path, map_location='cpu', weights_only=True)
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


def _load_shards(folder: Path) -> Any:
    from torch.distributed.checkpoint import CheckpointException  # only here: it is slow to import
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    with tempfile.TemporaryDirectory() as made:
        try:
            dcp_to_torch_save(folder, file := Path(made, 'checkpoint.pth'))
        except CheckpointException as e:  # no Exception
            raise ValueError('its shards are not whole') from e
        return _load(file, trust=True)


def in_short(e: BaseException) -> str:
    """An error on one line, without what torch says before each of its own."""
    return f'{type(e).__name__}: {" ".join(str(e).split("WeightsUnpickler error:")[-1].split())[:300]}'
