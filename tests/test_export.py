"""Exports are plain timm: the same object, the same features to the bit, nothing half-written."""

import json
import os
import re
import shlex
import shutil
import tempfile
import warnings
from pathlib import Path

import pytest
import timm
import torch
import zoo
from torch import nn

import mte_timm as mte
from mte_timm.backbones import input_size
from mte_timm.cli import main
from mte_timm.publish.export import check_export


def load(folder, **kwargs):
    zoo.needs_local_dir()
    return timm.create_model(f'local-dir:{folder}', pretrained=True, **kwargs).eval()


def arguments(name):
    """What timm before 1.0.31 doesn't remember by itself."""
    return {'model_args': zoo.ALL[name][1]}


@pytest.mark.parametrize('name', [name for name in zoo.ALL if name != 'coat_lite'])
def test_export_gives_the_same_features_bit_for_bit(name, tmp_path):
    wrapped = mte.wrap(zoo.build(name, num_classes=3), **zoo.counts(name)).eval()
    folder = mte.save_pretrained(wrapped, tmp_path / 'export', **arguments(name))
    x = zoo.images(wrapped.backbone)
    assert torch.equal(load(folder)(x), wrapped(x).output)
    assert sorted(os.listdir(folder)) == ['config.json', 'model.safetensors']
    assert os.listdir(tmp_path) == ['export']


def test_shared_parameters_cannot_be_exported_by_timm(tmp_path):
    with pytest.raises(ValueError, match='two places'), pytest.warns(UserWarning, match='kept in'):
        mte.save_pretrained(mte.wrap(zoo.build('coat_lite'), n_cls=0), tmp_path / 'x')
    assert os.listdir(tmp_path) == ['x-not-exported.pth']


def test_strip_finds_the_model_inside_wrappers():
    model = zoo.build('plain')
    wrapped = mte.wrap(model)
    assert mte.strip(wrapped) is model
    assert mte.strip(nn.DataParallel(wrapped)) is model
    assert mte.strip(torch.compile(wrapped)) is model
    for ema in (timm.utils.ModelEmaV3(wrapped), timm.utils.ModelEma(wrapped)):
        assert torch.equal(mte.strip(ema).cls_token, model.cls_token)
    for other in (model, nn.Linear(2, 2), None):
        with pytest.raises(TypeError, match=r'mte\.wrap'):
            mte.strip(other)


def test_config_is_true_of_this_model(tmp_path):
    wrapped = mte.wrap(zoo.build('plain', num_classes=3, in_chans=1))
    folder = mte.save_pretrained(
        wrapped, tmp_path / 'export', mean=[0.25], std=[0.5], model_args=zoo.VIT | {'in_chans': 1}
    )
    config = json.loads((folder / 'config.json').read_text())
    cfg = config['pretrained_cfg']
    assert config['num_classes'] == 3 and config['architecture'] == 'vit_tiny_patch16_224'
    assert cfg['mean'] == [0.25] and cfg['std'] == [0.5] and cfg['tag'] == 'mte'
    assert not {'url', 'hf_hub_id', 'license', 'origin_url', 'file'} & set(cfg)
    data = timm.data.resolve_data_config({}, model=load(folder))
    assert data['input_size'] == (1, 32, 32) and tuple(data['mean']) == (0.25,)


def test_the_export_can_be_trained_on_and_adapted(tmp_path):
    folder = mte.save_pretrained(mte.wrap(zoo.build('plain')), tmp_path / 'x', **arguments('plain'))
    assert load(folder, num_classes=7)(torch.randn(1, 3, 32, 32)).shape == (1, 7)
    assert load(folder, img_size=64)(torch.randn(1, 3, 64, 64)).shape == (1, 48)
    assert mte.wrap(f'local-dir:{folder}', pretrained=True)(torch.randn(1, 3, 32, 32)).aux.shape == (1, 48)


def test_saving_again_replaces_the_export_and_keeps_other_files(tmp_path):
    folder = tmp_path / 'x'
    mte.save_pretrained(mte.wrap(zoo.build('plain')), folder, **arguments('plain'))
    (folder / 'README.md').write_text('mine')
    second = mte.wrap(zoo.build('eva02'))
    mte.save_pretrained(second, folder, **arguments('eva02'))
    assert (folder / 'README.md').read_text() == 'mine'
    assert torch.equal(load(folder).cls_token, second.backbone.cls_token)


