"""facebookresearch/moco-v3: ViTs with auxiliary CLS and pooled tokens, ResNets with pooled tokens."""

from argparse import Namespace
from types import SimpleNamespace
from typing import Any

import torch

from .options import config_for, weight_of
from .stream import AuxiliaryStream

__all__ = ['MoCoV3', 'add_mte']


class MoCoV3(AuxiliaryStream):
    """The step of MoCo v3 with auxiliary tokens: keys are the momentum ensemble's, for both streams."""

    def forward(self, moco: Any, x1: torch.Tensor, x2: torch.Tensor, m: float) -> torch.Tensor:
        """The loss of two views (B, 3, H, W); the momentum encoder is updated first, by the host's own rule.

        Args:
            moco: The host's ``MoCo``, of which this is the part ``mte``.
            x1: First views.
            x2: Second views.
            m: Momentum.
        """
        q1, q2 = self._queries(moco, x1), self._queries(moco, x2)
        with torch.no_grad():
            moco._update_momentum_encoder(m)
            ours = SimpleNamespace(base_encoder=self.online, momentum_encoder=self.target)
            type(moco)._update_momentum_encoder(ours, m)
            k1, k2 = (self.run(self.target, moco.momentum_encoder, x).aux for x in (x1, x2))
        return self.mean(moco.contrastive_loss, q1, k2) + self.mean(moco.contrastive_loss, q2, k1)

    def _queries(self, moco: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out = self.run(self.online, moco.base_encoder, x)
        return moco.predictor(out.output), self.predictor(out.aux)


def add_mte(moco: Any, args: Namespace) -> None:
    """Adds the auxiliary stream to a ``MoCo`` as ``.mte``, which its forward then calls.

    Args:
        moco: ``MoCo_ViT`` or ``MoCo_ResNet``.
        args: The script's arguments; ``mte`` is what the flags left.
    """
    encoder = moco.base_encoder
    projector = encoder.head if hasattr(encoder, 'head') else encoder.fc
    moco.mte = MoCoV3(encoder, config_for(encoder, args.mte), projector, moco.predictor, weight_of(args.mte))
