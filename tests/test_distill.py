"Students for few calls: the loss, their training by recipe, saving and loading, seeds, and what is refused."
import json
from contextlib import redirect_stderr, redirect_stdout
from copy import deepcopy
from io import StringIO
import pytest, torch
from PIL import Image
from safetensors.torch import load_file, save_file
from fastldm import load
from fastldm.control import ControlAdapter, control
from fastldm.core import Callback, Module, fingerprint, load_model, read_settings
from fastldm.diffusion import (Conditioner, Cosine, Denoiser, GaussianDenoiser, LabelEmbedder, LatentDiffusion,
                               NumberEmbedder, PathDataset, UNet, angle_times, ddim_step, distill_loss, make_student,
                               noise_from, noise_like, path_points, record_paths, sample, sample_generators, save,
                               vary, with_calls)
from fastldm.data import Pictures
from fastldm.recipes import distil, figures, path_conditions, sample_cli, train_cli, train_student

class Same(Module):
    "An autoencoder that changes nothing."
    scale, shift = torch.ones(()), torch.zeros(())
    def encode(self, x): return x
    def decode(self, z): return z.clamp(-1, 1)
    def decode_raw(self, z): return z

def teacher_of(conditions=True, schedule=None):
    "A small latent diffusion with random weights."
    torch.manual_seed(0)
    net = UNet(1, (8,16), d_emb=16)
    for p in net.parameters(): p.data += .05*torch.randn_like(p)
    conditioner = Conditioner(label=LabelEmbedder(3, 16)) if conditions else None
    return LatentDiffusion(Same(), Denoiser(net, schedule or Cosine(), conditioner), (1,8,8), steps=4).eval()

def with_student(ldm):
    "The model with a student whose guidance does something."
    student = make_student(ldm.denoiser).eval()
    for name in ('guidance','calls'):
        if name in student.conditioner.embedders:
            torch.nn.init.normal_(student.conditioner.embedders[name].proj.weight)
    for p in student.net.parameters(): p.data += .02*torch.randn_like(p)
    student.meta = dict(teacher_fingerprint=fingerprint(ldm.denoiser), guidance=[1.,3.], calls=[1,2,4])
    return ldm.add_student(student)

@pytest.fixture
def ldm(): return with_student(teacher_of())

@pytest.fixture
def base(tmp_path):
    "A teacher in a folder."
    return save(teacher_of(), tmp_path/'base', data='digits')

FEW = dict(n=12, path_steps=2, steps=4, batch_size=4, progress=False)


# ---- drawing

@pytest.mark.parametrize('calls', [1,2,4])
def test_same_seed_same_picture(ldm, calls):
    "In any batch, alone or in company."
    labels = [0,1,2,None,1]
    x = ldm.sample(5, label=labels, calls=calls, seed=3, guidance_scale=2.)
    assert x.shape==(5,1,8,8) and x.min()>=0 and x.max()<=1
    torch.testing.assert_close(ldm.sample(5, label=labels, calls=calls, seed=3, guidance_scale=2., batch_size=2), x,
                               atol=1e-5, rtol=0)
    alone = ldm.sample(2, label=labels[3:], calls=calls, seed=3, first=3, guidance_scale=2.)
    torch.testing.assert_close(alone, x[3:], atol=1e-5, rtol=0)
    assert (ldm.sample(5, label=labels, calls=calls, seed=4, guidance_scale=2.)-x).abs().max()>.05

def test_calls_are_counted(ldm):
    "`calls=4` calls the network four times, a row a picture, whatever the guidance, and tells it the number."
    rows = []
    hook = ldm.student().net.register_forward_hook(lambda net,given,out: rows.append(len(out)))
    ldm.sample(3, label=1, calls=4, guidance_scale=3., seed=0)
    hook.remove()
    assert rows==[3,3,3,3]

def test_it_is_ddim(ldm):
    "Steps of DDIM at even angles, with the number of calls and the scale as conditions."
    student = ldm.student()
    batch = dict(label=torch.tensor([0,1]), guidance=torch.full((2,1), 1.))
    cond = student.conditioner(with_calls(batch, 2, 2))
    ts = angle_times(Cosine(), 2)
    generators = sample_generators(5, 2)
    with noise_from(generators): x = noise_like(torch.empty(2, 1, 8, 8))
    z = sample(student, x, ts, ddim_step, cond)
    drawn = ldm.sample(2, label=[0,1], calls=2, guidance_scale=2., seed=5, latents=True)
    torch.testing.assert_close(drawn, z, atol=1e-4, rtol=0)

