"What users of neighbouring projects reported of sampling: the symptom, and the right value. Each kind in every step."
import math
import warnings
from functools import partial
import numpy as np
import pytest
import torch
from PIL import Image
from fastldm import available, load
from fastldm.codes.vqvae import VectorQuantizer
from fastldm.control.adapter import read_control, read_region
from fastldm.data import from_image, to_image, to_uint8
from fastldm.diffusion import *

LABELS = [3,1,4,1,5]

@pytest.fixture(scope='module')
def flowers(): return load('flowers', 'cpu')

def close(a, b, within): assert (a.double()-b.double()).abs().max()<within


# ---- a sample depends on nothing but its seed and its number

def test_a_corrected_picture_does_not_depend_on_its_batch(mnist):
    "The predictor-corrector took its norms over the batch: up to .63 a pixel."
    sampling = dict(steps=8, step='pc_step', times='uniform_times', seed=3)
    whole = mnist.sample(5, label=LABELS, **sampling)
    close(mnist.sample(5, label=LABELS, batch_size=2, **sampling), whole, 1e-4)
    close(mnist.sample(1, label=LABELS[2], first=2, **sampling), whole[2:3], 1e-4)

def test_churned_pictures_do_not_depend_on_their_batch(mnist):
    for step in (euler_step, heun_step):
        sampling = dict(steps=4, step=partial(step, churn=.3), times='karras_times', seed=3)
        whole = mnist.sample(5, label=LABELS, **sampling)
        close(mnist.sample(5, label=LABELS, batch_size=2, **sampling), whole, 1e-4)

def test_langevin_step_has_the_size_of_the_paper():
    "Song et al. 2021b, algorithm 5: ε = 2 α_i (r ‖z‖/‖g‖)² with α_i = 1-β_i of 1000 steps, for each sample."
    for schedule in (VP(), SubVP()):
        exact = GaussianDenoiser(schedule, torch.tensor([[1.,-1.,.5,2.]]).double(), std=.7)
        x = torch.randn(3,4).double()
        t, s = torch.tensor([.6,.599]).double()
        def noise(): return noise_from(sample_generators(0,3))
        with noise():
            predicted = euler_maruyama_step(exact, x, t, s)
            z = noise_like(x)                                          # the second draw, as in the step
        with noise(): corrected = pc_step(exact, x, t, s)
        g = score_of(exact, predicted, s, exact(predicted, s))
        beta = (schedule.beta_min + s*(schedule.beta_max-schedule.beta_min))/1000
        ε = 2*(1-beta)*(.16*z.norm(dim=1, keepdim=True)/g.norm(dim=1, keepdim=True))**2
        close(corrected, predicted+ε*g+(2*ε).sqrt()*z, 1e-4)

def test_langevin_step_shrinks_where_the_picture_fades():
    "With few steps the factor α is far from 1; where the variance explodes it is 1."
    seen = {}
    for name,schedule in dict(vp=VP(), ve=VE()).items():
        exact = GaussianDenoiser(schedule, torch.zeros(1,50).double(), std=1.)
        t, s = torch.tensor([.8,.6]).double()
        x = torch.randn(4,50).double()
        with noise_from(sample_generators(0,4)): predicted = euler_maruyama_step(exact, x, t, s)
        with noise_from(sample_generators(0,4)): seen[name] = pc_step(exact, x, t, s)-predicted
        a, a_s = schedule.alpha(t), schedule.alpha(s)
        g = score_of(exact, predicted, s, exact(predicted, s))
        with noise_from(sample_generators(0,4)): z = [noise_like(x) for _ in range(2)][1]
        ε = 2*(a/a_s)**2*(.16*z.norm(dim=1, keepdim=True)/g.norm(dim=1, keepdim=True))**2
        close(seen[name], ε*g+(2*ε).sqrt()*z, 1e-9)
        assert (a/a_s==1)==(name=='ve')

def two_gaussians():
    means = torch.tensor([[[[1.,0.],[0.,1.]]], [[[-1.,1.],[0.,-1.]]]]).double()
    return GaussianDenoiser(Cosine(), means, .5), means

