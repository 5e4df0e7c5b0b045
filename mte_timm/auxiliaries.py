"""What training adds to a backbone: its options, its tokens, and the joint forward.

Owns which parts a model gets and the handling of many views. Knows nothing of how a backbone runs (`backbones/`), how
tokens are made (`tokens.py`) or what is trained with them (`losses.py`).
"""

import copy
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, NamedTuple, Optional, Union

import torch
from timm.layers import trunc_normal_
from torch import nn

from .backbones import Family, find_family
from .heads import make_heads, prototypes_of
from .tokens import AdaptivePooling, PlainPooling, TokenEnhancing

__all__ = ['Auxiliaries', 'MTEConfig', 'MTEOutput', 'MTETokens']

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
        """Of options that a file has, which may be of a newer version, those that are known here."""
        return cls(**{field.name: options[field.name] for field in fields(cls) if field.name in options})

    def describe(self) -> str:
        """The options in a line, as repr and model cards show them."""
        parts = []
        if self.n_cls:
            how = ' enhanced (TEN)' if self.ten else ''
            seen = ', seeing the global token' if self.see_global else ''
            parts.append(f'{self.n_cls} auxiliary CLS token{"s" * (self.n_cls > 1)}{how}{seen}')
        if self.n_pool:
            how = 'pooled'
            if self.pooling == 'adaptive':
                pw = 'shared' if self.shared_pointwise else 'own'
                how = f'adaptively pooled (kernel {self.kernel_size}x{self.kernel_size}, {pw} point-wise convolution)'
            else:
                how = f'{self.pooling}-pooled'
            parts.append(f'{self.n_pool} {how} token{"s" * (self.n_pool > 1)}')
        return '; '.join([*parts, f'{"independent" if self.independent_heads else "shared"} heads'])


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
    """(B, H*W, D): patch tokens, as the plain model's forward_features gives them."""
    grid: Any
    """(H, W)."""


class MTEOutput(NamedTuple):
    """What :class:`MTE` returns, in train and eval mode alike."""

    output: torch.Tensor
    """What the plain model returns for the same images, or the global head's output where a head is given."""
    aux: torch.Tensor
    """The fused auxiliary output, of the same shape."""
    tokens: MTETokens
    """The tokens themselves."""


