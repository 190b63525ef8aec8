"Codes of pictures: the traps of the code that everybody starts from, several processes, half precision, and weights of others."
import os, subprocess, sys
from pathlib import Path
import pytest, torch, torch.nn.functional as F
from fastcore.test import test_close as close, test_eq as eq
from fastldm.diffusion import LatentDataset
from fastldm.core import from_config, load_model, save_model, set_seed
from fastldm.data import Digits
from fastldm.core import Callback, Learner, StopTraining
from fastldm.codes.vqvae import *

HERE = Path(__file__).parent
TINY = dict(c_in=1, n_codes=32, d_code=4, channels=(8,16))
def child(program, *args):
    "Run a program in a new process, in this folder; gives what it prints."
    p = subprocess.run([sys.executable,'-c','from test_vqvae import *\n'+program,*map(str,args)], cwd=HERE, capture_output=True, text=True, timeout=300, env={**os.environ,'OMP_NUM_THREADS':'1','PYTHONPATH':str(HERE.parent)})
    assert p.returncode==0, p.stderr[-2000:]
    return p.stdout

def quantizer(n=64, d=8, started=True, **kw):
    vq = VectorQuantizer(n, d, **kw).train()
    vq.started.fill_(started)
    return vq
def rows(v, h=32): return v.T.reshape(1, v.shape[1], h, -1)
def flat(z): return z.movedim(1,-1).reshape(-1, z.shape[1])

# ---- the traps

def test_no_code_flies_off_and_few_stay_unused():
    "Random first codes far from the data: with uses from 0 they would be divided by almost nothing; here they stay, or are revived."
    vq,g = quantizer(512, started=False),torch.Generator().manual_seed(0)
    for _ in range(200): idx = vq(rows(torch.randn(2048, 8, generator=g)*.3+4))[2]
    assert vq.codebook.norm(dim=1).max()<16 and len(idx.unique())>.8*512
    keep = quantizer(512, revive=0)
    was = keep.codebook.clone()
    for _ in range(200): idx = keep(rows(torch.randn(2048, 8, generator=g)*.3+4))[2]
    unused = keep.count<.2
    assert unused.sum()>300 and keep.codebook.norm(dim=1).max()<16
    assert torch.equal(keep.codebook[unused & (keep.count<.9**20)], was[unused & (keep.count<.9**20)])     # never used: not moved at all

def test_a_dead_code_comes_back():
    vq = quantizer(64, revive=.05)
    z = torch.randn(1024, 8)
    for _ in range(5): vq(rows(z))
    vq.codebook[7] = 1e6; vq.count[7] = .04
    vq(rows(z)); vq(rows(z))
    assert vq.codebook[7].norm()<8 and vq.count.min()>=.05

def test_far_vectors_are_taken_first():
    "A cluster that no code is near gets one within a step; many equal vectors do not take them all."
    vq = quantizer(8, 2, revive=.5)
    vq.codebook.copy_(torch.randn(8,2)*.01); vq.count[:4] = .1
    z = torch.zeros(1024,2); z[:20] = torch.tensor([5.,5.])
    vq(rows(z))
    assert (vq.codebook-5).norm(dim=1).min()<.01

@pytest.mark.parametrize('decay', [0.,.5,.9,.999])
def test_decay_is_obeyed(decay):
    vq = VQVAE(**TINY, decay=decay, revive=0).quantizers[1].train(); vq.started.fill_(True)
    was,z = vq.codebook.clone(),torch.randn(2,4,8,8)
    k = vq(z)[2].flatten()
    share = 32/len(k); n = torch.bincount(k, minlength=32)*share
    N = decay+(1-decay)*n
    for j in range(32):
        want = (decay*was[j]+(1-decay)*share*flat(z)[k==j].sum(0))/N[j] if (k==j).any() else was[j]
        close(vq.codebook[j], want, eps=1e-5)
    close(vq.count, N, eps=1e-6)

