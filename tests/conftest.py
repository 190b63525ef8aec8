"Every test: a seed, no network, no window; two threads, or one where `pytest -n` runs several files at once."
import os
if 'PYTEST_XDIST_WORKER' in os.environ: os.environ['OMP_NUM_THREADS'] = '1'
ENVIRONMENT = dict(OMP_NUM_THREADS='2', MPLBACKEND='Agg', TOKENIZERS_PARALLELISM='false', HF_HUB_OFFLINE='1',
                   HF_HUB_DISABLE_TELEMETRY='1')
for k,v in ENVIRONMENT.items():
    os.environ.setdefault(k, v)                     # before torch is imported

import pytest, torch
from fastldm.core import set_seed


def pytest_collection_modifyitems(config, items):
    "Skip what this machine cannot run, and say why."
    no = {}
    if 'fuzz' not in config.option.markexpr: no['fuzz'] = 'takes minutes: pytest -m fuzz'
    if 'bench' not in config.option.markexpr: no['bench'] = 'compares seconds on a quiet machine: pytest -m bench'
    if not torch.cuda.is_available(): no['gpu'] = 'no CUDA device'
    if not os.environ.get('FASTLDM_NET'): no['net'] = 'needs the network: set FASTLDM_NET=1'
    for item in items:
        for name,why in no.items():
            if item.get_closest_marker(name): item.add_marker(pytest.mark.skip(reason=why))

@pytest.hookimpl(optionalhook=True)                 # of pytest-xdist
def pytest_xdist_make_scheduler(config, log):
    "The tests of a file share what they made, so one process runs them all; each notebook stands alone."
    from xdist.scheduler import LoadFileScheduling
    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid):
            return nodeid if 'test_notebooks.py' in nodeid else super()._split_scope(nodeid)
    return Scheduling(config, log)

@pytest.fixture(autouse=True)
def seeded():
    set_seed(0)

@pytest.fixture(scope='module')
def mnist():
    from fastldm import load
    return load('mnist', 'cpu')

@pytest.fixture
def idle(mnist, monkeypatch):
    "The model of MNIST, whose network must not be called."
    def work(*args, **kwargs): pytest.fail('work was started')
    monkeypatch.setattr(mnist.denoiser, 'forward', work)
    return mnist

@pytest.fixture
def real():
    "`real('mnist', 'test')`: a data set of this computer; the test is skipped, with what to do, where there is none."
    from fastldm.data import get_dataset
    def get(name, split='train', **kw):
        try: return get_dataset(name, split=split, download=False, **kw)
        except FileNotFoundError as e: pytest.skip(f'{name} is not on this computer: {e}')
    return get

@pytest.fixture
def reads(monkeypatch):
    "The number of each shard that is read in the test, in order."
    from fastldm.data import Shards
    read = []
    load = Shards.load_shard
    def counted(self, i):
        if i not in self.loaded: read.append(i)
        return load(self, i)
    monkeypatch.setattr(Shards, 'load_shard', counted)
    return read
