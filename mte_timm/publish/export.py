"""The plain timm model out of a wrapped one, in memory or in a folder.

Owns what an export says of itself and that timm rebuilds it. Knows nothing of training.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import shlex
import shutil
import warnings
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional, Union

import safetensors.torch
import timm
import torch
from torch import nn

from ..auxiliaries import MTEConfig
from ..backbones import evaluating, input_size
from ..model import MTE
from .checkpoints import StripReport
from .writing import digest, keep, move, staging

__all__ = ['check_export', 'plain_model', 'save_pretrained', 'strip', 'unwrapped']

# fields of timm's pretrained_cfg that tell of the weights which training started from
_OF_OTHER_WEIGHTS = (
    'url',
    'file',
    'hf_hub_id',
    'hf_hub_filename',
    'tag',
    'source',
    'license',
    'origin_url',
    'notes',
    'paper_name',
    'paper_ids',
    'num_samples',
    'label_offset',
    'test_input_size',
    'test_crop_pct',
)


def strip(model: nn.Module) -> nn.Module:
    """The plain timm model that was wrapped: the very object, with its trained weights.

    >>> import timm, mte_timm as mte
    >>> plain = timm.create_model('test_vit')
    >>> mte.strip(mte.wrap(plain)) is plain
    True

    Args:
        model: What :func:`wrap` returned; also inside DistributedDataParallel, torch.compile or timm's ModelEma.

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

    Two files, ``model.safetensors`` and ``config.json``. They are written and checked under another name, the check
    being that timm rebuilds a model from them with the same weights and the same features, and then moved into
    place; a save that fails leaves what was there before. A process that is killed leaves what was there or the new
    export. Only in a folder that was there without an export, or with one of a model that differs in more than its
    weights, it can leave, at the instant when the config changes, weights without a config, which timm refuses; the
    next save puts a former export back before it writes. Never are there weights with another model's config. Several
    processes may save to one folder: the last one's export stays.

    Where a wrapped model can't be saved, for whatever reason but sharded weights, its trained weights are kept in a
    file beside ``directory``, DIRECTORY-not-exported.pth, with a number if there is one already, or where that is
    impossible in the system's folder for temporary files; a warning says where, and ``mte-timm strip`` makes an export
    of them.

    Args:
        model: A wrapped model, a plain timm model, or what :func:`strip_checkpoint` returned.
        directory: Folder, made if need be. An export that is there already is replaced.
        img_size: Size of the images, N or (H, W), for models that take any: what their users should feed. By
            default what the model was made for.
        mean: Mean of the images' channels that training normalised with, where it is not the architecture's.
        std: Their standard deviation.
        model_args: Arguments of ``timm.create_model`` that the model was made with. timm 1.0.31 and newer
            remember them.

    Returns:
        The folder.

    Raises:
        TypeError: ``model`` is no model of timm's factory.
        ValueError: timm would not rebuild this model from what is known of it, it holds NaN or shards of weights
            (FSDP), or a bad argument.
        OSError: the folder can't be written.
    """
    if isinstance(model, StripReport):
        mean = model.mean if mean is None else mean
        std = model.std if std is None else std
        img_size = model.img_size if img_size is None else img_size
        model_args = model.model_args if model_args is None else model_args
    inner: Any = unwrapped(model.model if isinstance(model, StripReport) else model)
    _refuse_shards(inner)
    options = _options_of(model if isinstance(model, StripReport) else inner)
    try:
        if not isinstance(directory, (str, os.PathLike)):
            raise TypeError(f'directory={directory!r}: must be the path of a folder')
        return _export(inner, Path(directory), img_size, mean, std, model_args, options)
    except Exception:
        if isinstance(inner, MTE):
            where = Path(directory) if isinstance(directory, (str, os.PathLike)) else None
            _keep_weights(inner.backbone, where, img_size, mean, std, model_args, options)
        raise


def _options_of(trained: Any) -> Optional[dict[str, Any]]:
    """What a model was wrapped with; of a file only what :func:`wrap` takes."""
    if isinstance(trained, MTE):
        return dataclasses.asdict(trained.config)
    if not isinstance(trained, StripReport) or trained.mte is None:
        return None
    try:
        return dataclasses.asdict(MTEConfig.known(trained.mte))
    except ValueError:
        return None


def _refuse_shards(model: Any) -> None:
    """A process of several that share a model's weights has only its part, and to gather them all must take part."""
    parameters = model.named_parameters() if isinstance(model, nn.Module) else ()
    sharded = [name for name, parameter in parameters if hasattr(parameter, 'full_tensor')]
    if sharded:
        raise ValueError(
            f'model: its weights are sharded over processes (FSDP), e.g. {sharded[0]}. In all processes, call '
            'torch.distributed.checkpoint.state_dict.get_model_state_dict(model, options=StateDictOptions('
            'full_state_dict=True, cpu_offload=True)); in the first, torch.save what it gives, and '
            '`mte-timm strip` makes an export of that file'
        )


