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
from fastldm.core.watch import TrackCB

HERE = Path(__file__).parent

@pytest.fixture(autouse=True)
def one_thread():
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


# ---- a small run in which everything is random that can be

class Points:
    "50 points, with augmentation by all three generators, item by item."
    def __init__(self, n=50): self.x = torch.linspace(-1,1,n*4).view(n,4)
    def __len__(self): return len(self.x)
    def __getitem__(self, i):
        noise = .1*torch.randn(4) + .1*random.random() + .1*np.random.rand()
        return dict(x=self.x[i]+noise, name=str(i))

class Batched(Points):
    "The same points, a batch at once."
    def __getitems__(self, idxs):
        noise = .1*torch.randn(len(idxs), 4)
        return dict(x=self.x[idxs]+noise, name=[str(i) for i in idxs])

def net():
    set_seed(1)
    return nn.Sequential(nn.Linear(4,8), nn.BatchNorm1d(8), nn.Dropout(.3), nn.ReLU(), nn.Linear(8,1))

def loss(model, batch):
    "Dropout, augmentation and noise: all that is random in training."
    x = batch['x']
    out = model(x+.1*torch.randn_like(x))
    error = out.float()[:,0]-x.sum(1)
    return dict(loss=error.square().mean(), size=out.abs().mean(), n=3.)

def learner(folder=None, data=None, loss_fn=loss, **changes):
    "23 steps on `Batched`: an epoch is 6 batches of 8, so that step 9 is in the middle of the second one."
    if data is None: data = Batched()
    settings = dict(steps=23, batch_size=8, lr=.01, warmup=5, ema=.9, log_every=5, progress=False, seed=3)
    settings.update(changes)
    return Learner(net(), data, loss_fn, folder=folder, **settings)

class At(Callback):
    "Do something after one step."
    def __init__(self, step, do): self.step, self.do = step, do
    def after_step(self, learn):
        if learn.step==self.step: self.do(learn)

def stop(learn): raise StopTraining

def checkpoint(folder): return Path(folder)/'checkpoint.safetensors'

def state(folder):
    "The tensors of a checkpoint, and all else in it but the time that training took."
    with safe_open(checkpoint(folder), 'pt') as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        rest = json.loads(file.metadata()['state'])
    rest.pop('seconds', None)
    return tensors, rest

def assert_same_run(a, b):
    "Two folders hold the same run, bit for bit: every tensor, every setting, and the log."
    tensors_a, rest_a = state(a)
    tensors_b, rest_b = state(b)
    assert tensors_a.keys()==tensors_b.keys()
    assert rest_a==rest_b
    for name in tensors_a: assert torch.equal(tensors_a[name], tensors_b[name]), name
    assert (Path(a)/'log.csv').read_bytes()==(Path(b)/'log.csv').read_bytes()


# ---- stopped and resumed

@pytest.mark.parametrize('settings', [
    dict(),
    dict(accumulate=3),
    dict(ema=None, clip=None),
    dict(precision='bf16', schedule='constant'),
    dict(data=Points()),
    dict(optimizer=partial(torch.optim.SGD, momentum=.9)),
    dict(optimizer=torch.optim.Adamax),
], ids='plain accumulate no_ema bf16 items sgd adamax'.split())
def test_resume_is_bit_equal(tmp_path, settings):
    "A run stopped anywhere and resumed ends bit-equal: within an epoch, at its end, between two rows of the log."
    learner(tmp_path/'whole', **settings).fit()
    for step in (9,12,17):                              # 12 is the end of an epoch
        part = learner(tmp_path/'parts', **settings)
        part.cbs.insert(1, At(step, stop))              # after the log, before the checkpoint
        part.fit(resume=step>9)
        assert part.step==step
    learner(tmp_path/'parts', **settings).fit(resume=True)
    assert_same_run(tmp_path/'whole', tmp_path/'parts')

