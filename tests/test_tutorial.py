"The tutorial's model (Wang and Vastola 2022): the networks, layer by layer, and the recipe."
import math
from functools import partialmethod
import pytest, torch, torch.nn.functional as F
from fastldm.core import fingerprint, n_params
from fastldm.data import DATASETS, Digits, Pictures
from fastldm.diffusion import LatentDataset, LatentDiffusion, PixelSpace, TutorialUNet, load
from fastldm.recipes import RECIPES, tutorial_ldm
from fastldm.recipes.labels import TUTORIAL_AS_WRITTEN, TUTORIAL_PIXELS

# ---- the networks, written out from the tutorial's description, with the weights of ours

def attend(weights, name, x, context):
    "One head, without an output projection: softmax(Q Kᵀ/√d) V."
    q = F.linear(x, weights[f'{name}.q.weight'])
    k,v = F.linear(context, weights[f'{name}.kv.weight']).chunk(2, -1)
    scores = torch.einsum('bth,bsh->bts', q, k)/math.sqrt(q.shape[-1])
    return torch.einsum('bts,bsh->bth', scores.softmax(-1), v)

def transformer(weights, name, x, context):
    "Self-attention, cross-attention and MLP, each with its norm and residual; the map is added once more."
    def own(part): return weights[f'{name}.{part}.weight'], weights[f'{name}.{part}.bias']
    def norm(part, h): return F.layer_norm(h, h.shape[-1:], *own(part))
    def linear(part, h): return F.linear(h, *own(part))
    h = x.flatten(2).transpose(1,2)
    normed = norm('norm1', h)
    h = h + attend(weights, f'{name}.attn', normed, normed)
    h = h + attend(weights, f'{name}.cross', norm('norm2', h), context)
    h = h + linear('mlp.3', F.gelu(linear('mlp.1', norm('mlp.0', h))))
    return h.transpose(1,2).reshape(x.shape) + x

def level(weights, i, convolve, x, emb, context, groups, attention):
    "Convolution, time, group norm, SiLU, and the transformer where there is one."
    time = F.linear(emb, weights[f'dense.{i}.weight'], weights[f'dense.{i}.bias'])
    h = convolve(x, weights[f'convs.{i}.weight']) + time[:,:,None,None]
    h = F.silu(F.group_norm(h, groups, weights[f'norms.{i}.weight'], weights[f'norms.{i}.bias']))
    return transformer(weights, f'attention.{i}', h, context) if attention else h

def down(x, w): return F.conv2d(x, w)
def down2(x, w): return F.conv2d(x, w, stride=2)
def up2(x, w): return F.conv_transpose2d(x, w, stride=2)
def up2_even(x, w): return F.conv_transpose2d(x, w, stride=2, output_padding=1)

def time_of(weights, t):
    angles = 2*math.pi*t[:,None]*weights['time.0.freqs']
    features = torch.cat([angles.sin(), angles.cos()], 1)
    return F.silu(F.linear(features, weights['time.1.weight'], weights['time.1.bias']))

def head(weights, h): return F.conv_transpose2d(h, weights['head.weight'], weights['head.bias'])

def latent_net(weights, x, t, context):
    "10, 8, 3, 1 and back; transformers at 3, 1 and 3."
    emb = time_of(weights, t)
    h1 = level(weights, 0, down, x, emb, context, 4, False)
    h2 = level(weights, 1, down2, h1, emb, context, 4, True)
    h3 = level(weights, 2, down2, h2, emb, context, 4, True)
    h = level(weights, 3, up2, h3, emb, context, 4, True)
    h = level(weights, 4, up2_even, h+h2, emb, context, 4, False)
    return head(weights, h+h1)

def pixel_net(weights, x, t, context):
    "28, 26, 12, 5, 2 and back; transformers at 5 and 2 on the way down."
    emb = time_of(weights, t)
    h1 = level(weights, 0, down, x, emb, context, 4, False)
    h2 = level(weights, 1, down2, h1, emb, context, 32, False)
    h3 = level(weights, 2, down2, h2, emb, context, 32, True)
    h4 = level(weights, 3, down2, h3, emb, context, 32, True)
    h = level(weights, 4, up2, h4, emb, context, 32, False)
    h = level(weights, 5, up2_even, h+h3, emb, context, 32, False)
    h = level(weights, 6, up2_even, h+h2, emb, context, 32, False)
    return head(weights, h+h1)

PIXELS = dict(channels=(1,32,64,128,256), attention=(2,3), groups=32)

