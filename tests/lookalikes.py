"""Small modules with the parts and names that `mte_timm.integrations` knows of the SSL repositories."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.layers import DropPath
from torch import nn

DIM, HEADS, PATCH = 24, 3, 8


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.num_heads, self.scale = HEADS, (DIM // HEADS) ** -0.5
        self.qkv, self.proj = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)
        self.attn_drop, self.proj_drop = nn.Dropout(0.0), nn.Dropout(0.0)

    def forward(self, x, allowed=None):
        b, n, _ = x.shape
        q, k, v = (t.view(b, n, HEADS, -1).transpose(1, 2) for t in self.qkv(x).chunk(3, dim=-1))
        scores = q @ k.mT * self.scale
        if allowed is not None:
            scores = scores.masked_fill(~allowed, -torch.inf)
        weights = scores.softmax(dim=-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(b, n, DIM)), weights


class Block(nn.Module):
    def __init__(self, scaled=False, drop=0.0):
        super().__init__()
        self.norm1, self.norm2, self.attn = nn.LayerNorm(DIM), nn.LayerNorm(DIM), Attention()
        self.mlp = nn.Sequential(nn.Linear(DIM, 2 * DIM), nn.GELU(), nn.Linear(2 * DIM, DIM))
        self.drop_path = DropPath(drop) if drop else nn.Identity()
        self.gamma_1, self.gamma_2 = (nn.Parameter(torch.rand(DIM)) if scaled else None for _ in range(2))

    def forward(self, x, allowed=None):
        one, two = (1 if g is None else g for g in (self.gamma_1, self.gamma_2))
        x = x + self.drop_path(one * self.attn(self.norm1(x), allowed)[0])
        return x + self.drop_path(two * self.mlp(self.norm2(x)))


class PatchEmbed(nn.Module):
    patch_size, img_size = PATCH, 32  # as the repository has them, one number each

    def __init__(self):
        super().__init__()
        self.proj = nn.Conv2d(3, DIM, PATCH, PATCH)

    def forward(self, x):
        return self.proj(x)


class ViT(nn.Module):
    """DINO's, and with ``masks`` iBOT's."""

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
        x = self.patch_embed(x).flatten(2).mT
        return torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)

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
    return_all_tokens = True

    def __init__(self, masked_im_modeling=True, **kwargs):
        super().__init__(**kwargs)
        self.masked_im_modeling = masked_im_modeling
        if masked_im_modeling:
            self.masked_embed = nn.Parameter(torch.randn(DIM))

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
        self.patch_embed = nn.Sequential(PatchEmbed(), nn.Flatten(2), Transposed())
        self.ape, self.absolute_pos_embed = True, nn.Parameter(torch.randn(1, 1, DIM))
        self.pos_drop = nn.Dropout(0.0)
        self.layers = nn.ModuleList([Stage(), Stage()])
        self.norm, self.avgpool, self.head = nn.LayerNorm(DIM), nn.AdaptiveAvgPool1d(1), nn.Identity()

    def _tokens(self, x):
        x = self.pos_drop(self.patch_embed(x) + self.absolute_pos_embed)
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)

    def forward(self, x):
        return self.head(self.avgpool(self._tokens(x).mT).flatten(1))


class Transposed(nn.Module):
    def forward(self, x):
        return x.mT


class TokenSwin(Swin):
    """iBOT's, which gives all tokens when asked and uses any mask that it gets."""

    return_all_tokens = True

    def __init__(self, masked_im_modeling=True):
        super().__init__()
        self.masked_im_modeling = masked_im_modeling

    def forward(self, x, return_all_tokens=None, mask=None):
        assert mask is None or self.masked_im_modeling
        patches = self._tokens(x)
        return (
            torch.cat([self.avgpool(patches.mT).mT, patches], dim=1)
            if return_all_tokens in (None, True)
            else patches.mean(1)
        )


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
        self, in_dim, out_dim, patch_out_dim=8192, norm=None, act='gelu', norm_last_layer=True, shared_head=False
    ):
        self.activation = {'gelu': nn.GELU, 'relu': nn.ReLU}[act]
        super().__init__(in_dim, out_dim, use_bn=norm == 'bn', norm_last_layer=norm_last_layer)
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
        self.ncrops, self.student_temp = ncrops, 0.1
        self.teacher_temp_schedule = [0.04 + 0.01 * epoch for epoch in range(10)]
        self.register_buffer('center', torch.zeros(1, out_dim))

    def forward(self, student, teacher, epoch):
        targets = ((teacher - self.center) / self.teacher_temp_schedule[epoch]).softmax(dim=-1).detach().chunk(2)
        views = (student / self.student_temp).log_softmax(dim=-1).chunk(self.ncrops)
        terms = [-(q * v).sum(-1).mean() for i, q in enumerate(targets) for j, v in enumerate(views) if i != j]
        self.update_center(teacher)
        return torch.stack(terms).mean()

    @torch.no_grad()
    def update_center(self, teacher):
        self.center = 0.9 * self.center + 0.1 * mean_of_processes(teacher.mean(0, keepdim=True))


