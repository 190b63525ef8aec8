"Random arguments through `sample` of every shipped model: a right result, or one clear error before work."
import math
import os
import random
from functools import partial
import numpy as np
import pytest
import torch
from fastldm import available, load
from fastldm.diffusion import *
from fastldm.diffusion import samplers

pytestmark = pytest.mark.fuzz
ROUNDS = int(os.environ.get('FASTLDM_FUZZ', 60))
NAN = math.nan
STEPS = [name for name in samplers.__all__ if name.endswith('_step')]
SOLVERS = [name for name in samplers.__all__ if hasattr(getattr(samplers, name), 'reset')]
GRIDS = [name for name in samplers.__all__ if name.endswith('_times')]

ANY = dict( # of each argument: what makes sense, and what does not
    n=([1, 2, 3, np.int64(2), 2., torch.tensor(1)], [0, -1, 2.5, '2', True, [2], NAN]),
    steps=([1, 2, 3, 3., np.int32(2)], [0, -2, 1.5, '3', [2], NAN, math.inf, True]),
    step=([None, *STEPS, *SOLVERS, DPMSolver2M, UniPC(2), ddim_step, 'heun', 'euler_a', partial(heun_step, churn=.1)],
          ['heun_stop', 'karras_times', 'sample', '', 5, [ddim_step]]),
    times=([None, *GRIDS, karras_times, partial(karras_times, rho=3.)], ['ddim_step', 'karras', 7, torch.ones(4)]),
    seed=([0, 7, np.int64(3), 2**40, -5, None, 3., torch.Generator()], ['a', .5, NAN, True, [1]*9]),
    guidance_scale=([1, 0, 2., np.float32(2), torch.tensor(1.5), 100], [NAN, math.inf, -1, 1e10, '2', None, [2], True,
                                                                     {'nothing': 1.}, {'label': '2'}]),
    interval=([(0,1), (.2,.8), [.3,.3], np.array([.1,.9])], [(1.,.3), (-1,2), NAN, 'ab', (0,), None, (NAN,1)]),
    precision=([None, 'bf16'], ['fp16', 16, True]),
    batch_size=([1, 2, 256, np.int64(2)], [0, -1, '2', 1.5, NAN]),
)
OF_LATENTS = dict( # of `LatentDiffusion` only
    first=([0, 5, 1_000_002, 2**33], [-1, 'a', .5, None]),
    order=([None], ['abc', 5, ['nothing'], []]),
    callback=([None, lambda x,t,s: None], [5, 'print']),
    latents=([False, True], []),
    label_of_another=([], [dict(lable=3), dict(prompt='a'), dict(nothing=1)]),
)
OF_TEXTS = dict( # of `TextToImage` only; by codes and by diffusion
    prompt=(['a red ship', '', None], [5, ['a',3], [], b'a', dict(a=1)]),
    candidates=([1, 2, np.int64(1)], [0, -1, 'a', 1.5, None]),
)
OF_CODES = dict(
    temperature=([1., .5, 0, [1.,.7]], [-1, NAN, 'a', [1.], math.inf]),
    top_k=([None, 5, 1], [0, -1, 'a', 1.5]),
    top_p=([None, .5, 1.], [0, -.1, 2, NAN, 'a']),
)

def conditions_of(embedder):
    "What makes sense for a condition of one sample or of all, and what does not."
    bad = ['x'*9, 1.5, [], [[]], object(), torch.full((2,), NAN), dict(nothing=1), 10**6, b'a', [None,None,None,None]]
    if isinstance(embedder, LabelEmbedder):
        return [0, 1, None, '0', np.int64(1), torch.tensor(1), 1.], bad+[-1, True, embedder.n_classes, [0]*7]
    if isinstance(embedder, AttributeEmbedder):
        name = embedder.names[0]
        ones = torch.ones(embedder.n_attrs)
        return [None, {name: True}, {name: 0}, ones, [0]*embedder.n_attrs], bad+[{name: 'yes'}, 1]
    if isinstance(embedder, MaskEmbedder):
        mask = torch.zeros(embedder.size, embedder.size).long()
        return [None, mask, mask.numpy()], bad+[mask+99, mask.float(), mask[:3], mask.bool()]
    return [None], bad

def constraints_of(model, rng):
    "Constraints that fit, and what does not."
    side = model.decode(torch.zeros(1, *model.shape)).shape
    x = torch.rand(side, generator=torch.Generator().manual_seed(rng.randrange(99)))*2-1
    hole = torch.zeros(side[2:])
    hole[:9,3:8] = 1
    good = [None, Constraint(), vary(x, .5), inpaint(x, hole, iters=1), edit(x, hole, .5), invert(x, rounds=0)]
    return good, [x, 'inpaint', 5, Constraint, vary(x[...,:-4], .5), upscale(x, 2), vary(x.repeat(9,1,1,1), .5)]

def draw_arguments(rng, pools, wrong):
    "Some arguments at random; `wrong` of them make no sense."
    chosen = rng.sample(sorted(pools), rng.randint(1, len(pools)))
    arguments = {name: rng.choice(pools[name][0]) for name in chosen if pools[name][0]}
    for name in rng.sample(sorted(name for name in pools if pools[name][1]), wrong):
        arguments[name] = rng.choice(pools[name][1])
    unknown = arguments.pop('label_of_another', {})
    return arguments | unknown

def networks(model):
    "What draws: calling it is work."
    found = [] if getattr(model, 'denoiser', None) is None else [model.denoiser.net]
    return found+list(getattr(model, 'priors', []))

def try_out(model, arguments, wrong):
    "Sample, and check the pictures or the error."
    calls = []
    hooks = [net.register_forward_pre_hook(lambda *_: calls.append(1)) for net in networks(model)]
    try: pictures = model.sample(**arguments)
    except ValueError as e:
        assert wrong, f'{arguments}: {e}'
        assert not calls, f'{arguments}: work was begun, then {e}'
        assert 10<len(str(e))<600, arguments
        return
    finally:
        for hook in hooks: hook.remove()
    assert not wrong, arguments
    assert pictures.ndim==4 and pictures.dtype==torch.float32 and pictures.isfinite().all(), arguments
    if not arguments.get('latents'): assert pictures.min()>=0 and pictures.max()<=1, arguments

@pytest.mark.parametrize('name', available('LatentDiffusion'))
def test_latent_diffusion(name):
    model = load(name, 'cpu')
    rng = random.Random(name)
    pools = ANY | OF_LATENTS | {k: conditions_of(e) for k,e in model.denoiser.conditioner.embedders.items()}
    for _ in range(ROUNDS):
        pools['constraint'] = constraints_of(model, rng)
        wrong = rng.choice([0,0,1,1,2])
        usual = dict(n=rng.choice([1,2]), steps=rng.choice([1,2]))
        try_out(model, usual | draw_arguments(rng, pools, wrong), wrong)

@pytest.mark.parametrize('prior', ['codes', 'diffusion'])
@pytest.mark.parametrize('name', available('TextToImage'))
def test_text_to_image(name, prior):
    model = load(name, 'cpu')
    rng = random.Random(name+prior)
    of_codes = {k: ANY[k] for k in ('n','seed','batch_size')} | OF_CODES
    pools = (of_codes if prior=='codes' else ANY) | OF_TEXTS
    for _ in range(ROUNDS//(15 if prior=='codes' else 5)):
        wrong = rng.choice([0,1,1,1,2])
        usual = dict(n=1, prior=prior) | (dict(steps=1) if prior=='diffusion' else {})
        try_out(model, usual | draw_arguments(rng, pools, wrong), wrong)
