"""Exports are plain timm: the same object, the same features to the bit, nothing half-written, no training lost."""

import os
import re
import tempfile
import warnings
from pathlib import Path

import pytest
import timm
import torch
import zoo
from torch import nn
from zoo import config_of

import mte_timm as mte
from mte_timm.cli import main
from mte_timm.publish.export import check_export

NO_SPACE = OSError(28, 'No space left on device')


def load(folder, **kwargs):
    zoo.needs_local_dir()
    return timm.create_model(f'local-dir:{folder}', pretrained=True, **kwargs).eval()


def save(model, folder, name='plain', **kwargs):
    """With the arguments that timm before 1.0.31 doesn't remember."""
    return mte.save_pretrained(model, folder, **{'model_args': zoo.ALL[name][1], **kwargs})


@pytest.fixture
def small():
    return mte.wrap(zoo.build('plain'))


@pytest.fixture
def folder(small, tmp_path):
    return save(small, tmp_path / 'x')


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.mark.parametrize('name', zoo.ALL)
def test_export_gives_the_same_features_bit_for_bit(name, tmp_path):
    wrapped = mte.wrap(zoo.build(name, num_classes=3), **zoo.counts(name)).eval()
    folder, x = save(wrapped, tmp_path / 'export', name), zoo.images(wrapped.backbone)
    assert torch.equal(load(folder)(x), wrapped(x).output)
    assert sorted(os.listdir(folder)) == ['config.json', 'model.safetensors'] and os.listdir(tmp_path) == ['export']
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1  # who can read one can read both


@pytest.mark.parametrize('name', ['plain', 'convnext'])
def test_channels_last_and_compiled_parts_are_exported(name, tmp_path):
    model = zoo.build(name).to(memory_format=torch.channels_last)
    parts = model.blocks if name == 'plain' else model.stages
    for i, part in enumerate(parts):
        parts[i] = torch.compile(part, backend='eager')
    wrapped, x = mte.wrap(model, **zoo.counts(name)).eval(), zoo.images(model)
    exported = load(save(wrapped, tmp_path / 'x', name))
    torch.testing.assert_close(exported(x), wrapped(x).output, rtol=1e-5, atol=1e-5)
    assert not any('_orig_mod' in k for k in exported.state_dict())


def test_strip_finds_the_model_inside_wrappers(small):
    model = small.backbone
    for outer in (small, nn.DataParallel(small), torch.compile(small), torch.compile(nn.DataParallel(small))):
        assert mte.strip(outer) is model
    for ema in (timm.utils.ModelEmaV3(small), timm.utils.ModelEma(small)):
        assert torch.equal(mte.strip(ema).cls_token, model.cls_token)
    for other in (model, nn.Linear(2, 2), None):
        with pytest.raises(TypeError, match=r'mte\.wrap'):
            mte.strip(other)


def test_config_is_true_of_this_model(tmp_path):
    wrapped = mte.wrap(zoo.build('plain', num_classes=3, in_chans=1))
    folder = save(wrapped, tmp_path / 'x', mean=[0.25], std=[0.5], model_args=zoo.VIT | {'in_chans': 1})
    config = config_of(folder)
    cfg = config['pretrained_cfg']
    assert config['num_classes'] == 3 and config['architecture'] == 'vit_tiny_patch16_224'
    assert cfg['mean'] == [0.25] and cfg['std'] == [0.5] and cfg['tag'] == 'mte'
    assert not {'url', 'hf_hub_id', 'license', 'origin_url', 'file'} & set(cfg)
    data = timm.data.resolve_data_config({}, model=load(folder))
    assert data['input_size'] == (1, 32, 32) and tuple(data['mean']) == (0.25,)


@pytest.mark.parametrize('name', ['plain', 'resnet'])
def test_image_size_in_the_config_is_the_models_or_the_users(name, tmp_path):
    dynamic = {'dynamic_img_size': True, 'img_size': 48} if name == 'plain' else {}
    wrapped = mte.wrap(zoo.build(name, **dynamic), **zoo.counts(name))
    own = (48, 48) if name == 'plain' else wrapped.backbone.pretrained_cfg['input_size'][1:]
    for size, expected in ((None, own), (64, (64, 64)), ((96, 64), (96, 64))):
        saved = save(wrapped, tmp_path / 'x', img_size=size, model_args={**zoo.ALL[name][1], **dynamic})
        cfg = config_of(saved)['pretrained_cfg']
        assert cfg['input_size'] == [3, *expected] and 'test_input_size' not in cfg


