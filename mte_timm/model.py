"""wrap() and MTE: a timm model with auxiliary tokens around it.

Owns what makes the pair behave as the timm model does: attributes, weights, classifiers. Knows nothing of how tokens
are made or run (`auxiliaries.py`).
"""

import copy
import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Optional, Union

import timm
import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from .auxiliaries import Auxiliaries, MTEConfig, MTEOutput
from .backbones import check_name, find_family, input_size
from .heads import make_heads
from .passthrough import PassThrough

__all__ = ['MTE', 'make_teacher', 'wrap']


class MTE(PassThrough, Auxiliaries):
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

    def check_assigned(self, name: str, value: Any) -> None:
        """Refuses a classifier of other classes than those of the auxiliary tokens have."""
        classifier = (getattr(self.backbone, 'pretrained_cfg', None) or {}).get('classifier') or ()
        names = (classifier,) if isinstance(classifier, str) else classifier
        classes = 0 if isinstance(value, nn.Identity) else getattr(value, 'out_features', None)
        own = self.family.num_classes(self.backbone)
        if name in names and classes is not None and classes != own:
            raise ValueError(
                f'{name}: a classifier of {classes} classes beside auxiliary ones of {own}; call '
                f'model.reset_classifier({classes}), which replaces them all'
                + (', and assign it then' if classes else '')
            )

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As in torch, with a word on why weights don't fit: other options, or a plain model's."""
        try:
            return super().load_state_dict(state_dict, strict, assign)
        except RuntimeError as e:
            options = getattr(state_dict, '_metadata', {}).get('', {}).get('mte')
            message = self._misfit(state_dict, options, strict)
            if not message or message in str(e):
                raise
            raise RuntimeError(f'{e}\n\t{message}') from None

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        # beside the version that torch keeps of each module: no tensor, so that averages and optimizers never see it
        metadata = getattr(destination, '_metadata', {})
        said = {**dataclasses.asdict(self.config), 'img_size': list(input_size(self.backbone)[1:])}
        metadata.setdefault(prefix[:-1], {})['mte'] = said
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, local_metadata: Any, *found: Any
    ) -> None:
        # within DistributedDataParallel and others load_state_dict is not called; strict is not known here
        named = {k.removeprefix(prefix): v for k, v in state_dict.items() if k.startswith(prefix)}
        if message := self._misfit(named, local_metadata.get('mte'), strict=False):
            found[-1].append(message)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *found)

    def _misfit(self, state: Mapping[str, Any], options: Optional[dict[str, Any]], strict: bool) -> str:
        """Why weights don't fit, beyond torch's list of names; '' where there is nothing to say.

        Args:
            state: Weights, by their names in this model.
            options: Of the model that they are of, where that is known.
            strict: Whether missing and unexpected names are errors.
        """
        given = {k: tuple(getattr(v, 'shape', ())) for k, v in state.items()}
        own = {k: tuple(getattr(v, 'shape', ())) for k, v in self.state_dict().items()}
        plain = {k.removeprefix('backbone.') for k in own if k.startswith('backbone.')}
        if not any(k.startswith('backbone.') for k in given):
            if len(plain & given.keys()) <= len(plain) / 2:
                return ''
            return (
                "these are weights of a plain model, whose names lack 'backbone.': load them into the model that was "
                'wrapped, mte.strip(model).load_state_dict(...), and auxiliary tokens start new'
            )
        different = []
        if options and not all(k.startswith('backbone.') for k in given):
            ours = dataclasses.asdict(self.config)
            different = [f'{k}={options[k]!r} instead of {v!r}' for k, v in ours.items() if options.get(k, v) != v]
        different += [
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
        raise TypeError('model: is wrapped already; to change its options, mte.wrap(mte.strip(model), ...)')
    elif create_kwargs:
        raise TypeError(
            f'wrap: unknown arguments {", ".join(create_kwargs)}; '
            'arguments for timm.create_model go with a model name, not with a model'
        )
    elif hasattr(model, '_orig_mod') or isinstance(model, (DataParallel, DistributedDataParallel)):
        raise TypeError(
            f'model: is inside a {type(model).__name__}; wrap the timm model itself, then compile or distribute what '
            'wrap returns'
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

    In train and eval mode alike it is deterministic: no stochastic depth, dropout, patch dropout or augmentation of
    position embeddings, as DINO builds its teacher. Only norms with batch statistics follow the mode: in train mode, in
    which DINO, BYOL and MoCo v3 leave their teachers, they normalize by the batch; after ``teacher.eval()`` by running
    statistics.

    Raises:
        TypeError: ``student`` is not a wrapped model.
    """
    if not isinstance(student, Auxiliaries):
        raise TypeError(f'student: pass a wrapped model, mte.wrap(model, ...), got {type(student).__name__}')
    teacher = copy.deepcopy(student).requires_grad_(False)
    teacher.teaches = True
    teacher.train(student.training)
    return teacher
