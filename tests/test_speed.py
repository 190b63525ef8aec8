"Speed beside diffusers, by `pytest -m bench`. Nothing here fails for being slow; figure AT2 has the ratios."
import pytest, torch
from contextlib import nullcontext
from fastldm.core import n_params, set_seed
from fastldm.metrics import PROGRAMS
pytest.importorskip('pytest_benchmark')
pytestmark = [pytest.mark.slow, pytest.mark.bench]

WIDTHS = dict(fastldm=48, diffusers=36)                 # of the first level, for as many parameters
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

def network(program):
    pytest.importorskip('diffusers')
    return PROGRAMS[program].network(WIDTHS[program], SIDE).eval()

def test_as_many_parameters():
    assert n_params(network('fastldm'))==pytest.approx(n_params(network('diffusers')), rel=.05)

BOTH = pytest.mark.parametrize('program,precision', [
    ('fastldm',None), ('fastldm','bf16'), ('diffusers',None), ('diffusers','bf16')])

@pytest.mark.benchmark(group='draw 16 latents 4x8x8 in 20 calls')
@BOTH
def test_draw(benchmark, noise, program, precision):
    "Twenty calls of the network give finite latents."
    model = network(program)
    with torch.autocast('cpu', torch.bfloat16) if precision else nullcontext():
        x = benchmark.pedantic(PROGRAMS[program].sample, (model,noise), rounds=3, warmup_rounds=1)
    assert x.shape==noise.shape and x.isfinite().all()

@pytest.mark.benchmark(group='train on 16 latents 4x8x8')
@BOTH
def test_train(benchmark, noise, program, precision):
    "A training step changes more than half of the weights, and leaves them finite."
    model = network(program)
    before = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
    step = PROGRAMS[program].trainer(model, noise, precision)
    benchmark.pedantic(step, rounds=5, warmup_rounds=2)
    after = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert after.isfinite().all() and (after!=before).float().mean()>.5
