"Codes in LMDB: killed, full disk, cut short, of others, larger than memory, many readers; and how fast beside one-hot, pickle and one transaction."
import errno, json, multiprocessing, os, pickle, random, shutil, signal, struct, subprocess, sys, time
from pathlib import Path
from typing import NamedTuple
import numpy as np, pytest, torch
from torch.utils.data import DataLoader
lmdb = pytest.importorskip('lmdb')
from fastcore.test import test_close as close, test_eq as eq
from fastldm.codes.store import *
from fastldm.codes.store import _close, _env, _key, _mark_data, _read, _start
from fastldm.core import load_model, save_model, set_seed
from fastldm.data.images import Digits, Pictures, _collate, dataloader
from fastldm.codes import VQVAE

HERE = Path(__file__).parent
def child(program, *args, wait=True, **kw):
    "A program in a new process, in this folder; gives what it prints."
    p = subprocess.Popen([sys.executable,'-c','from test_codes import *\n'+program,*map(str,args)], cwd=HERE, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ,'OMP_NUM_THREADS':'1','PYTHONPATH':str(HERE.parent)}, **kw)
    if not wait: return p
    out,err = p.communicate(timeout=400)
    assert p.returncode==0, err[-3000:]
    return out

def model(seed=0, **kw):
    set_seed(seed)
    return VQVAE(**{**dict(c_in=1, n_codes=300, channels=(8,8), d_code=4), **kw}).eval()