def mean_of_processes(x):
    if world() > 1:
        dist.all_reduce(x)
    return x / world()


def world():
    return dist.get_world_size() if dist.is_initialized() else 1


class CentredPatchLoss(nn.Module):
    """iBOTLoss."""

    def __init__(self, out_dim, patch_out_dim, ncrops):
        super().__init__()
        self.classes = CentredLoss(out_dim, ncrops)
        self.register_buffer('center2', torch.zeros(1, 1, patch_out_dim))

    def forward(self, student, teacher, student_local, masks, epoch):
        (s_cls, s_patch), (t_cls, t_patch) = student, teacher
        cls = self.classes(s_cls if student_local is None else torch.cat([s_cls, student_local]), t_cls, epoch)
        terms = []
        targets = ((t_patch - self.center2) / 0.05).softmax(dim=-1).detach().chunk(2)
        for q, p, mask in zip(targets, (s_patch / 0.1).chunk(2), masks):
            mask = mask.flatten(-2, -1).float()
            terms.append((-(q * p.log_softmax(-1)).sum(-1) * mask).sum(-1) / mask.sum(-1).clamp(min=1.0))
        patch = torch.stack(terms).mean()
        self.center2 = 0.9 * self.center2 + 0.1 * t_patch.detach().mean((0, 1), keepdim=True)
        return {'cls': cls, 'patch': patch, 'loss': cls + patch}


def mlp(norm=True):
    last = [nn.BatchNorm1d(12, affine=False)] if norm else []
    return nn.Sequential(nn.Linear(DIM, 16, bias=False), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 12), *last)


def predictor():
    return nn.Sequential(nn.Linear(12, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 12))


class MoCo(nn.Module):
    def __init__(self, encoder):
        super().__init__()
        self.base_encoder, self.momentum_encoder = encoder(), encoder()
        self.predictor = predictor()
        for b, m in zip(self.base_encoder.parameters(), self.momentum_encoder.parameters()):
            m.data.copy_(b.data)
            m.requires_grad = False

    @torch.no_grad()
    def _update_momentum_encoder(self, m):
        for b, k in zip(self.base_encoder.parameters(), self.momentum_encoder.parameters()):
            k.data = k.data * m + b.data * (1.0 - m)

    def contrastive_loss(self, q, k):
        q, k = F.normalize(q, dim=1), F.normalize(k, dim=1)
        keys = [torch.zeros_like(k) for _ in range(world())]
        if world() > 1:
            dist.all_gather(keys, k)
        logits = q @ (torch.cat(keys) if world() > 1 else k).T / 0.2
        start = len(q) * (dist.get_rank() if world() > 1 else 0)
        return F.cross_entropy(logits, torch.arange(start, start + len(q)))

    def forward(self, x1, x2, m):
        if hasattr(self, 'mte'):
            return self.mte(self, x1, x2, m)
        raise AssertionError('the auxiliary stream takes over')


class MoBY(nn.Module):
    def __init__(self, encoder):
        super().__init__()
        self.encoder, self.encoder_k = encoder(), encoder()
        self.projector, self.projector_k, self.predictor = mlp(norm=False), mlp(norm=False), predictor()
        self.contrast_momentum, self.k, self.K = 0.9, 0, 10
        for name in ('encoder', 'projector'):
            target = getattr(self, f'{name}_k').requires_grad_(False)
            target.load_state_dict(getattr(self, name).state_dict())
        for name in ('queue1', 'queue2'):
            self.register_buffer(name, F.normalize(torch.randn(12, 16), dim=0))
        self.register_buffer('queue_ptr', torch.zeros(1, dtype=torch.long))

    @torch.no_grad()
    def _momentum_update_key_encoder(self):
        momentum = 1 - (1 - self.contrast_momentum) * (1 - self.k / self.K)
        self.k = self.k + 1
        for online, target in ((self.encoder, self.encoder_k), (self.projector, self.projector_k)):
            for b, k in zip(online.parameters(), target.parameters()):
                k.data = k.data * momentum + b.data * (1 - momentum)

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
        if hasattr(self, 'mte'):
            return self.mte(self, im_1, im_2)
        raise AssertionError('the auxiliary stream takes over')
