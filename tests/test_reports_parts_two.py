"Faults of the parts that were reported, second round: LoRA, control, export, inversion and metrics."
import copy, math, warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from fastldm import load
from fastldm.codes import Blip, blip_loss
from fastldm.control import Control, Controlled, ControlAdapter, control
from fastldm.core.train import Learner
from fastldm.diffusion import (Autoencoder, Conditioner, Cosine, Denoiser, LabelEmbedder, LatentDiffusion, UNet,
                               adapters_of, add_lora, guide, invert, load_lora, merge_lora, remove_lora, save_lora)
from fastldm.diffusion.export import compare_onnx, export_onnx
from fastldm.diffusion.lora import _changes
from fastldm.metrics import precision_recall
from fastldm.metrics.control import edge_f1, leakage
from fastldm.metrics.faces import blur_some, iou_per_class
from fastldm.metrics.images import nearest_neighbours, random_affine

@pytest.fixture(autouse=True)
def seeded(): torch.manual_seed(0)

# ---- LoRA

def small_blip():
    torch.manual_seed(0)
    return Blip.small(['a red house','a blue bird'], size=32, width=32, heads=2, layers=(1,1)).eval()

@torch.no_grad()
def shaken(model, rank=2):
    "The model with an adapter that changes something."
    add_lora(model, rank)
    for _,change in _changes(model): nn.init.normal_(change.B, std=.1)
    return model

@torch.no_grad()
def logits_of(blip):
    images = torch.linspace(-1, 1, 2*3*32*32).view(2, 3, 32, 32)
    ids, mask = blip.tokens(['a red house','a blue bird'])
    states = blip.image_states(images)
    return blip.text_decoder(input_ids=ids, attention_mask=mask, encoder_hidden_states=states).logits

def test_merging_into_a_blip_changes_nothing():
    "Its last layer is its table of words, so it gets no change of its own."
    blip = small_blip()
    plain = logits_of(blip)
    adapted = logits_of(shaken(blip))
    assert (adapted-plain).abs().max()>1e-3
    torch.testing.assert_close(logits_of(merge_lora(blip)), adapted, atol=1e-5, rtol=1e-4)

def test_the_adapter_of_a_blip_fits_the_blip(tmp_path):
    "The plain model, and one that has the adapter, have the same fingerprint."
    blip = shaken(small_blip())
    file = save_lora(blip, tmp_path/'a.safetensors', half=False)
    torch.testing.assert_close(logits_of(load_lora(small_blip(), file)), logits_of(blip))

def test_a_blip_with_a_lora_has_an_average():
    data = [dict(image=torch.rand(3, 32, 32)*2-1, caption=text) for text in ('a red house','a blue bird')*4]
    blip = add_lora(small_blip(), 2)
    learn = Learner(blip, data, blip_loss(), steps=1, batch_size=4, ema=.9, progress=False).fit()
    assert adapters_of(learn.ema_model)==['lora']

class Tied(nn.Module):
    "Two layers with the same weights, and one with its own."
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(6, 6, bias=False) for _ in range(3))
        self.b.weight = self.a.weight
    def forward(self, x): return self.c(self.b(self.a(x)))

def test_shared_weights_stay_as_they_are():
    tied = shaken(Tied())
    assert [name for name,_ in _changes(tied)]==['c']
    x = torch.randn(2, 6)
    adapted = tied(x)
    torch.testing.assert_close(merge_lora(tied)(x), adapted)
    assert tied.a.weight is tied.b.weight
    del tied.c
    with pytest.raises(ValueError, match='weights of their own'): add_lora(tied)

@pytest.mark.parametrize('norm', [parametrizations.spectral_norm, parametrizations.weight_norm,
                                  nn.utils.spectral_norm])
@pytest.mark.parametrize('end', [merge_lora, remove_lora])
def test_other_parametrizations_stay(norm, end):
    net = nn.Sequential(norm(nn.Linear(4, 4)), nn.Linear(4, 2)).eval()
    x = torch.randn(3, 4)
    before = net(x)
    torch.testing.assert_close(end(net)(x), before)                     # there is nothing to take off
    adapted = shaken(net)(x)
    assert [name for name,_ in _changes(net)]==['1']
    torch.testing.assert_close(end(net)(x), adapted if end is merge_lora else before)
    assert all(p.requires_grad for p in net.parameters())

# ---- a model in bfloat16, and its adapters

