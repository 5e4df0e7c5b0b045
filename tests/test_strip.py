"""strip_checkpoint loses nothing of a backbone, guesses no grid, and says what a file trained with."""

import argparse
import json
import re

import pytest
import timm
import torch
import zoo
from timm.layers import resample_abs_pos_embed

import mte_timm as mte
from mte_timm.cli import main

NAME = 'vit_tiny_patch16_224'
SIZE = dict(embed_dim=48, depth=2, num_heads=3)
DINOV3 = 'vit_small_patch16_dinov3_qkvb'
DINOV3_SIZE = dict(embed_dim=96, depth=3, num_heads=3, img_size=64)
IMAGENET = [0.485, 0.456, 0.406]


def network(name=NAME, **kwargs):
    """A model whose every parameter matters."""
    torch.manual_seed(0)
    try:
        model = timm.create_model(name, num_classes=0, **{**SIZE, **kwargs}).eval()
    except RuntimeError as e:
        pytest.skip(f'this timm does not have {name}: {e}')
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(1.0 if p.ndim == 1 else 0.0, 0.1)
    return model


def prefixed(state, prefix='backbone.'):
    return {prefix + k: v for k, v in state.items()}


@pytest.fixture
def strip(tmp_path):
    def run(content, name=NAME, **kwargs):
        torch.save(content, tmp_path / 'c.pth')
        return mte.strip_checkpoint(tmp_path / 'c.pth', name, **(SIZE if name == NAME else {}) | kwargs)

    return run


@torch.no_grad()
def gap(a, b, size=(64, 64)):
    x = torch.randn(2, 3, *size)
    return (a.eval()(x) - b.eval()(x)).abs().max().item()


# --- what a conversion discards


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


def test_dinov3_is_converted_without_loss(strip):
    net = network(DINOV3, **DINOV3_SIZE)
    for periods in (net.rope.periods, net.rope.periods.bfloat16()):
        report = strip(dinov3(net, periods=periods), DINOV3, **DINOV3_SIZE)
        assert gap(report.model, net) == 0
        assert dict(report.without_effect)['backbone.blocks.0.attn.qkv.bias'].startswith('96 of its values')
        assert dict(report.without_effect)['backbone.rope_embed.periods'] == 'the model computes the same'


def test_biases_without_a_place_are_refused_with_the_architecture_that_has_one(strip):
    net = network(DINOV3, **DINOV3_SIZE)
    with pytest.raises(mte.CheckpointError, match=r"blocks\.0\.attn\.qkv\.bias.*model='vit_small_patch16_dinov3_qkvb'"):
        strip(dinov3(net), 'vit_small_patch16_dinov3', **DINOV3_SIZE)


@pytest.mark.parametrize('block', [0, 2])
def test_zero_biases_need_no_place(block, strip):
    net = network(DINOV3, **DINOV3_SIZE)
    content = dinov3(net)
    for name, v in content['teacher'].items():
        if name.endswith('qkv.bias'):
            content['teacher'][name] = torch.zeros_like(v)
    assert strip(content, 'vit_small_patch16_dinov3', **DINOV3_SIZE).loaded
    content['teacher'][f'backbone.blocks.{block}.attn.qkv.bias'][7] = 1e-3
    with pytest.raises(mte.CheckpointError, match=rf'blocks\.{block}\.attn\.qkv\.bias'):
        strip(content, 'vit_small_patch16_dinov3', **DINOV3_SIZE)


def test_a_k_bias_that_matters_is_refused_and_a_masked_one_is_not(strip):
    net = network(DINOV3, **DINOV3_SIZE)
    with pytest.raises(mte.CheckpointError, match=r'blocks\.0\.attn\.qkv\.bias'):
        strip(dinov3(net, k_bias=3.0), DINOV3, **DINOV3_SIZE)
    mask = torch.ones(3, 96)
    mask[1] = 0
    masks = {f'blocks.{i}.attn.qkv.bias_mask': mask.flatten() for i in range(3)}
    assert gap(strip(dinov3(net, k_bias=3.0, **masks), DINOV3, **DINOV3_SIZE).model, net) == 0


@pytest.mark.parametrize('change', [lambda p: p * 1.5, lambda p: p**0.85, lambda p: p.flip(0)])
def test_other_rope_periods_are_refused(change, strip):
    net = network(DINOV3, **DINOV3_SIZE)
    with pytest.raises(mte.CheckpointError, match=r'no place for rope_embed\.periods'):
        strip(dinov3(net, periods=change(net.rope.periods)), DINOV3, **DINOV3_SIZE)


