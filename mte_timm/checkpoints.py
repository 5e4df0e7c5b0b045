"""The backbone in a training checkpoint of any supported codebase, as a plain timm model.

Owns what such checkpoints look like. Knows nothing of auxiliary tokens: a plain DINO checkpoint is read the
same way as one of a wrapped model.
"""

import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Optional, Union

import timm
import torch
from torch import nn

from .backbones import check_name
from .safe_load import CheckpointError, first_line, read_checkpoint, reason

__all__ = ['StripReport', 'strip_checkpoint']

WRAPPERS = ('module.', '_orig_mod.', '_forward_module.')
# words in keys and prefixes: DINO and iBOT publish the teacher and timm the EMA, MoCo and BYOL the online network
PUBLISHED, STUDENTS, COPIES = {'teacher', 'ema'}, {'student'}, {'momentum', 'target', 'key', 'k'}
# an optimizer's state may be kept under its parameters' names
OPTIMIZERS = re.compile(r'(?i)optim|^opt$|^exp_avg|momentum_buffer')
# what stands beside the parts of a backbone and takes part in its features, so that it can't be left out
TOKENS = {'cls_token', 'dist_token', 'reg_token', 'register_tokens', 'pos_embed', 'norm_pre', 'fc_norm', 'norm'}
HINTS = {  # part of a name -> argument of timm.create_model
    '.ls1.': 'init_values=1e-5',
    '.q_norm.': 'qk_norm=True',
    'reg_token': 'reg_tokens=4',
    'register_tokens': 'reg_tokens=4',
    'fc_norm': "global_pool='avg'",
}


class StripReport(NamedTuple):
    """What :func:`strip_checkpoint` found. ``str()`` gives it in words."""

    model: nn.Module
    """The plain timm model, in eval mode."""
    key: str
    """Where the backbone was: key and prefix, e.g. ``'teacher: backbone.'``."""
    loaded: int
    """Number of tensors taken."""
    dropped: tuple[str, ...]
    """Names of the tensors beside it that were not taken, and of other keys that hold weights."""
    resampled: tuple[str, ...]
    """Names of the tensors that timm brought to another size."""
    mte: Optional[dict[str, Any]] = None
    """Options of :func:`wrap` that the state dict remembers; :func:`save_pretrained` and model cards tell of them."""

    def __str__(self) -> str:
        lines = [f'took {self.loaded} tensors from {self.key}']
        if self.resampled:
            lines.append(f'resampled: {", ".join(self.resampled)}')
        if self.dropped:
            lines.append(f'dropped: {_summary(self.dropped)}')
        return '\n'.join(lines)


class _Place(NamedTuple):
    """A state dict in a checkpoint, and the prefix under which a backbone stands in it."""

    source: str  # key, with dots where it is nested; '' for the file itself
    prefix: str
    matches: int  # of the wanted tensors

    def __str__(self) -> str:
        if self.source and self.prefix:
            return f'{self.source}: {self.prefix}'
        return self.source or self.prefix or 'the top of the file'

    @property
    def rank(self) -> int:
        """Which of several networks is the one to publish."""
        words = set(re.split(r'[\W_]+', f'{self.source} {self.prefix}'.lower()))
        if words & COPIES:
            return 0
        return 3 if words & PUBLISHED else 1 if words & STUDENTS else 2


