"""Faults while files are written and read: processes killed, disks full, files damaged."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import zoo

COMMON = f"""
import io, json, os, random, resource, safetensors.torch, signal, sys, tempfile, warnings
from collections import Counter
warnings.simplefilter('ignore')
sys.path.insert(0, {os.path.dirname(__file__)!r})
import timm, torch, zoo
import mte_timm as mte
torch.set_num_threads(1)  # forked processes have no others
FOLDER = sys.argv[1]
models = {{}}
for i, name in enumerate(('plain', 'plain', 'eva02')):  # models that differ in weights alone, and another one
    torch.manual_seed(i)
    models[i] = mte.wrap(zoo.build(name)), {{'model_args': zoo.ALL[name][1]}}

def save(i):
    mte.save_pretrained(models[i][0], FOLDER, **models[i][1])

def found():
    # which model is in the folder; 'none' where timm refuses it; anything else is wrong
    try:
        state = timm.create_model(f'local-dir:{{FOLDER}}', pretrained=True).state_dict()
    except Exception:
        return 'none'
    for i, (model, _) in models.items():
        own = model.backbone.state_dict()
        if own.keys() == state.keys() and all(torch.equal(own[k], state[k]) for k in own):
            return i
    return 'wrong'

def outcome(body):
    # exit code of a process that does it
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            body()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
"""


def run(script, folder, timeout=500):
    """Runs ``script`` in a process of one thread; what it printed, as JSON."""
    done = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', COMMON + script, str(folder)],
        env={**os.environ, 'OMP_NUM_THREADS': '1'}, capture_output=True, text=True, timeout=timeout,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(autouse=True)
def exports_can_be_loaded():
    zoo.needs_local_dir()


@pytest.mark.parametrize(('old', 'new'), [(None, 0), (0, 1), (0, 2)], ids=['nothing', 'same model', 'other model'])
def test_a_process_killed_at_any_file_operation_leaves_the_old_or_the_new(old, new, tmp_path):
    """Or nothing that loads, in the instant in which another model's config and weights change."""
    counts = run(
        f"""
old, new, step, counts, code = {old}, {new}, 0, Counter(), None
while code != 0:
    if old is not None:
        save(old)
    else:
        os.system(f'rm -rf {{FOLDER}}')

    def killed():
        seen = 0
        for name in ('replace', 'unlink', 'mkdir', 'rmdir', 'fsync'):
            def counted(*args, real=getattr(os, name), **kwargs):
                nonlocal seen
                if seen == step:
                    os.kill(os.getpid(), signal.SIGKILL)
                seen += 1
                return real(*args, **kwargs)
            setattr(os, name, counted)
        save(new)

    code = outcome(killed)
    counts[found()] += 1
    step += 1
save(new)  # what is left lying about is no obstacle
files = sorted(name for name in os.listdir(FOLDER) if not name.startswith('.mte-timm-'))
assert found() == new and files == ['config.json', 'model.safetensors']
print(json.dumps(counts))
""",
        tmp_path / 'export',
    )
    assert counts.keys() <= {str(old), str(new), 'none'} and sum(counts.values()) >= 5, counts
    if old is not None:
        assert counts.get('none', 0) == (3 if new == 2 else 0), counts


def test_a_full_disk_leaves_the_former_export_and_nothing_half_written(tmp_path):
    run(
        """
save(0)
size = os.path.getsize(os.path.join(FOLDER, 'model.safetensors'))

def fills(limit):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        save(1)
    except OSError:
        os._exit(7)

for limit in (0, 100, 1000, size // 2, size - 1, 2 * size):
    assert outcome(lambda: fills(limit)) == (0 if limit > size else 7), limit
    assert found() == (1 if limit > size else 0)
    assert os.listdir(os.path.dirname(FOLDER)) == ['export']  # nothing half-written beside it
    assert sorted(os.listdir(FOLDER)) == ['config.json', 'model.safetensors'], os.listdir(FOLDER)
print('null')
""",
        tmp_path / 'export',
    )


