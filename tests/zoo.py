"""Small models for the tests, one for each way in which timm's families differ."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

VIT = dict(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3)
NAME, SIZE = 'vit_tiny_patch16_224', dict(embed_dim=48, depth=2, num_heads=3)  # of images of 224x224
# name in the tests -> architecture and arguments
ATTENDING: dict[str, tuple[str, dict[str, Any]]] = {
    'plain': ('vit_tiny_patch16_224', VIT),
    'distilled': ('deit_tiny_distilled_patch16_224', VIT),
    'deit3': ('deit3_small_patch16_224', VIT),
    'clip': ('vit_base_patch32_clip_224', VIT),
    'dinov2': ('vit_small_patch14_dinov2', VIT),
    'dinov2_reg': ('vit_small_patch14_reg4_dinov2', VIT),
    'avg_pool': ('vit_medium_patch16_gap_240', VIT),
    'avg_pool_cls': ('vit_tiny_patch16_224', VIT | dict(global_pool='avg')),
    'map_pool': ('vit_base_patch16_siglip_224', VIT),
    'flexi': ('flexivit_small', VIT),
    'hybrid': ('vit_tiny_r_s16_p8_224', VIT | dict(img_size=64, patch_size=1)),
    'parallel_scaling': ('vit_base_patch16_xp_224', VIT),
    'parallel_things': ('vit_small_patch16_18x2_224', VIT),
    'post_norm': ('vit_base_patch16_rpn_224', VIT),
    'qk_norm': ('vit_tiny_patch16_224', VIT | dict(qk_norm=True)),
    'eva': ('eva_large_patch14_196', VIT),
    'eva02': ('eva02_tiny_patch14_224', VIT),
    'eva02_post_norm': ('eva02_tiny_patch14_224', VIT | dict(use_post_norm=True, scale_mlp=True)),
    'rope': ('vit_small_patch16_rope_224', VIT),
    'rope_mixed': ('vit_small_patch16_rope_mixed_224', VIT),
    'rope_gap': ('vit_base_patch16_rope_reg1_gap_256', VIT),
    'perception': ('vit_pe_core_small_patch16_384', VIT),
    'dinov3': ('vit_small_patch16_dinov3', VIT),
    'differential': ('vit_dlittle_patch16_reg1_gap_256', VIT),
    'naflex': ('naflexvit_base_patch16_gap', dict(embed_dim=48, depth=2, num_heads=3)),
    'naflex_map': ('naflexvit_so150m2_patch16_reg1_map', dict(embed_dim=48, depth=2, num_heads=3)),
    'cait': ('cait_xxs24_224', dict(img_size=64, embed_dim=48, depth=2, num_heads=3)),
    'xcit': ('xcit_nano_12_p16_224', dict(embed_dim=32, depth=1, num_heads=2, img_size=64)),
}

MAPS: dict[str, tuple[str, dict[str, Any]]] = {
    'resnet': ('resnet10t', dict(channels=(8, 16, 24, 32))),
    'convnext': ('convnext_atto', dict(dims=(8, 16, 24, 32), depths=(1, 1, 1, 1))),
    'swin': ('swin_tiny_patch4_window7_224', dict(img_size=64, window_size=4, embed_dim=12, depths=(1, 1, 1, 1))),
    'mobilenetv3': ('mobilenetv3_small_050', {}),
    'efficientnet': ('efficientnet_lite0', {}),
    'mixer': ('mixer_s32_224', {}),
    'pvt': ('pvt_v2_b0', dict(depths=(1, 1, 1, 1))),
    'poolformer': ('poolformer_s12', {}),
    'norm_in_head': ('mobilenetv4_conv_small_035', {}),
    'conv_in_head': ('efficientvit_b0', {}),
    'rms_in_head': ('convnext_zepto_rms', dict(dims=(8, 16, 24, 32), depths=(1, 1, 1, 1))),
    'coat_lite': ('coat_lite_tiny', {}),
    'hiera': ('hiera_tiny_224', dict(stages=(1, 1, 1, 1), embed_dim=24)),
}
ALL = ATTENDING | MAPS


def build(name: str, num_classes: int = 0, **kwargs: Any) -> nn.Module:
    """The model of this name, its zero-initialised parts made random, so that nothing is equal by accident."""
    architecture, own = ALL[name]
    if not timm.is_model(architecture):
        pytest.skip(f'{architecture} came after timm {timm.__version__}')  # the oldest supported has not all of them
    model = timm.create_model(architecture, num_classes=num_classes, **{**own, **kwargs})
    if name.startswith('naflex') and timm_before(1, 0, 18):
        pytest.skip('the NaFlexVit of timm before 1.0.18 carries no auxiliary CLS tokens')
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.abs().max() < 1e-3:
                parameter.normal_(std=0.02)
    return model


def network(name: str = NAME, **kwargs: Any) -> nn.Module:
    """A model of timm, by default a small ViT of images of 224x224, whose features depend on every parameter."""
    if not timm.is_model(name):
        pytest.skip(f'timm {timm.__version__} has no {name}')
    return randomized(timm.create_model(name, **{'num_classes': 0, **(SIZE if name == NAME else {}), **kwargs}))


def randomized(model: nn.Module) -> nn.Module:
    """Every parameter and statistic takes part in the features."""
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.1 + (p.ndim == 1 and p.mean() > 0.5))
        for name, b in model.named_buffers():
            if name.endswith('running_var'):
                b.uniform_(0.5, 2)
    return model.eval()


def prefixed(state: dict[str, Any], prefix: str = 'backbone.') -> dict[str, Any]:
    return {prefix + k: v for k, v in state.items()}


def timm_before(*version: int) -> bool:
    return tuple(map(int, timm.__version__.split('.')[:3])) < version


def needs_local_dir() -> None:
    """Skips what loads an export where this timm can't: it reads safetensors from folders since 1.0.26."""
    if timm_before(1, 0, 26):
        pytest.skip(f"timm {timm.__version__} reads no safetensors through 'local-dir:'")


