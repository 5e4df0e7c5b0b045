"""The scripts in examples/ train, export what they trained, step the criterion's state once, and survive kills."""

import importlib
import math
import os
import random
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import normalize
from zoo import assert_same

import mte_timm as mte

timm = pytest.importorskip('timm', minversion='1.0.31', reason='older timm does not remember how a model was made')

ROOT = Path(__file__).parents[1]
ARGUMENTS = '--epochs 2 --batch-size 16 --workers 0 --img-size 64'
DINO = '--model test_vit --local-size 32 --prototypes 64'
SCRIPTS = {
    'lightly_dino': DINO,
    'lightly_ibot': f'{DINO} --model-kwargs patch_size=8',
    'lightly_dinov2': f'{DINO} --model-kwargs patch_size=8',
    'lightly_byol': '--model test_vit',
    'lightly_moco': '--model test_vit --memory-bank 128',
    'lightly_swin_moco': '--memory-bank 256 --model-kwargs window_size=2 embed_dim=24 depths=(1,1,1,1)',
    'lightning_dino': DINO,
}
SUPERVISED = {
    'labels': '--model test_vit --epochs 12 --batch-size 4',
    'mixup': '--model test_vit --mixup 0.8 --cutmix 1 --layer-decay 0.75',
    'convolutional': '--model test_convnext --n-cls 0',
}
OPTIONS = {**SCRIPTS, 'supervised': SUPERVISED['mixup']}
SMALL_SWIN = {'window_size': 2, 'embed_dim': 24, 'depths': (1, 1, 1, 1)}
PUBLISHED = {  # the model that each script trains, and where mte-timm strip finds it
    'lightly_dino': ('teacher: backbone.', 'test_vit', {}),
    'lightly_ibot': ('teacher: backbone.', 'test_vit', {'patch_size': 8}),
    'lightly_dinov2': ('teacher: backbone.', 'test_vit', {'patch_size': 8}),
    'lightly_byol': ('online: backbone.', 'test_vit', {}),
    'lightly_moco': ('online: backbone.', 'test_vit', {}),
    'lightly_swin_moco': ('online: backbone.', 'swin_tiny_patch4_window7_224', SMALL_SWIN),
    'lightning_dino': ('state_dict: teacher.backbone.', 'test_vit', {}),
    'supervised': ('ema: backbone.', 'test_vit', {}),
}


