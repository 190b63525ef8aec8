"Runs that are stopped, killed, spoiled or doubled; and one process against two."
import json, math, os, random, signal, subprocess, sys, time
from functools import partial
from pathlib import Path
import numpy as np, pytest, torch
from torch import nn
from safetensors import safe_open
import fastldm.core.train as train
from fastldm.core import set_seed
from fastldm.core.train import *

HERE = Path(__file__).parent

@pytest.fixture(autouse=True)
def one_thread():
    n = torch.get_num_threads(); torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)

class Points:
    "50 points, with augmentation, item by item."
    def __init__(self, n=50): self.x = torch.linspace(-1,1,n*4).view(n,4)
    def __len__(self): return len(self.x)
    def __getitem__(self, i): return dict(x=self.x[i]+.1*torch.randn(4)+.1*random.random()+.1*np.random.rand(), name=str(i))

class Batched(Points):
    "The same, a batch at once."
    def __getitems__(self, idx): return dict(x=self.x[idx]+.1*torch.randn(len(idx),4), name=[str(i) for i in idx])

def net():
    set_seed(1)
    return nn.Sequential(nn.Linear(4,8), nn.BatchNorm1d(8), nn.Dropout(.3), nn.ReLU(), nn.Linear(8,1))

def loss(model, batch): # dropout, augmentation and noise: all that is random in training
    out = model(batch['x']+.1*torch.randn_like(batch['x']))
    return dict(loss=(out.float()[:,0]-batch['x'].sum(1)).square().mean(), size=out.abs().mean(), n=3.)

def learner(folder=None, data=None, loss_fn=loss, **kw):
    return Learner(net(), Batched() if data is None else data, loss_fn, **{**dict(steps=23, batch_size=8, lr=.01, warmup=5, ema=.9, log_every=5, folder=folder, progress=False, seed=3), **kw})

def state(folder):
    with safe_open(Path(folder)/'checkpoint.safetensors', 'pt') as f:
        meta = json.loads(f.metadata()['state'])
        return {k:f.get_tensor(k) for k in f.keys()},{k:v for k,v in meta.items() if k!='seconds'}

def same(a, b):
    (t,m),(u,n) = state(a),state(b)
    assert t.keys()==u.keys() and m==n
    for k in t: assert torch.equal(t[k], u[k]), k
    assert (Path(a)/'log.csv').read_bytes()==(Path(b)/'log.csv').read_bytes()

class At(Callback):
    def __init__(self, step, do): self.step,self.do = step,do
    def after_step(self, learn):
        if learn.step==self.step: self.do(learn)

def stop(learn): raise StopTraining

# 50 points in batches of 8: an epoch is 6 batches, so step 9 is in the middle of the second one
@pytest.mark.parametrize('kw', [dict(), dict(accumulate=3), dict(ema=None, clip=None), dict(precision='bf16', schedule='constant'), dict(data=Points()),
                                dict(optimizer=partial(torch.optim.SGD, momentum=.9)), dict(optimizer=torch.optim.Adamax)],
                         ids='plain accumulate no_ema bf16 items sgd adamax'.split())
def test_resume_is_bit_equal(tmp_path, kw):
    learner(tmp_path/'a', **kw).fit()
    for s in (9,12,17): # 12: an epoch's end
        l = learner(tmp_path/'b', **kw); l.cbs.insert(1, At(s, stop))
        l.fit(resume=s>9)
        assert l.step==s
    learner(tmp_path/'b', **kw).fit(resume=True)
    same(tmp_path/'a', tmp_path/'b')

def test_resume_with_workers(tmp_path):
    learner(tmp_path/'a', data=Points()).fit() # augmentation does not depend on who loads
    l = learner(tmp_path/'b', data=Points(), workers=2); l.cbs.insert(0, At(7, stop)); l.fit()
    learner(tmp_path/'b', data=Points(), workers=1).fit(resume=True)
    same(tmp_path/'a', tmp_path/'b')

def test_callbacks_do_not_change_the_run(tmp_path):
    learner(tmp_path/'a').fit()
    noisy = SampleCB(4, lambda l: (torch.randn(100), np.random.rand(9), random.random(), l.model(torch.randn(5,4))) and None)
    learner(tmp_path/'b', cbs=[noisy]).fit()
    same(tmp_path/'a', tmp_path/'b')

