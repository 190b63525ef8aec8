"""Runs as people start, stop and repeat them: no work is lost, no finished run is relabelled, and errors come before
work."""
import json
import os
import signal
import threading
from inspect import signature
from pathlib import Path
import numpy as np
import pytest
import torch
from torch import nn
from fastldm.core import (Busy, Callback, Interrupted, Learner, Module, SampleCB, check_saveable, config_fingerprint,
                          json_text, load_model, locked, read_checkpoint, save_model, set_seed, write_atomic)

# ---- files that others can read

class Two(Module):
    "A model of two layers."
    def __init__(self, n=6, activation=None):
        super().__init__()
        self.a = nn.Linear(n, n)
        self.b = nn.Linear(n, 1)

@pytest.fixture
def umask():
    "`umask(0o027)`, until the end of the test."
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)

@pytest.mark.parametrize('mask,mode', [(0o022,0o644), (0o002,0o664), (0o077,0o600)], ids=oct)
def test_weights_have_the_mode_of_any_new_file(tmp_path, umask, mask, mode):
    "Weights were written with 0600 beside a config.json of 0644."
    umask(mask)
    save_model(Two(), tmp_path/'m', max_file=80)
    files = [*(tmp_path/'m').iterdir()]
    assert len(files)>2
    assert {f.name: oct(f.stat().st_mode&0o777) for f in files}==dict.fromkeys([f.name for f in files], oct(mode))

def test_a_file_that_is_written_again_has_the_mode_of_a_new_one(tmp_path, umask):
    file = tmp_path/'note.txt'
    file.touch(0o600)
    with write_atomic(file) as f: f.write_text('new')
    assert file.stat().st_mode&0o777==0o644

# ---- what could be trained and not saved

LATIN = os.fsdecode('café'.encode('latin-1'))                          # a folder's name from an old zip file

def test_a_name_that_is_not_text_can_be_saved(tmp_path):
    "It comes back as it was, also within the record of a model."
    assert json.loads(json_text([LATIN, 'café']).encode())==[LATIN, 'café']
    meta = load_model(save_model(Two(), tmp_path/'m', classes=[LATIN], data=tmp_path/LATIN)).meta
    assert meta['classes']==[LATIN]
    assert meta['data']==str(tmp_path/LATIN)

def local_class():
    class Hidden(Two): "No import finds it."
    return Hidden()

class Odd(Two):
    "Its weights are of a kind that no file can hold."
    def __init__(self, n=6):
        super().__init__(n)
        self.register_buffer('spikes', torch.eye(3).to_sparse())

@pytest.mark.parametrize('make,says', [
    (lambda: nn.Linear(2,2), 'derive the class from fastldm.core.Module'),
    (lambda: Two(6, torch.relu), 'argument `activation`'),
    (local_class, 'Hidden'),
    (Odd, 'sparse|contiguous'),
], ids='plain function local sparse'.split())
def test_what_save_will_refuse_is_found_out_before_training(make, says):
    with pytest.raises(ValueError, match=says): check_saveable(make())

def test_a_class_that_is_not_there_is_found_with_module(tmp_path):
    "The message says what to do on the command line too."
    save_model(Two(), tmp_path)
    file = tmp_path/'config.json'
    info = json.loads(file.read_text())
    info['config']['module'] = 'elsewhere'
    info['config_fingerprint'] = config_fingerprint(info['config'])
    file.write_text(json.dumps(info))
    with pytest.raises(ValueError, match='give --module elsewhere'): load_model(tmp_path)

@pytest.mark.parametrize('folder', [LATIN, f'{LATIN}/m'])
def test_a_folder_that_no_weights_can_be_read_from(tmp_path, folder):
    "Weights were written there, and could never be read again."
    with pytest.raises(ValueError, match='not UTF-8'): save_model(Two(), tmp_path/folder)
    with pytest.raises(ValueError, match='not UTF-8'): small_learner(tmp_path/folder)
    assert not [*tmp_path.iterdir()]

def test_what_a_callback_logs_can_be_saved():
    "A list or a picture in the log made every later checkpoint fail."
    for odd in (torch.ones(2), [1,2], object()):
        run = small_learner(None, cbs=[SampleCB(3, lambda learn: dict(odd=odd))])
        with pytest.raises(ValueError, match='`odd` is a .*: let the callback return a dict'): run.fit()
    log = small_learner(None, cbs=[SampleCB(3, lambda learn: dict(a=np.float32(2), b=torch.ones(1), c='x'))]).fit().log
    assert (log[-1]['a'], log[-1]['b'], log[-1]['c'])==(2., 1., 'x')

# ---- signals, and checkpoints by the clock

def small_learner(folder, cbs=(), steps=12, **settings):
    "Twelve steps on sixty-four numbers."
    set_seed(0)
    data = [dict(x=torch.ones(4)*i/64) for i in range(64)]
    def loss(model, batch): return dict(loss=(model(batch['x'])-batch['x'].sum(1, keepdim=True)).square().mean())
    settings = dict(batch_size=8, log_every=5, progress=False, ema=.9, save_every=10**6) | settings
    return Learner(nn.Linear(4,1), data, loss, steps=steps, folder=folder, cbs=cbs, **settings)

class At(Callback):
    "Do something after one step."
    def __init__(self, step, do): self.step, self.do = step, do
    def after_step(self, learn):
        if learn.step==self.step: self.do(learn)

def send(number): os.kill(os.getpid(), number)

