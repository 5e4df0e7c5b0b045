"""What an adapter answers, and the pieces that adapters share."""

import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple, Optional

import torch
from torch import nn

from ..utils import evaluating

__all__ = ['Adapter', 'BackboneOutput', 'check_same', 'grid_of', 'refuse', 'size_error']


class BackboneOutput(NamedTuple):
    """One run of a backbone, everything after its final norm. What :class:`AuxiliaryBranch` takes."""

    output: Any
    """What the plain model returns."""
    features: torch.Tensor
    """(B, D'): the global token, which the classifier takes."""
    patches: torch.Tensor
    """(B, H*W, D): patch tokens. Also where the plain model norms only after pooling, as average-pooled ViTs do."""
    aux_cls: Optional[torch.Tensor]
    """(B, n_cls, D): the auxiliary CLS tokens after the last block; None where none went in."""
    grid: tuple[int, int]
    """(H, W)."""


class Adapter:
    """How to run one kind of backbone. Holds facts about a model, never the model itself.

    Raises:
        ValueError: the model has the parts of its kind, but its own forward computes something else.
    """

    attends = False
    """Whether the model can carry auxiliary CLS tokens."""
    dim: int
    """Width of the patch tokens."""
    out_dim: int
    """Width of the global token."""
    num_heads = 1

    def __init__(self, model: Any) -> None:
        raise NotImplementedError

    @staticmethod
    def takes(model: Any) -> bool:
        """Whether ``model`` is of this kind."""
        raise NotImplementedError

    def __call__(
        self, model: Any, x: torch.Tensor, aux_cls: Optional[torch.Tensor] = None, see_global: bool = False, **more: Any
    ) -> BackboneOutput:
        """Runs ``model``.

        Args:
            model: The backbone that the adapter was made for.
            x: Images (B, C, H', W').
            aux_cls: Auxiliary CLS tokens (B, n_cls, D) before the first block.
            see_global: Let them attend to the class token.
            more: What else the model's own forward takes, e.g. the ``mask`` of masked image modeling.
        """
        raise NotImplementedError

    def num_classes(self, model: Any) -> int:
        """Classes of the classifier of ``model``, 0 where it returns features."""
        return int(getattr(model, 'num_classes', 0) or 0)

    def head(self, model: Any, features: torch.Tensor) -> tuple[Any, torch.Tensor]:
        """What ``model`` returns, and the global token, of what its ``forward_features`` gives."""
        output = model.forward_head(features)
        return output, self.pre_logits(model, features) if self.num_classes(model) else output

    def pre_logits(self, model: Any, features: torch.Tensor) -> torch.Tensor:
        """What the classifier of ``model`` takes, (B, out_dim)."""
        return model.forward_head(features, pre_logits=True)


def check_same(
    model: Any, shape: tuple[int, ...], pairs: Callable[[torch.Tensor], list[tuple[torch.Tensor, torch.Tensor]]]
) -> None:
    """Compares what an adapter computes with what ``model`` does, in eval mode.

    Args:
        model: Gives the input its dtype and device.
        shape: Shape of the input, whose values are waves between -1 and 1.
        pairs: Input -> (the adapter's, the model's own).

    Raises:
        ValueError: they differ, or one of them fails.
    """
    like = next(model.parameters())
    x = torch.linspace(-20, 20, math.prod(shape), device=like.device, dtype=like.dtype).sin().view(shape)
    tolerance = 1e-4 if like.dtype in (torch.float32, torch.float64) else 0.05
    error = ValueError(
        f'model: {type(model).__name__} has the parts of a class that mte_timm knows, but its own forward computes '
        'something else with them; use the timm model of this architecture'
    )
    with torch.no_grad(), evaluating(model):
        try:
            compared = pairs(x)
            same = x.is_meta or all(torch.allclose(*pair, rtol=tolerance, atol=tolerance) for pair in compared)
        except Exception as e:
            raise error from e
    if not same:
        raise error


def refuse(inputs: dict[str, Any], model: nn.Module) -> None:
    """For backbones that take images alone.

    Raises:
        TypeError: there are other inputs.
    """
    if inputs:
        raise TypeError(f'{", ".join(inputs)}: {type(model).__name__} takes images alone')


def grid_of(num_patches: int, size: tuple[int, int]) -> tuple[int, int]:
    """The grid (H, W) of ``num_patches`` whose aspect ratio is nearest to that of images of ``size``.

    >>> grid_of(196, (224, 224)), grid_of(98, (224, 112)), grid_of(10, (64, 160))
    ((14, 14), (14, 7), (2, 5))
    """
    ratio = size[0] / size[1]
    heights = [h for h in range(1, num_patches + 1) if num_patches % h == 0]
    h = min(heights, key=lambda h: abs(h * h / num_patches - ratio) / (h * h / num_patches + ratio))
    return h, num_patches // h


def size_error(backbone: nn.Module, x: torch.Tensor, error: AssertionError) -> str:
    """What to say of images ``x`` whose size timm asserts not to be that of ``backbone``; '' where nothing is known."""
    made_for = getattr(getattr(backbone, 'patch_embed', None), 'img_size', None)
    size = tuple(x.shape[-2:])
    if made_for is None or tuple(made_for) == size or 'divisible' in str(error):
        return ''
    accepted = inspect.signature(type(backbone).__init__).parameters
    option = next((o for o in ('dynamic_img_size=True', 'strict_img_size=False') if o.split('=')[0] in accepted), '')
    return (
        f'x: images of {size[0]}x{size[1]}, but {type(backbone).__name__} was made for {made_for[0]}x{made_for[1]}; '
        f'create it with img_size={size if size[0] != size[1] else size[0]}'
        + (f', or for views of several sizes with {option}' if option else '')
    )
