"""The patches on the real repositories, at their commits, on the CPU: make test-upstream UPSTREAM=FOLDER

Runs where the environment variable MTE_UPSTREAM names a folder with clones of facebookresearch/dino, bytedance/ibot,
facebookresearch/moco-v3, SwinTransformer/Transformer-SSL and huggingface/pytorch-image-models. The scripts themselves
run, with their own launcher variables, checkpoints and evaluation; only NCCL and CUDA are replaced (run_on_cpu.py).
"""

import importlib.util
import json
import math
import os
import re
import socket
import subprocess
import sys
import zipfile
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import zoo
from PIL import Image

import mte_timm as mte

ROOT = Path(__file__).resolve().parent.parent
UPSTREAM = os.environ.get('MTE_UPSTREAM')
IMAGES = 64
EPOCHS = 3

pytestmark = [
    pytest.mark.upstream,
    pytest.mark.skipif(not UPSTREAM, reason='MTE_UPSTREAM names no folder with clones of the SSL repositories'),
]


@dataclass(frozen=True)
class Host:
    """One script of a repository, and how its runs are read."""

    repository: str
    script: str
    arguments: str
    model: str  # timm architecture
    evaluation: tuple[str, str]  # script and arguments
    backbone: str  # code that makes `model` with the repository's own classes
    prefix: str  # of the backbone's tensors in the checkpoint
    patch: str
    key: str = 'teacher'
    epochs: str = '--epochs {}'
    checkpoint: str = 'checkpoint.pth'
    log: str = 'log.txt'  # file that holds the losses
    loss: str = r'"train_loss": ([\d.]+)'  # pattern of an epoch's or a step's loss in the log
    result: str = r'10-NN classifier result: Top1: ([\d.]+)'  # pattern in what the evaluation prints
    packages: tuple[str, ...] = ()
    model_kwargs: dict = field(default_factory=dict)


DINO = (
    '--data_path @DATA --output_dir @OUT --batch_size_per_gpu @BATCH --use_fp16 false --local_crops_number 2 '
    '--out_dim 256 --warmup_epochs 0 --freeze_last_layer 0 --warmup_teacher_temp_epochs 0 --lr 0.005 --num_workers 0'
)
IBOT = f'--patch_out_dim 256 {DINO} --use_fp16 true --freeze_last_layer 1 --norm_last_layer false --shared_head true'
IBOT_SWIN = f'--patch_size 4 --patch_out_dim 256 {DINO} --local_crops_number 0'
KNN = '--data_path @IMAGES --pretrained_weights @CHECKPOINT --num_workers 0 --batch_size_per_gpu 32 --nb_knn 10'
LOAD = """
state = torch.load(CHECKPOINT, weights_only=False, map_location='cpu')
state = state.get('teacher', state.get('state_dict', state.get('model')))
state = {k.removeprefix('module.'): v for k, v in state.items()}
state = {k.removeprefix(PREFIX): v for k, v in state.items() if k.startswith(PREFIX)}
state = {k: v for k, v in state.items() if not k.startswith(('head.', 'fc.'))}
left = model.load_state_dict(state, strict=False)
assert not left.unexpected_keys and all(k.startswith(('head.', 'fc.')) for k in left.missing_keys), left
with torch.no_grad():
    torch.save(model.eval()(torch.load('x.pt')), 'features.pt')
"""
MOCO = '--multiprocessing-distributed --dist-url tcp://127.0.0.1:@PORT -a vit_small -j 0'
MOBY = '--cfg configs/moby_swin_tiny.yaml --local_rank 0 --amp-opt-level O0 --data-path @IMAGES --output @OUT --tag run'
MOBY_OPTS = (
    '--opts TRAIN.WARMUP_EPOCHS 0 DATA.IMG_SIZE 64 MODEL.SWIN.WINDOW_SIZE 2 MODEL.MOBY.CONTRAST_NUM_NEGATIVE 64 '
    'DATA.NUM_WORKERS 0 PRINT_FREQ 1 TRAIN.BASE_LR 0.01 SEED -@RANK'  # it adds the rank, to its queues too
)


