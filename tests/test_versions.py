"""What the library uses of timm beyond its promises is there, and known."""

import inspect
import re
import sys
from pathlib import Path

import pytest
import timm
import torch
import zoo

ROOT = Path(__file__).parents[1]

# names in use that timm does not promise, by class
TIMM_NAMES = {
    # of its ViTs: the way from images to the first block, the blocks, and the way out
    'VisionTransformer': (
        'patch_embed', '_pos_embed', 'patch_drop', 'norm_pre', 'blocks', 'norm', 'fc_norm', 'cls_token',
        'num_prefix_tokens', 'embed_dim', 'grad_checkpointing', 'forward_features', 'forward_head',
    ),
    'Eva': (
        'patch_embed', '_pos_embed', 'norm_pre', 'blocks', 'norm', 'cls_token', 'num_prefix_tokens', 'embed_dim',
        'grad_checkpointing', 'forward_features', 'forward_head',
    ),
    'VisionTransformerDistilled': ('dist_token',),
    'NaFlexVit': ('embeds', '_forward_embeds', 'blocks', 'norm', 'fc_norm', 'num_prefix_tokens', 'grad_checkpointing'),
    'Cait': ('patch_embed', 'pos_embed', 'pos_drop', 'blocks', 'blocks_token_only', 'norm', 'cls_token'),
    'Xcit': ('patch_embed', 'pos_embed', 'pos_drop', 'blocks', 'cls_attn_blocks', 'norm', 'cls_token'),
    'SwinTransformer': ('output_fmt', 'head'),
    'NormMlpClassifierHead': ('norm',),
    'module of an architecture': ('checkpoint_filter_fn',),
    'block': ('attn_mask',),  # arguments of a block's forward
    'attention of a block': ('num_heads',),
    'embedding of patches': ('dynamic_feat_size',),
    'timm.layers': ('NormMlpClassifierHead', 'trunc_normal_', 'Mlp', 'resample_abs_pos_embed'),
    'timm.loss': ('BinaryCrossEntropy',),
    'timm.models': (
        'VisionTransformer', 'Eva', 'Cait', 'Xcit', 'checkpoint', 'checkpoint_seq', 'group_parameters', 'save_for_hf',
    ),
    'every model': ('pretrained_cfg', 'num_classes', 'num_features', 'forward_features', 'forward_head'),
}  # fmt: skip
# the oldest supported timm does without these
NEWER_NAMES = {
    'Eva': ('rope_mixed',),
    'NaFlexVit': ('rope_is_mixed',),
    'timm.models': ('get_model_args', 'get_model_traits'),
    'every model': ('_model_args',),
}

ONE = {
    'VisionTransformer': 'plain', 'VisionTransformerDistilled': 'distilled', 'Eva': 'eva02', 'NaFlexVit': 'naflex',
    'Cait': 'cait', 'Xcit': 'xcit', 'SwinTransformer': 'swin',
}  # fmt: skip


def owners(kind):
    """What must have the names that are listed under ``kind``."""
    if kind.startswith('timm.'):
        return [getattr(timm, kind.removeprefix('timm.'))]
    if kind == 'every model':
        return [zoo.build(name) for name in zoo.ALL]
    if kind in ONE:
        model = zoo.build(ONE[kind])
        assert type(model).__name__ == kind
        return [model]
    if kind == 'NormMlpClassifierHead':
        return [zoo.build('convnext').head]
    models = [zoo.build(name) for name in ('plain', 'eva02', 'hybrid')]
    if kind == 'module of an architecture':
        return [sys.modules[type(m).__module__] for m in models]
    return [m.blocks[0].attn if kind == 'attention of a block' else m.patch_embed for m in models]


@pytest.mark.parametrize('kind', [k for k in TIMM_NAMES if k != 'block'])
def test_timm_still_has_the_names_in_use(kind):
    newer = () if zoo.timm_before(1, 0, 31) else NEWER_NAMES.get(kind, ())
    for owner in owners(kind):
        name = getattr(owner, '__name__', type(owner).__name__)
        gone = [n for n in (*TIMM_NAMES[kind], *newer) if not hasattr(owner, n)]
        assert not gone, f'timm {timm.__version__}: {name} has no {", ".join(gone)} any more'


@pytest.mark.parametrize('name', ['plain', 'parallel_scaling', 'parallel_things', 'post_norm', 'eva02', 'rope_mixed'])
def test_blocks_of_timm_take_a_mask(name):
    arguments = inspect.signature(zoo.build(name).blocks[0].forward).parameters
    assert set(TIMM_NAMES['block']) <= set(arguments), f'timm {timm.__version__}: {name}'


def test_names_in_use_are_in_the_list():
    """What the code of timm's families reads of a model, its embedding or its attention, and takes from timm."""
    lists = (TIMM_NAMES, NEWER_NAMES)
    listed = {n for names in lists for some in names.values() for n in some}
    torch_has = set(dir(torch.nn.Module())) | {'shape', 'attn', 'module'}
    reads = r"\b(?:model|embed|m)\.([a-z_]\w*)|(?:getattr|hasattr)\((?:model|embed|m), '(\w+)'"
    for path in (ROOT / 'mte_timm').rglob('*.py'):
        text = path.read_text()
        used = {n for line in re.findall(r'^from timm\.\w+ import (.+)$', text, re.MULTILINE) for n in line.split(', ')}
        used |= set(re.findall(r'\btimm\.models\.(\w+)\(', text))
        if path.stem in ('vit', 'eva', 'naflex', 'class_attention', 'feature_map'):
            used |= {a or b for a, b in re.findall(reads, text)} - torch_has
        assert used <= listed, f'{path.name} uses {used - listed}, which is in neither list'