def test_the_start_is_data():
    vq = quantizer(100, 3, started=False)
    z = torch.randn(4096,3)*2+7
    vq(rows(z)); assert vq.started
    d = torch.cdist(z, vq.codebook)
    assert len(d.argmin(1).unique())>=98 and d.amin(1).mean()<.45*torch.cdist(z, z[:1]).mean()
    same = quantizer(100, 3, started=False)
    same(rows(torch.ones(64,3)))                                                         # fewer kinds of vectors than codes
    assert same.codebook.isfinite().all() and (same.codebook-1).abs().max()<1e-6

def test_index_add_equals_one_hot():
    vq,v = quantizer(40, 5),torch.randn(3000,5)
    i = torch.cdist(v, vq.codebook).argmin(1)
    eq(vq.nearest(v), i)
    n,s,_ = vq.statistics(v, i)
    one = F.one_hot(i, 40).double()
    eq(n[:,0].long(), one.sum(0).long()); close(s, (one.T@v.double()).float(), eps=1e-4)

def test_memory_of_many_vectors(): child(MEMORY)
MEMORY = """
import resource
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024
vq = quantizer(512, 8); vq(torch.randn(1,8,64,64))
z = torch.randn(128,8,64,64); was = peak()
vq(z)
assert peak()-was<200, peak()-was                       # two matrices of 524,288 by 512 numbers are 2,048 MiB
"""

def test_a_loss_that_is_no_number_is_told_by_the_learner():
    "NaN in a batch must reach the Learner's own message."
    class Bad(Digits):
        def __getitems__(self, i): b = super().__getitems__(i); b['image'] = b['image']/0; return b
    with pytest.raises(FloatingPointError, match='the loss is nan in step 1'): Learner(VQVAE(**TINY), Bad(), vqvae_loss(), steps=2, batch_size=8, progress=False).fit()

# ---- sizes

@pytest.mark.parametrize('kw', [dict(n_codes=0), dict(d_code=0), dict(decay=1.), dict(decay=-.1), dict(revive=1.), dict(eps=0.)])
def test_bad_quantizer(kw):
    with pytest.raises(ValueError, match=f'{[*kw][0]}='): VectorQuantizer(**kw)

@pytest.mark.parametrize('kw', [dict(levels=0), dict(channels=()), dict(channels=(0,)), dict(n_blocks=-1), dict(factor=3), dict(factor=1, channels=(8,)), dict(narrow=4, levels=3), dict(narrow=4, factor=6)])
def test_bad_model(kw):
    with pytest.raises(ValueError, match='expected'): VQVAE(**{**TINY,**kw})

@pytest.mark.parametrize('kw', [dict(levels=1), dict(levels=3), dict(factor=8, channels=(8,16)), dict(factor=2, channels=(8,)), dict(n_codes=1000, d_code=3), dict(narrow=4), dict(c_in=3)])
def test_any_size(kw):
    m = VQVAE(**{**TINY,**kw}).eval()
    for h,w in ((m.factor,m.factor),(2*m.factor,3*m.factor)):
        x = torch.rand(2,m.c_in,h,w)*2-1
        codes = m.encode_codes(x)
        eq([c.shape[1:] for c in codes], m.code_shapes(h,w)); eq({c.dtype for c in codes}, {torch.int64})
        eq(m.decode_codes(codes).shape, x.shape); eq(m.encode(x).shape[1:], m.latent_shape(h,w))
    again = from_config(m.config()); again.load_state_dict(m.state_dict())
    eq(again.eval().encode_codes(x), codes)

