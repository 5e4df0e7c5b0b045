"""The plain timm model out of a wrapped one, in memory or in a folder.

Owns what an export says of itself, the check that timm rebuilds it, and how it takes its place. Knows nothing of
training.
"""

import contextlib
import copy
import dataclasses
import json
import math
import os
import shutil
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional, Union

import safetensors.torch
import timm.utils
import torch
from torch import nn

from ..auxiliary import MTEConfig
from ..model import MTE
from ..utils import evaluating, input_size
from .checkpoints import StripReport
from .codebases import as_pair
from .loading import in_short

__all__ = ['check_export', 'plain_model', 'save_pretrained', 'strip', 'unwrapped']

# fields of timm's pretrained_cfg that tell of the weights which training started from
_OF_OTHER_WEIGHTS = {
    *('url', 'file', 'hf_hub_id', 'hf_hub_filename', 'tag', 'source', 'license', 'origin_url', 'notes', 'paper_name'),
    *('paper_ids', 'num_samples', 'label_offset', 'test_input_size', 'test_crop_pct'),
}


def strip(model: nn.Module) -> nn.Module:
    """The plain timm model that was wrapped: the very object, with its trained weights.

    >>> import timm, mte_timm as mte
    >>> plain = timm.create_model('test_vit')
    >>> mte.strip(mte.wrap(plain)) is plain
    True

    It is also found inside DistributedDataParallel, torch.compile or timm's ModelEma. A teacher's is frozen, as the
    teacher is.

    Raises:
        TypeError: ``model`` was not wrapped.
    """
    inner = unwrapped(model)
    if not isinstance(inner, MTE):
        raise TypeError(f'model: a {type(model).__name__} holds no wrapped model; pass what mte.wrap returned')
    return inner.backbone


def save_pretrained(
    model: Union[nn.Module, StripReport],
    directory: Union[str, Path],
    *,
    img_size: Union[int, tuple[int, int], None] = None,
    mean: Optional[Sequence[float]] = None,
    std: Optional[Sequence[float]] = None,
    model_args: Optional[dict[str, Any]] = None,
) -> Path:
    """Writes the plain model so that ``timm.create_model('local-dir:DIRECTORY', pretrained=True)`` loads it.

    >>> import tempfile, timm, mte_timm as mte
    >>> model = mte.wrap('test_vit', num_classes=0)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     plain = timm.create_model(f'local-dir:{mte.save_pretrained(model, folder)}', pretrained=True)

    ``model.safetensors`` and ``config.json`` are written under another name and checked: timm must rebuild the same
    weights and the same features from them. Only then do they take their place. A save that fails leaves what was
    there; a process that is killed leaves the former export or the new one, or, in the instant in which the export of
    one model replaces that of another, no ``config.json``, without which timm loads nothing.

    If the export of a wrapped model fails, its trained weights are saved beside ``directory``, or with the system's
    temporary files if that is impossible, and a warning says where.

    Args:
        model: A wrapped model, a plain timm model, or what :func:`strip_checkpoint` returned.
        directory: Folder, made if need be. An export that is there already is replaced.
        img_size: N or (H, W) that users should feed, for models that take any; by default what it was made for.
        mean: Mean of the images' channels that training normalized with, where it is not the architecture's.
        std: Their standard deviation.
        model_args: Arguments of ``timm.create_model`` that it was made with; timm 1.0.31 and newer remember them.

    Raises:
        TypeError: ``model`` is no model of timm's factory.
        ValueError: timm would not rebuild it, it holds NaN or shards of weights (FSDP), or an argument is wrong.
        OSError: the folder can't be written.
    """
    trained: Any = model
    options: Optional[dict[str, Any]] = None
    if isinstance(model, StripReport):
        mean = model.mean if mean is None else mean
        std = model.std if std is None else std
        img_size = model.img_size if img_size is None else img_size
        model_args = model.model_args if model_args is None else model_args
        trained = model.model
        with contextlib.suppress(ValueError):  # a file may say anything
            options = model.mte and dataclasses.asdict(MTEConfig.known(model.mte))
    trained = unwrapped(trained)
    if isinstance(trained, MTE):
        options = dataclasses.asdict(trained.config)
    _refuse_shards(trained)
    try:
        directory, plain = Path(directory), plain_model(trained)
        facts = _facts(plain, img_size, mean, std)
        if bad := _not_finite(plain.state_dict()):
            raise ValueError(f'model: {bad} hold NaN or infinity: training has diverged; export an earlier checkpoint')
        place = next(p for p in (directory, *directory.parents) if p.exists())
        if not place.is_dir():
            raise NotADirectoryError(f'directory={str(directory)!r}: {place} is a file; name a folder')
        with tempfile.TemporaryDirectory(prefix='.mte-timm-', dir=place) as made:
            _write(plain, Path(made), facts, options, model_args)
            _check_rebuild(Path(made), plain, facts['input_size'])
            directory.mkdir(parents=True, exist_ok=True)
            _put(Path(made), directory)
    except Exception:
        if isinstance(trained, MTE):
            beside = directory if isinstance(directory, Path) else Path(tempfile.gettempdir(), 'weights')
            warnings.warn(_keep(trained, beside), stacklevel=2)
        raise
    return directory


