"""What several parts ask of a model."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Optional

import timm.models
import timm.optim
from torch import nn

__all__ = [
    'classifier_names',
    'evaluating',
    'input_size',
    'layers_of',
    'model_args_of',
    'plain_args',
    'size_of_weights',
    'unsaid_args',
]

# arguments of timm.create_model that make no other model: of a run, of the images, or that read other files
_NOT_KEPT = re.compile(
    r'pretrained(?!_window_sizes).*|.*drop.*_rate|img_size|num_classes|checkpoint_path|cache_dir|scriptable|exportable|'
    r'no_jit'
)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Runs the body with ``model`` in eval mode and puts every module's mode back."""
    training = [m for m in model.modules() if m.training]
    # attention biases, as LeViT computes them once in eval mode: of other weights before and after
    caches = [c for m in model.modules() if isinstance(c := vars(m).get('attention_bias_cache'), dict)]
    try:
        for m in training:
            m.training = False  # not eval(), which a model may override
        for cache in caches:
            cache.clear()
        yield
    finally:
        for m in training:
            m.training = True
        for cache in caches:
            cache.clear()


def classifier_names(model: Any) -> tuple[str, ...]:
    """Where timm says that the classifiers of ``model`` stand: two of a distilled model, none where it does not say."""
    names = (getattr(model, 'pretrained_cfg', None) or {}).get('classifier') or ()
    return (names,) if isinstance(names, str) else tuple(names)


def input_size(model: Any) -> tuple[int, int, int]:
    """(C, H, W) of the images that ``model`` was made for."""
    cfg = getattr(model, 'pretrained_cfg', None) or {}
    c, h, w = cfg.get('input_size') or (3, 224, 224)
    stem = next((m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d)), c)
    c = getattr(model, 'in_chans', None) or stem  # not every model of older timm says it
    h, w = size_of_weights(model) or (h, w)
    return int(c), int(h), int(w)


def size_of_weights(model: Any) -> Optional[tuple[int, int]]:
    """(H, W) of the images that weights of ``model`` were made for; None where they fit any."""
    traits_of: Any = getattr(timm.models, 'get_model_traits', lambda model: {})  # since timm 1.0.31
    size = traits_of(model).get('img_size') or getattr(getattr(model, 'patch_embed', None), 'img_size', None)
    return (size, size) if isinstance(size, int) else size  # the ViTs of DINO and iBOT have one number


def model_args_of(model: Any) -> dict[str, Any]:
    """Arguments of ``timm.create_model`` as ``model`` is now; timm 1.0.31 and newer keep them."""
    return dict(getattr(timm.models, 'get_model_args', lambda model: {})(model))


def layers_of(model: Any, coarse: bool = False) -> dict[str, int]:
    """Name of a parameter -> its layer in timm's layer-wise decay."""
    if hasattr(model, 'group_matcher'):
        return dict(timm.models.group_parameters(model, model.group_matcher(coarse=coarse), reverse=True))
    return dict(timm.optim.auto_group_layers(model))  # type: ignore[no-untyped-call]  # MetaFormer, CSATv2


def plain_args(args: Mapping[str, Any]) -> dict[str, Any]:
    """Those arguments of ``timm.create_model`` that decide what the model computes and that JSON can say."""
    return {k: v for k, v in args.items() if isinstance(k, str) and not _NOT_KEPT.fullmatch(k) and _is_plain(v)}


def unsaid_args(args: Mapping[str, Any]) -> list[str]:
    """Names of those that JSON cannot say: classes of layers, functions."""
    return [k for k, v in args.items() if not _NOT_KEPT.fullmatch(k) and not _is_plain(v)]


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or type(value) in (bool, int, float, str)