bad = {'levels':([0],'1 levels'), 'no list':(0,'int'), 'sizes':([0,0],'twice as fine'), 'float':([0,'f'],'float32'), 'above':([0,32],'level 1 has codes from 32 to 32'), 'below':([-1,0],'level 0 has codes from -1')}
@pytest.mark.parametrize('kind', bad)
def test_bad_codes(kind):
    what,says = bad[kind]
    grid = lambda l,v: torch.full((2,2*2**l,2*2**l), 0 if v=='f' else v).to(torch.float32 if v=='f' else torch.int32)
    codes = torch.zeros(2,2,2) if kind=='no list' else [grid(0 if kind=='sizes' else l, v) for l,v in enumerate(what)]
    with pytest.raises(ValueError, match=says if kind!='no list' else 'Tensor') as e: VQVAE(**TINY).decode_codes(codes)
    assert 'whole numbers from 0 to 31' in str(e.value)

def test_small_integers_are_codes_too():
    m = VQVAE(**TINY).eval()
    codes = m.encode_codes(torch.rand(2,1,16,16))
    eq(m.decode_codes([c.to(torch.uint8) for c in codes]), m.decode_codes(codes))

# ---- precision, averages, resume, processes

def test_autocast_changes_no_statistics():
    "In bfloat16 the search and the averages are those of float32 for the vectors that came."
    a,b = quantizer(64),quantizer(64)
    b.load_state_dict(a.state_dict())
    z = (torch.randn(4,8,16,16)*3+5).bfloat16()
    for _ in range(3):
        torch.manual_seed(1); qa,la,ia = a(z.float())
        torch.manual_seed(1)
        with torch.autocast('cpu', torch.bfloat16): qb,lb,ib = b(z)
    eq(ia, ib); eq(a.codebook, b.codebook); eq(la, lb); eq((qb.dtype,b.codebook.dtype), (torch.float32,)*2)

def learner(model=None, **kw):
    set_seed(0)
    return Learner(model or VQVAE(**TINY), Digits(), vqvae_loss(), **{**dict(steps=60, batch_size=32, lr=4e-3, ema=.9, seed=0, log_every=20, progress=False), **kw})

@pytest.mark.parametrize('precision', [None,'bf16'])
def test_learner_and_its_average(precision):
    "The averaged model has the codebook that was trained, and paints as well as the raw one."
    learn = learner(precision=precision, schedule='constant').fit()
    for a,b in zip(learn.ema_model.buffers(), learn.model.buffers()): assert torch.equal(a, b)
    x = Digits(split='test')[:]['image']
    mse = lambda m: (m.decode_codes(m.encode_codes(x))-x).square().mean()
    assert learn.ema_model.quantizers[0].started and mse(learn.ema_model)<1.3*mse(learn.model)<.5*x.var()
    assert {'mse','commitment','perplexity_0','perplexity_1'}<=learn.log[-1].keys() and learn.log[-1]['perplexity_1']>4

def test_stopped_and_gone_on(tmp_path):
    class At(Callback):
        def after_step(self, l):
            if l.step==27: raise StopTraining
    through = learner(folder=tmp_path/'a').fit()
    learner(folder=tmp_path/'b', cbs=[At()]).fit()
    on = learner(folder=tmp_path/'b').fit(resume=True)
    for k,v in through.model.state_dict().items(): assert torch.equal(v, on.model.state_dict()[k]), k
    eq(through.log, on.log)

def ranks(folder):
    "Of each process: its half of a batch; then a run with start from data and revival."
    from accelerate import PartialState
    r = PartialState(cpu=True).process_index
    set_seed(3); vq,z = quantizer(64, revive=0),torch.randn(10,4,8,8,8)
    for o in z: vq(o[2*r:2*r+2])
    torch.manual_seed(r)
    own,z = quantizer(64, started=False, decay=.9, revive=.2),torch.randn(30,2,8,8,8)                   # another start and other data in each process
    own.codebook.mul_(r+1)
    for o in z: idx = own(o)[2]
    torch.save(dict(half=vq.codebook, own=own.codebook, count=own.count, used=len(idx.unique())), Path(folder)/f'rank{r}.pt')
def rank_run(folder):
    learn = learner(steps=10)
    learn.fit()
    torch.save(learn.model.state_dict(), Path(folder)/f'run{learn.acc.process_index}.pt')
