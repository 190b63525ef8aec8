"Images as codes: the traps of the usual code, several processes, half precision, and weights of others."
import os, subprocess, sys
from pathlib import Path
import pytest, torch, torch.nn.functional as F
from accelerate import PartialState, debug_launcher
from fastcore.test import test_close as close, test_eq as eq
from fastldm.codes.vqvae import *
from fastldm.core import Callback, Learner, StopTraining, from_config, load_model, save_model, set_seed
from fastldm.data import Digits
from fastldm.diffusion import Cosine, Denoiser, LatentDataset, LatentDiffusion, UNet

HERE = Path(__file__).parent
TINY = dict(c_in=1, n_codes=32, d_code=4, channels=(8,16))

def child(program, *args):
    "What a program prints in a new process, in this folder."
    call = [sys.executable, '-c', 'from test_vqvae import *\n'+program, *map(str,args)]
    env = {**os.environ, 'OMP_NUM_THREADS':'1', 'PYTHONPATH':str(HERE.parent)}
    p = subprocess.run(call, cwd=HERE, capture_output=True, text=True, timeout=1200, env=env)
    assert p.returncode==0, p.stderr[-2000:]
    return p.stdout

def quantizer(n=64, d=8, started=True, **kw):
    vq = VectorQuantizer(n, d, **kw).train()
    vq.started.fill_(started)
    return vq

def as_grid(v, h=32): return v.T.reshape(1, v.shape[1], h, -1)      # vectors (n,d) -> (1,d,h,w)
def as_rows(z): return z.movedim(1,-1).reshape(-1, z.shape[1])      # (B,d,h,w) -> vectors (n,d)

# ---- the traps

def far_batches(n=200):
    "Vectors far from random first codes."
    g = torch.Generator().manual_seed(0)
    for _ in range(n): yield as_grid(torch.randn(2048, 8, generator=g)*.3+4)

def test_no_code_flies_off_and_few_stay_unused():
    "With uses from 0, codes far from the data would be divided by almost nothing; here they are revived."
    vq = quantizer(512, started=False)
    for z in far_batches(): codes = vq(z)[2]
    assert vq.codebook.norm(dim=1).max()<16 and len(codes.unique())>.8*512

def test_an_unused_code_does_not_move():
    "Without revival it stays where it is."
    vq = quantizer(512, revive=0)
    before = vq.codebook.clone()
    for z in far_batches(): vq(z)
    unused = vq.count<.2
    assert unused.sum()>300 and vq.codebook.norm(dim=1).max()<16
    never = unused & (vq.count<.9**20)
    assert torch.equal(vq.codebook[never], before[never])

def test_a_dead_code_comes_back():
    vq = quantizer(64, revive=.05)
    z = torch.randn(1024, 8)
    for _ in range(5): vq(as_grid(z))
    vq.codebook[7] = 1e6
    vq.count[7] = .04
    for _ in range(2): vq(as_grid(z))
    assert vq.codebook[7].norm()<8 and vq.count.min()>=.05

def test_far_vectors_are_taken_first():
    "A cluster that no code is near gets one within a step; many equal vectors do not take them all."
    vq = quantizer(8, 2, revive=.5)
    vq.codebook.copy_(torch.randn(8,2)*.01)
    vq.count[:4] = .1
    z = torch.zeros(1024,2)
    z[:20] = torch.tensor([5.,5.])
    vq(as_grid(z))
    assert (vq.codebook-5).norm(dim=1).min()<.01

@pytest.mark.parametrize('decay', [0.,.5,.9,.999])
def test_decay_is_obeyed(decay):
    vq = VQVAE(**TINY, decay=decay, revive=0).quantizers[1].train()
    vq.started.fill_(True)
    before, z = vq.codebook.clone(), torch.randn(2,4,8,8)
    k = vq(z)[2].flatten()
    share = 32/len(k)
    N = decay+(1-decay)*torch.bincount(k, minlength=32)*share
    for j in range(32):
        expected = before[j]
        if (k==j).any(): expected = (decay*before[j]+(1-decay)*share*as_rows(z)[k==j].sum(0))/N[j]
        close(vq.codebook[j], expected, eps=1e-5)
    close(vq.count, N, eps=1e-6)

