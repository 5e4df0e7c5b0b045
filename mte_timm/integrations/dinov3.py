"""facebookresearch/dinov3: its ViTs with auxiliary CLS and pooled tokens."""

from collections.abc import MutableMapping
from pathlib import Path
from typing import Any, Optional

import torch

from ..attention import attend
from .meta_arch import GO_ON, MetaArch

__all__ = ['DINOv3', 'add_mte']


class ObservedAttention:
    """Before the repository's ``SelfAttention``: its last ``num_observers`` tokens are observers, without positions."""

    num_heads: int
    num_observers: int
    num_hidden: int
    apply_rope: Any

    def compute_attention(self, qkv: Any, attn_bias: None = None, rope: Any = None) -> torch.Tensor:
        """(B, L, 3 * D) -> (B, L, D)."""
        own = qkv.shape[1] - self.num_observers
        q, k, v = qkv.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # B, num_heads, L, head_dim
        if rope is not None:  # it would rotate the last tokens
            rotated = self.apply_rope(q[:, :, :own], k[:, :, :own], rope)
            q, k = (torch.cat([new, t[:, :, own:]], dim=2) for new, t in zip(rotated, (q, k)))
        return attend(q, k, v, own, self.num_hidden).transpose(1, 2).flatten(2)


class DINOv3(MetaArch):
    """What the patch calls of the auxiliary tokens in DINOv3's ``SSLMetaArch``."""

    def teacher_logits(self, out: Any) -> torch.Tensor:
        """The ensemble's logits (crops * B, K), in place of the class token's."""
        return self.logits(self.arch.teacher, out)[0]

    def student_logits(self, global_out: Any, local_out: Any) -> tuple[torch.Tensor, ...]:
        """The ensemble's logits for global and local crops, (crops * B, K)."""
        return self.logits(self.arch.student, global_out, local_out)

    def loss(
        self,
        logits: tuple[Any, ...],
        teacher_probs: torch.Tensor,
        global_scale: float,
        local_scale: float,
        loss_dict: MutableMapping[str, torch.Tensor],
    ) -> torch.Tensor:
        """L_aux, a scalar: the host's DINO terms with the student's ensemble. They join ``loss_dict`` unscaled.

        Args:
            logits: Of :meth:`student_logits`.
            teacher_probs: The host's ``cls_centered``, (crops, B, K).
            global_scale: The host's ``dino_global_scale``.
            local_scale: Its ``dino_local_scale * local_weight``.
            loss_dict: The host's, for its log.
        """
        of_global, of_local = (part.unflatten(0, (-1, teacher_probs.shape[1])) for part in logits)
        ignore = self.arch.dino_global_ignore_diagonal
        on_global = self.arch.dino_loss(of_global, teacher_probs, ignore_diagonal=ignore)
        on_local = self.arch.dino_loss(of_local, teacher_probs)
        loss_dict['mte_global_crops_loss'], loss_dict['mte_local_crops_loss'] = on_global, on_local
        return self.loss_weight * (local_scale * on_local + global_scale * on_global)


def add_mte(arch: Any) -> DINOv3:
    """Adds auxiliary tokens to an ``SSLMetaArch`` that is complete but for its Gram teacher.

    Raises:
        ValueError: an unknown option, distillation, or a checkpoint to resume from that was made without ``mte``.
    """
    for name in ('distillation', 'multidistillation'):
        if arch.cfg[name].enabled:
            raise ValueError(f'mte does not go with {name}.enabled=true, whose teacher is no average of the student')
    _refuse_plain_checkpoint(Path(arch.cfg.train.output_dir, 'ckpt').expanduser())
    return DINOv3(arch, ObservedAttention)


def _refuse_plain_checkpoint(folder: Path) -> None:
    """The host would take of it what there is, and leave the rest at random."""
    from torch.distributed.checkpoint import FileSystemReader

    steps = [p for p in folder.glob('*') if p.name.isdecimal() and p.is_dir()]
    last: Optional[Path] = max(steps, key=lambda p: int(p.name), default=None)
    if last and not any('.mte.' in name for name in FileSystemReader(last).read_metadata().state_dict_metadata):
        raise ValueError(f'mte: {last} is of a run without it; {GO_ON}')