def test_resume_with_workers(tmp_path):
    "Augmentation does not depend on which process loads the data: none, two, or one."
    learner(tmp_path/'whole', data=Points()).fit()
    part = learner(tmp_path/'parts', data=Points(), workers=2)
    part.cbs.insert(0, At(7, stop))
    part.fit()
    learner(tmp_path/'parts', data=Points(), workers=1).fit(resume=True)
    assert_same_run(tmp_path/'whole', tmp_path/'parts')

def test_callbacks_do_not_change_the_run(tmp_path):
    "A callback may draw random numbers and call the model: the run stays bit-equal."
    def use_all_generators(learn):
        torch.randn(100)
        np.random.rand(9)
        random.random()
        learn.model(torch.randn(5,4))
    learner(tmp_path/'quiet').fit()
    learner(tmp_path/'noisy', cbs=[SampleCB(4, use_all_generators)]).fit()
    assert_same_run(tmp_path/'quiet', tmp_path/'noisy')

def test_skipped_data_is_not_loaded(tmp_path):
    "A run that continues at step 9 loads the items of the remaining steps only."
    class Counts(Points):
        n_loaded = 0
        def __getitem__(self, i):
            self.n_loaded += 1
            return super().__getitem__(i)
    part = learner(tmp_path, data=Counts())
    part.cbs.insert(0, At(9, stop))
    part.fit()
    data = Counts()
    learner(tmp_path, data=data).fit(resume=True)
    assert data.n_loaded==(23-9)*8

def test_finished_run_resumes_to_itself(tmp_path):
    "Resuming a finished run gives its step, log and average, and does not touch its checkpoint."
    first = learner(tmp_path).fit()
    before = checkpoint(tmp_path).read_bytes()
    again = learner(tmp_path).fit(resume=True)
    assert checkpoint(tmp_path).read_bytes()==before
    assert again.step==23
    assert again.log==first.log
    for p,q in zip(first.ema_model.parameters(), again.ema_model.parameters(), strict=True): assert torch.equal(p, q)

def test_a_run_at_a_constant_rate_can_be_made_longer(tmp_path):
    "Where the learning rate does not know the end, more steps are the same run, longer."
    learner(tmp_path, schedule='constant', steps=10).fit()
    longer = learner(tmp_path, schedule='constant').fit(resume=True)
    assert longer.step==23


# ---- what is on the disk

def test_failure_in_saving_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    "When the disk is full, the last checkpoint stays, nothing else is left behind, and resuming ends bit-equal."
    learner(tmp_path/'whole', save_every=5).fit()
    write = train.save_file
    written = []
    def third_time_full(tensors, path, meta):
        write(tensors, path, meta)
        written.append(path)
        if len(written)==3:
            os.truncate(path, 1000)
            raise OSError(28, 'No space left on device')
    monkeypatch.setattr(train, 'save_file', third_time_full)
    with pytest.raises(OSError, match='No space left'): learner(tmp_path/'failed', save_every=5).fit()
    assert state(tmp_path/'failed')[1]['step']==10
    assert sorted(f.name for f in (tmp_path/'failed').iterdir())==['.lock','checkpoint.safetensors','log.csv']
    learner(tmp_path/'failed', save_every=5).fit(resume=True)
    assert_same_run(tmp_path/'whole', tmp_path/'failed')

def test_only_safetensors_json_and_csv(tmp_path, monkeypatch):
    "A run writes one checkpoint and one log, and never calls `torch.save`."
    monkeypatch.setattr(torch, 'save', None)
    learner(tmp_path, save_every=5).fit()
    assert {f.name for f in tmp_path.iterdir()}=={'.lock','checkpoint.safetensors','log.csv'}

