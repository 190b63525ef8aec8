"Every notebook runs from top to bottom, in a copy of the repository, so that nothing here changes."
import os, shutil, sys
from pathlib import Path
import nbformat, pytest
from nbformat.v4 import new_code_cell, new_notebook
from nbdev.config import get_config
from test_playground import CHROMIUM

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT/'scripts'))
from run_nbs import checker
QUICK = {'03_cond','06_ldm'}
NBS = sorted(f.relative_to(ROOT).as_posix() for f in (ROOT/'nbs').rglob('*.ipynb') if not any(p[0] in '._' for p in f.relative_to(ROOT).parts))
if CHROMIUM: NBS = [f for f in NBS if not f.endswith('_playground.ipynb')]       # run whole, in a browser, by test_playground

@pytest.fixture(scope='module')
def copy(tmp_path_factory):
    "A copy of the repository, whose library and figures the notebooks use, on one thread: `pytest -n 2` runs two at a time, which is quicker than one on two threads."
    root = tmp_path_factory.mktemp('copy')
    skip = shutil.ignore_patterns('__pycache__', '.*', 'runs')
    for d in ('nbs','fastldm','figures','scripts'): shutil.copytree(ROOT/d, root/d, ignore=skip) if (ROOT/d).exists() else None
    for f in ('settings.ini','README.md','pyproject.toml'): shutil.copy(ROOT/f, root/f)
    with pytest.MonkeyPatch.context() as m:
        for k,v in dict(OMP_NUM_THREADS='1', PYTHONPATH=f"{root}{os.pathsep}{root/'scripts'}", FASTLDM_FIGURES=str(root/'figures')).items(): m.setenv(k, v)
        yield root

@pytest.fixture(scope='module')
def check(copy):
    with checker() as check: yield check

@pytest.mark.parametrize('nb', [pytest.param(n, id=n, marks=() if Path(n).stem in QUICK else pytest.mark.slow) for n in NBS])
def test_runs(nb, copy, check):
    _,_,error = check(str(copy/nb), skip=get_config().tst_flags.split())
    assert error is None, error

def written(path, *cells):
    nbformat.write(new_notebook(cells=[new_code_cell(c) for c in cells]), path)
    return str(path)

def test_what_is_wrong_is_reported(copy, check, tmp_path):
    "An error, a process that ends, one that does not; cells that are to be left are left; the library is the copy's."
    skip = ['slow']
    assert check(written(tmp_path/'right.ipynb', 'x = 1', '#| slow\nx = 2', '#| eval: false\nx = 3', 'assert x==1'), skip)[2] is None
    assert 'ZeroDivisionError' in check(written(tmp_path/'wrong.ipynb', 'y = 0', '1/y', 'open("after","w")'), skip)[2]
    assert 'ended with 7' in check(written(tmp_path/'ends.ipynb', 'import os; os._exit(7)'), skip)[2]
    assert 'not done after 1 ' in check(written(tmp_path/'long.ipynb', 'import time; time.sleep(99)'), skip, timeout=1)[2]
    assert check(written(tmp_path/'copy.ipynb', f'import fastldm; assert fastldm.__file__.startswith({str(copy)!r}), fastldm.__file__'), skip)[2] is None
    assert not (tmp_path/'after').exists()
