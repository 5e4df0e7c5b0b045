"""strip_checkpoint loses nothing of a backbone, guesses no grid, and says what a file trained with."""

import argparse
import re

import pytest
import timm
import torch
import zoo
from timm.layers import resample_abs_pos_embed
from zoo import NAME, SIZE, network, prefixed

import mte_timm as mte

DINOV3 = 'vit_small_patch16_dinov3_qkvb'
DINOV3_SIZE = dict(embed_dim=96, depth=3, num_heads=3, img_size=64)
SWIN = 'swin_tiny_patch4_window7_224'
SWIN_SIZE = dict(img_size=64, window_size=4, embed_dim=12, depths=(2, 1, 1, 1))
IMAGENET = [0.485, 0.456, 0.406]


@torch.no_grad()
def gap(a, b, size=(64, 64)):
    x = torch.randn(2, 3, *size)
    return (a.eval()(x) - b.eval()(x)).abs().max().item()


def refuses(message):
    return pytest.raises(mte.CheckpointError, match=message)


# --- what a conversion discards


@pytest.fixture
def net():
    return network(DINOV3, **DINOV3_SIZE)


@pytest.fixture
def strip_v3(strip):
    return lambda content, name=DINOV3, **kwargs: strip(content, name, **DINOV3_SIZE, **kwargs)


def dinov3(net, k_bias=0.0, periods=None, **more):
    """The tensors of a timm DINOv3 as its repository names them."""
    own = net.state_dict()
    out = {'mask_token': torch.zeros(1, 96), 'rope_embed.periods': net.rope.periods if periods is None else periods}
    for name, v in own.items():
        if name.endswith('q_bias'):
            block = name.removesuffix('q_bias')
            out[block + 'qkv.bias'] = torch.cat([v, torch.full_like(v, k_bias), own[block + 'v_bias']])
        elif not name.endswith('v_bias'):
            name = name.replace('gamma_1', 'ls1.gamma').replace('gamma_2', 'ls2.gamma')
            out[name.replace('reg_token', 'storage_tokens')] = v
    return {'teacher': prefixed({**out, **more})}


def test_dinov3_is_converted_without_loss(net, strip_v3):
    for periods in (net.rope.periods, net.rope.periods.bfloat16()):
        report = strip_v3(dinov3(net, periods=periods))
        assert gap(report.model, net) == 0
        assert dict(report.without_effect)['backbone.blocks.0.attn.qkv.bias'].startswith('96 of its values')
        assert dict(report.without_effect)['backbone.rope_embed.periods'] == 'the model computes the same'


def test_biases_without_a_place_are_refused_with_the_architecture_that_has_one(net, strip_v3):
    with refuses(r"blocks\.0\.attn\.qkv\.bias.*model='vit_small_patch16_dinov3_qkvb'"):
        strip_v3(dinov3(net), 'vit_small_patch16_dinov3')


@pytest.mark.parametrize('block', [0, 2])
def test_zero_biases_need_no_place(block, net, strip_v3):
    content = dinov3(net)
    for name, v in content['teacher'].items():
        if name.endswith('qkv.bias'):
            content['teacher'][name] = torch.zeros_like(v)
    assert strip_v3(content, 'vit_small_patch16_dinov3').loaded
    content['teacher'][f'backbone.blocks.{block}.attn.qkv.bias'][7] = 1e-3
    with refuses(rf'blocks\.{block}\.attn\.qkv\.bias'):
        strip_v3(content, 'vit_small_patch16_dinov3')


def test_a_k_bias_that_matters_is_refused_and_a_masked_one_is_not(net, strip_v3):
    with refuses(r'blocks\.0\.attn\.qkv\.bias'):
        strip_v3(dinov3(net, k_bias=3.0))
    mask = torch.ones(3, 96)
    mask[1] = 0
    masks = {f'blocks.{i}.attn.qkv.bias_mask': mask.flatten() for i in range(3)}
    assert gap(strip_v3(dinov3(net, k_bias=3.0, **masks)).model, net) == 0


@pytest.mark.parametrize('change', [lambda p: p * 1.5, lambda p: p**0.85, lambda p: p.flip(0)])
def test_other_rope_periods_are_refused(change, net, strip_v3):
    with refuses(r'no place for rope_embed\.periods'):
        strip_v3(dinov3(net, periods=change(net.rope.periods)))


