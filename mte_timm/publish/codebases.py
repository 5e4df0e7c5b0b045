"""What a checkpoint says of the codebase that wrote it, and what that codebase trains with.

Owns the marks of each repository. Knows nothing of timm models.
"""

import json
import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Optional, Union

import torch
import yaml

from ..utils import plain_args
from .loading import CheckpointError
from .search import Place, Tensors, unwrapped_name

__all__ = ['Origin', 'Size', 'as_pair', 'check_epsilon', 'creation_of', 'num_heads', 'origin_of']

Size = tuple[int, int]
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Origin(NamedTuple):
    """What is known of a training beside its weights; None where nothing is."""

    codebase: Optional[str] = None
    mean: Optional[tuple[float, ...]] = None
    std: Optional[tuple[float, ...]] = None
    img_size: Optional[Size] = None  # H, W
    crops_are_square: bool = False
    mte: Optional[dict[str, Any]] = None  # options of mte.wrap


class Creation(NamedTuple):
    """What a file says of the call of ``timm.create_model``."""

    architecture: Optional[str]
    model_args: dict[str, Any]
    unsaid: list[str]  # names of arguments that it cannot say


def origin_of(checkpoint: Mapping[str, Any], place: Place, tensors: Tensors, path: Union[str, Path]) -> Origin:
    """What the file at ``path``, or an export's config beside it, says of the network at ``place``."""
    if said := _export_config(Path(path)):
        return said
    options = _wrap_options(checkpoint, place)
    size = _size(options.pop('img_size', None))
    options = {k: v for k, v in options.items() if k not in ('architecture', 'model_args', 'unsaid')}
    args = _command_line(checkpoint)
    codebase = _codebase(checkpoint, place, tensors)
    size = size or _size(args.get('img_size'))
    if codebase == 'timm':  # without a mean it is the architecture's
        size = size or _size((args.get('input_size') or ())[1:])
        return Origin(codebase, _numbers(args.get('mean')), _numbers(args.get('std')), size, False, options or None)
    mean, std = (IMAGENET_MEAN, IMAGENET_STD) if codebase else (None, None)
    return Origin(codebase, mean, std, size, codebase is not None, options or None)


def creation_of(
    checkpoint: Mapping[str, Any], path: Path, place: Optional[Place], architectures: Collection[Optional[str]]
) -> Creation:
    """How the network at ``place`` was made; where that is unknown, the first of these ``architectures`` in the file.

    Files of MTE, exports beside their config and files of timm's train.py tell. They may say anything, so no argument
    that makes timm read another file is among them.
    """
    said: dict[str, Any] = _config_beside(path) or (_wrap_options(checkpoint, place) if place else {})
    said = said or _first_options(checkpoint, architectures)
    if not said and _is_of_timm(checkpoint):
        line = _command_line(checkpoint)
        given = {'global_pool': line.get('gp'), 'bn_eps': line.get('bn_eps'), 'in_chans': line.get('in_chans')}
        more = line.get('model_kwargs')
        line_args = {k: v for k, v in given.items() if v is not None} | dict(more if isinstance(more, Mapping) else {})
        said = {'architecture': str(line.get('model')).partition('.')[0], 'model_args': line_args}
    args, unsaid = said.get('model_args'), said.get('unsaid')
    return Creation(
        said.get('architecture'),
        plain_args(args) if isinstance(args, Mapping) else {},
        [str(name) for name in unsaid] if isinstance(unsaid, (list, tuple)) else [],
    )


