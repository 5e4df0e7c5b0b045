"""The methods: from views and labels to a loss, plain or with MTE.

Owns student, teacher, heads, predictors and criteria of each method, lightly's where it has them. Knows nothing of
data, schedules or evaluation.
"""

import copy
from collections.abc import Callable
from typing import Any, ClassVar, Optional

import torch
from lightly.loss import DINOLoss, IBOTPatchLoss, NegativeCosineSimilarity, NTXentLoss
from lightly.loss.msn_loss import sinkhorn
from lightly.models.modules import BYOLPredictionHead, BYOLProjectionHead, DINOProjectionHead, MoCoProjectionHead
from lightly.models.utils import random_block_mask, update_momentum
from timm.data import Mixup
from timm.models.convnext import ConvNeXtBlock
from torch import nn

import mte_timm as mte
from benchmarks.common import Plain, info_nce
from benchmarks.study.views import View
from mte_timm.backbones import BackboneOutput
from mte_timm.backbones.vit import ViTAdapter

__all__ = ['ABLATIONS', 'METHODS', 'Method']

Options = Optional[dict[str, Any]]
ABLATIONS: dict[str, Any] = {
    'weight': 1.0,  # of distillation
    'distill': True,  # or the global token has the plain method's loss
    'mask_attention': True,  # attention to auxiliary CLS tokens, or own tokens see them
    'cls_init': 0.02,  # standard deviation of auxiliary CLS tokens at the start, 'orthogonal' with 1, or 'class': none,
    # and heads stand on the class token
    'class_init': None,  # of the class token, plain or with MTE; None leaves it as it is
    'ten_scale': 1.0,  # times the initial weights of TEN's outputs, or 'xavier': those of queries and keys are Xavier's
}