def strip_checkpoint(
    path: Union[str, Path],
    model: str,
    key: Optional[str] = None,
    *,
    trust: bool = False,
    **create_kwargs: Any,
) -> StripReport:
    """Finds the backbone in a training checkpoint and returns it as a plain timm model.

    Reads checkpoints of DINO, iBOT, MoCo v3, MoBY, lightly and Lightning, timm and MTE: state dicts under
    ``teacher``, ``student``, ``model``, ``state_dict`` or EMA keys, with prefixes such as ``module.``,
    ``backbone.``, ``base_encoder.`` and ``_orig_mod.``. Position embeddings and patch embeddings of another size are
    resampled by timm.

        report = mte.strip_checkpoint('checkpoint.pth', 'vit_small_patch16_224', key='teacher')
        mte.save_pretrained(report, 'my_vit')

    Args:
        path: A file that torch.save wrote, or safetensors.
        model: Name of the timm architecture. What no weight's shape tells, such as the number of attention
            heads, is taken from it and from ``create_kwargs``.
        key: Key of the state dict, or beginning of the parameter names, where more than one network is in the
            file: ``'teacher'``, ``'student'``, ``'momentum_encoder'``, ... By default the one that the codebase itself
            evaluates.
        trust: Load a file that needs more than tensors and plain settings. That runs code from the file.
        create_kwargs: For ``timm.create_model``: ``img_size``, ``num_classes`` to keep a classifier, ... By
            default ``num_classes=0``.

    Raises:
        FileNotFoundError: no file at ``path``.
        CheckpointError: the file is damaged, holds code, has no ``key``, or not the whole backbone; the message
            says what to do.
    """
    create_kwargs.setdefault('num_classes', 0)
    target: Any = _create(model, create_kwargs)
    wanted = target.state_dict()
    checkpoint = read_checkpoint(path, trust)
    place, tensors = _find_backbone(checkpoint, wanted, key, path, model)
    prefix = place.prefix
    _check_heads(checkpoint, prefix, target, path)
    own = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    state = _converted(own, wanted, target, model)
    _check_shapes(state, wanted, path, model, create_kwargs)
    _check_rest(state, wanted, target, path, model)
    try:
        target.load_state_dict({k: v for k, v in state.items() if k in wanted})
    except RuntimeError as e:  # tensors without data, sparse ones
        raise CheckpointError(f'{path}: {place} does not load into {model} ({reason(e)})') from e
    bad = [k for k, v in target.state_dict().items() if v.is_floating_point() and not v.isfinite().all()]
    if bad:
        raise CheckpointError(
            f'{path}: {", ".join(bad[:3])} of {place} hold NaN or infinity: this training had diverged; '
            'take an earlier checkpoint'
        )
    originals = {id(v) for v in tensors.values()}
    resampled = tuple(k for k in wanted if id(state[k]) not in originals and prefix + k in tensors)
    taken = {id(state[k]) for k in wanted} | {id(tensors[prefix + k]) for k in resampled}
    dropped = [k for k, v in tensors.items() if id(v) not in taken]
    others = [name for name, t in _state_dicts(checkpoint) if name != place.source and any(v.ndim for v in t.values())]
    options = _remembered_options(checkpoint, place)
    return StripReport(target.eval(), str(place), len(wanted), (*dropped, *others), resampled, options)


def _create(name: str, kwargs: dict[str, Any]) -> nn.Module:
    if not isinstance(name, str):
        raise CheckpointError(f'model={name!r}: must be the name of a timm architecture')
    try:
        check_name(name)
    except ValueError as e:
        raise CheckpointError(str(e)) from None
    try:
        return timm.create_model(name, **kwargs)
    except Exception as e:  # timm asserts, looks up and unpacks what it is given
        raise CheckpointError(
            f'model={name!r}: timm does not make it with {kwargs} ({type(e).__name__}: {first_line(e)})'
        ) from e


def _state_dicts(
    entry: Mapping[Any, Any], source: str = '', depth: int = 3
) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """The state dicts in a checkpoint by key, wrapper prefixes removed."""
    own = [(k, v) for k, v in entry.items() if isinstance(k, str) and isinstance(v, torch.Tensor)]
    tensors = {_unwrapped(k): v for k, v in own}
    if len(tensors) < len(own):
        twice = next(k for k, v in own if tensors[_unwrapped(k)] is not v)
        raise CheckpointError(
            f'{source or "the file"}: holds two networks, the names of one being those of the other with a wrapper '
            f'before them ({twice}, {_unwrapped(twice)}); save the one that is to be taken in a file of its own'
        )
    if tensors:
        yield source, tensors
    for key, value in entry.items():
        if isinstance(value, Mapping) and depth and isinstance(key, str) and not OPTIMIZERS.search(key):
            yield from _state_dicts(value, f'{source}.{key}' if source else key, depth - 1)