def test_a_folder_that_cannot_be_written_is_named_and_stays(tmp_path):
    tmp_path.chmod(0o755)
    run(
        """
save(0)
os.chmod(FOLDER, 0o555)

def unprivileged():
    if os.geteuid() == 0:
        os.setuid(65534)
    tempfile.tempdir = '/nowhere'  # or the weights are kept there
    try:
        save(1)
    except PermissionError as e:
        os._exit(7 if FOLDER in str(e) else 8)

assert outcome(unprivileged) == 7
assert found() == 0
print('null')
""",
        tmp_path / 'export',
    )


@pytest.mark.parametrize('times', [300, pytest.param(6000, marks=pytest.mark.slow)])
def test_a_damaged_checkpoint_runs_no_code_and_one_cut_off_is_refused(times, tmp_path):
    counts = run(
        f"""
kwargs = dict(img_size=16, patch_size=8, embed_dim=12, depth=1, num_heads=1)
model = timm.create_model('vit_tiny_patch16_224', num_classes=0, **kwargs)
state = zoo.prefixed(model.state_dict(), 'module.backbone.')
files = {{'x.safetensors': safetensors.torch.save(model.state_dict())}}
for name in ('zip.pth', 'legacy.pth'):
    buffer = io.BytesIO()
    checkpoint = {{'teacher': state, 'student': state, 'epoch': 3, 'args': {{'lr': 0.1}}}}
    torch.save(checkpoint, buffer, _use_new_zipfile_serialization=name == 'zip.pth')
    files[name] = buffer.getvalue()
counts, rng = Counter(), random.Random(0)
forbidden = ('os.system', 'os.exec', 'os.posix_spawn', 'os.remove', 'subprocess.Popen', 'socket.connect', 'shutil.')

def audit(event, args):
    if event.startswith(forbidden):
        os._exit(99)

sys.addaudithook(audit)
for case in range({times}):
    name, how = rng.choice(list(files)), rng.choice(('cut', 'flip', 'burst'))
    data = bytearray(files[name])
    if how == 'cut':
        del data[rng.randrange(len(data)):]
    for _ in range({{'cut': 0, 'flip': 1, 'burst': 20}}[how]):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path = f'{{FOLDER}}.{{name}}'
    with open(path, 'wb') as file:
        file.write(data)
    try:
        mte.strip_checkpoint(path, 'vit_tiny_patch16_224', **kwargs)
        counts[f'{{how}}: loaded'] += 1
    except mte.CheckpointError:
        counts[f'{{how}}: refused'] += 1
print(json.dumps(counts))
""",
        tmp_path / 'checkpoint',
        timeout=1500,
    )
    assert sum(counts.values()) == times and 'cut: loaded' not in counts, counts


@pytest.mark.slow
def test_a_rank_that_dies_leaves_the_last_checkpoint(tmp_path):
    root, env = Path(__file__).parents[1], {**os.environ, 'OMP_NUM_THREADS': '1'}
    command = [sys.executable, '-W', 'ignore', '-m', 'torch.distributed.run', '--nproc_per_node=2']
    command += ['--master_port=29671', '-m', 'benchmarks.study', '--device', 'cpu', '--limit', '512', '64']
    command += ['--epochs', '6', '--seeds', '1', '--only', 'Tab. 8', '--output', str(tmp_path)]
    command += ['--checkpoints', str(tmp_path / 'checkpoints')]
    process = subprocess.Popen(command, cwd=root, env=env, stderr=subprocess.DEVNULL)
    path = tmp_path / 'checkpoints' / 'fashion-mnist-sample' / 'supervised-plain-seed0.pt'
    try:
        for _ in range(1200):
            if path.exists() or process.poll() is not None:
                break
            time.sleep(0.1)
        children = Path(f'/proc/{process.pid}/task/{process.pid}/children').read_text().split()
        os.kill(int(children[-1]), signal.SIGKILL)
        assert process.wait(timeout=120) != 0
    finally:
        process.kill()
    if path.exists():  # or the first run had just ended
        assert torch.load(path, weights_only=True)['state']['step'] > 0
    subprocess.run(command, cwd=root, env=env, check=True, stderr=subprocess.DEVNULL, timeout=400)
    lines = map(json.loads, (tmp_path / 'fashion-mnist-sample.jsonl').read_text().splitlines())
    results = [line for line in lines if 'run' in line]
    assert len(results) == 2 and all(r['steps'] == 6 * (256 // r['run']['batch_size']) for r in results)