def test_rotations_of_eva02_are_compared(strip):
    name, kwargs = 'eva02_tiny_patch14_224', {'img_size': 56, **SIZE}
    net = network(name, **kwargs)
    sin, cos = net.rope.get_embed().chunk(2, dim=-1)
    content = {**net.state_dict(), 'rope.freqs_cos': cos, 'rope.freqs_sin': sin, 'blocks.1.attn.rope.freqs_cos': cos}
    assert gap(strip(content, name, **kwargs).model, net, (56, 56)) == 0
    with refuses(r'blocks\.1\.attn\.rope\.freqs_cos'):
        strip(content | {'blocks.1.attn.rope.freqs_cos': 0.9 * cos}, name, **kwargs)


@pytest.mark.parametrize(
    'name', ['cls_norm.weight', 'local_cls_norm.bias', 'blocks.0.norm3.weight', 'adapter.0.weight']
)
@pytest.mark.parametrize(('architecture', 'size'), [(NAME, {'img_size': 64}), (DINOV3, DINOV3_SIZE)])
def test_tensors_without_a_place_are_refused_by_name(name, architecture, size, strip):
    net = network(architecture, **size)
    state = dinov3(net)['teacher'] if architecture == DINOV3 else prefixed(net.state_dict())
    content = {'teacher': state | {f'backbone.{name}': torch.ones(48)}}
    with refuses(rf'no place for {re.escape(name)}'):
        strip(content, architecture, **size)
    report = strip(content, architecture, drop=(name,), **size)
    assert gap(report.model, net) == 0 and f'backbone.{name}' in str(report)


def test_shifted_window_masks_are_computed_anew(strip):
    net = network(SWIN, **SWIN_SIZE)
    content = net.state_dict() | dict(net.named_buffers())
    report = strip(content, SWIN, **SWIN_SIZE)
    assert gap(report.model, net) == 0 and dict(report.without_effect).keys() == {'layers.0.blocks.1.attn_mask'}
    content['layers.0.blocks.1.attn_mask'] = content['layers.0.blocks.1.attn_mask'] + 1
    with refuses(r'layers\.0\.blocks\.1\.attn_mask'):
        strip(content, SWIN, **SWIN_SIZE)


@pytest.mark.parametrize('name', sorted(set(zoo.ALL) - {'naflex_map'}))
def test_a_models_own_weights_are_all_accounted_for(name, strip):
    architecture, kwargs = zoo.ALL[name]
    net = zoo.build(name, num_classes=3)
    report = strip({'model': net.state_dict()}, architecture, **kwargs, num_classes=3)
    assert report.dropped == () and report.loaded == len(net.state_dict())


def test_a_lora_that_was_not_merged_is_named(strip):
    state = {k.replace('qkv.', 'qkv.base_layer.'): v for k, v in network(img_size=64).state_dict().items()}
    with refuses('merge'):
        strip(state | {'blocks.0.attn.qkv.lora_A.default.weight': torch.ones(8, 48)})


def test_layers_of_a_cnn_are_no_lora(strip):
    plain = timm.create_model('dla34', num_classes=0)
    report = strip({f'net.{k}': v for k, v in plain.state_dict().items()}, 'dla34')
    assert torch.equal(report.model.base_layer[0].weight, plain.base_layer[0].weight)


@pytest.mark.parametrize('name', ['poolformer_s12', 'resnet10t'])
def test_a_size_that_no_weight_is_tied_to_is_the_command_lines(name, strip):
    state = mte.wrap(name, n_cls=0, num_classes=0).state_dict()
    namespace = argparse.Namespace(img_size=96, input_size=None, mean=None, std=None, crop_pct=None)
    report = strip({'arch': name, 'state_dict': state, 'args': namespace}, name)
    assert report.img_size == (96, 96) and report.codebase == 'timm'


@pytest.mark.parametrize(
    ('args', 'made'),
    [
        ({'gp': 'avg'}, {'global_pool': 'avg'}),
        ({'model_kwargs': {'num_heads': 2}}, {'num_heads': 2}),
        ({'gp': 'max', 'model_kwargs': {'pretrained': True}}, {'global_pool': 'max'}),
    ],
)
def test_timms_command_line_tells_how_the_model_was_made(args, made, strip):
    own = timm.create_model('resnet10t' if 'gp' in args else NAME, num_classes=0, **made)
    name = own.pretrained_cfg['architecture']
    namespace = argparse.Namespace(model=f'{name}.tag', img_size=None, mean=None, std=None, crop_pct=None, **args)
    content = {'arch': name, 'state_dict': own.state_dict(), 'args': namespace}
    report = strip(content, 'resnet10t' if 'gp' in args else f'{NAME}.augreg_in21k')
    assert gap(report.model, own.eval(), (224, 224)) == 0


