"""The auxiliary tokens of MTE (paper section 3.2): Token Enhancing and adaptive pooling of patch tokens.

Knows nothing of backbones, heads or losses.
"""

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Optional

import torch
import torch.nn.functional as F
from einops import rearrange
from timm.layers import Mlp, trunc_normal_
from torch import nn
from torch.autograd.function import once_differentiable

__all__ = ['AdaptivePooling', 'PlainPooling', 'TokenEnhancing']

for _t in (torch.empty(1), nn.Parameter(torch.empty(1))):
    rearrange(_t, 'a -> a')  # einops registers a type on its first use, for which torch.compile would compile twice


def without_autocast(x: torch.Tensor) -> AbstractContextManager[Any]:
    """Turns autocast off where ``x`` is, if there is such a thing there."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()


class TokenEnhancing(nn.Module):
    """Token Enhancing module (TEN): auxiliary CLS tokens attend once more to the patch tokens. Paper section 3.2.

    Multi-head cross-attention with the tokens as queries, then an MLP per token; pre-norm with residuals.

    Args:
        dim: Width of the tokens.
        num_heads: Attention heads, the backbone's own count.
        mlp_ratio: Hidden width of the MLP over ``dim``.
    """

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float = 4.0) -> None:
        super().__init__()
        self.num_heads = num_heads
        attn_dim = dim // num_heads * num_heads
        self.norm_q = nn.LayerNorm(dim)
        self.norm_kv = nn.LayerNorm(dim)
        self.q = nn.Linear(dim, attn_dim)
        self.kv = nn.Linear(dim, 2 * attn_dim)
        self.proj = nn.Linear(attn_dim, dim)
        self.norm = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.init_weights()

    def init_weights(self) -> None:
        """Initializes all parameters anew, as timm's blocks begin."""
        for m in self.modules():
            if isinstance(m, nn.Linear):
                trunc_normal_(m.weight, std=0.02)
                nn.init.zeros_(m.bias)
            elif isinstance(m, nn.LayerNorm):
                m.reset_parameters()

    def forward(self, tokens: torch.Tensor, patches: torch.Tensor) -> torch.Tensor:
        """Enhances ``tokens`` (B, n_cls, D) with ``patches`` (B, N, D); returns (B, n_cls, D)."""
        q, z = self.q(self.norm_q(tokens)), self.norm_kv(patches)
        (n, dim), num_patches = tokens.shape[1:], z.shape[1]
        cheaper = len(z) > 0 and n * (dim + self.num_heads * num_patches) < num_patches * (dim + n)
        plain = type(self.kv) is nn.Linear and not (self.kv._forward_hooks or self.kv._forward_pre_hooks)
        x = self._attend_to_patches(q, z) if cheaper and plain else self._attend_to_projections(q, z)
        tokens = tokens + self.proj(x)
        return tokens + self.mlp(self.norm(tokens))

    def _attend_to_projections(self, q: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        """Attention as usual: keys and values of every patch. (B, n_cls, A), (B, N, D) -> (B, n_cls, A)."""
        q = rearrange(q, 'b n (h d) -> b h n d', h=self.num_heads)
        k, v = rearrange(self.kv(z), 'b n (two h d) -> two b h n d', two=2, h=self.num_heads)
        return rearrange(F.scaled_dot_product_attention(q, k, v), 'b h n d -> b n (h d)')

    def _attend_to_patches(self, q: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        """The same for few tokens, with key and value projections on their side, which costs less.

        A score is q (W z) = (W^T q) z, so each head's queries go to the patches' space, where patches are keys and
        values of all heads; a weighted mean of projections is the projection of the weighted mean. The keys' bias adds
        the same to all scores of a query, so softmax removes it; weights sum to 1, so the values' bias is added once.
        """
        heads, dtype = self.num_heads, torch.promote_types(q.dtype, torch.float32)  # an extra rounding would be visible
        with without_autocast(q):
            to_k, to_v = rearrange(self.kv.weight.to(dtype), '(two h d) c -> two h d c', two=2, h=heads)
            z = z.to(dtype).unsqueeze(1)
            queries = torch.bmm(rearrange(q.to(dtype), 'b n (h d) -> h (b n) d', h=heads), to_k)
            queries = rearrange(queries, 'h (b n) c -> b 1 (h n) c', b=len(z))
            x = F.scaled_dot_product_attention(queries, z, z, scale=to_k.shape[1] ** -0.5)
            x = torch.bmm(rearrange(x, 'b 1 (h n) c -> h (b n) c', h=heads), to_v.mT)
            x = rearrange(x, 'h (b n) d -> b n (h d)', b=len(z)) + self.kv.bias.chunk(2)[1].to(dtype)
        return x.to(q.dtype)


class CorrelationPooling(torch.autograd.Function):
    """Contraction of kernels with a cross-correlation of two maps, for each channel c and image b:

    p[c, i, b] = sum over u, v of K_i[c, u, v] R[c, b, u, v],
    R[c, b, u, v] = sum over s of z[c, b, s] y[c, b, s + (u, v) - radius].

    R is a grouped convolution of y with z as its kernel. Autograd's backward of that would be two convolutions with
    kernels as large as the maps; depth-wise convolutions with the gradient of R as a small kernel give the same several
    times faster. There is no second derivative.
    """

    generate_vmap_rule = True  # for torch.func

    @staticmethod
    def forward(z: torch.Tensor, y: torch.Tensor, kernels: torch.Tensor, radius: int) -> Any:
        """z, y (D, B, H, W), kernels (D, n, (2 * radius + 1)^2) -> (D, n, B) in the dtype of the kernels, and R."""
        r = _depthwise(y, z, radius).flatten(2)
        return torch.bmm(kernels, r.mT.to(kernels.dtype)), r

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        z, y, kernels, ctx.radius = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(z, y, kernels, output[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor, _: Any) -> tuple[Optional[torch.Tensor], ...]:
        z, y, kernels, r = ctx.saved_tensors
        needs_z, needs_y, needs_kernels, _ = ctx.needs_input_grad
        side = 2 * ctx.radius + 1
        grad_z = grad_y = grad_kernels = None
        with without_autocast(z):
            grad = grad.contiguous()  # products of strided matrices are computed one by one
            if needs_kernels:
                grad_kernels = torch.bmm(grad, r.to(grad.dtype))
            if needs_z or needs_y:
                grad_r = torch.bmm(grad.mT, kernels).to(r.dtype).view(*z.shape[:2], side, side)
                grad_z = _depthwise(y, grad_r, ctx.radius) if needs_z else None
                grad_y = _depthwise(z, grad_r.flip(-2, -1), ctx.radius) if needs_y else None
        return grad_z, grad_y, grad_kernels, None


def _depthwise(x: torch.Tensor, kernels: torch.Tensor, padding: int) -> torch.Tensor:
    """Maps x (D, B, H, W), each with its own kernel of (D, B, h, w)."""
    if not x.shape[1]:  # no images
        size = (n + 2 * padding - k + 1 for n, k in zip(x.shape[-2:], kernels.shape[-2:]))
        return x.new_zeros(*x.shape[:2], *size)
    channels, weight = x.flatten(0, 1).unsqueeze(0), kernels.flatten(0, 1).unsqueeze(1)
    out = F.conv2d(channels, weight, padding=padding, groups=len(weight))
    return out.view(*x.shape[:2], *out.shape[-2:])


class AdaptivePooling(nn.Module):
    r"""Adaptively pooled tokens, paper eq. 2: :math:`p_i = \mathrm{mean}_s(W_i \odot z)`.

    :math:`W_i = DW_i(PW(z))` with a point-wise convolution PW and one depth-wise convolution for each
    token, each with its own initialization: a weight for every position and channel, not normalized.
    The kernel is that of Conv2Former (https://arxiv.org/abs/2211.11943).

    ``forward`` never makes the maps :math:`W_i`. With y = PW(z) and K_i the kernel of DW_i,

    .. math:: p_i[c] = \sum_d K_i[c, d] \, R[c, d], \qquad R[c, d] = \frac{1}{N} \sum_s z[s, c] \, y[s + d, c]

    (plus bias times the mean of z): one cross-correlation of two feature maps, shared by all tokens, then
    a small contraction. The algebra is exact; :meth:`weight_maps` gives the maps themselves.

    Args:
        dim: Width of the tokens.
        n_pool: Number of pooled tokens.
        kernel_size: Side of the depth-wise kernels, odd.
        shared_pointwise: One point-wise convolution for all tokens, or one for each.
    """

    def __init__(self, dim: int, n_pool: int, kernel_size: int = 11, shared_pointwise: bool = True) -> None:
        super().__init__()
        self.n_pool, self.kernel_size, self.shared_pointwise = n_pool, kernel_size, shared_pointwise
        self.pw = nn.ModuleList(nn.Linear(dim, dim) for _ in range(1 if shared_pointwise else n_pool))
        self.dw = nn.ModuleList(
            nn.Conv2d(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim) for _ in range(n_pool)
        )

    def forward(self, z: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """Pools patches ``z`` (B, H*W, D) of a grid (H, W) into tokens (B, n_pool, D)."""
        b, n, d = z.shape
        convs: Any = self.dw
        kernels = torch.stack([dw.weight.flatten(1) for dw in convs], dim=1)  # D, n_pool, k * k
        biases = torch.stack([dw.bias for dw in convs])  # n_pool, D
        groups = [kernels] if self.shared_pointwise else torch.split(kernels, 1, dim=1)
        projected = [pw(z) for pw in self.pw]
        dtype = projected[0].dtype
        full = torch.promote_types(dtype, torch.float32)  # the small sums are not worth a rounding each
        # a sum over all positions can be too large for float16
        shrunk = 2.0 ** -math.ceil(math.log2(n) / 2) if dtype == torch.float16 else 1.0
        maps = (t.to(dtype) if shrunk == 1.0 else t.to(dtype) * shrunk for t in (z, *projected))
        z_map, *y_maps = (t.permute(2, 0, 1).reshape(d, b, *grid) for t in maps)
        with without_autocast(z):
            pooled = [
                CorrelationPooling.apply(z_map, y, k.to(full), self.kernel_size // 2)[0] for y, k in zip(y_maps, groups)
            ]
        p = torch.cat(pooled, dim=1) if len(pooled) > 1 else pooled[0]
        return (p.permute(2, 1, 0) / (n * shrunk**2) + biases.to(full) * z.mean(dim=1, keepdim=True, dtype=full)).to(
            dtype
        )

    def weight_maps(self, z: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """The maps W_i for patches ``z`` (B, H*W, D), as (B, n_pool, D, H, W): for looking at, and as reference."""
        b, _, d = z.shape
        y = [pw(z).transpose(1, 2).reshape(b, d, *grid) for pw in self.pw]
        return torch.stack([dw(y[0 if self.shared_pointwise else i]) for i, dw in enumerate(self.dw)], dim=1)

    def extra_repr(self) -> str:
        k = self.kernel_size
        return f'n_pool={self.n_pool}, kernel={k}x{k}, shared_pointwise={self.shared_pointwise}'


class PlainPooling(nn.Module):
    """One pooled token without weights: the ``avg`` and ``max`` rows of the paper's Tab. 15."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        self.mode = mode

    def forward(self, z: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """Pools ``z`` (B, N, D) into one token (B, 1, D)."""
        return z.mean(dim=1, keepdim=True) if self.mode == 'avg' else z.amax(dim=1, keepdim=True)

    def extra_repr(self) -> str:
        return self.mode
