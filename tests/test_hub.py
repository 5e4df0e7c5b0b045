"""Publishing over a real socket: the client of huggingface_hub against a hub of the tests, and timm from there."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import zoo
from hub_server import TOKEN, serve

import mte_timm as mte

COMMON = """
import sys, timm, torch
sys.path.insert(0, TESTS)
import mte_timm as mte, zoo
torch.manual_seed(0)
wrapped = mte.wrap(zoo.build('plain', num_classes=3), n_cls=2, n_pool=3)
arguments = {'model_args': zoo.VIT | {'num_classes': 3}}
x = torch.randn(2, 3, 32, 32)
features = wrapped.eval()(x).output
"""


@pytest.fixture
def hub():
    with serve() as served:
        yield served


def environment(url, tmp_path, token=TOKEN):
    env = {k: v for k, v in os.environ.items() if not k.startswith('HF_')}
    new = {'HF_ENDPOINT': url, 'HF_HOME': str(tmp_path / 'hf'), 'HF_HUB_DISABLE_XET': '1', 'OMP_NUM_THREADS': '1'}
    if token:
        new['HF_TOKEN'] = token
    new['TMPDIR'] = str(tmp_path)  # where exports are kept that could not be uploaded
    return {**env, **new, 'HF_HUB_DISABLE_TELEMETRY': '1', 'HF_HUB_DISABLE_PROGRESS_BARS': '1'}


def client(script, url, tmp_path, **kwargs):
    """Runs ``script`` in a process that knows no other hub."""
    head = f'TESTS = {os.path.dirname(__file__)!r}' + COMMON
    done = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', head + script],
        env=environment(url, tmp_path, **kwargs), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def command(*args, url, tmp_path, **kwargs):
    return subprocess.run(
        [sys.executable, '-W', 'ignore', '-m', 'mte_timm.cli', *args],
        env=environment(url, tmp_path, **kwargs), capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def test_round_trip(hub, tmp_path):
    zoo.needs_local_dir()
    server, url = hub
    out = client(
        """
print(mte.push_to_hub(wrapped, 'me/vit', license='mit', commit_message='First', mean=[0.1] * 3, **arguments))
for name in ('hf-hub:me/vit', 'hf-hub:me/vit@main'):
    assert torch.equal(timm.create_model(name, pretrained=True).eval()(x), features)
model = mte.wrap('hf-hub:me/vit', pretrained=True)  # to train on
assert torch.equal(model.eval()(x).output, features)
assert list(timm.data.resolve_model_data_config(model.backbone)['mean']) == [0.1] * 3
assert timm.create_model('hf-hub:me/vit', pretrained=True, num_classes=0)(x).shape == (2, 48)
""",
        url,
        tmp_path,
    )
    repository = server.repositories['me/vit']
    [(message, files)] = repository.branches['main']  # one commit
    assert message == 'First' and sorted(files) == ['README.md', 'config.json', 'model.safetensors']
    assert out.strip().startswith(f'{url}/me/vit/commit/') and not repository.private
    assert any(r.startswith('PUT /lfs/') for r in server.requests)
    card = files['README.md'].decode()
    head = card.split('---')[1]
    assert 'license: mit' in head and 'library_name: timm' in head and '- mte' in head
    assert 'pipeline_tag: image-classification' in head and '2 auxiliary CLS tokens' in card and '2411.15787' in card
    code = card.split('```python')[1].split('```')[0]
    client(code + 'assert output.shape == (1, 3)', url, tmp_path)  # the usage example is true


def test_private_repository_branch_and_pull_request(hub, tmp_path):
    server, url = hub
    out = client(
        """
