"A picture depends on its seed and its number alone: every solver on every shipped model, in batches of 1, 3 and 64."
import pytest
import torch
from fastldm import available, load
from fastldm.diffusion import samplers

STEPS = [name for name in samplers.__all__ if name.endswith('_step')]
SOLVERS = [name for name in samplers.__all__ if isinstance(getattr(samplers, name), type) and name!='WatchedDenoiser']
GRIDS = dict(heun_step='karras_times', euler_maruyama_step='uniform_times', pc_step='uniform_times')    # else angle
WITHIN = 1e-4
loaded = {}

def model_of(name):
    "A shipped model, loaded once."
    if name not in loaded: loaded[name] = load(name, 'cpu')
    return loaded[name]

def conditions(model, n):
    "Something for each of `n` samples to follow."
    names = model.denoiser.conditioner.embedders
    if 'label' in names: return dict(label=[i%names['label'].n_classes for i in range(n)])
    if 'attrs' in names: return dict(attrs=[{names['attrs'].names[i%4]: True} for i in range(n)])
    return {}

def check(model, step, sizes, n, steps=4):
    "Pictures of a `LatentDiffusion`, or latents where its decoder rounds to codes, in batches of each size."
    latents = not hasattr(model.autoencoder, 'encoder')
    sampling = dict(steps=steps, step=step, times=GRIDS.get(step, 'angle_times'), seed=2, guidance_scale=2.,
                    latents=latents)
    whole = model.sample(n, batch_size=n, **sampling, **conditions(model, n))
    assert whole.dtype==torch.float32
    for size in sizes:
        few = min(n, 2*size)
        parts = model.sample(few, batch_size=size, **sampling, **conditions(model, few))
        largest = max(1., whole.abs().max())                            # latents are not bounded by 1
        assert (parts-whole[:few]).abs().max()<WITHIN*largest, size

def diffusion_of(name):
    "The `LatentDiffusion` of a shipped model."
    model = model_of(name)
    return getattr(model, 'diffusion', model)

@pytest.mark.parametrize('step', STEPS+SOLVERS)
def test_every_solver(step):
    check(diffusion_of('mnist'), step, (1,3), 64)

@pytest.mark.parametrize('name', available())
def test_every_model(name):
    model = diffusion_of(name)
    check(model, model.step, (1,3), 4, steps=3)

@pytest.mark.fuzz
@pytest.mark.parametrize('name', available())
@pytest.mark.parametrize('step', STEPS+SOLVERS)
def test_every_solver_on_every_model(name, step):
    check(diffusion_of(name), step, (1,3), 64)

@pytest.mark.fuzz
@pytest.mark.parametrize('name', available('TextToImage'))
def test_codes_of_every_model(name):
    "Codes are drawn one by one, so one that differs changes all that follow."
    model = model_of(name)
    prompts = ['a red ship', 'a bird in winter', '']*2
    whole = model.sample(prompts, prior='codes', seed=2)
    for size in (1,3): assert (model.sample(prompts, prior='codes', seed=2, batch_size=size)-whole).abs().max()<WITHIN