def two_processes(folder):
    from accelerate import debug_launcher
    debug_launcher(ranks, (folder,), num_processes=2)
    debug_launcher(rank_run, (folder,), num_processes=2)

@pytest.mark.slow
def test_two_processes(tmp_path):
    "The codebook of two halves is that of the whole batch; start and revival agree over processes; so does a whole run."
    set_seed(3); vq,z = quantizer(64, revive=0),torch.randn(10,4,8,8,8)
    for o in z: vq(o)
    child(f'two_processes({str(tmp_path)!r})')
    a,b = (torch.load(tmp_path/f'rank{r}.pt', weights_only=True) for r in range(2))
    close(a['half'], vq.codebook, eps=1e-5); eq(a['half'], b['half'])
    eq(a['own'], b['own']); eq(a['count'], b['count'])
    assert a['own'].isfinite().all() and a['own'].abs().max()<10 and min(a['used'],b['used'])>30
    a,b = (torch.load(tmp_path/f'run{r}.pt', weights_only=True) for r in range(2))
    for k in a: assert torch.equal(a[k], b[k]), k

# ---- as a first stage

def test_saved_and_loaded(tmp_path):
    m = learner().fit().ema_model
    m.quantizers[0].count[0] = 30000.                                                    # half precision can hold it
    again = load_model(save_model(m, tmp_path/'m'), 'cpu')
    x = Digits(split='test')[:64]['image']
    for a,b in zip(again.encode_codes(x), m.encode_codes(x)): assert (a==b).float().mean()>.95
    whole = load_model(save_model(m, tmp_path/'w', half=False), 'cpu')
    eq(whole.encode_codes(x), m.encode_codes(x)); close(whole.decode(whole.encode(x)).detach(), m.decode(m.encode(x)).detach(), eps=1e-6)

def test_latents_for_diffusion(tmp_path):
    "LatentDiffusion and LatentDataset take it unchanged; what they decode is pictures of codes."
    from fastldm.diffusion import Denoiser
    from fastldm.diffusion import LatentDiffusion
    from fastldm.diffusion import Cosine
    from fastldm.diffusion import UNet
    m,ds = learner().fit().ema_model,Digits(split='test')
    m.fit_scale(ds)
    lds = LatentDataset(ds, m, cache=tmp_path, progress=False)
    close(lds.latent[0], m.encode(ds[:]['image']), eps=1e-5); eq(lds[3]['label'], ds[3]['label'])
    set_seed(0)
    ldm = LatentDiffusion(m, Denoiser(UNet(8,(16,16)), Cosine()), m.latent_shape(16))
    pics = ldm.sample(2, seed=0, steps=3)
    eq(pics.shape, (2,1,16,16)); eq(pics, ldm.sample(2, seed=0, steps=3))
    z = ldm.sample(2, seed=0, steps=3, latents=True)
    qs = [F.avg_pool2d((z*m.scale+m.shift)[:,:4],2),(z*m.scale+m.shift)[:,4:]]
    codes = [torch.cdist(flat(q), vq.codebook).argmin(1).view(2,*q.shape[2:]) for q,vq in zip(qs, m.quantizers)]
    close(ldm.decode(z), m.decode_codes(codes), eps=1e-5)
    z = lds.latent[0,:2].clone().requires_grad_()
    m.decode(z).sum().backward()
    assert z.grad.abs().sum()>0                                                          # the gradient goes past the nearest code