def test_the_scale_is_a_condition(ldm):
    "Another guidance scale, another picture; without a condition there is nothing to guide."
    def draw(w, **conditions): return ldm.sample(2, calls=1, seed=0, guidance_scale=w, **conditions)
    assert (draw(1., label=1)-draw(3., label=1)).abs().max()>1e-3
    assert torch.equal(draw(1.), draw(3.))
    assert torch.equal(draw(2.), draw(2., label=None))

def test_an_adapter_of_the_teacher_works_on_the_student(ldm):
    "A student that has learned nothing yet draws with an adapter what the teacher draws with it."
    student = make_student(ldm.denoiser).eval()
    student.meta = ldm.student().meta
    ldm.add_student(student)
    adapter = ControlAdapter(['ink'], 1, (8,16), factor=1)
    for p in adapter.parameters(): torch.nn.init.normal_(p, std=.2)
    picture = torch.rand(3, 1, 8, 8)
    constraint = control(adapter, picture)
    asked = dict(label=[0,1,2], seed=4, latents=True)
    by_teacher = ldm.sample(3, steps=4, step='ddim_step', times='angle_times', constraint=constraint, **asked)
    by_student = ldm.sample(3, calls=4, constraint=constraint, **asked)
    torch.testing.assert_close(by_student, by_teacher, atol=1e-5, rtol=0)
    assert (by_student-ldm.sample(3, calls=4, **asked)).abs().max()>.01
    one = ldm.sample(1, calls=4, label=1, seed=4, latents=True, first=1, constraint=control(adapter, picture[1]))
    torch.testing.assert_close(one, by_student[1:2], atol=1e-5, rtol=0)

def test_the_callback_sees_each_call(ldm):
    times = []
    ldm.sample(1, label=0, calls=2, seed=0, callback=lambda x,t,s: times.append(float(s)))
    assert times==[pytest.approx(.5, abs=1e-3), 0.]

def test_guidance_at_the_times_that_the_student_learned(ldm):
    "Named or not, they are the same; on the card of a recipe's student; and its paths end where the teacher's do."
    asked = dict(label=[0,1], calls=2, seed=0, guidance_scale=3.)
    ldm.student().meta['interval'] = [.2,.7]
    for interval in ((.2,.7), [.2,.7], (0.,1.)):
        assert torch.equal(ldm.sample(2, **asked, interval=interval), ldm.sample(2, **asked))
    with pytest.raises(ValueError, match=r'interval=\(0.2, 0.8\): the student was trained with guidance at \(0.2, 0.7'):
        ldm.sample(2, **asked, interval=(.2,.8))

def test_paths_guided_at_some_times(base, tmp_path):
    ldm = load(base)
    paths = PathDataset(ldm.denoiser, ldm.shape, dict(label=torch.tensor([1])), 2, 8, (3.,3.), (.2,.7), progress=False)
    start = dict(latents=paths.fields['path'][:,0].float(), label=paths.fields['label'], guidance_scale=3.)
    how = dict(steps=8, step='DPMSolver2M', times='angle_times')
    ends = [ldm.sample(2, **start, **how, interval=interval) for interval in ((.2,.7), (0.,1.))]
    recorded = (paths.fields['path'][:,-1].float().clamp(-1, 1)+1)/2
    assert (ends[0]-recorded).abs().max()<.01<(ends[1]-recorded).abs().max()
    student = train_student(base, tmp_path/'student', **FEW, interval=(.2,.7)).student()
    assert student.meta['interval']==[.2,.7]
    with pytest.raises(ValueError, match='expected two times from 0'):
        train_student(base, tmp_path/'other', **FEW, interval=(.7,.2))
    assert not (tmp_path/'other').exists()

