"""Fine-tuning: what a start passes on, adapters of low rank, runs that are interrupted, and what is refused."""
import json
from pathlib import Path
import pytest, torch
from PIL import Image
from fastldm.core import Callback, SaveCB, fingerprint, set_seed
from fastldm.data.augment import Augmented
from fastldm.data.images import DATASETS, Pictures, get_dataset
from fastldm.diffusion import (LatentDataset, adapters_of, add_lora, diffusion_loss, edm_weight, load, load_lora,
                               merge_lora, remove_lora, save_lora)
from fastldm.recipes import beginning, copying, label_ldm, own_ldm, train_cli, with_adapter
from fastldm.recipes.stages import card_metadata, embedders_of

TINY = dict(steps=3, batch_size=8, progress=False)

def some_digits(classes, n=40):
    "A data set of some classes of the digits, under names of their own."
    def make(root=None, split='train', download=True):
        ds = get_dataset('digits', split=split)
        rows = torch.cat([(ds.label==c).nonzero()[:n//len(classes),0] for c in classes])
        label = [i//(n//len(classes)) for i in range(len(rows))]
        return Pictures(ds.image[rows], label, [f'digit {c}' for c in classes])
    return make

@pytest.fixture(scope='module')
def start(tmp_path_factory):
    "A tiny model of the digits 0, 1 and 2."
    folder = tmp_path_factory.mktemp('start')/'model'
    DATASETS['three'] = some_digits((0,1,2), 60)
    sizes = dict(c_latent=2, ae_channels=(8,8), ae_steps=150, channels=(8,16), copies=2)
    try: own_ldm('three', folder, **sizes, **TINY | dict(steps=30))
    finally: del DATASETS['three']
    return folder

@pytest.fixture(autouse=True)
def sets(monkeypatch):
    "The data sets of these tests: two new digits, and the three of the start."
    monkeypatch.setitem(DATASETS, 'two', some_digits((7,8)))
    monkeypatch.setitem(DATASETS, 'three', some_digits((0,1,2), 60))

def card(folder): return json.loads((Path(folder)/'config.json').read_text())

def draw(ldm): return ldm.sample(4, label=[0,0,1,1], steps=3, seed=0)

def label_table(ldm): return embedders_of(ldm)['label'].table.weight


def test_new_classes(start, tmp_path, capsys):
    """Autoencoder, network and the embedder of views are the start's; the labels begin anew, under their own names,
    and one printed line says so."""
    was = load(start)
    ldm = own_ldm('two', tmp_path/'m', start=start, lr=0., **TINY)
    printed = capsys.readouterr().out
    assert 'autoencoder kept' in printed and 'conditions copied: augment; new: label; left out: none' in printed
    assert '40 pictures are few: each is trained on in 25 views' in printed
    assert fingerprint(ldm.autoencoder)==fingerprint(was.autoencoder)
    assert fingerprint(ldm.denoiser.net)==fingerprint(was.denoiser.net)                # as nothing was learned
    assert torch.equal(embedders_of(ldm)['augment'].proj.weight, embedders_of(was)['augment'].proj.weight)
    assert torch.equal(label_table(ldm)[-1], label_table(was)[-1])                     # no label
    assert len(label_table(ldm))==3 and not torch.isclose(label_table(ldm)[:2], label_table(was)[:2]).any(1).all()
    assert torch.equal(load(tmp_path/'m').sample(1, label='digit 8', steps=2, seed=0),
                       ldm.sample(1, label=1, steps=2, seed=0))
    assert not (tmp_path/'m'/'autoencoder').exists()

def test_known_classes(start, tmp_path, capsys):
    "Labels of the same names are copied."
    ldm = own_ldm('three', tmp_path/'m', start=start, lr=0., **TINY)
    assert 'conditions copied: label, augment; new: none' in capsys.readouterr().out
    assert torch.equal(label_table(ldm), label_table(load(start)))

def test_a_condition_that_is_gone(start, tmp_path, capsys):
    "Without augmentation, the embedder of views is left out."
    ldm = own_ldm('two', tmp_path/'m', start=start, copies=1, **TINY)
    assert 'new: label; left out: augment' in capsys.readouterr().out
    assert [*embedders_of(ldm)]==['label']

@pytest.mark.parametrize('recipe, module', [(own_ldm,'own'), (label_ldm,'labels')])
def test_views_without_mirroring(tmp_path, monkeypatch, recipe, module):
    """Letters must not be mirrored. A run that was begun before there was a choice is resumed, one that was begun
    otherwise is not."""
    made = []
    def augmented(*args, **kwargs):
        made.append(kwargs.get('mirror'))
        return Augmented(*args, **kwargs)
    monkeypatch.setattr(f'fastldm.recipes.{module}.Augmented', augmented)
    sizes = dict(c_latent=2, ae_channels=(8,8), ae_steps=2, channels=(8,16), copies=2)
    recipe('two', tmp_path/'m', mirror=False, **sizes, **TINY)
    assert False in made and True not in made
    with pytest.raises(ValueError, match='mirror was False, is True'): recipe('two', tmp_path/'m', **sizes, **TINY)
    record = tmp_path/'m'/'recipe.json'
    asked = json.loads(record.read_text())
    del asked['mirror']
    record.write_text(json.dumps(asked))
    recipe('two', tmp_path/'m', mirror=False, **sizes, **TINY)

def test_the_autoencoder_can_be_tuned(start, tmp_path):
    "It is trained on from the start's weights, with the start's scale, in a stage of its own."
    ldm = own_ldm('two', tmp_path/'m', start=start, tune_autoencoder=True, ae_steps=2, **TINY)
    was = load(start).autoencoder
    assert fingerprint(ldm.autoencoder)!=fingerprint(was) and torch.equal(ldm.autoencoder.scale, was.scale)
    weights = zip(ldm.autoencoder.parameters(), was.parameters())
    assert max((a-b).abs().max() for a,b in weights)<.05                               # not begun anew
    assert [*card(tmp_path/'m')['stages']]==['autoencoder','denoiser']

@pytest.mark.parametrize('lora', [None,4])
def test_learns(start, tmp_path, lora):
    "Sixty steps lower the loss on the new pictures, under the same noise."
    ds = Augmented(DATASETS['two'](), 1)
    batch = LatentDataset(ds, load(start).autoencoder, progress=False).__getitems__(list(range(len(ds)))*8)
    def loss(folder, **settings):
        ldm = own_ldm('two', tmp_path/folder, start=start, lora=lora, **TINY | settings)
        set_seed(0)
        with torch.no_grad(): return diffusion_loss(ldm.denoiser, batch, edm_weight)['loss'].item()
    assert loss('after', steps=60, lr=.03, batch_size=32)<.97*loss('before', lr=0.)

def test_card(start, tmp_path):
    "It names the start and carries its licence; research only stays so."
    info = card(start)
    info['licence'] = 'weights Apache-2.0; data for research only, so this model too'
    (start/'config.json').write_text(json.dumps(info))
    own_ldm('two', tmp_path/'m', start=start, **TINY)
    found = card(tmp_path/'m')
    assert found['start']==str(start) and found['start_data']=='three' and found['new_conditions']==['label']
    assert found['start_fingerprint']==info['fingerprint'] and 'lora' not in found
    assert 'data for research only' in found['licence']
    assert card_metadata(found)['license_name']=='research-only'
    assert found['copying'] in (tmp_path/'m'/'README.md').read_text()


# ---- LoRA

def test_lora(start, tmp_path):
    """Only the adapter and the new embedder are trained; the adapter is a small file, which makes the same model of
    the start; the model in the folder is an ordinary one."""
    ldm = own_ldm('two', tmp_path/'m', start=start, lora=2, lr=.05, **TINY)
    was = load(start)
    assert adapters_of(ldm)==[] and fingerprint(ldm.denoiser.net)!=fingerprint(was.denoiser.net)
    assert torch.equal(embedders_of(ldm)['augment'].proj.weight, embedders_of(was)['augment'].proj.weight)
    norms = {name: p for name,p in ldm.denoiser.net.named_parameters() if 'norm' in name or name.endswith('bias')}
    assert norms and all(torch.equal(p, was.denoiser.net.get_parameter(name)) for name,p in norms.items())
    file = tmp_path/'m'/'adapter.safetensors'
    assert file.stat().st_size<.7*(tmp_path/'m'/'denoiser'/'model.safetensors').stat().st_size
    again = with_adapter(was, file)
    assert torch.allclose(draw(again), draw(ldm), atol=2e-3)
    assert torch.allclose(draw(merge_lora(again)), draw(ldm), atol=2e-3)
    assert embedders_of(again)['label'].names==['digit 7','digit 8']
    assert card(tmp_path/'m')['lora']==2

def test_several_adapters(start, tmp_path):
    "Two adapters on one model add up, each with its scale; at scale 0 only the conditions are left."
    files = []
    for seed in (0,1):
        own_ldm('two', tmp_path/f'{seed}', start=start, lora=2, lr=.05, seed=seed, **TINY)
        files.append(tmp_path/f'{seed}'/'adapter.safetensors')
    base = load(start)
    both = with_adapter(with_adapter(base, files[0], .5, 'one'), files[1], .25, 'two')
    assert adapters_of(both)==['one','two']
    def change(*adapters):
        ldm = base
        for i,(file,scale) in enumerate(adapters): ldm = with_adapter(ldm, file, scale, f'a{i}')
        return merge_lora(ldm).denoiser.net.stem.weight-base.denoiser.net.stem.weight
    one, two = (change((file, 1.)) for file in files)
    assert torch.allclose(change((files[0], .5), (files[1], .25)), .5*one+.25*two, atol=1e-6)
    assert change((files[0], 0.)).abs().max()==0 and one.abs().max()>0

def test_a_removed_adapter_leaves_nothing(start, tmp_path):
    "Neither what it changed nor what it replaced as a whole; and the model can be trained as before."
    denoiser = load(start).denoiser.requires_grad_(True)
    was = {name: value.clone() for name,value in denoiser.state_dict().items()}
    other = add_lora(load(start).denoiser, 2)
    with torch.no_grad():
        for p in other.net.head[0].parameters(): p.add_(torch.rand_like(p))
    save_lora(other, tmp_path/'b.safetensors', whole=['net.head.0'])
    load_lora(denoiser, tmp_path/'b.safetensors')
    assert not denoiser.state_dict()['net.head.0.weight'].equal(was['net.head.0.weight'])
    remove_lora(denoiser)
    assert [*denoiser.state_dict()]==[*was]
    for name,value in denoiser.state_dict().items(): assert value.equal(was[name]), name
    assert all(p.requires_grad for p in denoiser.parameters())

def test_an_adapter_of_another_base(start, tmp_path):
    "An adapter refuses weights that it was not trained from."
    own_ldm('two', tmp_path/'m', start=start, lora=2, **TINY)
    file = tmp_path/'m'/'adapter.safetensors'
    with pytest.raises(ValueError, match='give the model that it was trained from'):
        with_adapter(load(tmp_path/'m'), file)
    with pytest.raises(ValueError, match='not written by `save_lora`'):
        with_adapter(load(start), start/'model.safetensors')
    with pytest.raises(FileNotFoundError): with_adapter(load(start), tmp_path/'none')


# ---- runs

@pytest.mark.parametrize('lora', [None,2])
def test_interrupted(start, tmp_path, capsys, monkeypatch, lora):
    "An interrupted run goes on to the same model; a finished one is loaded, and not compared again."
    class Interrupt(Callback):
        def after_step(self, learn):
            if learn.step==2: raise KeyboardInterrupt
    monkeypatch.setattr(SaveCB, 'after_step', lambda self, learn: learn.save())       # a checkpoint every step
    settings = dict(TINY, start=start, lora=lora, lr=.01)
    with pytest.raises(KeyboardInterrupt): own_ldm('two', tmp_path/'b', cbs=[Interrupt()], **settings)
    resumed = own_ldm('two', tmp_path/'b', **settings)
    assert 'resuming from step 1 of 3' in capsys.readouterr().out
    assert torch.equal(draw(resumed), draw(own_ldm('two', tmp_path/'a', **settings)))
    monkeypatch.setattr('fastldm.recipes.finetune.copying', None)                     # may not be called
    assert torch.equal(draw(resumed), draw(own_ldm('two', tmp_path/'b', **settings)))

def test_another_start_is_another_run(start, tmp_path):
    own_ldm('two', tmp_path/'m', start=start, **TINY)
    with pytest.raises(ValueError, match='start was .*, is None'):
        own_ldm('two', tmp_path/'m', c_latent=2, ae_channels=(8,8), channels=(8,16), copies=25, **TINY)


# ---- copies

def test_a_model_that_copies_is_found(start, tmp_path, capsys, monkeypatch):
    "A WARNING on the screen and on the card, where samples are training pictures."
    def copies(ldm, pictures): return pictures[:64]['image'][:,:]/2+.5
    monkeypatch.setattr('fastldm.recipes.finetune.draw_like', copies)
    own_ldm('two', tmp_path/'m', start=start, **TINY)
    assert 'WARNING, the model copies: 40 of 40 samples' in capsys.readouterr().out
    assert card(tmp_path/'m')['copying'].startswith('WARNING')

def test_copying_in_numbers():
    "Three pictures in a row, at distances known by hand."
    train = torch.zeros(3, 1, 1, 2)
    train[:,0,0] = torch.tensor([[0,0],[.5,.5],[1,1]])
    samples = torch.tensor([[.01,.01],[.25,.25],[.9,.9]]).view(3, 1, 1, 2)
    found = copying(samples, train)
    assert (found['n'], found['copies'])==(3, 2)                                      # .01 and .9: a quarter of .4
    assert found['distance']==pytest.approx(.1/.5)                                    # of the medians


def test_copies_in_the_training_set_count_once():
    "A picture that is there twice, also mirrored or with a little noise, hid that samples were copies of it."
    generator = torch.Generator().manual_seed(0)
    train = torch.rand(20, 3, 8, 8, generator=generator)
    noise = .004*torch.randn(20, 3, 8, 8, generator=generator)
    samples = (train+.001).clamp(0, 1)
    once = copying(samples, train)
    assert once['copies']==20
    for more in (train, train.flip(-1), (train+noise).clamp(0, 1)):
        assert copying(samples, torch.cat([train, more]))==pytest.approx(once)
    new = torch.rand(20, 3, 8, 8, generator=generator)
    assert copying(new, torch.cat([train,train]))['copies']==0
    assert copying(samples[:4], train[:1].repeat(3, 1, 1, 1))['n']==4          # a set of one picture is no error

def test_sizes_of_a_start_may_be_said(start):
    "They are what the run has; a run of an earlier version, which wrote down other ones, is the same run."
    base = beginning(start)
    sizes = dict(n_blocks=1, c_latent=2, ae_channels=[8,8], channels=[8,16])
    chosen = base.choose(sizes, 1000)
    assert (chosen['n_blocks'],chosen['c_latent'],chosen['ae_channels'],chosen['channels'])==(1, 2, (8,8), (8,16))
    assert not {'n_blocks','c_latent','ae_channels'} & {*base.to_record(chosen)}
    nothing = beginning()
    assert nothing.choose({}, 1000)['n_blocks']==1 and nothing.to_record(chosen)==chosen


# ---- refusals, before anything is written

@pytest.mark.parametrize('settings, message', [
    (dict(start=None, lora=4), 'lora is for fine-tuning, and there is nothing to start from'),
    (dict(start=None, tune_autoencoder=True), 'tune_autoencoder is for fine-tuning'),
    (dict(start='mnist_evaluator'), 'is an Evaluator: a start is a LatentDiffusion'),
    (dict(start='mnist_tutorial'), 'a start has a `UNet`'),
    (dict(lora=0), 'lora=0: expected a whole number of at least 1'),
    (dict(channels=(8,8)), r'channels=\(8, 8\): the networks are those of'),
    (dict(n_blocks=2), 'n_blocks=2: the networks are those of .*, with 1'),
    (dict(c_latent=4), 'c_latent=4: the networks are those of .*, with 2'),
    (dict(ae_channels=(8,)), 'ae_channels=.*: the networks are those of'),
    (dict(patience=-3), 'patience=-3: expected a whole number of at least 1'),
    (dict(lr=-1.), 'lr=-1.0: expected a number of at least 0'),
    (dict(lr=float('nan')), 'lr=nan'),
    (dict(size=12), 'one size only'),
])
def test_refused(start, tmp_path, settings, message):
    with pytest.raises(ValueError, match=message): own_ldm('two', tmp_path/'m', **dict(TINY, start=start) | settings)
    assert not (tmp_path/'m').exists()

def test_other_pictures_are_refused(start, tmp_path):
    "A folder of colour pictures for a start of grey ones, and sides that the autoencoder cannot halve."
    for i in range(3):
        picture = Image.new('RGB', (20,20), (80*i,0,0))
        (tmp_path/'pictures').mkdir(exist_ok=True)
        picture.save(tmp_path/'pictures'/f'{i}.png')
    with pytest.raises(ValueError, match='colour pictures, and .* was trained on grey ones'):
        own_ldm(tmp_path/'pictures', tmp_path/'m', start=start, **TINY)
    with pytest.raises(ValueError, match='pictures of 30×30: flowers was trained on 64×64, and takes sides'):
        own_ldm(tmp_path/'pictures', tmp_path/'m', start='flowers', size=30, **TINY)
    assert not (tmp_path/'m').exists()

def test_no_such_start(tmp_path):
    with pytest.raises(FileNotFoundError, match="did you mean 'flowers'"):
        own_ldm('two', tmp_path/'m', start='flower', **TINY)

def test_the_command(start, tmp_path):
    "It hands its options on, and ends in one line where they cannot be followed."
    (tmp_path/'pictures').mkdir()
    for i in range(3): Image.new('RGB', (8,8), (80*i,0,0)).save(tmp_path/'pictures'/f'{i}.png')
    folder = dict(data=str(tmp_path/'pictures'), out=str(tmp_path/'m'))
    with pytest.raises(SystemExit, match='train: these are colour pictures, and .* was trained on grey ones'):
        train_cli('folder', start=str(start), lora=2, tune_autoencoder=True, **folder)
    with pytest.raises(SystemExit, match='nothing to start from: give `start` .--start.'):
        train_cli('folder', lora=2, **folder)
    with pytest.raises(SystemExit, match='takes no --start'): train_cli('digits_evaluator', start=str(start))
    assert not (tmp_path/'m').exists()
