"""Training checkpoints of each codebase give back the backbone; damaged and strange ones are refused."""

import argparse
import collections
import copy
import dataclasses
import os
import pickle
import sys
import types
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import zoo
from torch import nn
from zoo import NAME, SIZE, prefixed

import mte_timm as mte

OTHER_KINDS = (torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn)


def head_state(name='head'):
    return {f'{name}.mlp.0.weight': torch.randn(8, 48), f'{name}.last_layer.weight_v': torch.randn(9, 8)}


def plain_state(seed=0, **kwargs):
    return {k: v + seed for k, v in zoo.network(**kwargs).state_dict().items()}


def two():
    """Weights of a student and of a teacher."""
    return plain_state(1), plain_state(2)


def dino(student, teacher):
    return {
        'student': prefixed(prefixed(student) | head_state(), 'module.'),
        'teacher': prefixed(teacher) | head_state(),
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


def moco_v3(student, teacher, arch='vit_base'):
    own, momentum = (prefixed(s, f'module.{e}.') for s, e in ((teacher, 'base_encoder'), (student, 'momentum_encoder')))
    mlp = {'module.base_encoder.head.0.weight': torch.randn(8, 48), 'module.predictor.0.weight': torch.randn(8, 8)}
    return {'epoch': 1, 'arch': arch, 'state_dict': own | momentum | mlp, 'optimizer': {}, 'scaler': {}}


def lightning(student, teacher):
    state = prefixed(student, 'student_backbone.vit.') | prefixed(teacher, 'teacher_backbone.vit.')
    return {'state_dict': state | head_state('student_head'), 'epoch': 1, 'hyper_parameters': {'lr': 0.1}}


def byol(student, teacher):
    state = prefixed(teacher) | prefixed(student, 'backbone_momentum.') | head_state('projection_head')
    return {'state_dict': state, 'loops': {}}


# --- which network


@pytest.mark.parametrize(
    ('make', 'keys'),
    [
        (dino, ['student']),
        (ibot, ['student']),
        (moco_v3, ['momentum_encoder', 'module.momentum_encoder']),
        (lightning, ['student_backbone']),
        (byol, ['backbone_momentum']),
    ],
)
def test_backbone_is_found_and_key_chooses_another(make, keys, strip):
    student, teacher = two()
    report = strip(make(student, teacher))
    found = report.model.state_dict()
    assert found.keys() == teacher.keys() and all(torch.equal(found[k], teacher[k]) for k in teacher), report.key
    assert not report.model.training and report.loaded == len(teacher) and report.resampled == ()
    for key in keys:
        assert torch.equal(strip(make(student, teacher), key=key).model.cls_token, student['cls_token'])


def test_report_says_what_was_dropped(strip):
    report = strip(ibot(*two()))
    assert report.key == 'teacher: backbone.'
    text = str(report)
    assert 'head (2)' in text and 'backbone' in text and 'student' in text and 'ibot_loss' in text
    assert {'backbone.masked_embed', 'head.mlp.0.weight'} <= set(report.dropped)


def test_scores_that_callbacks_keep_are_no_weights(strip):
    callbacks = {'ModelCheckpoint': {'best_model_score': torch.tensor(0.5)}}
    report = strip({**lightning(*two()), 'callbacks': callbacks}, key='student_backbone')
    assert not any('callbacks' in name for name in report.dropped)


def test_heads_of_moco_v3s_small_vit_are_told_by_its_name_or_its_embedding(strip):
    named = moco_v3(*two(), arch='vit_small')
    with pytest.raises(mte.CheckpointError, match='num_heads=12'):
        strip(named)
    assert strip(named, num_heads=12).key == 'state_dict: base_encoder.'
    at, omega = torch.arange(4.0), 10000 ** -(torch.arange(96.0) / 96)
    column, row = (p.flatten()[:, None] * omega for p in torch.meshgrid(at, at, indexing='ij'))
    fixed = torch.cat([column.sin(), column.cos(), row.sin(), row.cos()], dim=1)
    size = dict(embed_dim=384, depth=1, img_size=64)
    state = zoo.network(num_heads=12, **size).state_dict()
    state['pos_embed'] = torch.cat([torch.zeros(1, 384), fixed])[None]
    with pytest.raises(mte.CheckpointError, match='num_heads=12'):
        strip({'model': state}, num_heads=6, **size)
    assert strip({'model': state}, num_heads=12, **size).loaded


def test_classifier_is_kept_on_request(strip):
    state = plain_state(num_classes=3)
    content = prefixed(state)
    kept = strip(content, file='x.safetensors', num_classes=3)
    assert torch.equal(kept.model.head.weight, state['head.weight']) and kept.dropped == ()
    without = strip(content)
    assert set(without.dropped) == {'backbone.head.weight', 'backbone.head.bias'}
    assert 'dropped: head (2)\namong these is the classifier, which num_classes=' in str(without)
    with pytest.raises(mte.CheckpointError, match='shape'):
        strip(content, num_classes=5)


def test_swin_with_the_names_of_its_first_release(strip):
    model, state = zoo.build('swin'), {}
    for key, value in model.state_dict().items():  # there, downsampling ends a stage, here it begins the next
        parts = key.split('.')
        if 'downsample' in key:
            parts[1] = str(int(parts[1]) - 1)
        state['.'.join(parts)] = value
    content = {'model': prefixed(state, 'encoder.') | prefixed(copy.deepcopy(state), 'encoder_k.'), 'config': {}}
    report, x = strip(content, zoo.ALL['swin'][0], **zoo.ALL['swin'][1]), zoo.images(model)
    assert torch.equal(report.model(x), model.eval()(x))
    assert report.key == 'model: encoder.' and report.resampled == ()
    assert report.dropped and all(k.startswith('encoder_k') for k in report.dropped)


def test_what_codebases_save_beside_weights_is_no_obstacle(strip, tmp_path, monkeypatch):
    """Settings without their package, metrics, paths, keys that are no names; nor what a script itself allowed."""
    module = types.ModuleType('yacs.config')
    module.CfgNode = type('CfgNode', (dict,), {'__module__': 'yacs.config'})
    config = module.CfgNode(LR=0.1)
    config.__dict__['__immutable__'] = True
    monkeypatch.setitem(sys.modules, 'yacs', types.ModuleType('yacs'))
    monkeypatch.setitem(sys.modules, 'yacs.config', module)
    settings = argparse.Namespace(out=Path('x'), sizes=collections.deque([1]), counts=collections.defaultdict(int, a=1))
    more = {'x': collections.defaultdict(list, b=[1]), 'best': np.float64(0.5), 'array': np.arange(3), 3: {'a': 1}}
    torch.save({'model': plain_state(), 'config': config, 'args': settings, **more}, tmp_path / 'c.pth')
    monkeypatch.undo()
    allowed = [np.float64(0.5).__reduce__()[0], np.dtype, zoo.counts]
    before = torch.serialization.get_safe_globals()
    torch.serialization.add_safe_globals(allowed)
    try:
        assert mte.strip_checkpoint(tmp_path / 'c.pth', NAME, **SIZE).key == 'model'
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
        (('momentum_teacher',), ('student',)),
        (('checkpoint', 'state_dict'), ('checkpoint', 'student')),
    ],
)
@pytest.mark.parametrize('swap', [False, True])
def test_the_network_to_publish_is_taken_whatever_the_order(published, other, swap, strip):
    (bad, good), content = two(), {}
    for keys, state in sorted([(published, good), (other, bad)], reverse=swap, key=lambda x: x[0]):
        entry = content
        for key in keys[:-1]:
            entry = entry.setdefault(key, {})
        entry[keys[-1]] = state
    assert torch.equal(strip(content).model.cls_token, good['cls_token'])
    assert torch.equal(strip(content, key='.'.join(other)).model.cls_token, bad['cls_token'])