def test_rounded_model_takes_its_lora(tmp_path):
    net = UNet(1, (8,), d_emb=16)
    file = save_lora(shaken(copy.deepcopy(net)), tmp_path/'a.safetensors')
    assert adapters_of(load_lora(copy.deepcopy(net).bfloat16(), file))==['lora']
    with pytest.raises(ValueError, match='was trained for weights'): load_lora(UNet(1, (8,), d_emb=16), file)

@pytest.fixture(scope='module')
def scenes(): return load('scenes')

@pytest.fixture(scope='module')
def lines():
    picture = torch.zeros(64, 64)
    picture[16:48,[16,47]] = 1
    return picture

HOW = dict(prompt='a red house at night', seed=0, steps=2)

def test_a_model_in_another_precision_takes_its_control(scenes, lines):
    drawn = scenes.sample(constraint=control(load('local_scenes'), lines), **HOW)
    effect = (drawn-scenes.sample(**HOW)).abs().mean()
    for dtype in (torch.bfloat16, torch.double):
        rounded = load('scenes').to(dtype).sample(constraint=control(load('local_scenes'), lines), **HOW)
        assert (rounded.float()-drawn).abs().mean()<.5*effect
    add_lora(adapted := load('scenes').denoiser)
    with_lora = load('scenes')
    with_lora.denoiser = adapted
    assert torch.equal(with_lora.sample(constraint=control(load('local_scenes'), lines), **HOW), drawn)

@pytest.mark.parametrize('dtype', [torch.half, torch.bfloat16, torch.double])
def test_an_adapter_in_another_precision(scenes, lines, dtype):
    drawn = scenes.sample(constraint=control(load('local_scenes'), lines), **HOW)
    rounded = scenes.sample(constraint=control(load('local_scenes').to(dtype), lines), **HOW)
    assert rounded.dtype==torch.float and (rounded-drawn).abs().mean()<.01

def test_another_model_is_refused_its_control(scenes, lines):
    other = copy.deepcopy(scenes)
    with torch.no_grad(): next(other.denoiser.parameters()).add_(.1)
    with pytest.raises(ValueError, match='trained for another model'):
        other.sample(constraint=control(load('local_scenes'), lines), **HOW)

# ---- control

def test_each_row_has_its_own_time():
    net = UNet(2, (8,16), d_emb=16)
    for p in net.parameters(): nn.init.normal_(p, std=.1)
    base = Denoiser(net, Cosine()).eval()
    features = [torch.randn(3, 8, 8, 8), torch.randn(3, 16, 4, 4)]
    late = Controlled(base, features, interval=(.5,1.))
    everywhere = Controlled(base, features)
    x = torch.randn(3, 2, 8, 8)
    times = torch.tensor([.2,.9,.5])
    with torch.no_grad(): found, free, controlled = late(x, times), base(x, times), everywhere(x, times)
    assert torch.equal(found[0], free[0]) and torch.equal(found[1:], controlled[1:])
    assert (found[1:]-free[1:]).abs().amax((1,2,3)).min()>1e-3

@pytest.mark.parametrize('weight', [math.nan, math.inf, '1', None])
def test_weight_is_a_number(weight):
    with pytest.raises(ValueError, match='weight='):
        control(ControlAdapter(['edges'], 1, (8,)), torch.rand(8, 8), weight=weight)

@pytest.mark.parametrize('branch,scale,warns', [('conditional',0.,True), ('conditional',1.,False),
                                                ('both',0.,False), ('unconditional',1.,True)])
def test_a_control_without_effect_warns(branch, scale, warns):
    denoiser = Denoiser(UNet(2, (8,), d_emb=16), Cosine(), Conditioner(label=LabelEmbedder(3, 16)))
    guided = guide(denoiser, dict(label=torch.tensor([0])), label=scale)
    part = control(ControlAdapter(['edges'], 1, (8,)), torch.rand(32, 32), branch=branch)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter('always')
        Control(part.parts, branch).start(None, guided, None, None, [torch.zeros(1, 8, 8, 8)])
    assert bool(found)==warns

# ---- export

def test_nan_is_a_difference(tmp_path):
    for package in ('onnx','onnxscript','onnxruntime'): pytest.importorskip(package)
    ldm = LatentDiffusion(Autoencoder(1, 2, (8,)), Denoiser(UNet(2, (8,), d_emb=16), Cosine()), (2,8,8)).train()
    folder = export_onnx(ldm, tmp_path/'m')
    assert max(compare_onnx(ldm, folder).values())<1e-4
    assert all(part.training for part in ldm.modules())
    with torch.no_grad():
        for p in ldm.denoiser.parameters(): p.fill_(math.nan)
    found = compare_onnx(ldm, folder)
    assert math.isnan(found['denoiser']) and found['decoder']<1e-4
    with pytest.raises(ValueError, match='the graphs differ'): export_onnx(ldm, tmp_path/'n')