# --- grids


def test_a_wrapped_models_grid_is_remembered(strip, tmp_path):
    model = mte.wrap(network(img_size=(32, 128)))
    with torch.no_grad():
        model.backbone.pos_embed[0, 1:, 0] = torch.arange(8.0).repeat(2)
    embedding = model.backbone.pos_embed.detach()
    for size, grid in (((64, 256), (4, 16)), (64, (4, 4)), ((32, 64), (2, 4)), ((128, 32), (8, 2))):
        report = strip({'teacher': model.state_dict()}, img_size=size)
        assert torch.equal(report.model.pos_embed, resample_abs_pos_embed(embedding, grid, (2, 8), 1))
        assert f'2x8 -> {grid[0]}x{grid[1]}' in str(report)
    kept = strip({'teacher': model.state_dict()})
    assert gap(kept.model, model.backbone, (32, 128)) == 0 and kept.resampled == ()
    folder = mte.save_pretrained(kept, tmp_path / 'export')
    exported = mte.strip_checkpoint(folder / 'model.safetensors', NAME, img_size=(64, 256), **SIZE)
    assert torch.equal(exported.model.pos_embed, resample_abs_pos_embed(embedding, (4, 16), (2, 8), 1))


def test_where_nothing_tells_a_grid_it_is_asked_for(strip):
    wide, eight = network(img_size=(32, 128)), network(img_size=(32, 64))
    for net, kwargs, message in (
        (wide, {'img_size': (64, 256)}, r'1x16, 2x8, 4x4, 8x2, 16x1.*--trained-size H W'),
        (eight, {}, r'2x4, 4x2.*trained_size'),
        (wide, {'trained_size': 96}, r'trained_size=\(96, 96\): gives 6x6 patches.*has 16'),
        (wide, {'trained_size': 0}, 'trained_size=0'),
    ):
        with refuses(message):
            strip({'model': net.state_dict()}, **kwargs)
    report = strip({'model': wide.state_dict()}, trained_size=(32, 128), img_size=(64, 256))
    assert torch.equal(report.model.pos_embed, resample_abs_pos_embed(wide.pos_embed, (4, 16), (2, 8), 1))
    assert gap(strip({'model': eight.state_dict()}, trained_size=(32, 64)).model, eight, (32, 64)) == 0


@pytest.mark.parametrize(
    'args', [{'img_size': None, 'input_size': (3, 32, 128)}, {'img_size': [32, 128], 'input_size': None}]
)
def test_timms_command_line_tells_the_size(args, strip):
    wide = network(img_size=(32, 128))
    namespace = argparse.Namespace(**args, mean=None, std=None, crop_pct=None)
    report = strip({'arch': NAME, 'state_dict': wide.state_dict(), 'args': namespace})
    assert gap(report.model, wide, (32, 128)) == 0 and report.codebase == 'timm' and report.mean == (0.5, 0.5, 0.5)


def dino_file(state):
    teacher = prefixed(state) | {'head.mlp.0.weight': torch.ones(3, 3)}
    return {'student': teacher, 'teacher': teacher, 'args': argparse.Namespace(arch='vit'), 'dino_loss': {}}


@pytest.mark.parametrize('content', [dino_file, lambda s: {'teacher': prefixed(s)}, lambda s: {'model': s}])
def test_the_trained_size_is_kept(content, strip, command):
    net = network(img_size=96)
    report = strip(content(net.state_dict()))
    assert gap(report.model, net, (96, 96)) == 0 and '6x6' in str(report)
    assert command().config['pretrained_cfg']['input_size'] == [3, 96, 96]
    asked = ['--img-size', 224]
    assert command(*asked).code == (content is not dino_file)  # nothing is resampled on a guess
    ran = command(*asked, *([] if content is dino_file else ['--trained-size', 96]))
    assert ran.code == 0 and '6x6 -> 14x14' in ran.out and ran.config['pretrained_cfg']['input_size'] == [3, 224, 224]


def test_a_python_export_of_another_size_says_that_size(strip, tmp_path):
    report = strip({'model': network(img_size=96).state_dict()}, trained_size=96, img_size=64)
    folder = mte.save_pretrained(report, tmp_path / 'x')
    assert zoo.config_of(folder)['pretrained_cfg']['input_size'] == [3, 64, 64]


