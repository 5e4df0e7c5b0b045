"""The backbone in a training checkpoint of any supported codebase, as a plain timm model.

Owns the steps from a file to a model. Knows nothing of auxiliary tokens: a plain DINO checkpoint is read the same way
as one of a wrapped model.
"""

import inspect
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Optional, Union

import timm
from torch import nn

from ..backbones import check_name
from ..utils import classifier_names, model_args_of
from .accounting import account_for, advice, check, identity
from .codebases import Creation, Origin, Size, as_pair, check_epsilon, creation_of, num_heads, origin_of
from .conversion import Grids, compare_grids, converted, size_of, timm_names, with_masks
from .loading import CheckpointError, in_short, read_checkpoint
from .search import Place, Tensors, find_network, state_dicts, summary

__all__ = ['StripReport', 'strip_checkpoint']


class StripReport(NamedTuple):
    """What :func:`strip_checkpoint` found: the plain timm ``model`` in eval mode, and where its weights came from.

    ``str()`` gives it in words. :func:`save_pretrained` and :func:`push_to_hub` take it, with what it says of the
    training: the options of :func:`wrap` (``mte``), ``mean`` and ``std``, ``img_size`` and ``model_args``.
    """

    model: nn.Module
    key: str  # where the backbone was: key and prefix, e.g. 'teacher: backbone.'
    loaded: int  # number of tensors taken
    dropped: tuple[str, ...]  # names of tensors beside it that were not taken, and of other keys that hold weights
    resampled: tuple[str, ...]  # names of tensors that were brought to another size
    mte: Optional[dict[str, Any]] = None  # options of wrap that the state dict remembers
    without_effect: tuple[tuple[str, str], ...] = ()  # dropped tensors that are no heads, each with the reason
    grids: Optional[Grids] = None  # of the position embedding in the file and in the model
    codebase: Optional[str] = None  # repository that wrote the file, where its marks tell
    mean: Optional[tuple[float, ...]] = None  # with which this repository normalizes images
    std: Optional[tuple[float, ...]] = None
    img_size: Optional[Size] = None  # (H, W), asked for or known of training, where the model takes any
    model_args: Optional[dict[str, Any]] = None  # of timm.create_model

    def __str__(self) -> str:
        lines = [f'took {self.loaded} tensors from {self.key}']
        if self.grids is not None:
            assumed = ' (the file does not tell: trained_size=, --trained-size, does)' * self.grids.assumed
            what = 'resampled: pos_embed' if 'pos_embed' in self.resampled else 'grid of patches:'
            lines.append(f'{what} {self.grids}{assumed}')
        if others := [name for name in self.resampled if name != 'pos_embed' or self.grids is None]:
            lines.append(f'resampled: {", ".join(others)}')
        lines += [f'left out without effect: {name} ({why})' for name, why in self.without_effect]
        if self.mte is None and any(re.search(r'(^|\.)aux\.(heads|pool|ten|cls_tokens)', n) for n in self.dropped):
            lines.append('arguments of the model: as those of the architecture or given; the file has lost them')
        if heads := [name for name in self.dropped if name not in dict(self.without_effect)]:
            prefix = self.key.rpartition(': ')[2]
            names = [name.removeprefix(prefix) if prefix.endswith('.') else name for name in heads]
            lines.append(f'dropped: {summary(names)}')
            if {f'{classifier}.weight' for classifier in classifier_names(self.model)} & {*names}:
                lines.append('among these is the classifier, which num_classes= (--num-classes) keeps')
        return '\n'.join(lines)


