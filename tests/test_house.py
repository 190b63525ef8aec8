"""The house rules: quick and light imports, notebooks and library that agree, how code reads, sizes, documentation,
nothing unsafe, nothing of one computer."""
import ast, inspect, json, os, re, shutil, subprocess, sys
from dataclasses import is_dataclass
from importlib import import_module
from pathlib import Path
import pytest
from fastcore.docments import docments

ROOT = Path(__file__).parents[1]
MAX_LINE,MAX_CELL = 120,25                          # characters in a line, statements in an exported cell
HEAVY = set('''torchvision matplotlib seaborn transformers diffusers accelerate sklearn scipy pandas torch_fidelity
    lpips torchmetrics huggingface_hub nbdev IPython'''.split())
CONTRACT = set('self cls denoise x t s cond cb model batch real fake raw'.split())     # names of the contracts

def tree():
    "Files of the repository: what git knows or would add."
    p = subprocess.run(['git','ls-files','-co','--exclude-standard'], cwd=ROOT, capture_output=True, text=True)
    if p.returncode: pytest.skip('not a git checkout')
    return [f for o in p.stdout.splitlines() if (f := ROOT/o).is_file()]

def cells(nb): return json.loads(nb.read_text(encoding='utf-8'))['cells']
def code(nb): return [c for c in cells(nb) if c['cell_type']=='code']
def src(c): return ''.join(c['source'])
def name(f): return f.relative_to(ROOT).as_posix()

NBS = sorted(f for f in (ROOT/'nbs').rglob('*.ipynb') if not any(p[0] in '._' for p in f.relative_to(ROOT).parts))
PYS = sorted(f for f in (ROOT/'fastldm').rglob('*.py') if f.name!='_modidx.py')

def module_name(f): return '.'.join(f.relative_to(ROOT/'fastldm').with_suffix('').parts)

MODULES = {module_name(f): f for f in PYS if f.name!='__init__.py'}            # 'diffusion.samplers': its file
PARTS = 'core data diffusion codes control metrics recipes ui cli'.split()     # each uses only those before it
NUMBERED = [f for f in NBS if f.stem[:2].isdigit()]                                      # the notebooks that export

def fresh(program, **env):
    "What a program prints in a new process."
    p = subprocess.run([sys.executable,'-c',program], cwd=ROOT, capture_output=True, text=True,
                       env={**os.environ, **env})
    assert p.returncode==0, p.stderr
    return p.stdout.strip()

def imported(*modules):
    return {m.split('.')[0] for m in fresh(f"import sys, {', '.join(modules)}; print(*sys.modules)").split()}


# ---- imports

def test_import_is_light(): assert not imported('fastldm') & HEAVY

def test_each_module_is_light(): assert not imported(*(f'fastldm.{m}' for m in MODULES)) & HEAVY

@pytest.mark.slow
@pytest.mark.bench
def test_import_is_quick():
    "Two seconds, beside what torch alone takes on this machine now."
    def once(m): return float(fresh(f'import time; t = time.perf_counter(); import {m}; print(time.perf_counter()-t)'))
    def best(m): return min(once(m) for _ in range(3))
    torch,ours = best('torch'),best('fastldm')
    print(f'import torch {torch:.2f} s, import fastldm {ours:.2f} s')
    assert ours < 2+torch

def imports_of(mod):
    "Modules of fastldm that a module imports, at its top or inside a function, e.g. 'core.models'."
    here = mod.split('.')
    for n in ast.walk(ast.parse(MODULES[mod].read_text(encoding='utf-8'))):
        found = []
        if isinstance(n, ast.Import):
            found = [a.name.removeprefix('fastldm.') for a in n.names if a.name.startswith('fastldm.')]
        if isinstance(n, ast.ImportFrom):
            at = '.'.join(here[:len(here)-n.level]) if n.level else (n.module or '')
            name = '.'.join(filter(None, (at, n.module))) if n.level else at.removeprefix('fastldm').lstrip('.')
            if n.level or at.split('.')[0]=='fastldm':
                found = [name] if name in MODULES else [f'{name}.{a.name}'.lstrip('.') for a in n.names]
        yield from (m for m in found if m in MODULES)

