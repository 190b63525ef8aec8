"Runs that are watched, limited and tried: the options of `fastldm_train` that hold for every recipe."
import subprocess
import sys
from functools import partial
from pathlib import Path
import pytest
import torch
from torch import nn
from commands import run
from fastldm import load
from fastldm.core import *
from fastldm.diffusion import UNet
from fastldm.recipes.stages import RECIPES, every_stage


# ---- a small problem

class Line:
    "y = 2x."
    def __init__(self, n=64): self.x = torch.linspace(-1, 1, n)[:,None]
    def __len__(self): return len(self.x)
    def __getitem__(self, i): return dict(x=self.x[i], y=2*self.x[i])

def line_loss(model, batch): return dict(loss=(model(batch['x'])-batch['y']).square().mean())

learner = partial(Learner, data=Line(), loss_fn=line_loss, steps=60, batch_size=16, log_every=10, progress=False)

# ---- Python

@pytest.mark.slow
def test_compiled_training_takes_the_same_steps():
    "A compiled network is trained to the same weights, and is saved under the same names."
    def net():
        set_seed(0)
        return nn.Sequential(nn.Linear(1,8), nn.SiLU(), nn.Linear(8,1))
    plain = learner(net()).fit()
    try: compiled = learner(net(), compile=True).fit()
    except Exception as error:                                               # torch.compile needs a C++ compiler
        if 'compile' in type(error).__name__.lower() or 'CppCompile' in str(error): pytest.skip(f'no compiler: {error}')
        raise
    for name,value in plain.model.state_dict().items():
        assert torch.allclose(compiled.model.state_dict()[name], value, atol=1e-5)

def test_checkpointing_reaches_every_network_and_no_other_run():
    "`gradient_checkpointing` is switched on in the model that is trained; its average and later models keep theirs."
    class Pair(Module):
        def __init__(self):
            super().__init__()
            self.first = UNet(1, (32,))
            self.second = UNet(1, (32,))
        def forward(self, x): return self.second(self.first(x, torch.zeros(len(x))), torch.zeros(len(x)))
    def loss(model, batch): return dict(loss=model(torch.zeros(1,1,4,4)).square().mean())
    model = Pair()
    learner(model, loss_fn=loss, steps=1, gradient_checkpointing=True).fit()
    assert model.first.gradient_checkpointing and model.second.gradient_checkpointing
    assert not UNet(1, (32,)).gradient_checkpointing

def test_best_weights_survive_a_kill(tmp_path):
    "A run that was interrupted after its best step still ends with the weights of that step."
    class Worse(Callback):
        "From step 30 on, the held-out data are another line."
        def after_step(self, learn):
            if learn.step==30: held_out.x = -held_out.x.abs()+5
        def before_fit(self, learn):
            if learn.step>=30: held_out.x = -torch.linspace(-1, 1, 64)[:,None].abs()+5
    class Stop(Callback):
        def after_step(self, learn): learn.asked_to_stop |= learn.step==50
    def net():
        set_seed(0)
        return nn.Linear(1,1)
    def watched(folder, *cbs): return learner(net(), folder=folder, ema=.9, cbs=[*cbs, HeldOutCB(held_out, every=10)])
    held_out = Line()
    through = watched(tmp_path/'a', Worse()).fit()
    held_out = Line()
    with pytest.raises(Interrupted): watched(tmp_path/'b', Worse(), Stop()).fit()
    resumed = watched(tmp_path/'b', Worse()).fit(resume=True)
    assert through.log==resumed.log
    best = min(through.log, key=lambda row: row['held_out_loss'])['step']
    assert best==20
    for name,value in through.ema_model.state_dict().items():
        assert torch.equal(value, resumed.ema_model.state_dict()[name])

def test_a_run_goes_on_with_another_measure(tmp_path):
    "As runs of a prior do that an earlier version began: what was measured so far does not count."
    class Stop(Callback):
        def after_step(self, learn): learn.asked_to_stop |= learn.step==20
    def level(learn, data, n): return learn.ema_model.bias.item()**2
    set_seed(0)
    run = partial(learner, folder=tmp_path, ema=.9)
    with pytest.raises(Interrupted): run(nn.Linear(1,1), cbs=[HeldOutCB(Line(), every=10, patience=30), Stop()]).fit()
    resumed = run(nn.Linear(1,1), cbs=[HeldOutCB(Line(), every=10, patience=30, measure=level)]).fit(resume=True)
    measured = {row['step']: row['level'] for row in resumed.log if 'level' in row}
    assert min(measured)==30 and level(resumed, None, 0)==pytest.approx(min(measured.values()), abs=1e-9)

class Noted(HeldOutCB):
    "Held-out losses that are told: they fall for two measurements, then rise."
    def after_step(self, learn):
        if not is_due(learn, self.every): return
        learn.record(held_out_loss=abs(learn.step-10.))
        if learn.step==10: self.keep(learn)
        if self.is_over(learn): raise StopTraining

def test_a_run_that_stopped_early_stays_where_it_is(tmp_path):
    "The same call again takes no step more and gives the same weights; the checkpoint is of the last step."
    def run(**how):
        set_seed(0)
        learn = learner(nn.Linear(1,1), folder=tmp_path, cbs=[Noted(Line(), every=5, patience=15)], ema=.5)
        return learn.fit(**how)
    first = run()
    assert first.step==25
    weights = {name: value.clone() for name,value in first.ema_model.state_dict().items()}
    for _ in range(2):
        again = run(resume=True)
        assert again.step==25
        for name,value in again.ema_model.state_dict().items(): assert value.equal(weights[name])

