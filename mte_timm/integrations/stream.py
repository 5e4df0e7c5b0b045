"""What MoCo v3 and MoBY share: auxiliary streams beside encoders that stay where the host keeps them."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..auxiliary import AuxiliaryBranch, MTEConfig, MTEOutput
from ..building import add_branch
from ..heads import reset
from ..losses import check_weight

__all__ = ['AuxiliaryStream', 'fresh']


class AuxiliaryStream(nn.Module):
    """Auxiliary tokens of the online encoder and of its momentum copy, their projectors, and a predictor.

    The encoders belong to the host and are handed in at each call, so their parameters keep their names in the
    host's checkpoints and this adds its own under the name that the host gives it.

    Args:
        encoder: The online encoder, read for its kind and width.
        config: Options.
        projector: The host's projector of a token, as a pattern for those of the auxiliary tokens.
        predictor: The host's predictor, as a pattern for that of the auxiliary stream.
        weight: Of L_dist.
    """

    def __init__(
        self, encoder: nn.Module, config: MTEConfig, projector: nn.Module, predictor: nn.Module, weight: float
    ) -> None:
        super().__init__()
        self.adapter, self.online = add_branch(encoder, config, aux_head=lambda _: fresh(projector))
        self.target = copy.deepcopy(self.online).requires_grad_(False)
        self.target.is_teacher = True
        self.predictor = fresh(predictor)
        check_weight(weight)
        self.weight = weight

    def run(self, branch: AuxiliaryBranch, encoder: nn.Module, x: torch.Tensor) -> MTEOutput:
        """``encoder`` and its ``branch`` on images (B, C, H, W)."""
        out: MTEOutput = branch(self.adapter(encoder, x, branch.tokens(len(x)), branch.config.see_global))
        return out

    def mean(self, criterion: Callable[..., torch.Tensor], query: Any, key: torch.Tensor, *args: Any) -> torch.Tensor:
        """(L_aux + w L_dist) / (1 + w) of a criterion without state, for queries of both streams and the key."""
        of_global, of_aux = query
        ensemble, distill = criterion(of_aux, key, *args), criterion(of_global, key, *args)
        return (ensemble + self.weight * distill) / (1 + self.weight)

    def extra_repr(self) -> str:
        return f'weight={self.weight}'


def fresh(module: nn.Module) -> nn.Module:
    """A copy of ``module`` with parameters of its own draw.

    Raises:
        ValueError: it has parameters that can't be drawn anew, such as those of weight normalization.
    """
    twin = copy.deepcopy(module)
    reset(twin)
    for (name, new), old in zip(twin.named_parameters(), module.parameters()):
        if torch.equal(new, old) and old.numel() > 1 and old.std() > 0:
            raise ValueError(f'projector: {name} has no reset_parameters that draws it anew; give its module one')
    return twin.requires_grad_(True)