def slow(*names):
    return [pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.fixture(scope='module', autouse=True)
def one_thread():
    # for models as small as these threads cost more than they give
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    """Folders train and val, each with 4 classes of Fashion-MNIST: 32 and 16 images."""
    root = tmp_path_factory.mktemp('images')
    with np.load(ROOT / 'benchmarks' / 'data' / 'fashion_mnist.npz') as arrays:
        pixels, labels = arrays['train_images'], arrays['train_labels']
    for c in (0, 1, 5, 8):
        of_class = iter(pixels[labels == c])
        for split, count in (('train', 8), ('val', 4)):
            folder = root / split / str(c)
            folder.mkdir(parents=True)
            for i in range(count):
                Image.fromarray(next(of_class)).convert('RGB').resize((64, 64)).save(folder / f'{i}.png')
    return root


def data_of(name, images):
    return images if name == 'supervised' else images / 'train'


def needs_packages(name):
    if name != 'supervised':
        pytest.importorskip('lightly', reason='the examples with lightly need it')
    if name == 'lightning_dino':
        pytest.importorskip('pytorch_lightning', reason='the example with PyTorch Lightning needs it')


def load(script, patch):
    """The module of a script, with lightly's DINO head made narrow."""
    needs_packages(script)
    patch.syspath_prepend(str(ROOT / 'examples'))
    module = importlib.import_module(script)
    for name in ('DINOProjectionHead', 'DINOv2ProjectionHead'):
        if hasattr(module, name):
            head = getattr(importlib.import_module('lightly.models.modules'), name)
            patch.setattr(module, name, partial(head, hidden_dim=64, bottleneck_dim=32))
    return module


def start(script, options, data, out):
    return script.main([*f'{ARGUMENTS} {options}'.split(), '--data', str(data), '--out', str(out)])


class RecordedLoss(mte.MTELoss):
    """Notes the criterion's buffers before and after each step."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.steps = []

    def forward(self, student, teacher, **kwargs):
        before = self.state()
        loss = super().forward(student, teacher, **kwargs)
        self.steps.append((loss.item(), teacher.aux, before, self.state()))
        return loss

    def state(self):
        return {k.split('.')[-1]: v.clone() for k, v in self.criterion.named_buffers()}


@pytest.fixture(scope='module', params=SCRIPTS)
def run(request, images, tmp_path_factory):
    """A script with lightly, what its main returned and the backbone that it began with."""
    out, began = tmp_path_factory.mktemp(request.param), []
    with pytest.MonkeyPatch.context() as patch:
        script = load(request.param, patch)
        create_model = script.create_model

        def noted(*args, **kwargs):
            model = create_model(*args, **kwargs)
            began.append({k: v.clone() for k, v in model.state_dict().items()})
            return model

        patch.setattr(script, 'create_model', noted)
        patch.setattr(mte, 'MTELoss', RecordedLoss)
        result = start(script, SCRIPTS[request.param], images / 'train', out)
    return request.param, result, began[0]


def check_export(result):
    plain = timm.create_model(f'local-dir:{result.export}', pretrained=True).eval()
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(plain(x), result.model.cpu().eval().backbone(x))
    assert not any('mask' in name for name in plain.state_dict())


def test_lightly_script_trains_and_exports(run):
    _, result, began = run
    assert len(result.losses) == 2 and all(map(math.isfinite, result.losses))
    trained = result.model.backbone.state_dict()
    assert trained.keys() == began.keys()
    assert all(not torch.equal(trained[k], v) for k, v in began.items() if k.endswith('proj.weight'))
    check_export(result)


def test_criterion_state_advances_once_a_step(run):
    name, result, _ = run
    steps = result.criterion.steps
    assert len(steps) == (8 if name == 'lightly_byol' else 4)  # of two epochs; BYOL has two directions
    for _, keys, before, after in steps:
        if name == 'lightly_byol':
            assert before == after == {}
        elif name.endswith('moco'):
            start, count = int(before['bank_ptr']), len(keys)
            assert int(after['bank_ptr']) == start + count
            torch.testing.assert_close(after['bank'][start : start + count], normalize(keys))
            after['bank'][start : start + count] = before['bank'][start : start + count]
            assert torch.equal(after['bank'], before['bank'])
        else:
            assert len(keys) == 32  # two views
            torch.testing.assert_close(after['center'].flatten(), 0.9 * before['center'].flatten() + 0.1 * keys.mean(0))


def test_patch_loss_of_ibot_counts_once_and_unscaled(images, tmp_path, monkeypatch):
    script, patch_losses = load('lightly_ibot', monkeypatch), []

    class Recorded(script.IBOTPatchLoss):
        def forward(self, teacher_out, student_out, mask):
            assert len(teacher_out) == len(student_out) == mask.sum() > 0
            assert student_out.requires_grad and not teacher_out.requires_grad
            patch_losses.append(super().forward(teacher_out, student_out, mask))
            return patch_losses[-1]

    monkeypatch.setattr(script, 'IBOTPatchLoss', Recorded)
    monkeypatch.setattr(mte, 'MTELoss', RecordedLoss)
    result = start(script, f'{SCRIPTS["lightly_ibot"]} --epochs 1', images / 'train', tmp_path)
    of_classes = [loss for loss, *_ in result.criterion.steps]
    assert len(patch_losses) == len(of_classes) == 2
    assert result.losses[0] == pytest.approx((sum(of_classes) + sum(patch_losses).item()) / 2, rel=1e-5)


def test_masking_of_ibot_reaches_the_tokens_and_stays_outside_the_backbone(monkeypatch):
    script = load('lightly_ibot', monkeypatch)
    backbone = timm.create_model('test_vit', num_classes=0, img_size=64, dynamic_img_size=True)
    names, x = set(backbone.state_dict()), torch.randn(2, 3, 64, 64)
    student, masking = mte.wrap(backbone), script.Masking(backbone.embed_dim)
    backbone.patch_embed.register_forward_hook(masking)
    plain = backbone.patch_embed(x)
    masking.mask = torch.rand(2, 4, 4) < 0.5
    with torch.no_grad():
        masking.token.normal_()
    masked = backbone.patch_embed(x)
    assert (masked[masking.mask] == masking.token).all()
    assert torch.equal(masked[~masking.mask], plain[~masking.mask])
    student(x).aux.sum().backward()
    assert masking.token.grad.abs().sum() > 0
    assert set(backbone.state_dict()) == names


@pytest.mark.parametrize('options', SUPERVISED)
def test_supervised_script_trains_and_exports_the_average(options, images, tmp_path, monkeypatch):
    result = start(load('supervised', monkeypatch), SUPERVISED[options], images, tmp_path)
    assert len(result.losses) == len(result.accuracies) == (12 if options == 'labels' else 2)
    assert all(map(math.isfinite, result.losses))
    if options == 'labels':
        assert sum(result.losses[-3:]) < sum(result.losses[:3]) - 0.06
    check_export(result)


@pytest.mark.parametrize('name', ['lightly_dino', 'lightning_dino', 'supervised'])
def test_folder_without_images_is_an_error_that_names_it(name, images, tmp_path, monkeypatch):
    script = load(name, monkeypatch)
    for split in ('train', 'val'):
        (tmp_path / split / 'class').mkdir(parents=True)
    for folder in (tmp_path, tmp_path / 'train', tmp_path / 'missing'):
        with pytest.raises(SystemExit, match=f'error: --data {folder}'):
            start(script, '--model test_vit', folder, tmp_path / 'out')
    with pytest.raises(SystemExit, match='32 images'):
        start(script, '--model test_vit --batch-size 33', data_of(name, images), tmp_path / 'out')


# --- kills


def checkpoint(name, out):
    return out / ('last.ckpt' if name == 'lightning_dino' else 'checkpoint.pt')


def end_of(name, out):
    """All that a run ends with: networks, criterion, optimizer, losses, random numbers; and the export."""
    state = torch.load(checkpoint(name, out), weights_only=True)
    if name == 'lightning_dino':
        state = {k: state[k] for k in ('state_dict', 'optimizer_states', 'losses', 'epoch', 'global_step')}
    else:
        assert {'optimizer', 'progress', 'buffers', 'random'} < state.keys()
    return {'checkpoint': state, 'export': {p.name: p.read_bytes() for p in (out / 'export').iterdir()}}


QUICK = ('lightly_dino', 'lightly_moco', 'lightning_dino', 'supervised')


@pytest.mark.parametrize('name', [*QUICK, *slow('lightly_ibot', 'lightly_dinov2', 'lightly_byol', 'lightly_swin_moco')])
def test_a_killed_script_goes_on_to_the_bit(name, images, tmp_path, monkeypatch, capsys):
    script, data, options = load(name, monkeypatch), data_of(name, images), OPTIONS[name]
    whole = start(script, options, data, tmp_path / 'whole')
    owner, at = (script.DINO, 'on_train_epoch_start') if name == 'lightning_dino' else (script.Progress, 'end_epoch')
    inner, epochs = getattr(owner, at), []

    def killed(self, *args):
        epochs.append(at)
        if len(epochs) == 2:
            raise ConnectionError('the machine is gone')
        return inner(self, *args)

    monkeypatch.setattr(owner, at, killed)
    with pytest.raises(ConnectionError):
        start(script, options, data, tmp_path / 'killed')
    with pytest.raises(SystemExit, match='another --lr'):
        start(script, f'{options} --lr 1', data, tmp_path / 'killed')
    capsys.readouterr()
    resumed = start(script, options, data, tmp_path / 'killed')
    assert len(epochs) == 3 and (name == 'lightning_dino' or 'goes on after epoch 1' in capsys.readouterr().out)
    assert resumed.losses == whole.losses and len(whole.losses) == 2
    for part in ('model', 'criterion'):  # the supervised script's criterion has no state
        ours, theirs = (getattr(r, part, torch.nn.Identity()) for r in (resumed, whole))
        assert_same(dict(ours.state_dict()), dict(theirs.state_dict()))
    assert_same(end_of(name, tmp_path / 'killed'), end_of(name, tmp_path / 'whole'))


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


def begin(name, images, out, epochs=5):
    """A process that runs the script."""
    needs_packages('lightning_dino')  # and lightly, for all
    command = [sys.executable, '-W', 'ignore', '-c', START, ROOT / 'examples' / f'{name}.py']
    command += f'{ARGUMENTS} {OPTIONS[name]} --epochs {epochs}'.split()
    command += ['--data', data_of(name, images), '--out', out]
    env = {**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)


def finish(*args, **kwargs):
    """Runs to the end; what was printed to stdout and stderr."""
    process = begin(*args, **kwargs)
    printed = process.communicate()
    assert process.returncode == 0, printed[1][-2000:]
    return printed


def killed(process, moment):
    """Whether ``process`` was killed, after ``moment`` seconds, before it had ended."""
    try:
        process.communicate(timeout=moment)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return True
    return False


@pytest.mark.parametrize(
    ('name', 'kills'), [('supervised', 1), *(pytest.param(n, 6, marks=pytest.mark.slow) for n in OPTIONS)]
)
def test_a_script_killed_at_random_moments_ends_as_if_never_killed(name, kills, images, tmp_path):
    whole, out, began = tmp_path / 'whole', tmp_path / 'killed', time.monotonic()
    finish(name, images, whole)
    duration, seed = time.monotonic() - began, random.randrange(10**6)
    moments = random.Random(seed)
    count = sum(killed(begin(name, images, out), duration * moments.uniform(0.3, 0.85)) for _ in range(kills))
    print(f'{name}: seed {seed}, killed {count} times')
    finish(name, images, out)
    assert_same(end_of(name, out), end_of(name, whole), f'{name}, seed {seed}')
    key, model, kwargs = PUBLISHED[name]
    report = mte.strip_checkpoint(checkpoint(name, out), model, img_size=64, **kwargs)
    exported = timm.create_model(f'local-dir:{out / "export"}', pretrained=True, num_classes=0)
    assert report.key == key
    assert_same(dict(report.model.state_dict()), dict(exported.state_dict()))


@pytest.mark.slow
@pytest.mark.parametrize('name', ['lightly_dino', 'supervised', 'lightning_dino'])
def test_a_kill_while_a_checkpoint_is_written_loses_no_run(name, images, tmp_path):
    finish(name, images, tmp_path / 'whole')
    out = tmp_path / 'killed'
    for _ in range(3):
        process = begin(name, images, out)
        while process.poll() is None and not any(out.glob('*.tmp')):
            time.sleep(1e-4)
        process.kill()
        process.communicate()
    finish(name, images, out)
    assert_same(end_of(name, out), end_of(name, tmp_path / 'whole'))


@pytest.mark.parametrize('name', ['lightly_dino', *slow(*OPTIONS)])
def test_a_run_goes_on_for_more_epochs_and_logs_stay_short(name, images, tmp_path):
    finish(name, images, tmp_path, epochs=2)
    printed, errors = finish(name, images, tmp_path, epochs=3)
    assert 'goes on after epoch 2' in printed and 'epoch 3/3: loss' in printed and 'epoch 2/3' not in printed
    assert 'it/s' not in printed + errors and '%|' not in printed + errors  # no bars where there is no terminal
    state = torch.load(checkpoint(name, tmp_path), weights_only=True)
    losses = state['losses'] if name == 'lightning_dino' else state['progress']['losses']
    assert len(losses) == 3
    process = begin(name, images, tmp_path, epochs=2)
    assert '3 epochs' in process.communicate()[1] and process.returncode == 1


@pytest.mark.consumers
@pytest.mark.parametrize('method', ('dino', 'ibot'))
def test_stable_pretraining_trains_both_streams_on_the_ensemble(method, images, tmp_path, monkeypatch):
    pytest.importorskip('stable_pretraining', reason='the example with stable-pretraining needs it')
    monkeypatch.syspath_prepend(str(ROOT / 'examples'))
    monkeypatch.chdir(tmp_path)  # where the framework keeps its logs
    script = importlib.import_module('stable_pretraining_ssl')
    seen = []
    class_loss = script.WithMTE.class_loss

    def noted(self, student, teacher, batch_size):
        center = self.dino_loss.center
        loss = class_loss(self, student, teacher, batch_size)
        temperature = 0.04 + 0.03 * self.current_epoch / 30
        logits = teacher.aux if center is None else teacher.aux - center.view(1, -1)
        targets = (logits / temperature).softmax(dim=-1).unflatten(0, (2, batch_size))
        terms = []
        for out in (student.aux, student.output):  # paper eqs. 4 and 5, each pair of different views
            predictions = (out / 0.1).log_softmax(dim=-1).unflatten(0, (-1, batch_size))
            pairs = [(i, j) for i in range(len(predictions)) for j in range(2) if i != j]
            terms.append(sum(-(targets[j] * predictions[i]).sum(dim=-1).mean() for i, j in pairs) / len(pairs))
        seen.append((loss.item(), (sum(terms) / 2).item()))
        return loss

    monkeypatch.setattr(script.WithMTE, 'class_loss', noted)
    options = '--model test_vit --model-kwargs patch_size=8 --local-size 32 --prototypes 64'
    result = start(script, f'--method {method} {options}', images / 'train', tmp_path / 'out')
    assert len(seen) == 4 and len(result.losses) == 2
    for ours, by_hand in seen[:1]:  # before the center moves
        assert ours == pytest.approx(by_hand, rel=1e-4)
    check_export(result)