def test_a_picture_of_few_calls_names_its_scale(ldm, tmp_path):
    "Also where none was given; so whatever draws it again draws the same."
    folder = save(ldm, tmp_path/'model', data='digits')
    file = tmp_path/'drawn.png'
    sample_cli(str(folder), calls=2, n=1, label='1', out=str(file))
    settings = read_settings(file)
    assert (settings['calls'], settings['guidance_scale'])==(2, 1.) and 'steps' not in settings
    sample_cli(like=str(file), out=str(tmp_path/'again.png'))
    assert file.read_bytes()==(tmp_path/'again.png').read_bytes()

def test_saved_again_and_again(ldm, tmp_path):
    "Rounded once, the weights of a student stay the same, but for the last digits of a sum."
    once = load(save(ldm, tmp_path/'0')).student()
    for i in range(1, 6): ldm = load(save(ldm, tmp_path/str(i)))
    for before,after in zip(once.parameters(), ldm.student().parameters()):
        torch.testing.assert_close(after, before, atol=1e-6, rtol=0)

def test_a_model_in_16_bit_keeps_its_student(ldm, tmp_path):
    "Its weights are rounded, so they are others than those that the student was trained for."
    asked = dict(label=[0,1], calls=2, seed=0)
    exact = ldm.sample(2, **asked)
    ldm.student()
    rounded = load(save(ldm.bfloat16(), tmp_path/'model'))
    torch.testing.assert_close(rounded.sample(2, **asked), exact, atol=.1, rtol=0)

@pytest.mark.parametrize('damage', [
    lambda about: [], lambda about: {'calls': [1]}, lambda about: about|dict(calls=None),
    lambda about: about|dict(calls=[0]),
    lambda about: about|dict(guidance=[3,1]), lambda about: about|dict(interval='x')])
def test_a_damaged_record_is_refused(ldm, tmp_path, damage):
    file = save(ldm, tmp_path/'model')/'student'/'student.json'
    file.write_text(json.dumps(damage(json.loads(file.read_text()))))
    with pytest.raises(ValueError, match='fetch or train it again'): load(tmp_path/'model').sample(1, label=0, calls=1)

@pytest.mark.parametrize('eight_bits', [False, True])
def test_a_unit_that_is_no_number_is_refused(ldm, tmp_path, eight_bits):
    "Of a file of today, and of one from before."
    file = save(ldm, tmp_path/'model')/'student'/'difference.safetensors'
    saved = load_file(file)
    name = next(name for name in saved if f'{name}:unit' in saved)
    if eight_bits: saved[name] = torch.zeros_like(ldm.student().state_dict()[name], dtype=torch.int8)
    saved[f'{name}:unit'][0] = float('nan')
    save_file(saved, file)
    with pytest.raises(ValueError, match='not finite'): load(tmp_path/'model').sample(1, label=0, calls=1)

def test_a_student_that_is_no_numbers_is_not_saved(ldm, tmp_path):
    next(ldm.student().parameters()).data[0] = float('nan')
    with pytest.raises(ValueError, match='nan or inf'): save(ldm, tmp_path/'model')
    assert not (tmp_path/'model'/'student').exists()

@pytest.mark.parametrize('asked, message', [
    (dict(calls=0), 'calls=0'),
    (dict(calls=1.5), 'calls=1.5'),
    (dict(calls=3), 'expected one of 1, 2, 4'),
    (dict(calls=2, step='ddim_step'), 'cannot be chosen with `calls`'),
    (dict(calls=2, times='angle_times'), 'cannot be chosen with `calls`'),
    (dict(calls=2, constraint=vary(torch.zeros(1,1,8,8), .5)), 'Variation takes `steps`'),
    (dict(calls=2, steps=4), 'give one of the two'),
    (dict(calls=2, guidance_scale=4.), 'at least 1 and at most 3'),
    (dict(calls=2, guidance_scale=.5), 'without `calls`, any is possible'),
    (dict(calls=2, guidance_scale=dict(label=2.)), 'one number for all conditions'),
    (dict(calls=2, interval=(.1,.8)), 'the student was trained with guidance at'),
    (dict(calls=2, order=['label']), 'cannot be chosen with `calls`'),
    (dict(calls=2, label=7), 'label=7 is out of range'),
    (dict(calls=2, guidance=2.), 'guidance'),
    (dict(nfe=2), 'did you mean calls?'),
])
def test_bad_input_is_refused(ldm, asked, message):
    with pytest.raises(ValueError, match=message.replace('?', r'\?')): ldm.sample(2, **dict(label=1)|asked)

