"Our numbers against somebody else's: whole trajectories of diffusers' schedulers on the same network, step by step."
import pytest
import torch
from fastldm.diffusion import (Denoiser, DPMSolver2M, SqrtLinear, UNet, UniPC, VP,
                               ddim_step, euler_step, heun_step, sample)

diffusers = pytest.importorskip('diffusers')
T = 1000                                                          # steps of training
N = 20                                                            # steps of sampling
BETAS = dict(num_train_timesteps=T, beta_start=.0015, beta_end=.0195, beta_schedule='scaled_linear',
             timestep_spacing='trailing')

@pytest.fixture(scope='module')
def model():
    "An untrained network that is no constant, and predicts the noise."
    torch.manual_seed(0)
    net = UNet(3, (16,32), attention=(False,True))
    for p in net.parameters(): p.data += .03*torch.randn_like(p)
    return Denoiser(net, SqrtLinear(), predict='eps').eval().requires_grad_(False)

@pytest.fixture(scope='module')
def noise(): return torch.randn(2,3,8,8, generator=torch.Generator().manual_seed(1))

def eps(model, x, step):
    "What the network of a diffusers user would predict: the noise, at an integer step."
    t = (torch.as_tensor(float(step))+1)/T
    α, σ = model.schedule(t.double())
    return ((x - α*model(x,t))/σ).float()

def our_path(model, x, ts, step):
    "The result of each step."
    states = []
    sample(model, x, ts, step, cb=lambda x,t,s: states.append(x))
    return states

def their_path(scheduler, model, x):
    "The result of each step of a scheduler."
    scheduler.set_timesteps(N)
    states = []
    for t in scheduler.timesteps:
        x = scheduler.step(eps(model, scheduler.scale_model_input(x,t), t), t, x).prev_sample
        states.append(x)
    return states

def times_of(scheduler):
    "Its integer steps as times."
    scheduler.set_timesteps(N)
    steps = list(dict.fromkeys(scheduler.timesteps.tolist()))     # Heun lists them twice
    return torch.tensor([(step+1)/T for step in steps]+[0.]).double()

def assert_same(ours, theirs):
    error = (ours-theirs).abs().max()
    assert error < 1e-4*max(1., theirs.abs().max().item()), error

def assert_same_path(ours, theirs):
    for a,b in zip(ours, theirs, strict=True): assert_same(a, b)

def test_ddim(model, noise):
    "Each step is that of DDIMScheduler."
    scheduler = diffusers.DDIMScheduler(**BETAS, clip_sample=False)
    ours = our_path(model, noise, times_of(scheduler), ddim_step)
    assert_same_path(ours, their_path(scheduler, model, noise))

def test_dpm_solver_2m(model, noise):
    "Each step is that of DPMSolverMultistepScheduler."
    scheduler = diffusers.DPMSolverMultistepScheduler(**BETAS, solver_order=2, algorithm_type='dpmsolver++',
                                                      solver_type='midpoint', final_sigmas_type='zero')
    ours = our_path(model, noise, times_of(scheduler), DPMSolver2M())
    assert_same_path(ours, their_path(scheduler, model, noise))

def test_unipc(model, noise):
    "The ends are compared: we correct a step when the next is taken, diffusers before it is returned."
    scheduler = diffusers.UniPCMultistepScheduler(**BETAS, solver_order=2, solver_type='bh2', final_sigmas_type='zero')
    ours = our_path(model, noise, times_of(scheduler), UniPC(2))
    assert_same(ours[-1], their_path(scheduler, model, noise)[-1])

@pytest.mark.parametrize('name,step', [('EulerDiscreteScheduler',euler_step), ('HeunDiscreteScheduler',heun_step)])
def test_in_sigma(model, noise, name, step):
    "Schedulers that keep x/alpha: ours is divided before it is compared."
    scheduler = getattr(diffusers, name)(**BETAS)
    ts = times_of(scheduler)
    alphas = [model.schedule(s[None])[0].item() for s in ts]
    ours = [x/a for x,a in zip(our_path(model,noise,ts,step), alphas[1:])]
    theirs = their_path(scheduler, model, noise/alphas[0])
    if name.startswith('Heun'): theirs = theirs[1::2]+theirs[-1:] # second halves of the steps, and the single last one
    assert_same_path(ours, theirs)

def test_schedules():
    "alpha_bar of the linear and the sqrt-linear DDPM against the continuous forms."
    t = (torch.arange(T)+1).double()/T
    linear = diffusers.DDPMScheduler(T, beta_start=1e-4, beta_end=.02, beta_schedule='linear').alphas_cumprod
    assert (VP(.1,20.).alpha(t)**2-linear).abs().max() < 2e-3     # DDPM is a discretisation of VP
    scaled = diffusers.DDPMScheduler(T, beta_start=.0015, beta_end=.0195, beta_schedule='scaled_linear').alphas_cumprod
    assert (SqrtLinear().alpha(t)**2-scaled).abs().max() < 1e-5
