"""Whole training steps, plain and with MTE in several forms, for benchmarks.speed.

A step is forward of student and teacher, loss, backward, optimizer and momentum update, as the host methods do it.
Knows nothing of timing.
"""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Optional

import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import mte_timm as mte
from benchmarks.common import Plain, info_nce
from mte_timm.attention import observer_mask
from mte_timm.backbones import BackboneOutput
from mte_timm.backbones.vit import ViTAdapter, add_identity_rows
from mte_timm.tokens import TokenEnhancing

__all__ = ['MODELS', 'STEPS', 'VARIANTS', 'Row', 'make_step']

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    'ViT-Ti/16': ('vit_tiny_patch16_224', {}),
    'ViT-S/16': ('vit_small_patch16_224', {}),
    'ViT-B/16': ('vit_base_patch16_224', {}),
    'DINOv3 ViT-S/16': ('vit_small_patch16_dinov3', {'img_size': 224}),
    'Swin-T': ('swin_tiny_patch4_window7_224', {}),
    'demo ViT': (
        'vit_tiny_patch16_224',
        {'img_size': 28, 'patch_size': 4, 'embed_dim': 96, 'depth': 4, 'num_heads': 3, 'in_chans': 1},
    ),
}
VARIANTS = ('plain', 'mte', 'naive', '11 heads', '2 nets')


class Row(NamedTuple):
    """What is measured: a model, a method, a number of images and the views of each."""

    model: str
    method: str
    batch: int
    views: tuple[int, ...]
    prototypes: int = 0
    n_cls: Optional[int] = None  # None for the default of the architecture
    n_pool: int = 6
    model_kwargs: tuple[tuple[str, Any], ...] = ()

    @property
    def key(self) -> str:
        """Its name in the results."""
        return f'{self.model}, {self.method}, {self.batch} x {len(self.views)} views, {self.prototypes} prototypes'


