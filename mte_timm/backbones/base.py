"""What a family answers, and the pieces that families share."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Optional

import timm
import torch
from torch import nn

__all__ = ['Family', 'Stream', 'check_run', 'check_same', 'evaluating', 'grid_of', 'input_size', 'refuse']


class Stream(NamedTuple):
    """One run of a backbone with observers."""

    features: torch.Tensor  # what the plain model's forward_features returns
    patches: torch.Tensor  # B, N, D: the patch tokens among them
    observers: Optional[torch.Tensor]  # B, n_cls, D, after the model's final norm
    grid: tuple[int, int]  # H, W with H * W = N


class Family:
    """How to run one kind of backbone. Holds facts about the model, never the model itself."""

    attends = False  # can carry observers
    dim: int  # width of the patch tokens
    out_dim: int  # width of the features that the classifier takes
    num_heads = 1

    def run(
        self, model: nn.Module, x: torch.Tensor, observers: Optional[torch.Tensor], see_global: bool, **inputs: Any
    ) -> Stream:
        """Runs ``model`` on images (B, C, H, W) with ``observers`` (1, n_cls, D) or without.

        Args:
            model: The backbone that the family was made for.
            x: Images.
            observers: Auxiliary CLS tokens before the first block.
            see_global: Let observers attend to the class token.
            inputs: What else the model's own forward takes, e.g. the ``mask`` of masked image modelling.
        """
        raise RuntimeError(f'{type(self).__name__} must define run')

    def normalise(self, model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
        """Applies to tokens (B, n, D) the norm that ``model`` applies only after pooling, if it has one.

        Average-pooled ViTs, ConvNeXt and others move their final norm behind the pooling. The auxiliary
        tokens read patches after the final norm wherever it stands.
        """
        raise RuntimeError(f'{type(self).__name__} must define normalise')

    def num_classes(self, model: Any) -> int:
        """Classes of the classifier of ``model``, 0 where it returns features."""
        return int(getattr(model, 'num_classes', 0) or 0)

    def output(self, model: Any, features: torch.Tensor) -> Any:
        """What ``model`` itself returns, given its features."""
        return model.forward_head(features)

    def pre_logits(self, model: Any, features: torch.Tensor) -> torch.Tensor:
        """What the classifier of ``model`` takes, (B, out_dim), computed beside the model's own output."""
        return model.forward_head(features, pre_logits=True)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Runs the body with ``model`` in eval mode and puts every module's mode back."""
    training = [m for m in model.modules() if m.training]
    for m in training:
        m.training = False  # not eval(), which a model may override
    try:
        yield
    finally:
        for m in training:
            m.training = True


def check_run(family: Family, model: Any, size: tuple[int, int, int]) -> None:
    """Holds a family that runs a model by its parts to the model's own forward, on two images of ``size`` (C, H, W).

    Raises:
        ValueError: they differ, or one of them fails.
    """
    check_same(
        model, (2, *size), lambda x: [(family.output(model, family.run(model, x, None, False).features), model(x))]
    )


def check_same(
    model: Any, shape: tuple[int, ...], pairs: Callable[[torch.Tensor], list[tuple[torch.Tensor, torch.Tensor]]]
) -> None:
    """Holds what a family computes to what ``model`` does, in eval mode on an input of ``shape``.

    Args:
        model: Whose dtype and device the input gets.
        shape: Of the input, whose values are waves between -1 and 1.
        pairs: Input -> (the family's, the model's own).

    Raises:
        ValueError: they differ, or one of them fails.
    """
    like = next(model.parameters())
    x = torch.linspace(-20, 20, math.prod(shape), device=like.device, dtype=like.dtype).sin().view(shape)
    tolerance = 1e-4 if like.dtype in (torch.float32, torch.float64) else 0.05
    with torch.no_grad(), evaluating(model):
        try:
            compared = pairs(x)
            same = x.is_meta or all(torch.allclose(*pair, rtol=tolerance, atol=tolerance) for pair in compared)
        except Exception as e:
            raise ValueError(_UNLIKE.format(name=type(model).__name__)) from e
    if not same:
        raise ValueError(_UNLIKE.format(name=type(model).__name__))


_UNLIKE = (
    'model: {name} has the parts of a class that mte_timm knows, but its own forward computes something else than they '
    'do in turn; use the timm model of this architecture'
)


def input_size(model: Any) -> tuple[int, int, int]:
    """(C, H, W) of the images that the model was made for."""
    cfg = getattr(model, 'pretrained_cfg', None) or {}
    c, h, w = cfg.get('input_size') or (3, 224, 224)
    stem = next((m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d)), c)
    c = getattr(model, 'in_chans', None) or stem  # not all models of older timm say it
    traits_of: Any = getattr(timm.models, 'get_model_traits', lambda model: {})  # since timm 1.0.31
    embed = getattr(model, 'patch_embed', None)
    h, w = traits_of(model).get('img_size') or getattr(embed, 'img_size', None) or (h, w)
    return int(c), int(h), int(w)


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
