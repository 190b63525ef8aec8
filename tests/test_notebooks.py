"Every notebook runs from top to bottom, in a copy of the repository, so that nothing here changes."
import os, shutil, sys
from pathlib import Path
import nbformat, pytest
from nbformat.v4 import new_code_cell, new_notebook
from nbdev.config import get_config
from browser import CHROMIUM

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT/'scripts'))
from run_nbs import checker
QUICK = {'03_cond', '06_ldm'}
NBS = sorted(f.relative_to(ROOT).as_posix() for f in (ROOT/'nbs').rglob('*.ipynb')
             if not any(part[0] in '._' for part in f.relative_to(ROOT).parts))
if CHROMIUM: NBS = [f for f in NBS if not f.endswith('_playground.ipynb')]     # test_playground runs them

def copy_repository(root):
    "What notebooks need of the repository, in a folder of its own; the folder."
    skip = shutil.ignore_patterns('__pycache__', '.*', 'runs')
    for folder in ('nbs','fastldm','figures','scripts'): shutil.copytree(ROOT/folder, root/folder, ignore=skip)
    for file in ('settings.ini','README.md','pyproject.toml'): shutil.copy(ROOT/file, root/file)
    return root

@pytest.fixture(scope='module')
def copy(tmp_path_factory):
    """A copy of the repository, whose library and figures the notebooks use, on one thread: `pytest -n 2` runs two
    at a time, which is quicker than one on two threads."""
    root = copy_repository(tmp_path_factory.mktemp('copy'))
    path = os.pathsep.join([str(root), str(root/'scripts')])
    with pytest.MonkeyPatch.context() as m:
        m.setenv('OMP_NUM_THREADS', '1')
        m.setenv('PYTHONPATH', path)
        m.setenv('FASTLDM_FIGURES', str(root/'figures'))
        yield root

@pytest.fixture(scope='module')
def check(copy):
    with checker() as check: yield check

def marks(notebook): return () if Path(notebook).stem in QUICK else pytest.mark.slow

@pytest.mark.parametrize('nb', [pytest.param(n, id=n, marks=marks(n)) for n in NBS])
def test_runs(nb, copy, check):
    _,_,error = check(str(copy/nb), skip=get_config().tst_flags.split())
    assert error is None, error

def written(path, *cells):
    nbformat.write(new_notebook(cells=[new_code_cell(c) for c in cells]), path)
    return str(path)

def test_what_is_wrong_is_reported(copy, check, tmp_path):
    "An error, a process that ends, one that does not; cells that are to be left are left; the library is the copy's."
    skip = ['slow']
    def error(name, *cells, **options): return check(written(tmp_path/f'{name}.ipynb', *cells), skip, **options)[2]
    assert error('right', 'x = 1', '#| slow\nx = 2', '#| eval: false\nx = 3', 'assert x==1') is None
    assert 'ZeroDivisionError' in error('wrong', 'y = 0', '1/y', 'open("after","w")')
    assert 'ended with 7' in error('ends', 'import os; os._exit(7)')
    assert 'not done after 1 ' in error('long', 'import time; time.sleep(99)', timeout=1)
    assert error('copy', f'import fastldm; assert fastldm.__file__.startswith({str(copy)!r}), fastldm.__file__') is None
    assert not (tmp_path/'after').exists()
