"The documentation site is built whole, by its one command, and everything that is to be found there is there."
import inspect
import re
import sys
from html import unescape
from pathlib import Path
import pytest

ROOT = Path(__file__).parents[1]
for package in ('sphinx', 'myst_nb', 'sphinx_book_theme', 'sphinx_copybutton', 'latex2mathml'):
    pytest.importorskip(package, reason='the site needs pip install -e ".[docs]"')
sys.path.append(str(ROOT/'scripts'))
from test_house import CONTRACT
from browser import CHROMIUM
import build_site
from mathml import to_mathml

pytestmark = pytest.mark.slow

def html(path):
    return path.read_text(encoding='utf-8')

def text(fragment):
    "The words of a piece of HTML."
    return ' '.join(unescape(re.sub(r'<[^>]+>', '', fragment)).split())

@pytest.fixture(scope='module')
def built(tmp_path_factory):
    "The site, and what is wrong with it."
    out = tmp_path_factory.mktemp('site')/'site'
    return out, build_site.build(out)

@pytest.fixture(scope='module')
def site(tmp_path_factory):
    "What the site consists of."
    return build_site.Site(tmp_path_factory.mktemp('stage'))

def test_no_faults(built):
    "No warning, no link that leads nowhere, nothing loaded from elsewhere."
    assert not built[1], '\n'.join(built[1])

def test_every_page(built, site):
    "Each part and notebook has a page, with a badge and the way to install, and is in the navigation of the front."
    front = html(built[0]/'index.html')
    for part in site.parts:
        assert f'{part.page}.html' in front, part.name
        index = html(built[0]/f'{part.page}.html')
        for notebook in part.notebooks: assert f'{Path(notebook.page).name}.html' in index, notebook.path
    on_disk = {f for f in (ROOT/'nbs').rglob('*.ipynb') if not any(p[0] in '._' for p in f.relative_to(ROOT).parts)}
    assert {f.relative_to(ROOT).as_posix() for f in on_disk} == {n.path for n in site.notebooks}
    for notebook in site.notebooks:
        page = html(built[0]/f'{notebook.page}.html')
        assert 'colab.svg' in page and notebook.path in page and 'pip install' in text(page), notebook.path
        assert not re.search(r'nbdev_export\(|(?m:^#\| \w)', unescape(re.sub('<[^>]+>', '', page))), notebook.path

def entry(page, full_name):
    "The HTML of one name of the API, up to the next one of the module."
    start = page.index(f'id="{full_name}"')
    end = re.compile(r'<dl class="py (?:function|class|data)').search(page, start)
    return page[start:end.start() if end else None]

def test_api(built, site):
    "Each public function and class has an entry, with a row for each parameter, and its comment in it."
    missing = []
    for notebook in site.notebooks:
        if not notebook.module: continue
        module,entries = site.api[notebook.module]
        page = html(built[0]/f'api/{site.api_page(notebook)}.html')
        named = {n for n in module.__all__ if getattr(getattr(module, n), '__module__', None)==module.__name__}
        assert named <= {e.name for e in entries}, module.__name__
        for e in entries:
            found = entry(page, f'{module.__name__}.{e.name}')
            lines = re.findall(r'(?s)<tr.*?</tr>', found)
            rows = [[text(cell) for cell in re.findall(r'(?s)<td>(.*?)</td>', line)] for line in lines]
            rows = {r[0]: r[-1] for r in reversed(rows) if r}
            if e.kind=='data': continue
            value = getattr(module, e.name)
            params = [name for name,*_ in e.rows]
            if inspect.isfunction(value):
                assert [p.lstrip('*') for p in params] == [*inspect.signature(value).parameters]
            bare = [p for p in params if not rows.get(p) and p.lstrip('*') not in CONTRACT]
            missing += [f'{module.__name__}.{e.name}: {p}' for p in params if p not in rows or p in bare]
    assert not missing, '\n'.join(missing)

def test_formulas():
    "Formulas are MathML; what cannot be converted is an error and not shown as it is written."
    assert '<mfrac>' in to_mathml(r'\frac{1}{2}') and 'alttext' in to_mathml('x<y')
    with pytest.raises(ValueError, match='unheardof'): to_mathml(r'\unheardof x')

def test_formulas_are_drawn(built, site):
    "Each formula of a page is MathML, and no page has a script that draws formulas."
    count = 0
    for notebook in site.notebooks:
        page = html(built[0]/f'{notebook.page}.html')
        assert not re.search(r'(?i)<script[^>]*(mathjax|katex)', page), notebook.page
        assert page.count('class="math')==page.count('display="block"'), notebook.page
        count += page.count('<math ')
    assert count>100

def test_in_a_browser(built, site):
    "Nothing is asked of the network, and no page is wider than a telephone."
    sync_api = pytest.importorskip('playwright.sync_api')
    if CHROMIUM is None: pytest.skip('no Chromium on this machine')
    first = [p.notebooks[0] for p in site.parts]
    names = ['index', 'search', 'api/index', *(p.page for p in site.parts), *(n.page for n in first)]
    names += [f'api/{site.api_page(n)}' for n in first if n.module]
    with sync_api.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=['--no-sandbox','--disable-gpu'])
        for width in (1400,400):
            page,asked = browser.new_page(viewport=dict(width=width, height=900)),[]
            page.on('request', lambda r: asked.append(r.url))
            for name in names:
                page.goto((built[0]/f'{name}.html').as_uri())
                wide = page.evaluate('document.documentElement.scrollWidth')
                assert wide<=width, f'{name} is {wide} pixels wide'
            assert not [a for a in asked if not a.startswith(('file:','data:','blob:'))]
        browser.close()

def test_faults_are_found(tmp_path):
    "A missing page, a missing anchor and a script from elsewhere."
    import check_html
    page = '<a href="b.html">b</a> <a href="#no">no</a> <script src="https://example.org/x.js"></script>'
    (tmp_path/'a.html').write_text(page)
    assert len(check_html.faults(tmp_path))==3
