"""What happens to long work when something breaks: a data worker, the disk, the cache, a run of figures;
and files that are not what they seem."""
import json
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
from pathlib import Path
import pytest
import torch
from safetensors import safe_open
from torch import nn
from fastldm.core import Callback, Module, SaveCB, config_fingerprint, fingerprint, load_model, save_model, set_seed
from fastldm.data import DATASETS, Digits
from fastldm.diffusion import Autoencoder, LatentDataset

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent

def run(program, *args, **env):
    "A program in a process of its own."
    env = dict(os.environ, OMP_NUM_THREADS='1', **env)
    return subprocess.run([sys.executable,'-c',program,*map(str,args)], cwd=ROOT, capture_output=True, text=True,
                          timeout=1200, env=env)

# ---- training

DEADLY = """
import os, signal, sys, torch
from torch import nn
from fastldm.core import Learner, set_seed

class Deadly: # its worker is killed, as by the system when memory runs out, at the 30th item
    n = 0
    def __len__(self): return 64
    def __getitem__(self, i):
        self.n += 1
        if torch.utils.data.get_worker_info() and self.n>30: os.kill(os.getpid(), signal.SIGKILL)
        return dict(x=torch.ones(4)*i)

def loss(model, batch): return dict(loss=model(batch['x']).square().mean())

folder, workers = sys.argv[1], int(sys.argv[2])
set_seed(0)
learn = Learner(nn.Linear(4,1), Deadly(), loss, steps=12, batch_size=8, save_every=1, folder=folder, progress=False,
                workers=workers)
learn.fit(resume=workers==0)
print('then', learn.step, learn.log[-1]['step'])
"""

def test_a_data_worker_that_dies(tmp_path):
    """Training stops, and the last checkpoint is there to resume from. In processes of their own: torch raises
    wherever its signal finds the main thread."""
    done = run(DEADLY, tmp_path, 1)
    assert done.returncode, done.stdout+done.stderr
    assert 'then' not in done.stdout and 'Error' in done.stderr, done.stdout+done.stderr
    done = run(DEADLY, tmp_path, 0)
    assert 'then 12 12' in done.stdout, done.stdout+done.stderr

FULL = """
import resource, signal, sys, torch
from torch import nn
from fastldm.core import Learner, set_seed

data = [dict(x=torch.ones(256)*i/64) for i in range(64)]
def loss(model, batch): return dict(loss=model(batch['x']).square().mean())
def make(steps):
    set_seed(0)
    return Learner(nn.Linear(256,256), data, loss, steps=steps, schedule='constant', batch_size=8, save_every=5,
                   folder=sys.argv[1], progress=False)

make(5).fit()
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000,100_000))                  # as a full disk: the write itself fails
try: make(10).fit(resume=True)
except Exception as e: print('stopped:', type(e).__name__, e)
"""

def test_no_space_in_mid_save(tmp_path):
    "The checkpoint of before is whole, and no half-written file is left."
    done = run(FULL, tmp_path/'a')
    assert 'stopped:' in done.stdout, done.stderr
    assert sorted(f.name for f in (tmp_path/'a').iterdir())==['.lock','checkpoint.safetensors','log.csv']
    with safe_open(tmp_path/'a'/'checkpoint.safetensors', 'pt') as f: state = json.loads(f.metadata()['state'])
    assert state['step']==5

@pytest.mark.slow
def test_an_interrupted_recipe_goes_on(tmp_path, capsys, monkeypatch):
    """Killed in its second stage: the first is not done again, the second resumes, and the model is that of a run
    without a break."""
    from fastldm.recipes import label_ldm
    class Interrupt(Callback):
        def after_step(self, learn):
            if learn.step==3: raise KeyboardInterrupt
    monkeypatch.setitem(DATASETS, 'few', lambda root=None, split='train', download=True: Digits(split=split))
    monkeypatch.setattr(SaveCB, 'after_step', lambda self, learn: learn.save())       # a checkpoint every step
    tiny = dict(c_latent=2, ae_channels=(8,8), ae_steps=3, channels=(8,8), steps=6, progress=False)
    with pytest.raises(KeyboardInterrupt): label_ldm('few', tmp_path/'b', cbs=[Interrupt()], **tiny)
    first = (tmp_path/'b'/'autoencoder'/'model.safetensors').stat().st_mtime_ns
    resumed = label_ldm('few', tmp_path/'b', **tiny)
    undisturbed = label_ldm('few', tmp_path/'a', **tiny)
    assert 'denoiser: resuming from step 2 of 6' in capsys.readouterr().out
    assert (tmp_path/'b'/'autoencoder'/'model.safetensors').stat().st_mtime_ns==first
    assert torch.equal(resumed.sample(2, label=3, steps=2, seed=0), undisturbed.sample(2, label=3, steps=2, seed=0))

