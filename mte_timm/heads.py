"""Projection heads of the auxiliary tokens (paper sections 3.3 and 3.5).

Owns how tokens become one fused output: an own projection each, their mean, shared prototypes. Knows
nothing of where tokens come from or of losses.
"""

from collections.abc import Callable
from typing import Any, Optional

import torch
from timm.layers import trunc_normal_
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from .backbones.base import evaluating

__all__ = ['AuxiliaryHeads', 'make_heads', 'prototypes_of']

PROTOTYPES = 'last_layer'  # the name that DINO, iBOT and lightly give to the prototype layer


class AuxiliaryHeads(nn.ModuleList):
    """Heads of the auxiliary tokens, fused by their mean (paper eq. 3).

    Heads that are alike can run as one head over stacked weights, by batched products: the same parameters under the
    same names, the same gradients, each head its own batch statistics. That saves launches on a GPU. On a CPU it costs
    more than a loop, and stacked batch norms were not tried on a GPU, so in these cases heads run one by one unless
    ``batched`` is set.

    Args:
        heads: One head for each token, or a single one that all tokens share (``num_tokens`` then says
            for how many).
        num_tokens: Number of auxiliary tokens.
    """

    batched: Optional[bool] = None
    """Whether heads that are alike run as one; None: where tokens are not on the CPU and heads have no batch norm."""

    def __init__(self, heads: list[nn.Module], num_tokens: int) -> None:
        super().__init__(heads)
        self.num_tokens = num_tokens
        self.alike = _alike(self)

    def forward(self, tokens: torch.Tensor, prototypes: Optional[nn.Module] = None) -> torch.Tensor:
        """Fuses ``tokens`` (B, n, D) into one output (B, K).

        Args:
            tokens: Auxiliary tokens.
            prototypes: Prototype layer for the fused projection; it belongs to the global head.
        """
        fused = self.project(tokens).mean(dim=0)
        return fused if prototypes is None else prototypes(fused)

    def project(self, tokens: torch.Tensor) -> torch.Tensor:
        """Each of ``tokens`` (B, n, D) by its own head, (n, B, K)."""
        if len(self) == 1:  # shared: one call over all tokens
            return self[0](tokens.flatten(0, 1)).unflatten(0, tokens.shape[:2]).transpose(0, 1)
        if self._runs_as_one(tokens):
            return _run_as_one(self, tokens)
        return torch.stack([head(t) for head, t in zip(self, tokens.unbind(1))])

    def _runs_as_one(self, tokens: torch.Tensor) -> bool:
        """Whether the heads, alike when they were made, are so still; what conversions, modes and hooks change."""
        if not self.alike or self.batched is False or (self.batched is None and tokens.device.type == 'cpu'):
            return False
        first, *others = ([type(m) for m in head.modules()] for head in self)
        modules = list(self.modules())[1:]
        return (
            all(types == first for types in others)
            and all(t in PLAIN for t in first[1:])
            and (self.batched is True or not any(issubclass(t, _BatchNorm) for t in first))
            and all(m.training == self.training for m in modules)
            and not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in modules)
            and all(p.dtype not in (torch.float16, torch.bfloat16) for p in self.parameters())
        )


PLAIN = (nn.Linear, nn.LayerNorm, nn.BatchNorm1d, nn.Identity, nn.GELU, nn.ReLU, nn.SiLU, nn.Sequential)


def _alike(heads: nn.ModuleList) -> bool:
    """Whether heads differ in the values of their parameters alone, and are of layers that run stacked.

    A head of another class counts where its layers do: what its forward does between them, such as normalising,
    is done for each head separately anyhow. Stacked layers add their bias on its own, which with weights in half
    precision would round once more.
    """

    def shape(head: nn.Module) -> list[Any]:
        tensors = ((n, t.shape, t.dtype) for n, t in (*head.named_parameters(), *head.named_buffers()))
        return [*tensors, *((n, type(m), m.extra_repr()) for n, m in head.named_modules())]

    first = next(iter(heads))
    own = (*first.parameters(recurse=False), *first.buffers(recurse=False))
    if any(type(m) not in PLAIN for m in first.modules() if m is not first) or (type(first) not in PLAIN and own):
        return False
    return all(shape(head) == shape(first) for head in heads)


