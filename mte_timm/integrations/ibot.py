"""bytedance/ibot: ViT and Swin, masked image modeling as it is there."""

import inspect
from argparse import Namespace
from pathlib import Path
from typing import Any, NamedTuple, Optional

import torch
from torch import nn

from ..backbones import Adapter, BackboneOutput, register_adapter
from ..backbones.base import grid_of, refuse
from ..criteria import preserve_state
from ..losses import MTELoss
from ..model import MTE
from .dino import DINOViTAdapter, has_parts_of_vit
from .moby import has_parts_of_swin
from .options import allow_host_checkpoints, config_for, refuse_plain_checkpoint, weight_of

__all__ = ['IBOT', 'ClassOutput', 'IBOTLoss', 'IBOTSwinAdapter', 'IBOTViTAdapter', 'add_mte', 'loss']


@register_adapter
class IBOTViTAdapter(DINOViTAdapter):
    """DINO's ViT with masked patches, mean pooling, and all tokens as output where the model is made so."""

    @staticmethod
    def takes(model: Any) -> bool:
        return has_parts_of_vit(model) and 'mask' in inspect.signature(model.prepare_tokens).parameters

    def finish(
        self, model: Any, features: torch.Tensor, aux_cls: Optional[torch.Tensor], grid: tuple[int, int]
    ) -> BackboneOutput:
        patches, norm = features[:, 1:], model.fc_norm
        if norm is not None:  # mean pooling
            features = torch.cat([norm(patches.mean(dim=1, keepdim=True)), patches], dim=1)
            patches, aux_cls = norm(patches), None if aux_cls is None else norm(aux_cls)
        global_token = features[:, 0]
        output = features if model.return_all_tokens else global_token
        return BackboneOutput(output, global_token, patches, aux_cls, grid)

    def tokenize(self, model: Any, x: torch.Tensor, **more: Any) -> torch.Tensor:
        mask = more.pop('mask', None)
        refuse(more, model)
        if not model.masked_im_modeling:
            return model.prepare_tokens(x)
        if mask is None:
            raise ValueError('mask: this model was made with masked_im_modeling=True; pass a mask (B, H, W) of patches')
        return model.prepare_tokens(x, mask=mask)


@register_adapter
class IBOTSwinAdapter(Adapter):
    """The repository's SwinTransformer; the global token is the mean of its patches."""

    def __init__(self, model: Any) -> None:
        self.dim = self.out_dim = model.num_features

    @staticmethod
    def takes(model: Any) -> bool:
        return has_parts_of_swin(model) and 'return_all_tokens' in inspect.signature(model.forward).parameters

    def __call__(
        self, model: Any, x: torch.Tensor, aux_cls: Optional[torch.Tensor] = None, see_global: bool = False, **more: Any
    ) -> BackboneOutput:
        # the script hands a mask over in any case, and this Swin, unlike the ViT, uses it in any case
        every = model(x, return_all_tokens=True, **(more if model.masked_im_modeling else {}))
        global_token, patches = every[:, 0], every[:, 1:]
        grid = grid_of(patches.shape[1], (x.shape[-2], x.shape[-1]))
        return BackboneOutput(every if model.return_all_tokens else global_token, global_token, patches, None, grid)

    def num_classes(self, model: Any) -> int:
        return 0  # its forward never runs its head


class ClassOutput(NamedTuple):
    """Stands where the repository has the logits of the class token, and carries those of the auxiliary tokens."""

    output: torch.Tensor
    """(B, out_dim): of the global token; of a teacher, the same as ``aux``."""
    aux: torch.Tensor
    """(B, out_dim): fused, of the auxiliary tokens."""

    def chunk(self, chunks: int) -> tuple[torch.Tensor, ...]:
        """``output`` by crop, for the statistics that the script prints."""
        return self.output.chunk(chunks)


