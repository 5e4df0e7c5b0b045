"""The auxiliary branch: everything that training adds to a backbone, and its options and outputs.

Owns how tokens and heads go together. Knows nothing of how a backbone runs (`backbones/`), how single tokens are made
(`tokens.py`) or what is trained with them (`losses.py`).
"""

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, NamedTuple, Optional, Union

import torch
from timm.layers import trunc_normal_
from torch import nn

from .backbones import BackboneOutput
from .heads import AuxiliaryHeads, prototypes_of, reset
from .state_dicts import FORMER_NAMES_IN_BRANCH, rename
from .tokens import AdaptivePooling, PlainPooling, TokenEnhancing

__all__ = ['AuxiliaryBranch', 'MTEConfig', 'MTEOutput', 'MTETokens', 'make_deterministic']

POOLINGS = ('adaptive', 'avg', 'max')


@dataclass(frozen=True)
class MTEConfig:
    """What :func:`wrap` added to a model; its arguments, see there."""

    n_cls: int = 4
    n_pool: int = 6
    ten: bool = True
    pooling: str = 'adaptive'
    kernel_size: int = 11
    shared_pointwise: bool = True
    see_global: bool = False
    independent_heads: bool = True

    def __post_init__(self) -> None:
        for name in ('n_cls', 'n_pool'):
            n = getattr(self, name)
            if not isinstance(n, int) or isinstance(n, bool) or n < 0:
                raise ValueError(f'{name}={n!r}: must be an integer of 0 or more')
        if self.n_cls + self.n_pool == 0:
            raise ValueError('n_cls=0, n_pool=0: there is no token to add; set at least one of them above 0')
        if self.pooling not in POOLINGS:
            raise ValueError(f'pooling={self.pooling!r}: must be one of {", ".join(map(repr, POOLINGS))}')
        if self.pooling != 'adaptive' and self.n_pool > 1:
            raise ValueError(f'pooling={self.pooling!r} gives one and the same token each time: set n_pool=1')
        if not isinstance(self.kernel_size, int) or self.kernel_size < 1 or self.kernel_size % 2 == 0:
            raise ValueError(f'kernel_size={self.kernel_size!r}: must be an odd integer, e.g. 11')
        for name in ('ten', 'shared_pointwise', 'see_global', 'independent_heads'):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f'{name}={getattr(self, name)!r}: must be True or False')

    @classmethod
    def known(cls, options: Mapping[str, Any]) -> 'MTEConfig':
        """Options from a file, without those of a newer version that are not known here."""
        return cls(**{field.name: options[field.name] for field in fields(cls) if field.name in options})

    def describe(self) -> str:
        """The options in a line, as repr and model cards show them."""
        changed = [f'{k}={v!r}' for k, v in vars(self).items() if k[:2] != 'n_' and v != getattr(MTEConfig, k)]
        kinds = ((self.n_cls, 'auxiliary CLS'), (self.n_pool, 'pooled'))
        return ', '.join([*(f'{n} {kind} token{"s" * (n != 1)}' for n, kind in kinds if n), *changed])


class MTETokens(NamedTuple):
    """The tokens behind an :class:`MTEOutput`. For a list of views ``patches`` and ``grid`` are tuples, one
    entry a view, since views of different size have different grids; the rest is concatenated."""

    global_token: torch.Tensor
    """(B, D'): features of the plain model, what its classifier or the global head takes."""
    aux_cls: torch.Tensor
    """(B, n_cls, D): auxiliary CLS tokens, after TEN."""
    pooled: torch.Tensor
    """(B, n_pool, D): adaptively pooled tokens."""
    patches: Any
    """(B, H*W, D): patch tokens, after the final norm."""
    grid: Any
    """(H, W)."""

    @property
    def auxiliary(self) -> torch.Tensor:
        """(B, n_cls + n_pool, D): all auxiliary tokens."""
        return torch.cat([self.aux_cls, self.pooled], dim=1)


class MTEOutput(NamedTuple):
    """What :class:`MTE` returns, in train and eval mode alike."""

    output: torch.Tensor
    """What the plain model returns for the same images, or the global head's output where a head is given."""
    aux: torch.Tensor
    """The fused auxiliary output, of the same shape."""
    tokens: MTETokens
    """The tokens themselves."""


