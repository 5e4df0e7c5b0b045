"""wrap() and MTE: a timm model with auxiliary tokens around it.

Owns which parts a model gets, the joint forward and the handling of many views. Knows nothing of how a
backbone runs (`backbones/`), how tokens are made (`tokens.py`) or what is trained with them (`losses.py`).
"""

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Optional, Union

import timm
import torch
from timm.layers import trunc_normal_
from torch import nn

from .backbones import Family, find_family
from .heads import make_heads, prototypes_of
from .tokens import AdaptivePooling, PlainPooling, TokenEnhancing

__all__ = ['MTE', 'Auxiliaries', 'MTEConfig', 'MTEOutput', 'MTETokens', 'make_teacher', 'wrap']

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

    def run(self, backbone: nn.Module, x: Union[torch.Tensor, Iterable[torch.Tensor]], **inputs: Any) -> MTEOutput:
        """Runs ``backbone`` and the auxiliary tokens on images or a list of views; see :meth:`MTE.forward`.

        Args:
            backbone: The model that this was made for, or one of the same class and size.
            x: Images (B, C, H, W), or a list of such tensors.
            inputs: What else the backbone's forward takes with images, e.g. iBOT's ``mask``.
        """
        if isinstance(x, torch.Tensor):
            output, tokens = self._tokens(backbone, x, **inputs)
        else:
            output, tokens = self._tokens_of_views(backbone, list(x))
        aux = self.fuse(tokens)
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
        features, patches, observers, grid = self.family.run(
            backbone, x, self.aux_cls, self.config.see_global, **inputs
        )
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


