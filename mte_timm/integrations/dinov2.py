"""facebookresearch/dinov2: its ViTs with auxiliary CLS and pooled tokens."""

from collections.abc import MutableMapping
from typing import Any

import torch
from torch import nn

from ..attention import attend
from .meta_arch import MetaArch

__all__ = ['DINOv2', 'add_mte']


class ObservedAttention:
    """Before the repository's ``MemEffAttention``: the last ``num_observers`` tokens of each sequence are observers."""

    num_heads: int
    num_observers: int
    num_hidden: int
    qkv: nn.Module
    proj: nn.Module
    proj_drop: nn.Module

    def forward(self, x: torch.Tensor, attn_bias: Any = None) -> torch.Tensor:
        """(B, L, D) -> (B, L, D); with ``attn_bias`` (1, sum of B * L, D), sequences of several lengths in a row."""
        qkv = self.qkv(x)
        y = torch.cat([self._attend(part) for part in ([qkv] if attn_bias is None else attn_bias.split(qkv))])
        out: torch.Tensor = self.proj_drop(self.proj(y.view(x.shape)))
        return out

    def _attend(self, qkv: Any) -> torch.Tensor:
        """(B, L, 3 * D) -> (B * L, D)."""
        own = qkv.shape[1] - self.num_observers
        q, k, v = qkv.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # B, num_heads, L, head_dim
        return attend(q, k, v, own, self.num_hidden).transpose(1, 2).flatten(2).flatten(0, 1)


class PrototypesAlone:
    """Before the repository's ``DINOHead``, which cannot yet be asked for its last layer."""

    last_layer: nn.Module

    def forward(self, x: torch.Tensor, only_last_layer: bool = False) -> torch.Tensor:
        """(B, D), or projections (B, bottleneck) with ``only_last_layer``, -> (B, K)."""
        out: torch.Tensor = self.last_layer(x) if only_last_layer else super().forward(x)  # type: ignore[misc]
        return out


class DINOv2(MetaArch):
    """What the patch calls of the auxiliary tokens in DINOv2's ``SSLMetaArch``."""

    def teacher_logits(self, out: Any) -> torch.Tensor:
        """The ensemble's logits (2 * B, K) in place of the class token's, the two crops in reverse as there."""
        return torch.cat(self.logits(self.arch.teacher, out)[0].chunk(2)[::-1])

    def loss(
        self, global_out: Any, local_out: Any, teacher_probs: torch.Tensor, loss_dict: MutableMapping[str, torch.Tensor]
    ) -> torch.Tensor:
        """L_aux, a scalar: the host's DINO terms with the student's ensemble. They join ``loss_dict`` unweighted.

        Args:
            global_out: What the student's backbone gave for the two global crops.
            local_out: Likewise for local crops.
            teacher_probs: The host's ``teacher_dino_softmaxed_centered_list``, (2, B, K).
            loss_dict: The host's, for its log.
        """
        of_global, of_local = self.logits(self.arch.student, global_out, local_out)
        n_local = self.arch.cfg.crops.local_crops_number
        terms = 2 + 2 * n_local  # of pairs of crops; global ones run together, hence the 2
        on_local = self.arch.dino_loss(of_local.chunk(n_local), teacher_probs) / terms
        on_global = self.arch.dino_loss([of_global], [teacher_probs.flatten(0, 1)]) * 2 / terms
        loss_dict['mte_global_crops_loss'], loss_dict['mte_local_crops_loss'] = on_global, on_local
        return self.loss_weight * (on_local + on_global)


def add_mte(arch: Any) -> DINOv2:
    """Adds auxiliary tokens to an ``SSLMetaArch`` that is complete; they are sharded as its DINO head is.

    Raises:
        ValueError: an unknown option.
    """
    for name in ('student', 'teacher'):
        head, precision = arch._modules[name]['dino_head'], arch.cfg.compute_precision[name]
        head.__class__ = type(f'Shared{type(head).__name__}', (PrototypesAlone, type(head)), {})
        precision['mte'] = precision['dino_head']
    return DINOv2(arch, ObservedAttention)