def test_likelihood_does_not_depend_on_the_batch():
    "Alone, in another order, in company: the same value and the same error."
    two, means = two_gaussians()
    x = means[torch.arange(5)%2] + .5*torch.randn(5,1,2,2).double()
    whole, error = log_likelihood(two, x, steps=20)
    for i in range(5):
        alone, its_error = log_likelihood(two, x[i:i+1], steps=20)
        close(alone, whole[i:i+1], 1e-9)
        close(its_error, error[i:i+1], 1e-9)
    close(log_likelihood(two, x.flip(0), steps=20)[0].flip(0), whole, 1e-9)

def test_likelihood_of_a_model_does_not_depend_on_the_batch(mnist):
    z = torch.randn(3, *mnist.shape)
    def value(z):
        cond = mnist.denoiser.conditioner(mnist.denoiser.conditioner.parse(len(z)))
        return log_likelihood(mnist.denoiser, z, cond, steps=4, probes=2)[0]
    close(value(z[1:2]), value(z)[1:2], .01)

def test_likelihood_of_one_step_or_no_probe_is_refused():
    "One time of the grid is no path: it gave -84.8 for two samples of -21.6 and -24.9."
    two, means = two_gaussians()
    with pytest.raises(ValueError, match='steps=1: expected a whole number of at least 2'):
        log_likelihood(two, means, steps=1)
    with pytest.raises(ValueError, match='probes=0'): log_likelihood(two, means, probes=0)

def test_likelihood_of_one_probe_has_no_error_bar():
    "It was NaN; one estimate says nothing of its spread. The value is right where the trace is exact."
    one = GaussianDenoiser(Cosine(), torch.tensor([[.5,-1.]]).double(), .5)
    x = torch.tensor([[.5,-1.],[1.,0.]]).double()
    log_p, error = log_likelihood(one, x, steps=60, probes=1)
    truth = -((x-one.mean)/.5).square().sum(1)/2 - 2*math.log(.5*math.sqrt(2*math.pi))
    close(log_p, truth, .05)
    assert error.tolist()==[math.inf]*2

def first_numbers(seed, i): return tuple(torch.randn(4, generator=sample_generators(seed, 1, i)[0]).tolist())

def test_no_two_samples_share_their_noise():
    "Sample 1,000,003 of seed 0 was sample 0 of seed 1; sample 45,589 was that of seed 4295."
    places = [(0,0), (1,0), (0,1_000_003), (0,1_000_004), (1,1), (4293,1_000_002), (4293,1_000_003), (4294,0), (4295,0),
              (0,45_589), (-1,0), (-1,1), (2**32,0), (2**40,0), (2**80,0), (2**80,1)]
    assert len({first_numbers(*place) for place in places})==len(places)

def test_usual_seeds_keep_their_noise():
    "Pictures that were measured or shipped stay what they were."
    for seed,i in ((0,0), (1,7), (4293,1_000_002)):
        usual = torch.Generator().manual_seed(seed*1_000_003+i)
        assert first_numbers(seed, i)==tuple(torch.randn(4, generator=usual).tolist())

def test_parts_of_a_large_set_fit_together():
    "Across the place where seeds of torch end."
    across = sample_generators(0, 4, 1_000_001)
    parts = [*sample_generators(0, 2, 1_000_001), *sample_generators(0, 2, 1_000_003)]
    for a,b in zip(across, parts): assert torch.equal(torch.randn(3, generator=a), torch.randn(3, generator=b))


# ---- guidance, churn

@pytest.mark.parametrize('scale', [math.nan, math.inf, -math.inf, 1e10, -1, '2', True, None])
def test_guidance_scale_that_is_none(idle, scale):
    "NaN pictures, or zeros, came out."
    for given in (scale, dict(label=scale)):
        with pytest.raises(ValueError, match='guidance_scale'): idle.sample(2, label=3, guidance_scale=given)

def test_largest_guidance_scale_gives_pictures(mnist):
    x = mnist.sample(2, label=3, guidance_scale=100., steps=3, seed=0)
    assert x.isfinite().all()

@pytest.mark.parametrize('interval', [(1.,.3), (-.1,.5), (.2,1.5), (math.nan,1.), .5, (0.,), (0.,.5,1.), 'ab', None])
def test_interval_that_is_none(idle, interval):
    "Times in the wrong order switched guidance off."
    with pytest.raises(ValueError, match='the smaller first'): idle.sample(2, label=3, interval=interval)