@pytest.mark.parametrize('save_every', [25,1000])
def test_the_checkpoint_has_the_last_average(tmp_path, save_every):
    "Whenever a run was saved: the best weights are put back after the checkpoint was written."
    set_seed(0)
    learn = learner(nn.Linear(1,1), folder=tmp_path, cbs=[Noted(Line(), every=5, patience=15)], ema=.5,
                    save_every=save_every).fit()
    _, tensors = read_checkpoint(learn.checkpoint)
    best = learn.ema_model.state_dict()
    assert not tensors['ema']['weight'].equal(best['weight'])
    assert learn.log[-1]['step']==25

def test_device_by_a_variable(monkeypatch):
    "FASTLDM_DEVICE says where models are loaded; one that is not here is named in the message."
    monkeypatch.setenv('FASTLDM_DEVICE', 'cpu')
    assert load('mnist').device.type=='cpu'
    monkeypatch.setenv('FASTLDM_DEVICE', 'gpu')
    with pytest.raises(ValueError, match="device 'gpu' cannot be used here"): load('mnist')

def test_common_callbacks_end_with_the_block():
    "What stages have in common is gone after the block, also after an error."
    from fastldm.recipes.stages import _COMMON
    with pytest.raises(KeyError):
        with every_stage(Callback(), workers=2): raise KeyError
    assert _COMMON==dict(cbs=(), learner={})

# ---- commands

@pytest.mark.slow
def test_a_trial_goes_through_all_stages(tmp_path):
    "`--quick` ends with a model after twenty steps of each stage; a length that is given holds."
    said = run('fastldm_train', 'digits', '--quick', '--steps', 7, '--out', tmp_path/'mine')
    assert 'done' in said and 'stage 2 of 2' in said
    stages = load(tmp_path/'mine').meta['stages']
    assert stages['autoencoder']['steps']==20 and stages['denoiser']['steps']==7

@pytest.mark.slow
def test_a_deadline_stops_and_the_same_command_goes_on(tmp_path):
    "`--max_minutes` ends a run as Ctrl-C does, at a step from which the same command goes on."
    args = ('fastldm_train', 'digits', '--ae_steps', 100_000, '--out', tmp_path/'mine')
    assert 'minutes are over: stopped at step' in run(*args, '--max_minutes', .01, ok=False)
    checkpoint = tmp_path/'mine/autoencoder/run/checkpoint.safetensors'
    first = read_checkpoint(checkpoint)[0]['step']
    assert 'resuming from step' in run(*args, '--max_minutes', .05, ok=False)
    assert read_checkpoint(checkpoint)[0]['step']>first

@pytest.mark.slow
def test_tensorboard_has_every_stage(tmp_path):
    "`--track tensorboard` writes the log of each stage beside it."
    events = pytest.importorskip('tensorboard.backend.event_processing.event_accumulator')
    run('fastldm_train', 'digits', '--quick', '--track', 'tensorboard', '--out', tmp_path/'mine')
    for stage in ('autoencoder','denoiser'):
        folder, = (tmp_path/'mine'/stage/'run').glob('mine-*')
        assert [e.step for e in events.EventAccumulator(str(folder)).Reload().Scalars('loss')]==[20]

def test_options_that_cannot_work(tmp_path):
    "A device, a tracker or a time that cannot be used is refused before anything is written."
    out = tmp_path/'mine'
    assert "device 'gpu'" in run('fastldm_train', 'digits', '--out', out, '--device', 'gpu', ok=False)
    said = run('fastldm_train', 'digits', '--out', out, '--track', 'tensorbord', ok=False)
    assert "unknown tracker 'tensorbord'" in said
    assert 'above 0' in run('fastldm_train', 'digits', '--out', out, '--max_minutes', 0, ok=False)
    assert 'steps=0: expected' in run('fastldm_train', 'digits', '--out', out, '--steps', 0, ok=False)   # it is given
    assert not out.exists()

def test_a_trial_of_any_recipe_is_short():
    "Every length of every recipe is cut."
    from fastldm.recipes.commands import quick_options
    for name,train in RECIPES.items():
        for option,value in quick_options(train).items():
            if option=='autoencoder': value = value['steps']
            assert value in (1,20) or option=='n' or set(value)=={20}, (name, option)
    assert 'path_steps' not in quick_options(RECIPES['distil'])             # of paths they are no length of training
    assert quick_options(RECIPES['emoji'])['autoencoder']['steps']==20

# ---- several recipes within a time

@pytest.mark.slow
def test_several_recipes_within_a_time(tmp_path):
    "Each gets its share, says how fast it was, and goes on when the same command is given again."
    script = Path(__file__).parents[1]/'scripts/train_all.py'
    def train(*options):
        return subprocess.run([sys.executable, script, *options, '--out', tmp_path], capture_output=True, text=True)
    first = train('digits_evaluator', '--quick', '--minutes', '.001')
    assert first.returncode==0 and 'its time is over' in first.stdout, first.stderr
    again = train('digits_evaluator', '--quick', '--minutes', '100')
    assert 'resuming from step' in again.stdout+again.stderr
    assert 'digits_evaluator: step 23 of 23' in again.stdout and 'of peak' in again.stdout
    assert 'its time is over' not in again.stdout
    wrong = train('digit', '--minutes', '1')
    assert wrong.returncode==2 and 'Traceback' not in wrong.stderr and "'digits'" in wrong.stderr