first = mte.push_to_hub(wrapped, 'me/vit', private=True, **arguments)
second = mte.push_to_hub(wrapped, 'me/vit', revision='v2', commit_message='Second', **arguments)
print(mte.push_to_hub(wrapped, 'me/vit', create_pr=True, commit_message='Third', **arguments))
""",
        url,
        tmp_path,
    )
    repository = server.repositories['me/vit']
    assert repository.private and repository.pulls == ['Third'] and out.strip() == f'{url}/me/vit/discussions/1'
    assert {k: [m for m, _ in v] for k, v in repository.branches.items()} == {
        'main': ['Add model'],
        'v2': ['Add model', 'Second'],
        'refs/pr/1': ['Add model', 'Third'],
    }
    uploads = [r for r in server.requests if r.startswith('PUT /lfs/')]
    assert len(uploads) == 1  # the same weights are not sent again
    done = command('push', str(tmp_path), 'me/other', url=url, tmp_path=tmp_path)
    assert done.returncode == 1 and 'config.json' in done.stderr and 'me/other' not in server.repositories


def test_command(hub, tmp_path):
    zoo.needs_local_dir()
    server, url = hub
    wrapped = mte.wrap(zoo.build('plain'), n_cls=1)
    folder = mte.save_pretrained(wrapped, tmp_path / 'export', model_args=zoo.VIT)
    options = ('--private', '--revision', 'v1', '--license', 'apache-2.0', '--message', 'Hello')
    done = command('push', str(folder), 'me/vit', *options, url=url, tmp_path=tmp_path)
    assert done.returncode == 0 and f'{url}/me/vit/commit/' in done.stdout, done.stderr
    [(message, files)] = server.repositories['me/vit'].branches['v1']
    assert message == 'Hello' and server.repositories['me/vit'].private
    assert files['model.safetensors'] == (folder / 'model.safetensors').read_bytes()
    assert b'1 auxiliary CLS token ' in files['README.md'] and b'license: apache-2.0' in files['README.md']
    (folder / 'README.md').write_text('# Mine')
    done = command('push', str(folder), 'me/vit', '--pr', url=url, tmp_path=tmp_path)
    assert f'{url}/me/vit/discussions/1' in done.stdout
    assert server.repositories['me/vit'].branches['refs/pr/1'][-1][1]['README.md'] == b'# Mine'


def test_a_failed_upload_leaves_nothing_and_can_be_repeated(hub, tmp_path, record_property):
    zoo.needs_local_dir()
    server, url = hub
    out = client(
        """
import json, os, urllib.request
for what in ('POST repos/create', 'POST preupload', 'POST objects/batch', 'PUT lfs/', 'POST /commit/'):
    for status in (403, None):  # refused, and cut off
        fault = urllib.request.Request(os.environ['HF_ENDPOINT'] + '/fault', json.dumps({what: status}).encode())
        urllib.request.urlopen(fault).read()
        name = f'me/of-{len(what)}-{status}'
        wrapped.backbone.cls_token.data += 1  # or there is nothing to upload
        try:
            mte.push_to_hub(wrapped, name, **arguments)
            print(what, status, name, 'done')  # the client repeats some requests by itself
        except OSError as e:
            print(what, status, name, type(e).__name__)
            try:
                timm.create_model(f'hf-hub:{name}', pretrained=True)
            except Exception:
                mte.push_to_hub(wrapped, name, **arguments)
        assert torch.equal(timm.create_model(f'hf-hub:{name}', pretrained=True).cls_token, wrapped.backbone.cls_token)
""",
        url,
        tmp_path,
    )
    outcomes = [line.rsplit(' ', 3) for line in out.splitlines()]
    assert len(outcomes) == 10 and all(o[3] == 'HfHubHTTPError' or o[1] == 'None' for o in outcomes), out
    assert sum(o[3] != 'done' for o in outcomes) >= 7, out
    assert all(len(repository.branches['main']) == 1 for repository in server.repositories.values())
    names = {'done': 'client repeated the request by itself'}
    counts = Counter(names.get(o[3], 'error, nothing committed, the same call succeeded') for o in outcomes)
    record_property('fault', ['upload refused or cut off at each request of push_to_hub', counts])


def test_a_killed_upload_can_be_repeated(hub, tmp_path, record_property):
    zoo.needs_local_dir()
    server, url = hub
    out = client(
        """