def counts(name: str) -> dict[str, int]:
    """n_cls and n_pool for this model."""
    return {} if name in ATTENDING else {'n_cls': 0}


def image_size(model: Any) -> tuple[int, int, int]:
    """(C, H, W): the model's own size, at most 96 where any will do."""
    embed = getattr(model, 'patch_embed', None)
    size = getattr(embed, 'img_size', None) or getattr(model, 'img_size', None)
    h, w = (size, size) if isinstance(size, int) else size or (96, 96)
    fixed = model.pretrained_cfg.get('fixed_input_size', False)
    return (3, h, w) if size or not fixed else model.pretrained_cfg['input_size']


def num_prefix(model: Any) -> int:
    """Class tokens and registers; CaiT and XCiT of timm before 1.0.31 don't say."""
    return getattr(model, 'num_prefix_tokens', 1)


def images(model: nn.Module, batch: int = 2, **kwargs: Any) -> torch.Tensor:
    return torch.randn(batch, *image_size(model), **kwargs)


def perturb_auxiliaries(wrapped: nn.Module) -> None:
    """Replaces every auxiliary parameter."""
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if not name.startswith('backbone.'):
                parameter.normal_()


def config_of(folder: Path) -> dict[str, Any]:
    """Of an export."""
    return json.loads((folder / 'config.json').read_text())


def assert_same(a: Any, b: Any, where: str = 'checkpoint', but: tuple[str, ...] = ()) -> None:
    """Nested states to the bit, but for what is under the names ``but``."""
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, Mapping):
        assert a.keys() == b.keys(), (where, a.keys() ^ b.keys())
        for k in a.keys() - set(but):
            assert_same(a[k], b[k], f'{where}.{k}', but)
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b)):
            assert_same(x, y, f'{where}.{i}', but)
    elif hasattr(a, '__dict__'):
        assert_same(vars(a), vars(b), where, but)
    else:
        assert a == b or (a != a and b != b), where  # NaN
