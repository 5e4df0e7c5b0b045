"""Adapters: how to run a backbone with auxiliary CLS tokens, and where its patches are.

An adapter knows one kind of backbone, and nothing of the auxiliary branch, heads or losses. CONTRIBUTING.md says how to
add one.
"""

import difflib

import timm
from torch import nn

from .base import Adapter, BackboneOutput, size_error
from .class_attention import CaitAdapter, XcitAdapter
from .eva import EvaAdapter
from .feature_map import FeatureMapAdapter
from .naflex import NaFlexAdapter
from .resnet import ResNetAdapter
from .vit import ViTAdapter

__all__ = [
    'Adapter', 'BackboneOutput', 'FeatureMapAdapter', 'ViTAdapter', 'check_name', 'find_adapter', 'register_adapter',
    'size_error',
]  # fmt: skip

ADAPTERS: list[type[Adapter]] = [ViTAdapter, EvaAdapter, NaFlexAdapter, CaitAdapter, XcitAdapter, ResNetAdapter]


def register_adapter(adapter: type[Adapter]) -> type[Adapter]:
    """Class decorator: :func:`find_adapter` asks ``adapter`` too, after those that are registered already."""
    ADAPTERS.append(adapter)
    return adapter


def find_adapter(model: nn.Module) -> Adapter:
    """The adapter that runs ``model``: the first that takes it, or for other timm models one that reads their last map.

    Raises:
        TypeError: ``model`` is neither a timm model nor of another class that an adapter takes.
        ValueError: ``model`` gives no spatial map to pool; the message says why.
    """
    for adapter in ADAPTERS:
        if adapter.takes(model):
            return adapter(model)
    if not FeatureMapAdapter.takes(model):
        raise TypeError(
            f'model: {type(model).__name__} has no forward_features and forward_head; '
            "pass a timm model, e.g. timm.create_model('vit_small_patch16_224', num_classes=0), or its name"
        )
    return FeatureMapAdapter(model)


def check_name(name: str) -> None:
    """Checks that timm has an architecture of this name.

    Raises:
        ValueError: it has not; the message lists similar names.
    """
    if not timm.is_model(name):
        names = timm.list_models()
        near = [n for n in names if n.startswith(name)][:3] or difflib.get_close_matches(name, names)
        hint = f'did you mean {", ".join(near)}?' if near else "timm.list_models('*vit*') lists names"
        raise ValueError(f'model={name!r}: not a timm architecture; {hint}')