def test_the_start_is_data():
    vq = quantizer(100, 3, started=False)
    z = torch.randn(4096,3)*2+7
    vq(as_grid(z))
    assert vq.started
    distance = torch.cdist(z, vq.codebook)
    assert len(distance.argmin(1).unique())>=98
    assert distance.amin(1).mean()<.45*torch.cdist(z, z[:1]).mean()

def test_fewer_vectors_than_codes():
    vq = quantizer(100, 3, started=False)
    vq(as_grid(torch.ones(64,3)))
    assert vq.codebook.isfinite().all() and (vq.codebook-1).abs().max()<1e-6

def test_index_add_equals_one_hot():
    vq, v = quantizer(40, 5), torch.randn(3000,5)
    codes = torch.cdist(v, vq.codebook).argmin(1)
    eq(vq.nearest(v), codes)
    uses, sums, _ = vq.statistics(v, codes)
    one_hot = F.one_hot(codes, 40).double()
    eq(uses[:,0].long(), one_hot.sum(0).long())
    close(sums, (one_hot.T@v.double()).float(), eps=1e-4)

MEMORY = """
import resource
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024
vq = quantizer(512, 8)
vq(torch.randn(1,8,64,64))
z = torch.randn(128,8,64,64)
before = peak()
vq(z)
assert peak()-before<200, peak()-before                 # two matrices of 524,288 by 512 numbers are 2,048 MiB
"""
def test_memory_of_many_vectors(): child(MEMORY)

class Bad(Digits):
    "Images that are no numbers."
    def __getitems__(self, idxs):
        b = super().__getitems__(idxs)
        return dict(b, image=b['image']/0)

def test_a_loss_that_is_no_number_reaches_the_learner():
    learn = Learner(VQVAE(**TINY), Bad(), vqvae_loss(), steps=2, batch_size=8, progress=False)
    with pytest.raises(FloatingPointError, match='the loss is nan in step 1'): learn.fit()

# ---- sizes

@pytest.mark.parametrize('kw', [
    dict(n_codes=0), dict(d_code=0), dict(decay=1.), dict(decay=-.1), dict(revive=1.), dict(eps=0.)])
def test_bad_quantizer(kw):
    with pytest.raises(ValueError, match=f'{[*kw][0]}='): VectorQuantizer(**kw)

@pytest.mark.parametrize('kw', [
    dict(levels=0), dict(channels=()), dict(channels=(0,)), dict(n_blocks=-1), dict(factor=3),
    dict(factor=1, channels=(8,)), dict(narrow=4, levels=3), dict(narrow=4, factor=6)])
def test_bad_model(kw):
    with pytest.raises(ValueError, match='expected'): VQVAE(**dict(TINY, **kw))

@pytest.mark.parametrize('kw', [
    dict(levels=1), dict(levels=3), dict(factor=8, channels=(8,16)), dict(factor=2, channels=(8,)),
    dict(n_codes=1000, d_code=3), dict(narrow=4), dict(c_in=3)])
def test_any_size(kw):
    m = VQVAE(**dict(TINY, **kw)).eval()
    for h,w in ((m.factor,m.factor),(2*m.factor,3*m.factor)):
        x = torch.rand(2,m.c_in,h,w)*2-1
        codes = m.encode_codes(x)
        eq([c.shape[1:] for c in codes], m.code_shapes(h,w))
        eq({c.dtype for c in codes}, {torch.int64})
        eq(m.decode_codes(codes).shape, x.shape)
        eq(m.encode(x).shape[1:], m.latent_shape(h,w))
    again = from_config(m.config())
    again.load_state_dict(m.state_dict())
    eq(again.eval().encode_codes(x), codes)

def grids(coarse=0, fine=0, dtype=torch.int32):
    "Codes of two levels."
    return [torch.full((2,2,2), coarse, dtype=dtype), torch.full((2,4,4), fine, dtype=dtype)]