def multi_crop(repository, arch, arguments, model, backbone, knn, packages=()):
    """DINO or iBOT."""
    evaluation = knn, f'--arch {arch} {"--load_features @OUT " if packages else ""}{KNN}'
    return Host(
        repository, f'main_{repository}.py', f'--arch {arch} {arguments}', model, evaluation, backbone, 'backbone.',
        repository, packages=packages,
    )  # fmt: skip


def ibot(arch, arguments, model):
    backbone, packages = f'import models\nmodel = models.{arch}()', ('tensorboardX', 'munkres', 'sklearn')
    return multi_crop('ibot', arch, arguments, model, backbone, 'evaluation/eval_knn.py', packages)


VIT, SWIN = 'vit_tiny_patch16_224', 'swin_tiny_patch4_window7_224'
OF_DINO = 'import vision_transformer\nmodel = vision_transformer.vit_tiny()'
OF_TORCHVISION = 'import torchvision\nmodel = torchvision.models.resnet18()\nmodel.fc = torch.nn.Identity()'
HOSTS = {
    'dino': multi_crop('dino', 'vit_tiny', DINO, VIT, OF_DINO, 'eval_knn.py'),
    'dino-resnet': multi_crop(
        'dino', 'resnet18', f'{DINO} --use_bn_in_head true', 'resnet18', OF_TORCHVISION, 'eval_knn.py'
    ),
    'ibot': ibot('vit_tiny', IBOT, VIT),
    'ibot-swin': ibot('swin_tiny', IBOT_SWIN, SWIN),
    'moco-v3': Host(
        'moco-v3',
        'main_moco.py',
        f'{MOCO} --world-size @WORLD --rank @RANK -b @TOTAL --moco-mlp-dim 256 --moco-dim 64 --optimizer adamw '
        '--lr 1.5e-3 --moco-t 0.2 --warmup-epochs 0 --seed 0 --print-freq 1',
        'vit_small_patch16_224',
        ('main_lincls.py', f'{MOCO} --world-size 1 --rank 0 -b 32 --epochs 1 --pretrained @CHECKPOINT @IMAGES'),
        'import vits\nmodel = vits.vit_small(img_size=64, num_classes=0)',
        'base_encoder.',
        'moco-v3',
        key='base_encoder',
        epochs='--epochs {} @IMAGES',
        checkpoint='checkpoint_{:04d}.pth.tar',
        log='stdout.txt',
        loss=r'Loss ([\d.e+-]+)',
        result=r'Acc@1 ([\d.]+)',
        packages=('tensorboard',),
        model_kwargs={'num_heads': 12, 'img_size': 64},
    ),
    'moby': Host(
        'Transformer-SSL',
        'moby_main.py',
        f'{MOBY} --batch-size @BATCH',
        SWIN,
        (
            'moby_linear.py',
            f'{MOBY} --batch-size 64 --zip {MOBY_OPTS} MODEL.TYPE linear SAVE_FREQ 1000 '  # its 100 epochs are fixed
            'AUG.SSL_AUG False AUG.SSL_LINEAR_AUG True AUG.MIXUP 0.0 AUG.CUTMIX 0.0',
        ),
        'from models.swin_transformer import SwinTransformer\n'
        'model = SwinTransformer(img_size=64, window_size=2, num_classes=0)',
        'encoder.',
        'moby',
        key='encoder',
        epochs=MOBY_OPTS + ' TRAIN.EPOCHS {}',
        checkpoint='*/run/checkpoint.pth',
        log='stdout.txt',
        loss=r'loss ([\d.]+)',
        result=r'\* Acc@1 ([\d.]+)',
        packages=('yacs', 'diffdist', 'termcolor', 'yaml'),
        model_kwargs={'img_size': 64, 'window_size': 2},
    ),
    'timm-train': Host(
        'pytorch-image-models',
        'train.py',
        '--data-dir @IMAGES --output @OUT --experiment run --model vit_tiny_patch16_224 --model-kwargs img_size=64 '
        'depth=4 --img-size 64 --num-classes 10 --device cpu -j 1 -b @BATCH --opt adamw --lr 1e-3 --warmup-epochs 0 '
        '--sched-on-updates --layer-decay 0.9 --model-ema --mixup 0.2 --bce-loss',
        VIT,
        ('validate.py', '--data-dir @IMAGES --model local-dir:@EXPORT --pretrained --device cpu -j 1 -b 50'),
        f"import timm\nmodel = timm.create_model('{VIT}', img_size=64, depth=4, num_classes=0)",
        'backbone.',
        'timm-train',
        key='state_dict',
        checkpoint='run/last.pth.tar',
        log='run/summary.csv',
        loss=r'(?m)^\d+,([\d.]+)',
        result=r'"top1": ([\d.]+)',
        packages=('yaml',),
        model_kwargs={'img_size': 64, 'depth': 4},
    ),
}
# settings inside a checkpoint, which torch's safe loading refuses since 2.6, with MTE or without
UNSAFE = {'TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD': '1'}

