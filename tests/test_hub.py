"""Publishing over a real socket: the client of huggingface_hub against a hub of the tests, and timm from there."""

import os
import re
import subprocess
import sys

import pytest
import zoo
from hub_server import TOKEN, serve

import mte_timm as mte

COMMON = """
import json, os, re, sys, timm, torch, urllib.request, warnings
sys.path.insert(0, TESTS)
import mte_timm as mte, zoo
from mte_timm.cli import main
torch.manual_seed(0)
wrapped = mte.wrap(zoo.build('plain', num_classes=3), n_cls=2, n_pool=3)
arguments = {'model_args': zoo.VIT | {'num_classes': 3}}
x = torch.randn(2, 3, 32, 32)
features = wrapped.eval()(x).output

def load(name):
    return timm.create_model(f'hf-hub:{name}', pretrained=True).eval()

def fault(what):
    # the next such request fails: with this status, with None cut off, with -pid together with that process
    request = urllib.request.Request(os.environ['HF_ENDPOINT'] + '/fault', json.dumps(what).encode())
    urllib.request.urlopen(request).read()
"""
REQUESTS = ('POST repos/create', 'POST preupload', 'POST objects/batch', 'PUT lfs/', 'POST /commit/')


@pytest.fixture
def hub(tmp_path):
    """The hub, and what runs a script in a process that knows no other one; its output."""
    zoo.needs_local_dir()
    with serve() as (server, url):

        def client(script, token=TOKEN):
            env = {k: v for k, v in os.environ.items() if not k.startswith('HF_')}
            env |= {'HF_ENDPOINT': url, 'HF_HOME': str(tmp_path / 'hf'), 'HF_HUB_DISABLE_XET': '1', 'HF_TOKEN': token}
            env |= {'HF_HUB_DISABLE_TELEMETRY': '1', 'HF_HUB_DISABLE_PROGRESS_BARS': '1', 'OMP_NUM_THREADS': '1'}
            env['TMPDIR'] = str(tmp_path)  # where exports are kept that could not be uploaded
            head = f'TESTS, URL, REQUESTS = {os.path.dirname(__file__)!r}, {url!r}, {REQUESTS}' + COMMON
            done = subprocess.run(
                [sys.executable, '-W', 'ignore', '-c', head + script],
                env=env, capture_output=True, text=True, timeout=300, cwd=tmp_path,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr
            return done.stdout.strip()

        server.url = url
        yield server, client


def messages(repository):
    return {branch: [message for message, _ in commits] for branch, commits in repository.branches.items()}


def test_round_trip(hub):
    server, client = hub
    out = client("""
print(mte.push_to_hub(wrapped, 'me/vit', license='mit', commit_message='First', mean=[0.1] * 3, **arguments))
for name in ('me/vit', 'me/vit@main'):
    assert torch.equal(load(name)(x), features)
model = mte.wrap('hf-hub:me/vit', pretrained=True)  # to train on
assert torch.equal(model.eval()(x).output, features)
assert list(timm.data.resolve_model_data_config(model.backbone)['mean']) == [0.1] * 3
assert timm.create_model('hf-hub:me/vit', pretrained=True, num_classes=0)(x).shape == (2, 48)
""")
    repository = server.repositories['me/vit']
    [(message, files)] = repository.branches['main']  # one commit
    assert message == 'First' and sorted(files) == ['README.md', 'config.json', 'model.safetensors']
    assert out.startswith(f'{server.url}/me/vit/commit/') and not repository.private
    assert any(r.startswith('PUT /lfs/') for r in server.requests)
    card = files['README.md'].decode()
    head = card.split('---')[1]
    assert 'license: mit' in head and 'library_name: timm' in head and '- mte' in head
    assert 'pipeline_tag: image-classification' in head and '2 auxiliary CLS tokens' in card and '2411.15787' in card
    code = card.split('```python')[1].split('```')[0]
    client(code + 'assert output.shape == (1, 3)')  # the usage example is true


def test_the_command_pushes_and_says_the_name_that_loads(hub, tmp_path):
    server, client = hub
    folder = mte.save_pretrained(mte.wrap(zoo.build('plain'), n_cls=1), tmp_path / 'export', model_args=zoo.VIT)
    out = client("""
options = ['--private', '--license', 'apache-2.0', '--message', 'Hello']
assert main(['push', 'export', 'me/vit', *options]) == main(['push', 'export', 'me/vit', '--revision', 'v2']) == 0
assert load('me/vit').num_features == load('me/vit@v2').num_features == 48
open('export/README.md', 'w').write('# Mine')
assert main(['push', 'export', 'me/vit', '--pr']) == 0
assert main(['push', 'export', 'me/vit', '--revision', 'refs/pr/1']) == 0  # more of it
assert main(['push', '.', 'me/other']) == 1  # no export
""")
    names = re.findall(r"create_model\('hf-hub:([^']+)'", out)
    assert names == ['me/vit', 'me/vit@v2', 'me/vit', 'me/vit@refs/pr/1'] and 'once it is merged, load it' in out
    assert f'{server.url}/me/vit/commit/' in out and f'{server.url}/me/vit/discussions/1' in out
    repository = server.repositories['me/vit']
    assert [(name, len(commits)) for name, commits in repository.branches.items()] == [
        ('main', 1),
        ('v2', 2),
        ('refs/pr/1', 3),
    ]
    [(message, files)] = repository.branches['main']
    assert message == 'Hello' and repository.private and 'me/other' not in server.repositories
    assert repository.pulls == ['Add model']
    assert len([r for r in server.requests if r.startswith('PUT /lfs/')]) == 1  # the same weights are not sent again
    assert files['model.safetensors'] == (folder / 'model.safetensors').read_bytes()
    assert b'1 auxiliary CLS token,' in files['README.md'] and b'license: apache-2.0' in files['README.md']
    assert b"'hf-hub:me/vit@v2'" in repository.branches['v2'][-1][1]['README.md']
    assert repository.branches['refs/pr/1'][-1][1]['README.md'] == b'# Mine'


@pytest.mark.parametrize('how', ['403', 'None', 'killed'])
def test_an_upload_that_fails_at_any_request_commits_nothing_and_can_be_repeated(how, hub):
    server, client = hub
    out = client(
        f'HOW = {how!r}'
        + """
def push():
    fault({what: {'403': 403, 'None': None, 'killed': -os.getpid()}[HOW]})
    try:
        mte.push_to_hub(wrapped, name, **arguments)
        return 'done'  # the client repeats some requests by itself
    except OSError:
        return 'failed'

for what in REQUESTS:
    name = f'me/of-{len(what)}'
    wrapped.backbone.cls_token.data += 1  # or there is nothing to upload
    if HOW == 'killed':
        if (pid := os.fork()) == 0:
            push()
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -9, what
        outcome = 'failed'
    else:
        outcome = push()
    if outcome == 'failed':
        try:
            load(name)
        except Exception:
            mte.push_to_hub(wrapped, name, **arguments)
        else:
            raise AssertionError(what)
    assert torch.equal(load(name).cls_token, wrapped.backbone.cls_token)
    print(outcome)
"""
    )
    assert out.split() == ['failed'] * 5 or (how == 'None' and out.split().count('failed') >= 2), out
    assert all(len(repository.branches['main']) == 1 for repository in server.repositories.values())


def test_the_export_of_a_failed_upload_is_kept_and_can_be_pushed(hub, tmp_path):
    server, client = hub
    client("""
fault({'POST /commit/': 403})
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter('always')
    try:
        mte.push_to_hub(wrapped, 'me/vit', revision='v2', **arguments)
    except OSError:
        folder = re.search('the export is in (.+)', str(said[-1].message))[1]
assert main(['push', folder, 'me/elsewhere']) == 0
mte.push_to_hub(wrapped, 'me/other', **arguments)
""")
    card = server.repositories['me/elsewhere'].branches['main'][0][1]['README.md']
    assert b"'hf-hub:me/elsewhere'" in card and b'me/vit' not in card
    assert len([*tmp_path.glob('mte-timm-*')]) == 1  # nothing of what was uploaded


def test_nothing_becomes_public_unasked(hub):
    server, client = hub
    client("""
mte.push_to_hub(wrapped, 'me/public', **arguments)
try:
    mte.push_to_hub(wrapped, 'me/public', private=True, commit_message='Second', **arguments)
except ValueError as e:
    assert 'exists and is public' in str(e)
else:
    raise AssertionError('it was pushed')
""")
    assert not server.repositories['me/public'].private
    assert messages(server.repositories['me/public'])['main'] == ['Add model']
    server.private_by_default = True  # as an organization may have it
    client("""
mte.push_to_hub(wrapped, 'me/as-usual', **arguments)
mte.push_to_hub(wrapped, 'me/said', private=False, **arguments)
""")
    assert server.repositories['me/as-usual'].private and not server.repositories['me/said'].private


def test_without_a_token_nothing_is_sent(hub, tmp_path):
    server, client = hub
    mte.save_pretrained(mte.wrap(zoo.build('plain')), tmp_path / 'export', model_args=zoo.VIT)
    client("assert main(['push', 'export', 'me/vit']) == 1", token='')
    assert not server.repositories


def test_what_a_folder_says_itself_is_refused(tmp_path):
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
    with pytest.raises(ValueError, match='cannot load it'):
        mte.push_to_hub(folder, 'me/vit')


@pytest.mark.consumers
def test_transformers_loads_from_the_hub(hub):
    pytest.importorskip('transformers')
    hub[1]("""
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
""")