def test_churn_at_time_one_is_none():
    "There is no more noise than at time 1, so a step from there is made without; later it renews the sample."
    exact = GaussianDenoiser(VP(), torch.zeros(1,20).double(), .5)
    x = torch.randn(2,20).double()
    for step in (euler_step, heun_step):
        for first,changes in ((1.,False), (.7,True)):
            t, s = torch.tensor([first,.5]).double()
            assert torch.equal(step(exact, x, t, s), step(exact, x, t, s, churn=.2))!=changes

@pytest.mark.parametrize('churn', [-.1, math.nan, math.inf])
def test_churn_that_is_none(churn):
    exact = GaussianDenoiser(VP(), torch.zeros(1,20).double(), .5)
    t, s = torch.tensor([.7,.5]).double()
    for step in (euler_step, heun_step):
        with pytest.raises(ValueError, match='churn='): step(exact, torch.randn(2,20).double(), t, s, churn=churn)


# ---- precision

TIMES = torch.linspace(.001, 1, 3000).double()

@pytest.mark.parametrize('cast', ['bfloat16', 'half', 'double', 'float'])
def test_schedules_keep_their_table(cast):
    "In bfloat16 the log-SNR of 1000 steps stood still on stairs."
    from fastldm.control.stable import Tabulated
    abar = SqrtLinear().alpha(TIMES[::3])**2
    for make in (SqrtLinear, partial(Tabulated, abar.tolist()), VP, VE, Cosine, EDM, Flow, SubVP):
        schedule = getattr(torch.nn.Sequential(make()), cast)()[0]
        assert torch.equal(schedule.log_snr(TIMES), make().log_snr(TIMES))
        assert (schedule.log_snr(TIMES).diff()<0).all()

@pytest.mark.parametrize('times', [uniform_times, angle_times, karras_times, log_snr_times])
@pytest.mark.parametrize('kind', ['SqrtLinear', 'Tabulated'])
def test_a_table_on_a_gpu_is_asked_from_the_cpu(kind, times):
    "A grid asks with times on the CPU; fake tensors have a device and no numbers."
    from fastldm.control.stable import Tabulated
    from torch._subclasses.fake_tensor import FakeTensorMode
    schedule = SqrtLinear() if kind=='SqrtLinear' else Tabulated(SqrtLinear().alpha(TIMES[::3])**2)
    with FakeTensorMode(allow_non_fake_inputs=True):
        for name,buffer in schedule.named_buffers(): setattr(schedule, name, torch.empty_like(buffer, device='cuda'))
        assert times(schedule, 4).device.type=='cpu'
        assert schedule.log_snr(TIMES[:3]).device.type=='cpu'

@pytest.mark.parametrize('name', ['mnist', 'mnist_tutorial', 'flowers', 'faces'])
@pytest.mark.parametrize('cast,within', [('double',1e-4), ('bfloat16',.03)])
def test_models_sample_in_other_precisions(name, cast, within):
    "`ldm.double().sample` and `ldm.bfloat16().sample` raised; they draw the same pictures, more or less exactly."
    usual = load(name, 'cpu')
    other = getattr(load(name, 'cpu'), cast)()
    drawn = [model.sample(2, steps=3, step='ddpm_step', times='angle_times', seed=0) for model in (usual,other)]
    assert drawn[1].dtype==(torch.float64 if cast=='double' else torch.float32)
    assert (drawn[0]-drawn[1]).abs().mean()<within

def test_constraints_work_in_other_precisions(flowers):
    x = flowers.sample(1, label=1, steps=3, seed=0)*2-1
    hole = torch.zeros(64,64)
    hole[20:40,20:40] = 1
    half = load('flowers', 'cpu').bfloat16()
    for constraint in (inpaint(x, hole), vary(x, .5), edit(x, hole)):
        sampling = dict(label=1, constraint=constraint, steps=3, seed=1)
        assert (half.sample(1, **sampling)-flowers.sample(1, **sampling)).abs().mean()<.05