class PrototypeHead(nn.Module):
    """DINO's and iBOT's head: an MLP, L2-normalized bottleneck, prototypes."""

    def __init__(self, dim: int, prototypes: int, hidden: int = 2048, bottleneck: int = 256) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            *(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU()), nn.Linear(hidden, bottleneck)
        )
        self.last_layer = nn.Linear(bottleneck, prototypes, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last_layer(F.normalize(self.mlp(x), dim=-1))


def bn_mlp(layers: int, dim: int, hidden: int = 4096, out: int = 256) -> nn.Sequential:
    """MoCo v3's projector (3 layers) and predictor (2)."""
    parts: list[nn.Module] = []
    for i in range(layers - 1):
        parts += [nn.Linear(dim if i == 0 else hidden, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU()]
    return nn.Sequential(*parts, nn.Linear(hidden, out, bias=False), nn.BatchNorm1d(out, affine=False))


def small_projector(dim: int) -> nn.Module:
    """The demo's."""
    return nn.Sequential(nn.Linear(dim, 256), nn.BatchNorm1d(256), nn.GELU(), nn.Linear(256, 64))


class DINOLoss(nn.Module):
    """Cross-entropy of student views with centered, sharpened teacher views, by pairs; names as the repository's."""

    student_temp = 0.1
    teacher_temp_schedule = (0.04,)

    def __init__(self, prototypes: int, views: int) -> None:
        super().__init__()
        self.ncrops = views
        self.register_buffer('center', torch.zeros(1, prototypes))

    def forward(self, student: torch.Tensor, teacher: torch.Tensor, epoch: int) -> torch.Tensor:
        views = (student / self.student_temp).chunk(self.ncrops)
        targets = ((teacher - self.center) / self.teacher_temp_schedule[epoch]).softmax(dim=-1).detach().chunk(2)
        total: Any = 0.0
        for i, q in enumerate(targets):
            for j, v in enumerate(views):
                if i != j:
                    total = total + torch.sum(-q * v.log_softmax(dim=-1), dim=-1).mean()
        self.update_center(teacher)
        return total / (2 * self.ncrops - 2)

    @torch.no_grad()
    def update_center(self, teacher: torch.Tensor) -> None:
        self.center = 0.9 * self.center + 0.1 * teacher.mean(dim=0, keepdim=True)


def patch_loss(student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """iBOT's loss on masked patches (B, N, K), mask (B, N)."""
    loss = torch.sum(-(teacher / 0.05).softmax(dim=-1) * (student / 0.1).log_softmax(dim=-1), dim=-1)
    return ((loss * mask).sum(dim=-1) / mask.sum(dim=-1).clamp(min=1.0)).mean()


# --- the naive form ------------------------------------------------------------------------------------


class DenseAdapter(ViTAdapter):
    """The joint sequence under a dense boolean mask."""

    def __init__(self, adapter: ViTAdapter) -> None:
        vars(self).update(vars(adapter))
        self.tokenize = adapter.tokenize  # type: ignore[method-assign]

    def __call__(self, model: Any, x: torch.Tensor, aux_cls: Any = None, *_: Any, **inputs: Any) -> BackboneOutput:
        own, rope = self.tokenize(model, x)
        n = own.shape[1]
        mask = observer_mask(n, aux_cls.shape[1], self.num_class, device=x.device).clone()  # a plain tensor
        kwargs = {} if rope is None else {'rope': add_identity_rows(rope, aux_cls.shape[1])}
        joint = torch.cat([own, aux_cls], dim=1)
        for block in model.blocks:
            joint = block(joint, attn_mask=mask, **kwargs)
        joint = model.norm(joint)
        patches = joint[:, self.num_prefix : n]
        side = round(patches.shape[1] ** 0.5)
        return BackboneOutput(*self.head(model, joint[:, :n]), patches, joint[:, n:], (side, side))


class DirectPooling(nn.Module):
    """Paper eq. 2 with all maps of weights at once, from one depth-wise convolution."""

    def __init__(self, pool: Any) -> None:
        super().__init__()
        self.pw, self.dw = pool.pw, pool.dw

    def forward(self, z: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        b, n, d = z.shape
        y = self.pw[0](z).transpose(1, 2).reshape(b, d, *grid)
        weight = torch.stack([dw.weight for dw in self.dw], dim=1).flatten(0, 1)  # D * n_pool, 1, k, k
        bias = torch.stack([dw.bias for dw in self.dw], dim=1).flatten()
        maps = F.conv2d(y, weight, bias, padding=weight.shape[-1] // 2, groups=d)
        return (maps.view(b, d, -1, n) * z.transpose(1, 2).unsqueeze(2)).mean(dim=-1).transpose(1, 2)


class DirectEnhancing(TokenEnhancing):
    """TEN with keys and values of every patch."""

    def _attend_to_patches(self, q: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        return self._attend_to_projections(q, z)


def naive(model: mte.MTE) -> mte.MTE:
    """The same parameters, computed as one would write it down first."""
    if model.aux.cls_tokens is not None:
        model.adapter = DenseAdapter(model.adapter)  # type: ignore[arg-type]
    if model.aux.ten is not None:
        model.aux.ten.__class__ = DirectEnhancing
    if model.aux.pool is not None:
        model.aux.pool = DirectPooling(model.aux.pool)
    return model


# --- steps -------------------------------------------------------------------------------------------------------


class Step:
    """A training step of one row in one variant; call it to run it.

    ``forwards`` are the forward passes by how often they count: three times for the student (a backward costs two
    forwards), once for the teacher.
    """

    teacher: Any = None

    def __init__(
        self, row: Row, variant: str, device: torch.device, compiled: bool, amp: Optional[torch.dtype]
    ) -> None:
        torch.manual_seed(0)
        self.row, self.variant, self.device, self.amp = row, variant, device, amp
        name, kwargs = MODELS[row.model]
        kwargs = {**kwargs, **dict(row.model_kwargs)}
        if len(set(row.views)) > 1:
            kwargs['dynamic_img_size'] = True
        self.with_mte = variant in ('mte', 'naive')
        backbone = timm.create_model(name, num_classes=1000 if row.method == 'supervised' else 0, **kwargs)
        self.student: Any = self.build(backbone).to(device)
        if row.method != 'supervised':
            make = mte.make_teacher if variant == 'mte' else copy.deepcopy
            self.teacher = make(self.student).requires_grad_(False)
            for module in self.teacher.modules():
                if hasattr(module, 'drop_prob'):  # in every form, as the repositories build their teachers
                    module.drop_prob = 0.0
        self.extra()
        trained = [
            p for m in (self.student, getattr(self, 'predictors', None)) if m is not None for p in m.parameters()
        ]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)
        self.averaged = list(self.student.parameters()), list(self.teacher.parameters()) if self.teacher else []
        channels = kwargs.get('in_chans', 3)
        self.views = [torch.randn(row.batch, channels, size, size, device=device) for size in row.views]
        self.run_student = torch.compile(self.student) if compiled else self.student
        self.run_teacher = torch.compile(self.teacher) if compiled and self.teacher else self.teacher

    head: Optional[Callable[[int], nn.Module]] = None

    def build(self, backbone: Any) -> nn.Module:
        if not self.with_mte:
            heads = 11 if self.variant == '11 heads' else 1
            return Plain(backbone, self.head, backbone.num_features, heads)
        attends = hasattr(backbone, 'blocks')
        n_cls = self.row.n_cls if self.row.n_cls is not None else 4 if attends else 0
        model = mte.wrap(backbone, n_cls=n_cls, n_pool=self.row.n_pool, head=self.head)
        return naive(model) if self.variant == 'naive' else model

    def extra(self) -> None:
        """Losses and predictors."""

    def loss(self) -> torch.Tensor:
        raise RuntimeError(f'{type(self).__name__} must define loss')

    def teach(self, views: list[torch.Tensor]) -> Any:
        with torch.no_grad():
            return self.run_teacher(views)

    def __call__(self) -> None:
        nets = 2 if self.variant == '2 nets' else 1
        for _ in range(nets):
            with torch.autocast(self.device.type, self.amp, enabled=self.amp is not None):
                loss = self.loss()
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            if self.teacher is not None:
                torch._foreach_lerp_(self.averaged[1], self.averaged[0], 0.01)

    def operations(self) -> float:
        """Multiply-adds of a step in billions: three forwards of the student and one of the teacher.

        What the variant runs, on the math kernel of attention. Loss and optimizer are not counted.
        """
        nets = 2 if self.variant == '2 nets' else 1
        total = 0.0
        for weight, passes in ((3, self.student_passes), (1, self.teacher_passes)):
            with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
                passes()
            total += weight * counter.get_total_flops() / 2e9
        return nets * total

    def student_passes(self) -> None:
        self.student(self.views)

    def teacher_passes(self) -> None:
        if self.teacher is not None:
            self.teacher(self.views[:2])


class Supervised(Step):
    def extra(self) -> None:
        self.labels = torch.randint(1000, (self.row.batch,), device=self.device)
        self.criterion = mte.MTECrossEntropy() if self.with_mte else nn.CrossEntropyLoss()

    def loss(self) -> torch.Tensor:
        out = self.run_student(self.views[0] if self.with_mte else self.views)
        return self.criterion(out, self.labels)

    def student_passes(self) -> None:
        self.student(self.views[0] if self.with_mte else self.views)


class DINO(Step):
    def head(self, dim: int) -> nn.Module:  # type: ignore[override]
        return PrototypeHead(dim, self.row.prototypes)

    def extra(self) -> None:
        criterion: nn.Module = DINOLoss(self.row.prototypes, len(self.row.views)).to(self.device)
        if self.with_mte:
            criterion = mte.MTELoss(criterion)
        self.criterion = partial(criterion, epoch=0)

    def loss(self) -> torch.Tensor:
        return self.criterion(self.run_student(self.views), self.teach(self.views[:2]))


class Demo(Step):
    head = staticmethod(small_projector)

    def extra(self) -> None:
        self.criterion = mte.MTELoss(info_nce) if self.with_mte else info_nce

    def loss(self) -> torch.Tensor:
        return self.criterion(self.run_student(self.views), self.teach(self.views))


class MoCoV3(Step):
    def head(self, dim: int) -> nn.Module:  # type: ignore[override]
        return bn_mlp(3, dim)

    def extra(self) -> None:
        streams = 2 if self.with_mte else 1
        self.predictors = nn.ModuleList(bn_mlp(2, 256) for _ in range(streams)).to(self.device)
        self.criterion = mte.MTELoss(info_nce) if self.with_mte else info_nce

    def predicted(self, out: Any) -> Any:
        if not self.with_mte:
            return self.predictors[0](out)
        return out._replace(output=self.predictors[0](out.output), aux=self.predictors[1](out.aux))

    def loss(self) -> torch.Tensor:
        return self.criterion(self.predicted(self.run_student(self.views)), self.teach(self.views))

    def student_passes(self) -> None:
        self.predicted(self.student(self.views))


class IBOT(DINO):
    """The head on class and patch tokens; the loss on masked patches once."""

    def build(self, backbone: Any) -> nn.Module:
        if self.with_mte:
            return super().build(backbone)
        plain: Any = super().build(backbone)
        return AllTokens(plain.backbone, plain.heads)

    def extra(self) -> None:
        super().extra()
        self.masks: Any = None

    def streams(self, model: Any, views: list[torch.Tensor]) -> tuple[Any, torch.Tensor]:
        """Class logits, or outputs of both streams, and patch logits."""
        if not self.with_mte:
            return model(views)
        x = torch.cat(views)
        tokens = model.aux.enhance(model.adapter(model.backbone, x, model.aux.tokens(len(x))))
        everything = torch.cat([tokens.global_token.unsqueeze(1), tokens.patches], dim=1)
        logits = model.aux.global_head(everything)
        aux = model.aux.heads(tokens.auxiliary, model.aux.global_head.last_layer)
        return mte.MTEOutput(logits[:, 0], aux, tokens), logits[:, 1:]

    def loss(self) -> torch.Tensor:
        student, patches = self.streams(self.run_student, self.views)
        with torch.no_grad():
            teacher, teacher_patches = self.streams(self.run_teacher, self.views)
        if self.masks is None:
            self.masks = (torch.rand(patches.shape[:2], device=self.device) < 0.3).float()
        return self.criterion(student, teacher) + patch_loss(patches, teacher_patches, self.masks)

    def student_passes(self) -> None:
        self.streams(self.student, self.views)

    def teacher_passes(self) -> None:
        self.streams(self.teacher, self.views)


class AllTokens(nn.Module):
    """The plain form of iBOT's student."""

    def __init__(self, backbone: Any, heads: Any) -> None:
        super().__init__()
        self.backbone, self.heads = backbone, heads

    def forward(self, views: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = self.backbone.forward_features(torch.cat(views))
        tokens = tokens.flatten(1, 2) if tokens.ndim == 4 else tokens
        if tokens.shape[1] in (49, 196):  # no class token: the mean in its place
            tokens = torch.cat([tokens.mean(dim=1, keepdim=True), tokens], dim=1)
        logits = torch.stack([head(tokens) for head in self.heads]).mean(dim=0) if len(self.heads) > 1 else None
        logits = self.heads[0](tokens) if logits is None else logits
        registers = getattr(self.backbone, 'num_prefix_tokens', 1) or 1
        return logits[:, 0], logits[:, registers:]


STEPS: dict[str, type[Step]] = {
    'supervised': Supervised,
    'dino': DINO,
    'ibot': IBOT,
    'moco v3': MoCoV3,
    'demo': Demo,
}


def make_step(
    row: Row,
    variant: str,
    device: str = 'cpu',
    compiled: bool = False,
    amp: Optional[torch.dtype] = None,
) -> Step:
    """The step of ``row`` in ``variant``, ready to run."""
    return STEPS[row.method](row, variant, torch.device(device), compiled, amp)
