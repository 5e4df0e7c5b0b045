"""Faults while files are written and read: processes killed, disks full, files damaged.

Each test says how often it tried what, for the table in the documentation.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import timm
import torch
import zoo

import mte_timm as mte
from mte_timm.publish.writing import move, staging

WENT_ON = 'last checkpoint whole, the run goes on'
COMMON = """
import json, os, random, resource, signal, sys, tempfile, time, warnings
from collections import Counter
warnings.simplefilter('ignore')
sys.path.insert(0, TESTS)
import timm, torch, zoo
import mte_timm as mte
torch.set_num_threads(1)  # forked processes have no others
FOLDER = sys.argv[1]
models = {}
for i, name in enumerate(('plain', 'plain', 'eva02')):  # models that differ in weights alone, and another one
    torch.manual_seed(i)
    models[i] = mte.wrap(zoo.build(name)), {'model_args': zoo.ALL[name][1]}

def save(i):
    model, arguments = models[i]
    mte.save_pretrained(model, FOLDER, **arguments)

def found():
    \"\"\"Which model is in the folder; 'none' where timm refuses it; anything else is wrong.\"\"\"
    try:
        state = timm.create_model(f'local-dir:{FOLDER}', pretrained=True).state_dict()
    except Exception:
        return 'none'
    for i, (model, _) in models.items():
        own = model.backbone.state_dict()
        if own.keys() == state.keys() and all(torch.equal(own[k], state[k]) for k in own):
            return i
    return 'wrong'

def age():
    # what killed processes left is removed only when it is older than a minute
    old = time.time() - 100
    for left in os.listdir(FOLDER):
        if left.startswith('.mte-timm-'):
            os.utime(os.path.join(FOLDER, left), (old, old))

def child(body):
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            body()
            code = 0
        finally:
            os._exit(code)
    return pid