def _refuse_shards(model: Any) -> None:
    """Each process of FSDP has only its part of a model, and all must take part in gathering it."""
    parameters = model.parameters() if isinstance(model, nn.Module) else ()
    if any(hasattr(parameter, 'full_tensor') for parameter in parameters):
        raise ValueError(
            'model: its weights are sharded over processes (FSDP). In all of them call get_model_state_dict(model, '
            'options=StateDictOptions(full_state_dict=True, cpu_offload=True)) of '
            'torch.distributed.checkpoint.state_dict; in the first torch.save what it returns, for mte-timm strip'
        )


def unwrapped(model: Any) -> Any:
    """The model inside DistributedDataParallel, torch.compile's module, timm's ModelEma."""
    return timm.utils.unwrap_model(model)  # type: ignore[no-untyped-call]


def plain_model(model: Any) -> Any:
    """The plain timm model in ``model``, wrapped or not."""
    inner = unwrapped(model)
    plain = inner.backbone if isinstance(inner, MTE) else inner
    if not isinstance(plain, nn.Module) or 'architecture' not in (getattr(plain, 'pretrained_cfg', None) or {}):
        what = f'a {type(plain).__name__} was not made by timm.create_model, so timm cannot make it again'
        raise TypeError(f'model: {what}; pass what mte.wrap returned, or a model of timm.create_model')
    return plain


def _facts(model: Any, img_size: Any, mean: Any, std: Any) -> dict[str, Any]:
    """What pretrained_cfg must say to be true of this model, checked."""
    channels, *size = input_size(model)
    size = list(as_pair('img_size', img_size) or size)
    facts: dict[str, Any] = {'input_size': [channels, *size], 'num_classes': model.num_classes, 'custom_load': False}
    for name, values, lowest in (('mean', mean, -math.inf), ('std', std, 0)):
        if values is None:
            continue
        with contextlib.suppress(TypeError, ValueError):
            facts[name] = [float(v) for v in values]
        if len(facts.get(name, [])) != channels or not all(lowest < v < math.inf for v in facts[name]):
            above = ' above 0' * (name == 'std')
            raise ValueError(f'{name}={values!r}: must be one number{above} for each of the {channels} channels')
    return facts


def _not_finite(state: dict[str, torch.Tensor]) -> str:
    return ', '.join([k for k, v in state.items() if v.is_floating_point() and not v.isfinite().all()][:3])


def _write(model: Any, folder: Path, facts: dict[str, Any], options: Optional[dict[str, Any]], model_args: Any) -> None:
    """Writes both files by timm, and makes the config true of the weights and of how they were trained."""
    saved = copy.copy(model)
    state = _weights(model)
    saved.state_dict = lambda: state
    try:
        timm.models.save_for_hf(saved, str(folder), model_args=model_args, safe_serialization=True)
    except safetensors.SafetensorError as e:
        raise OSError(f'the weights could not be written to {folder} ({e})') from e
    path, weights = folder / 'config.json', folder / 'model.safetensors'
    config = json.loads(path.read_text(encoding='utf-8'))
    cfg = {k: v for k, v in config['pretrained_cfg'].items() if k not in _OF_OTHER_WEIGHTS}
    if cfg.get('input_size') != facts['input_size']:
        cfg.pop('pool_size', None)
    for name in ('mean', 'std'):
        values, channels = cfg.get(name), facts['input_size'][0]
        if values and len(values) != channels:
            cfg[name] = [sum(values) / len(values)] * channels
    if options is not None:
        cfg['tag'] = 'mte'
        config['mte'] = options
    config['pretrained_cfg'] = cfg | facts
    config.get('model_args', {}).pop('num_classes', None)  # transformers takes it once only
    config['num_classes'] = facts['num_classes']
    path.write_text(json.dumps(config, indent=2), encoding='utf-8')
    shutil.copymode(path, weights)  # safetensors lets nobody else read it
    for each in (path, weights):
        with each.open('rb') as file:
            os.fsync(file.fileno())


