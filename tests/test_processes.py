"""Two and four processes of this machine, by gloo: they train what one process trains, score what it scores, and go on
with what others began."""
import importlib, itertools, json, os, subprocess, sys
from contextlib import suppress
from functools import partial
from pathlib import Path
import pytest, torch
from accelerate import debug_launcher
from torch.multiprocessing.spawn import ProcessExitedException
from fastldm.codes import Blip, PixelSNAIL, blip_loss, pixelsnail_loss
from fastldm.control import ControlAdapter, control_loss, random_region
import fastldm.core.processes as processes
from fastldm.core import (Callback, HeldOutCB, Learner, ShardedLearner, StopTraining, process_share, read_checkpoint,
                          rows_of_batch, set_seed)
from fastldm.core.processes import map_parts, shared_work
from fastldm.core.rows import write_rows
from fastldm.data import Digits
from fastldm.diffusion import (Autoencoder, Conditioner, Cosine, Denoiser, LabelEmbedder, LatentDataset,
                               LatentDiffusion, UNet, autoencoder_loss, diffusion_loss, distill_loss, make_student)
from fastldm.diffusion.unet import ResBlock
from fastldm.recipes import eval_cli

class StopAt(Callback):
    def __init__(self, step): self.step = step
    def after_step(self, learn):
        if learn.step==self.step: raise StopTraining

def autoencoder():
    "Digits to latents, with noise."
    return Autoencoder(c_latent=2, channels=(8,), kl=True), Digits(), autoencoder_loss(kl_weight=1e-2)

def denoiser():
    "Noisy latents that are mirrored, under labels, some of which are left out."
    first = Autoencoder(c_latent=2, channels=(8,), kl=True).eval()
    latents = LatentDataset(Digits(split='test'), first, flip=True, progress=False)
    conditioner = Conditioner(drop=.3, label=LabelEmbedder(10, 32))
    return Denoiser(UNet(2, (16,), 1, d_emb=32), Cosine(), conditioner), latents, diffusion_loss

class Codes:
    "Made-up codes that say of which digit they are."
    def __len__(self): return 256
    def __getitems__(self, idxs):
        i = torch.tensor(idxs)
        codes = (i[:,None]*torch.arange(1, 17)%7).view(-1,4,4)
        return dict(codes=[codes], text=(i[:,None,None]%10/10).expand(-1,3,4))

def prior():
    "Codes under texts, some of which are left out."
    return PixelSNAIL(8, (4,4), 16, d_text=4, drop_text=.3, dropout=0.), Codes(), pixelsnail_loss(0)

class Captioned:
    "Digits in colour with captions of different lengths; one in five is known to be wrong, another has no words."
    def __init__(self): self.digits = Digits()
    def __len__(self): return 256
    def __getitems__(self, idxs):
        batch = self.digits.__getitems__(idxs)
        numbers = batch['label'].tolist()
        captions = [' '.join(['a digit that is', *['very']*(i%4), str(number)]) for i,number in zip(idxs, numbers)]
        captions = ['' if i%5==1 else caption for i,caption in zip(idxs, captions)]
        return dict(image=batch['image'].expand(-1,3,-1,-1), caption=captions, fits=torch.tensor([i%5>0 for i in idxs]))

def text_encoder():
    "All objectives of BLIP: contrast and hard negatives are of the whole batch, words are more or fewer."
    data = Captioned()
    model = Blip.small(data.__getitems__([*range(64)])['caption'], 16, 8, 24, (1,1), 2, dropout=0., stem=False)
    def hard_negatives(caption, seed): return f'{caption[:-1]}{seed%10}'
    def paraphrases(caption, seed): return caption.replace('a digit', f'{seed%3} digit')
    return model, data, blip_loss(match='fits', hard_negatives=hard_negatives, paraphrases=paraphrases,
                                  smoothing=.1, reconstruct=.5)

class Controls:
    "Latents with a picture to follow, and a region drawn at random."
    def __init__(self, latents): self.latents = latents
    def __len__(self): return len(self.latents)
    def __getitems__(self, idxs):
        batch = self.latents.__getitems__(idxs)
        control = batch['latent'][:,:1].repeat_interleave(4, 2).repeat_interleave(4, 3)
        return dict(batch, control=control, region=rows_of_batch(lambda n: random_region(n, 32), len(idxs)))

def adapter():
    "Features for a base that stays as it is, with its labels left out at times."
    base, latents, _ = denoiser()
    return ControlAdapter(['edges'], 1, (16,), 4), Controls(latents), control_loss(base)

class Paths:
    "Made-up paths of a teacher with labels."
    def __len__(self): return 256
    def __getitems__(self, idxs):
        i = torch.tensor(idxs)
        path = torch.sin(i[:,None]+torch.arange(5*2*4*4)).view(-1,5,2,4,4)
        return dict(path=path, label=i%10, guidance=(i%3)[:,None].float())

def student():
    "Jumps along paths: how many is drawn once for a batch, which one for each path."
    teacher, _, _ = denoiser()
    return make_student(teacher), Paths(), distill_loss

