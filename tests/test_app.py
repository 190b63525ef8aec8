"The page `fastldm_app`, in a real browser: every tab draws, what goes wrong gives one sentence, nobody waits in vain."
import os
import subprocess
import sys
import time
from pathlib import Path
import numpy as np
import pytest
from PIL import Image
from browser import CHROMIUM, QUIET, answers, free_port
from fastldm.data import get_dataset
from fastldm.diffusion import samplers
from fastldm.ui.app import (_check_has_widgets, _words, SAMPLERS, TABS, Page, draw_settings, form_of, grid_of,
                            list_models, pack, read_config, read_settings, unpack, write_picture)

ROOT = Path(__file__).parents[1]
MINUTES = 10                                             # what is waited for longer fails; nothing should come near it

# ---- without a browser

def test_every_model_has_a_form():
    "Each model that ships is told at least one thing, and only what is not painted or chosen is typed."
    for name in list_models():
        form = form_of(read_config(name))
        assert {'text','label','attributes','mask'} & form.keys(), name
        assert set(form['others'])<={'augment'} and form['priors'] in ([], ['diffusion'], ['diffusion','codes']), name

def test_samplers_exist():
    assert {name for name in SAMPLERS.values() if name}<=set(samplers.__all__)

def test_own_models(tmp_path, monkeypatch):
    "Folders in `runs` are offered, and one that cannot be read is left out."
    record = (ROOT/'fastldm/weights/mnist/config.json').read_text(encoding='utf-8')
    for name,text in dict(mine=record, damaged=record[:100], other='{"config": {"cls": "Evaluator"}}').items():
        folder = tmp_path/'runs'/name
        folder.mkdir(parents=True)
        (folder/'config.json').write_text(text, encoding='utf-8')
    monkeypatch.chdir(tmp_path)
    assert [name for name in list_models() if name.startswith('runs')]==['runs/mine']