def test_loss_terms():
    m,x = VQVAE(**TINY).eval(),Digits(split='test')[:8]['image']
    y,commit,codes = m(x)
    far = lambda a,b: (a-b).abs().mean((1,2,3))
    far.to = lambda d: far
    out = vqvae_loss(.5, far, 2., sharpness=3.)(m, dict(image=x))
    steps = ((y[...,1:]-y[...,:-1])-(x[...,1:]-x[...,:-1])).abs().mean()+((y[:,:,1:]-y[:,:,:-1])-(x[:,:,1:]-x[:,:,:-1])).abs().mean()
    close(out['loss'], F.mse_loss(y,x)+.5*commit+2*far(y,x).mean()+3*steps, eps=1e-5)
    close(out['perplexity_1'], perplexity(codes[1], 32))
    close(vqvae_loss(0, pixel='l1')(m, dict(image=x))['loss'], F.l1_loss(y,x), eps=1e-6)
    with pytest.raises(ValueError, match="'mse' or 'l1'"): vqvae_loss(pixel='l2')

def test_code_use_of_pictures_and_of_codes():
    m,ds = VQVAE(**TINY).eval(),Digits(split='test')
    class Codes:
        def __init__(self): self.c = m.encode_codes(ds[:]['image'])
        def __len__(self): return len(self.c[0])
        def __getitems__(self, i): return dict(codes=[c[i] for c in self.c])
    a,b = code_use(m, ds),code_use(m, Codes(), batch_size=50)
    for u,v,c in zip(a, b, Codes().c):
        eq(u['counts'], v['counts']); eq(u['counts'].sum().item(), c.numel())
        close(u['used'], len(c.unique())/32); close(u['perplexity'], perplexity(c, 32).item(), eps=1e-3)

# ---- weights of rosinality/vq-vae-2-pytorch

