"""Every other timm model whose forward_features gives a spatial map: Swin, ConvNeXt, ResNet, ..."""

from typing import Any, Optional

import torch
import torch.nn.functional as F
from timm.layers import NormMlpClassifierHead
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..utils import evaluating, input_size
from .base import Adapter, BackboneOutput, grid_of, refuse

__all__ = ['FeatureMapAdapter']


class FeatureMapAdapter(Adapter):
    """The model runs as it is; its last map is read as patches.

    One forward on the meta device, which computes nothing, tells the layout: NCHW, NHWC, or NLC with some leading
    tokens that are no patches.
    """

    def __init__(self, model: Any) -> None:
        width = getattr(model, 'num_features', None)
        if width is None:
            raise ValueError(f'model: {_name(model)} does not say num_features, the width of its last map')
        size = input_size(model)
        shape, pooled, self.head_norms = _probe(model, size)
        if len(pooled) != 2:
            raise ValueError(
                f'model: forward_head of {_name(model)} gives features of shape {pooled}, no global token; '
                'create it with its default pooling'
            )
        self.out_dim = pooled[1]
        self.num_prefix = 0
        if len(shape) == 4:
            nchw, nhwc = shape[1] == width, shape[3] == width
            if nchw and nhwc:  # as many channels as columns
                nchw = getattr(model, 'output_fmt', 'NCHW') != 'NHWC'
            if not nchw and not nhwc:
                raise ValueError(f'model: {_name(model)} gives a map {shape} without an axis of num_features={width}')
            self.layout, self.dim = ('NCHW', shape[1]) if nchw else ('NHWC', shape[3])
            grid = shape[2:] if nchw else shape[1:3]
        elif len(shape) == 3:
            self.layout, self.dim = 'NLC', shape[2]
            self.num_prefix, grid = _split_sequence(model, shape[1], size[1:])
        else:
            raise ValueError(
                f'model: {_name(model)} gives features of shape {shape}, no spatial map that could be pooled'
            )
        if grid[0] * grid[1] < 2:
            raise ValueError(
                f'model: {_name(model)} gives features of shape {shape}, a grid of {grid}: nothing to pool'
            )

    @staticmethod
    def takes(model: Any) -> bool:
        return callable(getattr(model, 'forward_features', None)) and callable(getattr(model, 'forward_head', None))

    def __call__(
        self, model: Any, x: torch.Tensor, aux_cls: Optional[torch.Tensor] = None, see_global: bool = False, **more: Any
    ) -> BackboneOutput:
        refuse(more, model)
        features = model.forward_features(x)
        if self.layout == 'NLC':
            patches = features[:, self.num_prefix :]
            grid = grid_of(patches.shape[1], (x.shape[-2], x.shape[-1]))
        elif self.layout == 'NHWC':
            patches, grid = features.flatten(1, 2), (features.shape[1], features.shape[2])
        else:
            patches, grid = features.flatten(2).transpose(1, 2), (features.shape[2], features.shape[3])
        return BackboneOutput(*self.head(model, features), self._final_norm(model, patches), None, grid)

    def _final_norm(self, model: Any, tokens: torch.Tensor) -> torch.Tensor:
        """The norm that ConvNeXt and others keep for after their pooling."""
        head = getattr(model, 'head', None)
        norm = getattr(model, 'fc_norm', None) or getattr(head, 'norm', None)
        if isinstance(norm, nn.LayerNorm) and tuple(norm.normalized_shape) == (self.dim,):
            # by its parameters, since timm's LayerNorm2d wants channels first
            return F.layer_norm(tokens, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
        if isinstance(head, NormMlpClassifierHead) and not isinstance(norm, _BatchNorm):  # norms a map of one pixel
            return head.norm(tokens.transpose(1, 2).unsqueeze(-1)).squeeze(-1).transpose(1, 2)
        return tokens

    def pre_logits(self, model: Any, features: torch.Tensor) -> torch.Tensor:
        # statistics of batch norm in the head have advanced already, when the model's own output was computed
        norms = [model.get_submodule(name) for name in self.head_norms] if model.training else []
        kept = [(norm, name, buffer) for norm in norms for name, buffer in norm.named_buffers()]
        for norm, name, buffer in kept:  # a clone takes the second advance; autograd holds on to the buffer itself
            setattr(norm, name, buffer.clone())
        global_token = model.forward_head(features, pre_logits=True)
        for norm, name, buffer in kept:
            setattr(norm, name, buffer)
        return global_token


def _split_sequence(model: Any, length: int, size: tuple[int, int]) -> tuple[int, tuple[int, int]]:
    """(number of leading tokens that are no patches, grid of the rest) of a sequence from images of ``size``.

    What the model doesn't say, the grid tells: it has the images' aspect ratio for one number of class tokens only.
    """
    for num_prefix in (getattr(model, 'num_prefix_tokens', 0), 0, 1, 2):
        if length > num_prefix:
            h, w = grid_of(length - num_prefix, size)
            if h * size[1] == w * size[0]:
                return num_prefix, (h, w)
    raise ValueError(
        f'model: {_name(model)} gives a sequence of {length} tokens, which make no grid of images of {size}'
    )


class _Probe(nn.Module):
    """forward_features and forward_head as a module's forward, as functional_call wants it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> tuple[Any, Any, tuple[str, ...]]:
        model: Any = self.model
        features = model.forward_features(x)
        if not isinstance(features, torch.Tensor):
            return features, None, ()
        used: list[str] = []
        norms = [(name, m) for name, m in model.named_modules() if isinstance(m, _BatchNorm)]
        hooks = [m.register_forward_pre_hook(lambda *_, n=name: used.append(n)) for name, m in norms]
        try:
            return features, model.forward_head(features, pre_logits=True), tuple(used)
        finally:
            for hook in hooks:
                hook.remove()


def _probe(model: nn.Module, size: tuple[int, int, int]) -> tuple[tuple[int, ...], tuple[int, ...], tuple[str, ...]]:
    """For two images of ``size``: shapes of forward_features and of forward_head before the classifier, and names of
    the batch norms that run in the latter."""
    probe = _Probe(model)
    like = next(iter(model.parameters()), torch.empty(0))
    try:
        with torch.no_grad(), evaluating(model):
            try:
                state = {
                    k: torch.empty_like(v, device='meta')
                    for k, v in (*probe.named_parameters(), *probe.named_buffers())
                }
                x = torch.empty(2, *size, device='meta', dtype=like.dtype)
                # tie_weights would put modules that stand in two places back wrongly
                features, pooled, norms = torch.func.functional_call(probe, state, (x,), tie_weights=False)
            except Exception:  # operations without a meta kernel, tensors that are no buffers: compute it
                features, pooled, norms = probe(torch.zeros(2, *size, device=like.device, dtype=like.dtype))
    except Exception as e:
        raise ValueError(f'model: {_name(model)} raises {type(e).__name__} on images of {size}: {e}') from e
    if not isinstance(features, torch.Tensor):
        raise ValueError(
            f'model: forward_features of {_name(model)} gives a {type(features).__name__}, '
            'no single spatial map to pool'
        )
    return tuple(features.shape), tuple(pooled.shape), norms


def _name(model: Any) -> str:
    cfg = getattr(model, 'pretrained_cfg', None) or {}
    return str(cfg.get('architecture') or type(model).__name__)