def test_plain_models_can_be_saved(tmp_path):
    model = zoo.build('plain')
    for kind, plain in (('x', model), ('y', torch.compile(model))):
        folder = mte.save_pretrained(plain, tmp_path / kind, **arguments('plain'))
        assert 'mte' not in (folder / 'config.json').read_text()
    assert 'Multi-Token' not in mte.model_card(model, 'me/x')
    with pytest.raises(TypeError, match=r'mte\.wrap'):
        mte.save_pretrained(nn.Linear(2, 2), tmp_path / 'z')


def test_a_model_that_timm_would_not_rebuild_is_refused(tmp_path):
    model = zoo.build('plain')
    model.blocks = model.blocks[:1]
    with pytest.raises(ValueError, match='model_args'), pytest.warns(UserWarning, match='kept in'):
        mte.save_pretrained(mte.wrap(model), tmp_path / 'x', **arguments('plain'))
    assert os.listdir(tmp_path) == ['x-not-exported.pth']


def test_the_same_weights_with_other_heads_are_refused(tmp_path):
    model = timm.models.VisionTransformer(num_classes=0, **{**zoo.VIT, 'num_heads': 6})
    model.pretrained_cfg = zoo.build('plain').pretrained_cfg
    with pytest.raises(ValueError, match='other features'):
        mte.save_pretrained(mte.wrap(model), tmp_path / 'x', model_args=zoo.VIT)
    model.pretrained_cfg = None
    with pytest.raises(TypeError, match='create_model'):
        mte.save_pretrained(mte.wrap(model), tmp_path / 'x')


@pytest.mark.parametrize('name', ['plain', 'resnet'])
def test_image_size_in_the_config_is_the_models_or_the_users(name, tmp_path):
    dynamic = {'dynamic_img_size': True, 'img_size': 48} if name == 'plain' else {}
    wrapped = mte.wrap(zoo.build(name, **dynamic), **zoo.counts(name))
    own = (48, 48) if name == 'plain' else wrapped.backbone.pretrained_cfg['input_size'][1:]
    for size, expected in ((None, own), (64, (64, 64)), ((96, 64), (96, 64))):
        args = {'model_args': {**zoo.ALL[name][1], **dynamic}}
        folder = mte.save_pretrained(wrapped, tmp_path / 'x', img_size=size, **args)
        cfg = json.loads((folder / 'config.json').read_text())['pretrained_cfg']
        assert cfg['input_size'] == [3, *expected] and 'test_input_size' not in cfg
    with pytest.raises(ValueError, match='img_size'):
        mte.save_pretrained(wrapped, tmp_path / 'x', img_size=(1, 2, 3))


@pytest.mark.filterwarnings('ignore:nothing was exported')
def test_an_export_fails_whole_or_not_at_all(tmp_path, monkeypatch):
    folder = mte.save_pretrained(mte.wrap(zoo.build('plain')), tmp_path / 'x', **arguments('plain'))
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    replace = os.replace

    def fails_at_the_config(source, target):
        if Path(target) == folder / 'config.json' and 'previous' not in str(source):
            raise OSError(28, 'No space left on device')
        replace(source, target)

    monkeypatch.setattr(os, 'replace', fails_at_the_config)
    with pytest.raises(OSError, match='No space'):
        mte.save_pretrained(mte.wrap(zoo.build('eva02')), folder, **arguments('eva02'))
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    with pytest.raises(ValueError, match='mean'):
        mte.save_pretrained(mte.wrap(zoo.build('plain')), tmp_path / 'a' / 'b', mean=[1.0])
    assert sorted(os.listdir(tmp_path)) == ['a', 'x', 'x-not-exported.pth']
    assert os.listdir(tmp_path / 'a') == ['b-not-exported.pth']