def test_rotations_of_eva02_are_compared(strip):
    kwargs = {'img_size': 56, **SIZE}
    net = network('eva02_tiny_patch14_224', **kwargs)
    sin, cos = net.rope.get_embed().chunk(2, dim=-1)
    buffers = {'rope.freqs_cos': cos, 'rope.freqs_sin': sin, 'blocks.1.attn.rope.freqs_cos': cos}
    assert gap(strip(net.state_dict() | buffers, 'eva02_tiny_patch14_224', **kwargs).model, net, (56, 56)) == 0
    with pytest.raises(mte.CheckpointError, match=r'blocks\.1\.attn\.rope\.freqs_cos'):
        strip(
            net.state_dict() | buffers | {'blocks.1.attn.rope.freqs_cos': 0.9 * cos}, 'eva02_tiny_patch14_224', **kwargs
        )


@pytest.mark.parametrize(
    'name', ['cls_norm.weight', 'local_cls_norm.bias', 'blocks.0.norm3.weight', 'adapter.0.weight']
)
@pytest.mark.parametrize('architecture', [NAME, DINOV3])
def test_tensors_without_a_place_are_refused_by_name(name, architecture, strip):
    size = DINOV3_SIZE if architecture == DINOV3 else {'img_size': 64}
    net = network(architecture, **size)
    state = dinov3(net)['teacher'] if architecture == DINOV3 else prefixed(net.state_dict())
    content = {'teacher': state | {f'backbone.{name}': torch.ones(48)}}
    with pytest.raises(mte.CheckpointError, match=rf'no place for {re.escape(name)}'):
        strip(content, architecture, **size)
    report = strip(content, architecture, drop=(name,), **size)
    assert gap(report.model, net) == 0 and f'backbone.{name}' in str(report)


def test_shifted_window_masks_are_computed_anew(strip):
    size = dict(img_size=64, window_size=4, embed_dim=12, depths=(2, 1, 1, 1))
    net = timm.create_model('swin_tiny_patch4_window7_224', num_classes=0, **size)
    content = net.state_dict() | dict(net.named_buffers())
    report = strip(content, 'swin_tiny_patch4_window7_224', **size)
    assert gap(report.model, net) == 0 and dict(report.without_effect).keys() == {'layers.0.blocks.1.attn_mask'}
    content['layers.0.blocks.1.attn_mask'] = content['layers.0.blocks.1.attn_mask'] + 1
    with pytest.raises(mte.CheckpointError, match=r'layers\.0\.blocks\.1\.attn_mask'):
        strip(content, 'swin_tiny_patch4_window7_224', **size)


@pytest.mark.parametrize('name', sorted(set(zoo.ALL) - {'naflex_map'}))
def test_a_models_own_weights_are_all_accounted_for(name, strip):
    architecture, kwargs = zoo.ALL[name]
    net = zoo.build(name, num_classes=3)
    report = strip({'model': net.state_dict()}, architecture, **kwargs, num_classes=3)
    assert report.dropped == () and report.loaded == len(net.state_dict())


# --- grids


def test_a_wrapped_models_grid_is_remembered(strip, tmp_path):
    model = mte.wrap(network(img_size=(32, 128)))
    columns = torch.arange(8.0).repeat(2)
    with torch.no_grad():
        model.backbone.pos_embed[0, 1:, 0] = columns
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
    with pytest.raises(mte.CheckpointError, match=r'1x16, 2x8, 4x4, 8x2, 16x1.*--trained-size H W'):
        strip({'model': wide.state_dict()}, img_size=(64, 256))
    with pytest.raises(mte.CheckpointError, match=r'2x4, 4x2.*trained_size'):
        strip({'model': eight.state_dict()})
    report = strip({'model': wide.state_dict()}, trained_size=(32, 128), img_size=(64, 256))
    assert torch.equal(report.model.pos_embed, resample_abs_pos_embed(wide.pos_embed, (4, 16), (2, 8), 1))
    assert gap(strip({'model': eight.state_dict()}, trained_size=(32, 64)).model, eight, (32, 64)) == 0
    with pytest.raises(mte.CheckpointError, match=r'trained_size=\(96, 96\): gives 6x6 patches.*has 16'):
        strip({'model': wide.state_dict()}, trained_size=96)
    with pytest.raises(mte.CheckpointError, match='trained_size=0'):
        strip({'model': wide.state_dict()}, trained_size=0)