class Auxiliaries(nn.Module):
    """Everything that training adds to a backbone: auxiliary CLS tokens, TEN, pooling and heads.

    Knows how to run beside a backbone, which it is given each time and does not own: :class:`MTE` holds both,
    `integrations/` leave the backbone where the host keeps it.

    Args:
        backbone: The model to run beside; only read.
        config: Options.
        head: Width -> head, of the global token and of every auxiliary token.
        aux_head: Width -> head of an auxiliary token, where the backbone or its host has the global token's.
    """

    teaches = False
    """Whether this is a teacher, of which losses read the auxiliary output alone; see :func:`make_teacher`."""

    def __init__(
        self,
        backbone: nn.Module,
        config: MTEConfig,
        head: Optional[Callable[[int], nn.Module]] = None,
        aux_head: Optional[Callable[[int], nn.Module]] = None,
    ) -> None:
        super().__init__()
        family = find_family(backbone)
        _check(backbone, family, config, head)
        self.config = config
        self.family = family
        dim = family.dim
        self.aux_cls = nn.Parameter(torch.empty(1, config.n_cls, dim)) if config.n_cls else None
        self.ten = TokenEnhancing(dim, family.num_heads) if config.n_cls and config.ten else None
        self.pool: Optional[nn.Module] = None
        if config.n_pool:
            self.pool = (
                AdaptivePooling(dim, config.n_pool, config.kernel_size, config.shared_pointwise)
                if config.pooling == 'adaptive'
                else PlainPooling(config.pooling)
            )
        self.global_head, self.aux_heads = make_heads(
            config.n_cls + config.n_pool,
            dim,
            family.out_dim,
            head,
            family.num_classes(backbone),
            config.independent_heads,
            aux_head,
        )
        if self.aux_cls is not None:
            trunc_normal_(self.aux_cls, std=0.02)  # each of its own draw
        like = next((p for p in backbone.parameters() if p.is_floating_point()), None)
        if like is not None:
            self.to(device=like.device, dtype=like.dtype)
        self.train(backbone.training)

    def train(self, mode: bool = True) -> 'Auxiliaries':
        """As in torch; but of a teacher only norms with batch statistics follow the mode, and nothing is random."""
        super().train(mode)
        if self.teaches:
            for module in list(self.modules())[1:]:
                # a cache of attention biases, as LeViT's in eval mode, would outlive a momentum update
                module.training = hasattr(module, 'attention_bias_cache') or (
                    mode and ('running_var' in module._buffers or 'running_mean' in module._buffers)
                )
        return self

    def run(self, backbone: nn.Module, x: Union[torch.Tensor, Iterable[torch.Tensor]], **inputs: Any) -> MTEOutput:
        """Runs ``backbone`` and the auxiliary tokens on images or a list of views; see :meth:`MTE.forward`.

        Args:
            backbone: The model that this was made for, or one of the same class and size.
            x: Images (B, C, H, W), or a list of such tensors.
            inputs: What else the backbone's forward takes with images, e.g. iBOT's ``mask``.
        """
        if self.teaches and not torch.compiler.is_compiling():
            self.train(self.training)  # whatever was called on its parts
        if isinstance(x, torch.Tensor):
            output, tokens = self._tokens(backbone, x, **inputs)
        else:
            output, tokens = self._tokens_of_views(backbone, list(x))
        aux = self.fuse(tokens)
        classifies = self.family.num_classes(backbone) and isinstance(output, torch.Tensor) and not self.teaches
        if classifies and output.shape != aux.shape:
            raise ValueError(
                f'model: its classifier gives {output.shape[-1]} classes and those of the auxiliary tokens '
                f'{aux.shape[-1]}; call model.reset_classifier({output.shape[-1]}) before you replace one'
            )
        if self.teaches:
            output = aux
        elif self.global_head is not None:
            output = self.global_head(tokens.global_token)
        return MTEOutput(output, aux, tokens)

    def fuse(self, tokens: MTETokens) -> torch.Tensor:
        """The fused auxiliary output of ``tokens``, paper eq. 3."""
        return self.aux_heads(torch.cat([tokens.aux_cls, tokens.pooled], dim=1), prototypes_of(self.global_head))

    def _tokens(self, backbone: nn.Module, x: torch.Tensor, **inputs: Any) -> tuple[Any, MTETokens]:
        """The plain model's output for images of one size, and all tokens."""
        if x.ndim != 4:
            raise ValueError(f'x: pass images (B, C, H, W) or a list of such tensors, got {tuple(x.shape)}')
        try:
            features, patches, observers, grid = self.family.run(
                backbone, x, self.aux_cls, self.config.see_global, **inputs
            )
        except AssertionError as e:
            raise _of_size(backbone, x, e) from e
        z = self.family.normalise(backbone, patches)
        none = z[:, :0]  # B, 0, D
        aux_cls = none if observers is None else self.family.normalise(backbone, observers)
        if self.ten is not None:
            aux_cls = self.ten(aux_cls, z)
        pooled = none if self.pool is None else self.pool(z, grid)
        classifies = self.family.num_classes(backbone)
        if self.teaches and classifies:  # nobody reads the classifier's output
            output = global_token = self.family.pre_logits(backbone, features)
        else:
            output = global_token = self.family.output(backbone, features)
            if classifies:
                global_token = self.family.pre_logits(backbone, features)
        return output, MTETokens(global_token, aux_cls, pooled, patches, grid)

    def _tokens_of_views(self, backbone: nn.Module, views: list[torch.Tensor]) -> tuple[torch.Tensor, MTETokens]:
        """As `_tokens`, for views: one run for each size, everything back in the order of the views."""
        if not views or not all(isinstance(v, torch.Tensor) for v in views):
            raise ValueError('x: pass images (B, C, H, W) or a list of at least one such tensor')
        by_size: dict[tuple[int, ...], list[int]] = {}
        for i, view in enumerate(views):
            by_size.setdefault(tuple(view.shape[1:]), []).append(i)
        if len(by_size) == 1:
            output, tokens = self._tokens(backbone, torch.cat(views))
            _check_one_output(output)
            patches = torch.split(tokens.patches, [len(view) for view in views])
            return output, tokens._replace(patches=patches, grid=(tokens.grid,) * len(views))
        parts: list[Any] = [None] * len(views)  # view -> output, global_token, aux_cls, pooled, patches, grid
        for indices in by_size.values():
            output, (*of_size, grid) = self._tokens(backbone, torch.cat([views[i] for i in indices]))
            _check_one_output(output)
            split = [t.split([len(views[i]) for i in indices]) for t in (output, *of_size)]
            for k, i in enumerate(indices):
                parts[i] = (*(s[k] for s in split), grid)
        *fields, patches, grids = zip(*parts)
        output, global_token, aux_cls, pooled = (torch.cat(field) for field in fields)
        if not self.family.num_classes(backbone):  # one tensor, as for images of one size
            output = global_token
        return output, MTETokens(global_token, aux_cls, pooled, patches, grids)

    def __deepcopy__(self, memo: dict[int, Any]) -> 'Auxiliaries':
        # torch's weight_norm, as in DINO's head, keeps a computed weight, and tensors with a graph refuse to be copied
        for module in self.modules():
            computed = (v for v in vars(module).values() if isinstance(v, torch.Tensor) and not v.is_leaf)
            memo.update((id(v), v.detach().clone()) for v in computed)
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__.update(copy.deepcopy(vars(self), memo))
        return twin