@pytest.mark.parametrize('mod', MODULES)
def test_imports_go_down(mod):
    "A module uses its own part and those before it."
    part = PARTS.index(mod.split('.')[0])
    assert not [m for m in imports_of(mod) if PARTS.index(m.split('.')[0])>part]

def test_no_circles():
    "Modules can be read in an order in which each uses only those before."
    graph = {m: {*imports_of(m)} for m in MODULES}
    assert sum(map(len, graph.values()))>len(MODULES)        # the imports were found
    while ready := [m for m,used in graph.items() if not used & graph.keys()]:
        for m in ready: del graph[m]
    assert not graph

@pytest.mark.parametrize('part', PARTS)
def test_a_part_has_all_its_names(part):
    "`from fastldm.PART import *` gives what its modules export."
    names = vars(import_module(f'fastldm.{part}'))
    for mod in MODULES:
        if not mod.startswith(f'{part}.'): continue
        exported = import_module(f'fastldm.{mod}').__all__
        assert not [n for n in exported if n not in names]

@pytest.mark.parametrize('nb', NUMBERED, ids=name)
def test_notebook_and_module_have_one_name(nb):
    "nbs/diffusion/05_samplers.ipynb is fastldm/diffusion/samplers.py; no two notebooks of a part have one number."
    module = f'{nb.parent.name}.{nb.stem[3:]}'
    assert module in MODULES
    assert f'default_exp {module}\n' in ''.join(src(c)+'\n' for c in code(nb))
    assert len([*nb.parent.glob(f'{nb.stem[:3]}*.ipynb')])==1

@pytest.mark.parametrize('mod', MODULES)
def test_nothing_is_unpickled(mod):
    "Weights are read as numbers only; a pickle can run any program."
    for n in ast.walk(ast.parse(MODULES[mod].read_text(encoding='utf-8'))):
        if isinstance(n, (ast.Import,ast.ImportFrom)):
            names = [a.name for a in n.names]+[getattr(n,'module',None)]
            unsafe = {'pickle','cPickle','dill','cloudpickle','joblib','shelve'}
            assert not unsafe & {str(o).split('.')[0] for o in names}, n.lineno
        if isinstance(n, ast.Call):
            kw = {k.arg: getattr(k.value,'value',None) for k in n.keywords}
            if ast.unparse(n.func)=='torch.load': assert kw.get('weights_only') is True, n.lineno
            assert kw.get('allow_pickle') is not True, n.lineno


# ---- notebooks

def test_exported_and_clean(tmp_path):
    "nbdev_export and nbdev_clean change nothing, and no module is left without its notebook."
    shutil.copytree(ROOT/'nbs', tmp_path/'nbs')
    for f in ('settings.ini','pyproject.toml',*(f.relative_to(ROOT) for f in PYS if f.name=='__init__.py')):
        (tmp_path/f).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT/f, tmp_path/f)
    env = {k:v for k,v in os.environ.items() if k!='IN_TEST'}
    for call in ('nbdev.doclinks import nbdev_export as f','nbdev.clean import nbdev_clean as f'):
        program = f'from {call}; f.__wrapped__()'
        subprocess.run([sys.executable,'-c',program], cwd=tmp_path, env=env, check=True, capture_output=True)
    patterns = ('nbs/**/*.ipynb', 'fastldm/**/*.py', 'pyproject.toml')
    def files(root):
        found = [f for pattern in patterns for f in root.glob(pattern) if '.ipynb_checkpoints' not in f.parts]
        return {f.relative_to(root).as_posix(): f.read_bytes() for f in found}
    was,now = files(ROOT),files(tmp_path)
    assert not [f for f in was.keys()|now.keys() if was.get(f)!=now.get(f)], 'run nbdev_export and nbdev_clean'

def outputs(nb): return [o for c in code(nb) for o in c['outputs']]

