"""A server that speaks the Hugging Face hub's HTTP protocol, as far as `huggingface_hub` needs it to create
repositories, commit files (plain, or by Git LFS), and read them: the API, `resolve` with its headers, and a store of
large files."""
import base64, hashlib, json, re, threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from urllib.parse import unquote, urlsplit

REPO = r'(?P<repo>[\w.-]+/[\w.-]+)'
ROUTES = [
    ('POST', '/api/repos/create', 'create'),
    ('POST', '/api/validate-yaml', 'validate'),
    ('GET', f'/api/models/{REPO}(/revision/(?P<revision>[^/]+))?', 'info'),
    ('GET', f'/api/models/{REPO}/tree/(?P<revision>[^/]+)', 'tree'),
    ('POST', f'/api/models/{REPO}/preupload/(?P<revision>[^/]+)', 'preupload'),
    ('POST', f'/{REPO}.git/info/lfs/objects/batch', 'batch'),
    ('PUT', '/store/(?P<oid>[0-9a-f]{64})', 'put'),
    ('POST', '/verify/(?P<oid>[0-9a-f]{64})', 'verify'),
    ('POST', f'/api/models/{REPO}/commit/(?P<revision>[^/]+)', 'commit'),
    ('GET', f'/{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)', 'resolve'),
    ('GET', '/store/(?P<oid>[0-9a-f]{64})', 'get'),
]

def sha256(raw): return hashlib.sha256(raw).hexdigest()
def blob_id(raw): return hashlib.sha1(b'blob %d\0' % len(raw) + raw).hexdigest()

class Refused(Exception):
    "An answer with an error, as the hub words it."
    def __init__(self, status, code, message):
        self.status = status
        self.headers = {'X-Error-Code':code, 'X-Error-Message':message}
        super().__init__(message)

class Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'

    def answer(self):
        hub = self.server.hub
        path = unquote(urlsplit(self.path).path)
        self.body = self.rfile.read(int(self.headers.get('Content-Length') or 0))
        wanted = 'GET' if self.command=='HEAD' else self.command
        hub.requests.append((self.command, path, self.headers.get('Range')))
        for method,pattern,name in ROUTES:
            found = re.fullmatch(pattern, path)
            if not found or method!=wanted: continue
            try: return getattr(self, name)(hub, **found.groupdict())
            except Refused as error: return self.send(error.status, {'error':str(error)}, error.headers)
        self.send(404, {'error':f'no {self.command} {path}'})

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def send(self, status, content=b'', headers=(), cut=None):
        raw = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name,value in dict(headers).items(): self.send_header(name, value)
        self.send_header('Content-Length', len(raw))
        self.end_headers()
        if self.command!='HEAD': self.wfile.write(raw[:cut])
        if cut is not None: self.close_connection = True

    def log_message(self, *args): pass

    # ---- who may do what

    def user(self): return self.server.hub.tokens.get((self.headers.get('Authorization') or '').removeprefix('Bearer '))

    def repository(self, hub, repo, write=False):
        "A repository that the user may see, or change."
        found = hub.repos.get(repo)
        owner = repo.split('/')[0]
        if found is None or found.private and self.user()!=owner:
            raise Refused(401 if self.user() is None else 404, 'RepoNotFound', 'Repository not found')
        if write and self.user()!=owner: raise Refused(403, 'Forbidden', f'You cannot write to {repo}')
        return found

    # ---- repositories

    def create(self, hub):
        wanted = json.loads(self.body)
        if self.user() is None: raise Refused(401, 'Unauthorized', 'Invalid username or password.')
        repo = f"{wanted.get('organization') or self.user()}/{wanted['name']}"
        if repo.split('/')[0]!=self.user(): raise Refused(403, 'Forbidden', f'You cannot create {repo}')
        url = dict(url=f'{hub.address}/{repo}', id=repo)
        if repo in hub.repos: return self.send(409, url | {'error':'You already created this model repo'})
        private = wanted.get('private') or wanted.get('visibility')=='private'
        hub.repos[repo] = SimpleNamespace(private=bool(private), files={}, commits=['0'*40])
        self.send(200, url)

    def validate(self, hub): self.send(200, dict(warnings=[], errors=[]))

    def info(self, hub, repo, revision=None):
        found = self.repository(hub, repo)
        siblings = [dict(rfilename=name) for name in found.files]
        self.send(200, dict(id=repo, modelId=repo, sha=found.commits[-1], private=found.private, siblings=siblings,
                            tags=[], downloads=0, likes=0))

    def tree(self, hub, repo, revision):
        found = self.repository(hub, repo)
        entries = []
        for path,file in found.files.items():
            entry = dict(type='file', path=path, size=len(file.raw), oid=blob_id(file.raw))
            if file.large: entry['lfs'] = dict(oid=sha256(file.raw), size=len(file.raw), pointerSize=130)
            entries.append(entry)
        self.send(200, entries)

    # ---- a commit

    def preupload(self, hub, repo, revision):
        self.repository(hub, repo, write=True)
        files = json.loads(self.body)['files']
        modes = {True:'lfs', False:'regular'}
        self.send(200, dict(files=[dict(path=file['path'], shouldIgnore=False,
                                        uploadMode=modes[file['path'].endswith('.safetensors')]) for file in files]))

    def batch(self, hub, repo):
        self.repository(hub, repo, write=True)
        objects = []
        for wanted in json.loads(self.body)['objects']:
            steps = dict(upload='store', verify='verify')
            actions = {step: dict(href=f"{hub.address}/{place}/{wanted['oid']}") for step,place in steps.items()}
            known = dict(oid=wanted['oid'], size=wanted['size'])
            objects.append(known if wanted['oid'] in hub.store else known | dict(actions=actions))
        self.send(200, dict(transfer='basic', objects=objects))

    def put(self, hub, oid):
        hub.store[oid] = self.body
        self.send(200)

    def verify(self, hub, oid):
        if sha256(hub.store.get(oid, b''))!=oid: raise Refused(422, 'Invalid', 'not the file of that digest')
        self.send(200, {})

    def commit(self, hub, repo, revision):
        found = self.repository(hub, repo, write=True)
        for line in map(json.loads, self.body.decode().splitlines()):
            value = line['value']
            if line['key']=='file':
                found.files[value['path']] = SimpleNamespace(raw=base64.b64decode(value['content']), large=False)
            if line['key']=='lfsFile':
                found.files[value['path']] = SimpleNamespace(raw=hub.store[value['oid']], large=True)
        found.commits.append(sha256(self.body)[:40])
        url = f'{hub.address}/{repo}/commit/{found.commits[-1]}'
        self.send(200, dict(success=True, commitOid=found.commits[-1], commitUrl=url, hookOutput=''))

    # ---- reading

    def resolve(self, hub, repo, revision, path):
        found = self.repository(hub, repo)
        commit = {'X-Repo-Commit':found.commits[-1]}
        if path not in found.files: raise Refused(404, 'EntryNotFound', 'Entry not found')
        file = found.files[path]
        if not file.large: return self.send(200, file.raw, commit | {'ETag':f'"{blob_id(file.raw)}"'})
        linked = {'X-Linked-Etag':f'"{sha256(file.raw)}"', 'X-Linked-Size':str(len(file.raw))}
        hub.store[sha256(file.raw)] = file.raw
        self.send(302, b'', commit | linked | {'Location':f'{hub.elsewhere}/store/{sha256(file.raw)}'})

    def get(self, hub, oid):
        if 'Authorization' in self.headers: raise Refused(400, 'Leak', 'a token was sent to the store of large files')
        raw = hub.store[oid]
        start = int((self.headers.get('Range') or 'bytes=0-').removeprefix('bytes=').split('-')[0])
        cut = hub.cuts.pop(0) if hub.cuts else None
        ranges = {'Content-Range':f'bytes {start}-{len(raw)-1}/{len(raw)}'} if start else {}
        self.send(206 if start else 200, raw[start:], ranges | {'ETag':f'"{oid}"'}, cut)

@contextmanager
def hub_server(**tokens):
    """Gives `address`, `repos`, `requests`, and `cuts`: bytes after which the next large files end. These lie on
    another host, as on the hub, which must not see a token. `tokens`: of each user."""
    server = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    port = server.server_port
    server.hub = SimpleNamespace(address=f'http://127.0.0.1:{port}', elsewhere=f'http://localhost:{port}', repos={}, store={}, requests=[],
                                 cuts=[], tokens={token: user for user,token in tokens.items()})
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try: yield server.hub
    finally:
        server.shutdown()
        server.server_close()
