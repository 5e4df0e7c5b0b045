"""What DINOv2 and DINOv3 share: an auxiliary branch beside backbone and heads in their ``SSLMetaArch``.

Both keep networks in two ModuleDicts, ``student`` and ``teacher``, and shard, average, clip and save entry by entry. So
the branch is one more entry, ``mte``, and the backbone's own weights keep their names.
"""

import copy
import math
from collections.abc import Mapping
from typing import Any, Union

import torch
from torch import nn

from ..auxiliary import AuxiliaryBranch, MTEConfig
from ..backbones import BackboneOutput
from ..heads import make_heads
from .options import config_and_weight

__all__ = ['GO_ON', 'Branch', 'MetaArch']

GO_ON = 'leave mte out to go on with that run, or begin a new one in another folder'


class Branch(AuxiliaryBranch):
    """An auxiliary branch up to the bottleneck of its heads; both of its steps are in ``forward``, for FSDP's sake."""

    def forward(self, x: Union[int, list[BackboneOutput]]) -> torch.Tensor:  # type: ignore[override]
        """Auxiliary CLS tokens (x, n_cls, D) for a number of images, or fused projections (B, bottleneck) of outputs.

        Args:
            x: Images, or outputs of the backbone for crops of one size each, which come back joined.
        """
        if isinstance(x, int):
            assert self.cls_tokens is not None
            return self.cls_tokens.expand(x, -1, -1).clone()  # a view would not outlive what FSDP has gathered
        fused: torch.Tensor = self.heads(torch.cat([self.enhance(out).auxiliary for out in x]))
        return fused


class MetaArch:
    """The auxiliary tokens of an ``SSLMetaArch``, kept as its attribute ``mte``. No module: its parts are the host's.

    The host's terms of the class token become L_dist, since the teacher's logits are the ensemble's and their weight is
    scaled by w / (1 + w); what :attr:`loss_weight` scales is L_aux (paper eqs. 4 to 6).

    Args:
        arch: The host's module; ``arch.cfg.mte`` has the options.
        attention: Mixin for the class of its attention, see :func:`add_observers`.

    Raises:
        ValueError: an unknown option or value, or a backbone without attention.
    """

    def __init__(self, arch: Any, attention: type) -> None:
        self.arch, (config, self.weight) = arch, config_and_weight(arch.cfg.mte)
        if 'dino_head' not in arch.student:
            raise ValueError('mte: dino.loss_weight is 0, so there is no loss for the auxiliary tokens; raise it')
        backbone, head, options = arch.student['backbone'], type(arch.student['dino_head']), arch.cfg.dino
        if not hasattr(backbone, 'blocks'):
            raise ValueError(f'mte: {type(backbone).__name__} has no attention that could carry auxiliary CLS tokens')

        def make(dim: int) -> nn.Module:
            sizes = {name: options[f'head_{name}'] for name in ('hidden_dim', 'bottleneck_dim', 'nlayers')}
            return head(in_dim=dim, out_dim=1, **sizes)  # its prototypes are left out

        with torch.random.fork_rng(devices=[]):  # so that the host draws what it did
            num_tokens, dim = config.n_cls + config.n_pool, backbone.embed_dim
            _, heads = make_heads(num_tokens, dim, dim, independent=config.independent_heads, aux_head=make)
            branch = Branch(dim, backbone.num_heads, config, heads)
        arch.student['mte'], arch.teacher['mte'] = branch, copy.deepcopy(branch).requires_grad_(False)
        arch.teacher['mte'].is_teacher = True
        for network in (arch.student, arch.teacher):
            network._register_load_state_dict_pre_hook(_refuse_plain_weights)
            if config.n_cls:
                add_observers(network, attention, config)
        self.loss_weight = arch.dino_loss_weight / (1 + self.weight)
        arch.dino_loss_weight *= self.weight / (1 + self.weight)

    def init_weights(self) -> None:
        """Initializes the student's branch, for a host that builds on the meta device."""
        branch = self.arch.student['mte']
        device = next(branch.parameters()).device
        with torch.random.fork_rng(devices=[device] if device.type == 'cuda' else []):
            branch.init_weights()

    def logits(self, network: Any, *outputs: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Fused logits of the auxiliary tokens, (B, K) for each output of the backbone.

        Args:
            network: The host's student or teacher.
            outputs: What its backbone gave for crops of one size each; crops are squares.
        """
        runs = []
        for out in outputs:
            cls, patches = out['x_norm_clstoken'], out['x_norm_patchtokens']
            side = math.isqrt(patches.shape[1])
            runs.append(BackboneOutput(cls, cls, patches, out.get('x_norm_mte'), (side, side)))
        fused = network['mte'](runs)
        logits = network['dino_head'](fused, only_last_layer=True)
        return tuple(logits.split([len(run.features) for run in runs]))


def add_observers(network: Any, attention: type, config: MTEConfig) -> None:
    """Lets the auxiliary CLS tokens of ``network['mte']`` pass through ``network['backbone']``.

    They are appended where it makes its tokens, run through its own blocks, and leave its output as ``x_norm_mte``.

    Args:
        network: The host's student or teacher.
        attention: Put before the class of each attention; reads ``num_observers`` and ``num_hidden`` there.
        config: Options.
    """
    backbone, n = network['backbone'], config.n_cls
    prepare = backbone.prepare_tokens_with_masks

    def prepare_tokens_with_masks(x: torch.Tensor, masks: Any = None) -> Any:
        made = prepare(x, masks)
        own, *grid = made if isinstance(made, tuple) else (made,)
        joint = torch.cat([own, network['mte'](len(own)).to(own.dtype)], dim=1)
        return (joint, *grid) if grid else joint

    def split_off(backbone: Any, args: Any, output: Any) -> None:
        for i, out in enumerate(output if isinstance(output, list) else [output]):
            if isinstance(out, dict):
                out['x_norm_mte'] = class_norm(backbone, i)(out['x_prenorm'][:, -n:])
                for name in ('x_prenorm', 'x_norm_patchtokens'):
                    out[name] = out[name][:, :-n]

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise ValueError('get_intermediate_layers: not while auxiliary tokens are in training; use a stripped model')

    backbone.prepare_tokens_with_masks = prepare_tokens_with_masks
    backbone.get_intermediate_layers = refuse
    backbone.register_forward_hook(split_off)
    for module in backbone.blocks.modules():
        if hasattr(module, 'qkv'):
            module.num_observers, module.num_hidden = n, 0 if config.see_global else 1
            module.__class__ = type(f'Observed{type(module).__name__}', (attention, type(module)), {})


def _refuse_plain_weights(state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
    if not any(name.startswith(f'{prefix}mte.') for name in state_dict):
        raise ValueError(f'mte: these weights have no {prefix}mte.*, so they are of a run without it; {GO_ON}')


def class_norm(backbone: Any, index: int) -> Any:
    """The norm of the class token, and so of auxiliary ones, in the output at ``index``."""
    if getattr(backbone, 'untie_global_and_local_cls_norm', False) and backbone.training and index == 1:
        return backbone.local_cls_norm
    return backbone.cls_norm if getattr(backbone, 'untie_cls_and_patch_norms', False) else backbone.norm
