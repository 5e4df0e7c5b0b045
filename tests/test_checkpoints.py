"""Training checkpoints of each codebase give back the backbone; damaged and strange ones are refused."""

import argparse
import collections
import copy
import dataclasses
import json
import os
import pickle
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import zoo
from torch import nn

import mte_timm as mte
from mte_timm.cli import main

NAME, ARGS = 'vit_tiny_patch16_224', zoo.VIT
OTHER_KINDS = (torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn)


def prefixed(state, prefix):
    return {prefix + k: v for k, v in state.items()}


def head_state(name='head'):
    return {f'{name}.mlp.0.weight': torch.randn(8, 48), f'{name}.last_layer.weight_v': torch.randn(9, 8)}


def plain_state(seed=0, **kwargs):
    torch.manual_seed(seed)
    return zoo.build('plain', **kwargs).state_dict()


def dino(student, teacher):
    return {
        'student': prefixed(prefixed(student, 'backbone.') | head_state(), 'module.'),
        'teacher': prefixed(teacher, 'backbone.') | head_state(),
        'optimizer': {'state': {0: {'step': torch.tensor(1.0)}}, 'param_groups': [{'lr': 0.1}]},
        'epoch': 3,
        'args': argparse.Namespace(arch='vit_small', lr=0.1),
        'dino_loss': {'center': torch.zeros(1, 9)},
    }


def ibot(student, teacher):
    checkpoint = dino(student, teacher)
    checkpoint['teacher']['backbone.masked_embed'] = torch.zeros(1, 48)
    checkpoint['ibot_loss'] = checkpoint.pop('dino_loss')
    return checkpoint


def moco_v3(student, teacher):
    own, momentum = (prefixed(s, f'module.{e}.') for s, e in ((teacher, 'base_encoder'), (student, 'momentum_encoder')))
    mlp = {'module.base_encoder.head.0.weight': torch.randn(8, 48), 'module.predictor.0.weight': torch.randn(8, 8)}
    return {'epoch': 1, 'arch': 'vit_base', 'state_dict': own | momentum | mlp, 'optimizer': {}, 'scaler': {}}


def lightning(student, teacher):
    state = prefixed(student, 'student_backbone.vit.') | prefixed(teacher, 'teacher_backbone.vit.')
    return {'state_dict': state | head_state('student_head'), 'epoch': 1, 'hyper_parameters': {'lr': 0.1}}


def byol(student, teacher):
    state = prefixed(teacher, 'backbone.') | prefixed(student, 'backbone_momentum.') | head_state('projection_head')
    return {'state_dict': state, 'loops': {}}


def timm_ema(student, teacher):
    return {'arch': NAME, 'state_dict': student, 'state_dict_ema': teacher, 'args': argparse.Namespace(lr=1)}


def compiled_ddp(student, teacher):
    return {'model': prefixed(teacher, '_orig_mod.module.'), 'epoch': 1}


def bare(student, teacher):
    return teacher


def wrapped_model(student, teacher):
    model = mte.wrap(zoo.build('plain'))
    model.backbone.load_state_dict(teacher)
    return {'student': prefixed(student, 'backbone.'), 'teacher': model.state_dict()}


CODEBASES = [dino, ibot, moco_v3, lightning, byol, timm_ema, compiled_ddp, bare, wrapped_model]


@pytest.fixture
def checkpoint(tmp_path):
    def write(content, name='checkpoint.pth'):
        path = tmp_path / name
        (safetensors.torch.save_file if name.endswith('safetensors') else torch.save)(content, path)
        return path

    return write


@pytest.mark.parametrize('make', CODEBASES)
def test_backbone_is_found(make, checkpoint):
    student, teacher = plain_state(1), plain_state(2)
    report = mte.strip_checkpoint(checkpoint(make(student, teacher)), NAME, **ARGS)
    found = report.model.state_dict()
    assert found.keys() == teacher.keys()
    assert all(torch.equal(found[k], teacher[k]) for k in teacher), report.key
    assert not report.model.training and report.loaded == len(teacher) and report.resampled == ()


@pytest.mark.parametrize(
    ('make', 'key'),
    [
        (dino, 'student'),
        (moco_v3, 'momentum_encoder'),
        (moco_v3, 'module.momentum_encoder'),
        (lightning, 'student_backbone'),
        (byol, 'backbone_momentum'),
        (timm_ema, 'state_dict'),
        (wrapped_model, 'student'),
    ],
)
def test_key_chooses_the_network(make, key, checkpoint):
    student, teacher = plain_state(1), plain_state(2)
    report = mte.strip_checkpoint(checkpoint(make(student, teacher)), NAME, key, **ARGS)
    assert torch.equal(report.model.cls_token, student['cls_token'])


