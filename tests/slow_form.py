"""MTE written out slowly and separately: dense mask, direct convolution, loops over tokens.

Shares nothing with the library but the parameters.
"""

from typing import Any, Optional

import torch
import torch.nn.functional as F
import zoo
from timm.models import Cait, Eva, VisionTransformer, Xcit

from mte_timm import MTE


def dense_mask(num_own: int, num_observers: int, num_hidden: int) -> torch.Tensor:
    """Who may attend to whom, pair by pair."""
    n = num_own + num_observers
    mask = torch.zeros(n, n, dtype=torch.bool)
    for query in range(n):
        for key in range(n):
            mask[query, key] = key < num_own if query < num_own else key >= num_hidden
    return mask


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, num_heads: int) -> torch.Tensor:
    """(L, A), (S, A), (S, A) -> (L, A), head by head."""
    heads = []
    for qh, kh, vh in zip(*(t.chunk(num_heads, dim=-1) for t in (q, k, v))):
        heads.append((qh @ kh.T / qh.shape[-1] ** 0.5).softmax(dim=-1) @ vh)
    return torch.cat(heads, dim=-1)


def enhanced(ten: Any, tokens: torch.Tensor, patches: torch.Tensor) -> torch.Tensor:
    out = []
    for t, z in zip(tokens, patches):
        k, v = ten.kv(ten.norm_kv(z)).chunk(2, dim=-1)
        for token in t:
            token = token + ten.proj(attention(ten.q(ten.norm_q(token))[None], k, v, ten.num_heads))[0]
            out.append(token + ten.mlp.fc2(F.gelu(ten.mlp.fc1(ten.norm(token)))))
    return torch.stack(out).view_as(tokens)