def one_token():
    "Attention to one token, whose queries get no gradient."
    _, latents, _ = denoiser()
    conditioner = Conditioner(drop=0., label=LabelEmbedder(10, 16, token=True))
    net = UNet(2, (16,), 1, d_emb=32, attention=['cross'], d_context=16)
    return Denoiser(net, Cosine(), conditioner), latents, diffusion_loss

STAGES = dict(autoencoder=autoencoder, denoiser=denoiser, prior=prior, text_encoder=text_encoder, adapter=adapter,
              student=student, divided=denoiser, one_token=one_token)

def falls_on_average(learn, data, n):
    "A measure that falls as the mean of all processes, and rises in the last of them."
    rank, world = process_share()
    return learn.step*(4*rank-2*(world-1)-1)

def check_share_of_weights(learn):
    "Each process has its part of the weights, of their average and of the optimiser's state."
    state = learn.opt.state_dict()['state'].values()
    moments = [value for of_weight in state for value in of_weight.values() if value.ndim]
    for tensors in (learn.model.parameters(), learn.ema_model.parameters(), moments):
        tensors = list(tensors)
        total = sum(t.numel() for t in tensors)
        own = sum(getattr(t, 'to_local', lambda t=t: t)().numel() for t in tensors)
        assert abs(own/total*learn.acc.num_processes-1)<.05

def train(*folders, until=None):
    "Eight steps of each stage, or to the step `until`; goes on from the checkpoint where there is one."
    torch.set_num_threads(1)
    for folder,(name,build) in itertools.product(folders, STAGES.items()):
        set_seed(0)
        model, data, loss_fn = build()
        cbs = [] if until is None else [StopAt(until)]
        if name=='one_token': cbs += [HeldOutCB(data, every=1, patience=2, measure=falls_on_average)]
        learner = partial(ShardedLearner, blocks=[ResBlock]) if name=='divided' else Learner
        learn = learner(model, data, loss_fn, steps=8, batch_size=16, ema=.9, log_every=1, warmup=3, cbs=cbs,
                        folder=Path(folder)/name, progress=False)
        learn.fit(resume=learn.checkpoint.exists())
        if name=='divided': check_share_of_weights(learn)

def begin(folder): train(folder, until=5)

def score(file):
    "What `fastldm_eval mnist` does."
    eval_cli('mnist', n=24, steps=2, out=file)

def die_while_scoring(file):
    "The second process ends in its second part of the pictures."
    decode = LatentDiffusion.decode
    calls = []
    def decode_once(self, z):
        if len(z)>1: calls.append(z)
        if len(calls)>1: os._exit(1)
        return decode(self, z)
    if process_share()[0]==1: LatentDiffusion.decode = decode_once
    score(file)

def score_nothing_together(file):
    "An evaluation of one's own in which each process would do the same; what it ends with, by each."
    def evaluate_alone(self, n=0, steps=0, seed=0): return dict(score=1.)
    LatentDiffusion.evaluate_command = evaluate_alone
    try: score(file)
    except SystemExit as end: Path(f'{file}-{process_share()[0]}').write_text(str(end))

def on_processes(folder):
    "All of it on two processes; and the same begun by four and ended by two."
    torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))]).step()                # so that forks need not import it
    for name in ('torch._dynamo','accelerate.utils','transformers.models.blip.modeling_blip','torch_fidelity',
                 'torch.distributed.fsdp'):
        importlib.import_module(name)
    with suppress(ProcessExitedException):
        debug_launcher(die_while_scoring, (f'{folder}/resumed.json',), num_processes=4)
    assert any(Path(f'{folder}/resumed.json.parts').glob('00-*'))
    for name in ('two','resumed'): debug_launcher(score, (f'{folder}/{name}.json',), num_processes=2)
    debug_launcher(score_nothing_together, (f'{folder}/refused.json',), num_processes=2)
    debug_launcher(begin, (f'{folder}/four_then_two',), num_processes=4)
    debug_launcher(train, (f'{folder}/two', f'{folder}/four_then_two'), num_processes=2)

@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    "The folder of the runs, made by one process, and by several in a child."
    folder = tmp_path_factory.mktemp('processes')
    train(folder/'one')
    program = f'import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); from test_processes import *; '
    done = subprocess.run([sys.executable, '-c', f'{program}on_processes({str(folder)!r})'],
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=600)
    assert done.returncode==0, done.stdout[-3000:]
    (folder/'output.txt').write_text(done.stdout)
    return folder

@pytest.mark.slow
@pytest.mark.parametrize('stage', STAGES)
@pytest.mark.parametrize('processes', ['two','four_then_two'])
def test_the_run_of_one_process(runs, stage, processes):
    "The loss of each step is that of one process, also where two went on with what four began."
    def losses_of(run):
        state, _ = read_checkpoint(runs/run/stage/'checkpoint.safetensors')
        return [row['loss'] for row in state['log']]
    losses, others = losses_of('one'), losses_of(processes)
    assert len(losses)==8
    assert others==pytest.approx(losses, rel=1e-4)