@pytest.mark.parametrize('make', [
    lambda x,hole: inpaint(x, hole), lambda x,hole: edit(x, hole), lambda x,hole: vary(x, .5),
    lambda x,hole: invert(x, rounds=0), lambda x,hole: upscale(x[...,::2,::2], 2),
], ids=['inpaint','edit','vary','invert','upscale'])
def test_constraints_work_with_products_in_16_bit(mnist, make):
    "`inpaint` and `upscale` raised: Jacobians of the decoder do not pass autocast."
    x = mnist.sample(1, label=1, steps=2, seed=0)*2-1
    sampling = dict(label=1, constraint=make(x, disc()), steps=3, seed=1)
    exact = mnist.sample(2, **sampling)
    assert (mnist.sample(2, precision='bf16', **sampling)-exact).abs().mean()<.05

def test_guided_denoisers_take_a_time_per_sample(mnist):
    "Each row is what it is with its time for all; the interval holds for each."
    ldm = mnist
    fields = ldm.denoiser.conditioner.parse(4, label=[1,2,3,4])
    x = torch.randn(4, *ldm.shape)
    times = torch.tensor([.2,.4,.6,.8])
    denoise = guide(ldm.denoiser, fields, interval=(.3,.7), label=3.)
    with torch.no_grad():
        together = denoise(x, times)
        for i,t in enumerate(times): close(together[i], denoise(x, t)[i], 1e-4)
        region = torch.ones(4, 1, *ldm.shape[1:], dtype=torch.bool)
        blended = BlendedDenoiser(denoise, torch.zeros_like(x), region)
        close(blended(x, times), together, 1e-6)

def test_gradients_pass_where_they_are_asked_for():
    "`sample` switched them off for good: the gradient of the last sample in the first noise is known for a Gaussian."
    exact = GaussianDenoiser(VP(), torch.tensor([[1.,2.]]).double(), .5)
    x = torch.randn(3,2).double().requires_grad_()
    for step in (ddim_step, euler_step, heun_step, DPMSolver2M(), DPMSolver3M(), UniPC()):
        ts = log_snr_times(exact.schedule, 20)
        last = sample(exact, x, ts, step, grad=True)
        slope = torch.autograd.grad(last.sum(), x)[0]
        moved = sample(exact, x.detach()+1., ts, step)-last.detach()                   # the map is affine
        close(slope, moved, 1e-6)
        assert not sample(exact, x, ts, step).requires_grad
        with torch.no_grad(): assert not sample(exact, x, ts, step, grad=True).requires_grad


# ---- numbers and names that people give

@pytest.mark.parametrize('given', [
    dict(seed=np.int64(7)), dict(seed=torch.tensor(7)), dict(seed=7.), dict(steps=3.), dict(steps=np.int32(3)),
    dict(guidance_scale=np.float32(2)), dict(guidance_scale=torch.tensor(2.)),
    dict(guidance_scale=dict(label=np.float32(2))),
    dict(batch_size=np.int64(1)), dict(n=np.int64(2)), dict(n=2.), dict(label=np.int64(3)), dict(label='3'),
    dict(label=[3,3]), dict(label=['3','3']), dict(label=np.array([3,3])), dict(label=torch.tensor(3)), dict(label=3.),
    dict(step=DPMSolverSDE), dict(interval=np.array([0.,1.])), dict(interval=[0,1]),
])
def test_what_is_plainly_meant_is_taken(mnist, given):
    "Numbers of numpy and torch, whole floats, names of classes, a solver's class."
    usual = dict(n=2, label=3, steps=3, seed=7, guidance_scale=2.)
    expected = mnist.sample(**usual)
    close(mnist.sample(**(usual|given)), expected, 1e-4)

