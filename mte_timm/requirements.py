"""What the library needs of torch and timm: versions, and names that timm does not promise.

Owns the floors and the list. Imports nothing of the rest, so that it can speak before anything fails.
"""

import re
from importlib import metadata

__all__ = ['FLOORS', 'NEWER_NAMES', 'TIMM_NAMES', 'check_versions']

FLOORS = {'torch': (2, 4), 'timm': (1, 0, 16)}  # the first timm whose blocks take an attn_mask

TIMM_NAMES: dict[str, tuple[str, ...]] = {
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
    'timm.models': (
        'VisionTransformer', 'Eva', 'Cait', 'Xcit', 'checkpoint', 'checkpoint_seq', 'group_parameters', 'save_for_hf',
    ),
    'every model': ('pretrained_cfg', 'num_classes', 'num_features', 'forward_features', 'forward_head'),
}  # fmt: skip
"""Attributes by class. `tests/test_versions.py` says which one is gone."""

NEWER_NAMES: dict[str, tuple[str, ...]] = {
    'Eva': ('rope_mixed',),
    'NaFlexVit': ('rope_is_mixed',),
    'timm.models': ('get_model_args', 'get_model_traits'),
}
"""Likewise, but the oldest supported timm has them not and does without."""


def check_versions() -> None:
    """Called on import.

    Raises:
        ImportError: torch or timm is older than its floor.
    """
    for name, floor in FLOORS.items():
        try:
            found = metadata.version(name)
        except metadata.PackageNotFoundError:  # built from source without metadata: nothing to compare
            continue
        if tuple(int(n) for n in re.findall(r'\d+', found)[: len(floor)]) < floor:
            needed = '.'.join(map(str, floor))
            raise ImportError(
                f'mte_timm needs {name} {needed} or newer, here is {found}: pip install --upgrade "{name}>={needed}"'
            )


check_versions()
