"Our numbers against somebody else's: whole trajectories of diffusers' schedulers on the same network, step by step."
import pytest, torch
from fastldm.diffusion import SqrtLinear, VP
from fastldm.diffusion import Denoiser
from fastldm.diffusion import sample, ddim_step, euler_step, heun_step, DPMSolver2M, UniPC
from fastldm.diffusion import UNet

diffusers = pytest.importorskip('diffusers')
T,N = 1000,20
BETAS = dict(num_train_timesteps=T, beta_start=.0015, beta_end=.0195, beta_schedule='scaled_linear', timestep_spacing='trailing')

@pytest.fixture(scope='module')
def model():
    "A network that has learnt nothing but is no constant, speaking eps."
    torch.manual_seed(0)
    net = UNet(3, (16,32), attention=(False,True))
    for p in net.parameters(): p.data += .03*torch.randn_like(p)
    return Denoiser(net, SqrtLinear(), predict='eps').eval().requires_grad_(False)

@pytest.fixture(scope='module')
def noise(): return torch.randn(2,3,8,8, generator=torch.Generator().manual_seed(1))

def eps(model, x, step):
    "What a diffusers user's network would answer: the noise, at an integer step."
    t = (torch.as_tensor(float(step))+1)/T
    a,σ = model.schedule(t.double())
    return ((x - a*model(x,t))/σ).float()

def ours(model, x, ts, step):
    seen = []
    sample(model, x, ts, step, cb=lambda x,t,s: seen.append(x))
    return seen

def theirs(scheduler, model, x, to_vp=lambda x,sigma: x):
    scheduler.set_timesteps(N)
    seen = []
    for t in scheduler.timesteps:
        x = scheduler.step(eps(model, scheduler.scale_model_input(x,t), t), t, x).prev_sample
        seen.append(x)
    return seen

def times(scheduler):
    scheduler.set_timesteps(N)
    steps = list(dict.fromkeys(scheduler.timesteps.tolist()))         # Heun lists them twice
    return torch.tensor([(t+1)/T for t in steps]+[0.]).double()

def same(a, b): assert (a-b).abs().max() < 1e-4*max(1., b.abs().max().item()), (a-b).abs().max()

def test_ddim(model, noise):
    sch = diffusers.DDIMScheduler(**BETAS, clip_sample=False)
    for a,b in zip(ours(model,noise,times(sch),ddim_step), theirs(sch,model,noise), strict=True): same(a,b)

def test_dpm_solver_2m(model, noise):
    sch = diffusers.DPMSolverMultistepScheduler(**BETAS, solver_order=2, algorithm_type='dpmsolver++', solver_type='midpoint', final_sigmas_type='zero')
    for a,b in zip(ours(model,noise,times(sch),DPMSolver2M()), theirs(sch,model,noise), strict=True): same(a,b)

def test_unipc(model, noise):
    "UniPC corrects a step when the next one is taken, in diffusers before the step is returned; so the ends are compared."
    sch = diffusers.UniPCMultistepScheduler(**BETAS, solver_order=2, solver_type='bh2', final_sigmas_type='zero')
    same(ours(model,noise,times(sch),UniPC(2))[-1], theirs(sch,model,noise)[-1])

@pytest.mark.parametrize('name,step', [('EulerDiscreteScheduler',euler_step), ('HeunDiscreteScheduler',heun_step)])
def test_in_sigma(model, noise, name, step):
    "Schedulers that keep x/alpha: ours is divided before it is compared."
    sch = getattr(diffusers,name)(**BETAS)
    ts = times(sch)
    alphas = [model.schedule(s[None])[0].item() for s in ts]
    mine = [x/a for x,a in zip(ours(model,noise,ts,step), alphas[1:])]
    other = theirs(sch, model, noise/alphas[0])
    if name.startswith('Heun'): other = other[1::2] + other[-1:]       # the second half of each step, and the single last one
    for a,b in zip(mine,other, strict=True): same(a,b)

def test_schedules():
    "alpha_bar of the linear and the sqrt-linear DDPM against the continuous forms."
    lin = diffusers.DDPMScheduler(T, beta_start=1e-4, beta_end=.02, beta_schedule='linear').alphas_cumprod
    t = (torch.arange(T)+1).double()/T
    assert (VP(.1,20.).alpha(t)**2-lin).abs().max() < 2e-3             # DDPM is a discretisation of VP
    sq = diffusers.DDPMScheduler(T, beta_start=.0015, beta_end=.0195, beta_schedule='scaled_linear').alphas_cumprod
    assert (SqrtLinear().alpha(t)**2-sq).abs().max() < 1e-5
