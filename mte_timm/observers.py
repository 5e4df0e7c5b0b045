"""Observers: tokens that see the sequence and that the sequence never sees.

Owns the attention mask of MTE (paper section 3.4, Fig. 4) and how it is computed without a mask.
Knows nothing of models, blocks or heads; `backbones/` hands the mask to timm's blocks.
"""

from collections.abc import Callable, Sequence
from typing import Any, Optional

import torch
import torch.nn.functional as F

__all__ = ['ObserverMask', 'observer_mask']

ADDITIONS = (torch.add, torch.Tensor.add, torch.Tensor.__add__, torch.Tensor.__radd__)


class OverlappingSlices(torch.autograd.Function):
    """``x[..., :own, :]`` and ``x[..., hidden:, :]``, with ``hidden <= own``; where they overlap gradients add.

    Two slices would do the same, each with a full-size gradient of zeros around its own. The gradient has the heads
    inside, as the kernels of attention leave it in memory and the layer before wants it.
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


class ObserverMask(torch.Tensor):
    """An attention mask that knows that its last tokens are observers.

    The sequence is ``num_own`` of the model's own tokens followed by observers. Own tokens attend to
    own tokens only. Observers attend to each other and to every own token but the first ``num_hidden``
    (the class token). For ``num_own=4``, two observers and ``num_hidden=1`` the dense equivalent,
    with 1 where attention is allowed, is

    .. code-block:: text

        [[1, 1, 1, 1, 0, 0],
         [1, 1, 1, 1, 0, 0],
         [1, 1, 1, 1, 0, 0],
         [1, 1, 1, 1, 0, 0],
         [0, 1, 1, 1, 1, 1],
         [0, 1, 1, 1, 1, 1]]

    A mask of this shape needs no mask: attention splits exactly into own queries over own keys and
    observer queries over the keys from ``num_hidden`` on, two contiguous slices. So
    ``F.scaled_dot_product_attention`` with this mask is answered by two calls without one, which fused
    kernels accept and which leave the own tokens bit-identical to a run without observers. Under any
    other operation it is the dense bool tensor above; added to scores, as timm's unfused attention does,
    it is minus infinity where attention is not allowed.

    Built by :func:`observer_mask`; the precedent is ``torch.nn.attention.bias.CausalBias``.
    """

    num_own: int
    num_hidden: int

    @staticmethod
    def attend(
        query: torch.Tensor,  # B, num_heads, num_own + num_observers, head_dim
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: 'ObserverMask',
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **kwargs: Any,
    ) -> torch.Tensor:
        """``scaled_dot_product_attention`` under the mask, as two calls without a mask.

        Raises:
            ValueError: with ``is_causal``, which contradicts the mask.
        """
        if is_causal:
            raise ValueError('an ObserverMask already says who sees whom: call without is_causal=True')
        own, hidden = attn_mask.num_own, attn_mask.num_hidden
        own_query, observer_query = OverlappingSlices.apply(query, own, own)
        own_key, seen_key = OverlappingSlices.apply(key, own, hidden)
        own_value, seen_value = OverlappingSlices.apply(value, own, hidden)
        outputs = (
            F.scaled_dot_product_attention(own_query, own_key, own_value, dropout_p=dropout_p, **kwargs),
            F.scaled_dot_product_attention(observer_query, seen_key, seen_value, dropout_p=dropout_p, **kwargs),
        )
        # joined with the heads inside, as the kernels leave them in memory and the next layer wants them
        return torch.cat([out.transpose(-2, -3) for out in outputs], dim=-3).transpose(-2, -3)

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
            return cls.attend(*args, **kwargs)
        with torch._C.DisableTorchFunctionSubclass():  # results are plain tensors
            if func in ADDITIONS:  # a bool mask added as it is, by older timm, would let all through
                scores, mask = args if isinstance(args[1], ObserverMask) else args[::-1]
                return scores.masked_fill(~mask, float('-inf'))
            return func(*args, **kwargs)


def observer_mask(
    num_own: int,
    num_observers: int,
    num_hidden: int = 0,
    device: Optional[torch.device] = None,
) -> ObserverMask:
    """Mask for ``num_own`` tokens followed by ``num_observers`` observers.

    >>> observer_mask(3, 1, num_hidden=1).int()
    tensor([[1, 1, 1, 0],
            [1, 1, 1, 0],
            [1, 1, 1, 0],
            [0, 1, 1, 1]], dtype=torch.int32)

    Args:
        num_own: Tokens of the model itself, which come first.
        num_observers: Tokens that come after them and that only observers see.
        num_hidden: How many of the first own tokens observers don't see.
        device: Where the dense form lives.

    Returns:
        Bool mask of shape (num_own + num_observers, num_own + num_observers), True = may attend. One and the same
        for the same arguments: don't write to it.
    """
    if torch.compiler.is_compiling():
        return _build(num_own, num_observers, num_hidden, device)
    key = (num_own, num_observers, num_hidden, device)
    if key not in _masks:
        mask = _build(num_own, num_observers, num_hidden, device)
        if type(mask) is not ObserverMask or mask.is_inference():  # not for every later use
            return mask
        if len(_masks) >= MOST_MASKS:
            _masks.clear()
        _masks[key] = mask
    return _masks[key]


MOST_MASKS = 64
_masks: dict[Any, ObserverMask] = {}


def _build(num_own: int, num_observers: int, num_hidden: int, device: Optional[torch.device]) -> ObserverMask:
    dense = torch.ones(num_own + num_observers, num_own + num_observers, dtype=torch.bool, device=device)
    dense[:num_own, num_own:] = False
    dense[num_own:, :num_hidden] = False
    if type(dense) is not torch.Tensor:  # a fake one has no room for a subclass; dense it means the same
        return dense  # type: ignore[return-value]
    mask = torch.Tensor._make_subclass(ObserverMask, dense)
    mask.num_own, mask.num_hidden = num_own, num_hidden
    return mask