def outcome(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
"""


def run(script, folder, timeout=500, within=()):
    """Runs ``script`` in a process of one thread, started by the command ``within``; what it printed, as JSON."""
    head = f'TESTS = {os.path.dirname(__file__)!r}' + COMMON
    done = subprocess.run(
        [*within, sys.executable, '-W', 'ignore', '-c', head + script, str(folder)],
        env={**os.environ, 'OMP_NUM_THREADS': '1'}, capture_output=True, text=True, timeout=timeout,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(autouse=True)
def exports_can_be_loaded():
    zoo.needs_local_dir()


def test_a_process_killed_at_any_file_operation(tmp_path, record_property):
    counts = run(
        """
counts = Counter()
for old, new in ((None, 0), (0, 1), (0, 2)):
    step = 0
    while True:
        if old is not None:
            save(old)
        else:
            os.system(f'rm -rf {FOLDER}')

        def killed():
            seen = 0
            for name in ('replace', 'link', 'unlink', 'mkdir', 'rmdir', 'fsync'):
                def counted(*args, real=getattr(os, name), **kwargs):
                    nonlocal seen
                    if seen == step:
                        os.kill(os.getpid(), signal.SIGKILL)
                    seen += 1
                    return real(*args, **kwargs)
                setattr(os, name, counted)
            save(new)

        code = outcome(child(killed))
        now = found()
        if now == new:
            counts['the new export'] += 1
        elif old is None:
            assert not os.path.exists(FOLDER)
            counts['nothing, as before'] += 1
        elif now == old:
            counts['the former export'] += 1
        else:  # never where only the weights differ
            assert now == 'none' and new == 2
            counts['weights without a config, until the next save put the former export back'] += 1
            age()
            try:
                mte.save_pretrained(models[new][0], FOLDER, model_args={'img_size': 7})
            except ValueError:
                pass
            assert found() == old
        if code == 0:
            assert now == new
            break
        step += 1
        save(new)  # what is left lying about is no obstacle
        assert found() == new
print(json.dumps(counts))
""",
        tmp_path / 'export',
    )
    assert counts['the former export'] >= 6 and counts['the new export'] >= 6, counts
    assert counts['weights without a config, until the next save put the former export back'] == 2, counts
    record_property('fault', ['process killed before each file operation of save_pretrained', counts])


@pytest.mark.parametrize('times', [25, pytest.param(400, marks=pytest.mark.slow)])
def test_a_process_killed_at_any_time(times, tmp_path, record_property):
    counts = run(
        f"""
counts, rng = Counter(), random.Random(0)
save(0)
began = time.perf_counter(); save(1); whole = time.perf_counter() - began
for _ in range({times}):
    pid = child(lambda: [save(i) for i in (0, 1, 2)])
    time.sleep(rng.random() * 3 * whole)
    os.kill(pid, signal.SIGKILL)
    outcome(pid)
    now = found()
    assert now in (0, 1, 2, 'none'), now
    counts['refused' if now == 'none' else 'whole'] += 1
save(0)
assert found() == 0
age()
save(0)
assert sorted(os.listdir(FOLDER)) == ['config.json', 'model.safetensors'], os.listdir(FOLDER)
print(json.dumps(counts))
""",
        tmp_path / 'export',
    )
    assert counts['whole'] >= 0.9 * times
    record_property('fault', ['process killed at a random time of save_pretrained', counts])


def test_a_full_disk(tmp_path, record_property):
    counts = run(
        """
counts = Counter()
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
    code = outcome(child(lambda: fills(limit)))
    assert code == (0 if limit > size else 7), (limit, code)
    assert found() == (1 if limit > size else 0)
    assert sorted(os.listdir(FOLDER)) == ['config.json', 'model.safetensors'], os.listdir(FOLDER)
    counts['new' if limit > size else 'error, former export stays'] += 1
print(json.dumps(counts))
""",
        tmp_path / 'export',
    )
    record_property('fault', ['no room for a file of save_pretrained', counts])


def test_a_full_filesystem(tmp_path, record_property):
    """One of its own, which has room for no export, for one, for two."""
    (tmp_path / 'disk').mkdir()
    mount = 'mount -t tmpfs -o size="$1" tmpfs "$2" && shift 2 && exec "$@"'
    inside = ['unshare', '-rm', 'sh', '-c', mount, 'sh']
    if not shutil.which('unshare') or subprocess.run([*inside, '1m', tmp_path / 'disk', 'true']).returncode:
        pytest.skip('no filesystem can be mounted here')
    counts = Counter()
    for room, fit in (('200k', 0), ('500k', 1), ('2m', 2)):
        script = """
from mte_timm.cli import main

made, state = 0, os.path.join(tempfile.mkdtemp(), 'checkpoint.pth')
torch.save({'teacher': models[1][0].backbone.state_dict()}, state)
arguments = [f'{k}={v!r}' for k, v in zoo.VIT.items()]
classes = str(models[1][0].backbone.num_classes)
strip = ['strip', state, '--model', zoo.ALL['plain'][0], '--num-classes', classes, '-o', FOLDER]
strip += ['--model-kwargs', *arguments]
for saves in (lambda: save(0), lambda: save(1), lambda: main(strip) == 0 or 1 / 0):
    before = found()
    try:
        saves()
        made += 1
    except (OSError, ZeroDivisionError):
        assert found() == before
        left = os.listdir(FOLDER) if os.path.exists(FOLDER) else []
        assert sorted(left) == ([] if before == 'none' else ['config.json', 'model.safetensors']), left
print(json.dumps(made))
"""
        within = [*inside, room, tmp_path / 'disk']
        made = run(script, tmp_path / 'disk' / 'export', within=within)
        assert made == (0, 1, 3)[fit]
        counts['saved'] += made
        counts['error, as before'] += 3 - made
    record_property('fault', ['filesystem full in save_pretrained or mte-timm strip', counts])


def test_a_folder_that_cannot_be_written(tmp_path, record_property):
    tmp_path.chmod(0o755)
    counts = run(
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

assert outcome(child(unprivileged)) == 7
assert found() == 0
print(json.dumps({'error, former export stays': 1}))
""",
        tmp_path / 'export',
    )
    record_property('fault', ['folder that cannot be written', counts])


def test_a_folder_made_by_another_meanwhile(tmp_path):
    models = [mte.wrap(zoo.build('plain')) for _ in range(2)]
    folders = [mte.save_pretrained(m, tmp_path / str(i), model_args=zoo.VIT) for i, m in enumerate(models)]
    with staging(tmp_path / 'export') as made:
        assert made.stat().st_mode == folders[0].stat().st_mode
        for file in folders[0].iterdir():
            shutil.copy(file, made)
        shutil.copytree(folders[1], tmp_path / 'export')
        (tmp_path / 'export' / 'README.md').touch()
        move(made, tmp_path / 'export')
    assert {p.name for p in tmp_path.iterdir()} == {'0', '1', 'export'}
    assert {p.name for p in (tmp_path / 'export').iterdir()} == {'README.md', 'config.json', 'model.safetensors'}
    for file in folders[0].iterdir():
        assert (tmp_path / 'export' / file.name).read_bytes() == file.read_bytes()