def _remembered_options(checkpoint: Any, place: _Place) -> Optional[dict[str, Any]]:
    """What the wrapped model at ``place`` was wrapped with, where its state dict has kept torch's metadata."""
    entry = checkpoint
    for key in filter(None, place.source.split('.')):
        entry = entry.get(key, {}) if isinstance(entry, Mapping) else {}  # {}: a key with a dot in it
    metadata = getattr(entry, '_metadata', None)
    for name, said in (metadata if isinstance(metadata, Mapping) else {}).items():
        prefix = _unwrapped(f'{name}.' if name else '')
        if isinstance(said, Mapping) and 'mte' in said and place.prefix in (prefix, f'{prefix}backbone.'):
            return said['mte'] if isinstance(said['mte'], dict) else None
    return None


def _unwrapped(name: str) -> str:
    for wrapper in WRAPPERS * 2:  # torch.compile around DDP or DDP around torch.compile
        name = name.removeprefix(wrapper)
    return name.replace('._orig_mod.', '.')


def _find_backbone(
    checkpoint: Mapping[str, Any],
    wanted: Mapping[str, torch.Tensor],
    key: Optional[str],
    path: Union[str, Path],
    model: str,
) -> tuple[_Place, dict[str, torch.Tensor]]:
    """The network to publish among those that have most of the ``wanted`` names."""
    found = dict(_state_dicts(checkpoint))
    if not found:
        raise CheckpointError(
            f'{path}: holds no tensors; its keys are {_summary([k for k in checkpoint if isinstance(k, str)])}'
        )
    within = ''
    if key is not None:
        chosen = {s: t for s, t in found.items() if s == key or s.startswith(f'{key}.')}
        within = '' if chosen else _unwrapped(key)
        found = chosen or {s: t for s, t in found.items() if any(k.startswith(within) for k in t)}
        if not found:
            held = _summary(_places(dict(_state_dicts(checkpoint))))
            raise CheckpointError(f'{path}: has no key {key!r} and no parameters that begin with it; it has {held}')
    places = []
    for source, tensors in found.items():
        votes = Counter(
            name[:cut] for name in tensors if name.startswith(within) for cut in _cuts(name) if name[cut:] in wanted
        )
        places += [_Place(source, prefix, count) for prefix, count in votes.items()]
    most = max((p.matches for p in places), default=0)
    if most < len(wanted) // 2:
        raise CheckpointError(
            f'{path}: only {most} of the {len(wanted)} tensors of {model} are in it. Is it another architecture? '
            f'It holds {_summary(_places(found))}'
        )
    whole = [p for p in places if p.matches > 0.9 * most]
    highest = max(p.rank for p in whole)
    partial = [p for p in places if p.matches > 0.5 * most and p.rank > highest]
    if partial:
        raise CheckpointError(
            f'{path}: {partial[0]}, which is the network to publish, has only {partial[0].matches} of the '
            f'{len(wanted)} tensors of {model}; to take {whole[0]} instead, name it with key='
        )
    best = [p for p in whole if p.rank == highest]
    if len(best) > 1:
        names = [p.source or p.prefix.rstrip('.') for p in best]
        raise CheckpointError(f'{path}: holds several such networks; choose one with key=: {", ".join(names)}')
    return best[0], found[best[0].source]


def _cuts(name: str) -> list[int]:
    """Where a parameter's name may begin: at 0 and behind each dot."""
    return [0, *(i + 1 for i, c in enumerate(name) if c == '.')]


def _converted(
    state: dict[str, torch.Tensor], wanted: Mapping[str, torch.Tensor], target: nn.Module, model: str
) -> dict[str, torch.Tensor]:
    """``state`` after timm's own conversion for the architecture: names of other codebases, sizes of embeddings."""
    convert = getattr(sys.modules[type(target).__module__], 'checkpoint_filter_fn', None)
    if convert is None:
        return state
    try:
        converted = dict(convert(dict(state), target))
    except Exception as e:
        raise CheckpointError(
            f"the weights don't fit {model}: timm's conversion failed "
            f'({type(e).__name__}: {first_line(e)}); is it another architecture?'
        ) from e
    if all(k in state and state[k].shape == v.shape for k, v in wanted.items()):
        # nothing to convert but what has no place; older timm takes a Swin without a classifier for the original's
        return {k: v for k, v in state.items() if k in wanted or k in converted}
    return converted


