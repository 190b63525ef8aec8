"Every notebook runs from top to bottom, in a copy of the repository, so that nothing here changes."
import shutil, sys
from pathlib import Path
import pytest
from nbdev.config import get_config
from test_playground import CHROMIUM

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT/'scripts'))
from run_nbs import run
QUICK = {'09_cond','12_ldm'}
NBS = sorted(f.relative_to(ROOT).as_posix() for f in (ROOT/'nbs').rglob('*.ipynb') if not any(p[0] in '._' for p in f.relative_to(ROOT).parts))
if CHROMIUM: NBS = [f for f in NBS if not f.endswith('_playground.ipynb')]       # run whole, in a browser, by test_playground

def execute(root, nb):
    "One notebook in its own process, on one thread: two at a time are quicker so than one on two threads."
    env = {**os.environ, 'OMP_NUM_THREADS':'1', 'PYTHONPATH':str(root), 'FASTLDM_FIGURES':str(root/'figures')}      # the copy's library and figures
    return subprocess.run([sys.executable,'scripts/run_nbs.py','--check','--timeout','600',nb], cwd=root, env=env, capture_output=True, text=True)

@pytest.fixture(scope='module')
def copy(tmp_path_factory):
    root = tmp_path_factory.mktemp('copy')
    skip = shutil.ignore_patterns('__pycache__', '.*', 'runs')
    for d in ('nbs','fastldm','figures','scripts'): shutil.copytree(ROOT/d, root/d, ignore=skip) if (ROOT/d).exists() else None
    for f in ('settings.ini','README.md','pyproject.toml'): shutil.copy(ROOT/f, root/f)
    return root

@pytest.mark.parametrize('nb', [pytest.param(n, id=n, marks=() if Path(n).stem in QUICK else pytest.mark.slow) for n in NBS])
def test_runs(nb, copy, monkeypatch):
    "A notebook in its own kernel, on one thread: `pytest -n 2` runs two at a time, which is quicker than one on two threads."
    for k,v in dict(OMP_NUM_THREADS='1', PYTHONPATH=str(copy), FASTLDM_FIGURES=str(copy/'figures')).items(): monkeypatch.setenv(k, v)      # the copy's library and figures
    monkeypatch.chdir(copy)
    _,_,error = run(nb, skip=get_config().tst_flags.split(), write=False)
    assert error is None, error
