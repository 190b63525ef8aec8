"State that several runs, threads or modes share: each keeps its own, and gets the right value."
import hashlib
import shutil
import threading
import pytest
import torch
from functools import partial
from torch import nn
from fastldm import load
from fastldm.codes import Blip, VQVAE, CodeDataset, VectorQuantizer, write_codes
from fastldm.core.download import fetch_file
from fastldm.core.models import evaluating, for_gradients, real_number, whole_number
from fastldm.core.rows import read_rows, row_writer
from fastldm.core.train import Callback, Learner
from fastldm.diffusion import *
from fastldm.diffusion.distill import GuidedRows
from fastldm.diffusion.samplers import sample, watched

@pytest.fixture(scope='module')
def fashion(): return load('fashion', 'cpu')

def in_threads(n, fn):
    "Call `fn(i)` in a thread for each i, all at once; raises what one of them raised."
    errors = []
    def run(i):
        try: fn(i)
        except Exception as error: errors.append(error)
    threads = [threading.Thread(target=run, args=(i,)) for i in range(n)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    if errors: raise errors[0]

def give_weights(model):
    "In place of zeros, with which the last layers of networks begin."
    for weight in model.parameters():
        if weight.ndim>1 and not weight.any(): nn.init.normal_(weight, std=.1)


# ---- a Learner in a callback of another

ROWS = [dict(x=torch.randn(3), y=torch.randn(1)) for _ in range(64)]
def row_loss(model, batch): return dict(loss=(model(batch['x'])-batch['y']).square().mean())

class Probe(Callback):
    "Fits another model, with its own settings, after each step; notes the precision of the run around it."
    def __init__(self): self.precisions = []
    def after_step(self, learn):
        Learner(nn.Linear(3,1), ROWS, row_loss, steps=2, batch_size=8, accumulate=2, progress=False).fit()
    def after_fit(self, learn): self.precisions.append(learn.acc.mixed_precision)

@pytest.mark.parametrize('precision', [None,'bf16'])
def test_a_learner_in_a_callback_changes_nothing_of_the_run_around_it(precision):
    "Steps accumulate as they were told to, and weights end equal; the precision is that of the run."
    done = []
    class CountedSGD(torch.optim.SGD):
        def step(self, *args, **kw):
            done.append(1)
            return super().step(*args, **kw)
    weights = []
    probe = Probe()
    for cbs in ([], [probe]):
        torch.manual_seed(0)
        model = nn.Linear(3,1)
        done.clear()
        Learner(model, ROWS, row_loss, steps=6, batch_size=8, accumulate=4, lr=.1, schedule='constant', warmup=0,
                optimizer=partial(CountedSGD), precision=precision, progress=False, cbs=cbs).fit()
        assert len(done)==6
        weights.append(model.weight.detach().clone())
    assert torch.equal(*weights)
    assert probe.precisions==[precision or 'no']


# ---- one solver in several calls of `sample` at once

CURVED = GaussianDenoiser(Cosine(), torch.tensor([[-1.,0.],[1.,0.]]).double(), .2)
TIMES = angle_times(CURVED.schedule, 8)
SOLVERS = [DPMSolver2M, DPMSolver3M, UniPC]

def noise(seed): return torch.randn(3, 2, generator=torch.Generator().manual_seed(seed)).double()

@pytest.mark.parametrize('solver', SOLVERS)
@pytest.mark.parametrize('is_watched', [False,True])
def test_a_solver_can_be_used_by_a_callback_of_its_own_run(solver, is_watched):
    "The callback samples with the same object, and both results are as with two objects."
    step = watched(solver(), lambda predicted: None) if is_watched else solver()
    inner = []
    def sample_another(x, t, s): inner.append(sample(CURVED, noise(1), TIMES[::2], step))
    outer = sample(CURVED, noise(0), TIMES, step, cb=sample_another)
    assert torch.equal(outer, sample(CURVED, noise(0), TIMES, solver()))
    assert all(torch.equal(x, sample(CURVED, noise(1), TIMES[::2], solver())) for x in inner)

@pytest.mark.parametrize('solver', SOLVERS)
def test_a_solver_can_be_used_by_several_threads(solver):
    "Each thread gets what it gets alone; both are in the middle of their path at once."
    step = solver()
    together = threading.Barrier(2, timeout=30)
    def wait(x, t, s): together.wait()
    found = {}
    def run(i): found[i] = sample(CURVED, noise(i), TIMES, step, cb=wait)
    in_threads(2, run)
    for i in range(2): assert torch.equal(found[i], sample(CURVED, noise(i), TIMES, solver()))

def test_a_step_that_is_a_function_is_used_as_it_is():
    "Nothing is copied that has no path to begin."
    found = sample(CURVED, noise(0), TIMES, watched(ddim_step, id))
    assert torch.equal(found, sample(CURVED, noise(0), TIMES, ddim_step))
    assert watched(heun_step, id).times=='karras_times'


# ---- gradients within `torch.inference_mode`

def hole_of(picture):
    hole = torch.zeros(picture.shape[-2:], dtype=torch.bool)
    hole[:,14:] = True
    return hole

USES = dict(
    a_hole=lambda ldm, y: dict(constraint=inpaint(y, hole_of(y))),
    a_larger_picture=lambda ldm, y: dict(constraint=upscale(torch.nn.functional.avg_pool2d(y, 2), 2)),
    an_sde=lambda ldm, y: dict(step='euler_maruyama_step'),
    a_corrector=lambda ldm, y: dict(step='pc_step', times='uniform_times'),
    an_edit=lambda ldm, y: dict(constraint=edit(y, hole_of(y))),
    a_guided_hole=lambda ldm, y: dict(constraint=inpaint(y, hole_of(y)), guidance_scale=2.),
)

@pytest.mark.parametrize('use', USES)
def test_sampling_in_inference_mode_gives_the_same(fashion, use):
    "Also where a constraint or a step takes gradients."
    def draw():
        y = fashion.sample(1, label=3, steps=2, seed=1)*2-1
        return fashion.sample(2, label=[3,5], steps=3, seed=0, **USES[use](fashion, y))
    expected = draw()
    with torch.inference_mode(): found = draw()
    assert torch.equal(found, expected)

def test_a_model_that_was_loaded_in_inference_mode_can_fill_a_hole(fashion):
    "Its weights are as of any other model."
    with torch.inference_mode(): loaded = load('fashion', 'cpu')
    assert not any(value.is_inference() for value in loaded.state_dict().values())
    y = fashion.sample(1, label=3, steps=2, seed=1)*2-1
    settings = dict(label=3, steps=2, seed=0, constraint=inpaint(y, hole_of(y)))
    assert torch.equal(loaded.sample(1, **settings), fashion.sample(1, **settings))

def test_a_likelihood_in_inference_mode_is_the_same(fashion):
    "With latents and conditions that were made there."
    def likelihood():
        latent = torch.randn(2, *fashion.shape, generator=torch.Generator().manual_seed(0))
        cond = fashion.denoiser.conditioner(dict(label=torch.tensor([3,5])))
        return log_likelihood(fashion.denoiser, latent, cond, steps=2)
    expected = likelihood()
    with torch.inference_mode(): found = likelihood()
    for a,b in zip(found, expected): assert torch.equal(a, b)

def test_the_rates_of_a_schedule_in_inference_mode_are_the_same():
    "Times that were made there, too."
    for schedule in (VE(), VP(), Cosine(), SqrtLinear(), EDM(), Flow()):
        t = torch.tensor([.2,.7]).double()
        expected = drift(schedule, t), diffusion(schedule, t)
        with torch.inference_mode():
            t = torch.tensor([.2,.7]).double()
            found = drift(schedule, t), diffusion(schedule, t)
        for a,b in zip(found, expected): assert torch.equal(a, b)

def test_a_tensor_of_inference_mode_is_copied_for_gradients():
    "Also from within the mode; any other is handed on."
    with torch.inference_mode():
        x = torch.ones(2)
        y = for_gradients(x)
    assert x.is_inference() and not y.is_inference() and torch.equal(x, y)
    assert for_gradients(y) is y


# ---- several threads in one model

def test_a_model_stays_in_eval_mode_until_its_last_user_is_done():
    "The first of two users leaves while the second computes, in the model or in a part of it."
    for part_of in (lambda model: model, lambda model: model[0]):
        model = nn.Sequential(nn.Dropout(.5), nn.Dropout(.5))
        model[1].eval()
        first, second = evaluating(model), evaluating(part_of(model))
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        assert not model[0].training
        second.__exit__(None, None, None)
        assert [model.training, *(part.training for part in model)]==[True,True,False]

def test_threads_that_sample_a_model_in_training_mode_get_what_one_gets():
    "Dropout stays off in all of them, and is on again afterwards."
    torch.manual_seed(0)
    denoiser = Denoiser(UNet(4, (8,16), dropout=.5), Cosine())
    give_weights(denoiser)
    ldm = LatentDiffusion(Autoencoder(1, 4, (8,8)), denoiser, (4,8,8)).train()
    def draw(i): return ldm.sample(2, seed=i, steps=i+1)
    alone = [draw(i) for i in range(4)]
    found = {}
    def run(i): found[i] = draw(i)
    in_threads(4, run)
    for i in range(4): assert (found[i]-alone[i]).abs().max()<1e-5
    assert all(part.training for part in ldm.modules())


# ---- a store of codes that is replaced while it is open

class Pictures:
    def __init__(self, image): self.image = image
    def __len__(self): return len(self.image)
    def __getitems__(self, indices): return dict(image=self.image[indices])

def test_an_open_store_does_not_serve_codes_of_another_model(tmp_path):
    "It says so; codes that were written again by the same model are served."
    pictures = Pictures(torch.rand(4, 3, 16, 16)*2-1)
    one, other = (VQVAE(3, 16, 4, (8,16)).eval() for _ in range(2))
    folder = tmp_path/'codes'
    write_codes(pictures, one, folder, progress=False)
    ds = CodeDataset(folder, one)
    expected = ds[0]['codes']
    for model in (one, other):
        shutil.rmtree(folder)
        write_codes(pictures, model, folder, progress=False)
        if model is one: assert all(map(torch.equal, ds[0]['codes'], expected))
    with pytest.raises(ValueError, match='open it again'): ds[0]
    assert len(CodeDataset(folder, other)[0]['codes'])==2


# ---- numbers

@pytest.mark.parametrize('offset', [0.,3.,30.,100.])
def test_the_nearest_code_is_found_far_from_the_origin(offset):
    "As in double precision: distances do not change where all is moved."
    torch.manual_seed(0)
    quantizer = VectorQuantizer(256, 8).eval()
    quantizer.codebook.copy_(torch.randn(256, 8)*.1+offset)
    vectors = torch.randn(2000, 8)*.1+offset
    expected = torch.cdist(vectors.double(), quantizer.codebook.double()).argmin(1)
    assert (quantizer.nearest(vectors)!=expected).float().mean()<=.001

def test_a_number_beyond_all_floats_is_refused_in_words():
    "Where it was an OverflowError."
    for number in (10**400, -10**400):
        with pytest.raises(ValueError, match='seed=-?1000'): whole_number(number, 'seed')
        with pytest.raises(ValueError, match='scale=-?1000'): real_number(number, 'scale')
    assert whole_number(2**80, 'seed')==2**80

@pytest.mark.parametrize('predict', ['eps','v','x0'])
def test_a_denoiser_takes_latents_of_another_precision(predict):
    "The answer is in the precision of the latent, and nearly that of the network's own."
    torch.manual_seed(0)
    denoiser = Denoiser(UNet(2, (8,16)), Cosine(), predict=predict).eval()
    give_weights(denoiser)
    x, t = torch.randn(2, 2, 8, 8), torch.tensor([.3,.8])
    expected = denoiser(x, t)
    for dtype,within in ((torch.double,1e-5), (torch.bfloat16,.1)):
        found = denoiser(x.to(dtype), t)
        assert found.dtype==dtype
        assert (found.float()-expected).abs().max()<within*expected.abs().max()

def test_the_likelihood_of_double_latents(fashion):
    "It is that of the same latents in single precision."
    x = torch.randn(1, *fashion.shape)
    cond = fashion.denoiser.conditioner(dict(label=torch.tensor([3])))
    (a,_), (b,_) = (log_likelihood(fashion.denoiser, z, cond, steps=2) for z in (x, x.double()))
    assert (a-b).abs().max()<.1


# ---- nothing, and what fails midway

def test_an_empty_file_is_fetched(tmp_path):
    "There is nothing to ask for, and the file is there."
    empty = tmp_path/'empty'
    empty.touch()
    fetched = fetch_file(empty.as_uri(), tmp_path/'got', 0, hashlib.sha256(b'').hexdigest())
    assert fetched.read_bytes()==b''

def test_no_images_have_no_captions():
    "And no pairs no probabilities; a text without an image is no pair."
    blip = Blip.small(['a red house','a blue bird'], size=16, width=32, heads=2, layers=(1,1))
    nothing = torch.zeros(0, 3, 16, 16)
    assert blip.caption(nothing)==[]
    assert blip.match(nothing, []).shape==(0,)
    with pytest.raises(ValueError, match='do not make pairs'): blip.match(nothing, 'a red house')

def test_a_batch_that_failed_leaves_no_rows(tmp_path):
    "Whatever of it failed, the batches after it are read as they were written."
    good = [dict(x=torch.tensor([float(i)]), a=[f'a{i}'], b=[f'b{i}']) for i in range(2)]
    bad = [dict(x=torch.ones(1), a=['longer than that'], b=[object()]), dict(x=torch.ones(1), a=[object()], b=['b'])]
    for first in (bad, []):                         # also as the very first
        with row_writer(tmp_path/'rows.safetensors', 2) as writer:
            for batch in (*first, good[0], *bad, good[1]):
                if batch in bad:
                    with pytest.raises(TypeError): writer.add(batch)
                else: writer.add(batch)
        rows = read_rows(tmp_path/'rows.safetensors')
        assert (rows['x'].tolist(), list(rows['a']), list(rows['b']))==([0.,1.], ['a0','a1'], ['b0','b1'])

def test_the_first_batch_that_failed_does_not_fix_the_layout(tmp_path):
    "Fields of the first batch that was written count."
    with row_writer(tmp_path/'rows.safetensors', 1) as writer:
        with pytest.raises(TypeError): writer.add(dict(x=torch.ones(1), a=[object()]))
        writer.add(dict(y=torch.ones(1,2)))
    assert [*read_rows(tmp_path/'rows.safetensors')]==['y']


# ---- a time for each row

def test_guidance_acts_row_by_row():
    "Rows within the interval are guided, others are not; one time for all gives the same as before."
    torch.manual_seed(0)
    conditioner = Conditioner(label=LabelEmbedder(3, UNet(2, (8,16)).d_emb))
    denoiser = Denoiser(UNet(2, (8,16)), Cosine(), conditioner).eval()
    give_weights(denoiser)
    batch = dict(label=torch.tensor([0,1]))
    guided = GuidedRows(denoiser, batch, torch.tensor([2.,3.]), (.5,1.))
    x, times = torch.randn(2, 2, 8, 8), torch.tensor([.2,.9])
    with torch.no_grad():
        found = guided(x, times)
        of_each = [guided(x, t)[i] for i,t in enumerate(times)]
        plain = denoiser(x, times, conditioner(batch))
    assert (found-torch.stack(of_each)).abs().max()<1e-5
    assert (found[0]-plain[0]).abs().max()<1e-5<(found[1]-plain[1]).abs().max()
