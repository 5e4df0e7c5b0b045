"""wrap() and MTE: a timm model with an auxiliary branch beside it.

Owns what makes the pair behave as the timm model does: views, attributes, weights, classifiers. Knows nothing of how a
backbone runs (`backbones/`) or what the branch makes of it (`auxiliary.py`).
"""

import copy
import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, Optional, Union

import timm
import torch
from torch import nn

from .auxiliary import AuxiliaryBranch, MTEConfig, MTEOutput, MTETokens, make_deterministic
from .backbones import check_name, find_adapter, size_error
from .building import PROJECTION, add_branch, check_model, heads_for, is_projection
from .heads import HeadFactory
from .passthrough import PassThrough
from .state_dicts import FORMER_NAMES, misfit, remembered, rename
from .utils import classifier_names, layers_of

__all__ = ['MTE', 'make_teacher', 'wrap']


class MTE(PassThrough):
    """A timm model that carries auxiliary tokens through training (MTE, arXiv 2411.15787).

    Made by :func:`wrap`. The model itself is ``.backbone``, untouched and usable at any time; attributes that MTE
    doesn't have are the backbone's. Everything that training adds is in ``.aux``.
    """

    aux: AuxiliaryBranch

    def __init__(self, backbone: nn.Module, config: MTEConfig, head: Optional[HeadFactory] = None) -> None:
        super().__init__()
        self.adapter, self.aux = add_branch(backbone, config, head)
        self.backbone = backbone
        self.training = backbone.training

    @property
    def config(self) -> MTEConfig:
        """The options of :func:`wrap`."""
        return self.aux.config

    def forward(self, x: Union[torch.Tensor, Iterable[torch.Tensor]]) -> MTEOutput:
        """Runs images, or a list of views, through the model and its auxiliary tokens.

        Args:
            x: Images (B, C, H, W), or a list of such tensors. Views of one resolution run together,
                the heads once over all; outputs come concatenated in the order of the views.

        Raises:
            ValueError: ``x`` is neither, or a classifier has other classes than those of the auxiliary tokens.
        """
        if self.aux.is_teacher and not torch.compiler.is_compiling():
            make_deterministic(self, self.training)  # whatever was called on its parts
        out = self.aux.project(*(self._tokens(x) if isinstance(x, torch.Tensor) else self._tokens_of_views(x)))
        classes, given = out.aux.shape[-1], getattr(out.output, 'shape', [None])[-1]
        if self.adapter.num_classes(self.backbone) and given not in (None, classes):
            raise ValueError(
                f'model: its classifier gives {given} classes and those of the auxiliary tokens {classes}; '
                f'call model.reset_classifier({given}) before you replace one'
            )
        return out

    def _tokens(self, x: torch.Tensor) -> tuple[Any, MTETokens]:
        """The plain model's output for images of one size, and all tokens."""
        if x.ndim != 4:
            raise ValueError(f'x: pass images (B, C, H, W) or a list of such tensors, got {tuple(x.shape)}')
        try:
            out = self.adapter(self.backbone, x, self.aux.tokens(len(x)), self.config.see_global)
        except AssertionError as e:
            if message := size_error(self.backbone, x, e):
                raise ValueError(message) from e
            raise
        return out.output, self.aux.enhance(out)

    def _tokens_of_views(self, x: Iterable[torch.Tensor]) -> tuple[torch.Tensor, MTETokens]:
        """As `_tokens`, for views: one run for each size, everything back in the order of the views."""
        views = list(x) if isinstance(x, Iterable) else []
        if not views or not all(isinstance(v, torch.Tensor) for v in views):
            raise ValueError('x: pass images (B, C, H, W) or a non-empty list of them')
        by_size: dict[tuple[int, ...], list[int]] = {}
        for i, view in enumerate(views):
            by_size.setdefault(tuple(view.shape[1:]), []).append(i)
        parts: list[Any] = [None] * len(views)  # view -> output, global_token, aux_cls, pooled, patches, grid
        for indices in by_size.values():
            output, (*tokens, grid) = self._tokens(torch.cat([views[i] for i in indices]))
            if not isinstance(output, torch.Tensor):
                raise ValueError('x: many views need a model of one output; call set_distilled_training(False)')
            split = [t.split([len(views[i]) for i in indices]) for t in (output, *tokens)]
            for k, i in enumerate(indices):
                parts[i] = (*(s[k] for s in split), grid)
        *fields, patches, grids = zip(*parts)
        output, global_token, aux_cls, pooled = (torch.cat(field) for field in fields)
        if not self.adapter.num_classes(self.backbone):  # one tensor, as for images of one size
            output = global_token
        return output, MTETokens(global_token, aux_cls, pooled, patches, grids)

    def _replicate_for_data_parallel(self) -> Any:
        raise TypeError('model: DataParallel cannot gather what a wrapped model returns; use DistributedDataParallel')

    def train(self, mode: bool = True) -> 'MTE':
        """As in torch; a teacher stays deterministic, see :func:`make_teacher`."""
        super().train(mode)
        if self.aux.is_teacher:
            make_deterministic(self, mode)
        return self

    def check_assigned(self, name: str, value: Any) -> None:
        """Refuses a classifier of other classes than those of the auxiliary tokens have."""
        names = classifier_names(self.backbone)
        classes = 0 if isinstance(value, nn.Identity) else getattr(value, 'out_features', None)
        own = self.adapter.num_classes(self.backbone)
        if name in names and is_projection(value, own):
            raise ValueError(f'{name}: a {type(value).__name__} {PROJECTION}')
        if name in names and classes is not None and classes != own:
            raise ValueError(
                f'{name}: a classifier of {classes} classes beside auxiliary ones of {own}; call '
                f'model.reset_classifier({classes}), which replaces them all'
                + (', and assign it then' if classes else '')
            )

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        # beside the version that torch keeps of each module: no tensor, so that averages and optimizers never see it
        metadata = getattr(destination, '_metadata', {})
        metadata.setdefault(prefix[:-1], {})['mte'] = dataclasses.asdict(self.config) | remembered(self.backbone)
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, local_metadata: Any, *args: Any) -> None:
        # called within DistributedDataParallel and others too, unlike load_state_dict
        rename(state_dict, prefix, FORMER_NAMES)
        names, options = [name.removeprefix(prefix) for name in state_dict], local_metadata.get('mte') or {}
        if message := misfit(names, options, self.backbone.state_dict(), dataclasses.asdict(self.config)):
            args[-1].append(message)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that take no weight decay: the backbone's, and the auxiliary CLS tokens."""
        own = getattr(self.backbone, 'no_weight_decay', set)
        return {f'aux.{name}' for name in self.aux.no_weight_decay()} | {f'backbone.{name}' for name in own()}

    def group_matcher(self, coarse: bool = False) -> Callable[[str], tuple[float, ...]]:
        """Layers for timm's layer-wise decay: the backbone's, and auxiliary modules with its head."""
        layers = layers_of(self.backbone, coarse)
        last = max(layers.values())

        def layer_of(name: str) -> tuple[float, ...]:
            if name == 'aux.cls_tokens':  # they enter with the class token, so they learn at that layer's rate
                return (0.0,)
            return (float(layers[name.removeprefix('backbone.')] if name.startswith('backbone.') else last),)

        return layer_of

    def init_weights(self, *args: Any, **kwargs: Any) -> None:
        """Initializes backbone and branch anew, for models made on the meta device; arguments are the backbone's.

        Raises:
            TypeError: the backbone has no ``init_weights``.
            ValueError: a head has parameters that nothing draws.
        """
        backbone: Any = self.backbone
        if not hasattr(backbone, 'init_weights'):
            what = f'{type(backbone).__name__} has none; initialize .backbone yourself, then call .aux.init_weights()'
            raise TypeError(f'init_weights: {what}')
        backbone.init_weights(*args, **kwargs)
        self.aux.init_weights()

    def reset_classifier(self, num_classes: int, global_pool: Optional[str] = None) -> None:
        """Replaces the classifiers: the backbone's, and those of the auxiliary tokens by new ones.

        Args:
            num_classes: Classes, 0 for none.
            global_pool: As in timm.

        Raises:
            ValueError: where ``wrap`` was given a ``head``, which stands in the classifier's place.
        """
        if self.aux.global_head is not None:
            raise ValueError('reset_classifier: this model was wrapped with head=; strip it and wrap it anew')
        if global_pool == '':
            raise ValueError("global_pool='': leaves no global token to distill into")
        backbone: Any = self.backbone
        backbone.reset_classifier(num_classes, **({} if global_pool is None else {'global_pool': global_pool}))
        self.adapter = find_adapter(backbone)
        heads = heads_for(self.adapter, backbone, self.config)[1]
        like = next(backbone.parameters())
        self.aux.heads = heads.to(device=like.device, dtype=like.dtype).train(self.training)
        if self.aux.is_teacher:
            self.requires_grad_(False)
            make_deterministic(self, self.training)

    def extra_repr(self) -> str:
        added, own = (sum(p.numel() for p in part.parameters()) for part in (self.aux, self.backbone))
        counts = f'{added / 1e6:.2f}M parameters for training only, {own / 1e6:.2f}M after strip'
        return f'{self.config.describe()}\n{counts}'