@pytest.mark.slow
@pytest.mark.parametrize('part', ['middle','denoiser'])
def test_an_interrupted_course_goes_on(part, tmp_path, capsys, monkeypatch):
    """Killed in either part of the denoiser's training: the model is that of a run without a break, whose last part
    began where the first ended."""
    from fastldm.recipes import label_ldm
    class Interrupt(Callback):
        def after_step(self, learn):
            if learn.step==2 and learn.checkpoint.parts[-3]==part: raise KeyboardInterrupt
    monkeypatch.setitem(DATASETS, 'few', lambda root=None, split='train', download=True: Digits(split=split))
    monkeypatch.setattr(SaveCB, 'after_step', lambda self, learn: learn.save())       # a checkpoint every step
    tiny = dict(c_latent=2, ae_channels=(8,8), ae_steps=3, channels=(8,8), steps=6, middle=.5, progress=False)
    with pytest.raises(KeyboardInterrupt): label_ldm('few', tmp_path/'b', cbs=[Interrupt()], **tiny)
    resumed = label_ldm('few', tmp_path/'b', **tiny)
    undisturbed = label_ldm('few', tmp_path/'a', **tiny)
    assert f'{part}: resuming from step 1 of 3' in capsys.readouterr().out
    assert fingerprint(resumed.denoiser)==fingerprint(undisturbed.denoiser)
    assert set(resumed.meta['stages'])=={'autoencoder','middle','denoiser'}
    still = label_ldm('few', tmp_path/'c', lr=0., **tiny)                              # the last part changes nothing
    first = load_model(tmp_path/'c'/'middle', 'cpu')
    assert all(torch.equal(value, first.state_dict()[name]) for name,value in still.denoiser.state_dict().items())

def test_a_course_of_two_parts_is_not_made_longer(tmp_path, monkeypatch):
    "More steps would belong to both parts, the first of which is over: refused before anything is written down."
    from fastldm.recipes import label_ldm
    monkeypatch.setitem(DATASETS, 'few', lambda root=None, split='train', download=True: Digits(split=split))
    tiny = dict(c_latent=2, ae_channels=(8,8), ae_steps=2, channels=(8,8), middle=.5, progress=False)
    label_ldm('few', tmp_path/'a', steps=2, **tiny)
    with pytest.raises(ValueError, match='middle_steps was 1, is 2'): label_ldm('few', tmp_path/'a', steps=4, **tiny)
    label_ldm('few', tmp_path/'a', steps=2, **tiny)

def test_a_stage_under_its_former_name(tmp_path):
    "The text encoder of an earlier run, in the folder `reader`, is found."
    from fastldm.recipes import train_text_encoder
    save_model(small(), tmp_path/'reader')
    assert fingerprint(train_text_encoder(None, tmp_path))==fingerprint(small())

def test_resume_without_a_run(tmp_path):
    "`--resume` does not begin a run."
    done = subprocess.run([BIN/'fastldm_train','digits','--out',tmp_path/'none','--resume'], capture_output=True,
                          text=True)
    assert done.returncode
    assert 'no checkpoint to resume from' in done.stderr and 'Traceback' not in done.stderr
    assert not (tmp_path/'none').exists()

# ---- the cache of latents

def small():
    set_seed(0)
    return Autoencoder(channels=(8,), c_latent=2).eval()

def test_a_cache_that_cannot_be_written(tmp_path):
    """A file stands where the folder should be (root can write into a folder that is read-only): a warning, and
    the same latents."""
    (tmp_path/'cache').write_text('in the way')
    ae = small()
    with pytest.warns(UserWarning, match='cannot be kept'):
        latents = LatentDataset(Digits(), ae, cache=tmp_path/'cache', progress=False)
    assert torch.equal(latents.latent, LatentDataset(Digits(), ae, progress=False).latent)
    assert (tmp_path/'cache').read_text()=='in the way'

def test_a_cache_that_vanishes(tmp_path):
    "The latents are in memory, and are written again."
    ae = small()
    latents = LatentDataset(Digits(), ae, cache=tmp_path/'cache', progress=False)
    shutil.rmtree(tmp_path/'cache')
    assert latents[3]['latent'].shape==(2,8,8)
    assert torch.equal(LatentDataset(Digits(), ae, cache=tmp_path/'cache', progress=False).latent, latents.latent)

# ---- figures

FIGURES = ['a1_process','a5_one_dimension','a7_labels','c6_codes']