@pytest.mark.slow
def test_the_scores_of_one_process(runs, capfd):
    "Two processes compute the scores of one, also where four began and one of these died; nothing is left beside them."
    eval_cli('mnist', n=24, steps=2, out=runs/'one.json')
    one, two, resumed = (json.loads((runs/f'{name}.json').read_text()) for name in ('one','two','resumed'))
    assert one.keys()==two.keys()
    speed = 'images_per_second'                                        # unknown where parts were there
    assert speed not in resumed
    for scores in (one, two): scores.pop(speed)
    assert two==pytest.approx(one, rel=1e-4)
    assert resumed==pytest.approx(one, rel=1e-4)
    assert not list(runs.glob('*.parts'))
    assert (runs/'output.txt').read_text().count('label_accuracy')==2  # the first process prints, once

@pytest.mark.slow
def test_an_evaluation_that_divides_nothing(runs):
    "It is refused, and nothing is written."
    said = [(runs/f'refused.json-{rank}').read_text() for rank in range(2)]
    assert all('divides nothing among processes, and 2 would do the same' in text for text in said)
    assert not (runs/'refused.json').exists()


# --- parts in a folder, by one process

def as_tensor(rows): return torch.arange(rows.start, rows.stop)
def as_list(rows): return [f'item {i}' for i in range(rows.start, rows.stop)]
def as_dict(rows): return dict(words=as_list(rows), bytes=as_tensor(rows).byte(), floats=as_tensor(rows)/7)
def as_dict_of_rows(rows): return dict(rows=as_tensor(rows))
def as_dict_of_a_list(rows): return dict(rows=as_list(rows))

def same(one, other):
    "Whether two results are equal, in type and order, too."
    if type(one) is not type(other): return False
    if isinstance(one, dict): return [*one]==[*other] and all(same(one[name], other[name]) for name in one)
    return torch.equal(one, other) and one.dtype==other.dtype if torch.is_tensor(one) else one==other

@pytest.mark.parametrize('fn', [as_tensor, as_list, as_dict, as_dict_of_rows, as_dict_of_a_list])
def test_what_is_read_is_what_was_computed(tmp_path, fn):
    "The same object in the same order, whatever it is, and also outside of `shared_work`."
    found = []
    for _ in range(2):
        with shared_work(tmp_path/'parts') as work: found.append(map_parts(fn, 20, 3))
    assert work.n_read==7                                              # all parts, none computed again
    for other in found: assert same(map_parts(fn, 20, 3), other)

@pytest.mark.parametrize('damage', ['cut','bit','empty','of an earlier version'])
def test_a_damaged_part_is_computed_again(tmp_path, damage):
    with shared_work(tmp_path) as work: map_parts(as_dict, 20, 3)
    file = sorted(tmp_path.glob('0*.safetensors'))[2]
    whole = file.read_bytes()
    if damage=='of an earlier version': write_rows(file, 3, [as_dict(slice(6, 9))])
    else: file.write_bytes(dict(cut=whole[:-3], bit=whole[:-3]+b'x'+whole[-2:], empty=b'')[damage])
    with pytest.warns(UserWarning, match='is damaged and computed again'):
        with shared_work(tmp_path) as work: found = map_parts(as_dict, 20, 3)
    assert work.n_read==6 and same(found, map_parts(as_dict, 20, 3))
    assert file.read_bytes()==whole

def test_parts_that_were_read_are_where_they_were_computed(tmp_path, monkeypatch):
    "On the kind of device that is written beside them; on the CPU of a computer that has none of the kind."
    with monkeypatch.context() as patch:
        patch.setattr(processes, '_device_of', lambda rows: 'meta')
        with shared_work(tmp_path/'a'): assert map_parts(as_tensor, 20, 3).device.type=='meta'
    with shared_work(tmp_path/'a') as work: assert map_parts(as_tensor, 20, 3).device.type=='meta'
    assert work.n_read==7
    absent = 'cuda' if not torch.cuda.is_available() else 'xpu'
    monkeypatch.setattr(processes, '_device_of', lambda rows: absent)
    with shared_work(tmp_path/'b'): assert map_parts(as_tensor, 20, 3).device.type=='cpu'

WRONG_ROWS = {'tuple': ((1,2), 'a tuple'), 'number': (7, 'a int'), 'nothing': (None, 'a NoneType'),
              'text': ('ab', 'a str'), 'dict in a dict': (dict(a=dict(b=[1,2])), 'a dict'),
              'too few': ([1], '1 rows: expected the 2'), 'one number': (torch.tensor(2.), '0 rows'),
              'too many': (dict(a=[1,2], b=torch.ones(3)), '3 rows')}

@pytest.mark.parametrize('wrong', WRONG_ROWS)
@pytest.mark.parametrize('shared', [None,'memory','folder'])
def test_a_function_that_returns_something_else(tmp_path, wrong, shared):
    "It is refused at its first part, wherever parts are kept."
    found, message = WRONG_ROWS[wrong]
    def run():
        if shared is None: return map_parts(lambda rows: found, 16, 2)
        with shared_work(tmp_path if shared=='folder' else None): map_parts(lambda rows: found, 16, 2)
    with pytest.raises(ValueError, match=message): run()
