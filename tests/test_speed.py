"Speed beside diffusers: `pytest -m bench` prints the table. Nothing here fails for being slow; figure AT2 has the ratios over sizes, and where the time goes."
import ast, json, pytest, torch
from contextlib import nullcontext
from pathlib import Path
from fastldm.core import n_params, set_seed
pytest.importorskip('pytest_benchmark')
pytestmark = [pytest.mark.slow, pytest.mark.bench]

@pytest.fixture(scope='module')
def at2():
    "The imports and functions of the notebook of figure AT2, so that both time the same loops."
    names = {}
    for c in json.loads((Path(__file__).parents[1]/'nbs/figures/at2_speed.ipynb').read_text(encoding='utf-8'))['cells']:
        if c['cell_type']!='code': continue
        body = [o for o in ast.parse(''.join(c['source'])).body if isinstance(o, (ast.Import,ast.ImportFrom,ast.FunctionDef))]
        exec(compile(ast.Module(body, []), 'at2_speed', 'exec'), names)
    return names

@pytest.fixture(autouse=True)
def two_threads():
    n = torch.get_num_threads(); torch.set_num_threads(2)
    yield
    torch.set_num_threads(n)

@pytest.fixture
def noise(): set_seed(0); return torch.randn(16,4,8,8)

def network(at2, who):
    pytest.importorskip('diffusers')
    return at2['ours'](48).eval() if who=='ours' else at2['theirs'](36,8).eval()

def test_as_many_parameters(at2): assert n_params(network(at2,'ours'))==pytest.approx(n_params(network(at2,'theirs')), rel=.05)

BOTH = pytest.mark.parametrize('who,precision', [('ours',None),('ours','bf16'),('theirs',None),('theirs','bf16')])

@pytest.mark.benchmark(group='draw 16 latents 4x8x8 in 20 calls')
@BOTH
def test_draw(benchmark, at2, noise, who, precision):
    model = network(at2, who)
    with torch.autocast('cpu', torch.bfloat16) if precision else nullcontext():
        x = benchmark.pedantic(at2[f'draw_{who}'], (model,noise), rounds=3, warmup_rounds=1)
    assert x.shape==noise.shape and x.isfinite().all()

@pytest.mark.benchmark(group='train on 16 latents 4x8x8')
@BOTH
def test_train(benchmark, at2, noise, who, precision):
    model = network(at2, who)
    before = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
    benchmark.pedantic(at2[f'trainer_{who}'](model, noise, precision), rounds=5, warmup_rounds=2)
    after = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert after.isfinite().all() and (after!=before).float().mean()>.5