def test_skipped_data_is_not_loaded(tmp_path):
    class Counts(Points):
        seen = 0
        def __getitem__(self, i): self.seen += 1; return super().__getitem__(i)
    l = learner(tmp_path, data=Counts()); l.cbs.insert(0, At(9, stop)); l.fit()
    d = Counts(); learner(tmp_path, data=d).fit(resume=True)
    assert d.seen==(23-9)*8

def test_finished_run_resumes_to_itself(tmp_path):
    a = learner(tmp_path).fit(); before = (tmp_path/'checkpoint.safetensors').read_bytes()
    b = learner(tmp_path).fit(resume=True)
    assert (tmp_path/'checkpoint.safetensors').read_bytes()==before and b.step==23 and b.log==a.log
    for p,q in zip(a.ema_model.parameters(), b.ema_model.parameters()): assert torch.equal(p,q)
    learner(tmp_path/'c', schedule='constant', steps=10).fit()
    assert learner(tmp_path/'c', schedule='constant').fit(resume=True).step==23 # longer is the same run where the rate does not know the end

def test_failure_in_saving_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    learner(tmp_path/'a', save_every=5).fit()
    real,n = train.save_file,[0]
    def full_disk(tensors, path, meta):
        n[0] += 1
        real(tensors, path, meta)
        if n[0]==3: os.truncate(path, 1000); raise OSError(28, 'No space left on device')
    monkeypatch.setattr(train, 'save_file', full_disk)
    with pytest.raises(OSError, match='No space left'): learner(tmp_path/'b', save_every=5).fit()
    assert state(tmp_path/'b')[1]['step']==10
    assert sorted(p.name for p in (tmp_path/'b').iterdir())==['.lock','checkpoint.safetensors','log.csv']
    learner(tmp_path/'b', save_every=5).fit(resume=True)
    same(tmp_path/'a', tmp_path/'b')

def test_only_safetensors_json_and_csv(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, 'save', None)
    learner(tmp_path, save_every=5).fit()
    assert {p.name for p in tmp_path.iterdir()}=={'.lock','checkpoint.safetensors','log.csv'}

def test_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match='nothing to resume'): learner(tmp_path/'none').fit(resume=True)
    assert not (tmp_path/'none').exists()
    with pytest.raises(ValueError, match='give it a `folder`'): learner().fit(resume=True)
    learner(tmp_path).fit()
    before = (tmp_path/'checkpoint.safetensors').read_bytes()
    with pytest.raises(FileExistsError, match=r'of step 23: go on with fit\(resume=True\), or give another folder'): learner(tmp_path).fit()
    for kw,say in ((dict(batch_size=4), 'batch_size was 8, is 4'), (dict(seed=4), 'seed was 3, is 4'), (dict(data=Points(49)), "data was 'Batched of 50', is 'Points of 49'"),
                   (dict(ema=None), 'ema was 0.9, is None'), (dict(steps=24), 'steps was 23, is 24'), (dict(optimizer=partial(torch.optim.SGD, momentum=.9)), r'is .SGD\(momentum=0.9\)'),
                   (dict(precision='bf16', accumulate=2), "accumulate was 1, is 2; precision was None, is 'bf16'")):
        with pytest.raises(ValueError, match=say): learner(tmp_path, **kw).fit(resume=True)
    l = learner(tmp_path); l.model = nn.Linear(4,1); l.ema_model = nn.Linear(4,1)
    with pytest.raises(ValueError, match='model was .Sequential of 65 parameters.*Linear of 5'): l.fit(resume=True)
    assert (tmp_path/'checkpoint.safetensors').read_bytes()==before

