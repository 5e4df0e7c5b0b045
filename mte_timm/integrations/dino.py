"""facebookresearch/dino: ViTs with auxiliary CLS and pooled tokens, torchvision's ResNets with pooled tokens."""

from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..auxiliaries import MTEOutput
from ..losses import MTELoss, check_outputs, state_kept
from ..model import MTE
from .options import allow_host_checkpoints, config_for, refuse_plain_checkpoint, weight_of

__all__ = ['DINOPairLoss', 'cross_entropy_of_views', 'enhance', 'loss']


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


class DINOPairLoss(MTELoss):
    """``DINOLoss`` of ensemble and distillation, with the teacher's softmax and centre computed once for both.

    Temperatures and centre are the criterion's, which stays what is saved and resumed. The criterion itself is called
    twice, as by :class:`~mte_timm.MTELoss`, where it computes something else: that is tried when this is made.
    """

    def __init__(self, criterion: Any, weight: float = 1.0) -> None:
        super().__init__(criterion, weight)
        self.shared = self._is_known()

    def forward(self, student: MTEOutput, teacher: MTEOutput, epoch: int) -> torch.Tensor:
        """The loss of all crops (ncrops * B, K) of the student and two (2 * B, K) of the teacher, a scalar."""
        check_outputs(student, teacher)
        if not self.shared:
            loss: torch.Tensor = super().forward(student, teacher, epoch)
            return loss
        ensemble, distill = self._of_streams((student.aux, student.output), teacher.aux, epoch)
        return (ensemble + self.weight * distill) / (1 + self.weight)

    def _of_streams(self, streams: Any, teacher: torch.Tensor, epoch: int) -> list[torch.Tensor]:
        criterion: Any = self.criterion
        temperature = criterion.teacher_temp_schedule[epoch]
        targets = ((teacher.detach() - criterion.center) / temperature).softmax(dim=-1)
        losses = [cross_entropy_of_views(s / criterion.student_temp, targets, criterion.ncrops) for s in streams]
        criterion.update_center(teacher)
        return losses

    def _is_known(self) -> bool:
        """Whether the criterion gives the loss of this, moves its centre as this does, and changes nothing else."""
        criterion: Any = self.criterion
        try:
            center, views, epochs = criterion.center, criterion.ncrops, len(criterion.teacher_temp_schedule)
            draw = torch.Generator().manual_seed(0)
            student, teacher, start = (
                torch.randn(n, center.shape[-1], generator=draw).to(center) for n in (3 * views, 3 * 2, 1)
            )
            for epoch in {0, epochs // 2, epochs - 1}:
                results = []
                for run in (criterion, lambda s, t, epoch: self._of_streams((s,), t, epoch)[0]):
                    with state_kept(criterion):
                        criterion.center = start.clone().view_as(center)
                        value = run(student, teacher, epoch)
                        buffers = {n: b.double() for n, b in criterion.named_buffers()}
                        others = {k: v for k, v in vars(criterion).items() if isinstance(v, (int, float))}
                    results.append((value.double(), buffers, others))
                (loss, moved, changed), (ours, by_us, unchanged) = results
                same = changed == unchanged and all(torch.allclose(b, by_us[n], rtol=1e-3) for n, b in moved.items())
                if not (same and torch.allclose(loss, ours, rtol=1e-3)):
                    return False
        except Exception:  # whatever it does with what DINO's criterion takes, it is not that
            return False
        return True


def cross_entropy_of_views(logits: torch.Tensor, targets: torch.Tensor, views: int) -> torch.Tensor:
    """Mean cross-entropy of views with targets of other views, and mean over images.

    Args:
        logits: (views * B, K), view by view.
        targets: Probabilities (t * B, K) of the first t views, without gradient.
        views: Their number.
    """
    size = logits.shape[-1]
    log_p = (logits.float() if logits.itemsize < 4 else logits).log_softmax(dim=-1).view(views, -1, size)
    q = targets.to(log_p.dtype).view(-1, log_p.shape[1], size)  # t, B, K
    both = min(len(q), views)  # these views have a target of their own, which does not count
    all_q = q.sum(dim=0)
    log_likelihood = ((all_q - q[:both]) * log_p[:both]).sum() + (all_q * log_p[both:].sum(dim=0)).sum()
    return -log_likelihood / ((len(q) * views - both) * log_p.shape[1])


def loss(criterion: nn.Module, args: Namespace) -> DINOPairLoss:
    """``DINOLoss`` of ensemble and distillation; its centre advances once a step, with the ensemble."""
    return DINOPairLoss(criterion, weight=weight_of(args.mte))