@pytest.mark.parametrize(
    'args', [{'img_size': None, 'input_size': (3, 32, 128)}, {'img_size': [32, 128], 'input_size': None}]
)
def test_timms_command_line_tells_the_size(args, strip):
    wide = network(img_size=(32, 128))
    namespace = argparse.Namespace(**args, mean=None, std=None, crop_pct=None)
    content = {'arch': NAME, 'state_dict': wide.state_dict(), 'args': namespace}
    report = strip(content)
    assert gap(report.model, wide, (32, 128)) == 0 and report.codebase == 'timm' and report.mean == (0.5, 0.5, 0.5)


def dino_file(state):
    heads = {'head.mlp.0.weight': torch.ones(3, 3)}
    teacher = prefixed(state) | heads
    return {'student': teacher, 'teacher': teacher, 'args': argparse.Namespace(arch='vit'), 'dino_loss': {}}


@pytest.mark.parametrize('content', [dino_file, lambda s: {'teacher': prefixed(s)}, lambda s: {'model': s}])
def test_the_trained_size_is_kept(content, strip, tmp_path, capsys):
    net = network(img_size=96)
    report = strip(content(net.state_dict()))
    assert gap(report.model, net, (96, 96)) == 0 and '6x6' in str(report)
    options = ['--model', NAME, '--model-kwargs', *(f'{k}={v}' for k, v in SIZE.items())]
    assert main(['strip', str(tmp_path / 'c.pth'), '-o', str(tmp_path / 'kept'), *options]) == 0
    config = json.loads((tmp_path / 'kept' / 'config.json').read_text())
    assert config['pretrained_cfg']['input_size'] == [3, 96, 96]
    known = [] if content is dino_file else ['--trained-size', '96']
    command = ['strip', str(tmp_path / 'c.pth'), '-o', str(tmp_path / 'asked'), '--img-size', '224', *options]
    assert main([*command, *known]) == 0
    assert main(command) == (content is not dino_file)  # nothing is resampled on a guess
    assert '6x6 -> 14x14' in capsys.readouterr().out
    config = json.loads((tmp_path / 'asked' / 'config.json').read_text())
    assert config['pretrained_cfg']['input_size'] == [3, 224, 224]


def test_a_python_export_of_another_size_says_that_size(strip, tmp_path):
    report = strip({'model': network(img_size=96).state_dict()}, trained_size=96, img_size=64)
    config = json.loads((mte.save_pretrained(report, tmp_path / 'x') / 'config.json').read_text())
    assert config['pretrained_cfg']['input_size'] == [3, 64, 64]


def test_a_grid_of_its_own_tells_the_size(strip):
    size = dict(embed_dim=48, depth=2, num_heads=3, global_attn_indexes=(), use_rel_pos=False)
    try:
        net = timm.create_model('samvit_base_patch16', num_classes=0, img_size=(64, 96), **size)
    except RuntimeError:
        pytest.skip('this timm has no SAM')
    report = strip({'model': net.state_dict()}, 'samvit_base_patch16', **size)
    assert gap(report.model, net, (64, 96)) == 0
    asked = strip({'model': net.state_dict()}, 'samvit_base_patch16', img_size=64, **size)
    assert '4x6 -> 4x4' in str(asked)


def test_window_tables_of_another_size_are_asked_for(strip):
    size = dict(img_size=64, **SIZE)
    net = timm.create_model('beit_base_patch16_224', num_classes=0, **size)
    with pytest.raises(mte.CheckpointError, match='--img-size'):
        strip({'model': net.state_dict()}, 'beit_base_patch16_224', **SIZE)
    assert gap(strip({'model': net.state_dict()}, 'beit_base_patch16_224', **size).model, net) == 0


def test_a_kernel_of_another_patch_size_is_not_resampled_unasked(strip):
    net = network(patch_size=8, img_size=96)
    with pytest.raises(mte.CheckpointError, match='patch_size=8'):
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
    with pytest.raises(mte.CheckpointError, match=f'{advice} has a place for all of it'):
        strip({'model': state})
    assert strip({'model': state}, **kwargs).loaded == len(state)


def test_a_distilled_model_is_named(strip):
    state = network('deit_tiny_distilled_patch16_224').state_dict()
    with pytest.raises(mte.CheckpointError, match="model='deit_tiny_distilled_patch16_224' has a place"):
        strip({'model': state}, 'deit_tiny_patch16_224', **SIZE)