BAD_CODES = {
    '1 levels': grids()[:1],
    'Tensor': torch.zeros(2,2,2),
    'twice as fine': [grids()[0]]*2,
    'float32': [grids()[0], grids(dtype=torch.float32)[1]],
    'level 1 has codes from 32 to 32': grids(fine=32),
    'level 0 has codes from -1': grids(coarse=-1),
}
@pytest.mark.parametrize('message', BAD_CODES)
def test_bad_codes(message):
    with pytest.raises(ValueError, match=message) as e: VQVAE(**TINY).decode_codes(BAD_CODES[message])
    assert 'whole numbers from 0 to 31' in str(e.value)

def test_small_integers_are_codes_too():
    m = VQVAE(**TINY).eval()
    codes = m.encode_codes(torch.rand(2,1,16,16))
    eq(m.decode_codes([c.to(torch.uint8) for c in codes]), m.decode_codes(codes))

# ---- precision, averages, resume, processes

def test_autocast_changes_no_statistics():
    "In bfloat16 the search and the averages are those of float32 for the vectors that came."
    a, b = quantizer(64), quantizer(64)
    b.load_state_dict(a.state_dict())
    z = (torch.randn(4,8,16,16)*3+5).bfloat16()
    for _ in range(3):
        torch.manual_seed(1)
        qa, commitment_a, codes_a = a(z.float())
        torch.manual_seed(1)
        with torch.autocast('cpu', torch.bfloat16): qb, commitment_b, codes_b = b(z)
    eq(codes_a, codes_b)
    eq(a.codebook, b.codebook)
    eq(commitment_a, commitment_b)
    eq((qb.dtype,b.codebook.dtype), (torch.float32,)*2)

def learner(model=None, **kw):
    set_seed(0)
    settings = dict(steps=60, batch_size=32, lr=4e-3, ema=.9, seed=0, log_every=20, progress=False)
    settings.update(kw)
    return Learner(model or VQVAE(**TINY), Digits(), vqvae_loss(), **settings)

@pytest.mark.parametrize('precision', [None,'bf16'])
def test_learner_and_its_average(precision):
    "The averaged model has the codebook that was trained, and decodes as well as the raw one."
    learn = learner(precision=precision, schedule='constant').fit()
    for a,b in zip(learn.ema_model.buffers(), learn.model.buffers()): assert torch.equal(a, b)
    x = Digits(split='test')[:]['image']
    def mse(m): return (m.decode_codes(m.encode_codes(x))-x).square().mean()
    assert learn.ema_model.quantizers[0].started
    assert mse(learn.ema_model)<1.3*mse(learn.model)<.5*x.var()
    assert {'mse','commitment','perplexity_0','perplexity_1'}<=learn.log[-1].keys()
    assert learn.log[-1]['perplexity_1']>4

class StopAt(Callback):
    def __init__(self, step): self.step = step
    def after_step(self, learn):
        if learn.step==self.step: raise StopTraining

def test_stopped_and_resumed(tmp_path):
    through = learner(folder=tmp_path/'a').fit()
    learner(folder=tmp_path/'b', cbs=[StopAt(27)]).fit()
    resumed = learner(folder=tmp_path/'b').fit(resume=True)
    for k,v in through.model.state_dict().items(): assert torch.equal(v, resumed.model.state_dict()[k]), k
    eq(through.log, resumed.log)

def train_half(folder):
    "In each process: its half of a batch; then a run with start from data and revival, other data in each process."
    rank = PartialState(cpu=True).process_index
    set_seed(3)
    half = quantizer(64, revive=0)
    for z in torch.randn(10,4,8,8,8): half(z[2*rank:2*rank+2])
    torch.manual_seed(rank)
    own, batches = quantizer(64, started=False, decay=.9, revive=.2), torch.randn(30,2,8,8,8)
    own.codebook.mul_(rank+1)
    for z in batches: codes = own(z)[2]
    found = dict(half=half.codebook, own=own.codebook, count=own.count, used=len(codes.unique()))
    torch.save(found, Path(folder)/f'rank{rank}.pt')

def train_model(folder):
    learn = learner(steps=10)
    learn.fit()
    torch.save(learn.model.state_dict(), Path(folder)/f'run{learn.acc.process_index}.pt')

def two_processes(folder):
    debug_launcher(train_half, (folder,), num_processes=2)
    debug_launcher(train_model, (folder,), num_processes=2)

