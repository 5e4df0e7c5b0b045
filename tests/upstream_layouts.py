"""Networks of other repositories, by code that runs in a clone: `model`, `content` of a checkpoint, and `forward`."""

from functools import partial

from torch import nn

BEGIN = """
import sys, torch
from functools import partial
from torch import nn
torch.manual_seed(0)
forward = None

def randomized(model):
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.1 + (p.ndim == 1 and p.mean() > 0.5))
    return model.eval()

def prefixed(state, prefix):
    return {prefix + k: v for k, v in state.items()}

def dino(model):
    state = prefixed(model.state_dict(), 'backbone.') | {'head.mlp.0.weight': torch.ones(2, 2)}
    return {'student': state, 'teacher': state, 'epoch': 1, 'optimizer': {}, 'dino_loss': {'center': torch.ones(1, 2)}}

def with_heads(model):
    heads = {'dino_head.mlp.0.weight': torch.ones(2, 2), 'ibot_head.mlp.0.weight': torch.ones(2, 2)}
    return {'teacher': prefixed(model.state_dict(), 'backbone.') | heads}

def momentum(model, own, other):
    return prefixed(model.state_dict(), own) | prefixed(model.state_dict(), other)
"""
END = """
torch.manual_seed(1)
x = torch.randn(2, 3, {size}, {size})
with torch.no_grad():
    out = (forward or model)(x)
torch.save(content, 'content.pth')
torch.save(out, 'out.pth')
"""
OLD_TIMM = 'from mte_timm.integrations import old_timm\n'
SMALL = 'img_size=64, embed_dim=48, depth=4, num_heads=3'

DINO = """
from vision_transformer import vit_tiny
model = randomized(vit_tiny())
content = dino(model)
"""
IBOT = """
from models import vit_tiny
model = randomized(vit_tiny(masked_im_modeling=True))
content = {**dino(model), 'ibot_loss': {}}
forward = lambda x: model(x, mask=torch.zeros(2, 14, 14, dtype=torch.bool))
"""
IBOT_SWIN = """
from models import swin_tiny
model = swin_tiny(img_size=224).eval()
content = {**dino(model), 'ibot_loss': {}}
"""
MOCO = f"""{OLD_TIMM}
import vits
vits.VisionTransformer.num_tokens = 1
model = randomized(vits.vit_small(num_classes=0))
vits.VisionTransformerMoCo.build_2d_sincos_position_embedding(model)
both = momentum(model, 'module.base_encoder.', 'module.momentum_encoder.')
content = {{'arch': 'vit_small', 'optimizer': {{}}, 'state_dict': both}}
"""
MOCO_CONVERTED = MOCO + "content = {'model': model.state_dict()}\n"
MOBY = f"""{OLD_TIMM}
from models.swin_transformer import SwinTransformer
model = SwinTransformer(img_size=64, window_size=2, num_classes=0).eval()
content = {{'config': {{}}, 'model': momentum(model, 'encoder.', 'encoder_k.')}}
"""


def dinov2(**options: object) -> str:
    return f"""
from dinov2.models.vision_transformer import vit_small
model = randomized(vit_small(patch_size=14, img_size=56, init_values=1.0, **{options!r}))
content = with_heads(model)
"""


def dinov3(k_bias: bool = False, norm_layer: str = 'layernormbf16', told: bool = True, **options: object) -> str:
    return f"""
if {told}:
    open('config.yaml', 'w').write('student: {{norm_layer: {norm_layer}}}')  # as its trainer does
from dinov3.models.vision_transformer import DinoVisionTransformer
model = DinoVisionTransformer(img_size=64, embed_dim=96, depth=3, num_heads=3, layerscale_init=1.0, n_storage_tokens=4,
                              pos_embed_rope_dtype='fp32', norm_layer={norm_layer!r}, **{options!r})
model.init_weights()
randomized(model)
if not {k_bias} and model.blocks[0].attn.qkv.bias is not None:
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.bias[96:192] = 0
content = with_heads(model)
forward = lambda x: model.forward_features(x)['x_norm_clstoken']
"""


CONVNEXT_V3 = """
from dinov3.models.convnext import ConvNeXt
model = randomized(ConvNeXt(depths=[1, 1, 1, 1], dims=[8, 16, 24, 32], layer_scale_init_value=1.0))
content = with_heads(model)
forward = lambda x: model.forward_features(x)['x_norm_clstoken']
"""
MAE = f"""
import numpy
import timm.models.vision_transformer as timm_vit
numpy.float = float
Block = timm_vit.Block
timm_vit.Block = lambda *args, qk_scale=None, **kwargs: Block(*args, **kwargs)
from models_mae import MaskedAutoencoderViT
model = randomized(MaskedAutoencoderViT({SMALL}, decoder_embed_dim=32, decoder_depth=1, decoder_num_heads=2,
                                        norm_layer=partial(nn.LayerNorm, eps=1e-6)))
content = {{'model': model.state_dict()}}

def forward(x):
    x = model.patch_embed(x) + model.pos_embed[:, 1:]
    x = torch.cat([(model.cls_token + model.pos_embed[:, :1]).expand(len(x), -1, -1), x], dim=1)
    for block in model.blocks:
        x = block(x)
    return model.norm(x)[:, 0]
"""
MAE_POOLED = f"""
from models_vit import VisionTransformer
model = randomized(VisionTransformer(global_pool=True, {SMALL}, num_classes=3,
                                     norm_layer=partial(nn.LayerNorm, eps=1e-6)))
content = {{'model': model.state_dict()}}
forward = model.forward_features
"""
CONVNEXT = f"""{OLD_TIMM}
from models.convnext import ConvNeXt
model = randomized(ConvNeXt(depths=[1, 1, 1, 1], dims=[8, 16, 24, 32], layer_scale_init_value=1.0))
content = {{'model': model.state_dict()}}
forward = model.forward_features
"""

