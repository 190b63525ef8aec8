"The plain install is enough for the ten lines; what else is needed comes with an extra, which every message names."
import ast, configparser, re, sys
from importlib.metadata import packages_distributions
from pathlib import Path
import pytest
from fastldm.core.models import EXTRAS, require_package

ROOT = Path(__file__).parents[1]
CONFIG = configparser.ConfigParser(delimiters=['='])
CONFIG.read(ROOT/'settings.ini', encoding='utf-8')
PACKAGE_OF = {'PIL':'pillow', 'fastldm':'fastldm', 'sklearn':'scikit-learn'}        # import name: name on the index

def packages(key):
    "Names in a list of settings.ini, as the index writes them."
    words = CONFIG['DEFAULT'][key].split()
    return {re.match(r'[\w.-]+', word)[0].lower().replace('_', '-') for word in words}

def on_index(name): return PACKAGE_OF.get(name, name).lower().replace('_', '-')

PLAIN = packages('requirements')
EXTRA_NAMES = [key.removesuffix('_requirements') for key in CONFIG['DEFAULT'] if key.endswith('_requirements')]
COME_ALONG = {'fsspec','psutil','IPython'}          # with huggingface-hub, with accelerate, and in a notebook

@pytest.mark.parametrize('name', EXTRAS)
def test_message_names_the_extra(name, monkeypatch):
    "Where a package is missing, what needs it says which extra brings it; and that extra does."
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError) as error: require_package(f'{name}.part', 'It')
    assert str(error.value)==f'It needs the package `{name}`: pip install "fastldm[{EXTRAS[name]}]"'
    extra = packages(f'{EXTRAS[name]}_requirements')
    assert on_index(name) in extra or name in ('fastapi','uvicorn') and 'gradio' in extra

def imports(tree):
    "(line, name) of each package that a module imports by itself, at its top or inside a function."
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import): names = [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom) and not node.level: names = [node.module]
        yield from ((node.lineno, name.split('.')[0]) for name in names)

def required(tree):
    "(line, name, extra) of each package that goes through `require_package`."
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or ast.unparse(node.func) not in ('require_package','_require'): continue
        extras = [ast.literal_eval(k.value) for k in node.keywords if k.arg=='extra']
        assert len(node.args)<3 and 'install' not in [k.arg for k in node.keywords], ast.unparse(node)
        if isinstance(node.args[0], ast.Constant):
            yield node.lineno, node.args[0].value.split('.')[0], extras[0] if extras else None

MODULES = [f for f in sorted((ROOT/'fastldm').rglob('*.py')) if f.name!='_modidx.py']

@pytest.mark.parametrize('file', MODULES, ids=lambda f: f.relative_to(ROOT).as_posix())
def test_all_imports_are_plain_or_named(file):
    "A module imports what the plain install has; the rest goes through `require_package`, with an extra that has it."
    tree = ast.parse(file.read_text(encoding='utf-8'))
    for line,name in imports(tree):
        if name in sys.stdlib_module_names or name in COME_ALONG or name=='fastldm': continue
        if EXTRAS.get(name)=='app': continue                                    # after `require_package('gradio')`
        assert on_index(name) in PLAIN, f'line {line} imports {name}, which `pip install fastldm` does not bring'
    for line,name,extra in required(tree):
        assert name in EXTRAS, f'line {line} requires {name}, which no extra brings'
        assert extra is None or on_index(name) in packages(f'{extra}_requirements'), f'line {line}: {extra}'

@pytest.mark.parametrize('file', MODULES, ids=lambda f: f.relative_to(ROOT).as_posix())
def test_no_message_names_a_bare_package(file):
    "Advice to `pip install` names an extra of this library."
    texts = [node.value for node in ast.walk(ast.parse(file.read_text(encoding='utf-8')))
             if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    advice = [re.sub(r'\s+', ' ', text) for text in texts if re.search(r'pip install +[\w"\'-]', text)]
    bare = [text for text in advice if 'fastldm[' not in text and ".[dev]" not in text and 'install -e' not in text]
    assert not bare

@pytest.mark.parametrize('extra', EXTRA_NAMES)
def test_dev_has_every_extra(extra):
    "Who develops needs no other; what is left out is research code, and a program, that tests do without."
    if extra in ('perceptual','minilm','film'): pytest.skip('its tests are skipped without it')
    missing = packages(f'{extra}_requirements')-packages('dev_requirements')
    assert not missing-{'nbformat'}

@pytest.mark.parametrize('key', ['requirements', *(f'{extra}_requirements' for extra in EXTRA_NAMES)])
def test_constraints_pin_every_requirement(key):
    "constraints.txt has a version of each, but for those that the tests do without."
    pinned = re.findall(r'^([\w.-]+)==', (ROOT/'constraints.txt').read_text(encoding='utf-8'), re.M)
    unpinned = packages(key)-{*pinned}
    assert not unpinned or key in ('perceptual_requirements','minilm_requirements','film_requirements')

def test_index_names():
    "The table of names above agrees with what is installed."
    installed = packages_distributions()
    for name in EXTRAS:
        if name in installed: assert on_index(name) in [d.lower().replace('_', '-') for d in installed[name]], name