@pytest.mark.slow
def test_two_processes(tmp_path):
    "The codebook of two halves is that of the whole batch; start, revival and a whole run agree over processes."
    set_seed(3)
    vq = quantizer(64, revive=0)
    for z in torch.randn(10,4,8,8,8): vq(z)
    child(f'two_processes({str(tmp_path)!r})')
    a, b = (torch.load(tmp_path/f'rank{r}.pt', weights_only=True) for r in range(2))
    close(a['half'], vq.codebook, eps=1e-5)
    for k in ('half','own','count'): eq(a[k], b[k])
    assert a['own'].isfinite().all() and a['own'].abs().max()<10 and min(a['used'],b['used'])>30
    a, b = (torch.load(tmp_path/f'run{r}.pt', weights_only=True) for r in range(2))
    for k in a: assert torch.equal(a[k], b[k]), k

# ---- as a first stage

def test_saved_and_loaded(tmp_path):
    m = learner().fit().ema_model
    m.quantizers[0].count[0] = 30000.                                                    # half precision can hold it
    again = load_model(save_model(m, tmp_path/'m'), 'cpu')
    x = Digits(split='test')[:64]['image']
    for a,b in zip(again.encode_codes(x), m.encode_codes(x)): assert (a==b).float().mean()>.95
    whole = load_model(save_model(m, tmp_path/'w', half=False), 'cpu')
    eq(whole.encode_codes(x), m.encode_codes(x))
    close(whole.decode(whole.encode(x)).detach(), m.decode(m.encode(x)).detach(), eps=1e-6)

@pytest.fixture(scope='module')
def digits_model():
    "A model of a few steps, with its scale."
    m = learner().fit().ema_model
    m.fit_scale(Digits(split='test'))
    return m

def test_latents_for_diffusion(digits_model, tmp_path):
    "LatentDataset takes it unchanged; the gradient goes past the nearest code."
    m, ds = digits_model, Digits(split='test')
    latents = LatentDataset(ds, m, cache=tmp_path, progress=False)
    close(latents.latent[0], m.encode(ds[:]['image']), eps=1e-5)
    eq(latents[3]['label'], ds[3]['label'])
    z = latents.latent[0,:2].clone().requires_grad_()
    m.decode(z).sum().backward()
    assert z.grad.abs().sum()>0

def test_diffusion_decodes_codes(digits_model):
    "LatentDiffusion takes it unchanged; what it decodes are images of codes, the nearest at each level."
    m = digits_model
    set_seed(0)
    ldm = LatentDiffusion(m, Denoiser(UNet(8,(16,16)), Cosine()), m.latent_shape(16))
    images = ldm.sample(2, seed=0, steps=3)
    eq(images.shape, (2,1,16,16))
    eq(images, ldm.sample(2, seed=0, steps=3))
    z = ldm.sample(2, seed=0, steps=3, latents=True)
    raw = z*m.scale+m.shift
    levels = [F.avg_pool2d(raw[:,:4],2), raw[:,4:]]
    codes = []
    for v,vq in zip(levels, m.quantizers):
        nearest = torch.cdist(as_rows(v), vq.codebook).argmin(1)
        codes.append(nearest.view(2, *v.shape[2:]))
    close(ldm.decode(z), m.decode_codes(codes), eps=1e-5)

def test_loss_terms():
    m, x = VQVAE(**TINY).eval(), Digits(split='test')[:8]['image']
    y, commitment, codes = m(x)
    def distance(a, b): return (a-b).abs().mean((1,2,3))
    def to(device): return distance
    distance.to = to
    out = vqvae_loss(.5, distance, 2., sharpness=3.)(m, dict(image=x))
    across = ((y[...,1:]-y[...,:-1])-(x[...,1:]-x[...,:-1])).abs().mean()
    down = ((y[:,:,1:]-y[:,:,:-1])-(x[:,:,1:]-x[:,:,:-1])).abs().mean()
    close(out['loss'], F.mse_loss(y,x)+.5*commitment+2*distance(y,x).mean()+3*(across+down), eps=1e-5)
    close(out['perplexity_1'], perplexity(codes[1], 32))
    close(vqvae_loss(0, pixel='l1')(m, dict(image=x))['loss'], F.l1_loss(y,x), eps=1e-6)
    with pytest.raises(ValueError, match="'mse' or 'l1'"): vqvae_loss(pixel='l2')