assert_same = partial(zoo.assert_same, but=('output_dir', 'OUTPUT', 'output'))  # what says where a run wrote


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    """Real images as ImageFolder: 64 to train on, 100 to evaluate."""
    folder = tmp_path_factory.mktemp('images')
    data = np.load(ROOT / 'benchmarks' / 'data' / 'fashion_mnist.npz')
    for split, name, count in (('train', 'train', IMAGES), ('val', 'test', 100)):
        for i in range(count):
            path = folder / split / str(data[f'{name}_labels'][i]) / f'{i}.png'
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(data[f'{name}_images'][i]).convert('RGB').resize((64, 64)).save(path)
        # as moby_linear.py wants them
        paths = sorted((folder / split).glob('*/*.png'))
        with zipfile.ZipFile(folder / f'{split}.zip', 'w') as archive:
            for path in paths:
                archive.write(path, path.relative_to(folder / split))
        lines = [f'{path.parent.name}/{path.name}\t{path.parent.name}\n' for path in paths]
        (folder / f'{split}_map.txt').write_text(''.join(lines))
    return folder


def clone(repository):
    found = [p for p in Path(UPSTREAM).iterdir() if re.search(rf'(^|\W){re.escape(repository)}$', p.name)]
    if not found:
        pytest.skip(f'{UPSTREAM} has no clone of {repository}')
    return found[0]


def pinned(host):
    text = (ROOT / 'patches' / 'apply.py').read_text()
    return re.search(rf"'{host.patch}': '\S+ at (\w+)'", text)[1]


def apply(host, folder, **kwargs):
    return subprocess.run([sys.executable, ROOT / 'patches' / 'apply.py', host.patch, folder], **kwargs)


def export(host, folder, patched):
    """The repository at its commit, in ``folder``."""
    git, commit = ['git', '-C', clone(host.repository)], pinned(host)
    names = subprocess.check_output([*git, 'ls-tree', '-r', '--name-only', commit], text=True).split('\n')
    for name in names:
        if name.endswith(('.py', '.yaml')):
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(subprocess.check_output([*git, 'show', f'{commit}:{name}']))
    if patched:
        apply(host, folder, check=True)
    return folder


@pytest.fixture(scope='module', params=HOSTS)
def host(request):
    host = HOSTS[request.param]
    missing = [p for p in host.packages if importlib.util.find_spec(p) is None]
    if missing:
        pytest.skip(f'{host.repository} needs {", ".join(missing)}')
    return host


@pytest.fixture(scope='module')
def patched(host, tmp_path_factory):
    return export(host, tmp_path_factory.mktemp('patched'), patched=True)


def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return str(s.getsockname()[1])