def _run_as_one(heads: AuxiliaryHeads, tokens: torch.Tensor) -> torch.Tensor:
    """Outputs (n, B, K) of n heads that are alike, for tokens (B, n, D)."""
    first = heads[0]
    parameters = {n: torch.stack([head.get_parameter(n) for head in heads]) for n, _ in first.named_parameters()}
    buffers = {n: torch.stack([head.get_buffer(n) for head in heads]) for n, _ in first.named_buffers()}

    def run(parameters: dict[str, torch.Tensor], buffers: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(first, (parameters, buffers), (x,))

    out = torch.func.vmap(run, in_dims=(0, 0, 1), randomness='different')(parameters, buffers, tokens)
    if first.training:
        with torch.no_grad():
            for name, stacked in buffers.items():
                for head, value in zip(heads, stacked):
                    head.get_buffer(name).copy_(value)
    return out


def make_heads(
    num_tokens: int,
    dim: int,
    out_dim: int,
    factory: Optional[Callable[[int], nn.Module]],
    num_classes: int,
    independent: bool,
    aux_factory: Optional[Callable[[int], nn.Module]] = None,
) -> tuple[Optional[nn.Module], AuxiliaryHeads]:
    """The global head, if there is a ``factory``, and the heads of the auxiliary tokens.

    With a factory every head comes from it. Where its heads end in a prototype layer ``last_layer``, the
    auxiliary heads leave theirs out and use the global head's on their fused projection. Without a factory
    the auxiliary heads are classifiers (paper eq. 7) if the model classifies, else nothing or, where the
    model's features are wider than its map, a linear layer.

    Args:
        num_tokens: Number of auxiliary tokens.
        dim: Their width.
        out_dim: Width of the plain model's features, which the global head takes.
        factory: Width -> head.
        num_classes: Classes of the plain model, 0 for none.
        independent: A head for each token, or one for all (paper Tab. 2 and 14).
        aux_factory: Width -> head of an auxiliary token, where the global token has its own elsewhere.
    """
    count = num_tokens if independent else 1
    factory, aux_factory = (None if f is None else _always_new(f) for f in (factory, aux_factory))
    if aux_factory is not None:
        return None, AuxiliaryHeads([_call(aux_factory, dim) for _ in range(count)], num_tokens)
    if factory is None:
        if num_classes or dim != out_dim:
            return None, AuxiliaryHeads([_linear(dim, num_classes or out_dim) for _ in range(count)], num_tokens)
        return None, AuxiliaryHeads([nn.Identity() for _ in range(count)], num_tokens)
    global_head = _call(factory, out_dim)
    return global_head, AuxiliaryHeads([_projection(factory, dim) for _ in range(count)], num_tokens)


def _projection(factory: Callable[[int], nn.Module], dim: int) -> nn.Module:
    """A head without its prototype layers, if it ends in one: what is left projects to the bottleneck.

    Raises:
        ValueError: the head has a `last_layer` that is not the last thing it does.
    """
    head = _call(factory, dim)
    prototypes = prototypes_of(head)
    if prototypes is None:
        return head
    names = [name for name in (PROTOTYPES, f'{PROTOTYPES}2') if hasattr(head, name)]  # iBOT's second is for patches
    if any(isinstance(m, nn.SyncBatchNorm) for m in head.modules()):  # runs in a process group alone: nothing to check
        for name in names:
            setattr(head, name, nn.Identity())
        return head
    like = next(head.parameters())
    x = torch.linspace(-1, 1, 2 * dim, device=like.device, dtype=like.dtype).view(2, dim)
    with torch.no_grad(), evaluating(head):
        expected = head(x)
        for name in names:
            setattr(head, name, nn.Identity())
        try:
            same = x.is_meta or torch.allclose(prototypes(head(x)), expected, rtol=1e-3, atol=1e-5)
        except Exception as e:
            raise ValueError(_NOT_LAST.format(name=type(head).__name__)) from e
    if not same:
        raise ValueError(_NOT_LAST.format(name=type(head).__name__))
    return head


_NOT_LAST = (
    'head: {name} has a last_layer, which would be shared as its prototype layer, but it is not the last thing '
    'that the head does; move what follows into the loss, or give the layer another name to have one in each head'
)


def prototypes_of(head: Optional[nn.Module]) -> Optional[nn.Module]:
    layer = getattr(head, PROTOTYPES, None)
    return layer if isinstance(layer, nn.Module) else None


def _call(factory: Callable[[int], nn.Module], dim: int) -> nn.Module:
    head = factory(dim)
    if not isinstance(head, nn.Module):
        raise TypeError(
            f'head: the callable must return an nn.Module, e.g. head=lambda dim: MyHead(dim), got {type(head).__name__}'
        )
    return head


def _always_new(factory: Callable[[int], nn.Module]) -> Callable[[int], nn.Module]:
    """``factory``, held to making a head of its own each time."""
    made: list[Any] = []

    def make(dim: int) -> nn.Module:
        head = factory(dim)
        if any(head is other for other in made):
            raise TypeError(
                f'head: the callable returned the same {type(head).__name__} twice; every token needs a head of its '
                'own, so make it in the callable, e.g. head=lambda dim: MyHead(dim)'
            )
        made.append(head)
        return head

    return make


def _linear(dim: int, out_dim: int) -> nn.Linear:
    layer = nn.Linear(dim, out_dim)
    trunc_normal_(layer.weight, std=0.02)
    nn.init.zeros_(layer.bias)
    return layer