@pytest.mark.parametrize('given,message', [
    (dict(batch_size=0), 'batch_size=0: expected a whole number of at least 1'),
    (dict(steps=2.5), 'steps=2.5: expected a whole number'),
    (dict(steps=True), 'steps=True'),
    (dict(seed='7'), "seed='7': expected a whole number"),
    (dict(seed=.5), 'seed=0.5'),
    (dict(n=True), 'n=True'),
    (dict(first=-1), 'first=-1'),
    (dict(constraint=torch.zeros(1,1,28,28)), 'constraint is of type Tensor: expected a `Constraint`, which `inpaint`'),
    (dict(constraint='inpaint'), 'constraint is of type str'),
    (dict(constraint=Constraint), 'constraint is of type type'),
    (dict(step='karras_times'), "there is no sampler 'karras_times'"),
    (dict(times='ddim_step'), "there is no time grid 'ddim_step'"),
    (dict(step='sample'), "there is no sampler 'sample'"),
    (dict(step=5), "step=5: expected a function, or a name, as in step='ddim_step'"),
    (dict(times=torch.linspace(1,0,4)), 'steps=3: the times say how many'),
    (dict(times=torch.linspace(0,1,4), steps=None), 'expected times that fall, from at most 1'),
    (dict(times=5), 'times=5: expected a function, or a name'),
    (dict(callback=5), 'callback=5: expected a function'),
    (dict(label='eleven'), "unknown label 'eleven'"),
    (dict(label='12'), 'label=12 is out of range'),
    (dict(label=[[1,2]]), 'label=[1, 2]: expected a label from 0 to 9'),
    (dict(label=[1.5,2]), 'label=1.5: expected a label'),
    (dict(label=[True,2]), 'label=True: expected a label'),
    (dict(label=dict(a=1)), "label={'a': 1}"),
    (dict(label=torch.tensor([math.nan,1.])), 'not finite'),
])
def test_one_clear_sentence(idle, given, message):
    "Before the network is called."
    with pytest.raises(ValueError) as e: idle.sample(**(dict(n=2, label=3, steps=3)|given))
    assert message in str(e.value)

def test_no_label_for_some(mnist):
    "None in a list: that sample has no label."
    mixed = mnist.sample(2, label=[3,None], steps=3, seed=0)
    close(mixed[:1], mnist.sample(1, label=3, steps=3, seed=0), 1e-4)
    close(mixed[1:], mnist.sample(1, steps=3, seed=0, first=1), 1e-4)
    close(mnist.sample(1, label=[None], steps=3, seed=0), mnist.sample(1, steps=3, seed=0), 1e-4)

@pytest.mark.parametrize('name', [n for n in available('LatentDiffusion') if load(n, 'cpu').meta.get('classes')])
def test_classes_by_name(name):
    "Every name on the card is its number, whatever its capitals."
    model = load(name, 'cpu')
    embedder = model.denoiser.conditioner.embedders['label']
    for number,known in enumerate(model.meta['classes']):
        for text in (known, known.upper(), known.lower(), str(number) if not known.isdecimal() else known):
            assert embedder.parse(text, 1).tolist()==[number]
    assert embedder.parse(list(model.meta['classes']), embedder.n_classes).tolist()==[*range(embedder.n_classes)]

def test_a_misspelt_class_gets_the_nearest(flowers):
    with pytest.raises(ValueError, match="unknown label 'dasy': did you mean 'daisy'\\? Choose from daisy, dandelion"):
        flowers.sample(1, label='dasy')
    with pytest.raises(ValueError, match=r'a label from 0 to 4 or a name \(daisy, dandelion, rose, sunflower, tulip\)'):
        flowers.sample(1, label=9)

def test_classes_without_names(mnist):
    plain = LabelEmbedder(3, 8)
    assert plain.parse('2', 1).tolist()==[2]
    with pytest.raises(ValueError, match='the classes of this model have no names'): plain.parse('two', 1)

@pytest.mark.parametrize('value', [
    'Smiling', ['Smiling'], dict(Smiling='yes'), dict(Smiling=2), dict(Smiling=math.nan), [dict(Smiling=1),3],
    5, [math.nan]*3, torch.zeros(2), {3:1},
])
def test_attributes_that_are_none(value):
    with pytest.raises(ValueError): AttributeEmbedder(3, 8, ['Smiling','Young','Bald']).parse(value, 2)

def test_attributes_by_name():
    "-1 is false, as in CelebA's table: by name it was true. None is not given."
    embedder = AttributeEmbedder(3, 8, ['Smiling','Young','Bald'])
    assert embedder.parse(dict(Smiling=-1, Young=True), 1).tolist()==[[0,1,2]]
    assert embedder.parse([dict(Smiling=np.bool_(True)),None], 2).tolist()==[[1,2,2],[2,2,2]]