def test_what_is_missing_is_named(tmp_path):
    "Where Gradio is not installed the module can be imported, and the command says in one line what to install."
    program = 'import sys\nsys.modules["gradio"] = None\nfrom fastldm.ui.app import app_cli\napp_cli()'
    done = subprocess.run([sys.executable,'-c',program], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode==1
    assert done.stderr.strip()=='app: The page needs the package `gradio`: pip install "fastldm[app]"'

def test_few_calls_draw_at_once(tmp_path):
    "A choice is drawn by the student, from the same noise, without a press of the button; steps wait for the button."
    pytest.importorskip('gradio', reason='the page needs pip install "fastldm[app]"')
    from gradio_client import Client
    from gradio_client.exceptions import AppError
    page = Page(['fashion','mnist'], tmp_path)
    most = page.forms['fashion']['few_calls_guidance'][1]
    page.blocks.queue()
    port = free_port()
    page.blocks.launch(prevent_thread_lock=True, server_port=port, quiet=True)
    def choose(**changed):
        values = {name: getattr(widget, 'value', None) for name,widget in page.inputs.items()} | changed
        return client.predict(*(values[name] for name in page.inputs), api_name='/draw_live')
    def drawn(): return sorted(tmp_path.rglob('fashion.png'), key=lambda file: file.stat().st_mtime_ns)
    try:
        client = Client(f'http://127.0.0.1:{port}', verbose=False)
        client.predict('fashion', api_name='/show_model')
        seed = dict(model='fashion', seed=3, new_seed=True, n=2)
        choose(**seed, calls=0)
        assert not drawn()
        for label in ('Coat','Bag'): choose(**seed, calls=2, label=label)
        for file,label in zip(drawn(), ('Coat','Bag'), strict=True):
            settings = read_settings(file)
            assert (settings['seed'], settings['calls'], settings['conditions'])==(3, 2, dict(label=label))
        with pytest.raises(AppError, match=f'at most {most:g}'): choose(**seed, calls=2, guidance_scale=9)
        with pytest.raises(AppError, match='few calls guidance cannot'): choose(**seed, calls=2, negative_label='Bag')
        assert len(drawn())==2
        shown = client.predict('fashion', 2, 9, api_name='/show_few_calls')
        assert [update for update in shown if isinstance(update, dict) and update.get('maximum')==most]
    finally: page.blocks.close()

# ---- the page

@pytest.fixture(scope='module')
def served(tmp_path_factory):
    "The address of a page, and the folder of its pictures."
    pytest.importorskip('gradio', reason='the page needs pip install "fastldm[app]"')
    if CHROMIUM is None: pytest.skip('no Chromium on this machine')
    home = tmp_path_factory.mktemp('app')
    port = free_port()
    command = [Path(sys.executable).parent/'fastldm_app', '--model', 'mnist', '--port', str(port), '--out', home/'out']
    with open(home/'log', 'w') as log:
        server = subprocess.Popen(command, cwd=home, stdout=log, stderr=log)
        try:
            while not answers(f'http://127.0.0.1:{port}'):
                assert server.poll() is None, (home/'log').read_text()
                time.sleep(.2)
            yield f'http://127.0.0.1:{port}', home/'out'
        finally:
            server.terminate()
            server.wait()

@pytest.fixture(scope='module')
def chromium():
    "A browser; each page of it is another visitor."
    sync_api = pytest.importorskip('playwright.sync_api')
    with sync_api.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield browser
        browser.close()

DRAWN = "document.querySelectorAll('.drawn .thumbnail-item').length"
ERROR = "document.querySelector('.toast-body.error')"

class Visitor:
    "Somebody who has opened the page."
    def __init__(self, chromium, address, width=1400):
        self.address = address
        self.asked = []
        # no animations: without a GPU they would take more time than the drawing
        self.page = chromium.new_page(viewport=dict(width=width, height=1000), reduced_motion='reduce')
        self.page.set_default_timeout(MINUTES*60_000)
        self.page.on('request', lambda request: self.asked.append(request.url))
        self.page.goto(address)
        self.page.get_by_label('label', exact=True).wait_for()          # the form of mnist is there

    def button(self, name): return self.page.get_by_role('button', name=name, exact=True)

    def wait(self, condition): self.page.wait_for_function(f'()=>{condition}')

    def value(self, label): return self.page.get_by_label(label, exact=True).input_value()

    def choose(self, label, option):
        "Choose from a list."
        self.page.get_by_label(label, exact=True).click()
        self.page.get_by_role('option', name=option, exact=True).locator('visible=true').click()
        self.page.get_by_label(label, exact=True).blur()                # a list of several stays open
        self.page.get_by_role('option').locator('visible=true').first.wait_for(state='hidden')

    def number(self, **values):
        "Set sliders, by their labels."
        for label,value in values.items():
            box = self.page.get_by_label(f'number input for {label}').locator('visible=true')
            box.fill(str(value))
            box.press('Tab')

    def open(self, tab):
        "Open a tab, from the menu where it has no place of its own."
        found = self.page.get_by_role('tab', name=TABS[tab], exact=True).locator('visible=true')
        menu = self.page.locator('.overflow-menu')
        if found.count()==0:
            menu.locator('button').first.click()
            found = menu.get_by_text(TABS[tab], exact=True)
        found.click()

    def upload(self, path, button='Upload a picture'):
        "Give a file to the button that is in view."
        with self.page.expect_file_chooser() as chooser: self.button(button).locator('visible=true').click()
        chooser.value.set_files(path)

    def paint(self, canvas=0):
        "Draw a line across the middle of a canvas that is in view."
        found = self.page.locator('.paint:visible').nth(canvas).locator('canvas').first
        found.wait_for()
        found.evaluate("canvas=>canvas.scrollIntoView({block: 'center'})")
        box = found.bounding_box()
        x, y = box['x']+box['width']/2, box['y']+box['height']/2
        self.page.mouse.move(x-40, y)
        self.page.mouse.down()
        self.page.mouse.move(x+40, y+20, steps=4)
        self.page.mouse.up()

    def drawn(self): return self.page.evaluate(DRAWN)

    def draw(self):
        "Draw, and give what the picture says of itself."
        n = self.drawn()
        self.button('Draw').click()
        self.wait(f'{ERROR} || {DRAWN}>{n}')
        assert not self.page.evaluate(f'{ERROR} && {ERROR}.innerText')
        return read_settings(self.download())

    def download(self):
        "The file of the picture in view."
        with self.page.expect_download() as file:
            self.page.get_by_text('Download the picture').click()
        return file.value.path()

    def complaint(self):
        "The sentence that is shown for an error; it is closed then."
        self.wait(ERROR)
        text = self.page.locator('.toast-body.error').inner_text()
        self.page.locator('.toast-close').click()
        self.wait(f'!{ERROR}')
        return ' '.join(text.split())

@pytest.fixture
def visitor(served, chromium):
    "Somebody at a desk."
    visitor = Visitor(chromium, served[0])
    yield visitor
    visitor.page.close()

# ---- what it draws

@pytest.mark.slow
def test_every_tab_draws(served, chromium, tmp_path):
    "Each tab of a model of faces draws what it is for, and nothing is asked of the network."
    visitor = Visitor(chromium, served[0], 1400)
    picture = draw_a_face(visitor, tmp_path)
    visitor.open('mask')
    visitor.paint()
    assert 'mask' in visitor.draw()
    visitor.open('sketch')
    visitor.paint(0)
    visitor.paint(1)
    assert {'sketch','region'}<=visitor.draw().keys()
    visitor.open('vary')
    visitor.upload(picture)
    visitor.page.locator('.uploaded img').locator('visible=true').wait_for()
    for tab in ('vary','enlarge','fill','edit'):
        visitor.open(tab)
        if tab in ('fill','edit'): visitor.paint()
        settings = visitor.draw()
        assert settings['tab']==tab and 'picture' in settings and ('hole' in settings)==(tab in ('fill','edit'))
    nothing_is_outside(visitor, served, 1400)

@pytest.mark.slow
def test_a_telephone(served, chromium, tmp_path):
    "On a narrow screen every tab fits, and what is painted there counts."
    visitor = Visitor(chromium, served[0], 400)
    picture = draw_a_face(visitor, tmp_path)
    for tab in ('mask','sketch','vary','enlarge','fill','edit'):
        visitor.open(tab)
        assert visitor.page.evaluate('document.documentElement.scrollWidth')<=400, tab
    visitor.open('mask')
    visitor.paint()
    assert 'mask' in visitor.draw()
    visitor.open('vary')
    visitor.upload(picture)
    visitor.page.locator('.uploaded img').locator('visible=true').wait_for()
    visitor.open('fill')
    visitor.paint()
    assert {'picture','hole'}<=visitor.draw().keys()
    nothing_is_outside(visitor, served, 400)

def draw_a_face(visitor, folder):
    "A picture of the first tab, downloaded."
    visitor.choose('model', 'avatars')
    visitor.page.get_by_label('attributes: yes').wait_for()
    visitor.number(pictures=1, steps=2)
    assert visitor.draw()['tab']=='new'
    picture = folder/'face.png'
    picture.write_bytes(Path(visitor.download()).read_bytes())
    return picture

def nothing_is_outside(visitor, served, width):
    "The page is no wider than the screen, and asked nobody else for anything."
    assert visitor.page.evaluate('document.documentElement.scrollWidth')<=width
    assert not [url for url in visitor.asked if not url.startswith((served[0], 'data:', 'blob:'))]
    visitor.page.close()

@pytest.mark.slow
def test_words(visitor):
    "Labels, attributes and texts reach the model, and Python draws the same from what the picture says of itself."
    visitor.number(pictures=2, steps=3)
    visitor.choose('label', '7')
    settings = visitor.draw()
    assert settings['conditions']=={'label': '7'} and settings['model']=='mnist'
    assert (np.array(grid_of(draw_settings(settings)))==np.array(Image.open(visitor.download()))).all()
    visitor.page.get_by_text('away from', exact=True).click()
    visitor.choose('label that guidance moves away from', '1')
    assert visitor.draw()['negative']=={'label': '1'}
    visitor.choose('model', 'avatars')
    visitor.choose('attributes: yes', 'Red Hair')
    visitor.choose('attributes: no', 'Smiling')
    assert visitor.draw()['conditions']=={'attrs': 'Red_Hair,Smiling=0'}
    visitor.choose('model', 'scenes')
    visitor.page.get_by_label('text', exact=True).fill('a red house at night')
    settings = visitor.draw()
    assert settings['conditions']=={'text': 'a red house at night'} and settings['prior']=='diffusion'
    assert 'fastldm_sample scenes' in visitor.page.locator('.cm-content').inner_text()

# ---- what goes wrong

@pytest.mark.slow
def test_a_broken_or_huge_upload_gives_a_sentence(visitor, tmp_path):
    "A file that is no picture, one of too many bytes, and one of too many pixels."
    files = dict(broken=b'\x89PNG\r\n\x1a\n'+bytes(99), large=bytes(21*2**20))
    for name,content in files.items(): (tmp_path/f'{name}.png').write_bytes(content)
    Image.new('1', (20_000,20_000)).save(tmp_path/'wide.png')
    visitor.open('vary')
    for name in ('broken','wide'):
        visitor.upload(tmp_path/f'{name}.png')
        assert f'{name}.png cannot be read as a picture: upload another file' in visitor.complaint()
    visitor.upload(tmp_path/'large.png')
    assert 'large.png' in visitor.complaint()
    visitor.button('Draw').click()
    assert 'there is no picture yet: upload one' in visitor.complaint()
    visitor.open('fill')
    visitor.button('Draw').click()
    assert 'there is no picture yet: upload one' in visitor.complaint()
    visitor.open('new')
    visitor.number(pictures=1, steps=2)
    assert visitor.draw()['tab']=='new'                                 # and it goes on

@pytest.mark.slow
def test_what_contradicts_itself_gives_a_sentence(visitor):
    visitor.choose('model', 'avatars')
    for name in ('Black Hair','Blond Hair'): visitor.choose('attributes: yes', name)
    visitor.button('Draw').click()
    assert 'Black_Hair and Blond_Hair cannot both be true' in visitor.complaint()

# ---- several at once, and changes of mind

def settings_in(folder): return [read_settings(path) for path in folder.glob('*/*.png')]

@pytest.mark.slow
def test_two_visitors_get_their_own_pictures(served, chromium):
    "Two draw at once: each has one picture, of the own label."
    two = [Visitor(chromium, served[0]) for _ in range(2)]
    for visitor,label in zip(two, '38'):
        visitor.number(pictures=1, steps=20)
        visitor.choose('label', label)
    for visitor in two: visitor.button('Draw').click()
    for visitor,label in zip(two, '38'):
        visitor.wait(f'{DRAWN}>0')
        assert visitor.drawn()==1
        assert read_settings(visitor.download())['conditions']=={'label': label}
        visitor.page.close()

@pytest.mark.slow
def test_a_second_click_does_not_pile_up(served, visitor):
    "Clicks while a picture is drawn are left out."
    before = len(settings_in(served[1]))
    visitor.number(pictures=4, steps=50)
    visitor.button('Draw').click(click_count=3)
    visitor.wait(f'{DRAWN}>0')
    visitor.number(steps=2)
    visitor.draw()                                                      # what was waiting would have come before
    assert visitor.drawn()==2 and len(settings_in(served[1]))==before+2

@pytest.mark.slow
def test_stop(served, visitor):
    "A drawing of minutes ends when it is stopped, and the next one follows at once."
    before = len(settings_in(served[1]))
    visitor.number(pictures=16, steps=100)
    visitor.choose('sampler', 'Heun')
    visitor.button('Draw').click()
    visitor.page.locator('.result img').wait_for()                      # the first frame
    visitor.button('Stop').click()
    visitor.page.get_by_text('stopped', exact=True).wait_for()
    visitor.number(pictures=1, steps=2)
    visitor.draw()
    assert visitor.drawn()==1 and len(settings_in(served[1]))==before+1

@pytest.mark.slow
def test_who_leaves_lets_the_next_one_draw(served, chromium):
    "Closing the page ends what it draws."
    before = len(settings_in(served[1]))
    gone, here = (Visitor(chromium, served[0]) for _ in range(2))
    gone.number(pictures=16, steps=100)
    gone.button('Draw').click()
    gone.page.locator('.result img').wait_for()
    gone.page.close()
    here.number(pictures=1, steps=2)
    here.draw()
    assert len(settings_in(served[1]))==before+1
    here.page.close()

# ---- a picture that knows how it was made

@pytest.mark.slow
def test_settings_come_back(served, chromium, visitor, tmp_path):
    "From the gallery, and from a file that another visitor downloaded; then the very same picture is drawn."
    visitor.number(pictures=2, steps=3, guidance=4)
    visitor.choose('label', '5')
    first = visitor.draw()
    file = tmp_path/'five.png'
    file.write_bytes(Path(visitor.download()).read_bytes())
    visitor.choose('model', 'fashion')
    visitor.number(steps=2)
    assert visitor.draw()['model']=='fashion'
    visitor.page.locator('.drawn .thumbnail-item').first.click()
    visitor.wait("document.querySelector('[aria-label=\"number input for steps\"]').value=='3'")
    assert (visitor.value('model'), visitor.value('label'))==('mnist', '5')
    assert visitor.draw()==first
    assert (np.array(Image.open(visitor.download()))==np.array(Image.open(file))).all()
    other = Visitor(chromium, served[0])
    other.upload(file, 'Restore the settings of a picture')
    other.wait("document.querySelector('[aria-label=\"number input for steps\"]').value=='3'")
    assert other.draw()==first
    other.page.close()

@pytest.mark.slow
def test_a_picture_of_somebody_else_gives_a_sentence(visitor, tmp_path):
    "A PNG file without settings, and one of a model that is not here."
    picture = Image.new('L', (28,28))
    picture.save(tmp_path/'plain.png')
    write_picture(picture, tmp_path/'other.png', dict(model='mnits', tab='new', conditions={}))
    for name,said in dict(plain='does not say how it was made', other="did you mean 'mnist'?").items():
        visitor.upload(tmp_path/f'{name}.png', 'Restore the settings of a picture')
        assert said in visitor.complaint()

@pytest.mark.slow
def test_the_mask_of_a_face(visitor, tmp_path):
    "A mask passes a canvas of the browser unchanged. With `APP_SHOT=figures/app.png` this makes the README's picture."
    pytest.importorskip('python_avatars')
    mask = get_dataset('avatars', split='test')[0]['mask'].numpy()
    settings = dict(model='avatars', tab='mask', mask=pack(mask), mask_name='mask', n=4, seed=1, steps=20, step='',
                    guidance_scale=2., conditions=dict(attrs='Smiling'))
    write_picture(Image.new('L', (28,28)), tmp_path/'face.png', settings)
    visitor.upload(tmp_path/'face.png', 'Restore the settings of a picture')
    visitor.page.get_by_text('the brush paints').wait_for()
    visitor.page.locator('.paint:visible canvas').first.wait_for()
    if os.environ.get('APP_SHOT') is None: visitor.number(pictures=1, steps=2)
    assert (np.array(unpack(visitor.draw()['mask']))==mask).all()
    if shot := os.environ.get('APP_SHOT'):
        visitor.page.screenshot(path=tmp_path/'shot.png', full_page=True)
        Image.open(tmp_path/'shot.png').convert('RGB').quantize(256).save(shot, optimize=True)

# ---- speed

@pytest.mark.slow
@pytest.mark.bench
def test_speed(visitor):
    "From the click to the picture, a page takes at most 1.1 times the Python call, and a second for all the rest."
    visitor.choose('model', 'avatars')
    visitor.page.get_by_label('attributes: yes').wait_for()
    visitor.number(pictures=16, steps=40)
    visitor.draw()                                                      # loads the model
    pages, calls = [], []
    for _ in range(3):
        start = time.perf_counter()
        visitor.button('Draw').click()
        n = visitor.drawn()
        visitor.wait(f'{DRAWN}>{n}')
        pages.append(time.perf_counter()-start)
        settings = read_settings(visitor.download())
        start = time.perf_counter()
        draw_settings(settings)
        calls.append(time.perf_counter()-start)
    print(f'page {min(pages):.2f} s, Python {min(calls):.2f} s, ratio {min(pages)/min(calls):.3f}')
    assert min(pages)<=1.1*min(calls)+1

# ---- what a command made, on the page

def test_what_a_command_was_told_is_found_among_the_choices():
    "A class by its number or in other capitals, attributes with =1 and with spaces."
    form = dict(label=('label', ['T-shirt','Trousers','Pullover','Dress']),
                attributes=('attrs', ['Smiling','Eyeglasses']))
    def words(**conditions): return _words(dict(conditions=conditions), form)
    assert [words(label=text)['label'] for text in ('3','dress','Dress','no such')]==['Dress']*3+['no such']
    values = words(attrs='Smiling=1, Eyeglasses =0')
    assert (values['present'],values['absent'])==(['Smiling'],['Eyeglasses'])
    digits = dict(label=('label', [*'0123456789']))
    assert _words(dict(conditions=dict(label='7')), digits)['label']=='7'
    assert _words(dict(conditions={}), form)['label'] is None

@pytest.mark.parametrize('settings,says', [
    (dict(guidance_scale=12.), 'guidance_scale=12'), (dict(seed=2**31), 'seed=2147483648'), (dict(n=20), 'n=20'),
    (dict(step='my_step'), 'step=my_step'), (dict(negative=dict(attrs='Smiling')), 'negative_attrs'),
    (dict(calls=3), 'calls=3')])
def test_numbers_beyond_the_widgets_are_refused(settings, says):
    whole = dict(tab='new', n=4, steps=0, step='', guidance_scale=2., seed=0)
    form = dict(label=('label', ['0','1']), calls=[1,2])
    _check_has_widgets(whole | dict(negative=dict(label='1'), negative_prompt='a bird'), 'a.png', form)
    with pytest.raises(ValueError, match=says): _check_has_widgets(whole|settings, 'a.png', form)