def test_the_export_can_be_trained_on_and_adapted(folder):
    assert load(folder, num_classes=7)(torch.randn(1, 3, 32, 32)).shape == (1, 7)
    assert load(folder, img_size=64)(torch.randn(1, 3, 64, 64)).shape == (1, 48)
    assert mte.wrap(f'local-dir:{folder}', pretrained=True)(torch.randn(1, 3, 32, 32)).aux.shape == (1, 48)


def test_plain_models_can_be_saved(tmp_path):
    model = zoo.build('plain')
    for kind, plain in (('x', model), ('y', torch.compile(model))):
        assert 'mte' not in config_of(save(plain, tmp_path / kind))
    assert 'Multi-Token' not in mte.model_card(model, 'me/x')
    with pytest.raises(TypeError, match=r'mte\.wrap'):
        mte.save_pretrained(nn.Linear(2, 2), tmp_path / 'z')


def test_saving_changes_no_random_numbers(small, tmp_path):
    before = torch.get_rng_state()
    check_export(save(small, tmp_path / 'x'))
    assert torch.equal(torch.get_rng_state(), before)


# --- what was there


@pytest.mark.parametrize('name', ['plain', 'eva02'])
def test_saving_again_replaces_the_export_and_keeps_other_files(name, folder):
    (folder / 'README.md').write_text('mine')
    second = mte.wrap(zoo.build(name))
    save(second, folder, name)
    assert sorted(os.listdir(folder)) == ['README.md', 'config.json', 'model.safetensors']
    assert (folder / 'README.md').read_text() == 'mine'
    assert torch.equal(load(folder).cls_token, second.backbone.cls_token)


@pytest.mark.filterwarnings('ignore:nothing was exported')
@pytest.mark.parametrize(('name', 'operations'), [('plain', 1), ('eva02', 4)])
def test_a_save_that_fails_while_it_replaces_leaves_what_was_there(name, operations, folder, monkeypatch):
    before, replace = contents(folder), os.replace
    for failing in range(operations + 1):
        count = iter(range(100))

        def fails_once(source, target, failing=failing, count=count):
            if next(count) == failing:
                raise NO_SPACE
            replace(source, target)

        monkeypatch.setattr(os, 'replace', fails_once)
        if failing < operations:
            with pytest.raises(OSError, match='No space'):
                save(mte.wrap(zoo.build(name)), folder, name)
            assert contents(folder) == before
    save(mte.wrap(zoo.build(name)), folder, name)
    assert contents(folder) != before


# --- what is refused


def shorter(model):
    model.blocks = model.blocks[:1]


def other_heads(model):
    for block in model.blocks:
        block.attn.num_heads, block.attn.head_dim = 6, 8


def other_activation(model):
    for block in model.blocks:
        block.mlp.fc1.weight.data *= 20  # as after training
        block.mlp.act = torch.nn.GELU('tanh')


def diverged(model):
    model.norm.weight.data[0] = float('nan')


def of_no_factory(model):
    model.pretrained_cfg = None


@pytest.mark.filterwarnings('ignore:nothing was exported')
@pytest.mark.parametrize(
    ('change', 'error', 'message'),
    [
        (shorter, ValueError, 'cannot rebuild.*model_args'),
        (other_heads, ValueError, 'other features.*model_args'),
        (other_activation, ValueError, 'other features'),
        (diverged, ValueError, r'norm\.weight hold NaN'),
        (of_no_factory, TypeError, r'timm\.create_model'),
    ],
)
def test_a_model_that_timm_would_not_rebuild_is_refused(change, error, message, small, tmp_path):
    change(small.backbone)
    with pytest.raises(error, match=message):
        save(small, tmp_path / 'new' / 'x')
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ('name', 'value'),
    [
        ('mean', [0.5]),
        ('mean', 0.5),
        ('mean', [0.5, 0.5, float('nan')]),
        ('std', [0.5, 0.0, 0.5]),
        ('img_size', (1, 2, 3)),
        ('img_size', 64),  # of 32
    ],
)
def test_wrong_arguments_are_refused_by_name(name, value, tmp_path):
    with warnings.catch_warnings(), pytest.raises(ValueError, match=f'^{name}='):
        warnings.simplefilter('error')  # nothing is kept of a model that was not wrapped
        save(zoo.build('plain'), tmp_path / 'x', **{name: value})
    assert not any(tmp_path.iterdir())


