"""Names of timm 0.4 that MoCo v3 and Transformer-SSL import and that later timm has dropped; importing supplies them.

Only where they are missing, and only in a process that imports this module.
"""

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any

import timm
import timm.data.transforms
import timm.layers
import timm.layers.helpers

__all__ = ['tolerant']


def tolerant(layer: Callable[..., Any]) -> Callable[..., Any]:
    """``layer`` without the keyword arguments that its signature does not have, which later timm hands to it."""
    known = inspect.signature(layer).parameters
    if any(p.kind is p.VAR_KEYWORD for p in known.values()):
        return layer

    @functools.wraps(layer, updated=())
    def make(*args: Any, **kwargs: Any) -> Any:
        return layer(*args, **{k: v for k, v in kwargs.items() if k in known})

    return make


def _supply() -> None:
    sys.modules.setdefault('timm.models.layers', timm.layers)
    sys.modules.setdefault('timm.models.layers.helpers', timm.layers.helpers)
    names = (
        (timm.models, 'vit_deit_small_patch16_224', timm.model_entrypoint('deit_small_patch16_224')),
        (timm.data.transforms, '_pil_interp', timm.data.transforms.str_to_interp_mode),
    )
    for module, name, value in names:
        if not hasattr(module, name):
            setattr(module, name, value)


_supply()
