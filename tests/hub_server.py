"""A small Hugging Face Hub on a local socket: repositories, branches, pull requests, LFS, downloads.

Owns what the client of huggingface_hub asks for when models are published and loaded. Knows nothing of models.
"""

import base64
import hashlib
import json
import os
import signal
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = 'hf_of_the_test'


class Repository:
    def __init__(self, private):
        self.private = private
        self.branches = {'main': []}  # of commits: (message, {path: content}), oldest first
        self.pulls = []

    def files(self, revision):
        """Of a branch or a commit, and the commit's name; None where there is no such."""
        for branch, commits in self.branches.items():
            for n in range(len(commits), -1, -1):
                if branch == revision or commit_id(commits[:n]) == revision:
                    return dict(commits[n - 1][1] if n else {}), commit_id(commits[:n])
        return None


def commit_id(commits):
    """Of the last one, from all that its branch holds."""
    seen = hashlib.sha1()
    for message, files in commits:
        seen.update(message.encode())
        for path, content in sorted(files.items()):
            seen.update(path.encode() + hashlib.sha256(content).digest())
    return seen.hexdigest()


class Hub:
    """What the server holds, and the faults that it is told to make."""

    def __init__(self):
        self.repositories = {}
        self.objects = {}  # of LFS
        self.requests = []  # method and path
        self.private_by_default = False  # what an organization has set
        # "METHOD part-of-path" -> what happens once: a status, None to cut the connection, -pid to kill who asks
        self.fail = {}
        self.lock = threading.Lock()


class Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    hub = property(lambda self: self.server.hub)

    def log_message(self, *args):
        pass

    def answer(self, content=b'', status=200, **headers):
        if isinstance(content, (dict, list)):
            headers.setdefault('Content-Type', 'application/json')
            content = json.dumps(content).encode()
        self.send_response(status)
        headers.setdefault('Content-Length', str(len(content)))
        for name, value in headers.items():
            self.send_header(name.replace('_', '-'), value)
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(content)

    def error(self, status, code, message):
        self.answer({'error': message}, status, X_Error_Code=code, X_Error_Message=message)

    def body(self):
        if self.headers.get('Transfer-Encoding', '') != 'chunked':
            return self.rfile.read(int(self.headers.get('Content-Length', 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b''.join(parts)

    def dispatch(self):
        address = urlsplit(self.path)
        path, body = unquote(address.path), self.body()
        with self.hub.lock:
            if path == '/fault':  # the next request like this fails
                self.hub.fail.update(json.loads(body))
                return self.answer()
            self.hub.requests.append(f'{self.command} {path}')
            for what in self.hub.fail:
                method, part = what.split(' ', 1)
                if method == self.command and part in path:
                    return self.make_fault(self.hub.fail.pop(what))
            known = self.headers.get('Authorization') == f'Bearer {TOKEN}'
            if self.command in ('GET', 'HEAD'):
                return self.read(path, known)
            if path.startswith('/lfs/'):  # addresses that the batch gave out
                self.hub.objects[hashlib.sha256(body).hexdigest()] = body
                return self.answer()
            if not known:
                return self.error(401, 'Unauthorized', 'Invalid credentials')
            return self.change(path, parse_qs(address.query), body)

    do_GET = do_HEAD = do_POST = do_PUT = dispatch

    def make_fault(self, status):
        if status is not None and status > 0:
            return self.error(status, 'Fault', 'a fault of the test')
        if status is not None:
            os.kill(-status, signal.SIGKILL)
        self.close_connection = True
        self.connection.close()

    def read(self, path, known):
        owner, name, *rest = path.removeprefix('/api/models').strip('/').split('/')
        name, kind, rest = f'{owner}/{name}', rest[0] if rest else '', '/'.join(rest[1:])
        repository = self.hub.repositories.get(name)
        if repository is None or (repository.private and not known):
            return self.error(401 if repository is None and not known else 404, 'RepoNotFound', 'Repository not found')
        branch = next((b for b in repository.branches if f'{rest}/'.startswith(f'{b}/')), None)  # refs/pr/1 has slashes
        revision = branch or rest.partition('/')[0] or 'main'
        found = repository.files(revision)
        if found is None:
            return self.error(404, 'RevisionNotFound', f'no revision {revision}')
        files, commit = found
        if kind == 'resolve':
            file = rest.removeprefix(f'{revision}/')
            if file not in files:
                return self.answer(b'', 404, X_Error_Code='EntryNotFound', X_Repo_Commit=commit)
            etag = f'"{hashlib.sha256(files[file]).hexdigest()}"'
            return self.answer(files[file], ETag=etag, X_Repo_Commit=commit, Accept_Ranges='bytes')
        if kind == 'tree':
            return self.answer([{'type': 'file', 'path': p, 'size': len(c), 'oid': 'x'} for p, c in files.items()])
        about = {'id': name, 'modelId': name, 'private': repository.private, 'sha': commit, 'tags': []}
        return self.answer({**about, 'downloads': 0, 'likes': 0, 'siblings': [{'rfilename': p} for p in files]})

    def change(self, path, query, body):
        hub = self.hub
        if path == '/api/repos/create':
            return self.create(json.loads(body))
        if path.endswith('.git/info/lfs/objects/batch'):
            objects = json.loads(body)['objects']
            for wanted in objects:
                if wanted['oid'] not in hub.objects:
                    wanted['actions'] = {'upload': {'href': f'{self.server.url}/lfs/{wanted["oid"]}'}}
            return self.answer({'transfer': 'basic', 'objects': objects})
        if path == '/api/validate-yaml':
            return self.answer({'errors': [], 'warnings': []})
        owner, name, kind, revision = path.removeprefix('/api/models/').split('/', 3)
        repository = hub.repositories.get(f'{owner}/{name}')
        if repository is None:
            return self.error(404, 'RepoNotFound', 'Repository not found')
        if kind == 'branch':
            if revision.startswith('refs/') or revision in repository.branches:
                return self.error(409, 'Conflict', f'reference {revision} exists already, or is no name for a branch')
            repository.branches[revision] = list(repository.branches['main'])
            return self.answer({})
        if revision not in repository.branches:
            return self.error(404, 'RevisionNotFound', f'no revision {revision}')
        if kind == 'preupload':
            paths = [f['path'] for f in json.loads(body)['files']]
            modes = ('lfs' if p.endswith('.safetensors') else 'regular' for p in paths)
            said = [{'path': p, 'uploadMode': mode, 'shouldIgnore': False} for p, mode in zip(paths, modes)]
            return self.answer({'files': said})
        assert kind == 'commit', path
        return self.commit(f'{owner}/{name}', repository, revision, query, body)

    def create(self, asked):
        name = f'{asked.get("organization") or "me"}/{asked["name"]}'
        if name in self.hub.repositories:
            return self.answer({'error': 'You already created it', 'url': f'{self.server.url}/{name}'}, 409)
        said = asked.get('visibility') or {True: 'private', False: 'public'}.get(asked.get('private'))
        private = said == 'private' or (said is None and self.hub.private_by_default)
        self.hub.repositories[name] = Repository(private)
        return self.answer({'url': f'{self.server.url}/{name}', 'name': name, 'id': name})

    def commit(self, name, repository, revision, query, body):
        files, message = repository.files(revision)[0], ''
        for line in map(json.loads, body.splitlines()):
            value = line['value']
            if line['key'] == 'header':
                message = value['summary']
            elif line['key'] == 'file':
                files[value['path']] = base64.b64decode(value['content'])
            elif line['key'] == 'lfsFile':
                files[value['path']] = self.hub.objects[value['oid']]
        target, pull = revision, None
        if query.get('create_pr') == ['1']:
            repository.pulls.append(message)
            target = f'refs/pr/{len(repository.pulls)}'
            pull = f'{self.server.url}/{name}/discussions/{len(repository.pulls)}'
            repository.branches[target] = list(repository.branches[revision])
        repository.branches[target].append((message, files))
        commit = commit_id(repository.branches[target])
        url = f'{self.server.url}/{name}/commit/{commit}'
        return self.answer({'success': True, 'commitOid': commit, 'commitUrl': url, 'pullRequestUrl': pull})


@contextmanager
def serve():
    """A hub, and the address for HF_ENDPOINT."""
    server = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    server.daemon_threads = True
    server.url, server.hub = f'http://127.0.0.1:{server.server_address[1]}', Hub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server.hub, server.url
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
