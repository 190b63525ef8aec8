"Local control: what a person gives wrongly, the command line, the adapters that ship, what they cost."
import time
from copy import copy
from functools import partial
import numpy as np, pytest, torch
from PIL import Image
from commands import run
from fastldm import load
from fastldm.control import ControlAdapter, control, control_loss, picture_control, random_region
from fastldm.core import set_seed
from fastldm.data import SyntheticScenes
from fastldm.diffusion import Cond
from fastldm.metrics import edge_f1, leakage
from fastldm.recipes import control_data, evaluate_control, sample_cli, train_adapter, train_cli


@pytest.fixture(scope='module')
def model(): return load('scenes')

@pytest.fixture(scope='module')
def adapter(): return load('local_scenes')

@pytest.fixture(scope='module')
def scene():
    "Held-out scenes and their edges."
    batch = SyntheticScenes(48, 'test')[:48]
    return batch, picture_control('edges', batch)

@pytest.fixture(scope='module')
def middle():
    "A square in the middle."
    region = torch.zeros(1, 1, 64, 64)
    region[...,16:48,16:48] = 1
    return region

def save_plane(x, path):
    Image.fromarray((np.asarray(x)*255).astype(np.uint8)).save(path)
    return path


# ---- bad input

@pytest.mark.parametrize('picture,region,says', [
    (torch.zeros(64,64), torch.ones(32,32), r'the region is \(32, 32\), the control \(64, 64\)'),
    (torch.zeros(63,63), None, r'picture of \(63, 63\)'),
    (torch.zeros(64,64), torch.ones(64,64)*255, '255'),
    (torch.zeros(64,64).long(), None, 'torch.int64'),
    (torch.zeros(3,64,64), None, r'\(1, 3, 64, 64\)'),
    (torch.full((64,64), float('nan')), None, 'nan'),
    (torch.zeros(5,1,64,64), None, '5 controls or regions were given for 2 samples'),
])
def test_bad_controls(model, adapter, picture, region, says):
    "Another size, odd sizes, bytes, colours, numbers that are none: refused before work starts."
    with pytest.raises(ValueError, match=says):
        model.sample('a red ship', 2, constraint=control(adapter, picture, region), seed=0, steps=2)

def test_an_empty_region_is_the_base_model(model, adapter, scene):
    free = model.sample('a red ship on the sea', 2, prior='diffusion', seed=0, steps=3)
    nowhere = control(adapter, scene[1][:2], torch.zeros(64,64))
    assert torch.equal(model.sample('a red ship on the sea', 2, constraint=nowhere, seed=0, steps=3), free)

def test_the_control_outside_has_no_influence(model, adapter, scene, middle):
    "Bit for bit the same picture, whatever the control is outside the region; unless it is not masked."
    batch, edges = scene
    edges = edges[:2]
    other = torch.where(middle>0, edges, 1-edges)
    def draw(edges, **options):
        constraint = control(adapter, edges, middle, **options)
        return model.sample(batch['caption'][:2], constraint=constraint, seed=0, steps=4)
    assert torch.equal(draw(edges), draw(other))
    assert not torch.equal(draw(edges, mask_control=False), draw(other, mask_control=False))

def test_a_kind_it_was_not_trained_for(adapter):
    with pytest.raises(ValueError, match="unknown control 'depth'"): control(adapter, torch.zeros(64,64), kind='depth')

def test_an_adapter_of_another_model(model, scene):
    edges = scene[1][0]
    with pytest.raises(ValueError, match='trained for another model'):
        load('emoji').sample('a cat', 1, constraint=control(load('local_scenes'), edges), steps=2)
    narrow = ControlAdapter(['edges'], 1, (8,16))
    with pytest.raises(ValueError, match='this model has'):
        model.sample('a cat', 1, constraint=control(narrow, edges), steps=2)

def test_codes_cannot_be_controlled(model, adapter, scene):
    with pytest.raises(ValueError, match='constraint'):
        model.sample('a red ship', 1, prior='codes', constraint=control(adapter, scene[1][0]))

def test_regions_one_a_sample(model, adapter, scene, middle):
    "A batch of controls and regions gives what they give one by one."
    batch, edges = scene
    regions = torch.cat([middle, middle.roll(9, -1)])
    constraint = control(adapter, edges[:2], regions)
    draw = partial(model.sample, batch['caption'][:2], constraint=constraint, seed=0, steps=4)
    assert torch.allclose(draw(), draw(batch_size=1), atol=1e-4)