def test_no_student(tmp_path):
    "A model without one says so in a sentence; a student of other weights is refused."
    ldm = teacher_of()
    with pytest.raises(ValueError, match='this model has no student for few calls'): ldm.sample(1, calls=2)
    student = with_student(teacher_of()).student()
    for p in ldm.denoiser.parameters(): p.data += .1
    with pytest.raises(ValueError, match='was trained for weights'): ldm.add_student(student)
    with pytest.raises(ValueError, match='was trained for weights None'): ldm.add_student(make_student(ldm.denoiser))

def test_a_model_without_conditions():
    ldm = with_student(teacher_of(conditions=False))
    x = ldm.sample(3, calls=2, seed=0)
    torch.testing.assert_close(ldm.sample(3, calls=2, seed=0, batch_size=1), x, atol=1e-5, rtol=0)


# ---- on disk

def test_saved_and_loaded(ldm, tmp_path):
    "The student is beside the model, whose weights and fingerprint are as they were."
    folder = save(ldm, tmp_path/'m')
    assert sorted(f.name for f in folder.iterdir())==['config.json','model.safetensors','student']
    plain = save(teacher_of(), tmp_path/'plain')
    assert fingerprint(load(plain))==fingerprint(load(folder))
    assert not load(plain).has_student and load(folder).has_student
    x = ldm.sample(2, label=1, calls=2, seed=0, guidance_scale=2.)
    torch.testing.assert_close(load(folder).sample(2, label=1, calls=2, seed=0, guidance_scale=2.), x, atol=.02, rtol=0)
    assert sum(f.stat().st_size for f in (folder/'student').iterdir())<1.5*sum(
        p.numel() for p in ldm.denoiser.parameters())+9000              # a byte a weight, and a little
    (folder/'student'/'difference.safetensors').write_bytes(b'damaged')
    with pytest.raises(ValueError, match='fetch or train it again'): load(folder).sample(1, calls=2)
    folder = save(ldm, tmp_path/'m')
    again = save(load(folder), tmp_path/'again')
    assert fingerprint(load(again).student())==fingerprint(load(folder).student())

def test_a_students_precision_is_the_models(ldm, tmp_path):
    "Also where the student is read only after the model was converted."
    folder = save(ldm, tmp_path/'m')
    coarse = load(folder).bfloat16().sample(2, label=1, calls=2, seed=0)
    torch.testing.assert_close(coarse.float(), ldm.sample(2, label=1, calls=2, seed=0), atol=.1, rtol=0)
    for model in (deepcopy(ldm).double(), deepcopy(ldm).bfloat16()):
        x = model.sample(2, label=1, calls=2, seed=0)
        torch.testing.assert_close(x.float(), ldm.sample(2, label=1, calls=2, seed=0), atol=.1, rtol=0)


# ---- learning

class Known(Denoiser):
    "Walks the paths of one Gaussian, which keep their quantile, in jumps of any length."
    def forward(self, x, t, cond=None):
        calls = 2**cond.vector[:,:1]
        angle = Cosine()._angle(t.double()).view(-1, 1)
        here, there = (self.moments(a) for a in (angle, angle-Cosine()._angle(torch.ones(1).double())/calls))
        landing = there['mean'] + (x-here['mean'])*there['std']/here['std']
        (α,σ),(α_s,σ_s) = ((m['α'],m['σ']) for m in (here,there))
        return (σ*landing-σ_s*x)/(σ*α_s-σ_s*α)
    def moments(self, angle):
        α, σ = angle.cos(), angle.sin().clamp(min=0)
        return dict(α=α, σ=σ, mean=α, std=((.5*α)**2+σ**2).sqrt())

class Numbers(torch.nn.Linear):
    "A network with nothing but an embedding of two numbers."
    d_emb = 2