class Method(nn.Module):
    """A method around a backbone; called with views, labels and epoch it returns the loss of a step.

    Args:
        backbone: A timm model, without classifier but for supervised training.
        options: Of ``mte.wrap``; None for the plain method.
        settings: Of the method, over its ``defaults``, and ``ABLATIONS`` of MTE.
    """

    defaults: ClassVar[dict[str, Any]] = {
        'momentum': 0.99,
        'hidden': 512,
        'out': 128,
        'global_scale': (0.3, 1.0),
        'jitter': 0.4,
        'gray': 0.2,
        'blur': (0.0, 0.0),  # of the two views
    }
    classifies = False
    evaluates_teacher = False  # as its authors do
    of_patches = False  # or of their tokens too, which not every model has

    def __init__(self, backbone: Any, options: Options, **settings: Any) -> None:
        super().__init__()
        defaults = {**ABLATIONS, **self.defaults}
        unknown = sorted(settings.keys() - defaults.keys())
        if unknown:
            raise ValueError(f'settings: {type(self).__name__} has {", ".join(defaults)}, not {", ".join(unknown)}')
        self.settings = {**defaults, **settings}
        self.with_mte = options is not None
        self.student: Any = self.make_student(backbone, options)
        self.criterion: Any = self.make_criterion()
        self.teacher: Any = self.make_teacher()
        self.add()

    def make_student(self, backbone: Any, options: Options) -> nn.Module:
        head = None if self.classifies else self.head
        if self.settings['class_init'] is not None:
            with torch.no_grad():
                backbone.cls_token.normal_(std=self.settings['class_init'])
        if options is None:
            return Plain(backbone, head, backbone.num_features, 1)
        student = mte.wrap(backbone, head=head, **options)
        if not self.settings['mask_attention']:
            student.adapter = FullAttention(backbone)
        if self.settings['cls_init'] == 'class':
            student.adapter = ClassCopies(backbone)
        start(student, self.settings)
        return student

    def make_teacher(self) -> Optional[nn.Module]:
        if self.with_mte and self.settings['distill']:
            return mte.make_teacher(self.student)
        return frozen_copy(self.student)

    def head(self, dim: int) -> nn.Module:
        """The projection head of a token of width ``dim``."""
        hidden, out = self.settings['hidden'], self.settings['out']
        return nn.Sequential(nn.Linear(dim, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, out))

    def make_criterion(self) -> Any:
        """Called with student's and teacher's outputs."""
        raise RuntimeError(f'{type(self).__name__} must define make_criterion')

    def wrapped(self, criterion: Any, call: Optional[Callable[..., Any]] = None) -> Any:
        """``criterion(student, teacher)`` for outputs of this run: around it MTE's loss, or nothing."""
        if not self.with_mte:
            return criterion if call is None else Called(criterion, call)
        if not self.settings['distill']:
            return Apart(criterion, call)
        return mte.MTELoss(criterion, self.settings['weight'], call)

    def add(self) -> None:
        """Adds what else the method has."""

    def forward(self, views: list[torch.Tensor], labels: torch.Tensor, epoch: int) -> torch.Tensor:
        raise RuntimeError(f'{type(self).__name__} must define forward')

    def targets(self, views: Any) -> Any:
        with torch.no_grad():
            return self.teacher(views)

    def loss(self, student: Any, teacher: Any) -> torch.Tensor:
        """The criterion, in float32 whatever the precision of the step."""
        output = getattr(student, 'output', student)
        with torch.autocast(output.device.type, enabled=False):
            loss: torch.Tensor = self.criterion(in_float32(student), in_float32(teacher))
        return loss

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        """Moves the teacher; its momentum rises to 1 as ``progress`` does."""
        if self.teacher is not None:
            rising = 0.5 * (1 - torch.cos(torch.tensor(progress * torch.pi)).item())
            update_momentum(self.student, self.teacher, 1 - (1 - self.settings['momentum']) * (1 - rising))

    @property
    def backbone(self) -> nn.Module:
        """The timm model that is trained."""
        model: nn.Module = self.student.backbone
        return model

    @property
    def evaluated(self) -> nn.Module:
        """The network to evaluate, with heads."""
        network: nn.Module = self.teacher if self.evaluates_teacher else self.student
        return network

    def before_step(self, epoch: int) -> None:
        """Called between backward and the optimizer's step."""

    def views(self, size: int) -> list[View]:
        """The views of an image of ``size`` pixels, here two."""
        s = self.settings
        return [View(size, s['global_scale'], s['jitter'], s['gray'], blur) for blur in s['blur'][:2]]


class Called(nn.Module):
    """A criterion with another order of arguments, as ``MTELoss(criterion, call=...)`` calls it."""

    def __init__(self, criterion: Any, call: Callable[..., Any]) -> None:
        super().__init__()
        self.criterion, self.call = criterion, call

    def forward(self, student: Any, teacher: Any, **kwargs: Any) -> Any:
        return self.call(self.criterion, student, teacher, **kwargs)


class Apart(nn.Module):
    """Ensemble and global token each with the method's loss, and nothing between them (paper Fig. 13)."""

    def __init__(self, criterion: Any, call: Optional[Callable[..., Any]]) -> None:
        super().__init__()
        call = call or (lambda criterion, s, t: criterion(s, t))
        self.of_ensemble, self.of_global = Called(criterion, call), Called(copy.deepcopy(criterion), call)

    def forward(self, student: mte.MTEOutput, teacher: mte.MTEOutput) -> torch.Tensor:
        loss: torch.Tensor = self.of_ensemble(student.aux, teacher.aux) + self.of_global(student.output, teacher.output)
        return loss / 2


class FullAttention(ViTAdapter):
    """Own tokens see the auxiliary CLS tokens: attention is not cut off (paper Tab. 16)."""

    def __call__(self, model: Any, x: torch.Tensor, aux_cls: Any = None, *_: Any, **inputs: Any) -> BackboneOutput:
        own, _ = self.tokenize(model, x)
        everything = model.norm(model.blocks(torch.cat([own, aux_cls], dim=1)))
        features, seen = everything.tensor_split([own.shape[1]], dim=1)
        grid = model.patch_embed.dynamic_feat_size(x.shape[-2:])
        return BackboneOutput(*self.head(model, features), features[:, self.num_prefix :], seen, grid)