@pytest.mark.parametrize('edges', [None,'z0','sobel','laplacian'])
def test_half_precision_near_the_noise(model, adapter, scene, middle, edges):
    "The predicted latent is finite where 1/alpha is large, and so are the gradients."
    z = model.vqvae.encode(scene[0]['image'][:4])
    text = model.text_encoder.text_features(scene[0]['caption'][:4])
    batch = dict(latent=z, control=scene[1][:4], region=middle.expand(4,-1,-1,-1), text=text)
    net = ControlAdapter(['edges'], 1, (48,96))
    loss_fn = control_loss(model.denoiser, edges, sample_t=lambda schedule, n, device: torch.full((n,), .9999))
    with torch.autocast('cpu', torch.bfloat16): loss = loss_fn(net, batch)
    loss['loss'].backward()
    assert all(v.isfinite().all() for v in loss.values())
    assert all(p.grad.isfinite().all() for p in net.parameters() if p.grad is not None)

def test_segmentation_of_masks_in_bytes():
    "Faces keep their masks as bytes; classes become planes all the same."
    mask = torch.randint(0, 5, (2,8,8))
    planes = picture_control('segmentation', dict(image=torch.zeros(2,3,8,8), mask=mask.byte()), 5)
    assert planes.shape==(2,5,8,8) and torch.equal(planes.argmax(1), mask)
    assert torch.equal(planes.sum(1), torch.ones(2,8,8))

@pytest.mark.parametrize('guidance', [{},dict(guidance_scale=1.)], ids=['guided','plain'])
def test_each_control_at_its_own_times(model, adapter, scene, middle, guidance):
    "An adapter used early and the same used late are together the adapter used always (no step is at the half itself)."
    def used(lo, hi):
        within = copy(adapter)
        within.interval = (lo,hi)
        return control(within, scene[1][:2], middle)
    def draw(constraint):
        options = dict(guidance, prior='diffusion', seed=0, steps=5)
        return model.sample(scene[0]['caption'][:2], constraint=constraint, **options)
    always = draw(used(0.,1.))
    assert torch.allclose(draw(used(.5,1.)+used(0.,.5)), always, atol=1e-4)
    assert not torch.allclose(draw(used(.5,1.)), always, atol=1e-2)


# ---- training

@pytest.mark.slow
def test_train(tmp_path, model):
    """From a few scenes: the card names the base, the same call again trains nothing, the same seed gives the same
    weights, and so does data that is made already."""
    options = dict(kinds='edges+depth', n=48, steps=6, batch_size=8, progress=False)
    a = train_adapter('scenes', tmp_path/'a', **options)
    assert a.kinds==['edges','depth'] and a.c_in==2
    assert a.meta['base'] and 'scenes' in (tmp_path/'a/README.md').read_text()
    weights = tmp_path/'a/model.safetensors'
    written = weights.stat().st_mtime
    train_adapter('scenes', tmp_path/'a', **options)
    assert weights.stat().st_mtime==written
    data = control_data(model, ['edges','depth'], n=48, progress=False)
    b = train_adapter('scenes', tmp_path/'b', pictures=data, **options)
    assert all(torch.equal(p, q) for p,q in zip(a.parameters(), b.parameters())) and data.regions=='box'
    res = evaluate_control(model, a, n=4, steps=2, progress=False)
    assert 0<=res['edge_f1']<=1 and {'leakage','lfmse_total','classifier_all'}<={*res}
    with pytest.raises(ValueError, match="did you mean 'features'"): evaluate_control(model, a, 'feature', n=4)

@pytest.mark.slow
def test_command(tmp_path, scene, middle):
    edges = save_plane(scene[1][0,0], tmp_path/'e.png')
    region = save_plane(middle[0,0], tmp_path/'r.png')
    run('fastldm_sample', 'scenes', '--prompt', 'a red ship on the sea', '--n', 2, '--steps', 3,
        '--control', edges, '--region', region, '--out', tmp_path/'x.png')
    assert Image.open(tmp_path/'x.png').size[0]>100

