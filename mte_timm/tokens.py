"""The auxiliary tokens of MTE (paper section 3.2): Token Enhancing and adaptive pooling.

Owns the modules that turn patch tokens and observers into auxiliary tokens. Knows nothing of the
backbone, of heads or of losses.
"""

from typing import Any, Optional

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from timm.layers import Mlp, trunc_normal_
from torch import nn

__all__ = ['AdaptivePooling', 'PlainPooling', 'TokenEnhancing']


class TokenEnhancing(nn.Module):
    """Token Enhancing module (TEN): auxiliary CLS tokens attend once more to the patch tokens.

    Multi-head cross-attention with the tokens as queries and the patches as keys and values, then an
    MLP per token; pre-norm with residuals. Paper section 3.2.

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
        for m in self.modules():
            if isinstance(m, nn.Linear):
                trunc_normal_(m.weight, std=0.02)
                nn.init.zeros_(m.bias)

    def forward(self, tokens: torch.Tensor, patches: torch.Tensor) -> torch.Tensor:
        """Enhances ``tokens`` (B, n_cls, D) with ``patches`` (B, N, D); returns (B, n_cls, D)."""
        q = rearrange(self.q(self.norm_q(tokens)), 'b n (h d) -> b h n d', h=self.num_heads)
        k, v = rearrange(self.kv(self.norm_kv(patches)), 'b n (two h d) -> two b h n d', two=2, h=self.num_heads)
        x = F.scaled_dot_product_attention(q, k, v)
        tokens = tokens + self.proj(rearrange(x, 'b h n d -> b n (h d)'))
        return tokens + self.mlp(self.norm(tokens))


class CrossCorrelation(torch.autograd.Function):
    """Depth-wise cross-correlation of two maps: R[u, v] = sum over s of z[s] y[s + (u, v) - radius].

    Forward is a grouped convolution of y with z as its kernel. By autograd its backward would be two convolutions with
    kernels as large as the maps; they equal depth-wise convolutions with the gradient of R as a small kernel, which
    are several times faster.
    """

    @staticmethod
    def forward(ctx: Any, z: torch.Tensor, y: torch.Tensor, radius: int) -> torch.Tensor:
        """z (C, H, W), y (C, H, W) -> (C, 2 * radius + 1, 2 * radius + 1)."""
        ctx.save_for_backward(z, y)
        ctx.radius = radius
        return _depthwise(y, z, radius)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Optional[torch.Tensor], Optional[torch.Tensor], None]:
        z, y = ctx.saved_tensors
        needs_z, needs_y, _ = ctx.needs_input_grad
        grad_z = _depthwise(y, grad, ctx.radius) if needs_z else None
        grad_y = _depthwise(z, grad.flip(-2, -1), ctx.radius) if needs_y else None
        return grad_z, grad_y, None


def _depthwise(x: torch.Tensor, kernels: torch.Tensor, padding: int) -> torch.Tensor:
    """Channels of x (C, H, W), each with its own kernel of (C, h, w)."""
    return F.conv2d(x.unsqueeze(0), kernels.unsqueeze(1), padding=padding, groups=len(x)).squeeze(0)


class AdaptivePooling(nn.Module):
    r"""Adaptively pooled tokens, paper eq. 2: :math:`p_i = \mathrm{mean}_s(W_i \odot z)`.

    :math:`W_i = DW_i(PW(z))` with a point-wise convolution PW and one depth-wise convolution for each
    token, each with its own initialisation: a weight for every position and channel, not normalised.
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

    def _correlation(self, z: torch.Tensor, y: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """N times R of the class docstring: (B, N, D), (B, N, D) -> (D, B, kernel_size * kernel_size)."""
        b, _, d = z.shape
        maps = (t.to(y.dtype).permute(2, 0, 1).reshape(d * b, *grid) for t in (z, y))
        return CrossCorrelation.apply(*maps, self.kernel_size // 2).view(d, b, -1)

    def forward(self, z: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """Pools patches ``z`` (B, H*W, D) of a grid (H, W) into tokens (B, n_pool, D)."""
        convs: Any = self.dw
        kernels = torch.stack([dw.weight.flatten(1) for dw in convs], dim=1)  # D, n_pool, k * k
        biases = torch.stack([dw.bias for dw in convs])  # n_pool, D
        if self.shared_pointwise:
            r = self._correlation(z, self.pw[0](z), grid)
            p = torch.bmm(kernels.to(r.dtype), r.mT)  # D, n_pool, B
        else:
            r = torch.stack([self._correlation(z, pw(z), grid) for pw in self.pw], dim=1)
            p = einsum(kernels.to(r.dtype), r, 'd i u, d i b u -> d i b')
        return (p / z.shape[1]).permute(2, 1, 0) + biases.to(r.dtype) * z.mean(dim=1, keepdim=True).to(r.dtype)

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