@pytest.mark.parametrize('calls', [1,2,4])
def test_loss_of_the_exact_jumps(calls):
    "One that walks along the path has no loss; the mean of all data, which is the teacher's answer, has some."
    perfect = GaussianDenoiser(Cosine(30.), mean=torch.tensor([[1.]]).double(), std=.5)
    paths = record_paths(perfect, torch.randn(50, 1).double(), steps=64)
    student = make_student(Denoiser(Numbers(1, 1).double(), Cosine(30.)))
    torch.nn.init.ones_(student.conditioner.embedders['calls'].proj.weight)
    exact = Known(student.net, Cosine(30.), student.conditioner)
    assert distill_loss(exact, dict(path=paths), calls=(calls,))['loss']<.01
    class Mean(Denoiser):
        def forward(self, x, t, cond=None): return perfect(x, t)
    mean = Mean(student.net, Cosine(30.), student.conditioner)
    assert distill_loss(mean, dict(path=paths), calls=(calls,))['loss']>.02

def test_points_between_recorded_ones():
    path = torch.tensor([[0.,1.,4.],[0.,10.,20.]])
    assert path_points(path, torch.tensor([.5,.25])).tolist()==[1.,5.]
    assert path_points(path, torch.tensor([1.,0.])).tolist()==[4.,0.]
    assert path_points(path, torch.tensor([.75,.75])).tolist()==[2.5,15.]

def test_no_condition_is_left_out_of_a_path():
    "What a path was recorded with is what the student is given."
    ldm = teacher_of()
    paths = PathDataset(ldm.denoiser, ldm.shape, dict(label=torch.arange(3)), n=30, steps=2, progress=False)
    student = make_student(ldm.denoiser).train()
    batch = paths[torch.arange(30)]
    def loss():
        torch.manual_seed(0)
        return distill_loss(student, batch)['loss']
    assert torch.equal(loss(), loss())
    assert (batch['label']==3).any()                                # the null label, as in training

@pytest.mark.parametrize('drop,drop_all', [(.3,.1), (.3,0.), (0.,.5), ({'label':.2},.25)])
def test_conditions_are_left_out_of_paths_as_in_training(drop, drop_all):
    "Each as often, and all together as often, as the teacher's conditioner does it."
    conditioner = Conditioner(drop=drop, drop_all=drop_all, label=LabelEmbedder(3, 16), style=LabelEmbedder(3, 16))
    teacher = Denoiser(UNet(1, (8,16), d_emb=16), Cosine(), conditioner)
    n = 6000
    raw = dict(label=torch.zeros(n).long(), style=torch.zeros(n).long())
    seen = []                                                       # by the embedders, in training
    for embedder in conditioner.embedders.values():
        embedder.register_forward_hook(lambda module, args, out: seen.append(args[0]==3))
    torch.manual_seed(0)
    conditioner.train()(raw)
    paths = PathDataset(teacher, (1,4,4), raw, n=n, steps=1, part=n, progress=False)
    recorded = [paths.fields[name]==3 for name in ('label','style')]
    for one,other in zip([*seen[:2], seen[0]&seen[1]], [*recorded, recorded[0]&recorded[1]]):
        assert one.float().mean().item()==pytest.approx(other.float().mean().item(), abs=.03)

@pytest.mark.parametrize('damage', ['cut','empty','text'])
def test_a_damaged_part_of_the_paths_is_recorded_again(tmp_path, damage):
    ldm = teacher_of()
    def record():
        return PathDataset(ldm.denoiser, ldm.shape, dict(label=torch.arange(3)), 12, 2, part=4, cache=tmp_path,
                           progress=False)
    whole = record()
    file = sorted(tmp_path.iterdir())[1]
    file.write_bytes(dict(cut=file.read_bytes()[:-9], empty=b'', text=b'no safetensors')[damage])
    with pytest.warns(UserWarning, match=f'{file.name} is damaged .* and is recorded again'): again = record()
    for name,values in whole.fields.items(): assert torch.equal(again.fields[name], values)

@pytest.mark.parametrize('guidance', [(3.,1.), (1.,), (1.,2.,3.), 2., 'ab', (1.,'x'), None, (-1.,2.)])
def test_guidance_scales_that_make_no_sense(guidance):
    ldm = teacher_of()
    with pytest.raises(ValueError, match='expected two scales from 0 to 100, the smaller first'):
        PathDataset(ldm.denoiser, ldm.shape, dict(label=torch.arange(3)), guidance=guidance)

def test_the_loss_leaves_the_student_in_training():
    "Though no condition may be left out once more."
    ldm = teacher_of()
    paths = PathDataset(ldm.denoiser, ldm.shape, dict(label=torch.arange(3)), n=6, steps=2, progress=False)
    student = make_student(ldm.denoiser).train()
    distill_loss(student, paths[torch.arange(6)])
    assert student.training and student.conditioner.training