def pooled(pool: Any, patches: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Paper eq. 2 as it stands: a full map of weights for each token."""
    b, _, d = patches.shape
    z = patches.transpose(1, 2).reshape(b, d, *grid)
    tokens = []
    for i, dw in enumerate(pool.dw):
        pw = pool.pw[i if len(pool.pw) > 1 else 0]
        y = F.conv2d(z, pw.weight[:, :, None, None], pw.bias)
        weights = F.conv2d(y, dw.weight, dw.bias, padding=dw.weight.shape[-1] // 2, groups=d)
        tokens.append((weights * z).mean(dim=(2, 3)))
    return torch.stack(tokens, dim=1)


def run_own_blocks(model: Any, x: torch.Tensor, observers: torch.Tensor, see_global: bool) -> torch.Tensor:
    """The model's blocks over the joint sequence, under a dense additive mask."""
    rope = None
    if isinstance(model, (Cait, Xcit)):
        return run_class_attention(model, x, observers, see_global)
    if isinstance(model, Eva):
        x, rope = model._pos_embed(model.patch_embed(x))
    elif type(model).__name__ == 'NaFlexVit':
        x, _ = model.embeds(x)
    else:
        x = model.patch_drop(model._pos_embed(model.patch_embed(x)))
    x = model.norm_pre(x)
    num_class = (getattr(model, 'cls_token', None) is not None) + hasattr(model, 'dist_token')
    num_own, n_cls = x.shape[1], observers.shape[1]
    mask = dense_mask(num_own, n_cls, 0 if see_global else num_class)
    bias = torch.zeros(mask.shape, dtype=x.dtype).masked_fill(~mask, float('-inf'))
    x = torch.cat([x, observers.repeat(len(x), 1, 1)], dim=1)
    if rope is not None:
        still = torch.zeros(*rope.shape[:-2], n_cls, rope.shape[-1], dtype=rope.dtype)
        still[..., rope.shape[-1] // 2 :] = 1
        rope = torch.cat([rope, still], dim=-2)
    for i, block in enumerate(model.blocks):
        if rope is None:
            x = block(x, attn_mask=bias)
        else:
            x = block(x, rope=rope[i] if getattr(model, 'rope_mixed', False) else rope, attn_mask=bias)
    return model.norm(x)


def run_class_attention(model: Any, x: torch.Tensor, observers: torch.Tensor, see_global: bool) -> torch.Tensor:
    """CaiT's and XCiT's class attention for all class tokens at once, image by image and token by token."""
    is_cait = hasattr(model, 'blocks_token_only')
    if is_cait:
        patches = model.blocks(model.patch_embed(x) + model.pos_embed)
    else:
        patches, (h, w) = model.patch_embed(x)
        patches = patches + model.pos_embed(1, h, w).flatten(2).transpose(1, 2)
        for block in model.blocks:
            patches = block(patches, h, w)
    tokens = torch.cat([model.cls_token, observers], dim=1).repeat(len(x), 1, 1)
    for block in model.blocks_token_only if is_cait else model.cls_attn_blocks:
        gamma1, gamma2 = (block.gamma_1, block.gamma_2) if is_cait else (block.gamma1, block.gamma2)
        attended = []
        for own, rest in zip(block.norm1(tokens), block.norm1(patches)):
            for i in range(len(own)):
                seen = [own[:1]] if i == 0 else [own[0 if see_global else 1 :]]
                seen = torch.cat([*seen, rest])
                a = attention(
                    block.attn.q(own[i : i + 1]), block.attn.k(seen), block.attn.v(seen), block.attn.num_heads
                )
                attended.append(block.attn.proj(a))
        after = tokens + gamma1 * torch.stack(attended).view_as(tokens)
        if is_cait:
            tokens = after + gamma2 * block.mlp(block.norm2(after))
        else:
            patches = patches + gamma1 * block.norm1(patches)
            patches = 2 * (block.norm2(patches) if block.tokens_norm else patches)
            tokens = block.norm2(after) + gamma2 * block.mlp(block.norm2(after))
    return model.norm(torch.cat([tokens[:, :1], patches, tokens[:, 1:]], dim=1))


def final_norm(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """The norm that the model keeps for after its pooling."""
    if isinstance(model, (VisionTransformer, Eva)) or type(model).__name__ == 'NaFlexVit':
        return model.fc_norm(tokens)
    norm = getattr(model.head, 'norm', None) if hasattr(model, 'head') else None
    if type(norm).__name__ == 'SimpleNorm2d':  # divides by the standard deviation, the mean stays
        return tokens / (tokens.var(dim=-1, keepdim=True) + norm.eps).sqrt() * norm.weight
    if not isinstance(norm, torch.nn.LayerNorm):
        return tokens
    mean = tokens.mean(dim=-1, keepdim=True)
    std = ((tokens - mean).square().mean(dim=-1, keepdim=True) + norm.eps).sqrt()
    return (tokens - mean) / std * norm.weight + norm.bias


def fused(heads: Any, tokens: torch.Tensor, last_layer: Any = None) -> torch.Tensor:
    outputs = []
    for i in range(tokens.shape[1]):
        outputs.append(heads[i if len(heads) > 1 else 0](tokens[:, i]))
    mean = sum(outputs) / len(outputs)
    return mean if last_layer is None else last_layer(mean)


def square(num_patches: int) -> tuple[int, int]:
    side = round(num_patches**0.5)
    return side, side


def slow_forward(
    m: MTE, x: torch.Tensor, grid: Optional[tuple[int, int]] = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(output, aux, aux_cls, pooled) of a wrapped model without a head; ``grid`` where it isn't square."""
    model: Any = m.backbone
    if m.aux.cls_tokens is not None:
        joint = run_own_blocks(model, x, m.aux.cls_tokens, m.config.see_global)
        n_cls = m.aux.cls_tokens.shape[1]
        features, observers = joint[:, :-n_cls], joint[:, -n_cls:]
        patches = features[:, zoo.num_prefix(model) :]
        grid = grid or square(patches.shape[1])
    else:
        features, observers = model.forward_features(x), None
        if features.ndim == 3:
            has_class = any(hasattr(model, name) for name in ('cls_token', 'cls_token4'))
            patches = features[:, int(has_class) :]
            grid = grid or square(patches.shape[1])
        else:
            channels_last = features.shape[-1] == model.num_features
            patches = features.flatten(1, 2) if channels_last else features.flatten(2).transpose(1, 2)
            grid = grid or tuple(features.shape[1:3] if channels_last else features.shape[2:])
    z = final_norm(model, patches)
    p = pooled(m.aux.pool, z, grid)
    aux_cls = p[:, :0]
    if observers is not None:
        aux_cls = final_norm(model, observers)
        if m.aux.ten is not None:
            aux_cls = enhanced(m.aux.ten, aux_cls, z)
    output = model.forward_head(features)
    return output, fused(m.aux.heads, torch.cat([aux_cls, p], dim=1)), aux_cls, p