def test_report_says_what_was_dropped(checkpoint):
    report = mte.strip_checkpoint(checkpoint(ibot(plain_state(1), plain_state(2))), NAME, **ARGS)
    assert report.key == 'teacher: backbone.'
    text = str(report)
    assert 'head (2)' in text and 'backbone' in text and 'student' in text and 'ibot_loss' in text
    assert {'backbone.masked_embed', 'head.mlp.0.weight'} <= set(report.dropped)


def test_scores_that_callbacks_keep_are_no_weights(checkpoint):
    saved = lightning(plain_state(1), plain_state(2))
    saved['callbacks'] = {'ModelCheckpoint': {'best_model_score': torch.tensor(0.5)}}
    report = mte.strip_checkpoint(checkpoint(saved), NAME, key='student_backbone', **ARGS)
    assert not any('callbacks' in name for name in report.dropped)


def test_heads_of_moco_v3s_small_vit(checkpoint):
    path = checkpoint(moco_v3(plain_state(1), plain_state(2)) | {'arch': 'vit_small'})
    with pytest.raises(mte.CheckpointError, match='num_heads=12'):
        mte.strip_checkpoint(path, NAME, **ARGS)
    assert mte.strip_checkpoint(path, NAME, **{**ARGS, 'num_heads': 12}).key == 'state_dict: base_encoder.'


def test_classifier_is_kept_on_request(checkpoint):
    state = plain_state(num_classes=3)
    path = checkpoint(prefixed(state, 'backbone.'), 'x.safetensors')
    kept = mte.strip_checkpoint(path, NAME, num_classes=3, **ARGS)
    assert torch.equal(kept.model.head.weight, state['head.weight']) and kept.dropped == ()
    assert set(mte.strip_checkpoint(path, NAME, **ARGS).dropped) == {'backbone.head.weight', 'backbone.head.bias'}
    with pytest.raises(mte.CheckpointError, match='shape'):
        mte.strip_checkpoint(path, NAME, num_classes=5, **ARGS)


def test_swin_with_the_names_of_its_first_release(checkpoint):
    model = zoo.build('swin')
    state = {}
    for key, value in model.state_dict().items():  # there, downsampling ends a stage, here it begins the next
        parts = key.split('.')
        if 'downsample' in key:
            parts[1] = str(int(parts[1]) - 1)
        state['.'.join(parts)] = value
    path = checkpoint(
        {'model': prefixed(state, 'encoder.') | prefixed(copy.deepcopy(state), 'encoder_k.'), 'config': {}}
    )
    report = mte.strip_checkpoint(path, 'swin_tiny_patch4_window7_224', **zoo.ALL['swin'][1])
    x = zoo.images(model)
    assert torch.equal(report.model(x), model.eval()(x))
    assert report.key == 'model: encoder.' and report.resampled == ()
    assert report.dropped and all(k.startswith('encoder_k') for k in report.dropped)


def test_what_codebases_save_beside_weights_is_no_obstacle(checkpoint, monkeypatch):
    """Settings without their package, metrics, paths, keys that are no names; nor what a script itself allowed."""
    module = types.ModuleType('yacs.config')
    module.CfgNode = type('CfgNode', (dict,), {'__module__': 'yacs.config'})
    config = module.CfgNode(LR=0.1)
    config.__dict__['__immutable__'] = True
    monkeypatch.setitem(sys.modules, 'yacs', types.ModuleType('yacs'))
    monkeypatch.setitem(sys.modules, 'yacs.config', module)
    settings = argparse.Namespace(out=Path('x'), sizes=collections.deque([1]), counts=collections.defaultdict(int, a=1))
    more = {'x': collections.defaultdict(list, b=[1]), 'best': np.float64(0.5), 'array': np.arange(3), 3: {'a': 1}}
    path = checkpoint({'model': plain_state(), 'config': config, 'args': settings, **more})
    monkeypatch.undo()
    allowed = [np.float64(0.5).__reduce__()[0], np.dtype, zoo.counts]
    before = torch.serialization.get_safe_globals()
    torch.serialization.add_safe_globals(allowed)
    try:
        assert mte.strip_checkpoint(path, NAME, **ARGS).key == 'model'
        assert {*torch.serialization.get_safe_globals()} == {*before, *allowed}
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


