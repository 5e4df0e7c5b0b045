"""facebookresearch/dino: ViTs with auxiliary CLS and pooled tokens, torchvision's ResNets with pooled tokens."""

from argparse import Namespace
from pathlib import Path
from typing import Any

from torch import nn

from ..losses import MTELoss
from ..model import MTE
from .options import allow_host_checkpoints, config_for, refuse_plain_checkpoint, weight_of

__all__ = ['enhance', 'loss']


def enhance(student: Any, teacher: Any, args: Namespace) -> tuple[nn.Module, nn.Module]:
    """Student and teacher with auxiliary tokens, in place of the two ``MultiCropWrapper``.

    They take lists of crops as those do and return an :class:`~mte_timm.MTEOutput`. Heads are the repository's
    own class with the arguments of its own call.

    Args:
        student: ``MultiCropWrapper`` of the student.
        teacher: Likewise of the teacher.
        args: The script's arguments; ``mte`` is what the flags left.

    Raises:
        ValueError: an option that is none, or a checkpoint to resume from that was made without the flag.
    """
    allow_host_checkpoints()
    refuse_plain_checkpoint(Path(args.output_dir, 'checkpoint.pth'))
    config = config_for(student.backbone, args.mte)
    make: Any = type(student.head)

    def student_head(dim: int) -> nn.Module:
        return make(dim, args.out_dim, use_bn=args.use_bn_in_head, norm_last_layer=args.norm_last_layer)

    def teacher_head(dim: int) -> nn.Module:
        return make(dim, args.out_dim, args.use_bn_in_head)

    with_tokens = MTE(student.backbone, config, student_head), MTE(teacher.backbone, config, teacher_head)
    with_tokens[1].teaches = True
    return with_tokens


def loss(criterion: nn.Module, args: Namespace) -> MTELoss:
    """``DINOLoss`` of ensemble and distillation; its centre advances once a step, with the ensemble."""
    return MTELoss(criterion, weight=weight_of(args.mte))