def _command_line(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that a script saved, as timm's and DINO's do."""
    args = checkpoint.get('args')
    return dict(args if isinstance(args, Mapping) else getattr(args, '__dict__', {}))


def _is_of_timm(checkpoint: Mapping[str, Any]) -> bool:
    return {'arch', 'state_dict'} <= checkpoint.keys() and hasattr(checkpoint.get('args'), 'crop_pct')


def _first_options(entry: Any, architectures: Collection[Any], above: tuple[int, ...] = ()) -> dict[str, Any]:
    """What a checkpoint remembers of the first wrapped model in it that is of these architectures."""
    if not isinstance(entry, Mapping) or id(entry) in above:  # pickles may hold themselves
        return {}
    metadata = getattr(entry, '_metadata', None)
    for said in metadata.values() if isinstance(metadata, Mapping) else ():
        options = said.get('mte') if isinstance(said, Mapping) else None
        if isinstance(options, dict) and options.get('architecture') in architectures:
            return options
    inner = (_first_options(value, architectures, (*above, id(entry))) for value in entry.values())
    return next(filter(None, inner), {})


def _codebase(checkpoint: Mapping[str, Any], place: Place, tensors: Tensors) -> Optional[str]:
    """Name of the repository whose marks the file has."""
    keys, prefix = {k for k in checkpoint if isinstance(k, str)}, place.prefix.partition('.')[0]
    if {'student', 'teacher'} <= keys and keys & {'ibot_loss', 'dino_loss'}:
        return 'iBOT' if 'ibot_loss' in keys else 'DINO'
    if any('dino_head.' in name for name in tensors):
        return 'DINOv3' if _is_dinov3(tensors) else 'DINOv2'
    if {'arch', 'state_dict', 'optimizer'} <= keys:
        if prefix in ('base_encoder', 'momentum_encoder'):
            return 'MoCo v3'
        if prefix in ('encoder_q', 'encoder_k'):
            return 'MoCo'
    if {'model', 'config'} <= keys and prefix in ('encoder', 'encoder_k'):
        return 'MoBY'
    if any(name.startswith('decoder_pred.') for name in tensors):
        return 'MAE'
    return 'timm' if _is_of_timm(checkpoint) else None


def _is_dinov3(tensors: Tensors) -> bool:
    return any('rope_embed.periods' in name or 'storage_tokens' in name for name in tensors)


def check_epsilon(tensors: Tensors, target: Any, path: Path) -> None:
    """Checks the epsilon of the layer norms of a training with DINOv3, which its config tells and no weight does.

    Raises:
        CheckpointError: ``target`` has another, or the ``config.yaml`` that the training left is in no folder above.
    """
    own = next((m.eps for m in target.modules() if isinstance(m, torch.nn.LayerNorm)), None)
    if own is None or not (_is_dinov3(tensors) and any('dino_head.' in name for name in tensors)):
        return
    told = next(filter(None, (_norm_layer(folder / 'config.yaml') for folder in path.absolute().parents[:4])), None)
    trained = {'layernorm': 1e-6, 'layernormbf16': 1e-5}.get(told or '')
    if trained is None:
        raise CheckpointError(
            'no weight tells the epsilon of the layer norms, 1e-6 or 1e-5, which moves features by 0.002 to 0.04; copy '
            'the config.yaml of the run into the folder of this file'
        )
    if trained != own:
        raise CheckpointError(
            f'trained with norm_layer: {told}, an epsilon of {trained:g} where timm has {own:g}, which no export of '
            f'timm can say; in Python, norm_layer=partial(nn.LayerNorm, eps={trained:g}) gives the model itself'
        )


def _norm_layer(config: Path) -> Optional[str]:
    """What the config of a training with DINOv3 says; None where there is none."""
    try:
        return str(yaml.safe_load(config.read_text(encoding='utf-8'))['student']['norm_layer'])
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        return None


def num_heads(checkpoint: Mapping[str, Any], place: Place, own: Tensors) -> Optional[int]:
    """Number of attention heads where the codebase has another than timm: MoCo v3's ViT-S has 12, timm's 6."""
    of_moco = place.prefix.startswith(('base_encoder.', 'momentum_encoder.'))
    named = of_moco and 'cls_token' in own and str(checkpoint.get('arch')) == 'vit_small'
    return 12 if named or _has_mocos_embedding(own) else None


def _has_mocos_embedding(own: Tensors) -> bool:
    """Whether this is a ViT-S with the fixed sine-cosine embedding of MoCo v3, in which columns vary slowest."""
    embedding = own.get('pos_embed')
    if embedding is None or embedding.ndim != 3 or embedding.shape[2] != 384:
        return False
    side = math.isqrt(embedding.shape[1] - 1)
    if side * side != embedding.shape[1] - 1:
        return False
    at = torch.arange(side, dtype=torch.float32)
    omega = 10000 ** -(torch.arange(96, dtype=torch.float32) / 96)
    column, row = (p.flatten()[:, None] * omega for p in torch.meshgrid(at, at, indexing='ij'))
    fixed = torch.cat([column.sin(), column.cos(), row.sin(), row.cos()], dim=1)
    return torch.allclose(embedding[0, 1:].float(), fixed, atol=1e-2)


def _config_beside(path: Path) -> dict[str, Any]:
    """The ``config.json`` beside the weights of an export; empty where there is none."""
    try:
        said = json.loads(path.with_name('config.json').read_text(encoding='utf-8'))
        return said if path.name == 'model.safetensors' and isinstance(said, dict) else {}
    except (OSError, ValueError):
        return {}


def _export_config(path: Path) -> Optional[Origin]:
    """What the ``config.json`` of an export says of the ``model.safetensors`` beside it."""
    try:
        config = _config_beside(path)
        cfg = config['pretrained_cfg']
        size = _size(config.get('model_args', {}).get('img_size')) or _size((cfg.get('input_size') or ())[1:])
        mean, std = _numbers(cfg.get('mean')), _numbers(cfg.get('std'))
        mte = config.get('mte')
        return Origin('its config.json', mean, std, size, False, mte if isinstance(mte, dict) else None)
    except (OSError, ValueError, KeyError, AttributeError, TypeError):  # none, or somebody else's
        return None


def _wrap_options(checkpoint: Mapping[str, Any], place: Place) -> dict[str, Any]:
    """What the model at ``place`` was wrapped with, where its state dict has kept torch's metadata."""
    entry: Any = checkpoint
    for key in filter(None, place.source.split('.')):
        entry = entry.get(key, {}) if isinstance(entry, Mapping) else {}  # {}: a key with a dot in it
    metadata = getattr(entry, '_metadata', None)
    for name, said in (metadata if isinstance(metadata, Mapping) else {}).items():
        options = said.get('mte') if isinstance(said, Mapping) else None
        prefix = f'{unwrapped_name(name)}.'.removeprefix('.')
        if isinstance(options, dict) and place.prefix in (prefix, f'{prefix}backbone.'):
            return dict(options)
    return {}


def as_pair(name: str, size: Any) -> Optional[Size]:
    """(H, W) of a size that a user has given as N, (N,) or (H, W), or a CheckpointError."""
    pair = _size(size[0] if isinstance(size, (tuple, list)) and len(size) == 1 else size)
    if pair is None and size is not None:
        raise CheckpointError(f'{name}={size!r}: must be an integer or (height, width)')
    return pair


def _size(value: Any) -> Optional[Size]:
    """(H, W) of what a file calls a size; None for what is none."""
    pair = (value, value) if isinstance(value, int) else value
    if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not all(type(n) is int and n > 0 for n in pair):
        return None
    return pair[0], pair[1]


def _numbers(value: Any) -> Optional[tuple[float, ...]]:
    if not isinstance(value, (tuple, list)) or not all(isinstance(n, (int, float)) for n in value):
        return None
    return tuple(map(float, value)) or None
