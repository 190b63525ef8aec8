"The playgrounds, in JupyterLab, in a real browser: a click and a stroke change the picture."
import os, shutil, socket, subprocess, sys, time, urllib.request
from contextlib import contextmanager
from pathlib import Path
import pytest

ROOT = Path(__file__).parents[1]
CHROMIUM = next((p for n in ('chromium','chromium-browser','google-chrome') if (p := shutil.which(n))), None)

@pytest.fixture(scope='module')
def lab(tmp_path_factory):
    "A JupyterLab server with the notebooks as its root: the address of a notebook in it, by name."
    for package in ('playwright','ipycanvas','jupyterlab','python_avatars','resvg_py'): pytest.importorskip(package)
    if CHROMIUM is None: pytest.skip('no Chromium on this machine')
    home = tmp_path_factory.mktemp('lab')
    with socket.socket() as s: s.bind(('127.0.0.1',0)); port = s.getsockname()[1]
    flags = ['--no-browser','--allow-root','--ip=127.0.0.1',f'--port={port}','--IdentityProvider.token=t',f'--ServerApp.root_dir={ROOT/"nbs"}','--expose-app-in-browser','--LabApp.news_url=None','--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate','--LabApp.extension_manager=readonly']
    with open(home/'log','w') as log:
        server = subprocess.Popen([sys.executable,'-m','jupyter','lab',*flags], stdout=log, stderr=log, cwd=home, env={**os.environ, 'JUPYTER_CONFIG_DIR':str(home), 'JUPYTER_DATA_DIR':str(home/'data'), 'JUPYTERLAB_WORKSPACES_DIR':str(home/'ws')})
        try:
            for _ in range(240):
                try: urllib.request.urlopen(f'http://127.0.0.1:{port}/api/status?token=t', timeout=2); break
                except OSError: time.sleep(.5)
            else: pytest.fail((home/'log').read_text()[-2000:])
            yield lambda name: f'http://127.0.0.1:{port}/lab/tree/{name}?token=t&reset'
        finally: server.terminate(); server.wait(30)

CELLS = "[...jupyterapp.shell.currentWidget.content.model.cells].filter(c=>c.type==='code'&&c.sharedModel.getSource().trim())"
IDLE = "jupyterapp.shell.currentWidget?.sessionContext?.session?.kernel?.status==='idle'"

def run_all(page, address):
    "Open a notebook, run it, and give the errors of its cells."
    page.goto(address)
    page.wait_for_selector('.jp-NotebookPanel .jp-Cell')
    page.wait_for_function(f'()=>{IDLE}')
    page.evaluate("()=>jupyterapp.commands.execute('notebook:run-all-cells')")
    page.wait_for_function(f"()=>{{const cs={CELLS}; return {IDLE} && (cs.some(c=>c.outputs.toJSON().some(o=>o.output_type==='error')) || cs.every(c=>c.executionCount!=null))}}", polling=500)
    return page.evaluate(f"()=>{CELLS}.flatMap(c=>c.outputs.toJSON()).filter(o=>o.output_type==='error').map(o=>o.ename+': '+o.evalue)")

def settled(page):
    "Where the picture is, once it has stayed the same for two seconds."
    source,since = None,time.time()
    while time.time()-since<2:
        now = page.locator('img.widget-image').first.get_attribute('src')
        if now!=source: source,since = now,time.time()
        time.sleep(.1)
    return source

def after(page, act):
    "What the status says once `act` has led to another picture."
    was,until = settled(page),time.time()+30
    act()
    while page.locator('img.widget-image').first.get_attribute('src')==was:
        if time.time()>until: pytest.fail('the picture stays as it is')
        time.sleep(.1)
    settled(page)
    return page.locator('.status').first.inner_text()

@contextmanager
def notebook(lab, name):
    "A page with a notebook that has been run without an error, and its canvas in view."
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=['--no-sandbox','--disable-gpu','--disable-quic','--no-first-run','--disable-background-networking','--disable-sync'])
        page = browser.new_page(viewport=dict(width=1400, height=1500)); page.set_default_timeout(300_000)
        assert run_all(page, lab(name))==[]
        page.locator('canvas').first.scroll_into_view_if_needed()
        yield page
        browser.close()

def drag(page, along):
    "Draw a line through places of the canvas, as shares of its sides."
    box = page.locator('canvas').first.bounding_box()
    spots = [(box['x']+u*box['width'],box['y']+v*box['height']) for u,v in along]
    page.mouse.move(*spots[0]); page.mouse.down()
    for s in spots[1:]: page.mouse.move(*s, steps=4)
    page.mouse.up()

@pytest.mark.slow
def test_control_playground(lab):
    with notebook(lab, 'howto/control_playground.ipynb') as page:
        after(page, page.get_by_role('button', name='clear').click)
        page.locator('.widget-toggle-button', has_text='region').first.click()
        said = after(page, lambda: drag(page, [(.2,.3),(.8,.3),(.8,.7),(.2,.7)]))
        assert 'Edges in the region' in said
        page.locator('.widget-toggle-button', has_text='edge').first.click()
        said = after(page, lambda: drag(page, [(.3,.7),(.5,.35),(.7,.7),(.3,.7)]))
        assert float(said.split('F1')[1])>.1
        if shot := os.environ.get('PLAYGROUND_SHOT'): box = page.locator('canvas').first.bounding_box(); page.screenshot(path=shot.replace('faces','control'), clip=dict(x=box['x']-8, y=box['y']-8, width=800, height=590))

@pytest.mark.slow
def test_faces_playground(lab):
    with notebook(lab, 'howto/faces_playground.ipynb') as page:
        glasses = page.get_by_role('button', name='Eyeglasses')
        said = after(page, glasses.click)
        assert '✓' in glasses.inner_text() and 'The classifier reads' in said
        page.locator('.widget-toggle-button', has_text='hair').first.click()
        box = page.locator('canvas').first.bounding_box()
        said = after(page, lambda: drag(page, [(.24,.40),(.28,.24),(.38,.15),(.5,.12),(.62,.15),(.72,.24),(.76,.40)]))
        if shot := os.environ.get('PLAYGROUND_SHOT'): time.sleep(2); page.screenshot(path=shot, clip=dict(x=box['x']-8, y=box['y']-8, width=960, height=590))
        seconds = float(said.split()[0])
        print(said)
        assert seconds<2                                  # one face, ten steps, both guided: also on a busy machine
        page.get_by_role('button', name='anything').last.click()