@pytest.mark.parametrize('key', ['nets.student', 'nets.student.backbone', 'student.backbone'])
def test_a_key_may_have_dots(key, strip):
    student, teacher = two()
    nets = {'teacher': prefixed(teacher), 'student': prefixed(student)}
    report = strip({'nets': nets} if key.startswith('nets') else nets, key=key)
    assert torch.equal(report.model.cls_token, student['cls_token'])


def wrappers_alone(student, teacher):
    return prefixed(student, 'module.backbone.') | prefixed(teacher)


@pytest.mark.parametrize(
    ('make', 'message'), [(lambda s, t: {'a': s, 'b': t}, 'key=: a, b'), (wrappers_alone, 'two networks')]
)
def test_networks_alike_are_refused(make, message, strip):
    with pytest.raises(mte.CheckpointError, match=message):
        strip(make(*two()))


@pytest.mark.parametrize(('left_out', 'message'), [(1, 'missing'), (10, 'network to publish.*key=')])
def test_an_incomplete_teacher_is_not_replaced_by_the_student(left_out, message, strip):
    student, teacher = two()
    content = dino(student, dict(list(teacher.items())[:-left_out]))
    with pytest.raises(mte.CheckpointError, match=message):
        strip(content)
    assert strip(content, key='student').key == 'student: backbone.'


