"""SwinTransformer/Transformer-SSL (MoBY): Swin with pooled tokens, DeiT with auxiliary CLS tokens too."""

import inspect
from types import SimpleNamespace
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import nn

from ..backbones import Adapter, BackboneOutput, register_adapter
from ..backbones.base import check_same, grid_of, refuse
from ..backbones.resnet import out_features
from ..utils import input_size
from .options import config_for, weight_of
from .stream import AuxiliaryStream

__all__ = ['MoBY', 'SwinAdapter', 'add_mte', 'has_parts_of_swin']


def has_parts_of_swin(model: Any) -> bool:
    """Whether ``model`` is Microsoft's SwinTransformer, as Transformer-SSL and iBOT carry it."""
    layers = getattr(model, 'layers', None)
    return (
        isinstance(layers, nn.ModuleList)
        and all(isinstance(getattr(layer, 'blocks', None), nn.ModuleList) for layer in layers)
        and isinstance(getattr(model, 'avgpool', None), nn.AdaptiveAvgPool1d)
        and all(isinstance(getattr(model, name, None), nn.Module) for name in ('patch_embed', 'pos_drop', 'norm'))
        and not callable(getattr(model, 'forward_head', None))
    )


@register_adapter
class SwinAdapter(Adapter):
    """The repository's SwinTransformer; the global token is the mean of its patches."""

    def __init__(self, model: Any) -> None:
        self.dim = self.out_dim = model.num_features
        check_same(model, (2, *input_size(model)), lambda x: [(self(model, x).output, model(x))])

    @staticmethod
    def takes(model: Any) -> bool:
        return has_parts_of_swin(model) and 'return_all_tokens' not in inspect.signature(model.forward).parameters

    def __call__(
        self, model: Any, x: torch.Tensor, aux_cls: Optional[torch.Tensor] = None, see_global: bool = False, **more: Any
    ) -> BackboneOutput:
        refuse(more, model)
        size = (x.shape[-2], x.shape[-1])
        x = model.patch_embed(x)
        if model.ape:
            x = x + model.absolute_pos_embed
        x = model.pos_drop(x)
        for layer in model.layers:
            x = layer(x)
        patches = model.norm(x)
        features = model.avgpool(patches.transpose(1, 2)).flatten(1)
        return BackboneOutput(model.head(features), features, patches, None, grid_of(patches.shape[1], size))

    def num_classes(self, model: Any) -> int:
        return out_features(model.head)


class MoBY(AuxiliaryStream):
    """The step of MoBY with auxiliary tokens: keys, in the loss and in the queues, are the momentum ensemble's."""

    def forward(self, moby: Any, im_1: torch.Tensor, im_2: torch.Tensor) -> torch.Tensor:
        """The loss of two views (B, 3, H, W); momentum encoder and queues advance once, by the host's own rules.

        Args:
            moby: The host's ``MoBY``, of which this is the part ``mte``.
            im_1: First views.
            im_2: Second views.
        """
        q1, q2 = self._queries(moby, im_1), self._queries(moby, im_2)
        with torch.no_grad():
            ours = SimpleNamespace(
                encoder=self.online,
                encoder_k=self.target,
                projector=nn.Identity(),
                projector_k=nn.Identity(),
                contrast_momentum=moby.contrast_momentum,
                k=moby.k,
                K=moby.K,
            )
            type(moby)._momentum_update_key_encoder(ours)
            moby._momentum_update_key_encoder()
            k1, k2 = (F.normalize(self.run(self.target, moby.encoder_k, x).aux, dim=1) for x in (im_1, im_2))
        contrast = moby.contrastive_loss
        loss = self.mean(contrast, q1, k2, moby.queue2) + self.mean(contrast, q2, k1, moby.queue1)
        moby._dequeue_and_enqueue(k1, k2)
        return loss

    def _queries(self, moby: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out = self.run(self.online, moby.encoder, x)
        streams = moby.predictor(moby.projector(out.output)), self.predictor(out.aux)
        return F.normalize(streams[0], dim=1), F.normalize(streams[1], dim=1)


def add_mte(moby: Any, options: list[str]) -> None:
    """Adds the auxiliary stream to a ``MoBY`` model as ``.mte``, which its forward then calls.

    Args:
        moby: The model that ``build_model`` made.
        options: What the flags left in ``config.MODEL.MTE``.
    """
    config = config_for(moby.encoder, options)
    moby.mte = MoBY(moby.encoder, config, moby.projector, moby.predictor, weight_of(options))