class AuxiliaryBranch(nn.Module):
    """Everything that training adds to a backbone: auxiliary CLS tokens, TEN, pooling and heads.

    It never holds the backbone. Whoever does calls it twice a forward, :class:`MTE` as well as a host repository that
    keeps its backbone elsewhere:

        aux_cls = branch.tokens(len(images))                # they enter the sequence
        out = adapter(backbone, images, aux_cls)            # BackboneOutput
        output, aux, tokens = branch(out)                   # MTEOutput

    Args:
        dim: Width of the tokens.
        num_heads: Attention heads of TEN, the backbone's own count.
        config: Options.
        heads: Of the auxiliary tokens; see :func:`make_heads`.
        global_head: Of the global token, where the backbone or its host has none.
    """

    is_teacher = False
    """Whether losses read the auxiliary output alone; see :func:`make_teacher`."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        config: MTEConfig,
        heads: AuxiliaryHeads,
        global_head: Optional[nn.Module] = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.cls_tokens = nn.Parameter(torch.empty(1, config.n_cls, dim)) if config.n_cls else None
        self.ten = TokenEnhancing(dim, num_heads) if config.n_cls and config.ten else None
        self.pool: Optional[nn.Module] = None
        if config.n_pool and config.pooling == 'adaptive':
            self.pool = AdaptivePooling(dim, config.n_pool, config.kernel_size, config.shared_pointwise)
        elif config.n_pool:
            self.pool = PlainPooling(config.pooling)
        self.global_head, self.heads = global_head, heads
        if self.cls_tokens is not None:
            trunc_normal_(self.cls_tokens, std=0.02)  # each of its own draw

    def init_weights(self) -> None:
        """Initializes all parameters anew, for hosts that build their models on the meta device.

        Raises:
            ValueError: a head has parameters that nothing draws, such as those of weight normalization.
        """
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.fill_(math.nan)
        if self.cls_tokens is not None:
            trunc_normal_(self.cls_tokens, std=0.02)
        for part in self.children():
            reset(part)
        if left := [name for name, p in self.named_parameters() if not p.is_meta and p.isnan().any()]:
            what = 'no init_weights or reset_parameters draws it anew'
            raise ValueError(f'head: {left[0]}: {what}; give its module an init_weights that does')

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that take no weight decay."""
        return {'cls_tokens'}

    def tokens(self, n_images: int) -> Optional[torch.Tensor]:
        """The auxiliary CLS tokens that enter the sequence, (n_images, n_cls, D), or None where there are none."""
        return None if self.cls_tokens is None else self.cls_tokens.expand(n_images, -1, -1)

    def forward(self, x: Union[BackboneOutput, int]) -> Any:
        """The outputs and tokens of a run of the backbone.

        Args:
            x: What the backbone gave. Or a number of images, for :meth:`tokens` under a wrapper such as
                FullyShardedDataParallel, which gathers parameters in ``forward`` only.

        Returns:
            :class:`MTEOutput`.
        """
        if isinstance(x, int):
            return self.tokens(x)
        return self.project(x.output, self.enhance(x))

    def enhance(self, x: BackboneOutput) -> MTETokens:
        """The tokens of one run: auxiliary CLS tokens after TEN, and pooled ones."""
        none = x.patches[:, :0]  # B, 0, D
        aux_cls = none if x.aux_cls is None else x.aux_cls
        if self.ten is not None:
            aux_cls = self.ten(aux_cls, x.patches)
        pooled = none if self.pool is None else self.pool(x.patches, x.grid)
        return MTETokens(x.features, aux_cls, pooled, x.patches, x.grid)

    def project(self, output: Any, tokens: MTETokens) -> MTEOutput:
        """Tokens to the fused auxiliary output, paper eq. 3, beside the plain ``output`` or the global head's."""
        aux = self.heads(tokens.auxiliary, prototypes_of(self.global_head))
        if self.is_teacher:
            output = aux
        elif self.global_head is not None:
            output = self.global_head(tokens.global_token)
        return MTEOutput(output, aux, tokens)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        rename(state_dict, prefix, FORMER_NAMES_IN_BRANCH)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def train(self, mode: bool = True) -> 'AuxiliaryBranch':
        """As in torch; a teacher stays deterministic."""
        super().train(mode)
        if self.is_teacher:
            make_deterministic(self, mode)
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> 'AuxiliaryBranch':
        # torch's weight_norm, as in DINO's head, keeps a computed weight, and tensors with a graph refuse to be copied
        for module in self.modules():
            computed = (v for v in vars(module).values() if isinstance(v, torch.Tensor) and not v.is_leaf)
            memo.update((id(v), v.detach().clone()) for v in computed)
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__setstate__(copy.deepcopy(self.__getstate__(), memo))  # type: ignore[no-untyped-call]
        return twin


def make_deterministic(module: nn.Module, mode: bool) -> None:
    """Lets no part of ``module`` be random; in train ``mode``, norms with batch statistics go on to use the batch."""
    for part in list(module.modules())[1:]:
        # a cache of attention biases, as LeViT's in eval mode, would outlive a momentum update
        part.training = hasattr(part, 'attention_bias_cache') or (
            mode and ('running_var' in part._buffers or 'running_mean' in part._buffers)
        )
