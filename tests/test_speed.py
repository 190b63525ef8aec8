"Speed beside diffusers, by `pytest -m bench`. Nothing here fails for being slow; figure AT2 has the ratios."
import pytest, torch
from contextlib import nullcontext
from fastldm.core import n_params, set_seed
from fastldm.metrics import PROGRAMS
pytest.importorskip('pytest_benchmark')
pytestmark = [pytest.mark.slow, pytest.mark.bench]

WIDTHS = dict(ours=48, theirs=36)                       # of the first level, for as many parameters
SIDE = 8                                                # of the latents

@pytest.fixture(autouse=True)
def two_threads():
    n = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(n)

@pytest.fixture
def noise():
    set_seed(0)
    return torch.randn(16, 4, SIDE, SIDE)

def network(who):
    pytest.importorskip('diffusers')
    return PROGRAMS[who].network(WIDTHS[who], SIDE).eval()

def test_as_many_parameters():
    assert n_params(network('ours'))==pytest.approx(n_params(network('theirs')), rel=.05)

BOTH = pytest.mark.parametrize('who,precision', [('ours',None), ('ours','bf16'), ('theirs',None), ('theirs','bf16')])

@pytest.mark.benchmark(group='draw 16 latents 4x8x8 in 20 calls')
@BOTH
def test_draw(benchmark, noise, who, precision):
    "Twenty calls of the network give finite latents."
    model = network(who)
    with torch.autocast('cpu', torch.bfloat16) if precision else nullcontext():
        x = benchmark.pedantic(PROGRAMS[who].sample, (model,noise), rounds=3, warmup_rounds=1)
    assert x.shape==noise.shape and x.isfinite().all()

@pytest.mark.benchmark(group='train on 16 latents 4x8x8')
@BOTH
def test_train(benchmark, noise, who, precision):
    "A training step changes more than half of the weights, and leaves them finite."
    model = network(who)
    before = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
    step = PROGRAMS[who].trainer(model, noise, precision)
    benchmark.pedantic(step, rounds=5, warmup_rounds=2)
    after = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert after.isfinite().all() and (after!=before).float().mean()>.5