class IBOT(MTE):
    """Student or teacher, in place of iBOT's ``MultiCropWrapper``. Its head runs on class and patch tokens.

    What a teacher says of an image is what its auxiliary tokens say, in the script's statistics too.
    """

    def forward(  # type: ignore[override]
        self, x: Any, mask: Optional[Any] = None
    ) -> tuple[ClassOutput, torch.Tensor]:
        """Runs crops of one size through backbone, auxiliary tokens and heads.

        Args:
            x: Crops (B, 3, H, W), or a list of them.
            mask: Masked patches (B, H, W) of each crop, or a list of such; where the backbone models masked images.

        Returns:
            Logits of the class token with those of the auxiliary tokens, and logits of the patches (B, N, K).
        """
        crops = torch.cat(x) if isinstance(x, list) else x
        inputs = {} if mask is None else {'mask': torch.cat(mask) if isinstance(mask, list) else mask}
        aux_cls = self.aux.tokens(len(crops))
        out = self.adapter(self.backbone, crops, aux_cls, self.config.see_global, **inputs)
        head: Any = self.aux.global_head
        class_logits, patch_logits = head(out.output)
        aux = self.aux.heads(self.aux.enhance(out).auxiliary, head.last_layer)
        return ClassOutput(aux if self.aux.is_teacher else class_logits, aux), patch_logits


class IBOTLoss(MTELoss):
    """``iBOTLoss`` of ensemble and distillation on the class tokens; the loss of masked patches is counted once."""

    def forward(  # type: ignore[override]
        self,
        student_output: tuple[ClassOutput, torch.Tensor],
        teacher_output: tuple[ClassOutput, torch.Tensor],
        student_local_cls: Optional[ClassOutput],
        student_mask: list[torch.Tensor],
        epoch: int,
    ) -> dict[str, torch.Tensor]:
        """Takes what the script hands to ``iBOTLoss`` and returns, as that does, ``cls``, ``patch`` and ``loss``."""
        (student, student_patch), (teacher, teacher_patch) = student_output, teacher_output
        of_global, of_aux = (None, None) if student_local_cls is None else student_local_cls
        no_patches = student_patch.detach()[:, :0], teacher_patch[:, :0], [m[..., :0] for m in student_mask]
        with preserve_state(self.criterion):
            distill = self.criterion(
                (student.output, no_patches[0]), (teacher.aux.detach(), no_patches[1]), of_global, no_patches[2], epoch
            )
        ensemble = self.criterion(
            (student.aux, student_patch), (teacher.aux, teacher_patch), of_aux, student_mask, epoch
        )
        cls = (ensemble['cls'] + self.weight * distill['cls']) / (1 + self.weight)
        return {'cls': cls, 'patch': ensemble['patch'], 'loss': cls + ensemble['patch']}


def add_mte(student: Any, teacher: Any, args: Namespace) -> tuple[nn.Module, nn.Module]:
    """Student and teacher with auxiliary tokens, in place of the two ``MultiCropWrapper``.

    Args:
        student: ``MultiCropWrapper`` of the student, with an ``iBOTHead``.
        teacher: Likewise of the teacher.
        args: The script's arguments; ``mte`` is what the flags left.

    Raises:
        ValueError: an unknown option, or a checkpoint to resume from that was made without the flag.
    """
    allow_host_checkpoints()
    if args.load_from:
        refuse_plain_checkpoint(Path(args.output_dir, args.load_from))
    config = config_for(student.backbone, args.mte)
    make: Any = type(student.head)
    common = {'patch_out_dim': args.patch_out_dim, 'norm': args.norm_in_head, 'act': args.act_in_head}

    def student_head(dim: int) -> nn.Module:
        own = {'norm_last_layer': args.norm_last_layer, 'shared_head': args.shared_head}
        return make(dim, args.out_dim, **common, **own)

    def teacher_head(dim: int) -> nn.Module:
        return make(dim, args.out_dim, **common, shared_head=args.shared_head_teacher)

    with_tokens = IBOT(student.backbone, config, student_head), IBOT(teacher.backbone, config, teacher_head)
    with_tokens[1].aux.is_teacher = True
    return with_tokens


def loss(criterion: nn.Module, args: Namespace) -> IBOTLoss:
    """``iBOTLoss`` with both streams; its two centers advance once a step."""
    return IBOTLoss(criterion, weight=weight_of(args.mte))
