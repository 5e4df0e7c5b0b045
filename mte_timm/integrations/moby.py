"""SwinTransformer/Transformer-SSL (MoBY): Swin with pooled tokens, DeiT with auxiliary CLS tokens too."""

from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .momentum import AuxiliaryStream
from .options import config_for, weight_of

__all__ = ['MoBY', 'enhance']


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
            k1, k2 = (F.normalize(self.target.run(moby.encoder_k, x).aux, dim=1) for x in (im_1, im_2))
        contrast = moby.contrastive_loss
        loss = self.mean(contrast, q1, k2, moby.queue2) + self.mean(contrast, q2, k1, moby.queue1)
        moby._dequeue_and_enqueue(k1, k2)
        return loss

    def _queries(self, moby: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out = self.online.run(moby.encoder, x)
        streams = moby.predictor(moby.projector(out.output)), self.predictor(out.aux)
        return F.normalize(streams[0], dim=1), F.normalize(streams[1], dim=1)


def enhance(moby: Any, options: list[str]) -> None:
    """Adds the auxiliary stream to a ``MoBY`` model as ``.mte``, which its forward then calls.

    Args:
        moby: The model that ``build_model`` made.
        options: What the flags left in ``config.MODEL.MTE``.
    """
    config = config_for(moby.encoder, options)
    moby.mte = MoBY(moby.encoder, config, moby.projector, moby.predictor, weight_of(options))
