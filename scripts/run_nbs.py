"Execute notebooks, one fresh kernel each, and store their outputs. Two runs write the same bytes."
import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
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

# ---- which cells are run

def directives(src):
    "The `#| name: value` lines that open a cell, as a dict."
    found = {}
    for line in filter(str.strip, src.splitlines()):
        match = re.match(r'\s*#\s*\|\s*([^:\s]+)\s*:?\s*(.*)', line)
        if not match: break
        name, value = match.groups()
        found[name] = value.strip().lower()
    return found

def is_left(src, skip):
    "Whether a cell is not run: it has `eval: false` or a flag of `skip`, or it exports."
    found = directives(src)
    return found.get('eval')=='false' or bool(skip & found.keys()) or 'nbdev_export(' in src

def environment(flags):
    """Sets what a notebook may depend on, for this process and its kernels.
    Cells that ask `should_run` run with `flags`, pictures are drawn into the notebook, and on one thread
    sums have one order, so that two runs give the same bytes."""
    os.environ['FASTLDM_RUN'] = ' '.join(flags)
    os.environ['MPLBACKEND'] = 'module://matplotlib_inline.backend_inline'
    os.environ['OMP_NUM_THREADS'] = '1'
    os.environ['PYTHONHASHSEED'] = '0'


# ---- execute and store

class Client(NotebookClient):
    "Leaves such a cell with the outputs it has."
    skip = frozenset()
    async def async_execute_cell(self, cell, cell_index, **kw):
        if is_left(cell.source, self.skip): return cell
        return await super().async_execute_cell(cell, cell_index, **kw)

def is_noise(output):
    "Progress bars and warnings: ids and paths that differ from run to run."
    is_widget = 'application/vnd.jupyter.widget-view+json' in output.get('data', {})
    return is_widget or output.get('name')=='stderr'

def run(path, skip=(), timeout=600):
    "Execute one notebook; gives `(path, seconds, error or None)`. Nothing is written after an error."
    start = time.time()
    nb = nbformat.read(path, 4)
    here = dict(metadata=dict(path=str(Path(path).parent)))
    client = Client(nb, kernel_name='python3', timeout=timeout, resources=here, record_timing=False,
                    store_widget_state=False, coalesce_streams=True, extra_arguments=['--IPKernelApp.log_level=ERROR'])
    client.skip = frozenset(skip)
    try: client.execute()
    except (CellExecutionError, RuntimeError, TimeoutError) as error: return path, time.time()-start, str(error)
    for cell in nb.cells:
        if cell.cell_type=='code': cell.outputs = [o for o in cell.outputs if not is_noise(o)]
    nbformat.write(nb, path)
    nbdev_clean.__wrapped__(path)
    return path, time.time()-start, None


# ---- execute only, in forks of one process that has imported the slow packages

PRELOAD = ['fastldm.recipes', 'fastldm.control.stable', 'diffusers', 'transformers.models.blip.modeling_blip',
           'seaborn', 'lpips', 'torch_fidelity', 'sklearn.manifold', 'nbdev.showdoc']

def _run_cells(path, skip, report):
    "Runs a notebook up to the first error, which is reported; None is reported at the end."
    os.chdir(Path(path).parent)
    shell = CaptureShell(mpl_format='png')
    for cell in nbformat.read(Path(path).name, 4).cells:
        if cell.cell_type!='code' or is_left(cell.source, skip): continue
        shell.run(cell.source)
        if not shell.exc: continue
        trace = ''.join(format_exception(shell.exc))
        return report.send(f'{path}\n{cell.source}\n\n{trace}')
    report.send(None)

def _in_fork(path, skip, timeout):
    "What `_run_cells` reports in a process of its own, which is ended after `timeout` seconds."
    context = get_context('fork')
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_run_cells, args=(path, frozenset(skip), theirs))
    process.start()
    theirs.close()                                          # so that the end of the process closes the pipe
    try: error = ours.recv() if ours.poll(timeout) else f'{path}: not done after {timeout} seconds'
    except EOFError:
        process.join()
        error = f'{path}: its process ended with {process.exitcode}'
    process.join(0 if error else 10)
    process.kill()
    process.join()
    return error

def serve():
    "Reads `[path, skip, timeout]`, a line each, and answers with the error or null. Prints go to stderr."
    answers = os.fdopen(os.dup(1), 'w')
    os.dup2(2, 1)
    signal.signal(signal.SIGINT, signal.default_int_handler)               # a shell ignores it in the background
    for module in PRELOAD: import_module(module)
    for line in sys.stdin:
        error = _in_fork(*json.loads(line))
        print(json.dumps(error), file=answers, flush=True)

@contextmanager
def checker():
    """Gives `check`, which is like `run`, but writes nothing, and executes in a fork of a process that has imported
    `PRELOAD` already: imports are half of what most notebooks cost. That process has the environment of this moment."""
    command = [sys.executable, __file__, '--serve']
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        def check(path, skip=(), timeout=1800):
            start = time.time()
            print(json.dumps([str(path), sorted(skip), timeout]), file=server.stdin, flush=True)
            error = json.loads(server.stdout.readline())
            return path, time.time()-start, error
        yield check

# ---- command line

def arguments():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('nbs', nargs='*', help='notebooks; all of them if none is given')
    p.add_argument('--flags', default='', help='run the cells with these flags too, e.g. "slow net"')
    p.add_argument('--check', action='store_true', help='execute only: leave the files as they are')
    p.add_argument('--timeout', type=int, default=600, help='seconds a cell may take, with --check a notebook')
    p.add_argument('-j', type=int, default=1, help='notebooks at a time')
    p.add_argument('--serve', action='store_true', help=argparse.SUPPRESS)
    return p.parse_args()

def main():
    "Run notebooks, print a line for each, and give whether one failed."
    args = arguments()
    if args.serve: return serve()
    flags = args.flags.split()
    environment(flags)
    skip = set(get_config().tst_flags.split()) - set(flags)
    notebooks = args.nbs or sorted(nbglob())
    failed = 0
    with ExitStack() as stack, ThreadPoolExecutor(args.j) as pool:
        free = SimpleQueue()                                # what executes, one for each notebook at a time
        for _ in range(args.j): free.put(stack.enter_context(checker()) if args.check else run)
        def one(path):
            execute = free.get()
            try: return execute(path, skip, args.timeout)
            finally: free.put(execute)
        for path, seconds, error in pool.map(one, notebooks):
            print(f"{'FAIL' if error else 'ok  '} {seconds:6.1f}s {path}", flush=True)
            if error:
                failed += 1
                print(error, file=sys.stderr, flush=True)
    print(f'{len(notebooks)-failed} passed, {failed} failed')
    return failed>0

if __name__=='__main__': sys.exit(main())