@pytest.fixture
def four_figures(tmp_path):
    "A copy of the repository with four figures, and the environment to draw them there."
    for folder in ('nbs/figures','fastldm','out'): (tmp_path/folder).mkdir(parents=True)
    for name in FIGURES: shutil.copy(ROOT/'nbs'/'figures'/f'{name}.ipynb', tmp_path/'nbs'/'figures')
    for f in (ROOT/'fastldm').iterdir():
        if f.is_dir(): (tmp_path/'fastldm'/f.name).symlink_to(f)
        else: shutil.copy(f, tmp_path/'fastldm')
    shutil.copy(ROOT/'figures'/'measured.json', tmp_path/'out')
    return tmp_path, dict(os.environ, FASTLDM_FIGURES=str(tmp_path/'out'), PYTHONPATH=str(tmp_path))

KILLED = """
import os, signal
from fastldm.recipes import figures
write = figures._write_progress
def killed(rows):
    write(rows)
    if len(rows)==2: os.kill(os.getpid(), signal.SIGKILL)
figures._write_progress = killed
figures.figures_cli([])
"""

@pytest.mark.slow
def test_an_interrupted_figure_run_goes_on(four_figures):
    """Killed after the second figure: the next run draws the others only, and reports them all. (Each figure is
    drawn by test_notebooks.)"""
    root, env = four_figures
    out = root/'out'
    progress = out/'.under_way.json'
    killed = subprocess.run([sys.executable,'-c',KILLED], env=env, cwd=root, capture_output=True, text=True)
    assert killed.returncode==-signal.SIGKILL, killed.stdout+killed.stderr
    first = {row[0] for row in json.loads(progress.read_text())}
    assert len(first)==2
    written = {name: (out/f'{name}.png').stat().st_mtime_ns for name in first}
    done = subprocess.run([BIN/'fastldm_figures'], env=env, cwd=root, capture_output=True, text=True, timeout=1800)
    assert done.returncode==0, done.stdout+done.stderr
    assert all((out/f'{name}.png').stat().st_mtime_ns==t for name,t in written.items())
    assert all(name in done.stdout and (out/f'{name}.png').exists() for name in FIGURES)
    assert not progress.exists()

# ---- files that are not what they seem

class Two(Module):
    "A model of two layers."
    def __init__(self, n=6):
        super().__init__()
        self.a = nn.Linear(n, n)
        self.b = nn.Conv2d(n, 2, 3)

def spoil(rng, folder):
    "One random change to one of the two files of a saved model; what was changed, in words."
    f = folder/rng.choice(['model.safetensors','config.json'])
    raw = bytearray(f.read_bytes())
    kind = rng.choice('byte cut header insert swap zero'.split())
    at = rng.randrange(len(raw))
    if kind=='byte': raw[at] = (raw[at]+rng.randrange(1,256))%256
    if kind=='cut': raw = raw[:at]
    if kind=='header': raw[:8] = struct.pack('<Q', rng.choice([0,2**16,2**32,2**63,2**64-1,len(raw)]))
    if kind=='insert': raw[at:at] = rng.randbytes(rng.randrange(1,50))
    if kind=='swap':
        n = rng.randrange(1,9)
        raw[at:at+n] = reversed(raw[at:at+n])
    if kind=='zero': raw[at:at+16] = bytes(len(raw[at:at+16]))
    f.write_bytes(raw)
    return f'{kind} at {at} of {f.name}'

def load_or_refuse(folder, what):
    "The weights of a model, or None where it is refused with an error that names the folder; anything else fails."
    try: return load_model(folder).state_dict()
    except (ValueError,FileNotFoundError) as e: assert str(folder) in str(e), (what, e)
    except Exception as e: pytest.fail(f'{what}: {type(e).__name__}: {e}')

def test_five_hundred_spoiled_models(tmp_path):
    """Each loads the very weights that were saved, or is refused with an error that names the folder; nothing
    crashes, nothing else is raised."""
    set_seed(0)
    save_model(Two(), tmp_path/'good', half=False, note='a note')
    want = load_model(tmp_path/'good').state_dict()
    bad = tmp_path/'bad'
    refused = 0
    for seed in range(500):
        shutil.rmtree(bad, ignore_errors=True)
        shutil.copytree(tmp_path/'good', bad)
        what = f'seed {seed}, {spoil(random.Random(seed), bad)}'
        found = load_or_refuse(bad, what)
        if found is None: refused += 1
        else: assert all((v-want[k]).abs().max()<1e-3 for k,v in found.items()), what
    # the others changed what does not matter, e.g. the note
    assert refused>350, refused

def test_a_record_that_asks_for_too_much(tmp_path):
    "Refused before anything is allocated: the shapes do not agree, whatever the fingerprints say."
    save_model(Two(), tmp_path)
    file = tmp_path/'config.json'
    info = json.loads(file.read_text())
    info['config']['kwargs']['n'] = 10**8
    info['config_fingerprint'] = config_fingerprint(info['config'])
    file.write_text(json.dumps(info))
    with pytest.raises(ValueError, match='the model needs'): load_model(tmp_path)