def _of_size(backbone: nn.Module, x: torch.Tensor, error: AssertionError) -> Exception:
    """What to say where timm asserts the size of images."""
    made_for = getattr(getattr(backbone, 'patch_embed', None), 'img_size', None)
    size = tuple(x.shape[-2:])
    if made_for is None or tuple(made_for) == size or 'divisible' in str(error):
        return error
    accepted = inspect.signature(type(backbone).__init__).parameters
    option = next((o for o in ('dynamic_img_size=True', 'strict_img_size=False') if o.split('=')[0] in accepted), '')
    return ValueError(
        f'x: images of {size[0]}x{size[1]}, but {type(backbone).__name__} was made for {made_for[0]}x{made_for[1]}; '
        f'create it with img_size={size if size[0] != size[1] else size[0]}'
        + (f', or for views of several sizes with {option}' if option else '')
    )


def _check_one_output(output: Any) -> None:
    if not isinstance(output, torch.Tensor):
        raise ValueError('x: many views need a model of one output; call set_distilled_training(False)')


def _check(backbone: Any, family: Family, config: MTEConfig, head: Optional[Callable[[int], nn.Module]]) -> None:
    name = type(backbone).__name__
    if config.n_cls and not family.attends:
        raise ValueError(
            f'n_cls={config.n_cls}: {name} has no attention stream that could carry auxiliary CLS tokens '
            f'(ViT, Eva, NaFlexViT, CaiT and XCiT do); use mte.wrap(model, n_cls=0, n_pool={config.n_pool or 6})'
        )
    if head is not None and family.num_classes(backbone):
        raise ValueError(
            f'head: {name} has a classifier of {family.num_classes(backbone)} classes where the head would stand; '
            'create the model with num_classes=0 or call model.reset_classifier(0) first'
        )
    if getattr(backbone, 'global_pool', None) == '':
        raise ValueError(
            f"model: {name} was made with global_pool='', so it has no global token to distil into; "
            'create it with its default pooling'
        )
    drop = getattr(getattr(backbone, 'patch_drop', None), 'prob', 0.0)
    if drop and config.n_pool and config.pooling == 'adaptive':
        raise ValueError(
            f'n_pool={config.n_pool}: {name} drops patches (patch_drop_rate={drop}), which leaves no grid '
            'for adaptive pooling; create it with patch_drop_rate=0, or use n_pool=0'
        )