def test_paths_need_labels_only():
    assert path_conditions(load('mnist', 'cpu'))['label'].tolist()==list(range(10))
    assert path_conditions(teacher_of(conditions=False))=={}

def test_conditions_of_paths_are_fetched_shard_by_shard(monkeypatch):
    "In the order of the set, and given back in the order in which they were drawn."
    asked = []
    class Ordered(Pictures):
        def __getitems__(self, idxs):
            asked.extend(int(i) for i in idxs)
            return super().__getitems__(idxs)
    label = torch.arange(600)
    ds = Ordered(torch.zeros(600, 1, 8, 8, dtype=torch.uint8), label)
    embedders = dict(label=LabelEmbedder(600, 4), other=LabelEmbedder(2, 4))
    monkeypatch.setattr(distil, 'base_pictures', lambda *args: ds)
    monkeypatch.setattr(distil, 'embedders_of', lambda ldm: embedders)
    monkeypatch.setattr(distil, 'diffusion_of', lambda model: model)
    found = path_conditions(object(), n=500)
    expected = torch.randperm(600, generator=torch.Generator().manual_seed(0))[:500]
    assert torch.equal(found['label'], expected) and asked==sorted(asked)
    assert found['other'].tolist()==[2]*500


# ---- by recipe

def test_recipe_resumes(base, tmp_path):
    "Interrupted and begun again, it ends with the same student, bit for bit."
    class Stop(Callback):
        def after_step(self, learn):
            if learn.step==2: raise KeyboardInterrupt
    whole = train_student(base, tmp_path/'a', **FEW)
    with pytest.raises(KeyboardInterrupt): train_student(base, tmp_path/'b', cbs=[Stop()], **FEW)
    resumed = train_student(base, tmp_path/'b', **FEW)
    assert fingerprint(resumed.student())==fingerprint(whole.student())
    assert fingerprint(whole)==fingerprint(load(base))
    assert whole.student().meta['guidance']==[1.,3.]
    longer = train_student(base, tmp_path/'b', **FEW|dict(steps=6))
    assert fingerprint(longer.student())!=fingerprint(whole.student())
    assert load_model(tmp_path/'b'/'distil').meta['steps']==6
    with pytest.raises(ValueError, match='n was 12, is 16'): train_student(base, tmp_path/'b', **FEW|dict(n=16))

def test_recipe_refuses(base, tmp_path):
    with pytest.raises(ValueError, match='or a TextToImage with a diffusion prior'):
        train_student('fashion_evaluator', tmp_path/'m', **FEW)
    with pytest.raises(ValueError, match='no `d_emb`'): train_student('mnist_tutorial', tmp_path/'m', **FEW)
    with pytest.raises(ValueError, match='the smaller first'):
        train_student(base, tmp_path/'m', **FEW, guidance=(3,1))
    assert not (tmp_path/'m').exists()

def test_command_line(base, tmp_path):
    "`fastldm_train distil --model NAME`, then `fastldm_sample --calls 2`."
    out = tmp_path/'fast'
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        train_student(base, out, **FEW)
        sample_cli(str(out), n=4, calls=2, out=str(tmp_path/'x.png'))
        with pytest.raises(SystemExit, match='no student for few calls'): sample_cli(str(base), n=4, calls=2)
        with pytest.raises(SystemExit, match='no student for few'): sample_cli('scenes', prompt='', calls=2)
        with pytest.raises(SystemExit, match='needs --model'): train_cli('distil')
    assert Image.open(tmp_path/'x.png').size[0]>16

def test_an_interval_at_the_shell(base, tmp_path):
    "`fastldm_train distil --interval`: guidance is distilled at these times; a recipe without any has no such option."
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        train_cli('distil', model=str(base), interval='.2,.75', steps=2, out=str(tmp_path/'fast'), quick=True)
        with pytest.raises(SystemExit, match=r'--interval .7,.2: expected two times'):
            train_cli('distil', model=str(base), interval='.7,.2', out=str(tmp_path/'other'))
        with pytest.raises(SystemExit, match='the recipe `digits` takes no --interval'):
            train_cli('digits', interval='.2,.7', out=str(tmp_path/'other'))
    assert load(tmp_path/'fast').student().meta['interval']==[.2,.75]
    assert not (tmp_path/'other').exists()