@pytest.mark.parametrize('name', ['optim_state', 'optimizer_state_dict', 'opt'])
def test_an_optimizers_state_is_no_network(name, strip):
    student, moments = two()
    assert strip({'student': student, name: {'exp_avg': moments}}).key == 'student'


@pytest.mark.parametrize('name', ['convnext', 'resnet', 'swin'])
def test_projection_heads_in_a_classifiers_place_are_left_out(name, strip):
    architecture, kwargs = zoo.ALL[name]
    model = zoo.build(name)
    classifier = model.pretrained_cfg['classifier']
    head = {f'{classifier}.0.weight': torch.randn(8, 8), f'{classifier}.2.bias': torch.randn(8)}
    assert set(strip({'state_dict': model.state_dict() | head}, architecture, **kwargs).dropped) == set(head)


# --- what is no network, or none that can be trusted


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        *((lambda s, d=d: {k: v.to(d) for k, v in s.items()}, f'{d}.*quantized') for d in OTHER_KINDS),
        (lambda s: s | {'norm.weight': s['norm.weight'].to_sparse()}, r'does not load.*norm\.weight'),
        (lambda s: s | {'norm.weight': s['norm.weight'] * torch.tensor(float('nan'))}, 'NaN'),
        (lambda s: {k: v for k, v in s.items() if k != 'blocks.1.mlp.fc2.bias'}, r'missing: blocks\.1\.mlp\.fc2\.bias'),
    ],
)
def test_weights_of_other_kinds_or_incomplete_are_refused(change, message, strip):
    with pytest.raises(mte.CheckpointError, match=message):
        strip({'teacher': change(plain_state())})


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_another_precision_are_taken(dtype, strip):
    state = {k: v.to(dtype) for k, v in plain_state().items()}
    assert torch.equal(strip({'teacher': state}).model.pos_embed.to(dtype), state['pos_embed'])


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
        mte.strip_checkpoint(path, NAME, **SIZE)
    assert not (tmp_path / 'ran').exists()


def test_trust_loads_what_needs_code(strip):
    net = zoo.network()
    content = {'epoch': 1, 'net': nn.ModuleDict({'encoder': net})}
    with pytest.raises(mte.CheckpointError, match=r'ModuleDict.*runs code'):
        strip(content)
    report = strip(content, trust=True)
    assert report.key == 'net: encoder.' and torch.equal(report.model.cls_token, net.cls_token)


@pytest.mark.parametrize('name', ['c.pth', 'c.safetensors'])
@pytest.mark.parametrize('keep', [0, 1, 100, 0.5, 0.99])
def test_truncated_files_are_refused(name, keep, strip, tmp_path):
    strip(plain_state(), file=name)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: keep if isinstance(keep, int) else int(keep * len(content))])
    with pytest.raises(mte.CheckpointError, match='empty' if keep == 0 else r'damaged|truncated'):
        mte.strip_checkpoint(tmp_path / name, NAME, **SIZE)


def test_files_that_are_no_checkpoints_are_refused(strip, tmp_path):
    (tmp_path / 'text.pth').write_text('hello')
    (tmp_path / 'shards').mkdir()
    (tmp_path / 'shards' / '.metadata').touch()
    for name, error, message in (
        ('none.pth', FileNotFoundError, 'no such file'),
        ('.', FileNotFoundError, 'folder'),
        ('shards', mte.CheckpointError, r'torch\.distributed\.checkpoint.*trust=True'),
        ('text.pth', mte.CheckpointError, 'damaged'),
    ):
        with pytest.raises(error, match=message):
            mte.strip_checkpoint(tmp_path / name, NAME, **SIZE)
    for content, message in (([1, 2], 'a list'), ({}, 'no tensors'), ({'epoch': 3}, 'epoch')):
        with pytest.raises(mte.CheckpointError, match=message):
            strip(content)


def test_folder_of_distributed_checkpoint_is_read_on_trust(tmp_path):
    import torch.distributed.checkpoint as dcp

    state = plain_state()
    dcp.save({'model': {'teacher': {f'backbone.{k}': v for k, v in state.items()}}}, checkpoint_id=tmp_path / '9')
    report = mte.strip_checkpoint(tmp_path / '9', NAME, trust=True, **SIZE)
    assert report.key == 'model.teacher: backbone.'
    assert all(torch.equal(v, state[k]) for k, v in report.model.state_dict().items())
    next((tmp_path / '9').glob('*.distcp')).write_bytes(b'')
    with pytest.raises(mte.CheckpointError, match='damaged'):
        mte.strip_checkpoint(tmp_path / '9', NAME, trust=True, **SIZE)