import json, os, urllib.request
for what in ('POST repos/create', 'POST preupload', 'POST objects/batch', 'PUT lfs/', 'POST /commit/'):
    name = f'me/of-{len(what)}'
    wrapped.backbone.cls_token.data += 1
    pid = os.fork()
    if pid == 0:
        fault = urllib.request.Request(os.environ['HF_ENDPOINT'] + '/fault', json.dumps({what: -os.getpid()}).encode())
        urllib.request.urlopen(fault).read()
        mte.push_to_hub(wrapped, name, **arguments)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -9, what
    try:
        timm.create_model(f'hf-hub:{name}', pretrained=True)
    except Exception:
        print('nothing committed')
    mte.push_to_hub(wrapped, name, **arguments)
    assert torch.equal(timm.create_model(f'hf-hub:{name}', pretrained=True).cls_token, wrapped.backbone.cls_token)
""",
        url,
        tmp_path,
    )
    assert out.split('\n')[:-1] == ['nothing committed'] * 5
    assert all(len(repository.branches['main']) == 1 for repository in server.repositories.values())
    outcome = {'nothing committed, the same call succeeded': 5}
    record_property('fault', ['process killed at each request of push_to_hub', outcome])


def test_the_export_of_a_failed_upload_is_kept(hub, tmp_path, record_property):
    """And the command of the warning uploads it as it was meant, or to another place with a card of that place."""
    zoo.needs_local_dir()
    server, url = hub
    out = client(
        """
import json, os, pathlib, re, tempfile, urllib.request, warnings
before = set(pathlib.Path(tempfile.gettempdir()).glob('mte-timm-*'))
fault = urllib.request.Request(os.environ['HF_ENDPOINT'] + '/fault', json.dumps({'POST /commit/': 403}).encode())
urllib.request.urlopen(fault).read()
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter('always')
    try:
        more = {'license': 'mit', 'private': True, 'revision': 'v2', 'commit_message': 'A b'}
        mte.push_to_hub(wrapped, 'me/vit', **more, **arguments)
    except OSError:
        print(re.search('`mte-timm (push .*)`', str(said[-1].message))[1])
mte.push_to_hub(wrapped, 'me/other', **arguments)
left = set(pathlib.Path(tempfile.gettempdir()).glob('mte-timm-*')) - before
assert len(left) == 1, left  # nothing of what was uploaded
""",
        url,
        tmp_path,
    )
    words = shlex.split(out)
    done = command(*words, url=url, tmp_path=tmp_path)
    assert done.returncode == 0, done.stderr
    assert server.repositories['me/vit'].private
    [(message, files)] = server.repositories['me/vit'].branches['v2']
    assert message == 'A b' and b'license: mit' in files['README.md'] and b"'hf-hub:me/vit@v2'" in files['README.md']
    done = command('push', words[1], 'me/elsewhere', url=url, tmp_path=tmp_path)
    assert done.returncode == 0, done.stderr
    card = server.repositories['me/elsewhere'].branches['main'][0][1]['README.md']
    assert b"'hf-hub:me/elsewhere'" in card and b'me/vit' not in card
    shutil.rmtree(Path(words[1]).parent)
    record_property('fault', ['upload of a model refused at its commit', {'export kept, uploaded by mte-timm push': 1}])


def test_what_is_pushed_is_loaded_by_the_name_that_is_said(hub, tmp_path):
    zoo.needs_local_dir()
    server, url = hub
    wrapped = mte.wrap(zoo.build('plain'), n_cls=1)
    folder = str(mte.save_pretrained(wrapped, tmp_path / 'export', model_args=zoo.VIT))
    for options, name in (([], 'me/vit'), (['--revision', 'v2'], 'me/vit@v2')):
        done = command('push', folder, 'me/vit', *options, url=url, tmp_path=tmp_path)
        assert f"create_model('hf-hub:{name}'" in done.stdout, done
        client(f"assert timm.create_model('hf-hub:{name}', pretrained=True).num_features == 48", url, tmp_path)
    done = command('push', folder, 'me/vit', '--pr', url=url, tmp_path=tmp_path)
    assert "once it is merged, load it with timm.create_model('hf-hub:me/vit'" in done.stdout
    done = command('push', folder, 'me/vit', '--revision', 'refs/pr/1', url=url, tmp_path=tmp_path)  # more of it
    assert done.returncode == 0 and len(server.repositories['me/vit'].branches['refs/pr/1']) == 3, done.stderr


def test_nothing_becomes_public_unasked(hub, tmp_path):
    server, url = hub
    client(
        """