def strip_checkpoint(
    path: Union[str, Path],
    model: str,
    key: Optional[str] = None,
    *,
    trained_size: Union[int, Size, None] = None,
    drop: Sequence[str] = (),
    trust: bool = False,
    **create_kwargs: Any,
) -> StripReport:
    """Finds the backbone in a training checkpoint and returns it as a plain timm model.

    Reads checkpoints of DINO, iBOT, MoCo v3, MoBY, DINOv2, DINOv3, MAE, lightly and Lightning, timm and MTE, also with
    names that DDP, FSDP, torch.compile and activation checkpointing have changed. Every floating-point tensor of the
    backbone is used or provably without effect on features.

        report = mte.strip_checkpoint('checkpoint.pth', 'vit_small_patch16_224', key='teacher')
        mte.save_pretrained(report, 'my_vit')

    Args:
        path: A file that torch.save wrote, safetensors, or a folder of torch.distributed.checkpoint (with ``trust``).
        model: Name of the timm architecture. What no weight's shape tells, such as the number of attention heads, is
            taken from ``create_kwargs``, from a file of MTE or of timm's train.py that tells how its model was made,
            and else from it.
        key: Which of several networks to take, by its key, the beginning of its names, or both with a dot between:
            ``'teacher'``, ``'student.backbone'``, ... By default the one that the codebase itself evaluates.
        trained_size: Size of the images in training, N or (H, W), where the file doesn't tell.
        drop: Beginnings of names of tensors that are no part of the backbone, though they stand among its own.
        trust: Load a file that needs more than tensors and plain settings. That runs code from the file.
        create_kwargs: For ``timm.create_model``: ``img_size``, to which position embeddings are resampled, by default
            the size of training; ``num_classes`` to keep a classifier, by default 0; ...

    Raises:
        FileNotFoundError: no file at ``path``.
        CheckpointError: the file cannot be read, holds code, has no ``key``, or not the whole backbone, or the model
            has no place for all of it; the message says what to do.
    """
    asked = as_pair('img_size', create_kwargs.pop('img_size', None))
    trained_size = as_pair('trained_size', trained_size)
    given = {'num_classes': 0, **create_kwargs}
    target, kwargs = _create(model, given, asked)
    checkpoint = read_checkpoint(path, trust)
    with _naming(path):
        found = state_dicts(checkpoint)
        names = {model.partition('.')[0], target.pretrained_cfg['architecture']}  # also of an alias
        args, place = given, Place('', '', 0)
        # it takes the arguments to find the network, and the network to know whose they are
        for known in (False, True):
            made = creation_of(checkpoint, Path(path), place if known else None, names)
            with_said = {**made.model_args, **given} if made.architecture in names else given
            if with_said != args:
                args = with_said
                target, kwargs = _create(model, args, asked)
            elif known:
                break
            wanted = target.state_dict()
            place = find_network(found, len(wanted), partial(_count, target), key, model)
        _refuse_unknown(made, target, model, args)
        tensors = found[place.source]
        own = with_masks({k.removeprefix(place.prefix): v for k, v in tensors.items() if k.startswith(place.prefix)})
        origin = origin_of(checkpoint, place, tensors, path)
        heads = num_heads(checkpoint, place, own)
        if heads and any(getattr(m, 'num_heads', heads) != heads for m in target.modules()):
            how = f'pass num_heads={heads} (--model-kwargs num_heads={heads})'
            raise CheckpointError(f'the small ViTs of MoCo v3 have {heads} attention heads; {how}')
        check_epsilon(tensors, target, Path(path))
        if 'fc_norm.weight' in own and 'norm.weight' not in own and 'norm.weight' in wanted:  # as in MAE's fine-tuning
            target, kwargs = _create(model, {'global_pool': 'avg', **kwargs})
        try:
            grids = compare_grids(timm_names(own, target), target, origin, trained_size, asked is not None)
            size = trained_size or origin.img_size
            if grids is not None:
                size = size_of(grids, target) if grids.trained != grids.wanted else None
            if asked is None and size is not None:
                target, kwargs = _create(model, kwargs, size)
                grids = grids and grids._replace(wanted=grids.trained)
            account = account_for(own, target, grids, drop)
        except CheckpointError as e:
            raise CheckpointError(f'{e}{advice(own, target, model, kwargs, of_grids=True)}') from None
        except Exception as e:
            raise CheckpointError(
                f"the weights don't fit {model}: timm's conversion failed ({in_short(e)})"
                + (advice(own, target, model, kwargs) or '; is it another architecture?')
            ) from e
        check(account, own, target, model, kwargs)
        state = {k: account.state[k] for k in target.state_dict() if k in account.state}
        try:
            target.load_state_dict(state, strict=False)
        except RuntimeError as e:  # tensors without data, sparse ones
            raise CheckpointError(f'{place} does not load into {model} ({in_short(e)})') from e
        if bad := [k for k, v in target.state_dict().items() if v.is_floating_point() and not v.isfinite().all()]:
            raise CheckpointError(f'{", ".join(bad[:3])} hold NaN or infinity: training diverged; take an earlier one')
        resampled = _resampled(own, state, grids)
        trained = trained_size or origin.img_size
        _refuse_guesses(resampled, own, model, kwargs, asked, trained if grids is None else None)
        left = {*account.heads, *account.without_effect}
        others = [name for name, t in found.items() if name != place.source and any(v.ndim for v in t.values())]
        beside = [k for k in tensors if not k.startswith(place.prefix)]
        mean, std = _statistics(origin, target)
        return StripReport(
            model=target.eval(),
            key=str(place),
            loaded=len(state),
            dropped=(*(place.prefix + k for k in own if k in left), *beside, *others),
            resampled=resampled,
            mte=origin.mte,
            without_effect=tuple((place.prefix + k, why) for k, why in account.without_effect.items()),
            grids=grids,
            codebase=origin.codebase,
            mean=mean,
            std=std,
            img_size=None if grids is not None or 'img_size' in kwargs else asked or origin.img_size,
            model_args=kwargs,
        )


