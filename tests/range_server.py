"A web server of a folder, for the tests of downloads: ranges, answers that end early, are slow, or are wrong."
import threading, time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        way = self.server.way
        file = way.root/self.path.lstrip('/')
        if not file.is_file(): return self.send_error(404)
        raw = way.change(file.read_bytes())
        wanted = self.headers.get('Range') if way.ranges else None
        start = int(wanted.removeprefix('bytes=').rstrip('-')) if wanted else 0
        if start>=len(raw): return self.send_error(416)
        part = raw[start:]
        if way.limits: part = part[:way.limits.pop(0)]
        way.served.append((self.path, start, len(part)))
        self.send_response(206 if wanted else 200)
        self.send_header('Content-Length', len(raw)-start)
        self.end_headers()
        for i in range(0, len(part), 2**16):
            try: self.wfile.write(part[i:i+2**16])
            except OSError: return
            time.sleep(way.pause)
    def log_message(self, *args): pass

def same(raw): return raw

@contextmanager
def serve(root, ranges=True):
    """Gives `address`, `served` (path, first byte and number of bytes of each answer), and what can be set: `limits`,
    bytes after which the next answers end; `pause`, seconds after each 64 KiB; `change`, of a file's bytes."""
    way = SimpleNamespace(root=Path(root), ranges=ranges, limits=[], pause=0., change=same, served=[])
    server = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    server.way = way
    way.address = f'http://127.0.0.1:{server.server_port}'
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try: yield way
    finally:
        server.shutdown()
        server.server_close()