class ClassCopies(ViTAdapter):
    """The class token in the place of every auxiliary CLS token: what several heads bring without them."""

    def __call__(self, model: Any, x: torch.Tensor, aux_cls: Any = None, *_: Any, **inputs: Any) -> BackboneOutput:
        out = super().__call__(model, x)
        return out._replace(aux_cls=out.features[:, None].expand(-1, aux_cls.shape[1], -1))


@torch.no_grad()
def start(student: mte.MTE, settings: dict[str, Any]) -> None:
    """Auxiliary CLS tokens and TEN as ``settings`` want them at the start, where they differ from the library's."""
    tokens, std = student.aux.cls_tokens, settings['cls_init']
    if tokens is not None and std == 'orthogonal':
        nn.init.orthogonal_(tokens[0])
        tokens.mul_(tokens.shape[-1] ** 0.5)
    elif tokens is not None and std not in (ABLATIONS['cls_init'], 'class'):
        tokens.mul_(std / ABLATIONS['cls_init'])
    if student.aux.ten is not None and settings['ten_scale'] == 'xavier':
        for weight in (student.aux.ten.q.weight, student.aux.ten.kv.weight.chunk(2)[0]):
            nn.init.xavier_uniform_(weight)
    elif student.aux.ten is not None and settings['ten_scale'] != 1:
        for layer in (student.aux.ten.proj, student.aux.ten.mlp.fc2):
            layer.weight.mul_(settings['ten_scale'])


def frozen_copy(module: nn.Module) -> nn.Module:
    # torch's weight_norm keeps a computed weight, and tensors with a graph refuse to be copied
    computed = (v for m in module.modules() for v in vars(m).values() if isinstance(v, torch.Tensor) and not v.is_leaf)
    return copy.deepcopy(module, {id(v): v.detach().clone() for v in computed}).requires_grad_(False)


def in_float32(out: Any) -> Any:
    """Outputs in float32, labels as they are."""
    if isinstance(out, torch.Tensor):
        return out.float() if out.is_floating_point() else out
    return out._replace(output=out.output.float(), aux=out.aux.float())


def predicted(out: Any, predictors: Any) -> Any:
    """Outputs after the predictor, each stream after its own."""
    if isinstance(out, torch.Tensor):
        return predictors[0](out)
    return out._replace(output=predictors[0](out.output), aux=predictors[1](out.aux))