def test_a_small_swin_of_a_momentum_encoder_is_no_vit(strip):
    size = dict(img_size=64, window_size=4, embed_dim=12, depths=(1, 1, 1, 1))
    net = timm.create_model('swin_tiny_patch4_window7_224', num_classes=0, **size)
    content = {'arch': 'swin_small', 'state_dict': prefixed(net.state_dict(), 'momentum_encoder.')}
    assert gap(strip(content, 'swin_tiny_patch4_window7_224', **size).model, net) == 0


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
def test_a_known_repositorys_statistics_go_into_the_config(content, whose, strip, tmp_path, capsys):
    report = strip(content(network(img_size=96).state_dict()))
    assert report.codebase == whose and list(report.mean) == IMAGENET
    options = ['--model', NAME, '--model-kwargs', *(f'{k}={v}' for k, v in SIZE.items())]
    path = str(tmp_path / 'c.pth')
    assert main(['strip', path, '-o', str(tmp_path / 'x'), *options]) == 0
    assert f'those of {whose}' in capsys.readouterr().out
    assert json.loads((tmp_path / 'x' / 'config.json').read_text())['pretrained_cfg']['mean'] == IMAGENET
    assert main(['strip', path, '-o', str(tmp_path / 'y'), *options, '--mean', '0.1', '0.2', '0.3']) == 0
    assert json.loads((tmp_path / 'y' / 'config.json').read_text())['pretrained_cfg']['mean'] == [0.1, 0.2, 0.3]


def test_an_unknown_files_default_is_said_aloud(strip, tmp_path, capsys):
    assert strip({'model': network(img_size=96).state_dict()}).mean is None
    options = ['--model', NAME, '--model-kwargs', *(f'{k}={v}' for k, v in SIZE.items())]
    assert main(['strip', str(tmp_path / 'c.pth'), '-o', str(tmp_path / 'x'), *options]) == 0
    assert "the architecture's default" in (out := capsys.readouterr().out) and '--mean and --std change them' in out


# --- layouts


def test_a_lora_that_was_not_merged_is_named(strip):
    state = {k.replace('qkv.', 'qkv.base_layer.'): v for k, v in network(img_size=64).state_dict().items()}
    with pytest.raises(mte.CheckpointError, match='merge'):
        strip(state | {'blocks.0.attn.qkv.lora_A.default.weight': torch.ones(8, 48)})


def test_a_missing_tensor_is_named_in_full(strip):
    state = network(img_size=64).state_dict()
    del state['blocks.1.mlp.fc2.bias']
    with pytest.raises(mte.CheckpointError, match=r'missing: blocks\.1\.mlp\.fc2\.bias'):
        strip(state)


def test_a_checkpoint_folder_names_the_conversion(tmp_path):
    (tmp_path / '.metadata').write_bytes(b'')
    with pytest.raises(FileNotFoundError, match=r'torch\.distributed.checkpoint\.format_utils dcp_to_torch'):
        mte.strip_checkpoint(tmp_path, NAME)


@pytest.mark.parametrize('key', ['nets.student', 'nets.student.backbone', 'student.backbone'])
def test_a_key_may_have_dots(key, strip):
    net, other = network(img_size=64), network(img_size=64)
    state = {k: 2 * v for k, v in other.state_dict().items()}
    content = {'nets': {'teacher': prefixed(net.state_dict()), 'student': prefixed(state)}}
    if key == 'student.backbone':
        content = content['nets']
    report = strip(content, key=key)
    assert torch.equal(report.model.cls_token, state['cls_token'])


def test_the_small_vit_of_moco_v3_is_told_by_its_embedding(strip):
    at, omega = torch.arange(4.0), 10000 ** -(torch.arange(96.0) / 96)
    column, row = (p.flatten()[:, None] * omega for p in torch.meshgrid(at, at, indexing='ij'))
    fixed = torch.cat([column.sin(), column.cos(), row.sin(), row.cos()], dim=1)
    size = dict(embed_dim=384, depth=1, img_size=64)
    state = network(num_heads=12, **size).state_dict()
    state['pos_embed'] = torch.cat([torch.zeros(1, 384), fixed])[None]
    with pytest.raises(mte.CheckpointError, match='num_heads=12'):
        strip({'model': state}, num_heads=6, **size)
    assert strip({'model': state}, num_heads=12, **size).loaded