@pytest.mark.parametrize('options,written_out,side,n', [
    (dict(), latent_net, 10, 282724),
    (dict(channels=(4,64,128,256)), latent_net, 10, 2223748),
    (PIXELS, pixel_net, 28, 2042497),
], ids=['narrow','wide','pixels'])
def test_the_replica_is_the_tutorials_network(options, written_out, side, n):
    "Its forward pass, layer by layer, in plain functions."
    torch.manual_seed(0)
    net = TutorialUNet(**options)
    assert n_params(net)==n
    x = torch.randn(3,options.get('channels', (4,))[0],side,side)
    t = torch.tensor([.01,.5,1.])
    context = torch.randn(3,1,256)
    with torch.no_grad():
        ours = net(x, t, context=context)
        assert (ours-written_out(net.state_dict(), x, t, context)).abs().max() < 1e-4

# ---- the recipe

class Grey28(Pictures):
    "Digits in the format of MNIST."
    def __init__(self, root=None, split='train', download=True):
        digits = Digits()
        super().__init__(F.pad(digits.image[:24], (6,6,6,6)), digits.label[:24], digits.classes)

@pytest.fixture
def small(monkeypatch, tmp_path):
    "Trains a recipe for one epoch of 24 digits; no scores on the way, two steps a sample."
    for name in ('mnist','fashion'): monkeypatch.setitem(DATASETS, name, Grey28)
    monkeypatch.setattr('fastldm.recipes.labels.score_cb', lambda *args: [])
    monkeypatch.setattr(LatentDiffusion, 'sample', partialmethod(LatentDiffusion.sample, steps=2))
    def train(name, **options):
        return RECIPES[name](folder=tmp_path/name, epochs=1, ae_epochs=1, progress=False, **options)
    return train

def test_the_card_says_whose_the_settings_are(small):
    "The tutorial's own, defaults of its classes with which it does not train, and ours."
    card = small('mnist_tutorial').meta
    assert 'ae_channels=(4, 4, 4)' in card['tutorial_settings']
    assert card['tutorial_class_defaults']=='channels=(64, 128, 256)'
    for ours in ('batch_size=128', 'lr=0.004', "schedule='cosine'", 'warmup=100'): assert ours in card['our_settings']
    as_written = small('mnist_tutorial_as_written').meta
    assert as_written['our_settings']=='ae_epochs=1, epochs=1'
    assert 'channels=(16, 32, 64)' in as_written['tutorial_settings']

@pytest.mark.parametrize('options,says', [
    (dict(channels=(16,32)), r'channels=\(16, 32\): expected 3 multiples of 4'),
    (dict(ae_channels=None), 'expected 4 multiples of 32'),
    (dict(schedule='linear'), "unknown schedule 'linear'"),
    (dict(ae_batch_size=0), 'ae_batch_size=0'),
    (dict(lr=-1.), 'lr=-1.0'),
], ids=lambda value: '' if isinstance(value, str) else '-'.join(value))
def test_what_cannot_work_is_refused_first(tmp_path, options, says):
    "Before the autoencoder is trained, and before anything is written."
    with pytest.raises(ValueError, match=says): tutorial_ldm(folder=tmp_path/'m', **options)
    assert not (tmp_path/'m').exists()

def test_pixels_have_no_first_stage(small):
    "What the network works on are the pictures, in [0,1]."
    ldm = small('mnist_tutorial_pixels', batch_size=8)
    assert isinstance(ldm.autoencoder, PixelSpace) and ldm.shape==(1,28,28)
    assert list(ldm.meta['stages'])==['denoiser']
    ds = Grey28()
    latents = LatentDataset(ds, ldm.autoencoder, progress=False)
    assert torch.allclose(latents[3]['latent'], ds.image[3]/255, atol=1e-6)
    assert ldm.sample(2, label=[1,2], seed=0).shape==(2,1,28,28)

def test_a_seed_makes_the_whole_run(small, tmp_path, monkeypatch):
    "The autoencoder's first weights were drawn before the seed was set."
    torch.manual_seed(1)
    first = fingerprint(small('mnist_tutorial'))
    torch.manual_seed(2)
    again = tutorial_ldm(folder=tmp_path/'again', epochs=1, ae_epochs=1, progress=False)
    assert fingerprint(again)==first

def test_the_learning_rate_of_the_tutorial():
    "0.995 an epoch, but never below one half; of the pixels 0.98 and one fifth."
    from fastldm.recipes.labels import _decay
    rates = [_decay(250, *TUTORIAL_AS_WRITTEN['schedule'], epoch/250) for epoch in (0,1,100,249)]
    assert rates==pytest.approx([1, .995, .995**100, .5])
    assert _decay(100, *TUTORIAL_PIXELS['schedule'], .99)==pytest.approx(.2)

# ---- what ships

def test_the_shipped_models_are_wide():
    "The narrow one stays beside them, as the tutorial has it."
    for name in ('mnist_tutorial','fashion_tutorial'):
        ldm = load(name, 'cpu')
        assert ldm.steps==500 and ldm.denoiser.net.convs[0].out_channels==64
    assert load('mnist_tutorial_as_written', 'cpu').denoiser.net.convs[0].out_channels==16