def damaged(good):
    "Files cut short, with another beginning, or with one bit turned over."
    yield from (good[:n] for n in (0, 7, 100, len(good)//2, len(good)-1))
    yield b'\xff'*8+good[8:]
    yield b'\x80\x04pickle'
    rng = random.Random(0)
    for _ in range(60):
        flipped = bytearray(good)
        flipped[rng.randrange(len(good))] ^= 1<<rng.randrange(8)
        yield bytes(flipped)

def test_damaged_checkpoint(tmp_path):
    "A checkpoint that was cut or altered in a single bit is refused, with what to do."
    learner(tmp_path).fit()
    path = checkpoint(tmp_path)
    for content in damaged(path.read_bytes()):
        path.write_bytes(content)
        with pytest.raises(ValueError, match='damaged'): train.read_checkpoint(path)
    with pytest.raises(ValueError, match='delete it and train anew'): learner(tmp_path).fit(resume=True)


# ---- what is refused

def test_nothing_to_resume(tmp_path):
    "Resuming needs a checkpoint and a folder; asking for one that is not there makes no folder."
    with pytest.raises(FileNotFoundError, match='nothing to resume'): learner(tmp_path/'none').fit(resume=True)
    assert not (tmp_path/'none').exists()
    with pytest.raises(ValueError, match='give it a `folder`'): learner().fit(resume=True)

def test_a_run_is_not_overwritten(tmp_path):
    "A second run in the folder of a first one is refused, and the first one's checkpoint stays as it was."
    learner(tmp_path).fit()
    before = checkpoint(tmp_path).read_bytes()
    says = r'of step 23: go on with fit\(resume=True\), or give another folder'
    with pytest.raises(FileExistsError, match=says): learner(tmp_path).fit()
    assert checkpoint(tmp_path).read_bytes()==before

@pytest.mark.parametrize('other,says', [
    (dict(batch_size=4), 'batch_size was 8, is 4'),
    (dict(seed=4), 'seed was 3, is 4'),
    (dict(data=Points(49)), "data was 'Batched of 50', is 'Points of 49'"),
    (dict(ema=None), 'ema was 0.9, is None'),
    (dict(steps=24), 'steps was 23, is 24'),
    (dict(optimizer=partial(torch.optim.SGD, momentum=.9)), r'is .SGD\(momentum=0.9\)'),
    (dict(precision='bf16', accumulate=2), "accumulate was 1, is 2; precision was None, is 'bf16'"),
], ids='batch_size seed data ema steps optimizer two'.split())
def test_resume_with_other_settings(tmp_path, other, says):
    "Each setting that is not the same is named, with its two values; the checkpoint stays as it was."
    learner(tmp_path).fit()
    before = checkpoint(tmp_path).read_bytes()
    with pytest.raises(ValueError, match=says): learner(tmp_path, **other).fit(resume=True)
    assert checkpoint(tmp_path).read_bytes()==before

def test_resume_with_another_model(tmp_path):
    "Another model is refused, with the kinds and sizes of both; the checkpoint stays as it was."
    learner(tmp_path).fit()
    before = checkpoint(tmp_path).read_bytes()
    other = learner(tmp_path)
    other.model = nn.Linear(4,1)
    other.ema_model = nn.Linear(4,1)
    with pytest.raises(ValueError, match='model was .Sequential of 65 parameters.*Linear of 5'): other.fit(resume=True)
    assert checkpoint(tmp_path).read_bytes()==before

@pytest.mark.parametrize('name,value', [
    ('steps', 0), ('steps', -5), ('steps', 2.5),
    ('batch_size', 51), ('batch_size', 0),
    ('lr', -.1), ('lr', math.nan),
    ('weight_decay', -1),
    ('warmup', -1),
    ('ema', 1.5),
    ('clip', -1),
    ('accumulate', 0),
    ('schedule', 'step'),
    ('precision', 'half'),
    ('save_every', 0),
    ('log_every', 0),
    ('workers', -1),
    ('folder', __file__),
], ids=str)
def test_bad_arguments(tmp_path, name, value):
    "A value that cannot work is named before anything is done: no folder is made."
    settings = dict(folder=tmp_path/'run')
    settings[name] = value
    with pytest.raises(ValueError, match=f'{name}='): learner(**settings)
    assert not (tmp_path/'run').exists()

@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU')
def test_fp16_needs_a_gpu():
    "Half precision is refused on a CPU."
    with pytest.raises(ValueError, match='needs a GPU'): learner(precision='fp16')

def test_a_loss_that_is_no_dict():
    "A loss function that returns a bare tensor is refused, with what to return."
    def bare(model, batch): return model(batch['x']).mean()
    with pytest.raises(ValueError, match=r'let it return dict\(loss='): learner(loss_fn=bare).fit()


# ---- numbers that are not finite

class Spoilt:
    "The loss; once it is switched on, nan where point 13 is in the batch."
    on = False
    def switch_on(self, learn): self.on = True
    def __call__(self, model, batch):
        out = loss(model, batch)
        if self.on and '13' in batch['name']: out['loss'] = out['loss']*math.nan
        return out

def test_a_loss_that_is_nan_stops_the_run(tmp_path):
    "The error names the step and its batch, also some steps later; the last checkpoint is from before, and finite."
    batches = Batches(Batched(), 8, seed=3)
    m = next(m for m in range(6,99) if 13 in batches.indices(m))     # batch after step 6 that has point 13
    spoilt = Spoilt()
    run = learner(tmp_path, loss_fn=spoilt, save_every=2, cbs=[At(6, spoilt.switch_on)])
    with pytest.raises(FloatingPointError) as error: run.fit()
    last_saved = m//2*2
    assert f'the loss is nan in step {m+1}, whose batch is {batches.indices(m)}' in str(error.value)
    assert f'the checkpoint of step {last_saved} is kept' in str(error.value)
    tensors, rest = state(tmp_path)
    assert rest['step']==last_saved
    for name,tensor in tensors.items(): assert tensor.isfinite().all(), name

def test_weights_that_are_infinite_are_not_saved(tmp_path):
    "Instead of a checkpoint there is an error, which names the step."
    def overflow(learn): learn.params[0].data[0] = math.inf
    run = learner(tmp_path, save_every=4, cbs=[At(4, overflow)])
    with pytest.raises(FloatingPointError, match='weights are no longer finite at step 4'): run.fit()
    assert not checkpoint(tmp_path).exists()


# ---- the log, the average, and models of several parts

def test_log(tmp_path):
    "A row is the mean of the steps since the row before; the file holds the rows; resuming removes what came later."
    each_step = learner(log_every=1).fit().log
    def score(learn): return dict(score=torch.tensor(learn.step*2))
    log = learner(tmp_path, cbs=[SampleCB(10, score)]).fit().log
    assert [row['step'] for row in log]==[5,10,15,20,23]
    assert [row.get('score') for row in log]==[None,20,None,40,46]
    losses = [row['loss'] for row in each_step]
    assert log[0]['loss']==pytest.approx(np.mean(losses[:5]), rel=1e-6)
    assert log[-1]['loss']==pytest.approx(np.mean(losses[20:23]), rel=1e-6)

    lines = (tmp_path/'log.csv').read_text().splitlines()
    assert lines[0]=='step,loss,size,n,grad_norm,lr,score'
    assert len(lines)==6
    assert [float(line.split(',')[1]) for line in lines[1:]]==[row['loss'] for row in log]

    # a run that went on, logged, and was killed before it saved
    with open(tmp_path/'log.csv', 'a') as file: file.write('28,.3,.1,3,')
    learner(tmp_path).fit(resume=True)
    assert (tmp_path/'log.csv').read_text().splitlines()==lines

class Watch(Callback):
    "The first layer's weights after each step, and their average."
    def __init__(self): self.weights, self.averages = [], []
    def after_step(self, learn):
        self.weights.append(learn.model[0].weight.detach().clone())
        self.averages.append(learn.ema_model[0].weight.clone())

def test_average():
    "The average is avg ← β avg + (1-β) weights, with β rising to `ema`; buffers are those of the model."
    watch = Watch()
    run = learner(steps=12, ema=.8, cbs=[watch])
    expected = run.model[0].weight.detach().clone()
    run.fit()
    assert len(watch.weights)==12
    for t,(weights,average) in enumerate(zip(watch.weights, watch.averages, strict=True)):
        β = min(.8, (1+t)/(10+t))
        expected = β*expected + (1-β)*weights
        torch.testing.assert_close(average, expected)
    for buffer,averaged in zip(run.model.buffers(), run.ema_model.buffers(), strict=True):
        assert torch.equal(buffer, averaged)
        assert buffer.abs().sum()>0

def test_tensorboard(tmp_path):
    "TensorBoard shows the losses of the log, at their steps."
    tb = pytest.importorskip('tensorboard.backend.event_processing.event_accumulator')
    log = learner(cbs=[TrackCB('tensorboard', tmp_path)]).fit().log
    shown = tb.EventAccumulator(str(tmp_path/'run')).Reload().Scalars('loss')
    assert [(e.step,e.value) for e in shown]==[(row['step'],pytest.approx(row['loss'])) for row in log]

class TwoParts(nn.Module):
    "A frozen encoder and a decoder; there is no `forward`."
    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(4,4).requires_grad_(False)
        self.decoder = nn.Linear(4,1)
    def encode(self, x): return self.encoder(x)
    def decode(self, z): return self.decoder(z)

def test_loss_that_calls_methods_and_frozen_parts(tmp_path):
    "A loss may call any method of the model; frozen weights stay as they are, and the average is for inference."
    def size(model, batch):
        out = model.decode(model.encode(batch['x']))
        return dict(loss=out.square().mean())
    set_seed(0)
    model = TwoParts()
    encoder_before = model.encoder.weight.clone()
    decoder_before = model.decoder.weight.clone()
    run = Learner(model, Batched(), size, steps=5, batch_size=8, ema=.9, folder=tmp_path, progress=False).fit()
    assert torch.equal(model.encoder.weight, encoder_before)
    assert torch.equal(run.ema_model.encoder.weight, encoder_before)
    assert not torch.equal(model.decoder.weight, decoder_before)
    assert not run.ema_model.training
    assert not any(p.requires_grad for p in run.ema_model.parameters())


# ---- other processes

def start_child(program, *args):
    "Run a program in a new process that knows this file; `args` are its `sys.argv[1:]`."
    program = f'from test_train import *\ntorch.set_num_threads(1)\n{program}'
    env = {**os.environ, 'OMP_NUM_THREADS':'1', 'PYTHONPATH':os.pathsep.join([str(HERE), str(HERE.parent)])}
    call = [sys.executable, '-c', program, *map(str, args)]
    return subprocess.Popen(call, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)

def saved_at(folder):
    "When the checkpoint was written, in nanoseconds; 0 where there is none."
    return checkpoint(folder).stat().st_mtime_ns if checkpoint(folder).exists() else 0

def wait_for_checkpoint(folder, process, after=0):
    "Until the process has written a checkpoint later than `after`; twenty minutes at most."
    start = time.time()
    while saved_at(folder)<=after:
        assert process.poll() is None, process.communicate()[0]
        assert time.time()-start<1200
        time.sleep(.02)

def kill(process):
    process.send_signal(signal.SIGKILL)
    process.communicate()

def endless(folder, workers=0):
    "A run that does not end, and goes on from its checkpoint where there is one."
    run = learner(folder, data=Points(), steps=10**6, schedule='constant', save_every=3, workers=workers)
    run.fit(resume=checkpoint(folder).exists())

@pytest.mark.slow
def test_killed_and_gone_on(tmp_path):
    "A run killed three times, most likely while it saves, ends as one that was never stopped; no half file is left."
    rng = random.Random(0)
    for workers in (0,1,0):
        before = saved_at(tmp_path/'killed')
        child = start_child('endless(sys.argv[1], int(sys.argv[2]))', tmp_path/'killed', workers)
        try:
            wait_for_checkpoint(tmp_path/'killed', child, after=before)
            time.sleep(rng.random())                    # half of its time is saving
            assert child.poll() is None
        finally: kill(child)
    steps = state(tmp_path/'killed')[1]['step']+7
    settings = dict(data=Points(), steps=steps, schedule='constant', save_every=10**6)
    learner(tmp_path/'whole', **settings).fit()
    learner(tmp_path/'killed', **settings).fit(resume=True)
    assert_same_run(tmp_path/'whole', tmp_path/'killed')
    assert not list((tmp_path/'killed').glob('.checkpoint-*'))

@pytest.mark.slow
def test_second_run_in_a_folder_is_refused(tmp_path):
    "While a process trains in a folder, no other can."
    child = start_child('endless(sys.argv[1])', tmp_path)
    try:
        wait_for_checkpoint(tmp_path, child)
        second = learner(tmp_path, data=Points(), steps=10**6, schedule='constant')
        with pytest.raises(RuntimeError, match='another process is training'): second.fit(resume=True)
    finally: kill(child)


# ---- two processes

class Exact(Points):
    "The points as they are."
    def __getitem__(self, i): return dict(x=self.x[i])

def steady(model, batch):
    "A loss in which nothing is random."
    x = batch['x']
    error = model(x)[:,0]-x.sum(1)
    return dict(loss=error.square().mean())

def steady_run(folder, cbs=()):
    "20 steps in which nothing is random but the order; it goes on from its checkpoint where there is one."
    set_seed(0)
    model = nn.Sequential(nn.Linear(4,8), nn.Tanh(), nn.Linear(8,1))
    settings = dict(steps=20, batch_size=8, accumulate=2, lr=.01, warmup=5, ema=.9, log_every=4, progress=False)
    run = Learner(model, Exact(), steady, folder=folder, cbs=cbs, **settings)
    return run.fit(resume=checkpoint(folder).exists())

def whole_and_stopped(folder):
    "What each of the two processes does: one run without a stop, and one that is stopped and resumed."
    steady_run(Path(folder)/'two')
    steady_run(Path(folder)/'two_stopped', cbs=[At(9, stop)])
    steady_run(Path(folder)/'two_stopped')

class SendSignals(Callback):
    "After step 9, in one of the processes: a signal, twice, as a launcher passes on what the terminal sent already."
    def __init__(self, rank, number): self.rank, self.number = rank, number
    def after_step(self, learn):
        if learn.step!=9 or learn.acc.process_index!=self.rank: return
        for _ in range(2): os.kill(os.getpid(), self.number)

def whole_and_signalled(folder):
    "What each of the two processes does: one run without a stop, and runs that a signal to either process ends."
    for number in (signal.SIGINT, signal.SIGTERM): signal.signal(number, signal.default_int_handler)
    steady_run(Path(folder)/'two')
    for rank,number in ((0,signal.SIGTERM), (1,signal.SIGINT)):
        signalled = Path(folder)/f'two_{rank}'
        try: steady_run(signalled, cbs=[SendSignals(rank, number)])
        except Interrupted as stopped: assert stopped.step==9
        else: raise AssertionError('the signal was not heard')
        assert state(signalled)[1]['step']==9
        steady_run(signalled)

def two_processes(folder, function=whole_and_stopped):
    from accelerate import debug_launcher
    debug_launcher(function, (folder,), num_processes=2)

@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    "Two processes with half of each batch do what one does with all of it, also when they are stopped and resumed."
    steady_run(tmp_path/'one')
    child = start_child('two_processes(sys.argv[1])', tmp_path)
    printed = child.communicate(timeout=1200)[0]
    assert child.returncode==0, printed
    assert_same_run(tmp_path/'two', tmp_path/'two_stopped')

    tensors_one, rest_one = state(tmp_path/'one')
    tensors_two, rest_two = state(tmp_path/'two')
    assert rest_one['settings']==rest_two['settings']
    for name,tensor in tensors_one.items():
        if name.startswith('recent'): continue
        torch.testing.assert_close(tensor, tensors_two[name], rtol=1e-4, atol=1e-6)
    for row_one,row_two in zip(rest_one['log'], rest_two['log'], strict=True):
        assert row_one==pytest.approx(row_two, rel=1e-5)

@pytest.mark.slow
def test_a_signal_to_one_of_two_processes(tmp_path):
    "Both save the same step and end; together they go on to the result of a run without a break."
    child = start_child('two_processes(sys.argv[1], whole_and_signalled)', tmp_path)
    printed = child.communicate(timeout=1200)[0]
    assert child.returncode==0, printed
    for rank in (0,1): assert_same_run(tmp_path/'two', tmp_path/f'two_{rank}')