@pytest.mark.parametrize('nb', NBS, ids=name)
def test_notebook_was_run(nb):
    "It says what it is about, and holds its outputs: some, none of them an error or a warning."
    first,kinds = cells(nb)[0],[o.get('name',o['output_type']) for o in outputs(nb)]
    assert first['cell_type']=='markdown'
    assert re.match(r'# .+\n+> .+', src(first)), 'begin with "# Title" and "> one line"'
    assert kinds, 'run it: python scripts/run_nbs.py'
    assert not {'error','stderr'} & set(kinds)
    if nb.stem[:2].isdigit(): assert 'nbdev_export()' in src(code(nb)[-1]), 'end with nbdev.nbdev_export()'

@pytest.mark.parametrize('nb', NBS, ids=name)
def test_notebook_has_a_picture(nb):
    "A picture, a diagram or a widget's picture: no idea is shown in words alone."
    kinds = {kind for o in outputs(nb) for kind in o.get('data', {})}
    texts_of_pages = ''.join(src(c) for c in cells(nb) if c['cell_type']=='markdown')
    assert {'image/png','image/svg+xml','image/jpeg'} & kinds or re.search(r'!\[[^\]]*\]\(', texts_of_pages)

@pytest.mark.parametrize('nb', NBS, ids=name)
def test_notebook_is_small(nb): assert nb.stat().st_size < 2*2**20

def is_docstring(n):
    return isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant) and isinstance(n.value.value, str)

def statements(src):
    "Statements of the syntax tree, without docstrings."
    return sum(isinstance(n, ast.stmt) and not is_docstring(n) for n in ast.walk(ast.parse(src)))

def is_exported(c): return bool(re.match(r'#\s*\|\s*export', src(c)))

@pytest.mark.parametrize('nb', NUMBERED, ids=name)
def test_cells_are_short(nb):
    long = {src(c)[:160]: n for c in code(nb) if is_exported(c) and (n := statements(src(c)))>MAX_CELL}
    assert not long, f'exported cells of more than {MAX_CELL} statements'


# ---- how it reads: every notebook, test and script

SOURCES = [*NBS, *sorted((ROOT/'tests').glob('*.py')), *sorted((ROOT/'scripts').glob('*.py'))]

def programs(f):
    "The Python of a notebook, a text a cell, or of a file."
    if f.suffix=='.py': return [f.read_text(encoding='utf-8')]
    return [src(c) for c in code(f) if not re.match(r'\s*[%!]', src(c))]

def trees(f): return [ast.parse(p) for p in programs(f)]

def found(f, kind): return [n for t in trees(f) for n in ast.walk(t) if isinstance(n, kind)]

@pytest.mark.parametrize('f', SOURCES, ids=name)
def test_lines_fit_the_page(f):
    "No line of code is longer than JupyterLab and a diff show, addresses excepted."
    assert not [l for p in programs(f) for l in p.splitlines() if len(l)>MAX_LINE and '://' not in l]

@pytest.mark.parametrize('f', SOURCES, ids=name)
def test_one_statement_a_line(f):
    "No statement begins on the line on which the one before it ends: nothing is joined by a semicolon."
    joined = []
    for n in (n for t in trees(f) for n in ast.walk(t)):
        for field in ('body','orelse','finalbody'):
            block = getattr(n, field, None)
            if not isinstance(block, list): continue
            joined += [ast.unparse(b) for a,b in zip(block, block[1:]) if a.end_lineno==b.lineno]
    assert not joined

@pytest.mark.parametrize('f', SOURCES, ids=name)
def test_a_function_with_a_name_is_a_def(f):
    named = [n for n in found(f, (ast.Assign,ast.AnnAssign)) if isinstance(n.value, ast.Lambda)]
    assert not [ast.unparse(n) for n in named]