def _weights(model: Any) -> dict[str, torch.Tensor]:
    """Weights as safetensors takes them: contiguous, none in two places, and without torch.compile's names."""
    state: dict[str, torch.Tensor] = {}
    places: set[int] = set()
    for name, value in model.state_dict().items():
        value = value.contiguous()
        state[name.replace('_orig_mod.', '')] = value.clone() if value.data_ptr() in places else value
        places.add(value.data_ptr())
    return state


def _rebuilt(folder: Path) -> Any:
    """The model that timm makes of an export, without a change to the script's random numbers."""
    with torch.random.fork_rng(devices=[]):
        model = timm.create_model(f'local-dir:{folder}')
    model.load_state_dict(safetensors.torch.load_file(folder / 'model.safetensors'))
    return model


def _check_rebuild(folder: Path, model: Any, size: Sequence[int]) -> None:
    """Asks timm to rebuild the model: the same weights, the same features of images of ``size`` (C, H, W)."""
    advice = 'pass model_args=, the arguments that it was created with, e.g. model_args=dict(img_size=96, in_chans=1)'
    try:
        rebuilt = _rebuilt(folder)
    except Exception as e:
        raise ValueError(f'model: timm cannot rebuild it ({in_short(e)}); {advice}') from e
    like = next(model.parameters())
    rebuilt.to(like.device, like.dtype).eval()
    try:
        same = _same(model, rebuilt, size)
    except AssertionError as e:
        raise ValueError(f'img_size={tuple(size[1:])}: the model does not take such images ({in_short(e)})') from e
    if not same and like.device.type != 'cpu':  # kernels there may round more, as those of TF32 do
        same = _same(copy.deepcopy(model).cpu(), rebuilt.cpu(), size)
    if not same:
        raise ValueError(f'model: timm would rebuild it with the same weights but other features; {advice}')


@torch.no_grad()
def _same(model: Any, rebuilt: Any, size: Sequence[int]) -> bool:
    """Whether both have the same features of an image of ``size``."""
    like = next(model.parameters())
    x = torch.linspace(-1, 1, math.prod(size)).view(1, *size).to(like.device, like.dtype)
    tolerance = 1e-5 if like.dtype in (torch.float32, torch.float64) else 1e-2  # of the largest feature
    with evaluating(model):
        expected = model(x)
    return torch.allclose(expected, rebuilt(x), rtol=0, atol=tolerance * expected.abs().max().item())


def _put(made: Path, directory: Path) -> None:
    """Moves an export to its place; what an error interrupts is undone.

    Weights are never beside the config of another model, and those of the same model are replaced in one step.
    """
    weights, config = 'model.safetensors', 'config.json'
    if (directory / config).exists() and (directory / config).read_bytes() == (made / config).read_bytes():
        os.replace(made / weights, directory / weights)
        return
    former = made / 'former'
    former.mkdir()
    out, into = (directory, former), (made, directory)
    with contextlib.ExitStack() as undo:
        for name, (source, target) in ((config, out), (weights, out), (weights, into), (config, into)):
            if (source / name).exists():
                os.replace(source / name, target / name)
                undo.callback(os.replace, target / name, source / name)
        undo.pop_all()


def _keep(model: MTE, directory: Path) -> str:
    """Saves the weights of a training whose export failed, and says where."""
    for place in (directory.parent, Path(tempfile.gettempdir())):
        with contextlib.suppress(OSError, RuntimeError):  # RuntimeError is torch's for a full disk
            descriptor, path = tempfile.mkstemp('.pth', f'{directory.name}-', place)
            try:
                with open(descriptor, 'wb') as file:
                    torch.save(model.state_dict(), file)
                return f'nothing was exported; the trained weights are in {path}, its state_dict()'
            except BaseException:
                os.unlink(path)
                raise
    return (
        'nothing was exported, and the trained weights could not be saved: torch.save(model.state_dict(), ...) yourself'
    )


def check_export(folder: Path) -> None:
    """Asks timm to load the export in ``folder``.

    Raises:
        ValueError: it has no such files, timm can't load them, or the weights hold NaN.
    """
    try:
        bad = _not_finite(_rebuilt(folder).state_dict())
    except Exception as e:
        raise ValueError(
            f'model={str(folder)!r}: timm cannot load it ({in_short(e)}); is it a folder of save_pretrained?'
        ) from e
    if bad:
        raise ValueError(f'model={str(folder)!r}: {bad} hold NaN or infinity; export another checkpoint')