@pytest.mark.filterwarnings('ignore:nothing was exported')
def test_wrong_statistics_are_refused(tmp_path):
    wrapped = mte.wrap(zoo.build('plain'))
    for bad in ({'mean': [0.5]}, {'mean': 0.5}, {'mean': [0.5, 0.5, float('nan')]}, {'std': [0.5, 0.0, 0.5]}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            mte.save_pretrained(wrapped, tmp_path / 'x', **bad, **arguments('plain'))
    assert os.listdir(tmp_path) == ['x-not-exported.pth']


@pytest.mark.filterwarnings('ignore:nothing was exported')
def test_a_folder_that_cannot_be_is_named(tmp_path):
    wrapped = mte.wrap(zoo.build('plain'))
    (tmp_path / 'file').touch()
    (tmp_path / 'link').symlink_to('nowhere')
    for path, what in (('file', 'file is a file'), ('file/x', 'file is a file'), ('link', 'link is a link to nothing')):
        with pytest.raises(NotADirectoryError, match=rf'directory=.*{what}; name a folder'):
            mte.save_pretrained(wrapped, tmp_path / path, **arguments('plain'))


@pytest.mark.filterwarnings('ignore:nothing was exported')
def test_unwritable_targets_leave_what_was_there(tmp_path, monkeypatch):
    wrapped = mte.wrap(zoo.build('plain'))
    (tmp_path / 'file').write_text('')
    with pytest.raises(NotADirectoryError, match='file'):
        mte.save_pretrained(wrapped, tmp_path / 'file', **arguments('plain'))
    folder = mte.save_pretrained(wrapped, tmp_path / 'x', **arguments('plain'))
    before = {p.name: p.read_bytes() for p in folder.iterdir()}

    def full(*args, **kwargs):
        Path(args[1], 'model.safetensors').write_bytes(b'half')
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(timm.models, 'save_for_hf', full)
    for target in (folder, tmp_path / 'y'):
        with pytest.raises(OSError, match='No space'):
            mte.save_pretrained(wrapped, target)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    kept = [f'{name}-not-exported.pth' for name in ('file', 'x', 'y')]
    assert sorted(os.listdir(tmp_path)) == sorted(['file', 'x', *kept])


@pytest.mark.parametrize('fault', ['model_args', 'mean', 'no timm model', 'folder'])
def test_trained_weights_are_kept_where_an_export_fails(fault, tmp_path):
    plain = zoo.build('plain')
    folder, options = tmp_path / 'out' / 'export', {'model_args': zoo.VIT}
    if fault == 'model_args':
        options = {'model_args': {'depth': 7}}
    elif fault == 'mean':
        options['mean'] = [0.5]
    elif fault == 'no timm model':
        plain.pretrained_cfg = {}
    else:
        folder = tmp_path / 'file' / 'export'
        (tmp_path / 'file').write_text('')
    with (
        pytest.warns(UserWarning, match='trained weights are kept') as said,
        pytest.raises((OSError, TypeError, ValueError)),
    ):
        mte.save_pretrained(mte.wrap(plain), folder, **options)
    words = shlex.split(re.search(r'`(mte-timm strip .+?)`', str(said[-1].message))[1])
    path = words[2]
    state = torch.load(path, weights_only=True)
    assert all(torch.equal(state[k], v) for k, v in plain.state_dict().items())
    if fault == 'folder':
        shutil.rmtree(Path(path).parent)
    else:
        assert [p.name for p in folder.parent.iterdir()] == ['export-not-exported.pth']


@pytest.mark.skipif(zoo.timm_before(1, 0, 31), reason='an older timm forgets what a model was made with')
@pytest.mark.parametrize(
    ('name', 'kwargs'),
    [
        ('plain', {'num_classes': 5}),
        ('plain', {'img_size': 64, 'num_heads': 6, 'qk_norm': True, 'in_chans': 1}),
        ('plain', {'img_size': (64, 32), 'global_pool': 'avg', 'drop_path_rate': 0.1}),
        ('convnext', {'num_classes': 3}),
        ('swin', {}),
    ],
)
def test_the_command_of_the_warning_exports_the_model(name, kwargs, tmp_path):
    model = zoo.build(name, **{'num_classes': 0, **kwargs}).eval()
    folder = tmp_path / 'a folder' / 'export'
    with pytest.warns(UserWarning, match='kept in') as said, pytest.raises(ValueError, match='mean'):
        mte.save_pretrained(mte.wrap(model, **zoo.counts(name)), folder, mean=[0.5] * 7)
    [command] = [str(w.message) for w in said if 'kept in' in str(w.message)]
    assert main(shlex.split(re.search(r'`(.+)`', command)[1])[1:]) == 0
    x = torch.randn(2, *input_size(model))
    assert torch.equal(load(folder)(x), model(x))


@pytest.mark.parametrize(('name', 'kwargs'), [('convnext', {}), ('plain', {'img_size': 64, 'dynamic_img_size': True})])
def test_the_command_of_the_warning_says_all_that_was_asked_for(name, kwargs, tmp_path):
    model = zoo.build(name, **{'num_classes': 0, **kwargs}).eval()
    folder = tmp_path / 'taken'
    folder.touch()
    asked = {'mean': torch.tensor([0.1, 0.2, 0.3]), 'std': (0.4, 0.5, 0.6), 'img_size': (96, 32)}
    wrapped = mte.wrap(model, **zoo.counts(name))
    args = {**zoo.ALL[name][1], **kwargs, 'num_classes': 0}
    with pytest.warns(UserWarning, match='kept in') as said, pytest.raises(NotADirectoryError):
        mte.save_pretrained(wrapped, folder, **asked, model_args=args)
    folder.unlink()
    [command] = [str(w.message) for w in said if 'kept in' in str(w.message)]
    assert main(shlex.split(re.search(r'`(.+)`', command)[1])[1:]) == 0
    whole = mte.save_pretrained(wrapped, tmp_path / 'whole', **asked, model_args=args)
    configs = [json.loads((f / 'config.json').read_text()) for f in (folder, whole)]
    for said in ('pretrained_cfg', 'mte', 'num_classes', 'architecture'):
        assert configs[0][said] == configs[1][said]
    x = torch.randn(2, *input_size(model))
    assert torch.equal(load(folder)(x), model(x))


def test_kept_weights_stay_when_the_next_export_fails_too(tmp_path):
    wrapped = [mte.wrap(zoo.build('plain')) for _ in range(2)]
    for each in wrapped:
        with pytest.warns(UserWarning, match='kept in'), pytest.raises(ValueError, match='mean'):
            mte.save_pretrained(each, tmp_path / 'same', mean=[1.0])
    kept = [tmp_path / f'same-not-exported{n}.pth' for n in ('', '-2')]
    for each, path in zip(wrapped, kept, strict=True):
        assert torch.equal(torch.load(path, weights_only=True)['cls_token'], each.backbone.cls_token)


def test_weights_are_kept_without_a_folder_too(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path))
    with pytest.warns(UserWarning, match='weights-not-exported.pth'), pytest.raises(TypeError, match='directory=None'):
        mte.save_pretrained(mte.wrap(zoo.build('plain')), None)
    assert list(tmp_path.rglob('*.pth'))


