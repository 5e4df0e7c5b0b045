"""Reading training checkpoints of any supported codebase: open safely, find the backbone, load it.

Owns what such files look like. Knows nothing of auxiliary tokens: a plain DINO checkpoint is read the
same way as one of a wrapped model.
"""

import argparse
import pickle
import re
import sys
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Optional, Union

import safetensors
import safetensors.torch
import timm
import torch
from torch import nn

__all__ = ['CheckpointError', 'StripReport', 'strip_checkpoint']

WRAPPERS = ('module.', '_orig_mod.', '_forward_module.')
# where the weights to publish are, best first: DINO and iBOT evaluate the teacher, timm the EMA
KEYS = ('teacher', 'state_dict_ema', 'model_ema', 'ema', 'student', 'state_dict', 'model')


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or holds no backbone of the wanted architecture."""


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

    def __str__(self) -> str:
        lines = [f'took {self.loaded} tensors from {self.key}']
        if self.resampled:
            lines.append(f'resampled: {", ".join(self.resampled)}')
        if self.dropped:
            lines.append(f'dropped: {_summary(self.dropped)}')
        return '\n'.join(lines)


def _settings_class(path: str) -> type:
    """Stands in for a dict class in which a codebase saves its settings, so that its package is not needed and none
    of its code runs: unpickled, it is an OrderedDict."""
    module, name = path.rsplit('.', 1)
    return type(name, (), {'__module__': module, '__new__': lambda cls, *args: OrderedDict()})


_SAFE = (
    argparse.Namespace,
    *map(
        _settings_class,
        (
            'yacs.config.CfgNode',  # MoBY
            'lightning.fabric.utilities.data.AttributeDict',
            'lightning_fabric.utilities.data.AttributeDict',
            'pytorch_lightning.utilities.parsing.AttributeDict',
        ),
    ),
)


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
        mte.save_pretrained(report.model, 'my_vit')

    Args:
        path: A file that torch.save wrote, or safetensors.
        model: Name of the timm architecture.
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
    source, prefix, tensors = _find_backbone(checkpoint, wanted, key, path, model)
    _check_heads(checkpoint, prefix, target, path)
    state = _converted({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}, target, model)
    _check_shapes(state, wanted, path, model, create_kwargs)
    target.load_state_dict({k: v for k, v in state.items() if k in wanted})
    bad = [k for k, v in target.state_dict().items() if v.is_floating_point() and not v.isfinite().all()]
    if bad:
        raise CheckpointError(
            f'{path}: {", ".join(bad[:3])} of {source} hold NaN or infinity: this training had '
            'diverged; take an earlier checkpoint'
        )
    originals = {id(v) for v in tensors.values()}
    resampled = tuple(k for k in wanted if id(state[k]) not in originals and prefix + k in tensors)
    taken = {id(state[k]) for k in wanted} | {id(tensors[prefix + k]) for k in resampled}
    dropped = [k for k, v in tensors.items() if id(v) not in taken]
    others = [name for name, _ in _state_dicts(checkpoint) if name != source]
    where = f'{source}: {prefix}' if source and prefix else source or prefix or 'the top of the file'
    return StripReport(target.eval(), where, len(wanted), (*dropped, *others), resampled)


def read_checkpoint(path: Union[str, Path], trust: bool = False) -> Mapping[str, Any]:
    """Opens a checkpoint on the CPU without running code from it, unless ``trust``.

    Raises:
        FileNotFoundError: no file at ``path``.
        CheckpointError: the file is empty, truncated, no checkpoint, or needs more than tensors and settings.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f'{path}: ' + ('is a folder, name a file in it' if path.is_dir() else 'no such file'))
    if path.stat().st_size == 0:
        raise CheckpointError(f'{path}: is empty, its run was probably cut off; take an earlier checkpoint')
    try:
        if path.suffix == '.safetensors':
            return safetensors.torch.load_file(path)
        if trust:
            checkpoint = torch.load(path, map_location='cpu', weights_only=False)
        else:
            with _safe_globals():
                checkpoint = torch.load(path, map_location='cpu', weights_only=True)
    except pickle.UnpicklingError as e:
        needs = _unsafe_globals(path, str(e))
        if not needs:
            raise CheckpointError(f'{path}: is damaged or no PyTorch checkpoint ({_line(e)})') from e
        raise CheckpointError(
            f'{path}: holds more than tensors and settings ({", ".join(needs)}), and loading those runs code from the '
            'file. Only if you trust whoever made it: trust=True (--trust)'
        ) from e
    except Exception as e:  # whatever a damaged file sets off in the readers
        raise CheckpointError(
            f'{path}: is damaged, truncated or no checkpoint ({type(e).__name__}: {_line(e)}); copy it again'
        ) from e
    if not isinstance(checkpoint, Mapping):
        raise CheckpointError(f'{path}: holds a {type(checkpoint).__name__}, not a checkpoint or state dict')
    return checkpoint


