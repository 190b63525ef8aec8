"Execute notebooks, one fresh kernel each. Outputs are kept, nbdev's directives honoured, and two runs write the same bytes."
import argparse, json, os, re, subprocess, sys, time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from queue import SimpleQueue
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

PRELOAD = ['fastldm.recipes', 'fastldm.control.stable', 'diffusers', 'transformers.models.blip.modeling_blip', 'seaborn', 'lpips', 'torch_fidelity', 'sklearn.manifold', 'nbdev.showdoc']

def _cells(path, skip, report):
    "The cells of a notebook, up to the first error, which is reported."
    os.chdir(Path(path).parent)
    shell = CaptureShell(mpl_format='png')
    for c in nbformat.read(Path(path).name, 4).cells:
        if c.cell_type!='code' or is_left(c.source, skip): continue
        shell.run(c.source)
        if shell.exc: return report.send(f"{path}\n{c.source}\n\n{''.join(format_exception(shell.exc))}")
    report.send(None)

def _in_fork(path, skip, timeout):
    "What `_cells` reports, of a process of its own."
    ctx = get_context('fork')
    ours,theirs = ctx.Pipe(duplex=False)
    p = ctx.Process(target=_cells, args=(path, frozenset(skip), theirs)); p.start(); theirs.close()
    try: error = ours.recv() if ours.poll(timeout) else f'{path}: not done after {timeout} seconds'
    except EOFError: p.join(); error = f'{path}: its process ended with {p.exitcode}'
    p.join(0 if error else 10); p.kill(); p.join()
    return error

def serve():
    "Reads `[path, skip, timeout]`, a line each, and answers with the error or null. What notebooks print goes to stderr."
    answers = os.fdopen(os.dup(1), 'w'); os.dup2(2, 1)
    for m in PRELOAD: import_module(m)
    for line in sys.stdin: print(json.dumps(_in_fork(*json.loads(line))), file=answers, flush=True)

@contextmanager
def checker():
    """Gives `check`, which is like `run`, but writes nothing, and executes in a fork of a process that has imported `PRELOAD`
    already: imports are half of what most notebooks cost. That process has the environment variables of this moment."""
    with subprocess.Popen([sys.executable, __file__, '--serve'], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        def check(path, skip=(), timeout=600):
            start = time.time()
            print(json.dumps([str(path), sorted(skip), timeout]), file=server.stdin, flush=True)
            error = json.loads(server.stdout.readline())
            return path, time.time()-start, error
        yield check

def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('nbs', nargs='*', help='notebooks; all of them if none is given')
    p.add_argument('--flags', default='', help='run the cells with these flags too, e.g. "slow net"')
    p.add_argument('--check', action='store_true', help='execute only: leave the files as they are')
    p.add_argument('--timeout', type=int, default=600, help='seconds a cell may take, with --check a notebook')
    p.add_argument('-j', type=int, default=1, help='notebooks at a time; set OMP_NUM_THREADS=1 with it')
    p.add_argument('--serve', action='store_true', help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.serve: return serve()
    skip = set(get_config().tst_flags.split()) - set(a.flags.split())
    n = bad = 0
    with ExitStack() as stack, ThreadPoolExecutor(a.j) as pool:
        free = SimpleQueue()
        for _ in range(a.j): free.put(stack.enter_context(checker()) if a.check else run)
        def one(path):
            executes = free.get()
            try: return executes(path, skip, a.timeout)
            finally: free.put(executes)
        for path,secs,err in pool.map(one, a.nbs or sorted(nbglob())):
            n,bad = n+1,bad+bool(err)
            print(f"{'FAIL' if err else 'ok  '} {secs:6.1f}s {path}", flush=True)
            if err: print(err, file=sys.stderr, flush=True)
    print(f'{n-bad} passed, {bad} failed')
    return bad>0

if __name__=='__main__': sys.exit(main())
