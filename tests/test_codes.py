"Codes in LMDB: killed, full disk, cut short, of others, larger than memory, many readers; and how fast."
import json, os, pickle, random, shutil, struct, subprocess, sys, time, zlib
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch
import numpy as np, pytest, torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader
lmdb = pytest.importorskip('lmdb')
from fastcore.test import test_close as close, test_eq as eq
import fastldm.codes.store as store
from fastldm.codes import VQVAE
from fastldm.codes.store import *
from fastldm.core import Learner, load_model, save_model, set_seed
from fastldm.data import Digits, ImageFolder, Pictures, collate, dataloader

HERE = Path(__file__).parent

def start_child(program, *args):
    "A program in a new process, in this folder."
    call = [sys.executable, '-c', 'from test_codes import *\n'+program, *map(str,args)]
    env = {**os.environ, 'OMP_NUM_THREADS':'1', 'PYTHONPATH':str(HERE.parent)}
    return subprocess.Popen(call, cwd=HERE, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env)

def child(program, *args):
    "What a program prints in a new process."
    p = start_child(program, *args)
    out, err = p.communicate(timeout=1200)
    assert p.returncode==0, err[-3000:]
    return out

def model(seed=0, **kw):
    set_seed(seed)
    sizes = dict(c_in=1, n_codes=300, channels=(8,8), d_code=4)
    sizes.update(kw)
    return VQVAE(**sizes).eval()