@pytest.mark.parametrize(
    ('published', 'other'),
    [
        (('encoder',), ('encoder_k',)),
        (('backbone',), ('momentum_backbone',)),
        (('online',), ('target',)),
        (('ema_model',), ('model',)),
        (('ema_state_dict',), ('state_dict',)),
        (('ema', 'module'), ('model',)),
        (('checkpoint', 'state_dict'), ('checkpoint', 'student')),
    ],
)
@pytest.mark.parametrize('swap', [False, True])
def test_the_network_to_publish_is_taken_whatever_the_order(published, other, swap, checkpoint):
    good, bad = plain_state(1), plain_state(2)
    content = {}
    for keys, state in sorted([(published, good), (other, bad)], reverse=swap, key=lambda x: x[0]):
        entry = content
        for key in keys[:-1]:
            entry = entry.setdefault(key, {})
        entry[keys[-1]] = state
    report = mte.strip_checkpoint(checkpoint(content), NAME, **ARGS)
    assert torch.equal(report.model.cls_token, good['cls_token'])
    chosen = mte.strip_checkpoint(checkpoint(content), NAME, '.'.join(other), **ARGS)
    assert torch.equal(chosen.model.cls_token, bad['cls_token'])


def test_networks_alike_need_a_key(checkpoint):
    path = checkpoint({'a': plain_state(1), 'b': plain_state(2)})
    with pytest.raises(mte.CheckpointError, match='key=: a, b'):
        mte.strip_checkpoint(path, NAME, **ARGS)


@pytest.mark.parametrize(('left_out', 'message'), [(1, 'missing'), (10, 'network to publish.*key=')])
def test_an_incomplete_teacher_is_not_replaced_by_the_student(left_out, message, checkpoint):
    teacher = plain_state(2)
    for name in list(teacher)[-left_out:]:
        del teacher[name]
    path = checkpoint(dino(plain_state(1), teacher))
    with pytest.raises(mte.CheckpointError, match=message):
        mte.strip_checkpoint(path, NAME, **ARGS)
    assert mte.strip_checkpoint(path, NAME, 'student', **ARGS).key == 'student: backbone.'


@pytest.mark.parametrize('name', ['optim_state', 'optimizer_state_dict', 'opt'])
def test_an_optimizers_state_is_no_network(name, checkpoint):
    moments = {k: v.square() for k, v in plain_state(2).items()}
    path = checkpoint({'student': plain_state(1), name: {'exp_avg': moments}})
    assert mte.strip_checkpoint(path, NAME, **ARGS).key == 'student'


def test_two_networks_that_differ_in_a_wrapper_alone_are_refused(checkpoint):
    path = checkpoint(prefixed(plain_state(1), 'module.backbone.') | prefixed(plain_state(2), 'backbone.'))
    with pytest.raises(mte.CheckpointError, match='two networks'):
        mte.strip_checkpoint(path, NAME, **ARGS)


def test_projection_heads_in_a_classifiers_place_are_left_out(checkpoint):
    for name in ('convnext', 'resnet', 'swin'):
        architecture, kwargs = zoo.ALL[name]
        state = zoo.build(name).state_dict()
        classifier = timm.create_model(architecture, **kwargs).pretrained_cfg['classifier']
        head = {f'{classifier}.0.weight': torch.randn(8, 8), f'{classifier}.2.bias': torch.randn(8)}
        report = mte.strip_checkpoint(checkpoint({'state_dict': state | head}), architecture, **kwargs)
        assert set(report.dropped) == set(head)


def sparse(state):
    return state | {'norm.weight': state['norm.weight'].to_sparse()}


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        *((lambda s, d=d: {k: v.to(d) for k, v in s.items()}, f'{d}.*quantized') for d in OTHER_KINDS),
        (sparse, r'does not load.*norm\.weight'),
    ],
)
def test_weights_of_other_kinds_are_refused(change, message, checkpoint):
    with pytest.raises(mte.CheckpointError, match=message):
        mte.strip_checkpoint(checkpoint({'teacher': change(plain_state())}), NAME, **ARGS)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_another_precision_are_taken(dtype, checkpoint):
    state = {k: v.to(dtype) for k, v in plain_state().items()}
    report = mte.strip_checkpoint(checkpoint({'teacher': state}), NAME, **ARGS)
    assert torch.equal(report.model.pos_embed.to(dtype), state['pos_embed'])


