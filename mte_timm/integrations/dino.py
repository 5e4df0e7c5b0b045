"""facebookresearch/dino: ViTs with auxiliary CLS and pooled tokens, torchvision's ResNets with pooled tokens."""

import inspect
from argparse import Namespace
from pathlib import Path
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import nn

from ..attention import attend
from ..backbones import Adapter, BackboneOutput, register_adapter
from ..backbones.base import check_same, refuse
from ..losses import MTELoss
from ..model import MTE
from .options import allow_host_checkpoints, config_for, refuse_plain_checkpoint, weight_of

__all__ = ['DINOViTAdapter', 'add_mte', 'has_parts_of_vit', 'loss']


@register_adapter
class DINOViTAdapter(Adapter):
    """The repository's VisionTransformer, recognized by its parts. Its blocks take no mask, so they run step by step.

    The blocks themselves are never called, so wrappers around single blocks (FSDP's, activation checkpointing's) don't
    take part: shard the wrapped model as a whole.
    """

    attends = True

    def __init__(self, model: Any) -> None:
        self.dim = self.out_dim = model.embed_dim
        self.num_heads = model.blocks[0].attn.num_heads
        blocks = model.blocks
        check_same(model, (2, 3, self.dim), lambda x: [(_step(block, x, 3, 0), block(x)) for block in blocks])

    @staticmethod
    def takes(model: Any) -> bool:
        return has_parts_of_vit(model) and 'mask' not in inspect.signature(model.prepare_tokens).parameters

    def __call__(
        self, model: Any, x: torch.Tensor, aux_cls: Optional[torch.Tensor] = None, see_global: bool = False, **more: Any
    ) -> BackboneOutput:
        own = self.tokenize(model, x, **more)
        num_own, num_hidden = own.shape[1], 0 if see_global else 1
        joint = own if aux_cls is None else torch.cat([own, aux_cls.to(own.dtype)], dim=1)
        for block in model.blocks:
            joint = _step(block, joint, num_own, num_hidden)
        seen = None if aux_cls is None else model.norm(joint[:, num_own:])
        features = model.norm(joint[:, :num_own])
        size = model.patch_embed.patch_size
        height, width = size if isinstance(size, tuple) else (size, size)
        return self.finish(model, features, seen, (x.shape[-2] // height, x.shape[-1] // width))

    def finish(
        self, model: Any, features: torch.Tensor, aux_cls: Optional[torch.Tensor], grid: tuple[int, int]
    ) -> BackboneOutput:
        """What the model makes of its sequence (B, L, D) after the final norm."""
        global_token = features[:, 0]
        return BackboneOutput(global_token, global_token, features[:, 1:], aux_cls, grid)

    def tokenize(self, model: Any, x: torch.Tensor, **more: Any) -> torch.Tensor:
        """Images (B, 3, H, W) to the tokens (B, L, D) that enter the first block."""
        refuse(more, model)
        return model.prepare_tokens(x)

    def num_classes(self, model: Any) -> int:
        return 0  # its forward never runs its head


def has_parts_of_vit(model: Any) -> bool:
    """Whether ``model`` is the VisionTransformer of DINO, or of repositories that started from it."""
    blocks = getattr(model, 'blocks', None)
    return (
        callable(getattr(model, 'prepare_tokens', None))
        and isinstance(blocks, nn.ModuleList)
        and all(isinstance(getattr(model, name, None), nn.Module) for name in ('patch_embed', 'norm'))
        and all(isinstance(getattr(getattr(b, 'attn', None), 'qkv', None), nn.Linear) for b in blocks)
    )


def _step(block: Any, x: torch.Tensor, num_own: int, num_hidden: int) -> torch.Tensor:
    """One block on tokens (B, L, D), all observers but the first ``num_own``."""
    attn = block.attn
    qkv = attn.qkv(block.norm1(x)).unflatten(-1, (3, attn.num_heads, -1))
    q, k, v = qkv.permute(2, 0, 3, 1, 4)  # B, num_heads, L, head_dim
    options = {'dropout_p': attn.attn_drop.p if attn.training else 0.0, 'scale': attn.scale}
    if num_own < x.shape[1]:
        y = attend(q, k, v, num_own, num_hidden, **options)
    else:
        y = F.scaled_dot_product_attention(q, k, v, **options)
    y = attn.proj_drop(attn.proj(y.transpose(1, 2).flatten(2)))
    gamma_1, gamma_2 = getattr(block, 'gamma_1', None), getattr(block, 'gamma_2', None)
    x = x + block.drop_path(y if gamma_1 is None else gamma_1 * y)
    y = block.mlp(block.norm2(x))
    return x + block.drop_path(y if gamma_2 is None else gamma_2 * y)


def add_mte(student: Any, teacher: Any, args: Namespace) -> tuple[nn.Module, nn.Module]:
    """Student and teacher with auxiliary tokens, in place of the two ``MultiCropWrapper``.

    They take lists of crops as those do and return an :class:`~mte_timm.MTEOutput`. Heads are the repository's
    own class with the arguments of its own call.

    Args:
        student: ``MultiCropWrapper`` of the student.
        teacher: Likewise of the teacher.
        args: The script's arguments; ``mte`` is what the flags left.

    Raises:
        ValueError: an unknown option, or a checkpoint to resume from that was made without the flag.
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
    with_tokens[1].aux.is_teacher = True
    return with_tokens


def loss(criterion: nn.Module, args: Namespace) -> MTELoss:
    """``DINOLoss`` of ensemble and distillation; its center advances once a step, with the ensemble."""
    return MTELoss(criterion, weight=weight_of(args.mte))
