"""Projection heads of the auxiliary tokens (paper sections 3.3 and 3.5).

Owns how tokens become one fused output: an own projection each, their mean, shared prototypes. Knows nothing of where
tokens come from, or of losses.
"""

from collections.abc import Callable
from typing import Any, Optional

import torch
from timm.layers import trunc_normal_
from torch import nn
from torch.nn.parameter import is_lazy

from .utils import evaluating

__all__ = ['AuxiliaryHeads', 'make_heads', 'prototypes_of', 'reset']

HeadFactory = Callable[[int], nn.Module]
PROTOTYPES = 'last_layer'  # the name that DINO, iBOT and lightly give to the prototype layer


class AuxiliaryHeads(nn.ModuleList):
    """Heads of the auxiliary tokens, fused by their mean (paper eq. 3).

    Args:
        heads: One head for each token, or a single one that all tokens share.
        num_tokens: Number of auxiliary tokens.
    """

    def __init__(self, heads: list[nn.Module], num_tokens: int) -> None:
        super().__init__(heads)
        self.num_tokens = num_tokens

    def forward(self, tokens: torch.Tensor, prototypes: Optional[nn.Module] = None) -> torch.Tensor:
        """Fuses ``tokens`` (B, n, D) into one output (B, K).

        Args:
            tokens: Auxiliary tokens.
            prototypes: Prototype layer for the fused projection; it belongs to the global head.
        """
        fused = self.project(tokens).mean(dim=0)
        return fused if prototypes is None else prototypes(fused)

    def project(self, tokens: torch.Tensor) -> torch.Tensor:
        """Each of ``tokens`` (B, n, D) by its own head, (n, B, K).

        Raises:
            TypeError: a head returns something other than a tensor.
        """
        shared = len(self) == 1  # one call over all tokens
        inputs = [tokens.flatten(0, 1)] if shared else tokens.unbind(1)
        outputs: list[Any] = [head(t) for head, t in zip(self, inputs)]
        if not isinstance(outputs[0], torch.Tensor):
            name, given = type(self[0]).__name__, type(outputs[0]).__name__
            raise TypeError(f'head: {name} returns a {given}; return the one tensor that the loss compares')
        if not shared:
            return torch.stack(outputs)
        return outputs[0].reshape(*tokens.shape[:2], *outputs[0].shape[1:]).transpose(0, 1)


class LinearHead(nn.Linear):
    """A classifier, or the way to the width of the plain model's features."""

    def reset_parameters(self) -> None:
        trunc_normal_(self.weight, std=0.02)
        nn.init.zeros_(self.bias)


def make_heads(
    num_tokens: int,
    dim: int,
    out_dim: int,
    head: Optional[HeadFactory] = None,
    num_classes: int = 0,
    independent: bool = True,
    aux_head: Optional[HeadFactory] = None,
) -> tuple[Optional[nn.Module], AuxiliaryHeads]:
    """The global head, if there is a ``head``, and the heads of the auxiliary tokens.

    Auxiliary heads that end in a prototype layer ``last_layer`` leave theirs out: the global head's is for all. Without
    a factory they are classifiers (paper eq. 7) if the model classifies; else nothing or, where the model's features
    are wider than its map, a linear layer.

    Args:
        num_tokens: Number of auxiliary tokens.
        dim: Their width.
        out_dim: Width of the plain model's features, which the global head takes.
        head: Width -> head, of the global and of each auxiliary token.
        num_classes: Classes of the plain model, 0 for none.
        independent: A head for each token, or one for all (paper Tab. 2 and 14).
        aux_head: Width -> head of an auxiliary token, where the global token has its own elsewhere.
    """
    made: list[nn.Module] = []
    global_head = None if head is None else _call(head, out_dim, made)
    count, factory = num_tokens if independent else 1, aux_head or head
    if factory is not None:
        heads = [_projection(factory, dim, made) for _ in range(count)]
    elif num_classes or dim != out_dim:
        heads = [LinearHead(dim, num_classes or out_dim) for _ in range(count)]
    else:
        heads = [nn.Identity() for _ in range(count)]
    return global_head, AuxiliaryHeads(heads, num_tokens)


def prototypes_of(head: Optional[nn.Module]) -> Optional[nn.Module]:
    """The prototype layer of ``head``, if it has one."""
    layer = getattr(head, PROTOTYPES, None)
    return layer if isinstance(layer, nn.Module) else None


def reset(module: nn.Module) -> None:
    """Initializes ``module`` anew, each part by its own ``init_weights`` or ``reset_parameters``."""
    for name in ('init_weights', 'reset_parameters'):
        if callable(initialize := getattr(module, name, None)):
            initialize()
            return
    for part in module.children():
        reset(part)


def _projection(factory: HeadFactory, dim: int, made: list[nn.Module]) -> nn.Module:
    """A head without its prototype layers, if it ends in one: what is left projects to the bottleneck.

    Raises:
        ValueError: the head has a ``last_layer`` that is not the last thing it does.
    """
    head = _call(factory, dim, made)
    prototypes = prototypes_of(head)
    if prototypes is None:
        return head
    names = [name for name in (PROTOTYPES, f'{PROTOTYPES}2') if hasattr(head, name)]  # iBOT's second is for patches
    checks = not any(isinstance(m, nn.SyncBatchNorm) for m in head.modules())  # which runs in a process group only
    like = next(head.parameters())
    x = torch.linspace(-1, 1, 2 * dim, device=like.device, dtype=like.dtype).view(2, dim)
    with torch.no_grad(), evaluating(head):
        expected = head(x) if checks else x
        for name in names:
            setattr(head, name, nn.Identity())
        try:
            same = not checks or x.is_meta or torch.allclose(prototypes(head(x)), expected, rtol=1e-3, atol=1e-5)
        except Exception:
            same = False
    if not same:
        raise ValueError(
            f'head: {type(head).__name__} has a last_layer, which would be shared as its prototype layer, but it is '
            'not the last thing that the head does; move what follows into the loss, or give the layer another name '
            'to have one in each head'
        )
    return head


def _call(factory: HeadFactory, dim: int, made: list[nn.Module]) -> nn.Module:
    """A new head, which joins ``made``."""
    head = factory(dim)
    if not isinstance(head, nn.Module):
        raise TypeError(
            f'head: the callable must return an nn.Module, e.g. head=lambda dim: MyHead(dim), got {type(head).__name__}'
        )
    if any(head is other for other in made):
        raise TypeError(
            f'head: the callable returned the same {type(head).__name__} twice; every token needs a head of its own, '
            'so make it in the callable, e.g. head=lambda dim: MyHead(dim)'
        )
    if any(map(is_lazy, head.parameters())):
        raise ValueError(
            'head: has lazy layers, which student and teacher would initialize apart; give them their input widths'
        )
    made.append(head)
    return head
