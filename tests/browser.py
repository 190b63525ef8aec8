"JupyterLab in a real browser, for the tests that open notebooks in it."
import os, shutil, socket, subprocess, sys, time, urllib.request
from contextlib import contextmanager
import pytest

CHROMIUM = next((p for n in ('chromium','chromium-browser','google-chrome') if (p := shutil.which(n))), None)
QUIET = ['--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run',
         '--disable-background-networking', '--disable-sync']

def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]

def answers(address):
    try: urllib.request.urlopen(address, timeout=30)
    except OSError: return False
    return True

@contextmanager
def jupyterlab(root, home, **env):
    "A server of the files in `root`, with its settings in `home`: gives the address of a notebook by its path."
    for package in ('playwright','jupyterlab'): pytest.importorskip(package)
    if CHROMIUM is None: pytest.skip('no Chromium on this machine')
    port = free_port()
    flags = ['--no-browser', '--allow-root', '--ip=127.0.0.1', f'--port={port}', '--IdentityProvider.token=t',
             f'--ServerApp.root_dir={root}', '--expose-app-in-browser', '--LabApp.news_url=None',
             '--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate', '--LabApp.extension_manager=readonly']
    own = {'JUPYTER_CONFIG_DIR':str(home), 'JUPYTER_DATA_DIR':str(home/'data'),
           'JUPYTERLAB_WORKSPACES_DIR':str(home/'ws')}
    with open(home/'log', 'w') as log:
        server = subprocess.Popen([sys.executable,'-m','jupyter','lab',*flags], stdout=log, stderr=log, cwd=home,
                                  env={**os.environ, **own, **env})
        try:
            for _ in range(2400):
                if answers(f'http://127.0.0.1:{port}/api/status?token=t'): break
                time.sleep(.5)
            else: pytest.fail((home/'log').read_text()[-2000:])
            yield lambda path: f'http://127.0.0.1:{port}/lab/tree/{path}?token=t&reset'
        finally:
            server.terminate()
            server.wait(300)

@contextmanager
def browser_page(minutes=20):
    "A page of a headless browser; what is waited for longer than `minutes` fails."
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        page = browser.new_page(viewport=dict(width=1400, height=1500))
        page.set_default_timeout(minutes*60_000)
        yield page
        browser.close()

NOTEBOOK = 'jupyterapp.shell.currentWidget'
CELLS = f"[...{NOTEBOOK}.content.model.cells].filter(c=>c.type==='code' && c.sharedModel.getSource().trim())"
OUTPUTS = f'{CELLS}.flatMap(c=>c.outputs.toJSON())'
IDLE = f"{NOTEBOOK}?.sessionContext?.session?.kernel?.status==='idle'"
FAILED = f"{OUTPUTS}.some(o=>o.output_type==='error')"
ALL_RUN = f'{CELLS}.every(c=>c.executionCount!=null)'

def run_all(page, address):
    "Open a notebook, choose Run All, and give the errors of its cells."
    page.goto(address)
    page.wait_for_selector('.jp-NotebookPanel .jp-Cell')
    page.wait_for_function(f'()=>{IDLE}')
    page.evaluate("()=>jupyterapp.commands.execute('notebook:run-all-cells')")
    page.wait_for_function(f'()=>{IDLE} && ({FAILED} || {ALL_RUN})', polling=500)
    return page.evaluate(f"()=>{OUTPUTS}.filter(o=>o.output_type==='error').map(o=>o.ename+': '+o.evalue)")

def shut_down(page):
    "End the kernel of the notebook, so that the next one has the memory."
    page.evaluate(f'()=>{NOTEBOOK}.sessionContext.shutdown()')