class Exploit:
    def __init__(self, target):
        self.target = str(target)

    def __reduce__(self):
        return os.mkdir, (self.target,)


@pytest.mark.parametrize('protocol', [2, 4, None])
def test_code_is_never_run(protocol, tmp_path):
    path = tmp_path / 'evil.pth'
    if protocol:
        torch.save({'teacher': plain_state(), 'x': Exploit(tmp_path / 'ran')}, path, pickle_protocol=protocol)
    else:
        path.write_bytes(pickle.dumps(Exploit(tmp_path / 'ran')))
    with pytest.raises(mte.CheckpointError, match='trust=True' if protocol else None):
        mte.strip_checkpoint(path, NAME, **ARGS)
    assert not (tmp_path / 'ran').exists()


def test_trust_loads_what_needs_code(checkpoint):
    net = zoo.build('plain')
    path = checkpoint({'epoch': 1, 'net': nn.ModuleDict({'encoder': net})})
    with pytest.raises(mte.CheckpointError, match=r'ModuleDict.*runs code'):
        mte.strip_checkpoint(path, NAME, **ARGS)
    report = mte.strip_checkpoint(path, NAME, trust=True, **ARGS)
    assert report.key == 'net: encoder.' and torch.equal(report.model.cls_token, net.cls_token)


@pytest.mark.parametrize('name', ['checkpoint.pth', 'checkpoint.safetensors'])
@pytest.mark.parametrize('keep', [0, 1, 100, 0.5, 0.99])
def test_truncated_files_are_refused(name, keep, checkpoint):
    path = checkpoint(plain_state(), name)
    content = path.read_bytes()
    path.write_bytes(content[: keep if isinstance(keep, int) else int(keep * len(content))])
    with pytest.raises(mte.CheckpointError, match='empty' if keep == 0 else r'damaged|truncated'):
        mte.strip_checkpoint(path, NAME, **ARGS)


def test_files_that_are_no_checkpoints_are_refused(tmp_path, checkpoint):
    with pytest.raises(FileNotFoundError, match='no such file'):
        mte.strip_checkpoint(tmp_path / 'none.pth', NAME, **ARGS)
    with pytest.raises(FileNotFoundError, match='folder'):
        mte.strip_checkpoint(tmp_path, NAME, **ARGS)
    (tmp_path / 'text.pth').write_text('hello')
    with pytest.raises(mte.CheckpointError, match='damaged'):
        mte.strip_checkpoint(tmp_path / 'text.pth', NAME, **ARGS)
    for content, message in (([1, 2], 'a list'), ({}, 'no tensors'), ({'epoch': 3}, 'epoch')):
        with pytest.raises(mte.CheckpointError, match=message):
            mte.strip_checkpoint(checkpoint(content), NAME, **ARGS)


def test_what_does_not_fit_is_refused(checkpoint):
    state = plain_state()
    path = checkpoint({'teacher': prefixed(state, 'backbone.')})
    with pytest.raises(mte.CheckpointError, match='another architecture'):
        mte.strip_checkpoint(path, 'resnet10t')
    with pytest.raises(mte.CheckpointError, match='shape'):
        mte.strip_checkpoint(path, NAME, **{**ARGS, 'embed_dim': 96})
    with pytest.raises(mte.CheckpointError, match='missing'):
        mte.strip_checkpoint(path, NAME, **{**ARGS, 'depth': 3})
    with pytest.raises(mte.CheckpointError, match='did you mean'):
        mte.strip_checkpoint(path, 'vit_small')
    with pytest.raises(mte.CheckpointError, match=r"no key 'ema'.*teacher"):
        mte.strip_checkpoint(path, NAME, 'ema', **ARGS)
    broken = copy.deepcopy(state)
    broken['norm.weight'][3] = float('nan')
    with pytest.raises(mte.CheckpointError, match='NaN'):
        mte.strip_checkpoint(checkpoint(broken), NAME, **ARGS)


CLI = ['--model', NAME, '--img-size', '32', '--model-kwargs', 'patch_size=8', 'embed_dim=48', 'depth=2', 'num_heads=3']


def test_command_writes_a_timm_model(checkpoint, tmp_path, capsys):
    teacher = plain_state(2)
    path = checkpoint(dino(plain_state(1), teacher))
    assert main(['strip', str(path), '--key', 'teacher', '-o', str(tmp_path / 'out'), *CLI]) == 0
    printed = capsys.readouterr().out
    assert 'teacher: backbone.' in printed and 'dropped' in printed and 'create_model' in printed
    zoo.needs_local_dir()
    loaded = timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True)
    assert all(torch.equal(v, teacher[k]) for k, v in loaded.state_dict().items())