@pytest.mark.parametrize(
    ('name', 'kwargs', 'message'),
    [
        ('resnet10t', {}, 'another architecture'),
        ('vit_small', {}, 'did you mean'),
        (NAME, {'embed_dim': 96}, 'shape'),
        (NAME, {'depth': 3}, 'missing'),
        (NAME, {'key': 'ema'}, r"no key 'ema'.*teacher"),
    ],
)
def test_what_does_not_fit_is_refused(name, kwargs, message, strip):
    with pytest.raises(mte.CheckpointError, match=message):
        strip({'teacher': prefixed(plain_state())}, name, **kwargs)


# --- the command, and the options that the training had


def test_command_writes_a_timm_model(strip, command, tmp_path):
    student, teacher = two()
    strip(dino(student, teacher))
    ran = command('--key', 'teacher')
    assert ran.code == 0 and 'teacher: backbone.' in ran.out and 'dropped' in ran.out and 'create_model' in ran.out
    zoo.needs_local_dir()
    loaded = timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True)
    assert all(torch.equal(v, teacher[k]) for k, v in loaded.state_dict().items())


@pytest.mark.parametrize('prefix', ['', 'module.', 'student.'])
def test_options_of_the_training_are_remembered(prefix, strip, command, tmp_path):
    wrapped = mte.wrap(zoo.network(), n_cls=3, n_pool=2)
    holder = nn.ModuleDict({prefix.rstrip('.'): wrapped}) if prefix else wrapped
    report = strip({'epoch': 3, 'teacher': holder.state_dict()})
    assert report.mte == dataclasses.asdict(wrapped.config)
    assert exported(report, tmp_path)['mte']['n_cls'] == command().config['mte']['n_cls'] == 3
    assert 'mte' not in exported(report.model, tmp_path)


@pytest.mark.parametrize('kwargs', [{'num_heads': 2}, {'act_layer': 'relu'}, {'depth': 1, 'global_pool': 'avg'}])
def test_arguments_that_no_weight_tells_are_remembered(kwargs, strip_as_made, tmp_path):
    model = mte.wrap(NAME, num_classes=0, **{**zoo.VIT, **kwargs})
    x, plain, state = torch.randn(2, 3, 32, 32), mte.strip(model).eval(), model.state_dict()
    folder = mte.save_pretrained(model, tmp_path / 'export')
    for harmless in ({}, {'checkpoint_path': 'x', 'pretrained': True}):
        state._metadata['']['mte']['model_args'] |= harmless
        torch.save({'student': state}, tmp_path / 'c.pth')
        for path in (tmp_path / 'c.pth', folder / 'model.safetensors'):
            report = mte.strip_checkpoint(path, NAME)
            assert torch.equal(report.model(x), plain(x)) and report.mte == dataclasses.asdict(model.config)
    with pytest.raises(mte.CheckpointError):  # what is asked for goes before
        mte.strip_checkpoint(tmp_path / 'c.pth', NAME, embed_dim=96)


@pytest.fixture
def strip_as_made(tmp_path):
    """Without a word on how the model was made."""
    if not hasattr(timm.models, 'get_model_args'):
        pytest.skip('timm remembers arguments since 1.0.31')

    def run(content, name=NAME, key=None, **kwargs):
        torch.save(content, tmp_path / 'c.pth')
        return mte.strip_checkpoint(tmp_path / 'c.pth', name, key, **kwargs)

    return run


def small(**kwargs):
    torch.manual_seed(0)
    return mte.wrap(NAME, num_classes=0, **{**zoo.VIT, **kwargs})


def same(report, model):
    x = torch.randn(2, 3, 32, 32)
    return torch.equal(report.model(x), mte.strip(model).eval()(x))


def bare(state):
    return {k: v.clone() for k, v in state.items()}


def test_a_pooling_that_came_later_is_remembered(strip_as_made):
    model = small()
    model.reset_classifier(0, 'avg')
    assert same(strip_as_made({'model': model.state_dict()}), model)


@pytest.mark.parametrize('name', [f'{NAME}.augreg_in21k', 'vit_tiny_patch16_224_in21k'])
@pytest.mark.filterwarnings('ignore:Mapping deprecated')
def test_a_tag_or_a_former_name_is_the_same_architecture(name, strip_as_made):
    model = small(num_heads=2)
    assert same(strip_as_made({'model': model.state_dict()}, name), model)


