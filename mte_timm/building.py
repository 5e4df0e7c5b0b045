"""Makes the auxiliary branch that fits a backbone.

Owns what a backbone must have for it. Knows nothing of where host and branch are kept (`model.py`, `integrations/`).
"""

import warnings
from typing import Any, Optional

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from .auxiliary import AuxiliaryBranch, MTEConfig
from .backbones import Adapter, FeatureMapAdapter, ViTAdapter, find_adapter
from .backbones.base import check_same
from .heads import AuxiliaryHeads, HeadFactory, make_heads
from .utils import input_size

__all__ = ['PROJECTION', 'add_branch', 'check_model', 'heads_for', 'is_projection']

PROJECTION = (
    "in the place of the classifier would be the global token's alone, and no export has it; pass it as "
    'head=lambda dim: ..., which makes one for every token, with a model of num_classes=0'
)


def add_branch(
    backbone: nn.Module, config: MTEConfig, head: Optional[HeadFactory] = None, aux_head: Optional[HeadFactory] = None
) -> tuple[Adapter, AuxiliaryBranch]:
    """How ``backbone`` runs, and a branch to run beside it; for training code that stores the backbone itself.

    Args:
        backbone: Only read.
        config: Options.
        head: Width -> head, of the global token and of each auxiliary token.
        aux_head: Width -> head of an auxiliary token, where the backbone or its host has the global token's.

    Raises:
        TypeError: see :func:`wrap`.
        ValueError: likewise.
    """
    adapter = find_adapter(backbone)
    _check(backbone, adapter, config, head, aux_head)
    if isinstance(adapter, (ViTAdapter, FeatureMapAdapter)) and _may_do_more(backbone):
        _check_own_forward(backbone, adapter, config)
    global_head, heads = heads_for(adapter, backbone, config, head, aux_head)
    branch = AuxiliaryBranch(adapter.dim, adapter.num_heads, config, heads, global_head)
    like = next((p for p in backbone.parameters() if p.is_floating_point()), None)
    if like is not None:
        branch.to(device=like.device, dtype=like.dtype)
    return adapter, branch.train(backbone.training)


def check_model(model: Any) -> None:
    """Refuses what is no model to be wrapped, with a TypeError, and warns of one that would not learn."""
    if hasattr(model, '_orig_mod') or isinstance(model, (DataParallel, DistributedDataParallel)):
        raise TypeError(
            f'model: is inside a {type(model).__name__}; wrap the timm model itself, then compile what wrap '
            'returns, or distribute it with DistributedDataParallel'
        )
    if not isinstance(model, nn.Module):
        raise TypeError(f'model: pass a timm model or its name, got {type(model).__name__}')
    if not any(p.requires_grad for p in model.parameters()):
        what = "all of the model's parameters are frozen, as a teacher's are"
        warnings.warn(f'{what}: only auxiliary parts will learn, unless you call requires_grad_(True)', stacklevel=3)


def _classifier_of(backbone: Any) -> Any:
    """What stands in the classifier's place; None where timm does not say."""
    try:
        return backbone.get_classifier() if hasattr(backbone, 'get_classifier') else None
    except AttributeError:  # of SHViT and EfficientViT without classes
        return None


def is_projection(classifier: Any, classes: int) -> bool:
    """Whether what stands in the classifier's place is no classifier, of which auxiliary tokens get their own."""
    odd = isinstance(classifier, nn.Module) and getattr(classifier, 'out_features', None) is None
    has_weights = odd and any(True for _ in classifier.parameters())
    return isinstance(classifier, nn.Sequential) or (has_weights and not classes)


def _may_do_more(backbone: Any) -> bool:
    """Whether its forward may be more than its class's in timm, which is what runs."""
    replaced = {'forward', 'forward_features'} & vars(backbone).keys()
    hooks = backbone._forward_hooks or backbone._forward_pre_hooks
    parts = (type(backbone), *(getattr(type(backbone), name, None) for name in ('forward', 'forward_features')))
    foreign = any(p is not None and not p.__module__.startswith('timm.') for p in parts)
    return bool(replaced or hooks) or foreign