@pytest.mark.skipif(zoo.timm_before(1, 0, 31), reason='an older timm does not remember what a model was made with')
def test_the_command_of_the_warning_leaves_out_wrong_arguments(tmp_path):
    model = timm.create_model('test_vit', img_size=64, num_classes=0).eval()
    with pytest.warns(UserWarning, match='kept in') as said, pytest.raises(ValueError, match='img_size'):
        mte.save_pretrained(mte.wrap(model), tmp_path / 'x', model_args={'img_size': 96, 'foo': 3})
    [command] = [str(w.message) for w in said if 'kept in' in str(w.message)]
    assert main(shlex.split(re.search(r'`(.+)`', command)[1])[1:]) == 0
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(load(tmp_path / 'x')(x), model(x))


def test_nothing_is_kept_of_a_model_that_was_not_wrapped(tmp_path):
    with warnings.catch_warnings(), pytest.raises(ValueError, match='mean'):
        warnings.simplefilter('error')
        mte.save_pretrained(zoo.build('plain'), tmp_path / 'export', mean=[0.5])
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize('name', ['plain', 'convnext'])
def test_channels_last_and_compiled_parts_are_exported(name, tmp_path):
    model = zoo.build(name).to(memory_format=torch.channels_last)
    parts = model.blocks if name == 'plain' else model.stages
    for i, part in enumerate(parts):
        parts[i] = torch.compile(part, backend='eager')
    wrapped = mte.wrap(model, **zoo.counts(name)).eval()
    folder = mte.save_pretrained(wrapped, tmp_path / 'x', **arguments(name))
    x = zoo.images(model)
    torch.testing.assert_close(load(folder)(x), wrapped(x).output, rtol=1e-5, atol=1e-5)
    assert not any('_orig_mod' in k for k in load(folder).state_dict())


