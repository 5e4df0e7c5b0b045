"""Attention in which some tokens are observers: they see the sequence, and the sequence never sees them.

Owns the mask of MTE (paper section 3.4, Fig. 4) and the two calls that compute it without one. Knows nothing of models.
"""

from collections.abc import Callable, Sequence
from typing import Any, Optional

import torch
import torch.nn.functional as F

__all__ = ['ObserverMask', 'attend', 'observer_mask']

MAX_MASKS = 64
_masks: dict[Any, 'ObserverMask'] = {}


class OverlappingSlices(torch.autograd.Function):
    """``x[..., :own, :]`` and ``x[..., hidden:, :]``, with ``hidden <= own``; where they overlap, gradients add.

    Two plain slices would each get a full-size gradient padded with zeros. This gradient has the heads inside, as
    attention kernels leave it in memory and the layer before wants it.
    """

    generate_vmap_rule = True  # for torch.func

    @staticmethod
    def forward(x: torch.Tensor, own: int, hidden: int) -> tuple[torch.Tensor, torch.Tensor]:
        return x[..., :own, :], x[..., hidden:, :]

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.bounds = inputs[1:]

    @staticmethod
    def backward(ctx: Any, first: torch.Tensor, second: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        own, hidden = ctx.bounds
        first, second = first.transpose(-2, -3), second.transpose(-2, -3)
        grad = torch.cat([first, second[..., own - hidden :, :, :]], dim=-3)
        if own > hidden:
            grad[..., hidden:own, :, :] += second[..., : own - hidden, :, :]
        return grad.transpose(-2, -3), None, None


def attend(
    query: torch.Tensor,  # B, num_heads, L, head_dim
    key: torch.Tensor,
    value: torch.Tensor,
    num_own: int,
    num_hidden: int = 0,
    **kwargs: Any,
) -> torch.Tensor:
    """``scaled_dot_product_attention`` where all tokens but the first ``num_own`` are observers.

    Own tokens attend to own tokens. Observers attend to each other and to the own tokens but the first ``num_hidden``.
    Attention splits exactly into these two calls, so fused kernels run, and the own tokens are bit-identical to those
    of a run without observers.

    Args:
        query: (B, num_heads, L, head_dim).
        key: Likewise.
        value: Likewise.
        num_own: The model's own tokens, which come first.
        num_hidden: How many of the first own tokens observers don't see.
        kwargs: ``dropout_p``, ``scale``, ... for both calls.

    Returns:
        (B, num_heads, L, head_dim).
    """
    own_query, observer_query = OverlappingSlices.apply(query, num_own, num_own)
    own_key, seen_key = OverlappingSlices.apply(key, num_own, num_hidden)
    own_value, seen_value = OverlappingSlices.apply(value, num_own, num_hidden)
    outputs = (
        F.scaled_dot_product_attention(own_query, own_key, own_value, **kwargs),
        F.scaled_dot_product_attention(observer_query, seen_key, seen_value, **kwargs),
    )
    # joined with the heads inside, as the kernels leave them in memory and the next layer wants them
    return torch.cat([out.transpose(-2, -3) for out in outputs], dim=-3).transpose(-2, -3)


class ObserverMask(torch.Tensor):
    """An attention mask that knows that its last tokens are observers; see :func:`observer_mask`.

    Given to ``F.scaled_dot_product_attention``, it is answered by :func:`attend`. Under any other operation it is the
    dense bool tensor; added to scores, as timm's unfused attention does, it is minus infinity where attention is not
    allowed. The precedent is ``torch.nn.attention.bias.CausalBias``.
    """

    num_own: int
    num_hidden: int

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Optional[dict[str, Any]] = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return _answer(*args, **kwargs)
        with torch._C.DisableTorchFunctionSubclass():  # results are plain tensors
            if func in (torch.add, torch.Tensor.add, torch.Tensor.__add__, torch.Tensor.__radd__):
                # older timm adds a bool mask as it is, which would let everything through
                scores, mask = args if isinstance(args[1], ObserverMask) else args[::-1]
                return scores.masked_fill(~mask, float('-inf'))
            return func(*args, **kwargs)


def _answer(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: ObserverMask,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **kwargs: Any,
) -> torch.Tensor:
    """:func:`attend` with the signature of ``F.scaled_dot_product_attention``."""
    if is_causal:
        raise ValueError('is_causal=True: an ObserverMask already says who sees whom; call without it')
    return attend(query, key, value, attn_mask.num_own, attn_mask.num_hidden, dropout_p=dropout_p, **kwargs)


def observer_mask(
    num_own: int,
    num_observers: int,
    num_hidden: int = 0,
    device: Optional[torch.device] = None,
) -> ObserverMask:
    """Mask for ``num_own`` tokens followed by ``num_observers`` observers.

    >>> observer_mask(3, 2, num_hidden=1).int()
    tensor([[1, 1, 1, 0, 0],
            [1, 1, 1, 0, 0],
            [1, 1, 1, 0, 0],
            [0, 1, 1, 1, 1],
            [0, 1, 1, 1, 1]], dtype=torch.int32)

    Args:
        num_own: Tokens of the model itself, which come first.
        num_observers: Tokens that come after them and that only observers see.
        num_hidden: How many of the first own tokens observers don't see.
        device: Where the dense form lives.

    Returns:
        Bool mask (num_own + num_observers, num_own + num_observers), True = may attend. The same arguments give the
        same object: don't write to it.
    """
    if torch.compiler.is_compiling():
        return _build(num_own, num_observers, num_hidden, device)
    key = (num_own, num_observers, num_hidden, device)
    if key not in _masks:
        mask = _build(num_own, num_observers, num_hidden, device)
        if type(mask) is not ObserverMask or mask.is_inference():  # of no use to later calls
            return mask
        if len(_masks) >= MAX_MASKS:
            _masks.clear()
        _masks[key] = mask
    return _masks[key]


def _build(num_own: int, num_observers: int, num_hidden: int, device: Optional[torch.device]) -> ObserverMask:
    dense = torch.ones(num_own + num_observers, num_own + num_observers, dtype=torch.bool, device=device)
    dense[:num_own, num_own:] = False
    dense[num_own:, :num_hidden] = False
    if type(dense) is not torch.Tensor:  # a fake tensor has no room for a subclass; dense, it means the same
        return dense  # type: ignore[return-value]
    mask = torch.Tensor._make_subclass(ObserverMask, dense)
    mask.num_own, mask.num_hidden = num_own, num_hidden
    return mask
