"*Run All* in JupyterLab, in a real browser and without a network, works in every notebook straight after the install."
import os
from pathlib import Path
import pytest
from browser import browser_page, jupyterlab, run_all, shut_down
from test_notebooks import copy_repository

ROOT = Path(__file__).parents[1]
SAMPLE = ['index', 'core/01_show', 'data/06_synthetic', 'diffusion/05_samplers', 'codes/01_store', 'metrics/02_control',
          'recipes/00_stages', 'figures/a5_one_dimension']                 # one of each kind; `pytest -m lab` opens all
NBS = sorted(f.relative_to(ROOT/'nbs').with_suffix('').as_posix() for f in (ROOT/'nbs').rglob('*.ipynb')
             if '.ipynb_checkpoints' not in f.parts)

def marks(name):
    if name in SAMPLE: return []
    return [pytest.mark.skipif(not os.environ.get('FASTLDM_LAB'), reason='set FASTLDM_LAB=1')]

@pytest.fixture(scope='module')
def lab(tmp_path_factory):
    "A server in a copy of the repository: notebooks export and draw there."
    root = copy_repository(tmp_path_factory.mktemp('copy'))
    offline = dict(HF_HUB_OFFLINE='1', PYTHONPATH=str(root), FASTLDM_FIGURES=str(root/'figures'), OMP_NUM_THREADS='1')
    with jupyterlab(root/'nbs', tmp_path_factory.mktemp('lab'), **offline) as address: yield address

@pytest.fixture(scope='module')
def page(lab):
    with browser_page(minutes=20) as page: yield page

@pytest.mark.lab
@pytest.mark.slow
@pytest.mark.parametrize('name', [pytest.param(n, id=n, marks=marks(n)) for n in NBS])
def test_run_all(lab, page, name):
    assert run_all(page, lab(f'{name}.ipynb'))==[]
    shut_down(page)
