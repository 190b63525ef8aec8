"Speed beside diffusers: `pytest -m bench` prints the table. Nothing here fails for being slow; figure AT2 has the ratios over sizes, and where the time goes."
import pytest, torch
from fastldm.core import n_params, set_seed
from fastldm.denoiser import Denoiser, diffusion_loss
from fastldm.samplers import DPMSolver2M, angle_times, sample
from fastldm.schedules import Cosine
from fastldm.train import Learner
from fastldm.unet import UNet
pytest.importorskip('pytest_benchmark')
pytestmark = [pytest.mark.slow, pytest.mark.bench]

@pytest.fixture(autouse=True)
def two_threads():
    n = torch.get_num_threads(); torch.set_num_threads(2)
    yield
    torch.set_num_threads(n)

@pytest.fixture
def noise(): set_seed(0); return torch.randn(16,4,8,8)

def ours(): return Denoiser(UNet(4, (48,96)), Cosine()).eval()
def theirs():
    diffusers = pytest.importorskip('diffusers')
    return diffusers.UNet2DModel(8, 4, 4, layers_per_block=2, block_out_channels=(36,72), down_block_types=('DownBlock2D','AttnDownBlock2D'), up_block_types=('AttnUpBlock2D','UpBlock2D'), norm_num_groups=6).eval()

def test_as_many_parameters(): assert n_params(ours())==pytest.approx(n_params(theirs()), rel=.05)

@pytest.mark.benchmark(group='draw 16 latents 4x8x8 in 20 calls')
@pytest.mark.parametrize('precision', ['fp32','bf16'])
def test_draw_ours(benchmark, noise, precision):
    model = ours()
    def draw():
        with torch.autocast('cpu', torch.bfloat16, enabled=precision=='bf16'): return sample(model, noise, angle_times(model.schedule,20), DPMSolver2M())
    assert benchmark.pedantic(draw, rounds=3, warmup_rounds=1).isfinite().all()

@pytest.mark.benchmark(group='draw 16 latents 4x8x8 in 20 calls')
def test_draw_diffusers(benchmark, noise):
    model = theirs()
    from diffusers import DPMSolverMultistepScheduler
    @torch.no_grad()
    def draw():
        s,x = DPMSolverMultistepScheduler(),noise; s.set_timesteps(20)
        for t in s.timesteps: x = s.step(model(x, t).sample, t, x).prev_sample
        return x
    assert benchmark.pedantic(draw, rounds=3, warmup_rounds=1).isfinite().all()

class Latents:
    def __init__(self, x): self.latent = x
    def __len__(self): return len(self.latent)
    def __getitems__(self, i): return dict(latent=self.latent[i])

@pytest.mark.benchmark(group='train on 16 latents 4x8x8')
@pytest.mark.parametrize('precision', [None,'bf16'])
def test_train_ours(benchmark, noise, precision):
    learn = Learner(ours(), Latents(noise.repeat(8,1,1,1)), diffusion_loss, steps=1000, batch_size=16, ema=.999, precision=precision, progress=False)
    learn.acc = learn.accelerator(); learn.setup(); learn.model.train()
    batches = iter(learn.batches[m] for m in range(1000))
    def step(): learn.train_step(batches); learn.step += 1
    benchmark.pedantic(step, rounds=5, warmup_rounds=2)
    assert all(v.isfinite() for v in learn.recent['loss'])

@pytest.mark.benchmark(group='train on 16 latents 4x8x8')
def test_train_diffusers(benchmark, noise):
    model = theirs().train()
    from diffusers import DDPMScheduler
    opt,s = torch.optim.AdamW(model.parameters(), lr=1e-4),DDPMScheduler()
    def step():
        e,t = torch.randn_like(noise),torch.randint(0, 1000, (16,))
        loss = torch.nn.functional.mse_loss(model(s.add_noise(noise,e,t), t).sample, e)
        loss.backward(); torch.nn.utils.clip_grad_norm_(model.parameters(), 1.); opt.step(); opt.zero_grad()
        return loss
    assert benchmark.pedantic(step, rounds=5, warmup_rounds=2).isfinite()