@pytest.mark.parametrize('f', SOURCES, ids=name)
def test_no_dictionary_arithmetic(f):
    "Nothing is unpacked that is chosen or built on the spot: `**(a if b else {})`, `**{**a, **b}`."
    unpacked = [k.value for n in found(f, ast.Call) for k in n.keywords if k.arg is None]
    unpacked += [v for n in found(f, ast.Dict) for k,v in zip(n.keys, n.values) if k is None]
    built = [v for v in unpacked if isinstance(v, (ast.IfExp,ast.BoolOp)) or isinstance(v, ast.Dict) and None in v.keys]
    assert not [ast.unparse(v) for v in built]

@pytest.mark.parametrize('nb', NBS, ids=name)
def test_imports_have_cells_of_their_own(nb):
    "A cell imports, or it does something else: nbdev runs the cells that import when it makes pages, and those only."
    mixed = []
    for t in trees(nb):
        imports = [n for n in t.body if isinstance(n, (ast.Import,ast.ImportFrom))]
        exports = 'nbdev_export' in ast.unparse(t)
        if imports and len(imports)<len(t.body) and not exports: mixed.append(ast.unparse(imports[0]))
    assert not mixed

def test_private_names_stay_at_home():
    "A name that begins with an underscore is used in its own module only."
    crossing = []
    for mod,f in MODULES.items():
        nodes = [*ast.walk(ast.parse(f.read_text(encoding='utf-8')))]
        imports = [(n, a) for n in nodes if isinstance(n, ast.ImportFrom) for a in n.names]
        stems = {m.split('.')[-1] for m in MODULES}
        modules = {a.asname or a.name for _,a in imports if a.name in stems}
        crossing += [f'{mod}: {a.name}' for n,a in imports if n.level and a.name.startswith('_')]
        for n in nodes:
            if not (isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name) and n.value.id in modules): continue
            if re.match(r'_[^_]', n.attr): crossing.append(f'{mod}: {n.value.id}.{n.attr}')
    assert not crossing


def test_gallery_is_whole():
    "Every figure stands in the gallery, under the title that its notebook has now."
    gallery = (ROOT/'figures/README.md').read_text(encoding='utf-8')
    for f in sorted((ROOT/'nbs/figures').glob('*.ipynb')):
        title = src(cells(f)[0]).splitlines()[0].lstrip('# ')
        if not (ROOT/'figures'/f'{f.stem}.png').exists(): continue
        assert f'## [{title}](../nbs/figures/{f.name})' in gallery, f'{f.stem}: run fastldm_figures'

# ---- sizes

def test_files_are_small():
    files = tree()
    assert not [f'{name(f)}: {f.stat().st_size/2**20:.1f} MiB' for f in files if f.stat().st_size>=16*2**20]
    assert sum(f.stat().st_size for f in files if 'weights' in f.parts) < 120*2**20

# ---- documentation

def undocumented(o):
    "Parameters without a comment of their own, on a line of their own; and the return value, where it is annotated."
    source = inspect.cleandoc('\n'+inspect.getsource(o)).splitlines()
    d,docs = ast.parse('\n'.join(source)).body[0],docments(o, args_kwargs=True)
    args = [(a.lineno,a.target.id) for a in d.body if isinstance(a, ast.AnnAssign)] if is_dataclass(o) else []
    if inspect.isclass(o): d = next((f for f in d.body if isinstance(f, ast.FunctionDef) and f.name=='__init__'), None)
    if d:
        a,ret = d.args,d.returns
        args += [(p.lineno,p.arg) for p in (*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, (a.vararg,a.kwarg)))]
        if ret and ast.unparse(ret)!='None': args.append((ret.end_lineno,'return'))
    args = [(line,n) for line,n in args if n not in CONTRACT]
    lines = [line for line,_ in args]
    silent = [n for line,n in args if not docs.get(n) and '#' not in source[line-1]]
    shared = [f'{n} (shares its line and comment)' for line,n in args if lines.count(line)>1]
    return silent+shared

def public(mod):
    "Functions and classes that a module defines and lists."
    m = import_module(f'fastldm.{mod}')
    for n in m.__all__:
        o = getattr(m, n)
        if callable(o) and not inspect.isclass(o): o = inspect.unwrap(o)
        if (inspect.isfunction(o) or inspect.isclass(o)) and o.__module__==m.__name__: yield n,o

