"Execute notebooks, one fresh kernel each. Outputs are kept, nbdev's directives honoured, and two runs write the same bytes."
import argparse, os, re, sys, time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from multiprocessing import get_context, set_start_method
from pathlib import Path
from traceback import format_exception
import nbformat
from execnb.shell import CaptureShell
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbdev.clean import nbdev_clean
from nbdev.config import get_config
from nbdev.doclinks import nbglob

def directives(src):
    "The `#| name: value` lines that open a cell, as a dict."
    found = {}
    for line in filter(str.strip, src.splitlines()):
        if not (m := re.match(r'\s*#\s*\|\s*([^:\s]+)\s*:?\s*(.*)', line)): break
        found[m[1]] = m[2].strip().lower()
    return found

def is_left(src, skip):
    "Whether a cell is not run: it says `eval: false`, carries a flag of `skip`, or exports."
    d = directives(src)
    return d.get('eval')=='false' or bool(skip & d.keys()) or 'nbdev_export(' in src

class Client(NotebookClient):
    "Leaves such a cell with the outputs it has."
    skip = frozenset()
    async def async_execute_cell(self, cell, cell_index, **kw):
        if is_left(cell.source, self.skip): return cell
        return await super().async_execute_cell(cell, cell_index, **kw)

def is_noise(o):
    "Progress bars and warnings: ids and paths that differ from run to run."
    return 'application/vnd.jupyter.widget-view+json' in o.get('data', {}) or o.get('name')=='stderr'

def run(path, skip=(), timeout=600):
    "Execute one notebook; gives `(path, seconds, error or None)`. Nothing is written after an error."
    nb,start = nbformat.read(path, 4),time.time()
    client = Client(nb, kernel_name='python3', timeout=timeout, record_timing=False, store_widget_state=False,
                    coalesce_streams=True, extra_arguments=['--IPKernelApp.log_level=ERROR'], resources=dict(metadata=dict(path=str(Path(path).parent))))
    client.skip = frozenset(skip)
    try: client.execute()
    except (CellExecutionError, RuntimeError, TimeoutError) as e: return path, time.time()-start, str(e)
    for c in nb.cells:
        if c.cell_type=='code': c.outputs = [o for o in c.outputs if not is_noise(o)]
    nbformat.write(nb, path)
    nbdev_clean.__wrapped__(path)
    return path, time.time()-start, None

PRELOAD = ['run_nbs', 'fastldm.recipes', 'fastldm.stable', 'diffusers', 'transformers.models.blip.modeling_blip', 'seaborn', 'lpips', 'torch_fidelity', 'sklearn.manifold', 'nbdev.showdoc']

def _cells(path, skip, report):
    "Runs in a process of its own: the cells of a notebook, up to the first error, which is reported."
    set_start_method(None, force=True)          # a notebook's own workers start as they would in a kernel
    os.chdir(Path(path).parent)
    shell = CaptureShell(mpl_format='png')
    for c in nbformat.read(Path(path).name, 4).cells:
        if c.cell_type!='code' or is_left(c.source, skip): continue
        shell.run(c.source)
        if shell.exc: return report.send(f"{path}\n{c.source}\n\n{''.join(format_exception(shell.exc))}")
    report.send(None)

def check(path, skip=(), timeout=600):
    """Like `run`, but nothing is written, in a process forked from one that has imported `PRELOAD` already: imports are half
    of what most notebooks cost. Environment variables are those of the first call."""
    start,ctx = time.time(),get_context('forkserver')
    ctx.set_forkserver_preload(PRELOAD)
    ours,theirs = ctx.Pipe(duplex=False)
    p = ctx.Process(target=_cells, args=(path, frozenset(skip), theirs)); p.start(); theirs.close()
    try: error = ours.recv() if ours.poll(timeout) else f'{path}: not done after {timeout} seconds'
    except EOFError: p.join(); error = f'{path}: its process ended with {p.exitcode}'
    p.join(0 if error else 10); p.kill(); p.join()
    return path, time.time()-start, error

def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('nbs', nargs='*', help='notebooks; all of them if none is given')
    p.add_argument('--flags', default='', help='run the cells with these flags too, e.g. "slow net"')
    p.add_argument('--check', action='store_true', help='execute only: leave the files as they are')
    p.add_argument('--timeout', type=int, default=600, help='seconds a cell may take, with --check a notebook')
    p.add_argument('-j', type=int, default=1, help='notebooks at a time; set OMP_NUM_THREADS=1 with it')
    a = p.parse_args()
    skip = set(get_config().tst_flags.split()) - set(a.flags.split())
    one = partial(check if a.check else run, skip=skip, timeout=a.timeout)
    n = bad = 0
    with ThreadPoolExecutor(a.j) as pool:
        for path,secs,err in pool.map(one, a.nbs or sorted(nbglob())):
            n,bad = n+1,bad+bool(err)
            print(f"{'FAIL' if err else 'ok  '} {secs:6.1f}s {path}", flush=True)
            if err: print(err, file=sys.stderr, flush=True)
    print(f'{n-bad} passed, {bad} failed')
    return bad>0

if __name__=='__main__': sys.exit(main())
