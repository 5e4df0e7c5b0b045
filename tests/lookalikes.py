"""Small modules with the parts and names that `mte_timm.integrations` knows of the SSL repositories.

tests/test_upstream.py runs the repositories themselves.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.layers import DropPath
from timm.models.vision_transformer import Block as TimmBlock
from torch import nn

DIM, HEADS, PATCH = 24, 3, 8


class Block(TimmBlock):
    def __init__(self, scaled=False, drop=0.0):
        super().__init__(DIM, HEADS, mlp_ratio=2, qkv_bias=True)
        self.drop_path = DropPath(drop) if drop else nn.Identity()
        self.gamma_1, self.gamma_2 = (nn.Parameter(torch.rand(DIM)) if scaled else None for _ in range(2))

    def forward(self, x, allowed=None):
        one, two = (1 if g is None else g for g in (self.gamma_1, self.gamma_2))
        x = x + self.drop_path(one * self.attn(self.norm1(x), attn_mask=allowed))
        return x + self.drop_path(two * self.mlp(self.norm2(x)))


class PatchEmbed(nn.Module):
    patch_size, img_size = PATCH, 32  # as the repository has them, one number each

    def __init__(self):
        super().__init__()
        self.proj = nn.Conv2d(3, DIM, PATCH, PATCH)

    def forward(self, x):
        return self.proj(x)


class ViT(nn.Module):
    """DINO's."""

    embed_dim = DIM

    def __init__(self, scaled=False, mean_pooling=False, drop=0.0):
        super().__init__()
        self.patch_embed = PatchEmbed()
        self.cls_token = nn.Parameter(torch.randn(1, 1, DIM))
        self.blocks = nn.ModuleList(Block(scaled, drop) for _ in range(3))
        self.norm = nn.Identity() if mean_pooling else nn.LayerNorm(DIM)
        self.fc_norm = nn.LayerNorm(DIM) if mean_pooling else None
        self.head = nn.Identity()

    def prepare_tokens(self, x):
        return torch.cat([self.cls_token.expand(len(x), -1, -1), self.patch_embed(x).flatten(2).mT], dim=1)

    def tokens(self, x, **inputs):
        x = self.prepare_tokens(x, **inputs)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        if self.fc_norm is not None:
            x = torch.cat([self.fc_norm(x[:, 1:].mean(1, keepdim=True)), x[:, 1:]], dim=1)
        return x

    def forward(self, x):
        return self.tokens(x)[:, 0]


class MaskedViT(ViT):
    """iBOT's."""

    return_all_tokens = True

    def __init__(self, masked_im_modeling=True, **kwargs):
        super().__init__(**kwargs)
        self.masked_im_modeling = masked_im_modeling
        self.masked_embed = nn.Parameter(torch.randn(DIM)) if masked_im_modeling else None

    def prepare_tokens(self, x, mask=None):
        x = self.patch_embed(x)
        if mask is not None:
            x = torch.where(mask.unsqueeze(1), self.masked_embed.view(1, -1, 1, 1), x)
        return torch.cat([self.cls_token.expand(len(x), -1, -1), x.flatten(2).mT], dim=1)

    def forward(self, x, mask=None):
        return self.tokens(x, **({'mask': mask} if self.masked_im_modeling else {}))


class Stage(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(DIM, DIM)])

    def forward(self, x):
        return self.blocks[0](x)


class Swin(nn.Module):
    """Transformer-SSL's."""

    num_features = DIM

    def __init__(self):
        super().__init__()
        self.patch_embed, self.pos_drop = PatchEmbedded(), nn.Dropout(0.0)
        self.ape, self.absolute_pos_embed = True, nn.Parameter(torch.randn(1, 1, DIM))
        self.layers = nn.ModuleList([Stage(), Stage()])
        self.norm, self.avgpool, self.head = nn.LayerNorm(DIM), nn.AdaptiveAvgPool1d(1), nn.Identity()

    def patches(self, x):
        x = self.pos_drop(self.patch_embed(x) + self.absolute_pos_embed)
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)

    def forward(self, x):
        return self.head(self.avgpool(self.patches(x).mT).flatten(1))


class PatchEmbedded(PatchEmbed):
    def forward(self, x):
        return super().forward(x).flatten(2).mT


class TokenSwin(Swin):
    """iBOT's, which gives all tokens when asked and uses any mask that it gets."""

    return_all_tokens = True

    def __init__(self, masked_im_modeling=True):
        super().__init__()
        self.masked_im_modeling = masked_im_modeling

    def forward(self, x, return_all_tokens=None, mask=None):
        assert mask is None or self.masked_im_modeling
        patches = self.patches(x)
        every = torch.cat([self.avgpool(patches.mT).mT, patches], dim=1)
        return every if return_all_tokens in (None, True) else every[:, 0]


class Head(nn.Module):
    """DINOHead."""

    activation = nn.GELU

    def __init__(self, in_dim, out_dim, use_bn=False, norm_last_layer=True):
        super().__init__()
        norm = [nn.BatchNorm1d(32)] if use_bn else []
        self.mlp = nn.Sequential(nn.Linear(in_dim, 32), *norm, self.activation(), nn.Linear(32, 16))
        self.last_layer = nn.utils.parametrizations.weight_norm(nn.Linear(16, out_dim, bias=False))
        self.last_layer.parametrizations.weight.original0.requires_grad = not norm_last_layer

    def forward(self, x):
        return self.last_layer(F.normalize(self.mlp(x), dim=-1))