@pytest.mark.parametrize('value', ['a.png', 3., torch.zeros(8,8), torch.full((8,8),9), None, [1,2]])
def test_masks_that_are_none(value):
    embedder = MaskEmbedder(['skin','hair'], 8, size=8)
    if value is None: assert (embedder.parse(value, 2)==2).all()
    else:
        with pytest.raises(ValueError, match='mask'): embedder.parse(value, 2)

@pytest.mark.parametrize('value', [5, [], ['a',3], b'a', 1.5, ['a face'], torch.tensor(3)])
def test_sentences_that_are_none(value):
    with pytest.raises(ValueError): WordEmbedder(['a','man'], 8).parse(value, 2)


# ---- masks of a picture

def picture(): return torch.rand(1,1,28,28)*2-1

def disc():
    y, x = torch.meshgrid(torch.arange(28), torch.arange(28), indexing='ij')
    return (x-14)**2+(y-14)**2<64

MASKS = {
    'booleans': lambda m: m,
    'floats': lambda m: m.float(),
    'whole numbers': lambda m: m.long(),
    'bytes of 0 and 1': lambda m: m.byte(),
    'bytes': lambda m: m.byte()*255,
    'whole numbers to 255': lambda m: m.long()*255,
    'one per sample': lambda m: m[None,None],
    'with a channel': lambda m: m[None],
    'an array': lambda m: m.numpy(),
    'PIL': lambda m: Image.fromarray(m.numpy()),
    'PIL bytes': lambda m: Image.fromarray((m.byte()*255).numpy()),
}

@pytest.mark.parametrize('kind', MASKS)
def test_masks_mean_what_they_show(kind):
    "In both constraints that take one."
    x = picture()
    expected = disc()[None,None]
    given = MASKS[kind](disc())
    assert torch.equal(inpaint(x, given).data[1]==0, expected)
    assert torch.equal(edit(x, given).data[1]>0, expected)

def test_a_jpeg_mask_is_cut_at_half(tmp_path):
    "Its grey edges counted as hole, so that 93 % of the known pixels were kept."
    Image.fromarray((disc().byte()*255).numpy()).save(tmp_path/'mask.jpg', quality=60)
    read = np.array(Image.open(tmp_path/'mask.jpg'))
    assert len(np.unique(read))>10
    same = (inpaint(picture(), read).data[1][0,0]==0)==disc()
    assert same.float().mean()>.985

@pytest.mark.parametrize('make', [
    lambda m: m.float()*2-1, lambda m: from_image((m.byte()*255)[None]), lambda m: m*.5, lambda m: m*.5+.2,
    lambda m: m.long()*3, lambda m: m.byte()*100, lambda m: m*math.nan, lambda m: m*1j, lambda m: 'mask.png',
    lambda m: -m.float(),
], ids=['signed','from_image','half','soft','classes','dark','nan','complex','path','negative'])
def test_masks_whose_meaning_is_a_guess_are_refused(make):
    "In [-1,1] all of it was hole."
    for constraint in (inpaint, edit):
        with pytest.raises(ValueError, match='hole|region'): constraint(picture(), make(disc()))

def test_an_empty_mask_is_refused():
    for constraint in (inpaint, edit):
        with pytest.raises(ValueError, match='is empty'): constraint(picture(), torch.zeros(28,28))

def on_transparent(colour, ground):
    "A square of a colour in the upper left, on a transparent ground that has another under it."
    pixels = np.full((8,8,4), ground, dtype=np.uint8)
    pixels[...,3] = 0
    pixels[:4,:4] = colour
    return Image.fromarray(pixels)

def corner():
    square = torch.zeros(8,8)
    square[:4,:4] = 1
    return square

READERS = {
    'region': read_region,
    'edges': lambda path: read_control(path, 'edges')[0],
    'depth': lambda path: read_control(path, 'depth')[0],
    'silhouette': lambda path: read_control(path, 'silhouette')[0],
}

@pytest.mark.parametrize('kind', READERS)
@pytest.mark.parametrize('ground', [255,0])
def test_what_is_painted_on_a_transparent_layer_counts(tmp_path, kind, ground):
    "White on transparent white was a region of 100 %."
    on_transparent((255,255,255,255), ground).save(tmp_path/'x.png')
    assert torch.equal(READERS[kind](tmp_path/'x.png'), corner())

