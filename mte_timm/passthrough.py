"""A module that reads and writes as the one inside it.

Owns how attributes pass through. Knows nothing of what the two modules are.
"""

from typing import Any, Optional

import torch
from torch import nn

__all__ = ['PassThrough']


class PassThrough(nn.Module):
    """Attributes that this module doesn't have are those of ``.backbone``: read, assigned, deleted or registered."""

    backbone: nn.Module

    def check_assigned(self, name: str, value: Any) -> None:
        """Raises where an attribute of the backbone must not become ``value``."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == 'backbone' or name.startswith('__'):  # not built yet, or being copied or unpickled
                raise
            return getattr(self.backbone, name)

    def _is_backbones(self, name: str) -> bool:
        held = (self.__dict__, *(self.__dict__.get(kind, {}) for kind in ('_parameters', '_buffers', '_modules')))
        backbone = self.__dict__.get('_modules', {}).get('backbone')
        return (
            backbone is not None
            and not hasattr(type(self), name)
            and not any(name in own for own in held)
            and hasattr(backbone, name)
        )

    def __setattr__(self, name: str, value: Any) -> None:
        if self._is_backbones(name):
            self.check_assigned(name, value)
            setattr(self.backbone, name, value)
        else:
            super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        if self._is_backbones(name):
            delattr(self.backbone, name)
        else:
            super().__delattr__(name)

    def add_module(self, name: str, module: Optional[nn.Module]) -> None:
        """As in torch; a part of the backbone is replaced there."""
        if self._is_backbones(name):
            self.check_assigned(name, module)
            self.backbone.add_module(name, module)
        else:
            super().add_module(name, module)

    def register_parameter(self, name: str, param: Optional[nn.Parameter]) -> None:
        """As in torch; a parameter of the backbone is replaced there."""
        owner: Any = self.backbone if self._is_backbones(name) else super()
        owner.register_parameter(name, param)

    def register_buffer(self, name: str, tensor: Optional[torch.Tensor], persistent: bool = True) -> None:
        """As in torch; a buffer of the backbone is replaced there."""
        owner: Any = self.backbone if self._is_backbones(name) else super()
        owner.register_buffer(name, tensor, persistent)