class DINO(Method):
    """https://arxiv.org/abs/2104.14294"""

    evaluates_teacher = True
    defaults: ClassVar[dict[str, Any]] = {
        'momentum': 0.99,
        'hidden': 512,
        'bottleneck': 128,
        'prototypes': 1024,
        'batch_norm': False,  # in the head
        'frozen_epochs': 1,  # of the prototypes
        'teacher_temp': 0.04,
        'center_momentum': 0.9,
        'sinkhorn': 0,  # iterations of Sinkhorn-Knopp instead of centering
        'local_views': 4,
        'global_scale': (0.4, 1.0),
        'local_scale': (0.1, 0.4),
        'blur': (0.5, 0.1, 0.3),
        'solarization': 0.2,
        'jitter': 0.4,
        'gray': 0.2,
    }

    def head(self, dim: int) -> nn.Module:
        s = self.settings
        return DINOProjectionHead(
            dim, s['hidden'], s['bottleneck'], s['prototypes'], s['batch_norm'], s['frozen_epochs']
        )

    def make_criterion(self) -> Any:
        s = self.settings
        views, temperature, iterations = 2 + s['local_views'], s['teacher_temp'], s['sinkhorn']
        center_momentum = 1.0 if iterations else s['center_momentum']  # the center stays 0
        criterion = DINOLoss(s['prototypes'], temperature, temperature, center_momentum=center_momentum)

        def call(loss: Any, student: torch.Tensor, teacher: torch.Tensor) -> Any:
            if iterations:  # logits whose softmax is the assignment
                assigned = sinkhorn((teacher / temperature).softmax(dim=-1), iterations, gather_distributed=True)
                teacher = temperature * assigned.clamp(min=1e-20).log()
            return loss(list(teacher.chunk(2)), list(student.chunk(views)))

        return self.wrapped(criterion, call)

    def forward(self, views: list[torch.Tensor], labels: torch.Tensor, epoch: int) -> torch.Tensor:
        return self.loss(self.student(views), self.targets(views[:2]))

    def before_step(self, epoch: int) -> None:
        """As the method has it: prototypes rest at first."""
        self.global_head(self.student).cancel_last_layer_gradients(epoch)

    def global_head(self, network: Any) -> Any:
        return network.aux.global_head if self.with_mte else network.heads[0]

    def views(self, size: int) -> list[View]:
        s = self.settings
        backbone: Any = self.backbone
        patch = getattr(getattr(backbone, 'patch_embed', None), 'patch_size', (1, 1))[0]
        local_size = max(1, round(size * 4 / 7 / patch)) * patch
        colors = s['jitter'], s['gray']
        first = View(size, s['global_scale'], *colors, s['blur'][0])
        second = View(size, s['global_scale'], *colors, s['blur'][1], s['solarization'])
        return [first, second, *[View(local_size, s['local_scale'], *colors, s['blur'][2])] * s['local_views']]


class IBOT(DINO):
    """https://arxiv.org/abs/2111.07832: DINO, and the same of masked patches with the same head, counted once."""

    of_patches = True

    def add(self) -> None:
        super().add()
        backbone: Any = self.backbone
        self.masking = Masking(backbone.embed_dim)
        backbone.patch_embed.register_forward_hook(self.masking)
        self.patch_criterion = IBOTPatchLoss(self.settings['prototypes'], self.settings['teacher_temp'])

    def forward(self, views: list[torch.Tensor], labels: torch.Tensor, epoch: int) -> torch.Tensor:
        images = torch.cat(views[:2])
        backbone: Any = self.backbone
        mask = random_block_mask((len(images), *backbone.patch_embed.dynamic_feat_size(images.shape[-2:])))
        mask = mask.to(images.device)
        self.masking.mask = mask
        student, patches, head = self.with_patches(self.student, images)
        self.masking.mask = None
        with torch.no_grad():
            teacher, targets, teacher_head = self.with_patches(self.teacher, images)
        if len(views) > 2:
            student = joined(student, self.student(views[2:]))
        masked = mask.flatten(1)
        with torch.no_grad():
            patch_targets = teacher_head(targets[masked])
        of_patches = self.patch_criterion(patch_targets.float(), head(patches[masked]).float(), mask)
        loss: torch.Tensor = self.loss(student, teacher) + of_patches
        return loss

    def with_patches(self, model: Any, images: torch.Tensor) -> tuple[Any, torch.Tensor, nn.Module]:
        """What ``model`` returns, the patch tokens, and the head that both streams' class tokens and patches share."""
        head = self.global_head(model)
        if self.with_mte:
            out = model(images)
            return out, out.tokens.patches, head
        features = model.backbone.forward_features(images)
        return head(model.backbone.forward_head(features)), features[:, model.backbone.num_prefix_tokens :], head


