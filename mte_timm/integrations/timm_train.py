"""huggingface/pytorch-image-models: train.py, supervised training of any model that `wrap` takes."""

import dataclasses
from argparse import Namespace
from typing import Any

import torch
from torch import nn

from ..losses import MTECrossEntropy
from ..model import MTE, wrap
from .options import config_for, weight_of

__all__ = ['add_mte', 'loss']

REFUSED = {
    'kd_model_name': 'distillation from a further model reads the plain output alone',
    'naflex_loader': 'batches of patches with coordinates have no grid for pooled tokens',
    'torchscript': 'TorchScript does not take a wrapped model; use --torchcompile',
}


def add_mte(model: Any, args: Namespace) -> MTE:
    """``model`` with auxiliary tokens, each with a classifier that begins as the script lets the model's own begin.

    Args:
        model: What ``create_model`` made.
        args: The script's arguments; ``mte`` is what the flags left.

    Raises:
        ValueError: an unknown option, or a flag that does not go with MTE.
    """
    for name, why in REFUSED.items():
        if getattr(args, name, None):
            raise ValueError(f'--mte does not go with --{name.replace("_", "-")}: {why}')
    wrapped = wrap(model, **dataclasses.asdict(config_for(model, args.mte)))
    with torch.no_grad():
        for layer in wrapped.aux.heads.modules():
            if isinstance(layer, nn.Linear):
                if args.head_init_scale is not None:
                    layer.weight.mul_(args.head_init_scale)
                    layer.bias.mul_(args.head_init_scale)
                if args.head_init_bias is not None:
                    layer.bias.fill_(args.head_init_bias)
    return wrapped


def loss(criterion: nn.Module, args: Namespace) -> MTECrossEntropy:
    """The script's training loss ``criterion`` for the ensemble, and distillation into the plain output."""
    return MTECrossEntropy(criterion, weight=weight_of(args.mte))