@pytest.mark.parametrize('mod', MODULES)
def test_documented(mod):
    "Each public function and class has a docstring, each parameter a comment."
    bad = {n: miss for n,o in public(mod) if (miss := ['docstring']*(not o.__doc__)+undocumented(o))}
    assert not bad, '; '.join(f"{n}: {', '.join(v)}" for n,v in bad.items())


# ---- nothing of one computer

PLACE = re.compile(r'(?<![\w.:])(/(?:'+'|'.join(['work','tmp','root','home','Users'])+r')/[\w.-]+)')

def texts(f):
    "The text of a file; of a notebook its sources and its outputs in words, not its pictures."
    if f.suffix!='.ipynb': return [f.read_text(encoding='utf-8')]
    shown = [''.join(v) for o in outputs(f) for k,v in (*o.get('data',{}).items(), ('text',o.get('text','')))
             if isinstance(v, (str,list)) and not k.startswith('image/')]
    return [src(c) for c in cells(f)]+shown

def test_no_machine_paths():
    kinds = {'.py','.ipynb','.md','.ini','.toml','.yml','.json','.cff','.txt','.csv',''}
    found = {name(f): m for f in tree() if f.suffix in kinds for t in texts(f) if (m := PLACE.findall(t))}
    assert not found

PAGES = [*sorted(ROOT.glob('*.md')), *sorted((ROOT/'nbs').rglob('README.md')), ROOT/'figures'/'README.md', *NBS]

@pytest.mark.parametrize('page', PAGES, ids=name)
def test_links_lead_somewhere(page):
    "Links between files of the repository, from pages and from the prose of notebooks."
    prose = [page.read_text(encoding='utf-8')]
    if page.suffix=='.ipynb': prose = [src(c) for c in cells(page) if c['cell_type']=='markdown']
    links = [link for text in prose for link in re.findall(r'\]\((?!\w+:|#)([^)#\s]+)', text)]
    assert not [link for link in links if not (page.parent/link).exists()]

def test_one_version():
    import fastldm, yaml
    settings = dict(re.findall(r'(?m)^(\w+) = (.*)$', (ROOT/'settings.ini').read_text(encoding='utf-8')))
    cff = yaml.safe_load((ROOT/'CITATION.cff').read_text(encoding='utf-8'))
    assert settings['version']==fastldm.__version__==cff['version']
    assert f"## {settings['version']}" in (ROOT/'CHANGELOG.md').read_text(encoding='utf-8')

# ---- the tests themselves

def test_ruff_finds_nothing():
    "No unused import, undefined name or the like in library, notebooks, scripts and tests."
    call = [sys.executable, '-m', 'ruff', 'check', '--no-cache', '.']
    done = subprocess.run(call, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode==0, done.stdout+done.stderr

@pytest.mark.slow
def test_the_tests_of_a_file_share_a_process(tmp_path):
    "They share what they made; each notebook is on its own, so that both processes have work to the end."
    shutil.copy(ROOT/'tests/conftest.py', tmp_path)
    count = """import os, time
from pathlib import Path
import pytest
@pytest.mark.parametrize('i', range(4))
def test_where(i):
    time.sleep(.1)
    with open(Path(__file__).with_suffix('.txt'), 'a') as file: file.write(os.environ['PYTEST_XDIST_WORKER']+' ')"""
    for name in ('one','two','notebooks'): (tmp_path/f'test_{name}.py').write_text(count)
    call = [sys.executable, '-m', 'pytest', '-q', '-n', '2', '--dist', 'loadfile', '-p', 'no:cacheprovider', tmp_path]
    subprocess.run([*map(str, call)], cwd=tmp_path, check=True, capture_output=True)
    places = {name: set((tmp_path/f'test_{name}.txt').read_text().split()) for name in ('one','two','notebooks')}
    assert [len(places[name]) for name in ('one','two','notebooks')]==[1, 1, 2]