class PatchHead(Head):
    """iBOTHead."""

    def __init__(
        self, dim, out_dim, patch_out_dim=8192, norm=None, act='gelu', norm_last_layer=True, shared_head=False
    ):
        self.activation = {'gelu': nn.GELU, 'relu': nn.ReLU}[act]
        super().__init__(dim, out_dim, use_bn=norm == 'bn', norm_last_layer=norm_last_layer)
        self.last_layer2 = self.last_layer if shared_head else nn.Linear(16, patch_out_dim, bias=False)

    def forward(self, x):
        if x.ndim == 2:
            return super().forward(x)
        x = F.normalize(self.mlp(x), dim=-1)
        return self.last_layer(x[:, 0]), self.last_layer2(x[:, 1:])


class MultiCropWrapper(nn.Module):
    def __init__(self, backbone, head):
        super().__init__()
        self.backbone, self.head = backbone, head


class CentredLoss(nn.Module):
    """DINOLoss for two views of the teacher and any number of the student."""

    def __init__(self, out_dim, ncrops):
        super().__init__()
        self.ncrops = ncrops
        self.register_buffer('center', torch.zeros(1, out_dim))

    def forward(self, student, teacher, epoch):
        targets = ((teacher - self.center) / (0.04 + 0.01 * epoch)).softmax(dim=-1).detach().chunk(2)
        views = (student / 0.1).log_softmax(dim=-1).chunk(self.ncrops)
        terms = [-(q * v).sum(-1).mean() for i, q in enumerate(targets) for j, v in enumerate(views) if i != j]
        mean = teacher.detach().mean(0, keepdim=True)
        if dist.is_initialized():
            dist.all_reduce(mean)
            mean /= dist.get_world_size()
        self.center = 0.9 * self.center + 0.1 * mean
        return torch.stack(terms).mean()


class CentredPatchLoss(nn.Module):
    """iBOTLoss."""

    def __init__(self, out_dim, patch_out_dim, ncrops):
        super().__init__()
        self.classes = CentredLoss(out_dim, ncrops)
        self.register_buffer('center2', torch.zeros(1, 1, patch_out_dim))

    def forward(self, student, teacher, student_local, masks, epoch):
        (s_cls, s_patch), (t_cls, t_patch) = student, teacher
        cls = self.classes(s_cls if student_local is None else torch.cat([s_cls, student_local]), t_cls, epoch)
        targets, terms = ((t_patch - self.center2) / 0.05).softmax(dim=-1).detach().chunk(2), []
        for q, p, mask in zip(targets, (s_patch / 0.1).chunk(2), masks):
            mask = mask.flatten(-2, -1).float()
            terms.append((-(q * p.log_softmax(-1)).sum(-1) * mask).sum(-1) / mask.sum(-1).clamp(min=1.0))
        patch = torch.stack(terms).mean()
        self.center2 = 0.9 * self.center2 + 0.1 * t_patch.detach().mean((0, 1), keepdim=True)
        return {'cls': cls, 'patch': patch, 'loss': cls + patch}


def mlp(width=DIM, affine=True):
    last = [nn.BatchNorm1d(12, affine=False)] if affine else []
    return nn.Sequential(nn.Linear(width, 16, bias=False), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 12), *last)


@torch.no_grad()
def follow(momentum, *pairs):
    """Moves the second of each pair of modules toward the first."""
    for online, target in pairs:
        for b, k in zip(online.parameters(), target.parameters()):
            k.copy_(k * momentum + b * (1.0 - momentum))


class MoCo(nn.Module):
    def __init__(self, encoder):
        super().__init__()
        self.base_encoder, self.momentum_encoder, self.predictor = encoder(), encoder(), mlp(12)
        follow(0, (self.base_encoder, self.momentum_encoder.requires_grad_(False)))

    def _update_momentum_encoder(self, m):
        follow(m, (self.base_encoder, self.momentum_encoder))

    def contrastive_loss(self, q, k):
        logits = F.normalize(q, dim=1) @ F.normalize(k, dim=1).T / 0.2
        return F.cross_entropy(logits, torch.arange(len(q)))

    def forward(self, x1, x2, m):
        return self.mte(self, x1, x2, m)


class MoBY(nn.Module):
    def __init__(self, encoder):
        super().__init__()
        self.encoder, self.encoder_k = encoder(), encoder().requires_grad_(False)
        self.projector, self.projector_k, self.predictor = mlp(affine=False), mlp(affine=False), mlp(12, affine=False)
        self.contrast_momentum, self.k, self.K = 0.9, 0, 10
        follow(0, (self.encoder, self.encoder_k), (self.projector, self.projector_k.requires_grad_(False)))
        for name in ('queue1', 'queue2'):
            self.register_buffer(name, F.normalize(torch.randn(12, 16), dim=0))
        self.register_buffer('queue_ptr', torch.zeros(1, dtype=torch.long))

    def _momentum_update_key_encoder(self):
        momentum = 1 - (1 - self.contrast_momentum) * (1 - self.k / self.K)
        self.k = self.k + 1
        follow(momentum, (self.encoder, self.encoder_k), (self.projector, self.projector_k))

    @torch.no_grad()
    def _dequeue_and_enqueue(self, keys1, keys2):
        ptr = int(self.queue_ptr)
        self.queue1[:, ptr : ptr + len(keys1)] = keys1.T
        self.queue2[:, ptr : ptr + len(keys2)] = keys2.T
        self.queue_ptr[0] = (ptr + len(keys1)) % self.queue1.shape[1]

    def contrastive_loss(self, q, k, queue):
        logits = torch.cat([(q * k).sum(1, keepdim=True), q @ queue.clone().detach()], dim=1) / 0.2
        return F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.long))

    def forward(self, im_1, im_2):
        return self.mte(self, im_1, im_2)
