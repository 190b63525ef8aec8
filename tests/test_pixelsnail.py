"PixelSNAIL: causality, the incremental sampler against the whole network, bad input, early stopping after a kill."
import math
import pytest, torch
import torch.nn.functional as F
from fastcore.test import test_close as close, test_eq as eq
from fastldm.core import Callback, HeldOutCB, Learner, load_model, save_model
from fastldm.codes.pixelsnail import *

KINDS = dict(
    plain=dict(),
    convs=dict(attention=False),
    wide=dict(kernel=(2,5)),
    text=dict(d_text=6),
    text_convs=dict(d_text=6, attention=False),
    above=dict(above=(4,(2,3))),
    all=dict(above=(4,(2,3)), d_text=6, kernel=(3,3)),
    all_convs=dict(above=(4,(2,3)), d_text=6, attention=False),
)

def make(kind='plain', shape=(4,6), n_codes=5):
    "A prior whose weights are all random: at the start many are 0, and would hide what flows through them."
    torch.manual_seed(0)
    settings = {'kernel':(1,3), **KINDS[kind]}
    m = PixelSNAIL(n_codes, shape, 16, n_blocks=2, n_res=1, **settings)
    for p in m.parameters(): p.data += .15*torch.randn_like(p)
    return m.eval().requires_grad_(False)

def inputs(m, n, seed=1):
    "Codes, a coarser map and texts: of two tokens, of one, and the empty text."
    g = torch.Generator().manual_seed(seed)
    text = torch.randn(n,3,6, generator=g)
    text[1::3,2:] = 0
    text[2::3] = 0
    above = m.above and torch.randint(m.above[0], (n,*m.above[1]), generator=g)
    codes = torch.randint(m.n_codes, (n,*m.shape), generator=g)
    return codes, above, text if m.d_text else None

def repeated(x, n): return x if x is None else x.repeat(n, *[1]*(x.dim()-1))

@pytest.mark.parametrize('kind', KINDS)
def test_causal_everywhere(kind):
    "Each code is changed in turn, to each other code: logits at that position and before it stay."
    m = make(kind)
    codes, above, text = inputs(m, 1)
    n = codes.numel()
    base = m(codes, above, text)
    reached = torch.zeros(n,n, dtype=torch.bool)
    for other in range(1, m.n_codes):
        many = codes.flatten(1).repeat(n,1)
        many[range(n),range(n)] = (many.diagonal()+other)%m.n_codes
        changed = m(many.view(n,*m.shape), repeated(above,n), repeated(text,n))
        difference = (changed-base).abs().amax(1).flatten(1)
        assert difference.tril().max()<1e-6
        reached |= difference>1e-6
    if 'convs' not in kind: assert reached.triu(1).sum()==n*(n-1)//2     # with attention, everything before is in reach

