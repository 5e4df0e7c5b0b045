"""What the patches tell: --help of a patched script, apply.py; and the part that timm's train.py calls."""

import dataclasses
import re
import shutil
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

import mte_timm as mte
from mte_timm.integrations import timm_train

PATCHES = Path(__file__).parents[1] / 'patches'
NAMES = sorted(path.stem for path in PATCHES.glob('*.patch') if '--mte' in path.read_text())  # others have config keys


@pytest.mark.parametrize('name', NAMES)
def test_help_of_a_patched_script_lists_every_option_with_its_default(name):
    added = re.findall(r'^\+ *(?:help=)?(.*)', (PATCHES / f'{name}.patch').read_text(), re.MULTILINE)
    text = ''.join(re.findall("'(.*)'", ' '.join(line for line in added if '=true' in line)))
    listed = dict(re.findall(r'(\w+)=([\w.]+)', text))
    expected = {f.name: str(f.default).lower() for f in dataclasses.fields(mte.MTEConfig)}
    assert listed == {**expected, 'weight': '1.0'}


@pytest.fixture
def made(tmp_path):
    """apply.py with a patch of its own, and a repository that it fits."""
    folder = tmp_path / 'clone'
    folder.mkdir()
    for command in ('init -q', 'config user.name a', 'config user.email a'):
        subprocess.run(['git', *command.split()], cwd=folder, check=True)
    (folder / 'main.py').write_text('one\n')
    subprocess.run('git add -A && git commit -qm a', shell=True, cwd=folder, check=True)
    (folder / 'main.py').write_text('one\n+two\nthree\n')
    patch = subprocess.run(['git', 'diff', '-U0', '--full-index'], cwd=folder, check=True, capture_output=True).stdout
    (tmp_path / 'dino.patch').write_bytes(patch)
    subprocess.run(['git', 'checkout', '-q', '.'], cwd=folder, check=True)
    shutil.copy(PATCHES / 'apply.py', tmp_path)
    return folder


def apply(folder):
    return subprocess.run([sys.executable, folder.parent / 'apply.py', 'dino', folder], capture_output=True, text=True)


def test_apply_says_what_it_did_and_that_it_is_done_already(made):
    first = apply(made)
    assert first.returncode == 0 and f'added 2 lines to main.py in {made}' in first.stdout
    second = apply(made)
    assert second.returncode == 0 and 'is already applied' in second.stdout
    assert (made / 'main.py').read_text() == 'one\n+two\nthree\n'


def test_apply_leaves_another_file_alone(made):
    (made / 'main.py').write_text('another\n')
    done = apply(made)
    commit = re.search(r"'dino': '\S+ at (\w+)'", (PATCHES / 'apply.py').read_text())[1]
    assert done.returncode == 1 and 'main.py' in done.stderr and commit in done.stderr
    assert 'Nothing was changed' in done.stderr
    assert (made / 'main.py').read_text() == 'another\n'


def test_apply_says_what_is_wrong(tmp_path):
    def apply(*args):
        done = subprocess.run([sys.executable, PATCHES / 'apply.py', *args], capture_output=True, text=True)
        assert done.returncode == 1
        return done.stderr

    assert 'no such patch; there are dino' in apply('simclr', str(tmp_path))
    assert 'no such folder; clone facebookresearch/dino' in apply('dino', str(tmp_path / 'none'))
    assert 'main_dino.py' in apply('dino', str(tmp_path)) and not list(tmp_path.iterdir())


def test_apply_works_inside_another_repository(made):
    shutil.rmtree(made / '.git')
    subprocess.run(['git', 'init', '-q'], cwd=made.parent, check=True)
    assert apply(made).returncode == 0
    assert (made / 'main.py').read_text() == 'one\n+two\nthree\n'


def arguments(**given):
    return Namespace(**{'mte': [''], 'head_init_scale': None, 'head_init_bias': None} | given)


def test_timm_train_wraps_any_model_and_its_loss():
    for name, count in (('test_vit', 10), ('test_convnext', 6)):
        args = arguments(mte=['', 'weight=0.5'])
        model = timm_train.add_mte(timm.create_model(name, num_classes=5), args)
        assert len(model.aux.heads) == count
        criterion = timm_train.loss(nn.CrossEntropyLoss(label_smoothing=0.1), args)
        out, labels = model(torch.randn(2, 3, 160, 160)), torch.tensor([1, 4])
        expected = mte.MTECrossEntropy(nn.CrossEntropyLoss(label_smoothing=0.1), weight=0.5)(out, labels)
        assert torch.equal(criterion(out, labels), expected)


def test_timm_train_lets_auxiliary_classifiers_begin_as_the_models_own():
    plain = timm.create_model('test_vit', num_classes=5)
    torch.manual_seed(1)
    usual = timm_train.add_mte(plain, arguments())
    torch.manual_seed(1)
    scaled = timm_train.add_mte(plain, arguments(head_init_scale=0.1, head_init_bias=-2.0))
    layers = [[m for m in model.aux.heads.modules() if isinstance(m, nn.Linear)] for model in (usual, scaled)]
    assert len(layers[0]) == len(layers[1]) > 0
    for before, after in zip(*layers):
        torch.testing.assert_close(after.weight, before.weight * 0.1)
        assert (after.bias == -2.0).all()


@pytest.mark.parametrize('flag', ['kd_model_name', 'naflex_loader', 'torchscript'])
def test_timm_train_refuses_flags_that_do_not_go_with_it(flag):
    with pytest.raises(ValueError, match=f'--mte does not go with --{flag.replace("_", "-")}'):
        timm_train.add_mte(timm.create_model('test_vit', num_classes=5), arguments(**{flag: 'x'}))