class MTE(Auxiliaries):
    """A timm model that carries auxiliary tokens through training (MTE, arXiv 2411.15787).

    Made by :func:`wrap`. The model itself is ``.backbone``, untouched and usable at any time; attributes that
    MTE doesn't have are the backbone's. Everything that training adds is in ``aux_cls``, ``ten``, ``pool``,
    ``global_head`` and ``aux_heads``.
    """

    backbone: nn.Module

    def __init__(
        self,
        backbone: nn.Module,
        config: MTEConfig,
        head: Optional[Callable[[int], nn.Module]] = None,
    ) -> None:
        super().__init__(backbone, config, head)
        self.backbone = backbone

    def forward(self, x: Union[torch.Tensor, Iterable[torch.Tensor]]) -> MTEOutput:
        """Runs images, or a list of views, through the model and its auxiliary tokens.

        Args:
            x: Images (B, C, H, W), or a list of such tensors. Views of one resolution run together,
                the heads once over all; outputs come concatenated in the order of the views.

        Returns:
            See :class:`MTEOutput`.

        Raises:
            ValueError: ``x`` is neither.
        """
        return self.run(self.backbone, x)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == 'backbone':  # not built yet, or being unpickled
                raise
            return getattr(self.backbone, name)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As in torch, with a word on why weights don't fit: other options, or a plain model's."""
        try:
            return super().load_state_dict(state_dict, strict, assign)
        except RuntimeError as e:
            message = self._misfit(state_dict, '', strict)
            if not message or message in str(e):
                raise
            raise RuntimeError(f'{e}\n\t{message}') from None

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *found: Any) -> None:
        # within DistributedDataParallel and others load_state_dict is not called; strict is not known here
        if message := self._misfit(state_dict, prefix, strict=False):
            found[-1].append(message)
        super()._load_from_state_dict(state_dict, prefix, *found)

    def _misfit(self, state_dict: Mapping[str, Any], prefix: str, strict: bool) -> str:
        """Why weights don't fit, beyond torch's list of names; '' where there is nothing to say."""
        named = {k.removeprefix(prefix): v for k, v in state_dict.items() if k.startswith(prefix)}
        given = {k: tuple(getattr(v, 'shape', ())) for k, v in named.items()}
        own = {k: tuple(getattr(v, 'shape', ())) for k, v in self.state_dict().items()}
        plain = {k.removeprefix('backbone.') for k in own if k.startswith('backbone.')}
        if not any(k.startswith('backbone.') for k in given):
            if len(plain & given.keys()) <= len(plain) / 2:
                return ''
            return (
                "these are weights of a plain model, whose names lack 'backbone.': load them into the model that was "
                'wrapped, mte.strip(model).load_state_dict(...), and auxiliary tokens start new'
            )
        different = [
            f'{k} ({given.get(k, "missing")} instead of {own.get(k, "none")})'
            for k in sorted({**own, **given})
            if not k.startswith('backbone.') and own.get(k) != given.get(k) and (strict or (k in own and k in given))
        ]
        if not different:
            return ''
        return (
            f'these weights are of a model with other auxiliary tokens or heads than {self.config.describe()}: '
            f'{", ".join(different[:4])}{", ..." if len(different) > 4 else ""}. Wrap with the options and head= of '
            "that run, or load only what begins with 'backbone.', with strict=False, and auxiliary tokens start new"
        )

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that take no weight decay: the backbone's, and the auxiliary CLS tokens."""
        ours = getattr(self.backbone, 'no_weight_decay', set)
        return {'aux_cls'} | {f'backbone.{name}' for name in ours()}

    def group_matcher(self, coarse: bool = False) -> Callable[[str], tuple[float, ...]]:
        """Layers for timm's layer-wise decay: the backbone's, and auxiliary modules with its head."""
        backbone: Any = self.backbone
        layers = timm.models.group_parameters(backbone, backbone.group_matcher(coarse=coarse), reverse=True)
        last = max(layers.values())

        def layer_of(name: str) -> tuple[float, ...]:
            own = name.removeprefix('backbone.')
            # aux_cls enters with the class token, so it learns at that layer's rate
            if own == 'aux_cls':
                return (0.0,)
            return (float(layers[own]),) if own != name else (float(last),)

        return layer_of

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trades computation for memory in the backbone's blocks."""
        self.backbone.set_grad_checkpointing(enable)  # type: ignore[operator]

    def reset_classifier(self, num_classes: int, global_pool: Optional[str] = None) -> None:
        """Replaces the classifiers: the backbone's, and those of the auxiliary tokens by new ones.

        Args:
            num_classes: Classes, 0 for none.
            global_pool: As in timm.

        Raises:
            ValueError: where ``wrap`` was given a ``head``, which stands in the classifier's place.
        """
        if self.global_head is not None:
            raise ValueError('reset_classifier: this model was wrapped with head=; strip it and wrap it anew')
        if global_pool == '':
            raise ValueError("global_pool='': leaves no global token to distil into")
        backbone: Any = self.backbone
        backbone.reset_classifier(num_classes, **({} if global_pool is None else {'global_pool': global_pool}))
        self.family = find_family(backbone)
        like = next(backbone.parameters())
        _, heads = make_heads(
            self.aux_heads.num_tokens,
            self.family.dim,
            self.family.out_dim,
            None,
            num_classes,
            self.config.independent_heads,
        )
        self.aux_heads = heads.to(device=like.device, dtype=like.dtype).train(self.training)

    def extra_repr(self) -> str:
        added = sum(p.numel() for n, p in self.named_parameters() if not n.startswith('backbone.'))
        own = sum(p.numel() for p in self.backbone.parameters())
        counts = f'{added / 1e6:.2f}M parameters for training only, {own / 1e6:.2f}M after strip'
        return f'{self.config.describe()}\n{counts}'