def test_a_new_folder_within_an_interrupted_export(tmp_path):
    """What a killed process left there belongs to the outer folder."""
    outer = mte.save_pretrained(mte.wrap(zoo.build('plain')), tmp_path / 'outer', model_args=zoo.VIT)
    before = {path.name: path.read_bytes() for path in outer.iterdir()}
    previous = outer / '.mte-timm-killed' / 'previous'
    previous.mkdir(parents=True)
    for name in before:
        (outer / name).rename(previous / name)
    os.utime(previous.parent, (time.time() - 100,) * 2)
    mte.save_pretrained(mte.wrap(zoo.build('plain')), outer / 'inner', model_args=zoo.VIT)
    assert {path.name: path.read_bytes() for path in outer.iterdir() if path.is_file()} == before
    assert {path.name for path in outer.iterdir()} == {*before, 'inner'}


def test_processes_that_save_to_one_folder(tmp_path, record_property):
    counts = run(
        """
counts = Counter()
for _ in range(4):
    pids = [child(lambda i=i: [save(i) for _ in range(3)]) for i in (0, 1, 2, 0)]
    assert [outcome(pid) for pid in pids] == [0] * 4
    now = found()
    assert now in (0, 1, 2), now
    assert sorted(os.listdir(FOLDER)) == ['config.json', 'model.safetensors'], os.listdir(FOLDER)
    counts['one export, whole'] += 1
print(json.dumps(counts))
""",
        tmp_path / 'export',
    )
    record_property('fault', ['four processes save to one folder, three times each', counts])


@pytest.mark.parametrize('times', [300, pytest.param(6000, marks=pytest.mark.slow)])
def test_a_damaged_checkpoint_runs_no_code_and_one_cut_off_is_refused(times, tmp_path):
    counts = run(
        f"""
import io, safetensors.torch
kwargs = dict(img_size=16, patch_size=8, embed_dim=12, depth=1, num_heads=1)
model = timm.create_model('vit_tiny_patch16_224', num_classes=0, **kwargs)
state = {{f'module.backbone.{{k}}': v for k, v in model.state_dict().items()}}
checkpoint = {{'teacher': state, 'student': state, 'epoch': 3, 'args': {{'lr': 0.1}}}}
files = {{}}
for name in ('zip.pth', 'legacy.pth'):
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer, _use_new_zipfile_serialization=name == 'zip.pth')
    files[name] = buffer.getvalue()
files['x.safetensors'] = safetensors.torch.save(model.state_dict())
counts, rng = Counter(), random.Random(0)
forbidden = ('os.system', 'os.exec', 'os.posix_spawn', 'os.remove', 'subprocess.Popen', 'socket.connect', 'shutil.')

def audit(event, args):
    if event.startswith(forbidden):
        os._exit(99)

sys.addaudithook(audit)
for case in range({times}):
    name = rng.choice(list(files))
    data = bytearray(files[name])
    how = rng.choice(('cut', 'flip', 'burst'))
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


@pytest.mark.parametrize('times', [60, pytest.param(1000, marks=pytest.mark.slow)])
def test_damaged_exports(times, tmp_path, record_property):
    folder = mte.save_pretrained(mte.wrap(zoo.build('plain')), tmp_path / 'export', model_args=zoo.VIT)
    counts = run(
        f"""
from mte_timm.publish.export import check_export
from pathlib import Path
counts, rng = Counter(), random.Random(0)
files = {{p: p.read_bytes() for p in sorted(Path(FOLDER).iterdir())}}
x = torch.linspace(-1, 1, 3 * 32 * 32).view(1, 3, 32, 32)

def said():
    model = timm.create_model(f'local-dir:{{FOLDER}}', pretrained=True).eval()
    config = json.loads((Path(FOLDER) / 'config.json').read_text())
    for name in ('sha256', 'sha256_of_config'):
        config.pop(name, None)
    with torch.no_grad():
        return model(x).tolist(), timm.data.resolve_model_data_config(model), {{k: config.get(k) for k in expected_of}}

expected_of = set(json.loads(files[Path(FOLDER) / 'config.json'])) - {{'sha256', 'sha256_of_config'}}
expected = said()
for case in range({times}):
    path = rng.choice(list(files))
    data = bytearray(files[path])
    if rng.random() < 0.3:
        del data[rng.randrange(len(data)):]
    else:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)
    try:
        check_export(Path(FOLDER))
        counts[f'{{path.name}}: ' + ('the same model' if said() == expected else 'another model')] += 1
    except ValueError:
        counts[f'{{path.name}}: refused'] += 1
    path.write_bytes(files[path])