def _keep_weights(
    plain: Any,
    directory: Optional[Path],
    img_size: Any,
    mean: Any,
    std: Any,
    model_args: Optional[dict[str, Any]],
    options: Optional[dict[str, Any]],
) -> None:
    """Where a model can't be exported to ``directory``: the end of a training must not be lost with it."""
    state: Any = OrderedDict(_state_of(plain))
    state._metadata = {'': {'mte': options}}  # as a wrapped model's state dict remembers them
    path = keep(state, directory)
    if path is None:
        warnings.warn(
            'nothing was exported, and the trained weights could not be kept in a file either; '
            'torch.save(mte.strip(model).state_dict(), ...) to a place that can be written',
            stacklevel=3,
        )
        return
    name = (getattr(plain, 'pretrained_cfg', None) or {}).get('architecture', 'NAME')
    output = path.with_name(path.name.removesuffix('.pth')) if directory is None else directory
    words = ['mte-timm', 'strip', str(path), '--model', name, '-o', str(output)]
    words += ['--num-classes', str(getattr(plain, 'num_classes', 0) or 0)]
    made_with, refused = _remembered(plain) or dict(model_args or {}), []
    given = {'img_size': img_size, 'mean': mean, 'std': std}
    for argument, value in given.items():
        if value is not None:
            try:
                given[argument] = _facts(plain, **{**dict.fromkeys(given), argument: value}).get(argument, value)
            except Exception:
                given[argument] = None
                refused.append(argument)
    size = made_with.pop('img_size', None)
    if given['img_size'] is None:
        given['img_size'] = size
    elif (made_for := getattr(getattr(plain, 'patch_embed', None), 'img_size', None)) is not None:
        made_with['img_size'] = size or tuple(made_for)  # what it was made with, not what its users should feed
    given['in_chans'] = made_with.pop('in_chans', None)
    for argument, value in given.items():
        if value is not None:
            each = [value] if isinstance(value, (int, float)) else value
            words += [f'--{argument.replace("_", "-")}', *(str(x) for x in each)]
    others = {k: v for k, v in made_with.items() if k != 'num_classes'}
    if others:
        words += ['--model-kwargs', *(f'{k}={v if isinstance(v, str) else repr(v)}' for k, v in others.items())]
    without = f' (add {", ".join(refused)}: what was passed is left out)' if refused else ''
    warnings.warn(
        f'nothing was exported; the trained weights are kept in {path}. Once the error is mended, '
        f'`{shlex.join(words)}` makes an export of them{without}',
        stacklevel=3,
    )


def _export(
    model: nn.Module,
    directory: Path,
    img_size: Union[int, tuple[int, int], None],
    mean: Optional[Sequence[float]],
    std: Optional[Sequence[float]],
    model_args: Optional[dict[str, Any]],
    options: Optional[dict[str, Any]],
) -> Path:
    plain = plain_model(model)
    facts = _facts(plain, img_size, mean, std)
    if bad := _not_finite(plain.state_dict()):
        raise ValueError(
            f'model: {", ".join(bad[:3])} hold NaN or infinity: training has diverged; export an earlier checkpoint'
        )
    places = (directory, *directory.parents)
    if blocked := next((p for p in places if os.path.lexists(p) and not p.is_dir()), None):
        what = 'a link to nothing' if blocked.is_symlink() and not blocked.exists() else 'a file'
        raise NotADirectoryError(f'directory={str(directory)!r}: {blocked} is {what}; name a folder')
    made = [p for p in places if not p.exists()]
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with staging(directory) as made_here:
            _write(plain, made_here, model_args)
            _correct_config(made_here / 'config.json', facts, options)
            _check_rebuild(made_here, plain)
            move(made_here, directory)
    except BaseException:
        for folder in made:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise
    return directory


