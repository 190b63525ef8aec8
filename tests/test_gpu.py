"""On a GPU: the same pictures as on a CPU, in any batch; half precision, compiled networks, training that goes on there
and here, and the race with diffusers. `pytest -m gpu` runs them in minutes; FASTLDM_GPU=cpu tries them without one."""
import os
import pytest
import torch
from fastldm import load
from fastldm.control import control, picture_control
from fastldm.core import Learner
from fastldm.data import SyntheticScenes
from fastldm.diffusion import Autoencoder, autoencoder_loss
from fastldm.diffusion.constraints import inpaint
from fastldm.metrics import gpu_race
from fastldm.recipes import sample_cli, train_cli

DEVICE = os.environ.get('FASTLDM_GPU', 'cuda')
pytestmark = [] if DEVICE=='cpu' else pytest.mark.gpu

def both(name): return load(name, 'cpu'), load(name, DEVICE)

def close(a, b, within): assert (a.cpu().float()-b.cpu().float()).abs().mean()<within

@pytest.mark.parametrize('name, conditions', [('mnist', dict(label=3)), ('flowers', dict(label=1)),
                                              ('avatars', dict(attrs=dict(Smiling=True)))])
def test_the_same_pictures_as_on_a_cpu(name, conditions):
    "The noise of a picture is drawn on the CPU, so a seed is the same picture everywhere."
    there, here = (model.sample(2, seed=1, **conditions) for model in both(name))
    assert here.device.type==torch.device(DEVICE).type
    close(there, here, .01)

def test_the_same_picture_in_any_batch():
    model = load('mnist', DEVICE)
    close(model.sample(3, label=3, seed=[5,6,7])[2:], model.sample(1, label=3, seed=7), .01)

def test_half_precision():
    "Nearly the same pictures."
    model = load('fashion', DEVICE)
    close(model.sample(4, label=2, seed=0), model.sample(4, label=2, seed=0, precision='bf16'), .03)

def test_compiled_networks():
    "The same pictures as without."
    plain, compiled = load('mnist', DEVICE), load('mnist', DEVICE)
    compiled.denoiser.compile()
    close(plain.sample(2, label=3, seed=0), compiled.sample(2, label=3, seed=0), .01)

def test_text_and_codes():
    "Both priors of a text model."
    there, here = both('scenes')
    prompt = 'a red ship at night'
    close(there.sample(prompt, seed=0, prior='diffusion'), here.sample(prompt, seed=0, prior='diffusion'), .02)
    assert here.sample(prompt, seed=0, prior='codes').shape==(1,3,64,64)

def test_filled_holes():
    "What is given stays."
    model = load('mnist', DEVICE)
    x = model.sample(1, label=3, seed=0)*2-1
    hole = torch.zeros(28, 28, dtype=torch.bool)
    hole[10:18] = True
    filled = model.sample(1, label=3, seed=1, constraint=inpaint(x, hole.to(DEVICE)))*2-1
    outside = ~hole
    close(filled[...,outside], x[...,outside], .1)

def test_local_control():
    "An adapter draws the same there and here."
    edges = picture_control('edges', SyntheticScenes(2, 'test')[:2])
    def draw(device):
        constraint = control(load('local_scenes', device), edges)
        return load('scenes', device).sample(['a red ship', 'a green house'], constraint=constraint, seed=0, steps=4)
    close(draw('cpu'), draw(DEVICE), .02)

@pytest.mark.parametrize('precision', [None,'bf16'])
def test_training_goes_on_here_and_there(tmp_path, precision):
    "A run that began on a GPU goes on without one, and the other way round."
    def run(steps, device, resume):
        os.environ['FASTLDM_DEVICE'] = device
        try:
            model = Autoencoder(c_in=3, c_latent=4, channels=(16,16))
            learn = Learner(model, SyntheticScenes(16), autoencoder_loss(), steps=steps, batch_size=4, folder=tmp_path,
                            schedule='constant', warmup=0, precision=precision, progress=False)
            return learn.fit(resume=resume)
        finally: del os.environ['FASTLDM_DEVICE']
    run(3, DEVICE, False)
    run(5, 'cpu', True)
    learn = run(8, DEVICE, True)
    assert learn.step==8 and torch.isfinite(torch.tensor(learn.log[-1]['loss']))

def test_commands(tmp_path, monkeypatch):
    "A model that is trained with every option of a GPU, and drawn with."
    monkeypatch.setenv('FASTLDM_DEVICE', DEVICE)
    train_cli('digits', out=str(tmp_path/'m'), quick=True, compile=DEVICE!='cpu', precision='bf16')
    sample_cli(str(tmp_path/'m'), label='3', n=2, out=str(tmp_path/'x.png'))
    assert (tmp_path/'x.png').exists()

@pytest.mark.slow
def test_the_race():
    "Networks of 5 million parameters: in bf16, compiled, faster than diffusers compiled. The numbers are printed."
    small = DEVICE=='cpu'
    rates = gpu_race((16,12) if small else (96,72), 8 if small else 16, 4 if small else 256, DEVICE, compiled=not small)
    for name,value in rates.items(): print(f'{name:36s} {value:.4g}')
    if not small: assert rates['sample fastldm bf16']>rates['sample diffusers bf16']
