"""The scripts in examples/, killed at random moments and started again, end as runs that nobody disturbed."""

import os
import random
import subprocess
import sys
import time

import pytest
import torch
from test_examples import ARGUMENTS, ROOT, SCRIPTS, SUPERVISED, assert_same, images  # noqa: F401

import mte_timm as mte

timm = pytest.importorskip('timm', minversion='1.0.31', reason='older timm does not remember how a model was made')
pytest.importorskip('lightly', reason='the examples with lightly need it')
pytest.importorskip('pytorch_lightning', reason='the example with PyTorch Lightning needs it')

EPOCHS = 5
OPTIONS = {**SCRIPTS, 'supervised': SUPERVISED['mixup']}
PUBLISHED = {  # where mte-timm strip finds each script's network
    'lightly_dino': 'teacher: backbone.',
    'lightly_ibot': 'teacher: backbone.',
    'lightly_byol': 'online: backbone.',
    'lightly_moco': 'online: backbone.',
    'lightly_swin_moco': 'online: backbone.',
    'lightning_dino': 'state_dict: teacher.backbone.',
    'supervised': 'ema: backbone.',
}
START = """
import runpy, sys
from functools import partial
import torch
from lightly.models import modules
torch.set_num_threads(1)
modules.DINOProjectionHead = partial(modules.DINOProjectionHead, hidden_dim=64, bottleneck_dim=32)  # narrow, so quick
sys.argv = sys.argv[1:]
sys.path.insert(0, sys.argv[0].rpartition('/')[0])
runpy.run_path(sys.argv[0], run_name='__main__')
"""


def start(name, data, out, epochs=EPOCHS):
    options = f'{ARGUMENTS} {OPTIONS[name]} --epochs {epochs}'.split()
    script = ROOT / 'examples' / f'{name}.py'
    folder = data if name == 'supervised' else data / 'train'
    return subprocess.Popen(
        [sys.executable, '-W', 'ignore', '-c', START, script, *options, '--data', folder, '--out', out],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'},
    )


def finish(name, data, out, epochs=EPOCHS):
    """Runs to the end; what was printed to stdout and stderr."""
    process = start(name, data, out, epochs)
    printed = process.communicate()
    assert process.returncode == 0, printed[1][-2000:]
    return printed


def checkpoint(name, out):
    return out / ('last.ckpt' if name == 'lightning_dino' else 'checkpoint.pt')


def end_of(name, out):
    """All that a run ends with, but for paths."""
    state = torch.load(checkpoint(name, out), weights_only=True)
    own = ('state_dict', 'optimizer_states', 'losses', 'epoch', 'global_step')
    state = {k: state[k] for k in own} if name == 'lightning_dino' else state
    return {'checkpoint': state, 'export': {p.name: p.read_bytes() for p in (out / 'export').iterdir()}}


def killed(process, moment):
    """Whether ``process`` was killed, after ``moment`` seconds, before it had ended."""
    try:
        process.communicate(timeout=moment)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return True
    return False


def check(name, data, folder, kills, seed=None):
    began = time.monotonic()
    finish(name, data, folder / 'whole')
    duration = time.monotonic() - began
    seed = random.randrange(10**6) if seed is None else seed
    moments = random.Random(seed)
    count = sum(
        killed(start(name, data, folder / 'killed'), duration * moments.uniform(0.3, 0.85)) for _ in range(kills)
    )
    print(f'{name}: seed {seed}, killed {count} times')
    finish(name, data, folder / 'killed')
    assert_same(end_of(name, folder / 'killed'), end_of(name, folder / 'whole'), f'{name}, seed {seed}')
    report = mte.strip_checkpoint(checkpoint(name, folder / 'killed'), **model_of(name))
    exported = timm.create_model(f'local-dir:{folder / "killed" / "export"}', pretrained=True, num_classes=0)
    assert report.key == PUBLISHED[name]
    assert_same(dict(report.model.state_dict()), dict(exported.state_dict()))


def model_of(name):
    words = f'{ARGUMENTS} {OPTIONS[name]}'.split()
    kwargs = {'patch_size': 8} if name == 'lightly_ibot' else {}
    if name == 'lightly_swin_moco':
        kwargs = {'window_size': 2, 'embed_dim': 24, 'depths': (1, 1, 1, 1)}
    model = words[words.index('--model') + 1] if '--model' in words else 'swin_tiny_patch4_window7_224'
    return {'model': model, 'img_size': 64, **kwargs}


@pytest.mark.parametrize('name', ['supervised'])
def test_a_script_killed_at_a_random_moment_ends_as_if_never_killed(name, images, tmp_path):  # noqa: F811
    check(name, images, tmp_path, kills=1)


@pytest.mark.slow
@pytest.mark.parametrize('name', OPTIONS)
def test_a_script_killed_again_and_again_ends_as_if_never_killed(name, images, tmp_path):  # noqa: F811
    check(name, images, tmp_path, kills=6)


@pytest.mark.slow
@pytest.mark.parametrize('name', ['lightly_dino', 'supervised', 'lightning_dino'])
def test_a_kill_while_a_checkpoint_is_written_loses_no_run(name, images, tmp_path):  # noqa: F811
    finish(name, images, tmp_path / 'whole')
    out = tmp_path / 'killed'
    for _ in range(3):
        process = start(name, images, out)
        while process.poll() is None and not any(out.glob('*.tmp')):
            time.sleep(1e-4)
        process.kill()
        process.communicate()
    finish(name, images, out)
    assert_same(end_of(name, out), end_of(name, tmp_path / 'whole'))


@pytest.mark.parametrize('name', ['lightly_dino', *(pytest.param(n, marks=pytest.mark.slow) for n in OPTIONS)])
def test_a_run_goes_on_for_more_epochs_and_logs_stay_short(name, images, tmp_path):  # noqa: F811
    finish(name, images, tmp_path, epochs=2)
    printed, errors = finish(name, images, tmp_path, epochs=3)
    assert 'goes on after epoch 2' in printed and 'epoch 3/3: loss' in printed and 'epoch 2/3' not in printed
    assert 'it/s' not in printed + errors and '%|' not in printed + errors  # no bars where there is no terminal
    state = torch.load(checkpoint(name, tmp_path), weights_only=True)
    losses = state['losses'] if name == 'lightning_dino' else state['progress']['losses']
    assert len(losses) == 3
    process = start(name, images, tmp_path, epochs=2)
    assert '3 epochs' in process.communicate()[1] and process.returncode == 1