def step_saved(folder): return read_checkpoint(Path(folder)/'checkpoint.safetensors')[0]['step']

@pytest.fixture
def signals():
    "Python's own handlers, also where the tests run in the background of a shell; they must be there again at the end."
    ours = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number,handler in ours.items()}
    yield
    after = {number: signal.signal(number, before[number]) for number in ours}
    assert after==ours

@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize('workers', [0, 1])
def test_a_signal_saves_at_once(tmp_path, signals, number, workers):
    "Up to 1,000 steps were lost. The run that goes on has the bits of one that was left alone."
    whole = small_learner(tmp_path/'whole').fit()
    run = small_learner(tmp_path/'cut', cbs=[At(7, lambda learn: send(number))], workers=workers)
    with pytest.raises(Interrupted, match='stopped at step 7 of 12: .* goes on from there'): run.fit()
    assert step_saved(tmp_path/'cut')==7
    again = small_learner(tmp_path/'cut').fit(resume=True)
    assert again.log==whole.log
    assert torch.equal(again.ema_model.weight, whole.ema_model.weight)

def test_a_signal_while_a_model_is_scored(tmp_path, signals):
    "It does not wait for the pictures; they are drawn when the run goes on, and no row of the log is missing."
    scores = []
    def score(learn):
        if len(scores)==1: send(signal.SIGINT)
        scores.append(learn.step)
        return dict(score=float(learn.step))
    run = small_learner(tmp_path/'cut', cbs=[SampleCB(4, score)])
    with pytest.raises(Interrupted): run.fit()
    assert scores==[4]                                                  # not the eighth step's
    assert step_saved(tmp_path/'cut')==8
    scores.extend([0,0])
    log = small_learner(tmp_path/'cut', cbs=[SampleCB(4, score)]).fit(resume=True).log
    assert [row['step'] for row in log if 'score' in row]==[4,8,12]
    whole = small_learner(None, cbs=[SampleCB(4, lambda learn: dict(score=float(learn.step)))]).fit()
    assert log==whole.log

def test_a_signal_without_a_folder(signals):
    "The message does not promise what is not there."
    run = small_learner(None, cbs=[At(7, lambda learn: send(signal.SIGINT))])
    with pytest.raises(Interrupted, match='nothing is kept'): run.fit()

def test_a_signal_at_the_very_end(tmp_path, signals):
    "After the last step the run is whole, and the caller still hears of the signal."
    class Last(Callback):
        def after_fit(self, learn): send(signal.SIGTERM)
    with pytest.raises(Interrupted, match='stopped at step 12 of 12'): small_learner(tmp_path, cbs=[Last()]).fit()
    assert step_saved(tmp_path)==12

def test_a_signal_that_is_ignored_stays_ignored(tmp_path, signals):
    "As `nohup`, or a shell's background, has it."
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    assert small_learner(tmp_path, cbs=[At(7, lambda learn: send(signal.SIGINT))]).fit().step==12
    signal.signal(signal.SIGINT, signal.default_int_handler)

def test_a_run_in_another_thread(tmp_path):
    "Only the main thread can handle signals; elsewhere a run does without."
    runs = []
    thread = threading.Thread(target=lambda: runs.append(small_learner(tmp_path).fit().step))
    thread.start()
    thread.join()
    assert runs==[12]

@pytest.mark.parametrize('seconds,steps', [(0., [*range(1,13)]), (10.**6, [5,10,12])], ids='late early'.split())
def test_a_checkpoint_every_two_minutes(tmp_path, monkeypatch, seconds, steps):
    "No checkpoint was there after seven minutes of slow steps."
    assert signature(Learner).parameters['save_seconds'].default==120
    saved = []
    save = Learner.save
    def spy(learn):
        save(learn)
        saved.append(learn.step)
    monkeypatch.setattr(Learner, 'save', spy)
    small_learner(tmp_path, save_every=5, save_seconds=seconds).fit()
    assert saved==steps

# ---- longer runs

def test_a_finished_run_can_be_made_longer(tmp_path):
    "From its last weights; fewer steps, or anything else that is not the same, is still refused."
    short = small_learner(tmp_path/'a').fit()
    weight = short.model.weight.clone()
    with pytest.raises(ValueError, match='steps was 12, is 8'):
        small_learner(tmp_path/'a', steps=8).fit(resume=True, longer=True)
    with pytest.raises(ValueError, match='lr was 0.001, is 0.1'):
        small_learner(tmp_path/'a', steps=20, lr=.1).fit(resume=True, longer=True)
    starts = []
    class Start(Callback):
        def before_fit(self, learn): starts.append((learn.step, learn.model.weight.clone()))
    longer = small_learner(tmp_path/'a', steps=20, cbs=[Start()]).fit(resume=True, longer=True)
    assert longer.step==20
    assert starts[0][0]==12 and torch.equal(starts[0][1], weight)
    assert not torch.equal(longer.model.weight, weight)
    assert small_learner(tmp_path/'a', steps=20).fit(resume=True).log==longer.log

def lock_in_a_fork(folder):
    "The exit status of a process that takes the lock: 7 where it is refused."
    child = os.fork()
    if child: return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        with locked(folder): os._exit(0)
    except Busy: os._exit(7)
    finally: os._exit(1)

def test_two_processes_in_one_folder(tmp_path):
    "The second is told to wait, by an error of its own kind."
    with locked(tmp_path): assert lock_in_a_fork(tmp_path)==7
    assert lock_in_a_fork(tmp_path)==0