def layout(c_in=3, c=16, blocks=2, narrow=6, d=5, K=40):
    "A state dict of their layout, with random values."
    s = {}
    def conv(name, o, i, k, swap=False): s[name+'.weight'] = torch.randn(*((i,o) if swap else (o,i)),k,k)*(2/(i*k*k))**.5; s[name+'.bias'] = torch.randn(o)*.1
    def res(name, first):
        for j in range(first, first+blocks): conv(f'{name}.{j}.conv.1', narrow, c, 3); conv(f'{name}.{j}.conv.3', c, narrow, 1)
    conv('enc_b.blocks.0', c//2, c_in, 4); conv('enc_b.blocks.2', c, c//2, 4); conv('enc_b.blocks.4', c, c, 3); res('enc_b.blocks', 5)
    conv('enc_t.blocks.0', c//2, c, 4); conv('enc_t.blocks.2', c, c//2, 3); res('enc_t.blocks', 3)
    conv('quantize_conv_t', d, c, 1); conv('quantize_conv_b', d, d+c, 1)
    for n in ('quantize_t','quantize_b'): s[n+'.embed'] = torch.randn(d,K)*.5; s[n+'.cluster_size'] = torch.rand(K)*9; s[n+'.embed_avg'] = torch.randn(d,K)
    conv('dec_t.blocks.0', c, d, 3); res('dec_t.blocks', 1); conv(f'dec_t.blocks.{blocks+2}', d, c, 4, True)
    conv('upsample_t', d, d, 4, True)
    conv('dec.blocks.0', c, 2*d, 3); res('dec.blocks', 1); conv(f'dec.blocks.{blocks+2}', c//2, c, 4, True); conv(f'dec.blocks.{blocks+4}', c_in, c//2, 4, True)
    return s

def theirs(s, x, blocks=2):
    "What such weights mean, in plain operations: codes of both levels, and the picture."
    conv = lambda n,x,stride=1,pad=1: F.conv2d(x, s[n+'.weight'], s[n+'.bias'], stride, pad)
    up = lambda n,x: F.conv_transpose2d(x, s[n+'.weight'], s[n+'.bias'], 2, 1)
    def res(n, first, x):
        for j in range(first, first+blocks): x = x+conv(f'{n}.{j}.conv.3', conv(f'{n}.{j}.conv.1', x.relu()).relu(), pad=0)
        return x.relu()
    def code(n, z):
        d = (flat(z)[:,:,None]-s[n+'.embed'][None]).square().sum(1)
        return d.argmin(1).view(len(z),*z.shape[2:])
    vec = lambda n,i: s[n+'.embed'].T[i].movedim(-1,1)
    b = conv('enc_b.blocks.4', conv('enc_b.blocks.2', conv('enc_b.blocks.0', x, 2).relu(), 2).relu()); b = res('enc_b.blocks', 5, b)
    t = res('enc_t.blocks', 3, conv('enc_t.blocks.2', conv('enc_t.blocks.0', b, 2).relu()))
    it = code('quantize_t', conv('quantize_conv_t', t, pad=0)); qt = vec('quantize_t', it)
    dt = up(f'dec_t.blocks.{blocks+2}', res('dec_t.blocks', 1, conv('dec_t.blocks.0', qt)))
    ib = code('quantize_b', conv('quantize_conv_b', torch.cat([dt,b],1), pad=0)); qb = vec('quantize_b', ib)
    y = res('dec.blocks', 1, conv('dec.blocks.0', torch.cat([up('upsample_t', qt),qb],1)))
    return it,ib,up(f'dec.blocks.{blocks+4}', up(f'dec.blocks.{blocks+2}', y).relu())

@pytest.mark.parametrize('kw', [dict(), dict(c_in=1, blocks=0), dict(c=24, narrow=8, d=7, K=300, blocks=3)])
def test_rosinality_weights(kw, tmp_path):
    s = layout(**kw)
    m = from_rosinality(s)
    x = torch.rand(2,kw.get('c_in',3),32,48)*2-1
    it,ib,y = theirs(s, x, kw.get('blocks',2))
    codes = m.encode_codes(x)
    eq(codes[0], it); eq(codes[1], ib); assert min(len(c.unique()) for c in codes)>4
    close(m(x)[0].detach(), y, eps=1e-5); close(m.decode_codes(codes), y.clamp(-1,1), eps=1e-5); close(m.decode(m.encode(x)).detach(), y.clamp(-1,1), eps=1e-5)
    close(m.quantizers[1].count.mean(), 1, eps=1e-5); assert m.quantizers[0].started and not m.training
    torch.save({f'module.{k}':v for k,v in s.items()}, tmp_path/'their.pt')                          # as DataParallel saves it
    eq(from_rosinality(torch.load(tmp_path/'their.pt', weights_only=True)).encode_codes(x), codes)
    again = load_model(save_model(m, tmp_path/'ours', half=False), 'cpu')
    eq(again.encode_codes(x), codes)

def test_their_dead_codes_come_back():
    "A codebook of theirs with codes that flew off, trained on further."
    s = layout(c_in=1)
    for n in ('quantize_t','quantize_b'): s[n+'.embed'][:,5:] *= 1e6; s[n+'.cluster_size'][5:] = 0
    m = from_rosinality(s)
    assert max(len(c.unique()) for c in m.encode_codes(Digits()[:64]['image']))<=5
    learn = learner(m, steps=20)
    learn.fit()
    for vq in learn.model.quantizers: assert vq.codebook.abs().max()<100
    assert min(len(c.unique()) for c in learn.model.encode_codes(Digits()[:64]['image']))>10

def test_not_their_weights():
    s = layout()
    def without(k): return {n:v for n,v in s.items() if n!=k}
    for bad,says in ((dict(), 'not a state dict'), (without('enc_b.blocks.4.weight'),'not a state dict'), (without('dec.blocks.0.bias'),'Missing key'), (dict(s, more=torch.ones(1)),'Unexpected key'),
                     (without('quantize_b.embed'),'`quantize_b.embed`'), (dict(s, upsample_t=1),'enlarge'), (dict(s, **{'upsample_t.weight':torch.ones(2,2,4,4)}),'size mismatch'), (VQVAE(**TINY).state_dict(),'not a state dict')):
        with pytest.raises(ValueError, match=says): from_rosinality(bad)
    assert from_rosinality(dict(s, **{'quantize_t.cluster_size':torch.zeros(40)})).quantizers[0].count.eq(1).all()      # as saved by its first version, before training