def _check_own_forward(backbone: Any, adapter: Adapter, config: MTEConfig) -> None:
    """Refuses a backbone that computes something else when it is called."""
    size = input_size(backbone)

    def pairs(x: torch.Tensor) -> Any:
        tokens = x.new_zeros(len(x), 1, adapter.dim) if config.n_cls else None
        compared = []
        try:
            for training in (True, False):  # of its parts none is
                backbone.training = training
                compared.append((adapter(backbone, x, tokens).output, backbone(x)))
        finally:
            backbone.training = False
        return compared

    try:
        check_same(backbone, (2, *size), pairs)
    except ValueError as e:
        if not type(backbone).__module__.startswith('timm.'):
            raise
        raise ValueError(
            'model: its hooks, or a forward that was replaced on the object or its class, change what it computes, and '
            'wrap runs neither; move what they do to the data, to the head or into a class of your own'
        ) from e


def heads_for(
    adapter: Adapter,
    backbone: nn.Module,
    config: MTEConfig,
    head: Optional[HeadFactory] = None,
    aux_head: Optional[HeadFactory] = None,
) -> tuple[Optional[nn.Module], AuxiliaryHeads]:
    """:func:`make_heads` of the widths and classes of ``backbone``."""
    num_tokens, classes = config.n_cls + config.n_pool, adapter.num_classes(backbone)
    return make_heads(num_tokens, adapter.dim, adapter.out_dim, head, classes, config.independent_heads, aux_head)


def _check(
    backbone: Any,
    adapter: Adapter,
    config: MTEConfig,
    head: Optional[HeadFactory],
    aux_head: Optional[HeadFactory],
) -> None:
    name = type(backbone).__name__
    if config.n_cls and not adapter.attends:
        raise ValueError(
            f'n_cls={config.n_cls}: {name} has no attention stream that could carry auxiliary CLS tokens '
            f'(ViT, Eva, NaFlexViT, CaiT and XCiT do); use mte.wrap(model, n_cls=0, n_pool={config.n_pool or 6})'
        )
    classifier = _classifier_of(backbone)
    if isinstance(classifier, nn.Identity) and backbone.num_classes:
        what = f'an Identity stands where timm knows of a classifier of {backbone.num_classes} classes'
        raise ValueError(f'model: {what}; call model.reset_classifier(0) instead')
    classes = adapter.num_classes(backbone)
    if aux_head is None and getattr(classifier, 'out_features', classes) != classes:
        what = f'a layer of {classifier.out_features} features stands where timm knows of {classes} classes'
        raise ValueError(f'model: {what}; call model.reset_classifier({classifier.out_features}), or pass it as head=')
    if aux_head is None and is_projection(classifier, classes):
        raise ValueError(f'model: a {type(classifier).__name__} {PROJECTION}')
    if head is not None and classes:
        how = 'create the model with num_classes=0, or call model.reset_classifier(0)'
        if not hasattr(backbone, 'num_classes'):  # torchvision's
            how = 'put nn.Identity() in its place'
        raise ValueError(f'head: {name} has a classifier of {classes} classes where the head would stand; {how}')
    if getattr(backbone, 'global_pool', None) == '':
        raise ValueError(
            f"model: {name} was made with global_pool='', so it has no global token to distill into; "
            'create it with its default pooling'
        )
    drop = getattr(getattr(backbone, 'patch_drop', None), 'prob', 0.0)
    if drop and config.n_pool and config.pooling == 'adaptive':
        raise ValueError(
            f'n_pool={config.n_pool}: {name} drops patches (patch_drop_rate={drop}), which leaves no grid '
            'for adaptive pooling; create it with patch_drop_rate=0, or use n_pool=0'
        )