def _check_shapes(
    state: Mapping[str, torch.Tensor],
    wanted: Mapping[str, torch.Tensor],
    path: Union[str, Path],
    model: str,
    kwargs: Mapping[str, Any],
) -> None:
    missing = [k for k in wanted if k not in state]
    if missing:
        hint = ' (num_classes=0 leaves the classifier out)' if kwargs.get('num_classes') else ''
        raise CheckpointError(
            f'{path}: {len(missing)} of the {len(wanted)} tensors of {model} are missing: {_summary(missing)}{hint}. '
            'Name the architecture and arguments that were trained'
        )
    wrong = [k for k in wanted if state[k].shape != wanted[k].shape]
    if wrong:
        k = wrong[0]
        raise CheckpointError(
            f'{path}: {len(wrong)} tensors have another shape than in {model}, e.g. {k} {tuple(state[k].shape)} '
            f'instead of {tuple(wanted[k].shape)}. Name the architecture and arguments that were trained'
        )


def _check_rest(
    state: Mapping[str, torch.Tensor],
    wanted: Mapping[str, torch.Tensor],
    target: Any,
    path: Union[str, Path],
    model: str,
) -> None:
    """Nothing that takes part in features may be left out, and weights must be numbers of the kind that is wanted."""
    heads = (target.pretrained_cfg or {}).get('classifier') or ()
    heads = (heads,) if isinstance(heads, str) else heads
    parts = {k.split('.')[0] for k in wanted} | TOKENS
    rest = [
        k
        for k, v in state.items()
        if k not in wanted
        and k.split('.')[0] in parts
        and not any(f'{k}.'.startswith(f'{head}.') for head in heads)
        and v.is_floating_point()  # not indices and masks, which are made anew
    ]
    if rest:
        hints = sorted({hint for part, hint in HINTS.items() for k in rest if part in f'.{k}'})
        hint = f', e.g. {", ".join(hints)}' if hints else ''
        raise CheckpointError(
            f'{path}: {model} as made here has no place for {_summary(rest)} ({rest[0]}), so it would compute '
            f'something else. Name the architecture and arguments that were trained{hint}'
        )
    floats = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    wrong = [k for k, v in wanted.items() if v.is_floating_point() != (state[k].dtype in floats)]
    if wrong:
        raise CheckpointError(
            f'{path}: {wrong[0]} is of {state[wrong[0]].dtype}, not of {wanted[wrong[0]].dtype} or another size of it; '
            'these weights were quantised or converted, take the checkpoint that training wrote'
        )


def _check_heads(checkpoint: Mapping[str, Any], prefix: str, target: Any, path: Union[str, Path]) -> None:
    """Number of attention heads, which no shape tells: MoCo v3's ViT-S has 12 and timm's 6."""
    is_moco = prefix.startswith(('base_encoder.', 'momentum_encoder.'))
    if not is_moco or not str(checkpoint.get('arch')).endswith('small'):
        return
    if any(getattr(m, 'num_heads', 12) != 12 for m in target.modules()):
        raise CheckpointError(
            f'{path}: the small ViTs of MoCo v3 have 12 attention heads; pass num_heads=12 '
            '(--model-kwargs num_heads=12)'
        )


def _places(found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Keys and first name parts, as a user would name them."""
    places = []
    for source, tensors in found.items():
        firsts = dict.fromkeys(k.split('.')[0] for k in tensors)
        places += [f'{source}: {", ".join(list(firsts)[:6])}' if source else ', '.join(list(firsts)[:12])]
    return places


def _summary(names: Any) -> str:
    """Names by their first part with counts: 'head (12), predictor (8)'."""
    counts = Counter(n if ' ' in n else n.split('.')[0] for n in names)
    shown = [n if c == 1 else f'{n} ({c})' for n, c in list(counts.items())[:12]]
    return ', '.join(shown) + (', ...' if len(counts) > 12 else '') or 'nothing'