def check_export(folder: Path) -> None:
    """Holds timm to loading the export in ``folder``."""
    missing = [name for name in ('config.json', 'model.safetensors') if not (folder / name).is_file()]
    if missing:
        raise ValueError(f'model={str(folder)!r}: has no {missing[0]}; name the folder that save_pretrained wrote')
    try:
        config = json.loads((folder / 'config.json').read_text(encoding='utf-8'))
        sums = config.get('sha256'), config.get('sha256_of_config')
        state = safetensors.torch.load_file(folder / 'model.safetensors')
    except Exception as e:
        raise ValueError(f'model={str(folder)!r}: cannot be read ({type(e).__name__}: {e}); export it again') from e
    if sums[1] not in (None, _digest_of(config)):
        raise ValueError(
            f'model={str(folder)!r}: its config.json has changed since it was saved. Export it again; or, if you '
            "changed it and mean it, remove its 'sha256_of_config'"
        )
    if sums[0] not in (None, digest(folder / 'model.safetensors')):
        raise ValueError(
            f'model={str(folder)!r}: its weights are not those that were saved with its config; export them again'
        )
    if bad := _not_finite(state):
        raise ValueError(f'model={str(folder)!r}: {", ".join(bad[:3])} hold NaN or infinity; export another checkpoint')
    try:
        _rebuilt(folder).load_state_dict(state)
    except Exception as e:
        raise ValueError(f'model={str(folder)!r}: timm cannot load it ({type(e).__name__}: {e})') from e


def _not_finite(state: dict[str, torch.Tensor]) -> list[str]:
    return [k for k, v in state.items() if v.is_floating_point() and not v.isfinite().all()]


def _rebuilt(folder: Path) -> Any:
    """The model that timm makes of the config in ``folder``; a script's random numbers go on as if nothing had been."""
    with torch.random.fork_rng(devices=[]):
        return timm.create_model(f'local-dir:{folder}')


def _digest_of(config: dict[str, Any]) -> str:
    """SHA-256 of what a config says, however it is written down."""
    said = {k: v for k, v in config.items() if k != 'sha256_of_config'}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def unwrapped(model: Any) -> Any:
    """The model inside DistributedDataParallel, torch.compile's module, timm's ModelEma."""
    while not isinstance(model, MTE):
        inner = [getattr(model, name, None) for name in ('module', '_orig_mod', 'ema')]
        model, outer = next((m for m in inner if isinstance(m, nn.Module)), model), model
        if model is outer:
            break
    return model


def plain_model(model: Any) -> Any:
    """The plain timm model in ``model``, wrapped or not."""
    inner = unwrapped(model)
    plain = inner.backbone if isinstance(inner, MTE) else inner
    if not isinstance(plain, nn.Module) or 'architecture' not in (getattr(plain, 'pretrained_cfg', None) or {}):
        raise TypeError(
            f'model: a {type(plain).__name__} was not made by timm.create_model, which alone can make it again; '
            'pass what mte.wrap returned, or a model of timm.create_model'
        )
    return plain


def _facts(
    model: Any,
    img_size: Union[int, tuple[int, int], None],
    mean: Optional[Sequence[float]],
    std: Optional[Sequence[float]],
) -> dict[str, Any]:
    """What pretrained_cfg must say to be true of this model, checked."""
    channels, *size = input_size(model)
    if img_size is not None:
        size = [img_size, img_size] if isinstance(img_size, int) else list(img_size)
        if len(size) != 2 or not all(isinstance(n, int) and n > 0 for n in size):
            raise ValueError(f'img_size={img_size!r}: must be an integer or (height, width)')
    facts: dict[str, Any] = {'input_size': [channels, *size], 'num_classes': model.num_classes, 'custom_load': False}
    for name, values in (('mean', mean), ('std', std)):
        if values is None:
            continue
        try:
            numbers = [float(v) for v in values]
        except (TypeError, ValueError):
            numbers = []
        if len(numbers) != channels or not all(map(math.isfinite, numbers)):
            raise ValueError(f'{name}={values!r}: must be one number for each of the {channels} channels')
        if name == 'std' and min(numbers) <= 0:
            raise ValueError(f'std={values!r}: must be above 0')
        facts[name] = numbers
    return facts


