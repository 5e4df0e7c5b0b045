"""A module whose attributes are those of the one inside it. Knows nothing of what the two modules are."""

from typing import Any, Optional

from torch import nn

__all__ = ['PassThrough']


class PassThrough(nn.Module):
    """Attributes that this module lacks are those of ``.backbone``: read, assigned, deleted or registered."""

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

    def _owner(self, name: str, value: Any = None) -> Any:
        """The owner of attribute ``name`` before it is set to ``value``: the backbone, or this module."""
        held = (vars(self), *(vars(self).get(kind, {}) for kind in ('_parameters', '_buffers', '_modules')))
        backbone = vars(self).get('_modules', {}).get('backbone')
        own = backbone is None or hasattr(type(self), name) or any(name in names for names in held)
        if own or not hasattr(backbone, name):
            return super()
        self.check_assigned(name, value)
        return backbone

    def __setattr__(self, name: str, value: Any) -> None:
        self._owner(name, value).__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        self._owner(name).__delattr__(name)

    def add_module(self, name: str, module: Optional[nn.Module]) -> None:
        """As in torch; a part of the backbone is replaced there."""
        self._owner(name, module).add_module(name, module)

    def register_parameter(self, name: str, param: Optional[nn.Parameter]) -> None:
        """As in torch; a parameter of the backbone is replaced there."""
        self._owner(name).register_parameter(name, param)

    def register_buffer(self, name: str, *args: Any, **kwargs: Any) -> None:
        """As in torch; a buffer of the backbone is replaced there."""
        self._owner(name).register_buffer(name, *args, **kwargs)