def test_the_nearest_scale_that_was_learned(base, tmp_path):
    ldm = train_student(base, tmp_path/'fast', **FEW, guidance=(1.5,3.))
    assert [ldm.nearest_student_scale(scale) for scale in (0., 2., 9.)]==[1.5, 2., 3.]
    with pytest.raises(ValueError, match='no student'): load(base).nearest_student_scale(2.)

def test_figures_train_the_students_too(base, tmp_path, monkeypatch):
    "`fastldm_figures --train`: a shipped model that has a student gets one anew, of the model that was just trained."
    train_student(base, tmp_path/'shipped'/'tiny', **FEW, guidance=(1.,4.), interval=(.2,.75))
    def train_tiny(folder):
        ldm = load(base)
        for p in ldm.denoiser.parameters(): p.data += .01                   # it was trained anew
        return save(ldm, folder)
    monkeypatch.setenv('FASTLDM_WEIGHTS', str(tmp_path/'shipped'))
    monkeypatch.setattr(figures, 'available', lambda: ['tiny'])
    monkeypatch.setitem(figures.RECIPES, 'tiny', train_tiny)
    monkeypatch.chdir(tmp_path)
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()): figures._train_all()
    trained = load('tiny')
    about = trained.student().meta
    assert about['teacher_fingerprint']==fingerprint(trained.denoiser)!=fingerprint(load(base).denoiser)
    assert (about['guidance'], about['interval'], about['n_paths'])==([1.,4.], [.2,.75], FEW['n'])

def test_a_picture_by_another_student_is_not_drawn_again(ldm, tmp_path):
    "The student that drew a picture may have been trained on since; the weights of the model are the same."
    folder = save(ldm, tmp_path/'model', data='digits')
    def draw(name, *model, **options):
        sample_cli(*model, **options, out=str(tmp_path/f'{name}.png'))
        return (tmp_path/f'{name}.png').read_bytes()
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        few = draw('few', str(folder), calls=2, n=1, label='1')
        many = draw('many', str(folder), steps=2, n=1, label='1')
        for p in ldm.student().parameters(): p.data *= 1.1
        save(ldm, folder, data='digits')
        with pytest.raises(SystemExit, match='a student of weights .*; today they are'):
            draw('x', like=tmp_path/'few.png')
        assert draw('other', str(folder), like=tmp_path/'few.png')!=few
        assert draw('again', like=tmp_path/'many.png')==many

def test_a_number_called_label(tmp_path):
    "What is a class says its embedder, not its name: a page is drawn of any class, and none of a number."
    for embedder,name,has_page in ((LabelEmbedder(3, 16), 'species', True), (NumberEmbedder(16), 'label', False)):
        denoiser = Denoiser(UNet(1, (8,16), d_emb=16), Cosine(), Conditioner(**{name: embedder}))
        model = load(save(LatentDiffusion(Same(), denoiser, (1,8,8), steps=4).eval(), tmp_path/f'{name}_teacher'))
        folder = tmp_path/name
        distil._finish_student(folder, model, with_student(model).student())
        assert (folder/'samples.png').exists()==has_page

def test_rows_of_paths_follow_the_seed(monkeypatch):
    ds = Pictures(torch.zeros(600, 1, 8, 8, dtype=torch.uint8), torch.arange(600))
    embedders = dict(label=LabelEmbedder(600, 4), other=LabelEmbedder(2, 4))
    monkeypatch.setattr(distil, 'base_pictures', lambda *args: ds)
    monkeypatch.setattr(distil, 'embedders_of', lambda ldm: embedders)
    monkeypatch.setattr(distil, 'diffusion_of', lambda model: model)
    first, again, other = (path_conditions(object(), n=500, seed=seed)['label'] for seed in (3,3,4))
    assert torch.equal(first, again) and not torch.equal(first, other)

def test_a_wrong_precision_is_named_before_work(base, tmp_path):
    with pytest.raises(ValueError, match="precision='half': expected None, 'bf16' or 'fp16'"):
        train_student(base, tmp_path/'m', **FEW, precision='half')
    assert not (tmp_path/'m').exists()
