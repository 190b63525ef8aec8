"What happens to long work when something breaks: a data worker, the disk, the cache, a figure run; and files that are not what they seem."
import json, os, random, shutil, signal, struct, subprocess, sys, time
from pathlib import Path
import pytest, torch
from torch import nn
from fastldm.diffusion import Autoencoder, LatentDataset
from fastldm.core import Module, load_model, save_model, set_seed
from fastldm.data import Digits
from fastldm.core import Learner

ROOT = Path(__file__).parents[1]
def run(program, *args, **env):
    return subprocess.run([sys.executable,'-c',program,*map(str,args)], cwd=ROOT, capture_output=True, text=True, timeout=240, env={**os.environ,'OMP_NUM_THREADS':'1',**env})

# ---- training

DEADLY = """
import os, signal, sys, torch; from torch import nn; from fastldm.core import Learner
from fastldm.core import set_seed
class Deadly: # its worker is killed, as by the system when memory runs out, at the 30th item
    n = 0
    def __len__(self): return 64
    def __getitem__(self, i):
        self.n += 1
        if torch.utils.data.get_worker_info() and self.n>30: os.kill(os.getpid(), signal.SIGKILL)
        return dict(x=torch.ones(4)*i)
set_seed(0)
def make(workers): return Learner(nn.Linear(4,1), Deadly(), lambda m,b: dict(loss=m(b['x']).square().mean()), steps=12, batch_size=8, save_every=1, folder=sys.argv[1], progress=False, workers=workers)
l = make(int(sys.argv[2])).fit(resume=sys.argv[2]=='0')
print('then', l.step, l.log[-1]['step'])
"""

def test_a_data_worker_that_dies(tmp_path):
    "Training stops, and the checkpoint of before is there to go on from. In processes of their own: torch raises wherever its signal finds the main thread."
    p = run(DEADLY, tmp_path, 1)
    assert p.returncode and 'then' not in p.stdout and 'Error' in p.stderr, p.stdout+p.stderr
    p = run(DEADLY, tmp_path, 0)
    assert 'then 12 12' in p.stdout, p.stdout+p.stderr

FULL = """
import resource, sys, torch; from torch import nn; from fastldm.core import Learner
from fastldm.core import set_seed
set_seed(0); loss = lambda m,b: dict(loss=m(b['x']).square().mean())
data = [dict(x=torch.ones(256)*i/64) for i in range(64)]
def make(steps): return Learner(nn.Linear(256,256), data, loss, steps=steps, schedule='constant', batch_size=8, save_every=5, folder=sys.argv[1], progress=False)
make(5).fit()
import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000,100_000))                  # as a full disk: the write itself fails
try: set_seed(0); make(10).fit(resume=True)
except Exception as e: print('stopped:', type(e).__name__, e)
"""
def test_no_space_in_mid_save(tmp_path):
    said = run(FULL, tmp_path/'a')
    assert 'stopped:' in said.stdout, said.stderr
    left = sorted(p.name for p in (tmp_path/'a').iterdir())
    assert left==['.lock','checkpoint.safetensors','log.csv']                  # no half-written file
    from fastldm.core.train import read_checkpoint
    assert read_checkpoint(tmp_path/'a'/'checkpoint.safetensors')[0]['step']==5

# ---- the cache of latents

def small(): set_seed(0); return Autoencoder(channels=(8,), c_latent=2).eval()

def test_a_cache_that_cannot_be_written(tmp_path):
    "A file stands where the folder should be (root can write into a folder that is read-only): a warning, and the same latents."
    (tmp_path/'cache').write_text('in the way')
    ae = small()
    with pytest.warns(UserWarning, match='cannot be kept'): a = LatentDataset(Digits(), ae, cache=tmp_path/'cache', progress=False)
    assert torch.equal(a.latent, LatentDataset(Digits(), ae, progress=False).latent)
    assert (tmp_path/'cache').read_text()=='in the way'

def test_a_cache_that_vanishes(tmp_path):
    ae = small()
    a = LatentDataset(Digits(), ae, cache=tmp_path/'cache', progress=False)
    shutil.rmtree(tmp_path/'cache')
    assert a[3]['latent'].shape==(2,8,8)                                       # it is in memory
    assert torch.equal(LatentDataset(Digits(), ae, cache=tmp_path/'cache', progress=False).latent, a.latent)

# ---- figures

