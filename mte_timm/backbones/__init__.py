"""Backbone families: how to run a model with observers, and where its patches are.

One file a family. A family owns the knowledge of one kind of backbone and knows nothing of auxiliary
modules, heads or losses. `find_family` picks the first that takes the model.
"""

import difflib

import timm
from torch import nn

from .base import Family, Stream, evaluating, input_size
from .class_attention import CaitFamily, XcitFamily
from .eva import EvaFamily
from .feature_map import FeatureMapFamily
from .naflex import NaFlexFamily
from .ssl_map import SSLSwinFamily, TorchvisionResNetFamily
from .ssl_vit import SSLViTFamily
from .vit import ViTFamily

__all__ = ['Family', 'Stream', 'check_name', 'evaluating', 'find_family', 'input_size']


def check_name(name: str) -> None:
    """Holds that timm has an architecture of this name.

    Raises:
        ValueError: it has not; the message has names like it.
    """
    if not timm.is_model(name):
        names = timm.list_models()
        near = [n for n in names if n.startswith(name)][:3] or difflib.get_close_matches(name, names)
        hint = f'did you mean {", ".join(near)}?' if near else "timm.list_models('*vit*') lists names"
        raise ValueError(f'model={name!r}: no timm architecture; {hint}')


def find_family(model: nn.Module) -> Family:
    """The family that runs ``model``.

    Raises:
        TypeError: ``model`` is neither a timm model nor one of the other classes that a family takes.
        ValueError: ``model`` gives no spatial map to pool; the message says why.
    """
    for family in (
        ViTFamily,
        EvaFamily,
        NaFlexFamily,
        CaitFamily,
        XcitFamily,
        SSLViTFamily,
        SSLSwinFamily,
        TorchvisionResNetFamily,
    ):
        if family.takes(model):
            return family(model)
    if not callable(getattr(model, 'forward_features', None)) or not callable(getattr(model, 'forward_head', None)):
        raise TypeError(
            f'model: {type(model).__name__} has no forward_features and forward_head; '
            "pass a timm model, e.g. timm.create_model('vit_small_patch16_224', num_classes=0), or its name"
        )
    return FeatureMapFamily(model)
