"""Attention in which some tokens are observers: they see the sequence, and the sequence never sees them.

Owns the mask of MTE (paper section 3.4, Fig. 4) and the two calls that compute it without one. Knows nothing of models.
"""

from typing import Any, Optional

import torch
import torch.nn.functional as F

__all__ = ['ObserverMask', 'attend', 'observer_mask']

MAX_MASKS = 64
_masks: dict[Any, 'ObserverMask'] = {}


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, num_own: int, num_hidden: int = 0, **kwargs: Any
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
    own, observers, seen = slice(num_own), slice(num_own, None), slice(num_hidden, None)
    outputs = (
        F.scaled_dot_product_attention(query[..., own, :], key[..., own, :], value[..., own, :], **kwargs),
        F.scaled_dot_product_attention(query[..., observers, :], key[..., seen, :], value[..., seen, :], **kwargs),
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
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
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
    query: Any,
    key: Any,
    value: Any,
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
    num_own: int, num_observers: int, num_hidden: int = 0, device: Optional[torch.device] = None
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