@pytest.mark.slow
def test_commands_that_cannot(tmp_path, scene, middle):
    "What they say, in this process."
    edges = save_plane(scene[1][0,0], tmp_path/'e.png')
    region = save_plane(middle[0,0], tmp_path/'r.png')
    colours = np.random.default_rng(0).integers(0, 255, (64,64,3), dtype=np.uint8)
    Image.fromarray(colours).save(tmp_path/'c.png')
    def fails(says, **options):
        with pytest.raises(SystemExit, match=says):
            sample_cli(model='scenes', prompt='a ship', **{k: str(v) for k,v in options.items()})
    with pytest.raises(ValueError, match=r'the region is \(32, 32\)'):          # the commands make it fit
        control(load('local_scenes'), scene[1], middle[0,0,:32,:32])
    fails('is in colour', control=tmp_path/'c.png')
    fails('--control', region=region)
    fails("did you mean 'local_scenes'", control=edges, adapter='local_scene')
    with pytest.raises(SystemExit, match='needs --model'): train_cli(recipe='local')


# ---- what ships

@pytest.mark.slow
def test_it_follows_inside_and_invents_outside(model, adapter, scene, middle):
    batch, edges = scene
    def drawn_edges(constraint):
        options = {} if constraint is None else dict(constraint=constraint)
        x = model.sample(batch['caption'], prior='diffusion', seed=0, steps=10, precision='bf16', **options)
        return picture_control('edges', dict(image=x*2-1))
    local = drawn_edges(control(adapter, edges, middle))
    free = drawn_edges(None)
    everywhere = drawn_edges(control(adapter, edges))
    assert edge_f1(local, edges, middle)>max(.72, edge_f1(free, edges, middle)+.3)
    # what the square cuts is finished as it was begun, so not all of the leakage is chance
    assert leakage(local, edges, middle)<leakage(everywhere, edges, middle)-.05

@pytest.mark.slow
def test_another_model():
    """The adapter of avatars follows held-out edges in a square that they would not draw by themselves (an avatar that
    is conditioned on the mask draws them anyway)."""
    def f1(method):
        options = dict(n=12, use_conditions=False, steps=8, precision='bf16', progress=False)
        return evaluate_control(load('avatars'), load('local_avatars'), method, **options)['edge_f1']
    try: assert f1('features')>f1('nothing')+.15
    except FileNotFoundError as e: pytest.skip(str(e))


# ---- what it costs

def best_in_turn(a, b, n):
    "The best times of two functions, run in turn: what else the machine does slows both."
    def seconds(run):
        start = time.perf_counter()
        run()
        return time.perf_counter()-start
    times = [(seconds(a), seconds(b)) for _ in range(n)]
    return map(min, zip(*times))

@pytest.mark.slow
@pytest.mark.bench
def test_sampling_with_control(model, adapter, scene, middle):
    "Less than 15 % more than a sampling run."
    draw = partial(model.sample, scene[0]['caption'][:8], prior='diffusion', seed=0, steps=10)
    constraint = control(adapter, scene[1][:8], middle)
    controlled, free = best_in_turn(partial(draw, constraint=constraint), draw, 8)
    assert controlled<1.15*free

@pytest.mark.slow
@pytest.mark.bench
def test_a_training_step(model, scene):
    "The frozen model and the adapter, forward and backward, and little more."
    n = 16
    set_seed(0)
    denoiser = model.denoiser
    with torch.no_grad(): z = model.vqvae.encode(scene[0]['image'][:n])
    batch = dict(latent=z, control=scene[1][:n], region=random_region(n, 64),
                 text=model.text_encoder.text_features(scene[0]['caption'][:n]))
    net = ControlAdapter(['edges'], 1, (48,96))
    loss = control_loss(denoiser)
    def bare():
        cond = denoiser.conditioner(batch)+Cond(features=net(batch['control']))
        denoiser(z, torch.full((n,), .5), cond).square().mean().backward()
    def step(): loss(net, batch)['loss'].backward()
    exact, ours = best_in_turn(bare, step, 12)
    assert exact>.85*ours

def test_controls_of_different_branches_are_not_added():
    "One sum has one branch, so the other's is never dropped in silence."
    from fastldm.control import Control
    assert (Control([], 'both')+Control([], 'both')).branch=='both'
    with pytest.raises(ValueError, match='same `branch`'): Control([], 'both')+Control([], 'conditional')