@contextmanager
def _safe_globals() -> Iterator[None]:
    """torch.serialization.safe_globals for `_SAFE`, which torch 2.4 has not."""
    before = torch.serialization.get_safe_globals()
    torch.serialization.add_safe_globals(list(_SAFE))
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


def _create(name: str, kwargs: dict[str, Any]) -> nn.Module:
    if not isinstance(name, str) or not timm.is_model(name):
        near = timm.list_models(f'*{name}*')[:3] if isinstance(name, str) else []
        hint = f'; did you mean {", ".join(near)}?' if near else "; timm.list_models('*vit*') lists names"
        raise CheckpointError(f'model={name!r}: no timm architecture{hint}')
    return timm.create_model(name, **kwargs)


def _state_dicts(checkpoint: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """The state dicts in a checkpoint by key, wrapper prefixes removed; '' for the file itself."""
    entries = [('', checkpoint), *((str(k), v) for k, v in checkpoint.items() if isinstance(v, Mapping))]
    for name, entry in entries:
        tensors = {_unwrapped(k): v for k, v in entry.items() if isinstance(k, str) and isinstance(v, torch.Tensor)}
        if tensors:
            yield name, tensors


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
) -> tuple[str, str, dict[str, torch.Tensor]]:
    """(key, prefix, state dict) under which most of the ``wanted`` names are."""
    found = dict(_state_dicts(checkpoint))
    if not found:
        raise CheckpointError(f'{path}: holds no tensors; its keys are {_summary([str(k) for k in checkpoint])}')
    within: Optional[str] = None
    if key is not None and key in found:
        found = {key: found[key]}
    elif key is not None:
        within = key
        if not any(k.startswith(key) for tensors in found.values() for k in tensors):
            raise CheckpointError(
                f'{path}: has no key {key!r} and no parameters that begin with it; it has {_summary(_places(found))}'
            )
    best: tuple[int, int, str, str] = (0, 0, '', '')
    for source, tensors in found.items():
        votes: Counter[str] = Counter()
        for name in tensors:
            for cut in _cuts(name):
                if name[cut:] in wanted and (within is None or name.startswith(within)):
                    votes[name[:cut]] += 1
        for prefix, count in votes.items():
            best = max(best, (count, _rank(source, prefix), source, prefix))
    count, _, source, prefix = best
    if count < len(wanted) // 2:
        at = f' under {source}' if source else ''
        raise CheckpointError(
            f'{path}: only {count} of the {len(wanted)} tensors of {model} are in it{at}. Is it another architecture? '
            f'It holds {_summary(_places(found))}'
        )
    return source, prefix, found[source]


def _cuts(name: str) -> list[int]:
    """Where a parameter's name may begin: at 0 and behind each dot."""
    return [0, *(i + 1 for i, c in enumerate(name) if c == '.')]


def _rank(source: str, prefix: str) -> int:
    """Which of several networks the codebases publish: by key, then teachers before their students, then the
    online network before its momentum copy, which only MoCo and BYOL call by these names."""
    by_key = len(KEYS) - KEYS.index(source) if source in KEYS else 0
    by_prefix = 2 if 'teacher' in prefix or 'ema' in prefix.split('.')[0].split('_') else 1
    if any(word in prefix for word in ('student', 'momentum', 'target', 'encoder_k')):
        by_prefix = 0
    return 3 * by_key + by_prefix


def _converted(state: dict[str, torch.Tensor], target: nn.Module, model: str) -> dict[str, torch.Tensor]:
    """``state`` after timm's own conversion for the architecture: names of other codebases, sizes of embeddings."""
    convert = getattr(sys.modules[type(target).__module__], 'checkpoint_filter_fn', None)
    if convert is None:
        return state
    try:
        return dict(convert(dict(state), target))
    except Exception as e:
        raise CheckpointError(
            f"the weights don't fit {model}: timm's conversion failed "
            f'({type(e).__name__}: {_line(e)}); is it another architecture?'
        ) from e


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


def _check_heads(checkpoint: Mapping[str, Any], prefix: str, target: Any, path: Union[str, Path]) -> None:
    """Number of attention heads: no shape tells it, and MoCo v3's ViT-S has another one than timm's."""
    if not prefix.startswith(('base_encoder.', 'momentum_encoder.')) or not str(checkpoint.get('arch')).endswith(
        'small'
    ):
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


def _unsafe_globals(path: Path, message: str) -> list[str]:
    """Names of what a file needs beyond tensors and `_SAFE`; from torch's ``message`` where it can't list them."""
    try:
        allowed = {f'{c.__module__}.{c.__name__}' for c in _SAFE}
        return sorted(set(torch.serialization.get_unsafe_globals_in_checkpoint(path)) - allowed)
    except Exception:  # torch before 2.6, files of old format or damaged ones
        named = re.findall(r'(?:GLOBAL|class|function) ([\w.]+)', message)[:1]
        return named or ['objects that torch does not name'] * zipfile.is_zipfile(path)


def _line(e: BaseException) -> str:
    return (str(e).strip().splitlines() or [''])[0][:200]
