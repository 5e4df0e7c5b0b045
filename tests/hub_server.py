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
        for commits in self.branches.values():
            for i, (_, files) in enumerate(commits):
                if oid(commits[: i + 1]) == revision:
                    return files
        commits = self.branches.get(revision)
        return None if commits is None else dict(commits[-1][1] if commits else {})


def oid(commits):
    """Of a branch, from all that it holds."""
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
        self.private_by_default = False  # what an organisation has set
        # "METHOD part-of-path" -> what happens once: a status, None to cut the connection, -pid to kill who asks
        self.fail = {}
        self.lock = threading.Lock()

    def fault(self, method, path):
        for what in list(self.fail):
            wanted, part = what.split(' ', 1)
            if wanted == method and part in path:
                return what, self.fail.pop(what)
        return None, 0


class Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'

    @property
    def hub(self):
        return self.server.hub

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
        if self.headers.get('Transfer-Encoding', '') == 'chunked':
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b''.join(parts)
        return self.rfile.read(int(self.headers.get('Content-Length', 0)))

    def dispatch(self):
        address = urlsplit(self.path)
        path, query = unquote(address.path), parse_qs(address.query)
        body = self.body()
        with self.hub.lock:
            if path == '/fault':  # the next request like this fails
                self.hub.fail.update(json.loads(body))
                return self.answer()
            self.hub.requests.append(f'{self.command} {path}')
            what, status = self.hub.fault(self.command, path)
            if what is not None:
                if status is not None and status < 0:
                    os.kill(-status, signal.SIGKILL)
                if status is None or status < 0:
                    self.close_connection = True
                    self.connection.close()
                    return None
                return self.error(status, 'Fault', 'a fault of the test')
            known = self.headers.get('Authorization') == f'Bearer {TOKEN}'
            if self.command in ('GET', 'HEAD'):
                return self.read(path, known)
            if path.startswith('/lfs/'):  # addresses that the batch gave out
                return self.store(path.removeprefix('/lfs/'), body)
            return self.change(path, query, body) if known else self.error(401, 'Unauthorized', 'Invalid credentials')

    do_GET = do_HEAD = do_POST = do_PUT = dispatch

    def read(self, path, known):
        name, kind, rest = self.split(path)
        repository = self.hub.repositories.get(name)
        if repository is None or (repository.private and not known):
            return self.error(401 if repository is None and not known else 404, 'RepoNotFound', 'Repository not found')
        if kind == 'resolve':
            revision, file = self.revision_of(repository, rest)
            files = repository.files(revision)
            if files is None:
                return self.error(404, 'RevisionNotFound', f'no revision {revision}')
            commit = revision if revision not in repository.branches else oid(repository.branches[revision])
            if file not in files:
                return self.answer(b'', 404, X_Error_Code='EntryNotFound', X_Repo_Commit=commit)
            content = files[file]
            etag = f'"{hashlib.sha256(content).hexdigest()}"'
            return self.answer(content, ETag=etag, X_Repo_Commit=commit, Accept_Ranges='bytes')
        revision = rest.removeprefix('revision/') or 'main'
        files = repository.files(revision)
        if files is None:
            return self.error(404, 'RevisionNotFound', f'no revision {revision}')
        if kind == 'tree':
            return self.answer([{'type': 'file', 'path': p, 'size': len(c), 'oid': 'x'} for p, c in files.items()])
        sha = revision if revision not in repository.branches else oid(repository.branches[revision])
        return self.answer(
            {'id': name, 'modelId': name, 'private': repository.private, 'sha': sha, 'tags': [],
             'downloads': 0, 'likes': 0, 'siblings': [{'rfilename': p} for p in files]}
        )  # fmt: skip

    @staticmethod
    def split(path):
        """Name of the repository, what is asked of it, and the rest."""
        parts = path.removeprefix('/api/models').strip('/').split('/')
        name, rest = '/'.join(parts[:2]), parts[2:]
        if not path.startswith('/api/') or (rest and rest[0] == 'tree'):
            return name, rest[0], '/'.join(rest[1:])
        return name, '', '/'.join(rest)

    @staticmethod
    def revision_of(repository, rest):
        for revision in sorted(repository.branches, key=len, reverse=True):  # refs/pr/1 has slashes
            if rest.startswith(revision + '/'):
                return revision, rest.removeprefix(revision + '/')
        revision, _, file = rest.partition('/')
        return revision, file

    def store(self, name, body):
        if hashlib.sha256(body).hexdigest() != name:
            return self.error(400, 'BadRequest', 'not what was announced')
        self.hub.objects[name] = body
        return self.answer()

    def change(self, path, query, body):
        hub = self.hub
        if path == '/api/repos/create':
            asked = json.loads(body)
            name = f'{asked.get("organization") or "me"}/{asked["name"]}'
            said = asked.get('visibility') or {True: 'private', False: 'public'}.get(asked.get('private'))
            private = said == 'private' or (said is None and hub.private_by_default)
            if name in hub.repositories:
                return self.answer(
                    {'error': 'You already created this model repo', 'url': f'{self.server.url}/{name}'}, 409
                )
            hub.repositories[name] = Repository(private)
            return self.answer({'url': f'{self.server.url}/{name}', 'name': name, 'id': name})
        if path.endswith('.git/info/lfs/objects/batch'):

            def action(wanted):
                if wanted['oid'] in hub.objects:
                    return wanted
                return {**wanted, 'actions': {'upload': {'href': f'{self.server.url}/lfs/{wanted["oid"]}'}}}

            objects = [action(o) for o in json.loads(body)['objects']]
            return self.answer({'transfer': 'basic', 'objects': objects})
        if path == '/api/validate-yaml':
            return self.answer({'errors': [], 'warnings': []})
        owner, name, kind, revision = path.removeprefix('/api/models/').split('/', 3)
        repository = hub.repositories.get(f'{owner}/{name}')
        if repository is None:
            return self.error(404, 'RepoNotFound', 'Repository not found')
        if kind == 'branch':
            if revision.startswith('refs/'):
                return self.error(400, 'BadRequest', f'{revision} is no name for a branch')
            if revision in repository.branches:
                return self.error(409, 'Conflict', f'reference {revision} exists already')
            repository.branches[revision] = list(repository.branches['main'])
            return self.answer({})
        if revision not in repository.branches:
            return self.error(404, 'RevisionNotFound', f'no revision {revision}')
        if kind == 'preupload':

            def mode(path):
                return 'lfs' if path.endswith('.safetensors') else 'regular'

            files = json.loads(body)['files']
            return self.answer(
                {'files': [{'path': f['path'], 'uploadMode': mode(f['path']), 'shouldIgnore': False} for f in files]}
            )
        assert kind == 'commit', path
        return self.commit(f'{owner}/{name}', repository, revision, query, body)

    def commit(self, name, repository, revision, query, body):
        lines = [json.loads(line) for line in body.splitlines()]
        files, message = repository.files(revision), ''
        for line in lines:
            value = line['value']
            if line['key'] == 'header':
                message = value['summary']
            elif line['key'] == 'file':
                files[value['path']] = base64.b64decode(value['content'])
            elif line['key'] == 'lfsFile':
                if value['oid'] not in self.hub.objects:
                    return self.error(400, 'BadRequest', f'{value["path"]} was not uploaded')
                files[value['path']] = self.hub.objects[value['oid']]
        target, pull = revision, None
        if query.get('create_pr') == ['1']:
            repository.pulls.append(message)
            target, pull = (
                f'refs/pr/{len(repository.pulls)}',
                f'{self.server.url}/{name}/discussions/{len(repository.pulls)}',
            )
            repository.branches[target] = list(repository.branches[revision])
        repository.branches[target].append((message, files))
        commit = oid(repository.branches[target])
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
