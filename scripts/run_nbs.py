"Execute notebooks in place, one fresh kernel each; keep outputs; honour nbdev directives; write nbdev-clean JSON."
import argparse, re, sys, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbdev.config import get_config
from nbdev.clean import nbdev_clean
DIR = re.compile(r'^\s*#\s*\|\s*([^:\s]+)\s*:?\s*(.*)$')
WIDGET = 'application/vnd.jupyter.widget-view+json'
def directives(src):
    d = {}
    for l in src.splitlines():
        if m := DIR.match(l): d[m[1]] = m[2].strip()
        elif l.strip(): break
    return d
class Client(NotebookClient):
    skip = frozenset()
    async def async_execute_cell(self, cell, cell_index, **kw):
        if cell.cell_type == 'code':
            d = directives(cell.source)
            if d.get('eval', '').lower() == 'false' or self.skip & d.keys() or 'nbdev_export(' in cell.source:
                return cell                                   # a skipped cell keeps its stored outputs
        return await super().async_execute_cell(cell, cell_index, **kw)
def noise(o): return WIDGET in o.get('data', {}) or (o.output_type == 'stream' and o.name == 'stderr')
def run(path, skip, timeout):
    nb = nbformat.read(path, 4); t = time.time(); err = None
    cl = Client(nb, kernel_name='python3', timeout=timeout, record_timing=False, store_widget_state=False,
                coalesce_streams=True, resources={'metadata': {'path': str(Path(path).parent)}})
    cl.skip = frozenset(skip)
    try: cl.execute()
    except (CellExecutionError, RuntimeError, TimeoutError) as e: err = str(e)   # cell time-outs are TimeoutError
    for c in nb.cells:
        if c.cell_type == 'code': c.outputs = [o for o in c.outputs if not noise(o)]
    if err is None: nbformat.write(nb, path); nbdev_clean.__wrapped__(path)
    return path, time.time()-t, err
if __name__ == '__main__':
    p = argparse.ArgumentParser(); p.add_argument('nbs', nargs='*'); p.add_argument('--flags', default='')
    p.add_argument('--timeout', type=int, default=600); p.add_argument('-j', type=int, default=1)
    a = p.parse_args(); cfg = get_config(); skip = set(cfg.tst_flags.split()) - set(a.flags.split())
    root = cfg.nbs_path
    nbs = a.nbs or sorted(str(f) for f in root.glob('**/*.ipynb') if not any(q[0] in '._' for q in f.relative_to(root).parts))
    with ThreadPoolExecutor(a.j) as ex: res = list(ex.map(lambda f: run(f, skip, a.timeout), nbs))
    for f, t, e in res:
        print(f"{'FAIL' if e else 'ok  '} {t:6.1f}s {f}")
        if e: print(e, file=sys.stderr)
    bad = sum(bool(e) for *_, e in res); print(f'{len(res)-bad} passed, {bad} failed'); sys.exit(bad > 0)