def test_saving_changes_no_random_numbers(tmp_path):
    wrapped = mte.wrap(zoo.build('plain'))
    before = torch.get_rng_state()
    check_export(mte.save_pretrained(wrapped, tmp_path / 'x', **arguments('plain')))
    assert torch.equal(torch.get_rng_state(), before)


def test_both_files_can_be_read_by_the_same_people(tmp_path):
    folder = mte.save_pretrained(mte.wrap(zoo.build('plain')), tmp_path / 'x', **arguments('plain'))
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1


def test_a_diverged_model_is_refused_and_kept(tmp_path):
    wrapped = mte.wrap(zoo.build('plain'))
    wrapped.backbone.norm.weight.data[0] = float('nan')
    with pytest.raises(ValueError, match=r'norm\.weight hold NaN'), pytest.warns(UserWarning, match='kept in'):
        mte.save_pretrained(wrapped, tmp_path / 'x', **arguments('plain'))


def test_where_nothing_can_be_kept_it_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, 'save', lambda *args: (_ for _ in ()).throw(OSError(28, 'No space left on device')))
    with pytest.raises(ValueError, match='mean'), pytest.warns(UserWarning, match='could not be kept'):
        mte.save_pretrained(mte.wrap(zoo.build('plain')), tmp_path / 'x', mean=[0.5])


@pytest.mark.parametrize('key', ['num_heads', 'mean', 'n_pool', 'architecture'])
def test_a_changed_config_is_not_pushed(key, tmp_path):
    folder = mte.save_pretrained(mte.wrap(zoo.build('plain')), tmp_path / 'x', model_args=zoo.VIT)
    check_export(folder)
    path = folder / 'config.json'
    config = json.loads(path.read_text())
    owner = {'num_heads': config['model_args'], 'mean': config['pretrained_cfg'], 'n_pool': config['mte']}.get(
        key, config
    )
    owner[key] = {'num_heads': 1, 'mean': [0.4] * 3, 'n_pool': 5, 'architecture': 'vit_small_patch16_224'}[key]
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r'config\.json has changed'):
        check_export(folder)
    if key == 'mean':  # as its message says
        del config['sha256_of_config']
        path.write_text(json.dumps(config))
        check_export(folder)


def test_an_export_that_holds_nan_is_not_pushed(tmp_path):
    model = zoo.build('plain')
    model.cls_token.data.fill_(float('nan'))
    timm.models.save_for_hf(model, str(tmp_path), model_args=zoo.VIT, safe_serialization=True)  # without checksums
    with pytest.raises(ValueError, match='cls_token hold NaN'):
        check_export(tmp_path)


def test_shards_are_refused_with_the_way_to_gather_them(tmp_path):
    fsdp = pytest.importorskip('torch.distributed.fsdp')
    if not hasattr(fsdp, 'fully_shard'):
        pytest.skip(f'torch {torch.__version__} has no FSDP2')
    import torch.distributed as dist

    dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)
    try:
        wrapped = mte.wrap(zoo.build('plain'))
        fsdp.fully_shard(wrapped, mesh=dist.init_device_mesh('cpu', (1,)))
        with pytest.raises(ValueError, match=r'sharded over processes.*get_model_state_dict'):
            mte.save_pretrained(wrapped, tmp_path / 'x', **arguments('plain'))
    finally:
        dist.destroy_process_group()
    assert not any(tmp_path.iterdir())