class Lazy:
    "Pictures that are drawn when they are asked for, with captions and names; nothing is kept."
    split,classes = 'train',[]
    def __init__(self, n=1000, size=16, wait=0.): self.n,self.size,self.wait = n,size,wait
    def __len__(self): return self.n
    def __getitems__(self, idxs):
        time.sleep(self.wait)
        g = torch.Generator().manual_seed(0)
        base = torch.rand(1,self.size,self.size, generator=g)*2-1
        return dict(image=torch.stack([base.roll((i%17,i//17%13),(1,2))*((i%7)/7+.1) for i in idxs]), caption=[f'picture {i} – naïve {"x"*(i%5)}' for i in idxs], name=[f'{i:06}.png' for i in idxs])

class Words:
    "A text encoder with a name: rows past the end of a caption are zeros."
    name = 'words'
    def __init__(self, rows=9, d=6, fingerprint='abc'): self.rows,self.d,self.fingerprint = rows,d,fingerprint
    def __call__(self, captions):
        t = torch.zeros(len(captions), self.rows, self.d)
        for i,c in enumerate(captions):
            n = min(1+len(c)//4, self.rows)
            t[i,:n] = torch.linspace(-1, 1, n*self.d).view(n,-1)*(len(c)+1)/20
        return t

def write(ds, path, m=None, **kw): return write_codes(ds, m or model(), path, **{**dict(batch_size=64, progress=False), **kw})
def records(path, n): return _read(Path(path).resolve(), map(_key, range(n+1)))         # and one more, which must not be there

# ---- there and back

@pytest.mark.parametrize('kw', [dict(), dict(n_codes=256), dict(n_codes=200, levels=1), dict(levels=3), dict(n_codes=70_000, d_code=2)])
def test_equals_encoding_on_the_fly(kw, tmp_path):
    m,ds = model(**kw),Lazy(150, size=16)
    cs = CodeDataset(write(ds, tmp_path/'c', m, batch_size=64), m)
    x = ds.__getitems__(range(150))
    now = [torch.cat(o) for o in zip(*(m.encode_codes(p) for p in x['image'].split(64)))]
    got = cs[:]
    eq(len(got['codes']), m.levels); eq(cs.shapes, m.code_shapes(16)); eq(cs.header['dtype'], {256:'<u1',200:'<u1',300:'<u2',70_000:'<u4'}[m.n_codes])
    for a,b in zip(got['codes'], now): eq(a, b); eq(a.dtype, torch.int64)
    eq((got['caption'],got['name']), (x['caption'],x['name'])); assert 'text' not in got and 'label' not in got
    eq(m.decode_codes(got['codes'][:]), m.decode_codes(now))

def test_text_features_and_labels(tmp_path):
    class Told(Digits):
        def __getitems__(self, idxs): b = super().__getitems__(idxs); return dict(b, caption=[f'{"a"*int(l)}' for l in b['label']])
    ds,m,f = Told(split='test'),model(),Words()
    cs = CodeDataset(write(ds, tmp_path/'c', m, text_features=f))
    order = torch.randperm(len(ds)).tolist()
    b,x = cs.__getitems__(order),ds.__getitems__(order)
    close(b['text'], f(x['caption']), eps=1e-3); eq(b['text'].dtype, torch.float32); eq(b['label'], x['label']); eq(cs.classes, ds.classes)
    one = cs[order[3]]
    eq(one['codes'][1], b['codes'][1][3]); eq(one['text'], b['text'][3]); eq(one['label'], b['label'][3]); eq(cs.header['text'], dict(name='words', fingerprint='abc', shape=[9,6]))
    full = sum(4+2+2*80+2*9*6 for _ in ds)
    assert (b['text'].abs().sum(2)==0).any() and sum(len(r) for r in records(tmp_path/'c', len(ds))[:-1])<full+30*len(ds)   # rows of zeros take no room

def test_half_precision(tmp_path):
    "Codes in bfloat16 are those of the encoder under autocast, and are not mixed with those in float32."
    m,ds = model(),Lazy(100)
    cs = CodeDataset(write(ds, tmp_path/'c', m, precision='bf16'), m)
    with torch.autocast('cpu', torch.bfloat16): now = m.encode_codes(ds.__getitems__(range(64))['image'])
    for a,b in zip(cs[:64]['codes'], now): eq(a, b)
    with pytest.raises(ValueError, match='precision was bf16, is None'): write(ds, tmp_path/'c', m)
    with pytest.raises(ValueError, match="expected None or 'bf16'"): write(ds, tmp_path/'d', m, precision='fp8')

def test_names_of_files(tmp_path):
    from PIL import Image
    for i in range(3): (tmp_path/'p').mkdir(exist_ok=True); Image.new('L', (16,16), 60*i).save(tmp_path/'p'/f'picture {i}.png')
    from fastldm.data import ImageFolder
    cs = CodeDataset(write(ImageFolder(tmp_path/'p', size=16, channels=1), tmp_path/'c'))
    eq(cs[:]['name'], [f'picture {i}.png' for i in range(3)])

def test_training_on_codes(tmp_path):
    "The Learner takes it, with its list of levels."
    from torch import nn
    from fastldm.core import Learner
    cs = CodeDataset(write(Lazy(100), tmp_path/'c', text_features=Words()))
    net = nn.Embedding(300, 4)
    def loss(m, b): eq((len(b['codes']),b['text'].shape), (2,(16,9,6))); return dict(loss=m(b['codes'][1]).square().mean())
    Learner(net, cs, loss, steps=3, batch_size=16, progress=False).fit()

@pytest.mark.slow
@pytest.mark.parametrize('how', ['fork','spawn'])
def test_any_number_of_workers(how, tmp_path):
    "Opened by the parent first; the workers open it again, each for itself."
    ds = Lazy(200)
    cs = CodeDataset(write(ds, tmp_path/'c'))
    all_of = cs[:]
    for _ in range(1+(how=='fork')):
        got = [*DataLoader(cs, 32, num_workers=2, collate_fn=_collate, multiprocessing_context=how)]
        for l in range(2): eq(torch.cat([b['codes'][l] for b in got]), all_of['codes'][l])
        eq(sum((b['name'] for b in got), []), all_of['name'])
        eq(cs[7]['name'], all_of['name'][7])                                             # the parent's own is as it was
    eq(torch.cat([b['codes'][1] for b in dataloader(cs, 64)]), all_of['codes'][1])

def test_written_by_workers(tmp_path):
    "Processes that read pictures do not change what is written, nor its order; also from the middle on."
    ds,m = Lazy(200),model()
    want = records(write(ds, tmp_path/'a', m, text_features=Words()), 200)
    eq(records(write(ds, tmp_path/'b', m, text_features=Words(), workers=2), 200), want)
    import fastldm.codes.store as codes
    folder = (tmp_path/'c').resolve(); head = dict(codes._header(ds, m, Words()), precision=None)
    env,_ = codes._start(folder, head); codes._put(folder, env, 0, codes._records(ds.__getitems__(range(64)), m, Words(), head)); _close(str(folder))
    eq(len(CodeDataset(folder, unfinished=True)), 64)
    eq(records(write(ds, folder, m, text_features=Words(), workers=1), 200), want)

def test_twice_in_a_process_and_made_anew(tmp_path, monkeypatch):
    a = CodeDataset(write(Lazy(50), tmp_path/'c')); b = CodeDataset(tmp_path/'c')
    eq(a[3]['name'], b[3]['name'])
    shutil.rmtree(tmp_path/'c')
    write(Lazy(60), tmp_path/'c', model(1))
    c = CodeDataset(tmp_path/'c', model(1))
    eq(c[:]['codes'][1], model(1).encode_codes(Lazy().__getitems__(range(60))['image'])[1])
    monkeypatch.chdir('/'); eq(c[3]['name'], '000003.png')

# ---- stopped

KILL = """
path,seed,full,took = sys.argv[1],int(sys.argv[2]),sys.argv[3],float(sys.argv[4])
rng,kills,at = random.Random(seed),0,[]
while True:
    if not (pid := os.fork()):
        try: write(Lazy(2000), path, text_features=Words(), batch_size=32)
        finally: os._exit(sys.exc_info()[0] is not None)
    time.sleep(rng.uniform(0, took/4*(1+kills/4))); os.kill(pid, signal.SIGKILL)          # later each time, so that it ends
    status = os.waitpid(pid, 0)[1]
    if Path(path,'data.mdb').exists():
        try: at.append(len(CodeDataset(path, unfinished=True)))
        except ValueError as e: assert 'is empty' in str(e) or not Path(path,'data.mdb').stat().st_size, e    # killed before the header
    if os.WIFEXITED(status): assert os.WEXITSTATUS(status)==0; break
    kills += 1
assert at==sorted(at)
a,b = records(path, 2000),records(full, 2000)
assert a==b and a[-1] is None and all(a[:-1])
same = Path(path,'data.mdb').read_bytes()==Path(full,'data.mdb').read_bytes()
print(kills, len(set(at)), same)
"""
@pytest.mark.slow
@pytest.mark.parametrize('seed', [0,1])
def test_killed_at_random_moments(seed, tmp_path):
    "Again and again, until it is through: the very records of a run that was left alone, none lost and none twice."
    start = time.perf_counter()
    write(Lazy(2000), tmp_path/'whole', text_features=Words(), batch_size=32)
    took = time.perf_counter()-start
    for i in range(6):                                                                   # sooner, while the machine is quicker than it was just now
        kills,places,same = child(KILL, tmp_path/f'parts{i}', seed, tmp_path/'whole', took/2**i).split()
        if int(kills)>=3 and int(places)>=3: break
    else: pytest.fail('each time it was through too soon')
    print(f'killed {kills} times, at {places} places; equal file: {same}')

def test_broken_off_and_gone_on(tmp_path):
    class Breaks(Lazy):
        at = 10**9
        def __getitems__(self, idxs):
            if idxs[-1]>=self.at: raise OSError('gone')
            return super().__getitems__(idxs)
    ds = Breaks(500)
    write(ds, tmp_path/'whole')
    mark,Breaks.at = _mark_data(ds),300
    import fastldm.codes.store as codes
    with pytest.MonkeyPatch.context() as mp:
        mp.setattr(codes, '_mark_data', lambda ds: mark)
        with pytest.raises(OSError, match='gone'): write(ds, tmp_path/'parts')
    with pytest.raises(ValueError, match='has 256 of 500 pictures: call `write_codes` again'): CodeDataset(tmp_path/'parts')
    eq(len(CodeDataset(tmp_path/'parts', unfinished=True)), 256)
    Breaks.at = 10**9
    write(ds, tmp_path/'parts')
    eq(records(tmp_path/'parts', 500), records(tmp_path/'whole', 500)); eq(len(CodeDataset(tmp_path/'parts')), 500)

FULL = """
import resource
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (400_000,400_000))                            # the write itself fails, as on a full disk
try: write(Lazy(2000), sys.argv[1], text_features=Words())
except OSError as e: print('stopped:', e.errno, e)
"""
def test_full_disk(tmp_path):
    said = child(FULL, tmp_path/'c')
    assert 'stopped:' in said and 'pictures are safe; make room and call `write_codes` again' in said, said
    n = len(CodeDataset(tmp_path/'c', unfinished=True))
    assert 0<n<2000 and n%64==0
    write(Lazy(2000), tmp_path/'c', text_features=Words())
    eq(records(tmp_path/'c', 2000), records(write(Lazy(2000), tmp_path/'whole', text_features=Words()), 2000))

def test_the_map_grows(tmp_path):
    "More than LMDB's first map holds; a data set that was opened before sees what came after."
    ds,f = Lazy(700),Words(40, 512)
    cs = CodeDataset(write(ds, tmp_path/'c', text_features=f))
    size = (tmp_path/'c'/'data.mdb').stat().st_size
    assert size>2**21
    big = Words(300, 512)
    big.__class__ = type('Long', (Words,), dict(__call__=lambda self, c: torch.full((len(c),self.rows,self.d), .5)))
    cs = CodeDataset(write(Lazy(100), tmp_path/'d', text_features=big))
    assert (tmp_path/'d'/'data.mdb').stat().st_size>2**24
    close(cs[99]['text'], torch.full((300,512), .5))

TWO = """
path,n = sys.argv[1],1500
want = [torch.cat(o) for o in zip(*(model().encode_codes(Lazy().__getitems__(range(i,min(i+64,n)))['image']) for i in range(0,n,64)))]
def text(c): return torch.full((len(c),40,256), .25)
def reader(seed):
    rng,seen,sizes = random.Random(seed),0,set()
    while seen<n:
        try: cs = CodeDataset(path, unfinished=True)
        except (FileNotFoundError,ValueError) as e: assert 'no codes' in str(e) or 'is empty' in str(e) or 'damaged' in str(e) and not sizes, e; time.sleep(.01); continue
        assert len(cs)>=seen; seen = len(cs); sizes.add(seen)
        if not seen: continue
        for _ in range(3):
            i = [rng.randrange(seen) for _ in range(20)]
            b = cs.__getitems__(i)
            assert all(torch.equal(c, w[i]) for c,w in zip(b['codes'], want)) and (b['text']==.25).all()
    return len(sizes)
kids = []
for seed in range(2):
    if not (pid := os.fork()):
        try: k = reader(seed); os._exit(0 if k>3 else 3)
        except BaseException as e: print(seed, repr(e), flush=True); os._exit(1)
    kids.append(pid)
write(Lazy(n, wait=.02), path, text_features=text)
for pid in kids: assert os.waitpid(pid, 0)[1]==0
assert Path(path,'data.mdb').stat().st_size>2**24                                        # the map grew under their eyes
"""
@pytest.mark.slow
def test_two_readers_beside_one_writer(tmp_path): child(TWO, tmp_path/'c')

def test_two_writers(tmp_path):
    "The second is told, and the first goes on."
    import fastldm.codes.store as codes
    ds,m = Lazy(300),model()
    head = dict(codes._header(ds, m, None), precision=None)
    folder = (tmp_path/'c').resolve()
    env,done = codes._start(folder, head)
    p = child("write(Lazy(300), sys.argv[1])", folder, wait=False); p.communicate(timeout=200); eq(p.returncode, 0)
    b = ds.__getitems__(range(64))
    with pytest.raises(RuntimeError, match='another process writes'): codes._put(folder, env, done, codes._records(b, m, None, head))
    _close(str(folder)); eq(len(CodeDataset(folder)), 300)

# ---- what is not right

def test_of_something_else(tmp_path):
    f = Words(); write(Lazy(100), tmp_path/'c', text_features=f)
    for ds,m,t,says in ((Lazy(100),model(1),f,'model was'), (Lazy(101),model(),f,'n was 100, is 101'), (Lazy(100,size=24),model(),f,'shapes was'), (Lazy(100),model(),None,'text was'),
                        (Lazy(100),model(),Words(fingerprint='other'),'other'), (Lazy(100),model(),Words(rows=10),'10, 6'), (Lazy(100),model(n_codes=301),f,'n_codes was 300')):
        with pytest.raises(ValueError, match='holds codes of something else') as e: write(ds, tmp_path/'c', m, text_features=t)
        assert says in str(e.value)
    class Other(Lazy):
        def __getitems__(self, i): b = super().__getitems__(i); return dict(b, image=b['image'].flip(-1))
    Other.__name__ = 'Lazy'
    with pytest.raises(ValueError, match='data was'): write(Other(100), tmp_path/'c', text_features=f)
    for m in (model(1), model(n_codes=301)):
        with pytest.raises(ValueError, match='codes of another model'): CodeDataset(tmp_path/'c', m)
    CodeDataset(tmp_path/'c', model())

def test_the_scale_of_a_latent_is_not_the_model(tmp_path):
    "`fit_scale`, saving in half precision and loading leave the codes as they are, and they are not refused."
    m = model(); write(Lazy(100), tmp_path/'c', m)
    m.fit_scale(Lazy(100)); CodeDataset(tmp_path/'c', m)
    CodeDataset(tmp_path/'c', load_model(save_model(m, tmp_path/'m'), 'cpu'))

def test_bad_before_work(tmp_path):
    class NoImage(Lazy):
        def __getitems__(self, i): return dict(caption=super().__getitems__(i)['caption'])
    class Nan:
        name = 'nan'
        def __call__(self, c): return torch.full((len(c),2,3), 1e6)
    for ds,kw,says in ((Lazy(0),{},'empty'), (NoImage(9),{},'made of `image`'), (Lazy(9,size=20),{},'multiples of 8'), (Pictures(torch.zeros(9,3,16,16).byte()),{},'grey or colour'),
                       (Pictures(torch.zeros(9,1,16,16).byte()),dict(text_features=Words()),'no `caption`'), (Lazy(9),dict(text_features=lambda c: torch.zeros(len(c),3)),'1\\+L,d'), (Lazy(9),dict(text_features=Nan()),'not finite')):
        with pytest.raises(ValueError, match=says): write(ds, tmp_path/'c', **kw)
        assert not (tmp_path/'c').exists()
    with pytest.raises(ValueError, match='expected \\(64,9,6\\)'):
        class Grows(Words):
            def __call__(self, c): return torch.zeros(len(c), 9 if len(c)==1 else 10, 6)
        write(Lazy(100), tmp_path/'g', text_features=Grows())

def test_index_out_of_range(tmp_path):
    cs = CodeDataset(write(Lazy(30), tmp_path/'c'))
    for i in (30,-31,10**9):
        with pytest.raises(IndexError, match='of 30'): cs[i]
    eq([len(cs[5:9]['name']),len([*cs])], [4,30])

def test_a_code_out_of_range(tmp_path):
    "A record whose sum is right, with a number that is no code."
    import zlib
    write(Lazy(30), tmp_path/'c')
    env = _env((tmp_path/'c').resolve(), write=True)
    with env.begin(write=True) as t:
        r = bytearray(t.get(_key(4))[4:]); r[:2] = struct.pack('<H', 300)
        t.put(_key(4), struct.pack('<I', zlib.crc32(r))+bytes(r))
    _close(str((tmp_path/'c').resolve()))
    cs = CodeDataset(tmp_path/'c'); cs[3]
    with pytest.raises(ValueError, match='code 300 among records .* 300 codes'): cs[4]

class CodeRow(NamedTuple): top:np.ndarray; bottom:np.ndarray; filename:str
def test_pickled_codes_of_others(tmp_path):
    with lmdb.open(str(tmp_path/'p')) as env, env.begin(write=True) as t:
        for i in range(3): t.put(str(i).encode(), pickle.dumps(CodeRow(np.zeros((8,8),int), np.zeros((16,16),int), f'{i}.png')))
        t.put(b'length', b'3')
    for f in (CodeDataset, lambda p: write(Lazy(9), p)):
        with pytest.raises(ValueError, match='pickled codes .*from_rosinality'): f(tmp_path/'p')
        _close(str(tmp_path/'p'))
    with lmdb.open(str(tmp_path/'q')) as env, env.begin(write=True) as t: t.put(b'a', b'b')
    with pytest.raises(ValueError, match='something else'): CodeDataset(tmp_path/'q')
    _close(str(tmp_path/'q'))
    with pytest.raises(ValueError, match='something else'): write(Lazy(9), tmp_path/'q')
    with lmdb.open(str(tmp_path/'q')) as env, env.begin() as t: eq(t.get(b'a'), b'b')    # and not touched

def test_a_newer_format(tmp_path):
    write(Lazy(9), tmp_path/'c')
    env = _env((tmp_path/'c').resolve(), write=True)
    with env.begin(write=True) as t: h = json.loads(t.get(b'\0header')); t.put(b'\0header', json.dumps(dict(h, format=2)).encode())
    _close(str((tmp_path/'c').resolve()))
    with pytest.raises(ValueError, match='has format 2, this version of fastldm reads 1'): CodeDataset(tmp_path/'c')

def test_nothing_there(tmp_path):
    with pytest.raises(FileNotFoundError, match='has no codes'): CodeDataset(tmp_path/'none')
    assert not (tmp_path/'none').exists()
    (tmp_path/'c').mkdir()
    for raw in (b'', b'hello', bytes(8192), random.Random(0).randbytes(20_000)):
        (tmp_path/'c'/'data.mdb').write_bytes(raw)
        with pytest.raises(ValueError, match='is damaged'): CodeDataset(tmp_path/'c')

@pytest.mark.parametrize('keep', [.01,.1,.5,.9,.999])
def test_cut_short(keep, tmp_path):
    "Told when it is opened; without that, reading it would end the process."
    write(Lazy(500), tmp_path/'c')
    f = tmp_path/'c'/'data.mdb'; n = f.stat().st_size
    os.truncate(f, int(n*keep))
    for g in (CodeDataset, lambda p: write(Lazy(500), p)):
        with pytest.raises(ValueError, match='was cut short|is damaged'): g(tmp_path/'c')

def test_every_changed_byte_is_noticed(tmp_path):
    "In the records: each is refused, or as it was."
    write(Lazy(60), tmp_path/'c')
    f = tmp_path/'c'/'data.mdb'
    raw,whole,rng = f.read_bytes(),CodeDataset(tmp_path/'c')[:],random.Random(0)
    rows = records(tmp_path/'c', 60)[:-1]; good,places = 0,[raw.find(r) for r in rows]
    for _ in range(100):
        i = rng.randrange(60); spoiled = bytearray(raw); spoiled[places[i]+rng.randrange(len(rows[i]))] ^= 1<<rng.randrange(8)
        shutil.rmtree(tmp_path/'c'); (tmp_path/'c').mkdir(); f.write_bytes(spoiled)
        try: good += CodeDataset(tmp_path/'c')[i]['name']==whole['name'][i]
        except ValueError as e: assert f'record {i} of' in str(e) and 'damaged' in str(e)
    eq(good, 0)

# ---- size and speed

FLAT = """
def anon(): return next(int(l.split()[1])/1024 for l in open('/proc/self/status') if l.startswith('RssAnon'))
n,peaks = int(sys.argv[2]),[]
class Watched(Lazy):
    def __getitems__(self, i): peaks.append(anon()); return super().__getitems__(i)
write(Watched(n), sys.argv[1], text_features=Words(), batch_size=128)
q = len(peaks)//4
print(max(peaks[:q]), max(peaks[-q:]), Path(sys.argv[1],'data.mdb').stat().st_size/2**20)
"""
@pytest.mark.slow
@pytest.mark.skipif(not Path('/proc/self/status').exists(), reason='needs /proc')
def test_memory_is_flat(tmp_path):
    "The last quarter of 6,000 pictures needs no more than the first."
    first,last,size = map(float, child(FLAT, tmp_path/'c', 6000).split())
    print(f'private memory {first:.0f} MiB, later {last:.0f}, file {size:.1f}')
    assert last-first<8

def their_way(image, encode, path, names):
    "As extract_code.py of rosinality/vq-vae-2-pytorch works, in our words: a pickle a picture, keys in words, one transaction; `encode` gives both levels."
    with lmdb.open(str(path), map_size=2**34) as env, env.begin(write=True) as t:
        i = 0
        for x in image.split(128):
            top,bottom = (c.numpy() for c in encode(x))
            for a,b in zip(top, bottom): t.put(str(i).encode(), pickle.dumps(CodeRow(a, b, names[i]))); i += 1
        t.put(b'length', str(i).encode())

def with_one_hot(m):
    "The two levels of a model, with distances and a one-hot matrix over all vectors of the batch, which it makes in use as in training."
    def quantize(vq, z):
        v,e = z.movedim(1,-1).reshape(-1, vq.d_code),vq.codebook.T
        i = (-(v.pow(2).sum(1,keepdim=True)-2*v@e+e.pow(2).sum(0,keepdim=True))).max(1)[1]
        torch.nn.functional.one_hot(i, vq.n_codes).type(v.dtype)
        i = i.view(len(z),*z.shape[2:])
        return vq.embed(i),z.new_zeros(()),i
    from unittest.mock import patch
    @torch.no_grad()
    def encode(x):
        with patch.object(type(m.quantizers[0]), 'forward', quantize): return m.quantize(x)[2]
    return encode

@pytest.mark.slow
@pytest.mark.bench
def test_extraction_speed(tmp_path):
    "Pictures a second, ours and the known code's way: the same small network for both, and the known one (narrow, 128 channels) for theirs."
    n = torch.get_num_threads(); torch.set_num_threads(2)
    image = torch.randint(256, (512,3,64,64), dtype=torch.uint8)
    ds,x = Pictures(image),image.float()/127.5-1
    set_seed(0)
    ours,known = VQVAE().eval(),VQVAE(channels=(128,), n_blocks=2, d_code=64, narrow=32).eval()
    def rate(f):
        best = 0
        for k in range(2): t = time.perf_counter(); f(k); best = max(best, 512/(time.perf_counter()-t))
        return best
    names = [f'{i}.png' for i in range(512)]
    res = dict(ours=rate(lambda k: write_codes(ds, ours, tmp_path/f'a{k}', precision='bf16', progress=False)), exact=rate(lambda k: write_codes(ds, ours, tmp_path/f'e{k}', progress=False)), same=rate(lambda k: their_way(x, with_one_hot(ours), tmp_path/f'b{k}', names)),
        known=rate(lambda k: their_way(x, with_one_hot(known), tmp_path/f'c{k}', names)), known_ours=rate(lambda k: write_codes(ds, known, tmp_path/f'd{k}', progress=False)))
    size = lambda f: (tmp_path/f/'data.mdb').stat().st_size/512
    print(f"\npictures a second: ours {res['ours']:.0f} in bf16, {res['exact']:.0f} in float32; one-hot, pickle, one transaction {res['same']:.0f} with the same network, {res['known']:.0f} with the known one (which ours writes at {res['known_ours']:.0f}); bytes a picture {size('a0'):.0f} and {size('b0'):.0f}")
    torch.set_num_threads(n)
    assert res['ours']>0 and size('a0')<.3*size('b0')