def test_another_architecture_than_that_of_training_is_asked_about(strip_as_made):
    model = mte.wrap(NAME, num_classes=0, num_heads=6, img_size=32)
    content, other = {'model': model.state_dict()}, 'deit_tiny_patch16_224'
    with pytest.raises(mte.CheckpointError, match=f'made as {NAME} with num_heads=6: name that'):
        strip_as_made(content, other)
    assert same(strip_as_made(content, other, num_heads=6), model)


@pytest.mark.parametrize('kwargs', [{'act_layer': nn.ReLU}, {'norm_layer': partial(nn.LayerNorm, eps=0.1)}])
def test_arguments_that_no_file_can_say_are_asked_for(kwargs, strip_as_made):
    model = small(**kwargs)
    with pytest.raises(mte.CheckpointError, match=f'was made with {next(iter(kwargs))}.*pass'):
        strip_as_made({'model': model.state_dict()})
    assert same(strip_as_made({'model': model.state_dict()}, **kwargs), model)


def test_each_of_several_networks_has_its_own_arguments(strip_as_made):
    student, teacher, deep = small(num_heads=2), small(num_heads=6), small(depth=3)
    content = {'student': student.state_dict(), 'teacher': teacher.state_dict(), 'deep': deep.state_dict()}
    content['plain'] = plain_state()
    for key, model in (('student', student), ('teacher', teacher), ('deep', deep)):
        assert same(strip_as_made(content, key=key), model)
    average = {'model': student.state_dict(), 'ema': bare(student.state_dict())}  # a copy has lost them
    assert same(strip_as_made(average, key='ema'), student)


def test_it_is_said_where_arguments_are_lost(strip_as_made):
    model = small()
    said = 'arguments of the model: as those of the architecture'
    assert said in str(strip_as_made({'model': bare(model.state_dict())}, **zoo.VIT))
    assert said not in str(strip_as_made({'model': model.state_dict()}))
    assert said not in str(strip_as_made(plain_state(), **zoo.SIZE))


def test_a_key_is_no_beginning_of_another_name(strip):
    student, average = two()
    content = prefixed(student, 'model.') | prefixed(average, 'model_ema.')
    for key, own in (('model', student), ('model_ema', average), ('model_e', average)):
        assert torch.equal(strip(content, key=key).model.cls_token, own['cls_token'])


def test_parameters_that_learn_are_taken_as_tensors_are(strip):
    (state, _), parameters = two(), {}
    for name, value in state.items():
        parameters[name] = nn.Parameter(value)
    assert torch.equal(strip({'model': parameters}).model.cls_token, state['cls_token'])


def exported(report, folder):
    mte.save_pretrained(report, folder / 'exported', model_args=SIZE)
    return zoo.config_of(folder / 'exported')


@pytest.mark.parametrize('said', [None, 3, {'n_cls': -1}, {'n_cls': '# text'}, {'pooling': ['x']}])
def test_nothing_but_options_is_believed_of_a_file(said, strip, tmp_path):
    state = mte.wrap(zoo.network()).state_dict()
    state._metadata['']['mte'] = said
    assert 'mte' not in exported(strip({'teacher': state}), tmp_path)
    state._metadata = {'': {'mte': {'n_cls': 1, 'of a newer version': 2}}}
    assert exported(strip({'teacher': state}), tmp_path)['mte'] == dataclasses.asdict(mte.MTEConfig(n_cls=1))


def test_command_reports_errors_and_writes_nothing(strip, command, tmp_path):
    strip(dino(*two()))
    (tmp_path / 'file').touch()
    for ran in (
        command('--key', 'nothing'),
        command(out='file'),
        command(model='resnet10t', kwargs={}),
        command(kwargs={'num_heads': 7}),
        command('--std', '0', '0', '0'),
        command('--in-chans', '0'),
        command('num_classes=3'),
        command('--img-size', '32', '32', '32'),
    ):
        assert ran.code == 1 and ran.err.startswith('mte-timm: error: ') and ran.config is None
    with pytest.raises(SystemExit):
        command('--model-kwargs', 'depth')
    (tmp_path / 'c.pth').unlink()
    assert command().code == 1
    assert sorted(os.listdir(tmp_path)) == ['file']


def test_command_tells_models_of_any_size_of_their_images_size(strip, command):
    architecture, kwargs = zoo.ALL['resnet']
    strip({'model': zoo.build('resnet').state_dict()}, architecture, **kwargs)
    ran = command('--img-size', '96', '64', model=architecture, kwargs=kwargs)
    assert ran.code == 0 and ran.config['pretrained_cfg']['input_size'] == [3, 96, 64]