@pytest.mark.parametrize('kind', READERS)
def test_black_on_a_transparent_layer_is_refused(tmp_path, kind):
    on_transparent((0,0,0,255), 255).save(tmp_path/'x.png')
    with pytest.raises(ValueError, match='black on a transparent ground'): READERS[kind](tmp_path/'x.png')

@pytest.mark.parametrize('kind', [*READERS, 'segmentation', 'colour'])
def test_files_are_turned_as_the_camera_noted(tmp_path, kind):
    "Orientation 6: turned by 90 degrees, so the corner is at the upper right."
    exif = Image.Exif()
    exif[0x112] = 6
    im = Image.fromarray(corner().byte().numpy()*(1 if kind=='segmentation' else 255))
    im.save(tmp_path/'x.png', exif=exif)
    if kind in READERS: read = READERS[kind](tmp_path/'x.png')
    elif kind=='segmentation': read = read_control(tmp_path/'x.png', kind, 2)[1]
    else:                                                                # squares of 8 pixels: the mean of all
        read = read_control(tmp_path/'x.png', kind)[0]
        assert torch.allclose(read, corner().mean().expand(8, 8))
        im.resize((32,32), Image.Resampling.NEAREST).save(tmp_path/'x.png', exif=exif)
        read = read_control(tmp_path/'x.png', kind)[0,::4,::4]
    assert torch.equal(read, corner().flip(1))


# ---- ranges of pictures

def test_a_sample_in_the_place_of_a_picture_warns(mnist):
    "`sample` gives [0,1]; what takes [-1,1] took it in silence."
    x = torch.rand(2,1,28,28)
    hole = disc()
    takers = [mnist.encode, mnist.autoencoder.encode, vary, invert, partial(upscale, factor=1),
              lambda x: inpaint(x, hole), lambda x: edit(x, hole), to_image, to_uint8, lambda x: to_image(x[0])]
    for take in takers:
        with pytest.warns(UserWarning, match=r'expects pictures in \[-1,1\].*2\*x-1'): take(x)
        with warnings.catch_warnings():
            warnings.simplefilter('error')
            take(x*2-1)

def test_a_sample_becomes_a_picture(mnist):
    "Black is 0 with `lo=0`; a bright picture in [-1,1] keeps its bytes."
    x = torch.tensor([[[0.,.5,1.]]])
    assert np.array(to_image(x, lo=0)).tolist()==[[0,128,255]]
    bright = from_image(torch.tensor([[[130,200,255]]], dtype=torch.uint8))
    assert np.array(to_image(bright, lo=-1)).tolist()==[[130,200,255]]
    with pytest.raises(ValueError, match='from_image'): vary(to_uint8(x, lo=0))


# ---- codes

@pytest.mark.parametrize('bad', [math.nan, math.inf, -math.inf, 1e30])
def test_one_bad_vector_does_not_kill_a_codebook(bad):
    "It made its code NaN, then all of them. Training goes on as if it had not been there, from the first batch on."
    books = []
    for extra in (torch.empty(0,4), torch.full((1,4), bad)):
        torch.manual_seed(0)
        vq = VectorQuantizer(16, 4, revive=0).train()
        for step in range(5):
            vectors = torch.randn(64, 4, generator=torch.Generator().manual_seed(step))
            if step in (0,2): vectors = torch.cat([vectors, extra])
            torch.manual_seed(step)                                                # of what would be moved where
            vq(vectors.T[None,:,None])
        books.append(vq.codebook)
    assert books[1].isfinite().all()
    close(books[0], books[1], 1e-6)

def test_a_codebook_with_revival_survives_bad_vectors():
    vq = VectorQuantizer(32, 4, revive=.5).train()
    for step in range(20):
        z = torch.randn(2,4,6,6)
        if step%3==0: z[0,1,2,3] = math.nan
        vq(z)
        assert vq.codebook.isfinite().all() and vq.count.isfinite().all()
    before = vq.codebook.clone()
    vq(torch.full((2,4,6,6), math.nan))
    assert torch.equal(vq.codebook, before)