@pytest.mark.parametrize('prefix', ['', 'module.', 'student.'])
def test_options_of_the_training_are_remembered(prefix, checkpoint, tmp_path):
    wrapped = mte.wrap(zoo.build('plain', num_classes=0), n_cls=3, n_pool=2)
    holder = torch.nn.ModuleDict({prefix.rstrip('.'): wrapped}) if prefix else wrapped
    path = checkpoint({'epoch': 3, 'teacher': holder.state_dict()})
    report = mte.strip_checkpoint(path, NAME, **ARGS)
    assert report.mte == dataclasses.asdict(wrapped.config)
    folder = mte.save_pretrained(report, tmp_path / 'report', model_args=ARGS)
    assert main(['strip', str(path), '-o', str(tmp_path / 'command'), *CLI]) == 0
    for each in (folder, tmp_path / 'command'):
        assert json.loads((each / 'config.json').read_text())['mte']['n_cls'] == 3
    plain = mte.save_pretrained(report.model, tmp_path / 'plain', model_args=ARGS)
    assert 'mte' not in json.loads((plain / 'config.json').read_text())


@pytest.mark.parametrize('said', [None, 3, {'n_cls': -1}, {'n_cls': '# text'}, {'pooling': ['x']}])
def test_nothing_but_options_is_believed_of_a_file(said, checkpoint, tmp_path):
    state = mte.wrap(zoo.build('plain', num_classes=0)).state_dict()
    state._metadata['']['mte'] = said
    report = mte.strip_checkpoint(checkpoint({'teacher': state}), NAME, **ARGS)
    folder = mte.save_pretrained(report, tmp_path / 'out', model_args=ARGS)
    assert 'mte' not in json.loads((folder / 'config.json').read_text())
    state._metadata = {'': {'mte': {'n_cls': 1, 'of a newer version': 2}}}
    report = mte.strip_checkpoint(checkpoint({'teacher': state}), NAME, **ARGS)
    config = json.loads((mte.save_pretrained(report, folder, model_args=ARGS) / 'config.json').read_text())
    assert config['mte'] == dataclasses.asdict(mte.MTEConfig(n_cls=1))


def test_command_reports_errors_and_writes_nothing(checkpoint, tmp_path, capsys):
    path = checkpoint(dino(plain_state(1), plain_state(2)))
    (tmp_path / 'file').write_text('')
    for arguments in (
        [str(path), '--key', 'nothing', '-o', str(tmp_path / 'out'), *CLI],
        [str(tmp_path / 'none.pth'), '-o', str(tmp_path / 'out'), *CLI],
        [str(path), '-o', str(tmp_path / 'file'), *CLI],
        [str(path), '-o', str(tmp_path / 'out'), '--model', 'resnet10t'],
        [str(path), '-o', str(tmp_path / 'out'), '--model', NAME, '--model-kwargs', 'num_heads=7'],
        [str(path), '-o', str(tmp_path / 'out'), *CLI, '--std', '0', '0', '0'],
        [str(path), '-o', str(tmp_path / 'out'), *CLI, '--in-chans', '0'],
        [str(path), '-o', str(tmp_path / 'out'), *CLI, 'num_classes=3'],
        [str(path), '-o', str(tmp_path / 'out'), '--model', NAME, '--img-size', '32', '32', '32'],
    ):
        assert main(['strip', *arguments]) == 1
        assert capsys.readouterr().err.startswith('mte-timm: error: ')
    assert sorted(os.listdir(tmp_path)) == ['checkpoint.pth', 'file']
    with pytest.raises(SystemExit):
        main(['strip', str(path), '-o', 'out', *CLI, '--model-kwargs', 'depth'])


def test_command_tells_models_of_any_size_of_their_images_size(checkpoint, tmp_path):
    architecture, kwargs = zoo.ALL['resnet']
    path = checkpoint({'model': zoo.build('resnet').state_dict()})
    options = ['--img-size', '96', '64', '--model-kwargs', *(f'{k}={v!r}' for k, v in kwargs.items())]
    assert main(['strip', str(path), '--model', architecture, '-o', str(tmp_path / 'out'), *options]) == 0
    config = json.loads((tmp_path / 'out' / 'config.json').read_text())
    assert config['pretrained_cfg']['input_size'] == [3, 96, 64]