print(json.dumps(counts))
""",
        folder,
        timeout=1500,
    )
    assert not any('another' in what for what in counts), counts  # the config has checksums of both
    record_property('fault', ['export damaged before mte-timm push', counts])


@pytest.mark.slow
def test_strip_command_killed(tmp_path, record_property):
    """As save_pretrained, which it calls: here the whole command, from outside."""
    model = zoo.build('plain')
    torch.save({'teacher': model.state_dict()}, tmp_path / 'checkpoint.pth')
    arguments = [f'{k}={v}' for k, v in zoo.VIT.items() if k != 'img_size']
    command = [sys.executable, '-W', 'ignore', '-m', 'mte_timm.cli', 'strip', str(tmp_path / 'checkpoint.pth'),
               '--model', 'vit_tiny_patch16_224', '--img-size', '32', '--model-kwargs', *arguments,
               '-o', str(tmp_path / 'out')]  # fmt: skip
    counts, delays = Counter(), [0.0, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.3, 0.6, None]
    for delay in delays:
        shutil.rmtree(tmp_path / 'out', ignore_errors=True)
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        if delay is None:
            assert process.wait(timeout=300) == 0
        else:
            while process.poll() is None and not [*tmp_path.glob('.mte-timm-*')]:  # until it writes
                time.sleep(0.001)
            time.sleep(delay)
            process.kill()
            process.wait()
        whole = (tmp_path / 'out').exists()
        if whole:
            loaded = timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True).state_dict()
            assert all(torch.equal(v, loaded[k]) for k, v in model.state_dict().items())
        counts['whole' if whole else 'nothing'] += 1
        for left in tmp_path.glob('.mte-timm-*'):
            shutil.rmtree(left)
    assert whole and counts['nothing'] > 0
    record_property('fault', ['mte-timm strip killed while it writes', counts])


def study_images():
    from benchmarks.study.data import open_images

    return open_images('sample', None, (64, 32))


def test_images_that_fail_leave_the_last_checkpoint(tmp_path, monkeypatch, record_property):
    pytest.importorskip('lightly')
    from benchmarks.study import train as study

    run, images = study.Run('moco_v3', {'n_cls': 1, 'n_pool': 1}, epochs=3, batch_size=16), study_images()
    inner = study.Feed.epoch

    def broken(self, epoch, skip=0):
        for i, batch in enumerate(inner(self, epoch, skip)):
            if (epoch, i) == (2, 1):
                raise OSError('the disk is gone')
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr(study.Feed, 'epoch', broken)
        with pytest.raises(OSError, match='the disk is gone'):
            study.train(run, images, tmp_path)
    kept = torch.load(tmp_path / f'{run.name}.pt', weights_only=True)
    assert kept['state']['step'] == 8  # two epochs of four steps
    _, state = study.train(run, images, tmp_path)
    assert state['step'] == 12
    record_property('fault', ['images that cannot be read in training', {WENT_ON: 1}])


@pytest.mark.slow
def test_a_rank_that_dies_leaves_the_last_checkpoint(tmp_path, record_property):
    pytest.importorskip('lightly')
    root = Path(__file__).parents[1]
    command = [sys.executable, '-W', 'ignore', '-m', 'torch.distributed.run', '--nproc_per_node=2']
    command += ['--master_port=29671', '-m', 'benchmarks.study', '--device', 'cpu', '--limit', '512', '64']
    command += ['--epochs', '6', '--seeds', '1', '--only', 'Tab. 8', '--output', str(tmp_path)]
    command += ['--checkpoints', str(tmp_path / 'checkpoints')]
    env = {**os.environ, 'OMP_NUM_THREADS': '1'}
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
    record_property('fault', ['one of two ranks killed in training', {WENT_ON: 1}])