@pytest.mark.parametrize('kind', KINDS)
def test_step_by_step_equals_whole(kind):
    m = make(kind)
    codes, above, text = inputs(m, 3)
    w = m.shape[1]
    condition = m.condition(3, above, text)
    fast, slow, at_once = Stepper(m, *condition), whole_network(m, *condition), m(codes, above, text)
    for p in range(codes[0].numel()):
        logits = fast(None, p, codes.flatten(1)[:,p-1] if p else None)   # it gets one code at a time, nothing else
        close(logits, slow(codes, p, None), eps=1e-4)
        close(logits, at_once[:,:,p//w,p%w], eps=1e-4)

@pytest.mark.parametrize('scale', [1.,2.5])
@pytest.mark.parametrize('kind', KINDS)
def test_same_codes_as_the_slow_way(kind, scale):
    m = make(kind)
    _, above, text = inputs(m, 4)
    if scale!=1 and not m.d_text: pytest.skip('guidance is by text')
    for limits in ({}, dict(temperature=.7,top_k=3), dict(top_p=.8), dict(temperature=0)):
        kw = dict(limits, above=above, text=text, seed=3, guidance_scale=scale)
        eq(sample_codes(m, 4, **kw), sample_codes_slow(m, 4, **kw))

@pytest.mark.parametrize('kind', ['plain','all'])
def test_a_sample_does_not_depend_on_the_batch(kind):
    m = make(kind)
    _, above, text = inputs(m, 6)
    every = sample_codes(m, 6, above=above, text=text, seed=5)
    for i in range(6):
        above_i, text_i = (o if o is None else o[i:i+1] for o in (above,text))
        eq(sample_codes(m, 1, above=above_i, text=text_i, seed=5, first=i), every[i:i+1])
    assert (sample_codes(m, 6, above=above, text=text, seed=6)!=every).any()
    assert len(every.unique(dim=0))==6

def test_guidance_is_arithmetic():
    "With scale s the logits are no + s (yes-no): at 0 the text does not matter, at 1 it is as without guidance."
    m = make('text')
    _, _, text = inputs(m, 3)
    same, empty = text[:1].expand(3,-1,-1), torch.zeros(3,1,6)
    eq(sample_codes(m, 3, text=same, guidance_scale=0.), sample_codes(m, 3, text=empty))
    eq(sample_codes(m, 3, text=same, guidance_scale=1.+1e-9), sample_codes(m, 3, text=same))
    eq(sample_codes(m, 3), sample_codes(m, 3, text=empty))               # no text is the empty text

def test_padding_of_a_text_has_no_meaning():
    m = make('text')
    codes, _, text = inputs(m, 3)
    close(m(codes, None, torch.cat([text,torch.zeros(3,5,6)], 1)), m(codes, None, text), eps=1e-5)

def test_probabilities_of_all_maps_add_up_to_one():
    "All 2^6 maps of 2×3 with two codes; and samples follow the probabilities."
    m = make('plain', (2,3), 2)
    maps = (torch.arange(64)[:,None]>>torch.arange(6)&1).view(64,2,3)
    log_p = m(maps).log_softmax(1).gather(1, maps[:,None]).flatten(1).sum(1)
    close(log_p.double().exp().sum(), 1., eps=1e-5)
    drawn = sample_codes(m, 4000).flatten(1)@(2**torch.arange(6))
    share = torch.bincount(drawn, minlength=64)/4000
    assert (share-log_p.exp()).abs().max()<5*math.sqrt(.25/4000)
    chi2 = ((share-log_p.exp())**2/log_p.exp()).sum()*4000
    assert 30<chi2<110                                                   # 63 degrees of freedom

def test_levels_do_not_share_random_numbers():
    "Priors that know nothing draw by the numbers alone: the finer level must not repeat the coarser one's."
    top = PixelSNAIL(4, (4,6), 16, 1, 1).eval()
    fine = PixelSNAIL(4, (4,6), 16, 1, 1, above=(4,(4,6))).eval()
    for m in (top,fine):
        m.head.weight.data.zero_()
        m.head.bias.data.zero_()
    a = sample_codes(top, 100)
    b = sample_codes(fine, 100, above=a)
    assert abs((a==b).float().mean()-.25)<.05

@pytest.mark.parametrize('shape', [(1,1),(1,7),(7,1),(2,2)])
def test_odd_maps(shape):
    m = make('wide', shape)
    eq(sample_codes(m, 2), sample_codes_slow(m, 2))
    eq(sample_codes(m, 2).shape, (2,*shape))

def test_saved_and_loaded(tmp_path):
    m = make('all')
    codes, above, text = inputs(m, 3)
    again = load_model(save_model(m, tmp_path/'m', half=False), 'cpu')
    close(again(codes, above, text).detach(), m(codes, above, text), eps=1e-6)
    eq((again.above,again.shape), (m.above,m.shape))

def test_mode_is_left_alone():
    m = make('text').train()
    sample_codes(m, 1)
    assert m.training

def test_every_weight_has_a_gradient():
    m = PixelSNAIL(5, (4,4), 16, 1, 1, d_text=6, above=(3,(2,2)))
    codes = torch.randint(5,(8,4,4))
    for _ in range(4):                                                   # at the start the last weights are 0
        logits = m(codes, torch.randint(3,(8,2,2)), torch.randn(8,3,6))
        F.cross_entropy(logits, codes).backward()
        for p in m.parameters(): p.data -= .1*p.grad
    assert not [k for k,p in m.named_parameters() if not p.grad.abs().sum()>0]

def test_text_is_dropped_in_training_only():
    m = make('text')
    m.drop_text = 1.
    codes, _, text = inputs(m, 3)
    for d in m.modules():
        if isinstance(d, torch.nn.Dropout): d.p = 0.
    close(m.train()(codes, None, text), m(codes, None, text*0), eps=1e-6)
    assert (m.eval()(codes, None, text)-m(codes, None, text*0)).abs().max()>1e-3

# --- bad input

GOOD = dict(codes=torch.zeros(2,4,6).long(), above=torch.zeros(2,2,3).long(), text=torch.zeros(2,3,6))
BAD = {
    'size': (dict(codes=torch.zeros(2,6,4).long()), r'expected int64 codes \(B,4,6\)'),
    'type': (dict(codes=torch.zeros(2,4,6)), 'float32'),
    'batch': (dict(codes=torch.zeros(4,6).long()), r'\(B,4,6\)'),
    'index': (dict(codes=GOOD['codes']+5), 'expected 0 to 4'),
    'negative': (dict(codes=GOOD['codes']-1), 'another codebook'),
    'list': (dict(codes=[0]), 'list'),
    'above size': (dict(above=torch.zeros(2,4,6).long()), r'above.*\(B,2,3\)'),
    'above index': (dict(above=GOOD['above']+4), 'above.*expected 0 to 3'),
    'no above': (dict(above=None), 'above: given NoneType'),
    'text width': (dict(text=torch.zeros(2,3,7)), r'\(B,1\+L,6\)'),
    'text rank': (dict(text=torch.zeros(2,6)), 'text encoder'),
    'no rows': (dict(text=torch.zeros(2,0,6)), r'1\+L'),
    'counts': (dict(text=torch.zeros(3,3,6)), 'as many of each'),
}

@pytest.mark.parametrize('kind', BAD)
def test_bad_input(kind):
    kw, message = BAD[kind]
    given = dict(GOOD, **kw)
    with pytest.raises(ValueError, match=message): make('all')(**given)
    if 'codes' in kw: return
    del given['codes']
    with pytest.raises(ValueError, match=message): sample_codes(make('all'), 2, **given)

@pytest.mark.parametrize('kw', [
    dict(n=0), dict(n=1.5), dict(temperature=-1.), dict(top_k=0), dict(top_k=1.5), dict(top_p=0.), dict(top_p=1.5),
    dict(guidance_scale=2.),
    dict(above=GOOD['above']), dict(text=GOOD['text'])])
def test_bad_sampling(kw):
    settings = dict(n=2)
    settings.update(kw)
    with pytest.raises(ValueError, match=next(iter(kw))): sample_codes(make(), **settings)

@pytest.mark.parametrize('kw', [
    dict(n_codes=0), dict(shape=(0,8)), dict(n_blocks=0), dict(n_res=0), dict(channels=20), dict(kernel=(1,4)),
    dict(kernel=(0,3)), dict(n_heads=0)])
def test_bad_sizes(kw):
    with pytest.raises(ValueError, match='expected'): PixelSNAIL(**kw)

# --- held-out bits

class Codes:
    "Maps of two levels; the finer repeats the coarser with noise."
    def __init__(self, n, seed):
        g = torch.Generator().manual_seed(seed)
        self.top = torch.randint(4,(n,2,2), generator=g)
        repeated = self.top.repeat_interleave(2,1).repeat_interleave(2,2)
        noisy = torch.rand(repeated.shape, generator=g)<.1
        self.fine = torch.where(noisy, torch.randint(4, repeated.shape, generator=g), repeated)
    def __len__(self): return len(self.top)
    def __getitems__(self, i): return dict(codes=[self.top[i],self.fine[i]])

def prior():
    torch.manual_seed(0)
    return PixelSNAIL(4, (4,4), 16, 1, 1, above=(4,(2,2)), kernel=(1,3))

def test_bits_of_a_model_that_knows_nothing():
    m = prior()
    m.head.weight.data.zero_()
    m.head.bias.data.zero_()
    close(bits_per_code(m, Codes(70,0)), 2., eps=1e-5)
    m.head.bias.data[0] = 50.                                            # sure of code 0: each other one costs 50 nats
    ds = Codes(70,0)
    wrong = (ds.fine!=0).float().mean().item()
    close(bits_per_code(m, ds), wrong*50/math.log(2), eps=1e-2)
    with pytest.raises(ValueError, match=r'expected a level of \(3, 3\)'):
        bits_per_code(PixelSNAIL(4, (3,3), 16, 1, 1), ds)

def test_coarser_level_is_used():
    train, test = Codes(600,0), Codes(200,1)
    settings = dict(steps=100, batch_size=32, lr=1.5e-2, warmup=10, progress=False)
    learn = Learner(prior(), train, pixelsnail_loss(1), **settings).fit()
    p = torch.tensor([.925]+[.025]*3)                                    # of a code, given the one above it
    entropy = -(p*p.log2()).sum().item()                                 # no model needs fewer bits
    assert entropy-.03 < bits_per_code(learn.model, test) < entropy+.12

def learner(folder, cbs=()):
    "A run that learns 40 maps by heart, and should be stopped before its end."
    settings = dict(steps=240, batch_size=20, lr=1e-2, warmup=0, ema=.9, weight_decay=0., schedule='constant',
                    save_every=15, folder=folder, progress=False, seed=0)
    stop = HeldOutCB(Codes(60,1), every=10, patience=30, measure=held_out_bits)
    return Learner(prior(), Codes(40,0), pixelsnail_loss(1), cbs=[stop, *cbs], **settings)

def measured(learn): return [(row['held_out_bits'],row['step']) for row in learn.log if 'held_out_bits' in row]

def test_early_stop_keeps_the_best(tmp_path):
    learn = learner(tmp_path).fit()
    best, at = min(measured(learn))
    assert learn.step<240 and learn.step-at==30, measured(learn)
    close(bits_per_code(learn.ema_model, Codes(60,1)), best, eps=1e-6)
    assert bits_per_code(learn.model, Codes(60,1))!=best                 # the weights in training are where they were
    again = learner(tmp_path).fit(resume=True)                           # it had ended
    eq(again.step, learn.step)
    for k,v in learn.ema_model.state_dict().items(): eq(again.ema_model.state_dict()[k], v)

class Kill(Callback):
    "An interruption at a step."
    def __init__(self, at): self.at = at
    def after_step(self, learn):
        if learn.step==self.at: raise KeyboardInterrupt

@pytest.mark.parametrize('after', [-4,4,14])
def test_early_stop_goes_on_after_a_kill(tmp_path, after):
    "Killed before and after its best step, resumed from a checkpoint of another step: the same best weights."
    whole = learner(tmp_path/'a').fit()
    at = min(measured(whole))[1]
    with pytest.raises(KeyboardInterrupt): learner(tmp_path/'b', [Kill(at+after)]).fit()
    again = learner(tmp_path/'b').fit(resume=True)
    eq(again.step, whole.step)
    for k,v in whole.ema_model.state_dict().items(): eq(again.ema_model.state_dict()[k], v)