def test_a_grid_of_its_own_tells_the_size(strip):
    name, size = 'samvit_base_patch16', dict(global_attn_indexes=(), use_rel_pos=False, **SIZE)
    net = network(name, img_size=(64, 96), **size)
    report = strip({'model': net.state_dict()}, name, **size)
    assert gap(report.model, net, (64, 96)) == 0
    assert '4x6 -> 4x4' in str(strip({'model': net.state_dict()}, name, img_size=64, **size))


def test_window_tables_of_another_size_are_asked_for(strip):
    net = network('beit_base_patch16_224', img_size=64, **SIZE)
    with refuses('--img-size'):
        strip({'model': net.state_dict()}, 'beit_base_patch16_224', **SIZE)
    assert gap(strip({'model': net.state_dict()}, 'beit_base_patch16_224', img_size=64, **SIZE).model, net) == 0


def test_a_kernel_of_another_patch_size_is_not_resampled_unasked(strip):
    net = network(patch_size=8, img_size=96)
    with refuses('patch_size=8'):
        strip({'model': net.state_dict()})
    assert gap(strip({'model': net.state_dict()}, patch_size=8).model, net, (96, 96)) == 0
    assert strip({'model': net.state_dict()}, patch_size=16, img_size=192).resampled == ('patch_embed.proj.weight',)


@pytest.mark.parametrize(
    ('kwargs', 'advice'),
    [
        ({'init_values': 1e-5}, 'init_values=1e-05'),
        ({'qk_norm': True}, 'qk_norm=True'),
        ({'class_token': False, 'global_pool': 'avg'}, "class_token=False, global_pool='avg'"),
        ({'reg_tokens': 4, 'no_embed_class': True}, 'reg_tokens=4, no_embed_class=True'),
        ({'reg_tokens': 4}, 'reg_tokens=4'),
        ({'global_pool': 'map'}, "global_pool='map'"),
        ({'pre_norm': True}, 'pre_norm=True'),
        ({'qkv_bias': False}, 'qkv_bias=False'),
        ({'in_chans': 1}, 'in_chans=1'),
        ({'depth': 3}, 'depth=3'),
    ],
)
def test_the_argument_that_has_a_place_for_all_is_named(kwargs, advice, strip):
    state = network(img_size=224, **kwargs).state_dict()
    with refuses(f'{advice} has a place for all of it'):
        strip({'model': state})
    assert strip({'model': state}, **kwargs).loaded == len(state)


def test_a_distilled_model_is_named(strip):
    state = network('deit_tiny_distilled_patch16_224', **SIZE).state_dict()
    with refuses("model='deit_tiny_distilled_patch16_224' has a place"):
        strip({'model': state}, 'deit_tiny_patch16_224', **SIZE)


def test_a_small_swin_of_a_momentum_encoder_is_no_vit(strip):
    net = network(SWIN, **SWIN_SIZE)
    content = {'arch': 'swin_small', 'state_dict': prefixed(net.state_dict(), 'momentum_encoder.')}
    assert gap(strip(content, SWIN, **SWIN_SIZE).model, net) == 0


# --- normalization


def moco_file(state):
    own = prefixed(state, 'module.base_encoder.') | prefixed(state, 'module.momentum_encoder.')
    return {'epoch': 1, 'arch': 'vit_base', 'state_dict': own, 'optimizer': {}}


@pytest.mark.parametrize(
    ('content', 'whose'),
    [
        (dino_file, 'DINO'),
        (lambda s: {**dino_file(s), 'ibot_loss': {}}, 'iBOT'),
        (moco_file, 'MoCo v3'),
        (lambda s: {'teacher': prefixed(s) | {'dino_head.mlp.0.weight': torch.ones(3, 3)}}, 'DINOv2'),
    ],
)
def test_a_known_repositorys_statistics_go_into_the_config(content, whose, strip, command):
    report = strip(content(network(img_size=96).state_dict()))
    assert report.codebase == whose and list(report.mean) == IMAGENET
    ran = command()
    assert f'those of {whose}' in ran.out and ran.config['pretrained_cfg']['mean'] == IMAGENET
    assert command('--mean', 0.1, 0.2, 0.3).config['pretrained_cfg']['mean'] == [0.1, 0.2, 0.3]


def test_an_unknown_files_default_is_said_aloud(strip, command):
    assert strip({'model': network(img_size=96).state_dict()}).mean is None
    out = command().out
    assert "the architecture's default" in out and '--mean and --std change them' in out