class Masking(nn.Module):
    """A forward hook for ``patch_embed`` that puts a learnt token in the place of masked patches."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(dim))
        self.mask: Optional[torch.Tensor] = None  # B, H, W

    def forward(self, patch_embed: Any, images: Any, patches: torch.Tensor) -> torch.Tensor:
        if self.mask is None:
            return patches
        mask = self.mask if patches.ndim == 4 else self.mask.flatten(1)
        return torch.where(mask[..., None], self.token, patches)


def joined(a: Any, b: Any) -> Any:
    """Outputs of further views after those of the first."""
    if isinstance(a, torch.Tensor):
        return torch.cat([a, b])
    return a._replace(output=torch.cat([a.output, b.output]), aux=torch.cat([a.aux, b.aux]))


class HSSL(DINO):
    """https://arxiv.org/abs/2310.05108 with DINO's loss: convolutions over the patches teach the class token.

    The token of the heterogeneous head takes the place that the ensemble has in MTE; with MTE it is one more token of
    the ensemble.
    """

    defaults: ClassVar[dict[str, Any]] = {**DINO.defaults, 'blocks': 2}
    of_patches = True

    def make_student(self, backbone: Any, options: Options) -> nn.Module:
        network: Any = super().make_student(backbone, options)
        return Heterogeneous(network, self.global_head(network), self.head, self.settings['blocks'])

    def make_teacher(self) -> nn.Module:
        teacher: Any = frozen_copy(self.student)
        if self.with_mte:
            teacher.network.aux.is_teacher = True
        return teacher

    def wrapped(self, criterion: Any, call: Optional[Callable[..., Any]] = None) -> Any:
        return mte.MTELoss(criterion, self.settings['weight'], call)

    def global_head(self, network: Any) -> Any:
        return super().global_head(getattr(network, 'network', network))

    @property
    def backbone(self) -> nn.Module:
        model: nn.Module = self.student.network.backbone
        return model

    @property
    def evaluated(self) -> nn.Module:
        network: nn.Module = self.teacher.network
        return network


class Heterogeneous(nn.Module):
    """``network``, plain or with MTE, and ConvNeXt blocks over its patches.

    Args:
        network: A ViT with heads.
        global_head: Its head, of which the new one shares the prototypes.
        head: Width -> head.
        blocks: Number of ConvNeXt blocks.
    """

    def __init__(self, network: Any, global_head: Any, head: Callable[[int], Any], blocks: int) -> None:
        super().__init__()
        self.network = network
        dim = network.backbone.embed_dim
        self.blocks = nn.Sequential(*(ConvNeXtBlock(dim) for _ in range(blocks)), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Sequential(nn.LayerNorm(dim), head(dim))
        self.head[1].last_layer = global_head.last_layer

    def forward(self, views: list[torch.Tensor]) -> mte.MTEOutput:
        """Output of the class token, and of the heterogeneous token or the ensemble with it."""
        sizes = sorted({v.shape[-1] for v in views}, reverse=True)
        parts = [self.of_size(torch.cat([v for v in views if v.shape[-1] == size])) for size in sizes]
        output, aux = map(torch.cat, zip(*parts))
        return mte.MTEOutput(output, aux, None)

    def of_size(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        backbone = self.network.backbone
        if isinstance(self.network, mte.MTE):
            out = self.network(images)
            output, patches = out.output, out.tokens.patches
        else:
            features = backbone.forward_features(images)
            output = self.network.heads[0](backbone.forward_head(features))
            patches = features[:, backbone.num_prefix_tokens :]
        grid = backbone.patch_embed.dynamic_feat_size(images.shape[-2:])
        aux = self.head(self.blocks(patches.mT.unflatten(2, grid)))
        if isinstance(self.network, mte.MTE):  # prototypes are linear: as if they were given the mean of projections
            n = self.network.aux.heads.num_tokens
            aux = (n * out.aux + aux) / (n + 1)
        return output, aux


class BYOL(Method):
    """https://arxiv.org/abs/2006.07733"""

    defaults: ClassVar[dict[str, Any]] = {**Method.defaults, 'predictor_lr': 1.0}  # times the learning rate

    def head(self, dim: int) -> nn.Module:
        return BYOLProjectionHead(dim, self.settings['hidden'], self.settings['out'])

    def make_criterion(self) -> Any:
        return self.wrapped(NegativeCosineSimilarity())

    def add(self) -> None:
        out, hidden = self.settings['out'], self.settings['hidden']
        self.predictors = nn.ModuleList(BYOLPredictionHead(out, hidden, out) for _ in range(1 + self.with_mte))

    def forward(self, views: list[torch.Tensor], labels: torch.Tensor, epoch: int) -> torch.Tensor:
        return self.loss(predicted(self.student(views), self.predictors), self.targets(views[::-1]))