def wrap(
    model: Union[nn.Module, str],
    n_cls: int = 4,
    n_pool: int = 6,
    *,
    head: Optional[HeadFactory] = None,
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
        ValueError: an option out of range, or one that this architecture cannot have; the message says which. Or a
            name that timm does not know.
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
        if ':' not in model:  # hf-hub: and the like are names of files
            check_name(model)
        model = timm.create_model(model, **create_kwargs)
    elif isinstance(model, MTE):
        raise TypeError('model: is already wrapped; to change its options, call mte.wrap(mte.strip(model), ...)')
    elif create_kwargs:
        raise TypeError(
            f'wrap: unknown arguments {", ".join(create_kwargs)}; '
            'arguments for timm.create_model go with a model name, not with a model'
        )
    check_model(model)
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

    Its backbone is frozen too: to fine-tune it, load its export, or call ``requires_grad_(True)``.

    In train and eval mode alike it is deterministic: no stochastic depth, dropout, patch dropout or augmentation of
    position embeddings, as DINO builds its teacher. Only norms with batch statistics follow the mode: in train mode, in
    which DINO, BYOL and MoCo v3 leave their teachers, they normalize by the batch; after ``teacher.eval()`` by running
    statistics, so average buffers too then.

    Raises:
        TypeError: ``student`` is not a wrapped model.
    """
    if not isinstance(student, MTE):
        raise TypeError(f'student: pass a wrapped model, mte.wrap(model, ...), got {type(student).__name__}')
    teacher = copy.deepcopy(student).requires_grad_(False)
    teacher.aux.is_teacher = True
    return teacher.train(student.training)