mte.push_to_hub(wrapped, 'me/public', **arguments)
try:
    mte.push_to_hub(wrapped, 'me/public', private=True, commit_message='Second', **arguments)
except ValueError as e:
    assert 'exists and is public' in str(e)
else:
    raise AssertionError('it was pushed')
""",
        url,
        tmp_path,
    )
    assert not server.repositories['me/public'].private
    assert [m for m, _ in server.repositories['me/public'].branches['main']] == ['Add model']
    server.private_by_default = True  # as an organisation may have it
    client(
        """
mte.push_to_hub(wrapped, 'me/as-usual', **arguments)
mte.push_to_hub(wrapped, 'me/said', private=False, **arguments)
""",
        url,
        tmp_path,
    )
    assert server.repositories['me/as-usual'].private and not server.repositories['me/said'].private


def test_without_a_token_nothing_is_sent(hub, tmp_path):
    server, url = hub
    folder = mte.save_pretrained(mte.wrap(zoo.build('plain')), tmp_path / 'export', model_args=zoo.VIT)
    done = command('push', str(folder), 'me/vit', url=url, tmp_path=tmp_path, token=None)
    assert done.returncode == 1 and 'error' in done.stderr and not server.repositories


def test_a_folder_has_its_own_options(tmp_path):
    folder = mte.save_pretrained(mte.wrap(zoo.build('plain')), tmp_path / 'export', model_args=zoo.VIT)
    with pytest.raises(ValueError, match='mean'):
        mte.push_to_hub(folder, 'me/vit', mean=[0.5] * 3)
    with pytest.raises(ValueError, match='user/name'):
        mte.push_to_hub(folder, 'vit')
    (folder / 'README.md').write_text('# Mine')
    with pytest.raises(ValueError, match=r'license: .*README\.md'):
        mte.push_to_hub(folder, 'me/vit', license='mit')
    weights = folder / 'model.safetensors'
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(ValueError, match='cannot be read'):
        mte.push_to_hub(folder, 'me/vit')
    assert json.loads((folder / 'config.json').read_text())['mte']['n_pool'] == 6


@pytest.mark.consumers
def test_transformers_loads_from_the_hub(hub, tmp_path):
    pytest.importorskip('transformers')
    zoo.needs_local_dir()
    client(
        """
import transformers
mte.push_to_hub(wrapped, 'me/vit', **arguments)
with torch.no_grad():
    plain = mte.strip(wrapped).forward_features(x)
    for kind in (transformers.AutoModel, transformers.TimmWrapperModel):
        model = kind.from_pretrained('me/vit').eval()
        torch.testing.assert_close(model(x).last_hidden_state, plain, rtol=1e-5, atol=1e-5)
    model = transformers.AutoModelForImageClassification.from_pretrained('me/vit').eval()
    torch.testing.assert_close(model(x).logits, features, rtol=1e-5, atol=1e-5)
assert transformers.AutoImageProcessor.from_pretrained('me/vit') is not None
""",
        hub[1],
        tmp_path,
    )