# ---- inversion

def test_candidates_of_an_inversion(scenes):
    "Each picture is inverted under its own prompt, for all of its candidates."
    prompts = ['a red house','a yellow sun']
    how = dict(seed=0, steps=2)
    pictures = scenes.sample(prompts, **how)*2-1
    new = ['a blue house','a red sun']
    one = scenes.sample(new, constraint=invert(pictures, prompt=prompts), **how)
    by_features = invert(pictures, text=scenes.text_encoder.text_features(prompts))
    torch.testing.assert_close(scenes.sample(new, constraint=by_features, **how), one, atol=1e-4, rtol=0)
    by_words = invert(pictures, text=prompts)
    best = scenes.sample(new, candidates=2, constraint=by_words, **how)
    torch.testing.assert_close(best, one, atol=1e-4, rtol=0)

def test_conditions_of_candidates():
    pictures = -torch.ones(2, 1, 4, 4)
    twice = invert(pictures, label=[3,5], style=1).repeated(2, 2)
    assert twice.conditions==dict(label=[3,3,5,5], style=1) and len(twice.images)==4

# ---- metrics

def test_soft_edges_and_soft_regions():
    edges = torch.zeros(1, 1, 16, 16)
    edges[0,0,8,2:14] = 1
    spot = torch.zeros(1, 1, 16, 16)
    spot[...,8,5] = 1
    assert edge_f1(edges, edges, spot*.2)==pytest.approx(1)
    assert edge_f1(edges*.05, edges*.05)==pytest.approx(1)
    assert edge_f1(edges*.5, edges)==pytest.approx(2/3)                 # precision 1, recall 1/2
    assert edge_f1(edges*0, edges)==0 and edge_f1(edges*0, edges*0)==1
    assert leakage(edges*.1, edges, torch.zeros_like(edges))==pytest.approx(.1)

@pytest.mark.parametrize('mean', [0,100,1000])
def test_neighbours_of_features_with_a_large_mean(mean):
    samples, train = (mean+.05*torch.randn(n, 64) for n in (100, 400))
    distances, nearest = nearest_neighbours(samples, train)
    expected = torch.cdist(samples.double(), train.double()).min(1)
    assert torch.equal(nearest, expected.indices)
    torch.testing.assert_close(distances.double(), expected.values, atol=0, rtol=1e-4)

@pytest.mark.parametrize('mean', [0,100,1000])
def test_precision_and_recall_of_features_with_a_large_mean(mean):
    pytest.importorskip('torch_fidelity')
    real, fake = mean+.1*torch.randn(200, 8), mean+.05+.12*torch.randn(150, 8)
    def covered(points, by):
        radius = torch.cdist(by.double(), by.double()).kthvalue(4, 1).values
        return (torch.cdist(points.double(), by.double())<=radius).any(1).double().mean().item()
    assert precision_recall(real, fake)==pytest.approx((covered(fake, real), covered(real, fake)), abs=.02)

@pytest.mark.parametrize('size', [(48,48), (32,96), (96,32)])
def test_a_turned_disc_is_a_disc(monkeypatch, size):
    "Also where a picture is not square: the rotation is one of pixels."
    h, w = size
    y, x = torch.meshgrid(torch.arange(h)-(h-1)/2, torch.arange(w)-(w-1)/2, indexing='ij')
    disc = (x**2+y**2<100).float()
    draws = iter([.8,.5,.5,.5])                                         # an angle of .6, and the same size
    monkeypatch.setattr('fastldm.metrics.images.rows_of_batch', lambda draw, n: torch.full((n,), next(draws)))
    turned = random_affine(disc[None,None], shift=0, turn=1.)[0,0]
    assert (turned-disc).abs().mean()<.01
    assert turned.sum().item()==pytest.approx(disc.sum().item(), rel=.02)

@pytest.mark.parametrize('other', [-1,2,255])
def test_other_ids_do_not_count(other):
    found = iou_per_class(torch.tensor([[[0,1,other]]]), torch.tensor([[[0,1,1]]]), 2)
    assert found.tolist()==[1,1]

@pytest.mark.parametrize('size', [(65,65), (64,31), (8,8)])
def test_any_size_is_blurred(size):
    x = torch.full((4,3,*size), .5)
    torch.testing.assert_close(blur_some(x, std=0.), x)