@pytest.mark.filterwarnings('ignore:nothing was exported')
@pytest.mark.parametrize(('path', 'what'), [('file', 'is a file'), ('file/x', 'file is a file'), ('link', 'link')])
def test_a_folder_that_cannot_be_is_named(path, what, small, tmp_path):
    (tmp_path / 'file').touch()
    (tmp_path / 'link').symlink_to('nowhere')
    with pytest.raises(OSError, match=what):
        save(small, tmp_path / path)
    assert (tmp_path / 'file').read_bytes() == b''


def test_shards_are_refused_with_the_way_to_gather_them(small, tmp_path):
    fsdp = pytest.importorskip('torch.distributed.fsdp')
    if not hasattr(fsdp, 'fully_shard'):
        pytest.skip(f'torch {torch.__version__} has no FSDP2')
    import torch.distributed as dist

    dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)
    try:
        fsdp.fully_shard(small, mesh=dist.init_device_mesh('cpu', (1,)))
        with pytest.raises(ValueError, match=r'sharded over processes.*get_model_state_dict'):
            save(small, tmp_path / 'x')
    finally:
        dist.destroy_process_group()
    assert not any(tmp_path.iterdir())


def test_an_export_that_timm_cannot_load_is_not_pushed(folder, tmp_path):
    other = save(mte.wrap(zoo.build('eva02')), tmp_path / 'y', 'eva02')
    check_export(folder)
    os.replace(other / 'model.safetensors', folder / 'model.safetensors')
    for broken, message in ((folder, 'cannot load it'), (other, 'cannot load it'), (tmp_path, 'config.json')):
        with pytest.raises(ValueError, match=message):
            check_export(broken)
    model = zoo.build('plain')
    model.cls_token.data.fill_(float('nan'))
    timm.models.save_for_hf(model, str(tmp_path), model_args=zoo.VIT, safe_serialization=True)
    with pytest.raises(ValueError, match='cls_token hold NaN'):
        check_export(tmp_path)


# --- the end of a training


@pytest.mark.parametrize(
    ('folder', 'options'),
    [
        ('export', {'model_args': {'depth': 7}}),
        ('export', {'mean': [0.5]}),
        ('no timm model', {}),
        ('file', {}),
        (None, {}),
        ('file/x', {}),
    ],
)
def test_trained_weights_are_kept_where_an_export_fails(folder, options, tmp_path, monkeypatch):
    """In a new file each time, which mte-timm strip exports."""
    monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path))
    (tmp_path / 'file').touch()
    plain = zoo.build('plain')
    if folder == 'no timm model':
        plain.pretrained_cfg = {}
    wrapped, files = mte.wrap(plain, n_cls=3), []
    monkeypatch.chdir(tmp_path)  # where a folder without a path would be
    for _ in range(2):
        with (
            pytest.warns(UserWarning, match='trained weights are in') as said,
            pytest.raises((OSError, TypeError, ValueError)),
        ):
            save(wrapped, folder and tmp_path / folder, **options)
        files.append(re.search(r'weights are in (.+\.pth)', str(said[-1].message))[1])
    assert len(set(files)) == 2 and {Path(f).resolve() for f in files} == set(tmp_path.glob('*.pth'))
    arguments = ['--model', 'vit_tiny_patch16_224', '--model-kwargs', *(f'{k}={v}' for k, v in zoo.VIT.items())]
    assert main(['strip', files[0], '-o', str(tmp_path / 'saved'), *arguments]) == 0
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(load(tmp_path / 'saved')(x), plain.eval()(x))
    assert config_of(tmp_path / 'saved')['mte']['n_cls'] == 3


def test_where_nothing_can_be_kept_it_is_said_and_nothing_is_left(small, tmp_path, monkeypatch):
    def full(state, file):
        file.write(b'half')
        raise NO_SPACE

    monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path))
    monkeypatch.setattr(torch, 'save', full)
    with pytest.raises(ValueError, match='mean'), pytest.warns(UserWarning, match=r'not be saved: torch\.save'):
        save(small, tmp_path / 'x', mean=[0.5])
    assert not any(tmp_path.iterdir())