V2, V2_REGISTERS, V3 = 'vit_small_patch14_dinov2', 'vit_small_patch14_reg4_dinov2', 'vit_small_patch16_dinov3_qkvb'
V2_SWIGLU, SMALL_SIZE = 'vit_giant_patch14_dinov2', dict(embed_dim=384, depth=12, num_heads=6)
OF_7B = dict(qkv_bias=False, mask_k_bias=True, untie_global_and_local_cls_norm=True, ffn_layer='swiglu64', ffn_ratio=3)
V3_SIZE = dict(embed_dim=96, depth=3, num_heads=3, img_size=64, global_pool='token')
V3_EPS = V3_SIZE | dict(norm_layer=partial(nn.LayerNorm, eps=1e-6))
VIT, VIT_S, SWIN = 'vit_tiny_patch16_224', 'vit_small_patch16_224', 'swin_tiny_patch4_window7_224'
VIT_SIZE = dict(embed_dim=48, depth=4, num_heads=3)
CONVNEXT_SIZE = dict(depths=(1, 1, 1, 1), dims=(8, 16, 24, 32))
# layout: repository, code, timm's name, arguments, image size, tolerance
CLONES = {
    'DINO ViT': ('dino', DINO, VIT, {}, 224, 1e-5),
    'iBOT ViT': ('ibot', IBOT, VIT, {}, 224, 1e-5),
    'iBOT Swin': ('ibot', IBOT_SWIN, SWIN, {}, 224, 1e-3),  # eps of 1e-6 where timm has 1e-5
    'MoCo v3 ViT-S': ('moco-v3', MOCO, VIT_S, {'num_heads': 12}, 224, 1e-4),
    'MoCo v3 ViT-S, 6 heads': ('moco-v3', MOCO, VIT_S, {}, 224, 0),
    'MoCo v3 ViT-S, converted, 6 heads': ('moco-v3', MOCO_CONVERTED, VIT_S, {}, 224, 0),
    'MoBY Swin': ('Transformer-SSL', MOBY, SWIN, {'img_size': 64, 'window_size': 2}, 64, 1e-5),
    'DINOv2 ViT': ('dinov2', dinov2(), V2, {}, 56, 1e-4),
    'DINOv2 ViT, block_chunks=4': ('dinov2', dinov2(block_chunks=4), V2, {}, 56, 1e-4),
    'DINOv2 ViT, registers': ('dinov2', dinov2(block_chunks=0, num_register_tokens=4), V2_REGISTERS, {}, 56, 1e-4),
    'DINOv2 ViT, SwiGLU': ('dinov2', dinov2(block_chunks=4, ffn_layer='swiglufused'), V2_SWIGLU, SMALL_SIZE, 56, 1e-4),
    'DINOv3 ViT, as the 7B': ('dinov3', dinov3(**OF_7B), 'vit_7b_patch16_dinov3', V3_SIZE, 64, 1e-4),
    'DINOv3 ViT, k bias masked': ('dinov3', dinov3(k_bias=True, mask_k_bias=True), V3, V3_SIZE, 64, 1e-4),
    'DINOv3 ViT, k bias of 0': ('dinov3', dinov3(), V3, V3_SIZE, 64, 1e-4),
    'DINOv3 ViT, k bias': ('dinov3', dinov3(k_bias=True), V3, V3_SIZE, 64, 0),
    'DINOv3 ViT, other RoPE periods': ('dinov3', dinov3(pos_embed_rope_base=50.0), V3, V3_SIZE, 64, 0),
    'DINOv3 ViT, norm of local crops': ('dinov3', dinov3(untie_global_and_local_cls_norm=True), V3, V3_SIZE, 64, 1e-4),
    'DINOv3 ViT, epsilon of 1e-6': ('dinov3', dinov3(norm_layer='layernorm'), V3, V3_SIZE, 64, 0),
    'DINOv3 ViT, epsilon of 1e-6 on request': ('dinov3', dinov3(norm_layer='layernorm'), V3, V3_EPS, 64, 1e-4),
    'DINOv3 ViT, no config beside': ('dinov3', dinov3(told=False), V3, V3_SIZE, 64, 0),
    'DINOv3 ViT, untied norms': ('dinov3', dinov3(untie_cls_and_patch_norms=True), V3, V3_SIZE, 64, 0),
    'DINOv3 ConvNeXt': ('dinov3', CONVNEXT_V3, 'convnext_tiny', CONVNEXT_SIZE, 64, 1e-5),
    'MAE ViT, pre-training': ('mae', MAE, VIT, VIT_SIZE, 64, 1e-5),
    'MAE ViT, average-pooled': ('mae', MAE_POOLED, VIT, VIT_SIZE, 64, 1e-5),
    'Facebook ConvNeXt': ('ConvNeXt', CONVNEXT, 'convnext_tiny', CONVNEXT_SIZE, 64, 1e-5),
}
REFUSED = {
    'MoCo v3 ViT-S, 6 heads': 'num_heads=12',
    'MoCo v3 ViT-S, converted, 6 heads': 'num_heads=12',
    'DINOv3 ViT, k bias': 'qkv.bias',
    'DINOv3 ViT, other RoPE periods': 'rope_embed.periods',
    'DINOv3 ViT, untied norms': 'cls_norm',
    'DINOv3 ViT, epsilon of 1e-6': 'norm_layer: layernorm, an epsilon of 1e-06 where timm has 1e-05',
    'DINOv3 ViT, no config beside': 'copy the config.yaml of the run',
}