def _remembered(model: Any) -> dict[str, Any]:
    """Arguments that ``model`` was made with, where timm remembers them (1.0.31 and newer)."""
    remembers = getattr(timm.models, 'get_model_args', None)
    with contextlib.suppress(Exception):  # of models that were changed since
        return dict(remembers(model)) if remembers else {}
    return {}


class _Saved:
    """A model as timm's saver sees it, with the weights of :func:`_state_of`."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return _state_of(self.model)


def _state_of(model: Any) -> dict[str, torch.Tensor]:
    """Weights, also of channels_last ones, which safetensors refuses, and of parts that torch.compile compiled."""
    return {k.replace('_orig_mod.', ''): v.contiguous() for k, v in model.state_dict().items()}


def _write(model: Any, folder: Path, model_args: Optional[dict[str, Any]]) -> None:
    saved: Any = _Saved(model)
    try:
        timm.models.save_for_hf(saved, str(folder), model_args=model_args, safe_serialization=True)
    except safetensors.SafetensorError as e:
        raise OSError(f'directory={str(folder.parent)!r}: the weights could not be written ({e})') from e
    except RuntimeError as e:
        if 'share memory' not in str(e):
            raise
        raise ValueError(
            f'model: {model.pretrained_cfg["architecture"]} has parameters that stand in two places, which timm cannot '
            'save as safetensors; torch.save(mte.strip(model).state_dict(), ...) can'
        ) from e
    shutil.copymode(folder / 'config.json', folder / 'model.safetensors')  # safetensors lets nobody else read it


def _correct_config(path: Path, facts: dict[str, Any], options: Optional[dict[str, Any]]) -> None:
    """Makes the config true of the weights in this export, and of how they were trained."""
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
    config['sha256'] = digest(path.with_name('model.safetensors'))
    config.get('model_args', {}).pop('num_classes', None)  # told above; transformers takes it once only
    config['num_classes'] = facts['num_classes']
    config['sha256_of_config'] = _digest_of(json.loads(json.dumps(config)))
    path.write_text(json.dumps(config, indent=2), encoding='utf-8')


def _check_rebuild(folder: Path, model: Any) -> None:
    """Holds timm to rebuilding the same model from ``folder``: the same weights, the same features."""
    advice = 'pass model_args=, the arguments that it was created with, e.g. model_args=dict(img_size=96)'
    try:
        rebuilt = _rebuilt(folder)
    except Exception as e:
        raise ValueError(f'model: timm cannot rebuild it from its config ({type(e).__name__}: {e}); {advice}') from e
    state = safetensors.torch.load_file(folder / 'model.safetensors')
    theirs = {k: v.shape for k, v in rebuilt.state_dict().items()}
    wrong = [k for k in {**state, **theirs} if k not in state or state[k].shape != theirs.get(k)]
    if wrong:
        ours = tuple(state[wrong[0]].shape) if wrong[0] in state else None
        raise ValueError(
            f'model: timm would rebuild it differently: {wrong[0]} is {ours} here and '
            f'{tuple(theirs.get(wrong[0], ())) or None} there; {advice}'
        )
    rebuilt.load_state_dict(state)
    like = next(model.parameters())
    rebuilt.to(like.device, like.dtype).eval()
    x = torch.linspace(-1, 1, math.prod(input_size(model))).view(1, *input_size(model)).to(like.device, like.dtype)
    with torch.no_grad(), evaluating(model):
        same = torch.allclose(model(x), rebuilt(x), rtol=1e-3, atol=1e-3)
    if not same:
        raise ValueError(f'model: timm would rebuild it with the same weights but other features; {advice}')