def run(host, repository, out, images, extra='', epochs=1, world=1, script=None, environment=None):
    """Runs the training script, or another, in ``world`` processes; what each printed."""
    out.mkdir(exist_ok=True)
    port = free_port()
    script, arguments = script or (host.script, f'{host.arguments} {extra} {host.epochs.format(epochs)}')
    values = {'CHECKPOINT': checkpoint(host, out), 'DATA': images / 'train', 'IMAGES': images, 'OUT': out, 'PORT': port}
    values |= {'EXPORT': out / 'export', 'TOTAL': 16, 'BATCH': 16 // world, 'WORLD': world}
    launcher = {'LOCAL_RANK': '0', 'WORLD_SIZE': str(world), 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': port}
    launcher |= {'GLOO_SOCKET_IFNAME': 'lo', 'THREADS': str(2 // world), 'PYTHONPATH': f'{ROOT}:{repository}'}
    processes = []
    for rank in range(world):
        filled = re.sub(r'@(\w+)', lambda m, rank=rank: str({**values, 'RANK': rank}[m[1]]), arguments)
        command = [sys.executable, '-W', 'ignore', ROOT / 'tests' / 'run_on_cpu.py', repository / script]
        process = subprocess.Popen(
            [*command, *filled.split()],
            cwd=out if '.tar' in host.checkpoint else repository,  # MoCo v3 writes where it runs
            env={**os.environ, **launcher, 'RANK': str(rank), **(environment or {})},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        processes.append(process)
    printed = [p.communicate()[0] for p in processes]
    for process, text in zip(processes, printed):
        assert process.returncode == 0, text[-3000:]
    if script == host.script:
        with (out / 'stdout.txt').open('a') as f:
            f.write(printed[0])
    return printed


def checkpoint(host, out):
    if '{' in host.checkpoint:
        made = sorted(out.glob('checkpoint_*.pth.tar'))
        return made[-1] if made else out / host.checkpoint.format(0)
    return next(iter(sorted(out.glob(host.checkpoint))), out / host.checkpoint)


def losses(host, out):
    text = (out / host.log).read_text()
    values = [float(v) for v in re.findall(host.loss, text)]
    steps = IMAGES // 16 if host.log == 'stdout.txt' else 1
    return [sum(values[i : i + steps]) / steps for i in range(0, len(values), steps)]


@pytest.fixture(scope='module')
def trained(host, patched, images, tmp_path_factory):
    out = tmp_path_factory.mktemp('mte')
    run(host, patched, out, images, extra='--mte', epochs=EPOCHS)
    return out


def test_patch_only_adds_lines_and_checks_on_the_pinned_commit(host, tmp_path):
    patch = ROOT / 'patches' / f'{host.patch}.patch'
    added = r'diff --git |index |--- a/|\+\+\+ b/|@@ -\d+,0 \+[\d,]+ @@$|\+'
    assert all(re.match(added, line) for line in patch.read_text().splitlines())
    folder = export(host, tmp_path, patched=False)
    subprocess.run(['git', 'apply', '--unidiff-zero', '--check', patch], cwd=folder, check=True)


def test_without_the_flag_nothing_changes(host, patched, images, tmp_path):
    plain = export(host, tmp_path / 'plain', patched=False)
    old_timm = {'OLD_TIMM': '1'} if host.patch in ('moco-v3', 'moby') else {}
    run(host, plain, tmp_path / 'a', images, environment=old_timm)
    run(host, patched, tmp_path / 'b', images)
    assert losses(host, tmp_path / 'a') == losses(host, tmp_path / 'b')
    if host.log == 'log.txt':
        assert (tmp_path / 'a' / host.log).read_text() == (tmp_path / 'b' / host.log).read_text()
    a, b = (torch.load(checkpoint(host, tmp_path / x), weights_only=False) for x in 'ab')
    assert_same(a, b)


def test_loss_is_finite_and_falls(host, trained):
    values = losses(host, trained)
    assert len(values) == EPOCHS and all(map(math.isfinite, values))
    first = 1 if host.patch == 'moby' else 0  # its queue holds noise in the first epoch, which is easy to tell apart
    assert values[-1] < values[first], values


def test_resumes_from_its_own_checkpoint(host, patched, trained, images, tmp_path):
    out = tmp_path / 'resumed'
    subprocess.run(['cp', '-r', trained, out], check=True)
    resume = f'--resume {checkpoint(host, out)}'
    extra = {
        'ibot': '--load_from checkpoint.pth',
        'moco-v3': resume,
        'timm-train': f'{resume} --amp --amp-dtype bfloat16',
    }.get(host.patch, '')
    unsafe = UNSAFE if host.patch == 'moby' else {}
    printed = run(host, patched, out, images, f'--mte {extra}', epochs=EPOCHS + 1, environment=unsafe)[0]
    values = losses(host, out)
    assert len(values) == EPOCHS + 1 and math.isfinite(values[-1])
    if host.log == 'log.txt':
        assert [json.loads(line)['epoch'] for line in (out / 'log.txt').read_text().splitlines()] == [0, 1, 2, 3]
        assert printed.count('<All keys matched successfully>') == 3, printed[-2000:]


def test_two_processes_equal_one_with_the_joined_batch(host, patched, images, tmp_path):
    runs = {}
    for world in (1, 2):
        out = tmp_path / str(world)
        # timm's order of images is another in two processes, so a step there takes all of them
        extra, epochs = (f'--mte --mixup 0 -b {IMAGES // world}', 2) if host.patch == 'timm-train' else ('--mte', 1)
        run(host, patched, out, images, extra, epochs, world, environment={'SAME_FOR_ANY_WORLD': '1'})
        pattern = r'mean loss ([\d.]+)' if host.log == 'stdout.txt' else host.loss
        values = [float(v) for v in re.findall(pattern, (out / host.log).read_text())]
        runs[world] = values, torch.load(checkpoint(host, out), weights_only=False)
    (one, state_one), (two, state_two) = runs[1], runs[2]
    print(f'{host.patch} {host.model}: one process {one}, two {two}')
    assert all(map(math.isfinite, two)) and len(two) == len(one) > 0
    assert two == pytest.approx(one, rel=1e-3) and two[0] == pytest.approx(one[0], rel=1e-4)
    for name in ('dino_loss', 'ibot_loss'):
        for key, centre in state_one.get(name, {}).items():
            torch.testing.assert_close(state_two[name][key], centre, rtol=1e-2, atol=1e-4)
    if 'model' in state_one:
        for key in ('queue1', 'queue2'):  # the keys of the first process, then of the second
            halves = [state_one['model'][key].unflatten(1, (-1, 16))[..., start::2] for start in (0, 1)]
            expected = torch.cat(halves, dim=2).flatten(1)
            torch.testing.assert_close(state_two['model'][key], expected, rtol=1e-2, atol=1e-3)


def test_the_repositorys_evaluation_reads_the_checkpoint(host, patched, trained, images):
    if '@EXPORT' in host.evaluation[1]:
        report = mte.strip_checkpoint(
            checkpoint(host, trained), host.model, host.key, num_classes=10, **host.model_kwargs
        )
        mte.save_pretrained(report, trained / 'export')
    printed = run(host, patched, trained, images, script=host.evaluation, environment=UNSAFE)[0]
    found = re.search(host.result, printed)
    assert found and math.isfinite(float(found[1])), printed[-2000:]
    print(f'{host.patch} {host.model}: {host.evaluation[0]} {found[0]}')


def test_stripped_model_has_the_features_of_the_repositorys_backbone(host, patched, trained, tmp_path):
    path = checkpoint(host, trained)
    size = host.model_kwargs.get('img_size', 224)  # no resampling of position embeddings, where each has its own way
    x = torch.randn(2, 3, size, size)
    torch.save(x, tmp_path / 'x.pt')
    code = f"import sys, torch\nsys.argv = ['run_on_cpu.py']\nCHECKPOINT, PREFIX = {str(path)!r}, {host.prefix!r}\n"
    env = {**os.environ, 'PYTHONPATH': f'{ROOT}:{patched}'}
    command = [sys.executable, '-W', 'ignore', '-c', code + host.backbone + LOAD]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    expected = torch.load(tmp_path / 'features.pt')
    kwargs = dict(host.model_kwargs)
    if host.repository == 'ibot' and 'swin' in host.model:  # whose LayerNorms add 1e-6 where timm's add 1e-5
        kwargs['norm_layer'] = partial(torch.nn.LayerNorm, eps=1e-6)
    report = mte.strip_checkpoint(path, host.model, key=host.key, **kwargs)
    with torch.no_grad():
        ours = report.model(x)
    gap = (ours - expected).abs().max().item() / expected.abs().max().item()
    print(f'{host.patch} {host.model}: {report.loaded} tensors, features {gap:.1e} apart')
    assert gap < 1e-5