class MoCoV3(BYOL):
    """https://arxiv.org/abs/2104.02057: InfoNCE within the batch."""

    defaults: ClassVar[dict[str, Any]] = {**BYOL.defaults, 'predicts': True}  # or has no predictor

    def add(self) -> None:
        if self.settings['predicts']:
            super().add()
        else:
            self.predictors = nn.ModuleList(nn.Identity() for _ in range(1 + self.with_mte))

    def head(self, dim: int) -> nn.Module:
        return Method.head(self, dim)

    def make_criterion(self) -> Any:
        return self.wrapped(info_nce)

    def forward(self, views: list[torch.Tensor], labels: torch.Tensor, epoch: int) -> torch.Tensor:
        return self.loss(predicted(self.student(views), self.predictors), self.targets(views))


class MoBY(BYOL):
    """https://arxiv.org/abs/2105.04553: InfoNCE with a queue of keys, and a predictor."""

    defaults: ClassVar[dict[str, Any]] = {**BYOL.defaults, 'queue': 1024}

    def head(self, dim: int) -> nn.Module:
        return MoCoProjectionHead(dim, self.settings['hidden'], self.settings['out'], batch_norm=True)

    def make_criterion(self) -> Any:
        return self.wrapped(NTXentLoss(0.2, memory_bank_size=(self.settings['queue'], self.settings['out'])))


class Supervised(Method):
    """Labels, and what timm's recipes have beside them; with MTE paper eqs. 7 to 9."""

    defaults: ClassVar[dict[str, Any]] = {
        'global_scale': (0.5, 1.0),
        'jitter': 0.0,
        'drop_path': 0.0,
        'mixup': 0.0,
        'cutmix': 0.0,
        'smoothing': 0.0,  # of labels
        'average': 0.0,  # decay of the moving average of weights that is evaluated; 0: the weights themselves
    }
    classifies = True

    def make_criterion(self) -> Any:
        return mte.MTECrossEntropy(weight=self.settings['weight']) if self.with_mte else nn.CrossEntropyLoss()

    def make_teacher(self) -> Optional[nn.Module]:
        return frozen_copy(self.student) if self.settings['average'] else None

    def add(self) -> None:
        s, backbone = self.settings, self.backbone
        mixes = {'mixup_alpha': s['mixup'], 'cutmix_alpha': s['cutmix'], 'label_smoothing': s['smoothing']}
        self.mixup = Mixup(**mixes, num_classes=backbone.num_classes) if any(mixes.values()) else None

    def forward(self, views: list[torch.Tensor], labels: torch.Tensor, epoch: int) -> torch.Tensor:
        images, target = views[0], labels
        if self.mixup is not None:
            images, target = self.mixup(images.clone(), labels)
        return self.loss(self.student(images if self.with_mte else [images]), target)

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        if self.teacher is not None:
            update_momentum(self.student, self.teacher, self.settings['average'])
            for average, buffer in zip(self.teacher.buffers(), self.student.buffers()):  # statistics of batch norms
                average.copy_(buffer)

    @property
    def evaluated(self) -> nn.Module:
        network: nn.Module = self.student if self.teacher is None else self.teacher
        return network

    def views(self, size: int) -> list[View]:
        return [View(size, self.settings['global_scale'], self.settings['jitter'], gray=0)]


METHODS: dict[str, type[Method]] = {
    'dino': DINO,
    'ibot': IBOT,
    'byol': BYOL,
    'moco_v3': MoCoV3,
    'moby': MoBY,
    'hssl': HSSL,
    'supervised': Supervised,
}