def test_damaged_checkpoint(tmp_path):
    learner(tmp_path).fit()
    p = tmp_path/'checkpoint.safetensors'; good = p.read_bytes(); rng = random.Random(0)
    cases = [good[:n] for n in (0,7,100,len(good)//2,len(good)-1)] + [b'\xff'*8+good[8:], b'\x80\x04pickle']
    for _ in range(60): i = rng.randrange(len(good)); cases.append(good[:i]+bytes([good[i]^(1<<rng.randrange(8))])+good[i+1:])
    for c in cases:
        p.write_bytes(c)
        with pytest.raises(ValueError, match='damaged'): train.read_checkpoint(p)
    with pytest.raises(ValueError, match='delete it and train anew'): learner(tmp_path).fit(resume=True)

def test_bad_arguments(tmp_path):
    for kw in (dict(steps=0), dict(steps=-5), dict(steps=2.5), dict(batch_size=51), dict(batch_size=0), dict(lr=-.1), dict(lr=math.nan), dict(weight_decay=-1), dict(warmup=-1), dict(ema=1.5),
               dict(clip=-1), dict(accumulate=0), dict(schedule='step'), dict(precision='half'), dict(save_every=0), dict(log_every=0), dict(workers=-1), dict(folder=__file__)):
        with pytest.raises(ValueError, match=f'{list(kw)[0]}='): learner(**{'folder':tmp_path/'x', **kw})
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match='needs a GPU'): learner(precision='fp16')
    with pytest.raises(ValueError, match=r'let it return dict\(loss='): learner(loss_fn=lambda m,b: m(b['x']).mean()).fit()
    assert not (tmp_path/'x').exists()

def test_nan_stops(tmp_path):
    def spoilt(model, batch):
        l = loss(model, batch)
        return dict(l, loss=l['loss']*(math.nan if '13' in batch['name'] and spoilt.on else 1))
    order = Batches(Batched(), 8, seed=3); m = next(m for m in range(6,99) if 13 in order.indices(m)) # the second time
    spoilt.on = False
    l = learner(tmp_path, loss_fn=spoilt, save_every=2, cbs=[At(6, lambda l: setattr(spoilt,'on',True))])
    with pytest.raises(FloatingPointError) as e: l.fit()
    assert f'the loss is nan in step {m+1}, whose batch is {order.indices(m)}' in str(e.value) and f'the checkpoint of step {m//2*2} is kept' in str(e.value)
    t,meta = state(tmp_path)
    assert meta['step']==m//2*2 and all(v.isfinite().all() for v in t.values())
    def overflow(learn): learn.params[0].data[0] = math.inf
    with pytest.raises(FloatingPointError, match='weights are no longer finite at step 4'): learner(tmp_path/'b', save_every=4, cbs=[At(4, overflow)]).fit()
    assert not (tmp_path/'b'/'checkpoint.safetensors').exists()

def test_log(tmp_path):
    every = learner(log_every=1).fit().log; l = learner(tmp_path, cbs=[SampleCB(10, lambda l: dict(score=torch.tensor(l.step*2)))]).fit()
    assert [r['step'] for r in l.log]==[5,10,15,20,23] and [r.get('score') for r in l.log]==[None,20,None,40,46]
    for a,b in ((0,5),(20,23)): assert l.log[[0,-1][a>0]]['loss']==pytest.approx(np.mean([r['loss'] for r in every[a:b]]), rel=1e-6)
    lines = (tmp_path/'log.csv').read_text().splitlines()
    assert lines[0]=='step,loss,size,n,grad_norm,lr,score' and len(lines)==6
    assert [float(r.split(',')[1]) for r in lines[1:]]==[r['loss'] for r in l.log]
    with open(tmp_path/'log.csv', 'a') as f: f.write('28,.3,.1,3,') # a run that went on, logged, and was killed before it saved
    learner(tmp_path).fit(resume=True)
    assert (tmp_path/'log.csv').read_text().splitlines()==lines

def test_average():
    raw,seen = [],[]
    l = learner(steps=12, ema=.8, cbs=[At(s, lambda l: (raw.append(l.model[0].weight.detach().clone()), seen.append(l.ema_model[0].weight.clone()))) for s in range(1,13)])
    a = l.model[0].weight.detach().clone(); l.fit()
    for t,(w,e) in enumerate(zip(raw, seen, strict=True)):
        β = min(.8, (1+t)/(10+t)); a = β*a+(1-β)*w
        torch.testing.assert_close(e, a)
    for b,c in zip(l.model.buffers(), l.ema_model.buffers(), strict=True): assert torch.equal(b, c) and b.abs().sum()>0

def test_tensorboard(tmp_path):
    tb = pytest.importorskip('tensorboard.backend.event_processing.event_accumulator')
    l = learner(cbs=[TensorBoardCB(tmp_path)]).fit()
    ev = tb.EventAccumulator(str(tmp_path)).Reload()
    assert [(e.step,e.value) for e in ev.Scalars('loss')]==[(r['step'],pytest.approx(r['loss'])) for r in l.log]

def test_loss_that_calls_methods_and_frozen_parts(tmp_path):
    class Two(nn.Module):
        def __init__(self): super().__init__(); self.a,self.b = nn.Linear(4,4).requires_grad_(False),nn.Linear(4,1)
        def encode(self, x): return self.a(x)
        def decode(self, z): return self.b(z)
    set_seed(0); m = Two(); w = m.a.weight.clone(), m.b.weight.clone()
    l = Learner(m, Batched(), lambda m,b: dict(loss=m.decode(m.encode(b['x'])).square().mean()), steps=5, batch_size=8, ema=.9, folder=tmp_path, progress=False).fit()
    assert torch.equal(m.a.weight, w[0]) and torch.equal(l.ema_model.a.weight, w[0]) and not torch.equal(m.b.weight, w[1])
    assert not l.ema_model.training and not any(p.requires_grad for p in l.ema_model.parameters())

CHILD = "import sys; sys.path.insert(0, {here!r}); import torch; torch.set_num_threads(1); import test_train as t; t.{call}"
def child(call, wait=True):
    p = subprocess.Popen([sys.executable, '-c', CHILD.format(here=str(HERE), call=call)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ,'OMP_NUM_THREADS':'1'})
    if not wait: return p
    out = p.communicate(timeout=240)[0]
    assert p.returncode==0, out
    return out

def endless(folder, workers=0): learner(Path(folder), data=Points(), steps=10**6, schedule='constant', save_every=3, workers=workers).fit(resume=(Path(folder)/'checkpoint.safetensors').exists())

def wait_for(ok, p):
    t = time.time()
    while not ok():
        assert p.poll() is None and time.time()-t<120, p.communicate()[0]
        time.sleep(.02)

@pytest.mark.slow
def test_killed_and_gone_on(tmp_path):
    rng,f = random.Random(0),tmp_path/'b'/'checkpoint.safetensors'
    for workers in (0,1,0):
        p = child(f'endless({str(tmp_path/"b")!r}, {workers})', wait=False); old = f.stat().st_mtime_ns if f.exists() else 0
        wait_for(lambda: f.exists() and f.stat().st_mtime_ns>old, p)
        time.sleep(rng.random()); p.send_signal(signal.SIGKILL); p.communicate() # half of its time is saving
    steps = state(tmp_path/'b')[1]['step']+7
    for d,resume in (('a',False),('b',True)): learner(tmp_path/d, data=Points(), steps=steps, schedule='constant', save_every=10**6).fit(resume)
    same(tmp_path/'a', tmp_path/'b')
    assert not list((tmp_path/'b').glob('.checkpoint-*'))

@pytest.mark.slow
def test_second_run_in_a_folder_is_refused(tmp_path):
    p = child(f'endless({str(tmp_path)!r})', wait=False)
    try:
        wait_for((tmp_path/'checkpoint.safetensors').exists, p)
        with pytest.raises(RuntimeError, match='another process is training'): learner(tmp_path, data=Points(), steps=10**6, schedule='constant').fit(resume=True)
    finally: p.kill(); p.communicate()

def steady(model, batch): return dict(loss=(model(batch['x'])[:,0]-batch['x'].sum(1)).square().mean()) # nothing random
class Exact(Points):
    def __getitem__(self, i): return dict(x=self.x[i])
def steady_run(folder, **kw):
    set_seed(0)
    l = Learner(nn.Sequential(nn.Linear(4,8), nn.Tanh(), nn.Linear(8,1)), Exact(), steady, steps=20, batch_size=8, accumulate=2, lr=.01, warmup=5, ema=.9, log_every=4, folder=folder, progress=False, **kw)
    return l.fit(resume=(Path(folder)/'checkpoint.safetensors').exists())
def rank_run(folder):
    steady_run(Path(folder)/'two')
    steady_run(Path(folder)/'part', cbs=[At(9, stop)]); steady_run(Path(folder)/'part')
def two_processes(folder):
    from accelerate import debug_launcher
    debug_launcher(rank_run, (folder,), num_processes=2)

@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    steady_run(tmp_path/'one')
    child(f'two_processes({str(tmp_path)!r})')
    same(tmp_path/'two', tmp_path/'part') # also stopped and gone on
    (a,m),(b,n) = state(tmp_path/'one'),state(tmp_path/'two')
    assert m['settings']==n['settings']
    for k in a:
        if not k.startswith('recent'): torch.testing.assert_close(a[k], b[k], rtol=1e-4, atol=1e-6)
    for r,s in zip(m['log'], n['log'], strict=True): assert r==pytest.approx(s, rel=1e-5)
