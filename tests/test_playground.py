"The playgrounds, in JupyterLab, in a real browser: a click and a stroke change the picture."
import os, time
from contextlib import contextmanager
from pathlib import Path
import pytest
from browser import IDLE, browser_page, jupyterlab, run_all

ROOT = Path(__file__).parents[1]
PICTURE = 'img.widget-image'

@pytest.fixture(scope='module')
def lab(tmp_path_factory):
    "A JupyterLab server with the notebooks as its root: the address of a notebook in it, by name."
    for package in ('ipycanvas','python_avatars','resvg_py'): pytest.importorskip(package)
    with jupyterlab(ROOT/'nbs', tmp_path_factory.mktemp('lab')) as address: yield address

def source(page): return page.locator(PICTURE).first.get_attribute('src')

def settled(page):
    "Where the picture is, once the kernel has had nothing to do for two seconds, and it has stayed the same."
    last, since = None, time.time()
    while time.time()-since<2:
        now = source(page)
        if now!=last or not page.evaluate(IDLE): last, since = now, time.time()
        time.sleep(.1)
    return last

def after(page, act):
    "What the status says once `act` has led to another picture."
    was, until = settled(page), time.time()+300
    act()
    while source(page)==was:
        if time.time()>until: pytest.fail('the picture stays as it is')
        time.sleep(.1)
    settled(page)
    return page.locator('.status').first.inner_text()

@contextmanager
def notebook(lab, name):
    "A page with a notebook that has been run without an error, and its canvas in view."
    with browser_page() as page:
        assert run_all(page, lab(name))==[]
        page.locator('canvas').first.scroll_into_view_if_needed()
        yield page

def drag(page, along):
    "Draw a line through places of the canvas, as shares of its sides."
    box = page.locator('canvas').first.bounding_box()
    spots = [(box['x']+u*box['width'], box['y']+v*box['height']) for u,v in along]
    page.mouse.move(*spots[0])
    page.mouse.down()
    for spot in spots[1:]: page.mouse.move(*spot, steps=4)
    page.mouse.up()

def pictures_during(page, act):
    "How many pictures follow each other once `act` is done."
    was, seen, last = settled(page), [], time.time()
    act()
    until = time.time()+300
    while not seen or not page.evaluate(IDLE) or time.time()-last<2:
        now = source(page)
        if now!=(seen or [was])[-1]:
            seen.append(now)
            last = time.time()
        if time.time()>until: pytest.fail('the picture stays as it is')
        time.sleep(.02)
    return len(seen)

def screenshot(page, path, width):
    "A picture of the playground, for the README, where `PLAYGROUND_SHOT` names its file."
    if path is None: return
    time.sleep(2)
    box = page.locator('canvas').first.bounding_box()
    page.screenshot(path=path, clip=dict(x=box['x']-8, y=box['y']-8, width=width, height=590))

@pytest.mark.slow
def test_control_playground(lab):
    "A region and a sketch, drawn with the mouse, change the picture; the edges in the region are found in it."
    with notebook(lab, 'howto/control_playground.ipynb') as page:
        after(page, page.get_by_role('button', name='clear').click)
        page.locator('.widget-toggle-button', has_text='region').first.click()
        status = after(page, lambda: drag(page, [(.2,.3),(.8,.3),(.8,.7),(.2,.7)]))
        assert 'Edges' not in status                      # there are none yet
        page.locator('.widget-toggle-button', has_text='edge').first.click()
        status = after(page, lambda: drag(page, [(.3,.7),(.5,.35),(.7,.7),(.3,.7)]))
        assert float(status.split('F1')[1].split('<')[0])>.1
        shot = os.environ.get('PLAYGROUND_SHOT')
        screenshot(page, shot and shot.replace('faces', 'control'), width=800)

@pytest.mark.slow
def test_faces_playground(lab):
    "A tick and a stroke change the face."
    with notebook(lab, 'howto/faces_playground.ipynb') as page:
        glasses = page.get_by_role('button', name='Eyeglasses')
        status = after(page, glasses.click)
        assert '✓' in glasses.inner_text() and 'The classifier reads' in status
        page.locator('.widget-toggle-button', has_text='hair').first.click()
        hair = [(.24,.40),(.28,.24),(.38,.15),(.5,.12),(.62,.15),(.72,.24),(.76,.40)]
        status = after(page, lambda: drag(page, hair))
        screenshot(page, os.environ.get('PLAYGROUND_SHOT'), width=960)
        print(status)                                     # with its seconds: one face, ten steps, both guided
        after(page, page.get_by_role('button', name='undo').click)
        names = ('Arched Eyebrows', 'Bangs', 'Smiling', 'Beard', 'Dark Skin', 'Frowning')
        ticks = [page.get_by_role('button', name=name).first for name in names]
        def click_all():
            for tick in ticks: tick.click()
        assert pictures_during(page, click_all)<=2        # six quick ticks are not six drawings
        page.get_by_role('button', name='anything').last.click()