class Codes:
    "The codes of some images, as a data set."
    def __init__(self, codes): self.codes = codes
    def __len__(self): return len(self.codes[0])
    def __getitems__(self, i): return dict(codes=[c[i] for c in self.codes])

def test_code_use_of_images_and_of_codes():
    m, ds = VQVAE(**TINY).eval(), Digits(split='test')
    codes = m.encode_codes(ds[:]['image'])
    of_images, of_codes = code_use(m, ds), code_use(m, Codes(codes), batch_size=50)
    for a,b,c in zip(of_images, of_codes, codes):
        eq(a['counts'], b['counts'])
        eq(a['counts'].sum().item(), c.numel())
        close(a['used'], len(c.unique())/32)
        close(a['perplexity'], perplexity(c, 32).item(), eps=1e-3)

# ---- weights of rosinality/vq-vae-2-pytorch

def layout(c_in=3, c=16, blocks=2, narrow=6, d=5, K=40):
    "A state dict of their layout, with random values."
    s = {}
    def conv(name, c_out, c_in, k, transposed=False):
        channels = (c_in,c_out) if transposed else (c_out,c_in)
        s[name+'.weight'] = torch.randn(*channels,k,k)*(2/(c_in*k*k))**.5
        s[name+'.bias'] = torch.randn(c_out)*.1
    def residual(name, first):
        for j in range(first, first+blocks):
            conv(f'{name}.{j}.conv.1', narrow, c, 3)
            conv(f'{name}.{j}.conv.3', c, narrow, 1)
    conv('enc_b.blocks.0', c//2, c_in, 4)
    conv('enc_b.blocks.2', c, c//2, 4)
    conv('enc_b.blocks.4', c, c, 3)
    residual('enc_b.blocks', 5)
    conv('enc_t.blocks.0', c//2, c, 4)
    conv('enc_t.blocks.2', c, c//2, 3)
    residual('enc_t.blocks', 3)
    conv('quantize_conv_t', d, c, 1)
    conv('quantize_conv_b', d, d+c, 1)
    for name in ('quantize_t','quantize_b'):
        s[name+'.embed'] = torch.randn(d,K)*.5
        s[name+'.cluster_size'] = torch.rand(K)*9
        s[name+'.embed_avg'] = torch.randn(d,K)
    conv('dec_t.blocks.0', c, d, 3)
    residual('dec_t.blocks', 1)
    conv(f'dec_t.blocks.{blocks+2}', d, c, 4, True)
    conv('upsample_t', d, d, 4, True)
    conv('dec.blocks.0', c, 2*d, 3)
    residual('dec.blocks', 1)
    conv(f'dec.blocks.{blocks+2}', c//2, c, 4, True)
    conv(f'dec.blocks.{blocks+4}', c_in, c//2, 4, True)
    return s

def theirs(s, x, blocks=2):
    "What such weights mean, in plain operations: codes of both levels, and the image."
    def conv(name, x, stride=1, pad=1): return F.conv2d(x, s[name+'.weight'], s[name+'.bias'], stride, pad)
    def up(name, x): return F.conv_transpose2d(x, s[name+'.weight'], s[name+'.bias'], 2, 1)
    def residual(name, first, x):
        for j in range(first, first+blocks):
            h = conv(f'{name}.{j}.conv.1', x.relu())
            x = x+conv(f'{name}.{j}.conv.3', h.relu(), pad=0)
        return x.relu()
    def codes_of(name, z):
        distance = (as_rows(z)[:,:,None]-s[name+'.embed'][None]).square().sum(1)
        return distance.argmin(1).view(len(z),*z.shape[2:])
    def vectors_of(name, codes): return s[name+'.embed'].T[codes].movedim(-1,1)
    h = conv('enc_b.blocks.0', x, 2).relu()
    h = conv('enc_b.blocks.2', h, 2).relu()
    bottom = residual('enc_b.blocks', 5, conv('enc_b.blocks.4', h))
    h = conv('enc_t.blocks.0', bottom, 2).relu()
    top = residual('enc_t.blocks', 3, conv('enc_t.blocks.2', h))
    top_codes = codes_of('quantize_t', conv('quantize_conv_t', top, pad=0))
    q_top = vectors_of('quantize_t', top_codes)
    decoded = up(f'dec_t.blocks.{blocks+2}', residual('dec_t.blocks', 1, conv('dec_t.blocks.0', q_top)))
    bottom_codes = codes_of('quantize_b', conv('quantize_conv_b', torch.cat([decoded,bottom],1), pad=0))
    both = torch.cat([up('upsample_t', q_top), vectors_of('quantize_b', bottom_codes)],1)
    y = residual('dec.blocks', 1, conv('dec.blocks.0', both))
    y = up(f'dec.blocks.{blocks+2}', y).relu()
    return top_codes, bottom_codes, up(f'dec.blocks.{blocks+4}', y)

@pytest.mark.parametrize('kw', [dict(), dict(c_in=1, blocks=0), dict(c=24, narrow=8, d=7, K=300, blocks=3)])
def test_rosinality_weights(kw, tmp_path):
    "Their codes and images, however the weights come; and again after saving."
    s = layout(**kw)
    m = from_rosinality(s)
    x = torch.rand(2,kw.get('c_in',3),32,48)*2-1
    top, bottom, y = theirs(s, x, kw.get('blocks',2))
    codes = m.encode_codes(x)
    eq(codes[0], top)
    eq(codes[1], bottom)
    assert min(len(c.unique()) for c in codes)>4
    close(m(x)[0].detach(), y, eps=1e-5)
    close(m.decode_codes(codes), y.clamp(-1,1), eps=1e-5)
    close(m.decode(m.encode(x)).detach(), y.clamp(-1,1), eps=1e-5)
    close(m.quantizers[1].count.mean(), 1, eps=1e-5)
    assert m.quantizers[0].started and not m.training
    torch.save({f'module.{k}':v for k,v in s.items()}, tmp_path/'their.pt')              # as DataParallel saves it
    eq(from_rosinality(torch.load(tmp_path/'their.pt', weights_only=True)).encode_codes(x), codes)
    again = load_model(save_model(m, tmp_path/'ours', half=False), 'cpu')
    eq(again.encode_codes(x), codes)

def test_their_dead_codes_come_back():
    "A codebook of theirs with codes that flew off, trained further."
    s = layout(c_in=1)
    for name in ('quantize_t','quantize_b'):
        s[name+'.embed'][:,5:] *= 1e6
        s[name+'.cluster_size'][5:] = 0
    m, x = from_rosinality(s), Digits()[:64]['image']
    assert max(len(c.unique()) for c in m.encode_codes(x))<=5
    learn = learner(m, steps=20)
    learn.fit()
    for vq in learn.model.quantizers: assert vq.codebook.abs().max()<100
    assert min(len(c.unique()) for c in learn.model.encode_codes(x))>10

def damaged(kind):
    "A state dict that is none of theirs."
    s = layout()
    if kind=='empty': return {}
    if kind=='ours': return VQVAE(**TINY).state_dict()
    if kind.startswith('without '): s.pop(kind.removeprefix('without '))
    if kind=='more': s['more'] = torch.ones(1)
    if kind=='number': s['upsample_t'] = 1
    if kind=='shape': s['upsample_t.weight'] = torch.ones(2,2,4,4)
    return s

@pytest.mark.parametrize('kind,message', [
    ('empty', 'not a state dict'),
    ('ours', 'not a state dict'),
    ('without enc_b.blocks.4.weight', 'not a state dict'),
    ('without dec.blocks.0.bias', 'Missing key'),
    ('without quantize_b.embed', '`quantize_b.embed`'),
    ('more', 'Unexpected key'),
    ('number', 'enlarge|upsample_t'),
    ('shape', 'size mismatch')])
def test_not_their_weights(kind, message):
    with pytest.raises(ValueError, match=message): from_rosinality(damaged(kind))

def test_as_saved_before_training():
    "Their first version: uses of 0."
    s = layout()
    s['quantize_t.cluster_size'] = torch.zeros(40)
    assert from_rosinality(s).quantizers[0].count.eq(1).all()