@pytest.mark.slow
def test_an_interrupted_figure_run_goes_on(tmp_path):
    "Killed after the first figures: the next run draws the others only, and reports them all. A copy with four of the figures; each figure is drawn by test_notebooks."
    names,out = ['a1_process','a5_one_dimension','a7_labels','c6_codes'],tmp_path/'out'
    for d in ('nbs/figures','fastldm','out'): (tmp_path/d).mkdir(parents=True)
    for n in names: shutil.copy(ROOT/'nbs'/'figures'/f'{n}.ipynb', tmp_path/'nbs'/'figures')
    for f in (ROOT/'fastldm').iterdir(): (tmp_path/'fastldm'/f.name).symlink_to(f) if f.is_dir() else shutil.copy(f, tmp_path/'fastldm')
    shutil.copy(ROOT/'figures'/'measured.json', out)
    env = {**os.environ,'FASTLDM_FIGURES':str(out),'PYTHONPATH':str(tmp_path)}
    command = [Path(sys.executable).parent/'fastldm_figures']
    p = subprocess.Popen(command, env=env, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    end = time.time()+200
    while not (out/'.under_way.json').exists() and p.poll() is None and time.time()<end: time.sleep(.05)
    p.send_signal(signal.SIGKILL); p.wait()
    first = {r[0] for r in json.loads((out/'.under_way.json').read_text())}
    stamp = {n:(out/f'{n}.png').stat().st_mtime_ns for n in first}
    q = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=500)
    assert q.returncode==0, q.stdout+q.stderr
    assert 0<len(first)<len(names) and all((out/f'{n}.png').stat().st_mtime_ns==t for n,t in stamp.items())
    assert all(n in q.stdout and (out/f'{n}.png').exists() for n in names)
    assert not (out/'.under_way.json').exists()

def test_resume_without_a_run(tmp_path):
    p = subprocess.run([Path(sys.executable).parent/'fastldm_train','digits','--out',tmp_path/'none','--resume'], capture_output=True, text=True)
    assert p.returncode and 'no checkpoint to go on from' in p.stderr and 'Traceback' not in p.stderr and not (tmp_path/'none').exists()

# ---- files that are not what they seem

class Two(Module):
    def __init__(self, n=6): super().__init__(); self.a,self.b = nn.Linear(n,n),nn.Conv2d(n,2,3)

def spoil(rng, folder):
    "One random change to one of the two files of a saved model."
    f = folder/rng.choice(['model.safetensors','config.json'])
    raw = bytearray(f.read_bytes())
    kind = rng.choice('byte cut header insert swap zero'.split())
    at = rng.randrange(len(raw))
    if kind=='byte': raw[at] = (raw[at]+rng.randrange(1,256))%256
    if kind=='cut': raw = raw[:at]
    if kind=='header': raw[:8] = struct.pack('<Q', rng.choice([0,2**16,2**32,2**63,2**64-1,len(raw)]))
    if kind=='insert': raw[at:at] = rng.randbytes(rng.randrange(1,50))
    if kind=='swap': n = rng.randrange(1,9); raw[at:at+n] = reversed(raw[at:at+n])
    if kind=='zero': raw[at:at+16] = bytes(len(raw[at:at+16]))
    f.write_bytes(raw)
    return f'{kind} at {at} of {f.name}'

def test_five_hundred_spoiled_models(tmp_path):
    "Each loads the very weights that were saved, or is refused with an error that names the folder; nothing crashes, nothing else is raised."
    set_seed(0)
    model = Two(); save_model(model, tmp_path/'good', half=False, note='a note')
    want,meta = load_model(tmp_path/'good').state_dict(),load_model(tmp_path/'good').meta
    refused = 0
    for seed in range(500):
        rng,d = random.Random(seed),tmp_path/'bad'
        shutil.rmtree(d, ignore_errors=True); shutil.copytree(tmp_path/'good', d)
        what = spoil(rng, d)
        try: got = load_model(d)
        except (ValueError,FileNotFoundError) as e: refused += 1; assert str(d) in str(e), (seed,what,e); continue
        except Exception as e: pytest.fail(f'seed {seed}, {what}: {type(e).__name__}: {e}')
        for k,v in got.state_dict().items(): assert (v-want[k]).abs().max()<1e-3, (seed,what,k)
    assert refused>350, refused                                                 # the others changed what does not matter, e.g. the note

def test_a_record_that_asks_for_too_much(tmp_path):
    "Refused before anything is allocated: the shapes do not agree, whatever the fingerprints say."
    from fastldm.core import config_fingerprint
    save_model(Two(), tmp_path)
    f = tmp_path/'config.json'; info = json.loads(f.read_text())
    info['config']['kwargs']['n'] = 10**8
    f.write_text(json.dumps(info | dict(config_fingerprint=config_fingerprint(info['config']))))
    with pytest.raises(ValueError, match='the model needs'): load_model(tmp_path)