class Lazy:
    "Images that are drawn when they are asked for, with captions and names; nothing is kept."
    split, classes = 'train', []
    def __init__(self, n=1000, size=16, wait=0.): self.n, self.size, self.wait = n, size, wait
    def __len__(self): return self.n
    def __getitems__(self, idxs):
        time.sleep(self.wait)
        base = torch.rand(1,self.size,self.size, generator=torch.Generator().manual_seed(0))*2-1
        def image(i): return base.roll((i%17,i//17%13),(1,2))*((i%7)/7+.1)
        captions = [f'picture {i} – naïve {"x"*(i%5)}' for i in idxs]
        return dict(image=torch.stack([image(i) for i in idxs]), caption=captions, name=[f'{i:06}.png' for i in idxs])

class Words:
    "A text encoder with a name: rows past the end of a caption are zeros."
    name = 'words'
    def __init__(self, rows=9, d=6, fingerprint='abc'): self.rows, self.d, self.fingerprint = rows, d, fingerprint
    def __call__(self, captions):
        t = torch.zeros(len(captions), self.rows, self.d)
        for i,c in enumerate(captions):
            n = min(1+len(c)//4, self.rows)
            t[i,:n] = torch.linspace(-1, 1, n*self.d).view(n,-1)*(len(c)+1)/20
        return t

def write(ds, path, m=None, **kw):
    settings = dict(batch_size=64, progress=False)
    settings.update(kw)
    return write_codes(ds, m or model(), path, **settings)

def records(path, n):
    "Of `n` images, and one more, which must not be there."
    return store._read(Path(path).resolve(), map(store._key, range(n+1)))

def begin(folder, ds, m, text_features=None):
    "The environment of a store that was begun, and its header; the caller closes it."
    header = store._header(ds, m, text_features)
    env, _ = store._start(folder, header)
    return env, header

# ---- there and back

@pytest.mark.parametrize('kw', [
    dict(), dict(n_codes=256), dict(n_codes=200, levels=1), dict(levels=3), dict(n_codes=70_000, d_code=2)])
def test_equals_encoding_on_the_fly(kw, tmp_path):
    m, ds = model(**kw), Lazy(150, size=16)
    stored = CodeDataset(write(ds, tmp_path/'c', m, batch_size=64), m)
    x = ds.__getitems__(range(150))
    parts = [m.encode_codes(p) for p in x['image'].split(64)]
    now = [torch.cat(level) for level in zip(*parts)]
    batch = stored[:]
    eq(len(batch['codes']), m.levels)
    eq(stored.shapes, m.code_shapes(16))
    eq(stored.header['dtype'], {256:'<u1',200:'<u1',300:'<u2',70_000:'<u4'}[m.n_codes])
    for a,b in zip(batch['codes'], now):
        eq(a, b)
        eq(a.dtype, torch.int64)
    eq((batch['caption'],batch['name']), (x['caption'],x['name']))
    assert 'text' not in batch and 'label' not in batch
    eq(m.decode_codes(batch['codes']), m.decode_codes(now))

class Lettered(Digits):
    "Digits with captions as long as the digit is large."
    def __getitems__(self, idxs):
        b = super().__getitems__(idxs)
        return dict(b, caption=['a'*int(l) for l in b['label']])

def test_text_features_and_labels(tmp_path):
    ds, m, f = Lettered(split='test'), model(), Words()
    stored = CodeDataset(write(ds, tmp_path/'c', m, text_features=f))
    order = torch.randperm(len(ds)).tolist()
    b, x = stored.__getitems__(order), ds.__getitems__(order)
    close(b['text'], f(x['caption']), eps=1e-3)
    eq(b['text'].dtype, torch.float32)
    eq(b['label'], x['label'])
    eq(stored.classes, ds.classes)
    one = stored[order[3]]
    eq(one['codes'][1], b['codes'][1][3])
    eq(one['text'], b['text'][3])
    eq(one['label'], b['label'][3])
    eq(stored.header['text'], dict(name='words', fingerprint='abc', shape=[9,6]))

def test_rows_of_zeros_take_no_room(tmp_path):
    ds = Lettered(split='test')
    stored = CodeDataset(write(ds, tmp_path/'c', text_features=Words()))
    full = 4+2+2*80+2*9*6
    assert (stored[:]['text'].abs().sum(2)==0).any()
    assert sum(len(r) for r in records(tmp_path/'c', len(ds))[:-1])<(full+30)*len(ds)

def test_half_precision(tmp_path):
    "Codes in bfloat16 are those of the encoder under autocast, and are not mixed with those in float32."
    m, ds = model(), Lazy(100)
    stored = CodeDataset(write(ds, tmp_path/'c', m, precision='bf16'), m)
    with torch.autocast('cpu', torch.bfloat16): now = m.encode_codes(ds.__getitems__(range(64))['image'])
    for a,b in zip(stored[:64]['codes'], now): eq(a, b)
    with pytest.raises(ValueError, match='precision was bf16, is None'): write(ds, tmp_path/'c', m)
    with pytest.raises(ValueError, match="expected None or 'bf16'"): write(ds, tmp_path/'d', m, precision='fp8')

def test_names_of_files(tmp_path):
    (tmp_path/'p').mkdir()
    for i in range(3): Image.new('L', (16,16), 60*i).save(tmp_path/'p'/f'picture {i}.png')
    stored = CodeDataset(write(ImageFolder(tmp_path/'p', size=16, channels=1), tmp_path/'c'))
    eq(stored[:]['name'], [f'picture {i}.png' for i in range(3)])

def test_training_on_codes(tmp_path):
    "The Learner takes it, with its list of levels."
    stored = CodeDataset(write(Lazy(100), tmp_path/'c', text_features=Words()))
    def loss(m, b):
        eq((len(b['codes']),b['text'].shape), (2,(16,9,6)))
        return dict(loss=m(b['codes'][1]).square().mean())
    Learner(nn.Embedding(300, 4), stored, loss, steps=3, batch_size=16, progress=False).fit()

@pytest.mark.slow
@pytest.mark.parametrize('method', ['fork','spawn'])
def test_any_number_of_workers(method, tmp_path):
    "Opened by the parent first; the workers open it again, each for itself."
    ds = Lazy(200)
    stored = CodeDataset(write(ds, tmp_path/'c'))
    whole = stored[:]
    for _ in range(2 if method=='fork' else 1):
        batches = [*DataLoader(stored, 32, num_workers=2, collate_fn=collate, multiprocessing_context=method)]
        for level in range(2): eq(torch.cat([b['codes'][level] for b in batches]), whole['codes'][level])
        eq(sum((b['name'] for b in batches), []), whole['name'])
        eq(stored[7]['name'], whole['name'][7])                                          # the parent's own is as it was
    eq(torch.cat([b['codes'][1] for b in dataloader(stored, 64)]), whole['codes'][1])

def test_written_by_workers(tmp_path):
    "Processes that read images do not change what is written, nor its order; also from the middle on."
    ds, m, f = Lazy(200), model(), Words()
    expected = records(write(ds, tmp_path/'a', m, text_features=f), 200)
    eq(records(write(ds, tmp_path/'b', m, text_features=f, workers=2), 200), expected)
    folder = (tmp_path/'c').resolve()
    env, header = begin(folder, ds, m, f)
    store._append(folder, env, 0, store._records(ds.__getitems__(range(64)), m, f, header))
    store._close(folder)
    eq(len(CodeDataset(folder, unfinished=True)), 64)
    eq(records(write(ds, folder, m, text_features=f, workers=1), 200), expected)

def test_twice_in_a_process_and_made_anew(tmp_path, monkeypatch):
    a = CodeDataset(write(Lazy(50), tmp_path/'c'))
    b = CodeDataset(tmp_path/'c')
    eq(a[3]['name'], b[3]['name'])
    shutil.rmtree(tmp_path/'c')
    write(Lazy(60), tmp_path/'c', model(1))
    c = CodeDataset(tmp_path/'c', model(1))
    eq(c[:]['codes'][1], model(1).encode_codes(Lazy().__getitems__(range(60))['image'])[1])
    monkeypatch.chdir('/')
    eq(c[3]['name'], '000003.png')

# ---- stopped

KILL = """
path, seed, full = sys.argv[1], int(sys.argv[2]), sys.argv[3]
rng, kills, at = random.Random(seed), 0, []
calls = 0
def watch(frame, event, arg):
    "Dies at a call, or a return, of any function, also of LMDB's."
    global calls
    calls += 1
    if calls==last: os.kill(os.getpid(), signal.SIGKILL)
last = None
sys.setprofile(watch)
write(Lazy(2000), path+'.counted', text_features=Words(), batch_size=32)
sys.setprofile(None)
total, calls = calls, 0
while True:
    last = rng.randrange(int(total/4*(1+kills/4)))              # later each time, so that it ends
    if not (pid := os.fork()):
        sys.setprofile(watch)
        try: write(Lazy(2000), path, text_features=Words(), batch_size=32)
        finally: os._exit(sys.exc_info()[0] is not None)
    status = os.waitpid(pid, 0)[1]
    if Path(path,'data.mdb').exists():
        try: at.append(len(CodeDataset(path, unfinished=True)))
        except ValueError as e: assert 'is empty' in str(e) or not Path(path,'data.mdb').stat().st_size, e
    if os.WIFEXITED(status):
        assert os.WEXITSTATUS(status)==0
        break
    kills += 1
assert at==sorted(at)
a, b = records(path, 2000), records(full, 2000)
assert a==b and a[-1] is None and all(a[:-1])
same = Path(path,'data.mdb').read_bytes()==Path(full,'data.mdb').read_bytes()
print(kills, len(set(at)), same)
"""
@pytest.mark.slow
@pytest.mark.parametrize('seed', [0,1])
def test_killed_at_random_moments(seed, tmp_path):
    "Again and again, until it is through: the very records of a run that was left alone, none lost and none twice."
    write(Lazy(2000), tmp_path/'whole', text_features=Words(), batch_size=32)
    kills, places, same = child('import signal\n'+KILL, tmp_path/'parts', seed, tmp_path/'whole').split()
    assert int(kills)>=3 and int(places)>=3
    print(f'killed {kills} times, at {places} places; equal file: {same}')

class Breaks(Lazy):
    "The disk that holds the images is gone from one of them on."
    at = 10**9
    def __getitems__(self, idxs):
        if idxs[-1]>=self.at: raise OSError('gone')
        return super().__getitems__(idxs)

def test_broken_off_and_continued(tmp_path, monkeypatch):
    ds = Breaks(500)
    write(ds, tmp_path/'whole')
    identity = store._data_identity(ds)
    ds.at = 300
    monkeypatch.setattr(store, '_data_identity', lambda ds: identity)
    with pytest.raises(OSError, match='gone'): write(ds, tmp_path/'parts')
    monkeypatch.undo()
    with pytest.raises(ValueError, match='has 256 of 500 pictures: call `write_codes` again'):
        CodeDataset(tmp_path/'parts')
    eq(len(CodeDataset(tmp_path/'parts', unfinished=True)), 256)
    ds.at = 10**9
    write(ds, tmp_path/'parts')
    eq(records(tmp_path/'parts', 500), records(tmp_path/'whole', 500))
    eq(len(CodeDataset(tmp_path/'parts')), 500)

FULL = """
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (400_000,400_000))    # the write itself fails, as on a full disk
try: write(Lazy(2000), sys.argv[1], text_features=Words())
except OSError as e: print('stopped:', e.errno, e)
"""
def test_full_disk(tmp_path):
    out = child(FULL, tmp_path/'c')
    assert 'stopped:' in out and 'pictures are safe; make room and call `write_codes` again' in out, out
    n = len(CodeDataset(tmp_path/'c', unfinished=True))
    assert 0<n<2000 and n%64==0
    write(Lazy(2000), tmp_path/'c', text_features=Words())
    whole = write(Lazy(2000), tmp_path/'whole', text_features=Words())
    eq(records(tmp_path/'c', 2000), records(whole, 2000))

class Long(Words):
    "Features that take much room."
    def __call__(self, captions): return torch.full((len(captions),self.rows,self.d), .5)

def test_the_map_grows(tmp_path):
    "More than LMDB's first map holds, in several batches and in one."
    write(Lazy(700), tmp_path/'c', text_features=Words(40, 512))
    assert (tmp_path/'c'/'data.mdb').stat().st_size>2**21
    stored = CodeDataset(write(Lazy(100), tmp_path/'d', text_features=Long(300, 512)))
    assert (tmp_path/'d'/'data.mdb').stat().st_size>2**24
    close(stored[99]['text'], torch.full((300,512), .5))

TWO = """
path, n = sys.argv[1], 1500
parts = [model().encode_codes(Lazy().__getitems__(range(i,min(i+64,n)))['image']) for i in range(0,n,64)]
expected = [torch.cat(level) for level in zip(*parts)]
def text(captions): return torch.full((len(captions),40,256), .25)
def reader(seed):
    rng, seen, sizes = random.Random(seed), 0, set()
    while seen<n:
        with open(f'{path}.{seed}', 'a') as looks: looks.write('.')
        try: stored = CodeDataset(path, unfinished=True)
        except (FileNotFoundError,ValueError) as e:
            assert 'no codes' in str(e) or 'is empty' in str(e) or 'damaged' in str(e) and not sizes, e
            time.sleep(.01)
            continue
        assert len(stored)>=seen
        seen = len(stored)
        sizes.add(seen)
        if not seen: continue
        for _ in range(3):
            i = [rng.randrange(seen) for _ in range(20)]
            b = stored.__getitems__(i)
            assert all(torch.equal(c, w[i]) for c,w in zip(b['codes'], expected)) and (b['text']==.25).all()
    return len(sizes)
class Watched(Lazy):
    "Waits before each batch until both readers have looked again, or one has ended."
    looks = [0, 0]
    def __getitems__(self, idxs):
        def now(): return [os.path.getsize(f'{path}.{seed}') for seed in range(2)]
        def ended(pid): return os.waitid(os.P_PID, pid, os.WEXITED|os.WNOHANG|os.WNOWAIT)
        while any(a<=b for a,b in zip(now(), self.looks)) and not any(map(ended, kids)): time.sleep(.005)
        self.looks = now()
        return super().__getitems__(idxs)
for seed in range(2): open(f'{path}.{seed}', 'w').close()
kids = []
for seed in range(2):
    if not (pid := os.fork()):
        try: os._exit(0 if reader(seed)>3 else 3)
        except BaseException as e:
            print(seed, repr(e), flush=True)
            os._exit(1)
    kids.append(pid)
write(Watched(n, wait=.02), path, text_features=text)
for pid in kids: assert os.waitpid(pid, 0)[1]==0
assert Path(path,'data.mdb').stat().st_size>2**24               # the map grew under their eyes
"""
@pytest.mark.slow
def test_two_readers_beside_one_writer(tmp_path): child(TWO, tmp_path/'c')

def test_two_writers(tmp_path):
    "The second is through, and the first gets an error."
    ds, m, folder = Lazy(300), model(), (tmp_path/'c').resolve()
    env, header = begin(folder, ds, m)
    child("write(Lazy(300), sys.argv[1])", folder)
    batch = store._records(ds.__getitems__(range(64)), m, None, header)
    with pytest.raises(RuntimeError, match='another process writes'): store._append(folder, env, 0, batch)
    store._close(folder)
    eq(len(CodeDataset(folder)), 300)

# ---- what is not right

OTHERS = { # what the error says: data, model, text encoder
    'model was': (Lazy(100), dict(seed=1), Words()),
    'n was 100, is 101': (Lazy(101), {}, Words()),
    'shapes was': (Lazy(100,size=24), {}, Words()),
    'text was': (Lazy(100), {}, None),
    'other': (Lazy(100), {}, Words(fingerprint='other')),
    '10, 6': (Lazy(100), {}, Words(rows=10)),
    'n_codes was 300': (Lazy(100), dict(n_codes=301), Words()),
}
def test_of_something_else(tmp_path):
    f = Words()
    write(Lazy(100), tmp_path/'c', text_features=f)
    for message, (ds, kw, text) in OTHERS.items():
        with pytest.raises(ValueError, match='holds codes of something else') as e:
            write(ds, tmp_path/'c', model(**kw), text_features=text)
        assert message in str(e.value)
    for m in (model(1), model(n_codes=301)):
        with pytest.raises(ValueError, match='codes of another model'): CodeDataset(tmp_path/'c', m)
    CodeDataset(tmp_path/'c', model())

def test_of_other_images(tmp_path):
    class Other(Lazy):
        def __getitems__(self, idxs):
            b = super().__getitems__(idxs)
            return dict(b, image=b['image'].flip(-1))
    Other.__name__ = 'Lazy'
    write(Lazy(100), tmp_path/'c')
    with pytest.raises(ValueError, match='data was'): write(Other(100), tmp_path/'c')

def test_the_scale_of_a_latent_is_not_the_model(tmp_path):
    "`fit_scale`, saving in half precision and loading leave the codes as they are, and they are not refused."
    m = model()
    write(Lazy(100), tmp_path/'c', m)
    m.fit_scale(Lazy(100))
    CodeDataset(tmp_path/'c', m)
    CodeDataset(tmp_path/'c', load_model(save_model(m, tmp_path/'m'), 'cpu'))

class NoImage(Lazy):
    def __getitems__(self, idxs): return dict(caption=super().__getitems__(idxs)['caption'])

class TooLarge:
    name = 'too large for half precision'
    def __call__(self, captions): return torch.full((len(captions),2,3), 1e6)

@pytest.mark.parametrize('ds,kw,message', [
    (Lazy(0), {}, 'empty'),
    (NoImage(9), {}, 'made of `image`'),
    (Lazy(9,size=20), {}, 'multiples of 8'),
    (Pictures(torch.zeros(9,3,16,16).byte()), {}, 'grey or colour'),
    (Pictures(torch.zeros(9,1,16,16).byte()), dict(text_features=Words()), 'no `caption`'),
    (Lazy(9), dict(text_features=lambda captions: torch.zeros(len(captions),3)), '1\\+L,d'),
    (Lazy(9), dict(text_features=TooLarge()), 'not finite')])
def test_bad_before_work(tmp_path, ds, kw, message):
    with pytest.raises(ValueError, match=message): write(ds, tmp_path/'c', **kw)
    assert not (tmp_path/'c').exists()

def test_features_that_change_their_shape(tmp_path):
    class Grows(Words):
        def __call__(self, captions): return torch.zeros(len(captions), 9 if len(captions)==1 else 10, 6)
    with pytest.raises(ValueError, match='expected \\(64,9,6\\)'): write(Lazy(100), tmp_path/'g', text_features=Grows())

def test_index_out_of_range(tmp_path):
    stored = CodeDataset(write(Lazy(30), tmp_path/'c'))
    for i in (30,-31,10**9):
        with pytest.raises(IndexError, match='of 30'): stored[i]
    eq([len(stored[5:9]['name']),len([*stored])], [4,30])

def test_a_code_out_of_range(tmp_path):
    "A record whose sum is right, with a number that is no code."
    folder = write(Lazy(30), tmp_path/'c')
    with store._environment(folder, write=True).begin(write=True) as t:
        body = bytearray(t.get(store._key(4))[4:])
        body[:2] = struct.pack('<H', 300)
        t.put(store._key(4), struct.pack('<I', zlib.crc32(body))+bytes(body))
    store._close(folder)
    stored = CodeDataset(folder)
    stored[3]
    with pytest.raises(ValueError, match='code 300 among records .* 300 codes'): stored[4]

class CodeRow(NamedTuple):
    "A record of rosinality's code."
    top:np.ndarray
    bottom:np.ndarray
    filename:str

def test_pickled_codes_of_others(tmp_path):
    row = CodeRow(np.zeros((8,8),int), np.zeros((16,16),int), 'a.png')
    with lmdb.open(str(tmp_path/'p')) as env, env.begin(write=True) as t:
        for i in range(3): t.put(str(i).encode(), pickle.dumps(row))
        t.put(b'length', b'3')
    for f in (CodeDataset, lambda path: write(Lazy(9), path)):
        with pytest.raises(ValueError, match='pickled codes .*from_rosinality'): f(tmp_path/'p')
        store._close(tmp_path/'p')

def test_a_database_of_something_else(tmp_path):
    "Is refused, and not touched."
    path = tmp_path/'q'
    with lmdb.open(str(path)) as env, env.begin(write=True) as t: t.put(b'a', b'b')
    for f in (CodeDataset, lambda path: write(Lazy(9), path)):
        with pytest.raises(ValueError, match='something else'): f(path)
        store._close(path)
    with lmdb.open(str(path)) as env, env.begin() as t: eq(t.get(b'a'), b'b')

def test_a_newer_format(tmp_path):
    folder = write(Lazy(9), tmp_path/'c')
    with store._environment(folder, write=True).begin(write=True) as t:
        header = json.loads(t.get(b'\0header'))
        t.put(b'\0header', json.dumps(dict(header, format=2)).encode())
    store._close(folder)
    with pytest.raises(ValueError, match='has format 2, this version of fastldm reads 1'): CodeDataset(folder)

def test_nothing_there(tmp_path):
    with pytest.raises(FileNotFoundError, match='has no codes'): CodeDataset(tmp_path/'none')
    assert not (tmp_path/'none').exists()

@pytest.mark.parametrize('raw', [b'', b'hello', bytes(8192), random.Random(0).randbytes(20_000)], ids=len)
def test_no_database(tmp_path, raw):
    (tmp_path/'data.mdb').write_bytes(raw)
    with pytest.raises(ValueError, match='is damaged'): CodeDataset(tmp_path)

@pytest.mark.parametrize('keep', [.01,.1,.5,.9,.999])
def test_cut_short(keep, tmp_path):
    "An error when it is opened; without that, reading it would end the process."
    write(Lazy(500), tmp_path/'c')
    f = tmp_path/'c'/'data.mdb'
    os.truncate(f, int(f.stat().st_size*keep))
    for g in (CodeDataset, lambda path: write(Lazy(500), path)):
        with pytest.raises(ValueError, match='was cut short|is damaged'): g(tmp_path/'c')

def test_every_changed_byte_is_noticed(tmp_path):
    "In the records: each is refused."
    folder = write(Lazy(60), tmp_path/'c')
    f = folder/'data.mdb'
    raw, rng = f.read_bytes(), random.Random(0)
    rows = records(folder, 60)[:-1]
    places = [raw.find(r) for r in rows]
    for _ in range(100):
        i = rng.randrange(60)
        spoiled = bytearray(raw)
        spoiled[places[i]+rng.randrange(len(rows[i]))] ^= 1<<rng.randrange(8)
        shutil.rmtree(folder)
        folder.mkdir()
        f.write_bytes(spoiled)
        with pytest.raises(ValueError, match=f'record {i} of .*damaged'): CodeDataset(folder)[i]

# ---- size and speed

FLAT = """
def private(): return next(int(l.split()[1])/1024 for l in open('/proc/self/status') if l.startswith('RssAnon'))
n, peaks = int(sys.argv[2]), []
class Watched(Lazy):
    def __getitems__(self, idxs):
        peaks.append(private())
        return super().__getitems__(idxs)
write(Watched(n), sys.argv[1], text_features=Words(), batch_size=128)
quarter = len(peaks)//4
print(max(peaks[:quarter]), max(peaks[-quarter:]), Path(sys.argv[1],'data.mdb').stat().st_size/2**20)
"""
@pytest.mark.slow
@pytest.mark.skipif(not Path('/proc/self/status').exists(), reason='needs /proc')
def test_memory_is_flat(tmp_path):
    "The last quarter of 6,000 images needs no more than the first."
    first, last, size = map(float, child(FLAT, tmp_path/'c', 6000).split())
    print(f'private memory {first:.0f} MiB, later {last:.0f}, file {size:.1f}')
    assert last-first<8

def their_way(image, encode, path, names):
    """As extract_code.py of rosinality/vq-vae-2-pytorch works, in our words: a pickle an image, one transaction.
    `encode` gives both levels."""
    with lmdb.open(str(path), map_size=2**34) as env, env.begin(write=True) as t:
        i = 0
        for x in image.split(128):
            top, bottom = (c.numpy() for c in encode(x))
            for a,b in zip(top, bottom):
                t.put(str(i).encode(), pickle.dumps(CodeRow(a, b, names[i])))
                i += 1
        t.put(b'length', str(i).encode())

def quantize_with_one_hot(vq, z):
    "Distances and a one-hot matrix over all vectors of the batch, which that code makes in use as in training."
    v, e = z.movedim(1,-1).reshape(-1, vq.d_code), vq.codebook.T
    distance = v.pow(2).sum(1,keepdim=True)-2*v@e+e.pow(2).sum(0,keepdim=True)
    codes = (-distance).max(1)[1]
    nn.functional.one_hot(codes, vq.n_codes).type(v.dtype)
    codes = codes.view(len(z), *z.shape[2:])
    return vq.embed(codes), z.new_zeros(()), codes

def with_one_hot(m):
    "The two levels of a model, as that code finds them."
    @torch.no_grad()
    def encode(x):
        with patch.object(type(m.quantizers[0]), 'forward', quantize_with_one_hot): return m.quantize(x)[2]
    return encode

@pytest.mark.slow
@pytest.mark.bench
def test_extraction_speed(tmp_path):
    "Images a second, ours and the known code's way: the same small network for both, and the known one for theirs."
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    image = torch.randint(256, (512,3,64,64), dtype=torch.uint8)
    ds, x, names = Pictures(image), image.float()/127.5-1, [f'{i}.png' for i in range(512)]
    set_seed(0)
    small, known = VQVAE().eval(), VQVAE(channels=(128,), n_blocks=2, d_code=64, narrow=32).eval()
    def rate(name, run):
        "The better of two."
        seconds = []
        for k in range(2):
            start = time.perf_counter()
            run(tmp_path/f'{name}{k}')
            seconds.append(time.perf_counter()-start)
        return 512/min(seconds)
    def ours(m, precision=None): return lambda path: write_codes(ds, m, path, precision=precision, progress=False)
    def theirs(m): return lambda path: their_way(x, with_one_hot(m), path, names)
    found = dict(
        ours=rate('a', ours(small, 'bf16')),
        ours_float32=rate('e', ours(small)),
        theirs=rate('b', theirs(small)),
        theirs_known_network=rate('c', theirs(known)),
        ours_known_network=rate('d', ours(known)))
    torch.set_num_threads(threads)
    def bytes_each(name): return (tmp_path/name/'data.mdb').stat().st_size/512
    for name, images in found.items(): print(f'{name}: {images:.0f} images a second')
    print(f"bytes an image: ours {bytes_each('a0'):.0f}, theirs {bytes_each('b0'):.0f}")
    assert found['ours']>0 and bytes_each('a0')<.3*bytes_each('b0')