def wrap(
    model: Union[nn.Module, str],
    n_cls: int = 4,
    n_pool: int = 6,
    *,
    head: Optional[Callable[[int], nn.Module]] = None,
    ten: bool = True,
    pooling: str = 'adaptive',
    kernel_size: int = 11,
    shared_pointwise: bool = True,
    see_global: bool = False,
    independent_heads: bool = True,
    **create_kwargs: Any,
) -> MTE:
    """Adds auxiliary tokens to a timm model for training.

    >>> import timm, torch, mte_timm as mte
    >>> model = mte.wrap(timm.create_model('test_vit', num_classes=0))
    >>> out = model(torch.randn(2, 3, 160, 160))
    >>> out.output.shape, out.aux.shape, out.tokens.aux_cls.shape, out.tokens.pooled.shape
    (torch.Size([2, 64]), torch.Size([2, 64]), torch.Size([2, 4, 64]), torch.Size([2, 6, 64]))
    >>> plain = mte.strip(model)  # the very model that was wrapped

    Nothing of the model is changed or patched: it stays usable as ``.backbone``, and its features are the
    same, to the bit on a CPU, whatever the auxiliary tokens do.

    Args:
        model: A timm model, or its name; a name is created with ``create_kwargs``. Also torchvision's ResNet, the ViT
            of the DINO and iBOT repositories, and the Swin of iBOT and Transformer-SSL.
        n_cls: Auxiliary CLS tokens. Needs a ViT, Eva, NaFlexViT, CaiT or XCiT of timm, or the ViT of DINO or iBOT;
            0 for any other.
        n_pool: Adaptively pooled tokens.
        head: Width -> projection head, e.g. ``lambda dim: DINOHead(dim, 65536)``. The global token and every
            auxiliary token get one of their own. Heads that end in a prototype layer named ``last_layer``
            (DINO, iBOT, lightly) share the global one's. Without it, a model with a classifier gets
            one more classifier for each auxiliary token, a model without returns tokens as they are.
        ten: Enhance the auxiliary CLS tokens (Token Enhancing module).
        pooling: ``'adaptive'``, or for ablation ``'avg'`` or ``'max'``, which give one token.
        kernel_size: Side of the depth-wise convolutions of adaptive pooling.
        shared_pointwise: One point-wise convolution for all pooled tokens, or one for each.
        see_global: Let auxiliary CLS tokens attend to the class token. The class token never sees them.
        independent_heads: A head for each auxiliary token, or one for all of them.
        create_kwargs: For ``timm.create_model``, where ``model`` is a name: ``pretrained=True``, ``img_size``,
            ``drop_path_rate``, ... With ``head`` and no ``num_classes`` the model gets ``num_classes=0``.

    Returns:
        The wrapped model, on the device and in the dtype of ``model``.

    Raises:
        TypeError: ``model`` is no timm model, ``head`` returns no module, or keyword arguments that neither
            ``wrap`` nor, for a name, timm knows.
        ValueError: an option out of range, or one that this architecture cannot have; the message says which.
    """
    config = MTEConfig(n_cls, n_pool, ten, pooling, kernel_size, shared_pointwise, see_global, independent_heads)
    if head is not None and (isinstance(head, nn.Module) or not callable(head)):
        raise TypeError(
            f'head: pass a callable that makes a head of a given width, e.g. '
            f'head=lambda dim: MyHead(dim), not a {type(head).__name__}'
        )
    if isinstance(model, str):
        if head is not None:
            create_kwargs.setdefault('num_classes', 0)
        model = timm.create_model(model, **create_kwargs)
    elif isinstance(model, MTE):
        raise TypeError('model: is wrapped already; to change its options, mte.wrap(mte.strip(model), ...)')
    elif create_kwargs:
        raise TypeError(
            f'wrap: unknown arguments {", ".join(create_kwargs)}; '
            'arguments for timm.create_model go with a model name, not with a model'
        )
    elif not isinstance(model, nn.Module):
        raise TypeError(f'model: pass a timm model or its name, got {type(model).__name__}')
    return MTE(model, config, head)


def make_teacher(student: MTE) -> MTE:
    """A frozen copy of ``student`` to be its teacher, which the training loop updates as a moving average.

    >>> student = wrap('test_vit', head=lambda dim: nn.Linear(dim, 8))
    >>> teacher = make_teacher(student)
    >>> out = teacher(torch.randn(2, 3, 160, 160))
    >>> out.output is out.aux
    True

    It leaves out what no loss of MTE reads, the global token's projection; its ``output`` is its ``aux``. Parameters
    are the student's one for one, so moving averages and state dicts go by position or by name.

    Raises:
        TypeError: ``student`` is not a wrapped model.
    """
    if not isinstance(student, Auxiliaries):
        raise TypeError(f'student: pass a wrapped model, mte.wrap(model, ...), got {type(student).__name__}')
    teacher = copy.deepcopy(student).requires_grad_(False)
    teacher.teaches = True
    return teacher


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