@contextmanager
def _naming(path: Union[str, Path]) -> Iterator[None]:
    """Errors begin with the file's name."""
    try:
        yield
    except CheckpointError as e:
        raise CheckpointError(f'{path}: {e}') from e.__cause__


def _refuse_unknown(made: Creation, target: Any, model: str, args: dict[str, Any]) -> None:
    """Refuses a ``target`` that may compute something else than what was trained."""
    if unsaid := [name for name in made.unsaid if name not in args]:
        how = f'pass {unsaid[0]}= to strip_checkpoint, as to timm.create_model then'
        raise CheckpointError(f'was made with {", ".join(unsaid)}, whose value no file can say; {how}')
    own = {**model_args_of(target), **args}
    if other := [f'{k}={v}' for k, v in made.model_args.items() if k not in args and own.get(k) != v]:
        raise CheckpointError(
            f'was made as {made.architecture} with {" ".join(other)}: name that as the model, or say what {model} is '
            'to have (--model-kwargs)'
        )


def _resampled(own: Tensors, state: Tensors, grids: Optional[Grids]) -> tuple[str, ...]:
    """Names of tensors that were brought to another size."""
    as_they_were = {identity(v) for v in own.values()}
    changed = (k for k, v in state.items() if k in own and identity(v) not in as_they_were)
    names = tuple(k for k in changed if own[k].shape != state[k].shape)
    if grids is None:
        return names
    return tuple(k for k in names if k != 'pos_embed') + ('pos_embed',) * (grids.trained != grids.wanted)


def _refuse_guesses(
    resampled: Sequence[str], own: Tensors, model: str, kwargs: dict[str, Any], asked: Any, trained: Optional[Size]
) -> None:
    """Refuses what timm has resampled though nobody asked for it, or as if it were square."""
    tables = [k for k in resampled if k.endswith('relative_position_bias_table')]
    if tables and asked is None:
        how = 'pass img_size= (--img-size) or window_size, as in training'
        raise CheckpointError(f'{tables[0]} is of another image or window size than {model} has by default: {how}')
    if 'patch_embed.proj.weight' in resampled and 'patch_size' not in kwargs:
        patch = own['patch_embed.proj.weight'].shape[-1]
        how = f'pass patch_size={patch}, as in training, or the one to resample to (--model-kwargs patch_size=N)'
        raise CheckpointError(f'patch_embed.proj.weight is of patches of {patch} pixels, unlike {model}: {how}')
    if asked and resampled and trained and trained[0] != trained[1]:
        what = f'trained on images of {trained}, and timm would resample them as squares'
        raise CheckpointError(f'{", ".join(resampled)}: {what}; leave img_size out, and resize the model in timm')


def _create(name: str, kwargs: dict[str, Any], size: Optional[Size] = None) -> tuple[Any, dict[str, Any]]:
    """The model for images of ``size``, with its arguments; one that takes any size is not told."""
    if not isinstance(name, str):
        raise CheckpointError(f'model={name!r}: must be the name of a timm architecture')
    try:
        check_name(name)
    except ValueError as e:
        raise CheckpointError(str(e)) from None
    sized = kwargs if size is None else {**kwargs, 'img_size': size[0] if size[0] == size[1] else size}
    try:
        made = timm.create_model(name, **sized)
    except Exception as e:  # timm asserts, looks up and unpacks what it is given
        if size is not None and re.search("unexpected keyword argument.*'img_size'", str(e)):
            return _create(name, kwargs)
        raise CheckpointError(f'model={name!r}: timm does not make it with {sized} ({in_short(e)})') from e
    takes_size = any('img_size' in inspect.signature(kind).parameters for kind in type(made).__mro__)
    return (made, sized) if takes_size or size is None else (made, kwargs)  # older timm's CNNs ignore it


def _count(target: Any, tensors: Tensors) -> int:
    """How many of the wanted tensors a state dict gives."""
    wanted = target.state_dict().keys()
    direct = len(wanted & timm_names(tensors, target).keys())
    if direct == len(wanted):
        return direct
    try:
        return max(direct, len(wanted & converted(tensors, target).keys()))
    except Exception:  # made for other tensors
        return direct


def _statistics(origin: Origin, target: Any) -> tuple[Any, Any]:
    """Mean and standard deviation of training, where they are known and of this many channels."""
    cfg = (target.pretrained_cfg or {}) if origin.codebase == 'timm' else {}  # the default of its command line
    channels = next((m.in_channels for m in target.modules() if isinstance(m, nn.Conv2d)), 3)
    known = (origin.mean or cfg.get('mean'), origin.std or cfg.get('std'))
    mean, std = (tuple(v) if v is not None and len(v) == channels else None for v in known)
    return mean, std
