"What a user can get wrong with a model, end to end on the shipped ones: one clear error each, before work starts."
import errno
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
import pytest
import torch
from safetensors.torch import load_file, save_file
from fastldm import available, load, save
from fastldm.diffusion import NAMES_ELSEWHERE, argument_hint, push_to_hub
from fastldm.recipes import settings_of

NOTEBOOK = Path(__file__).parents[1]/'nbs/diffusion/06_ldm.ipynb'
LABELS = [i%10 for i in range(64)]

@pytest.fixture(scope='module')
def ldm(): return load('mnist')


# ---- arguments

@pytest.mark.parametrize('arguments,message', [
    (dict(label=10), 'label=10 is out of range; it takes a label from 0 to 9'),
    (dict(label=-1), 'label=-1 is out of range'),
    (dict(label=[1,2]), 'got 2 labels for 4 samples'),
    (dict(label=1.5), 'expected a label from 0 to 9'),
    (dict(colour='red'), "no condition 'colour'. It takes label"),
    (dict(label=1, guidance_scale=-1.), 'at least 0'),
    (dict(label=1, guidance_scale=dict(mask=2.)), "conditioned on ['label']"),
    (dict(label=1, steps=-3), 'steps=-3'),
    (dict(label=1, precision='fp16'), "expected None or 'bf16'"),
    (dict(label=1, steps=0), 'steps=0'),
    (dict(label=1, step='heun_stop'), "did you mean 'heun_step'?"),
    (dict(label=1, times='karras'), "did you mean 'karras_times'?"),
    (dict(label=1, seed=[1,2,3,4], first=4), 'first=4 counts the pictures of one seed'),
])
def test_sample_refuses(idle, arguments, message):
    "The error says what is wrong, and comes before the network is called."
    with pytest.raises(ValueError) as e: idle.sample(4, **arguments)
    assert message in str(e.value)

@pytest.mark.parametrize('name,hint', [
    ('num_inference_steps', 'did you mean steps?'),
    ('cfg_scale', 'did you mean guidance_scale?'),
    ('cfg', 'did you mean guidance_scale?'),
    ('guidance', 'did you mean guidance_scale?'),
    ('num_samples', 'did you mean n?'),
    ('num_images', 'did you mean n?'),
    ('generator', 'did you mean seed?'),
    ('sampler', 'did you mean step?'),
    ('scheduler', 'did you mean step?'),
    ('timesteps', 'did you mean times?'),
    ('eta', 'did you mean step=partial(ddim_step, eta=...)?'),
    ('mask_image', 'did you mean constraint=inpaint(images, hole)?'),
    ('class_labels', 'did you mean label?'),
    ('lable', 'did you mean label?'),
    ('batchsize', 'did you mean batch_size?'),
    ('prompt', "that would be 'text', which is not taken here (this model is conditioned on label)"),
    ('attributes', "that would be 'attrs', which is not taken here"),
])
def test_sample_knows_the_names_of_other_libraries(idle, name, hint):
    "An argument that other libraries have, or a misspelt one, gets the name that it has here."
    with pytest.raises(ValueError) as e: idle.sample(4, label=1, **{name: 3})
    assert repr(name) in str(e.value) and hint in str(e.value)

def test_each_name_elsewhere_has_one_name_here():
    "No name stands twice in the table, and none that is an argument here is called something else."
    names = [name for elsewhere in NAMES_ELSEWHERE.values() for name in elsewhere.split()]
    assert len(names)==len({*names})
    assert not {*names} & NAMES_ELSEWHERE.keys()

def test_hints_are_for_what_a_model_takes():
    "A condition of one's own wins over the table."
    assert argument_hint('prompt', ['caption'])=='did you mean caption?'
    assert argument_hint('labels', ['classes'])=='did you mean classes?'
    assert argument_hint('colour', ['steps'])==''

@pytest.mark.parametrize('n', [0, -1, 2.5, '3'])
def test_sample_refuses_count(ldm, n):
    "The number of pictures is a whole number of at least 1."
    with pytest.raises(ValueError, match='n='): ldm.sample(n, label=1)

NO_PICTURES = [
    torch.zeros(2,1,27,28),
    torch.zeros(2,3,28,28),
    torch.zeros(1,28,28),
    torch.zeros(2,1,28,28).byte(),
    torch.full((2,1,28,28),7.),
    'picture.png',
]

@pytest.mark.parametrize('images', NO_PICTURES)
def test_encode_refuses(ldm, images):
    "Wrong size, channels, dimensions, type, range."
    with pytest.raises(ValueError, match='expected float pictures'): ldm.encode(images)

def test_encode_refuses_another_size(ldm):
    "Which the autoencoder could encode; an inversion would fail after all its calls of the network."
    with pytest.raises(ValueError, match=r'latents of shape \(4, 8, 8\), and those of this model \(4, 7, 7\)'):
        ldm.encode(torch.zeros(1,1,32,32))

def test_a_scale_of_0_is_written_down(ldm):
    "The file of a picture says 0 where 0 was asked for."
    assert settings_of(ldm, 'mnist', dict(n=1, guidance_scale=0., seed=0))['guidance_scale']==0
    assert settings_of(ldm, 'mnist', dict(n=1, seed=0))['guidance_scale']==1

def test_sampling_leaves_the_mode(ldm):
    "A preview in the middle of one's own training does not switch off dropout; what was in eval mode stays so."
    ldm.denoiser.train()
    try:
        ldm.autoencoder.eval()
        ldm.sample(1, steps=1, label=3)
        assert ldm.denoiser.training and ldm.denoiser.conditioner.training and not ldm.autoencoder.training
    finally: ldm.eval()

def test_decode_refuses(ldm):
    "Latents of another shape."
    with pytest.raises(ValueError, match=r'this model has \(B,4,7,7\)'): ldm.decode(torch.zeros(1,8,7,7))


# ---- what is drawn

@pytest.mark.parametrize('name', available('LatentDiffusion'))
def test_shipped_models_draw(name):
    "Pictures in [0,1]; the same seed is the same picture alone and in company; a label, or an attribute, changes it."
    model = load(name)
    embedders = model.denoiser.conditioner.embedders
    def draw(*which):
        if 'attrs' in embedders: condition = dict(attrs=[{embedders['attrs'].names[k]: True} for k in which])
        else: condition = dict(label=[*which])
        return model.sample(len(which), steps=4, seed=5, **condition)
    two = draw(3,1)
    contrast = .1 if two.shape[1]==1 else .05                     # photographs have less than digits
    assert two.min()>=0 and two.max()<=1 and two.std()>contrast
    assert (draw(3)-two[:1]).abs().max() < 1e-3
    assert (draw(4)-two[:1]).abs().mean() > 1e-3
    assert {'data','stages','seed','licence'} <= set(model.meta)

def test_notebook_lists_the_shipped_models():
    "What `print(available())` shows in the notebook is what there is."
    cells = json.loads(NOTEBOOK.read_text(encoding='utf-8'))['cells']
    shown = [''.join(o['text']) for c in cells if ''.join(c['source'])=='print(available())' for o in c['outputs']]
    assert shown==[f'{available()}\n']

def test_encode_decode(ldm):
    "Latents of samples have unit variance, and decoding gives back what was encoded."
    z = ldm.encode(ldm.sample(64, label=LABELS, steps=8, seed=0)*2-1)
    assert abs(z.std()-1) < .25 and abs(z.mean()) < .25
    x = ldm.decode(z)
    assert (ldm.decode(ldm.encode(x))-x).square().mean() < 5e-3

@pytest.mark.parametrize('settings', [
    dict(),
    dict(step='ddpm_step'),
    dict(step='pc_step', times='uniform_times'),
    dict(guidance_scale=3.),
])
def test_same_seed_same_picture(ldm, settings):
    "Whatever the batch size, the split, the number of threads: to float error. Another seed gives another picture."
    labels = [3,1,4,1,5,9,2]
    def draw(n=7, seed=11, **kwargs): return ldm.sample(n, label=labels[:n], steps=5, seed=seed, **settings, **kwargs)
    whole = draw()
    for size in (1,3,4): assert (draw(batch_size=size)-whole).abs().max()<1e-3
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if threads>1 else 2)
    try: other = draw()
    finally: torch.set_num_threads(threads)
    assert (other-whole).abs().max()<1e-3
    assert torch.equal(draw(), whole)
    assert (draw(3)-whole[:3]).abs().max()<1e-3                   # the first of fewer are the first of more
    assert (draw(seed=12)-whole).abs().max()>.1

def test_half_precision_is_near(ldm):
    "bf16 changes a picture a little, and gives it in single precision."
    full = ldm.sample(10, label=LABELS[:10], steps=10, seed=0)
    half = ldm.sample(10, label=LABELS[:10], steps=10, seed=0, precision='bf16')
    assert 0<(full-half).abs().mean()<.02
    assert half.dtype==torch.float32


# ---- on disk and on the hub

def draw_one(model): return model.sample(1, label=1, steps=2, seed=0)

def test_load_refuses(tmp_path, ldm):
    "Weights that are missing, altered or of another shape; a pickle; a misspelt name."
    folder = save(ldm, tmp_path/'m')
    weights = load_file(folder/'model.safetensors')
    key = next(k for k in weights if k.endswith('conv1.weight'))
    def error_with(change):
        broken = {k: v.clone() for k,v in weights.items()}
        change(broken)
        save_file(broken, folder/'model.safetensors')
        with pytest.raises(ValueError) as e: load(folder)
        return str(e.value)
    assert key in error_with(lambda w: w.pop(key))
    assert 'altered' in error_with(lambda w: w[key].add_(.1))
    assert key in error_with(lambda w: w.update({key: w[key][:1]}))
    save_file(weights, folder/'model.safetensors')
    assert torch.equal(draw_one(load(folder)), draw_one(load(folder)))
    shutil.copy(folder/'model.safetensors', tmp_path/'w.pth')
    with pytest.raises(ValueError, match='pickle'): load(tmp_path/'w.pth')
    with pytest.raises(FileNotFoundError, match="did you mean 'mnist'"): load('mnits')

class RecordingApi:
    "Stands for `HfApi`, and keeps its calls; a repository in `public` exists already."
    calls = []
    public = ['me/public']
    def repo_info(self, repo): return SimpleNamespace(private=repo not in self.public)
    def create_repo(self, repo, **kwargs): self.calls.append(('create', repo, kwargs['private']))
    def create_commit(self, repo, operations, commit_message):
        self.calls.append(('upload', repo, [operation.path_in_repo for operation in operations]))
        return 'address'

def test_push_to_hub(tmp_path, ldm, monkeypatch):
    "What goes to the hub are the files of the folder, checked first."
    import huggingface_hub
    monkeypatch.setattr(huggingface_hub, 'HfApi', RecordingApi)
    monkeypatch.setattr(RecordingApi, 'calls', [])
    folder = save(ldm, tmp_path/'m')
    assert push_to_hub(folder, 'me/model', private=True)=='address'
    files = ['config.json', 'model.safetensors', 'student/difference.safetensors', 'student/student.json']
    assert RecordingApi.calls==[('create','me/model',True), ('upload','me/model',files)]
    with pytest.raises(FileNotFoundError): push_to_hub(tmp_path/'nothing', 'me/model')
    assert len(RecordingApi.calls)==2

def test_push_to_hub_stays_private(tmp_path, ldm, monkeypatch):
    "With `private`, nothing is uploaded to a repository that exists and is public; without it, it is."
    import huggingface_hub
    monkeypatch.setattr(huggingface_hub, 'HfApi', RecordingApi)
    monkeypatch.setattr(RecordingApi, 'calls', [])
    folder = save(ldm, tmp_path/'m')
    with pytest.raises(ValueError, match="'me/public' exists on the hub and is public"):
        push_to_hub(folder, 'me/public', private=True)
    assert [call[0] for call in RecordingApi.calls]==['create']
    assert push_to_hub(folder, 'me/public')=='address'

def test_load_from_hub(tmp_path, ldm, monkeypatch):
    "What comes from the hub is loaded as a folder is; without a network the error says so."
    import huggingface_hub
    folder = save(ldm, tmp_path/'m')
    monkeypatch.setattr(huggingface_hub, 'snapshot_download', lambda repo, allow_patterns: str(folder))
    assert torch.equal(draw_one(load('me/model')), draw_one(load(folder)))
    def offline(*args, **kwargs): raise OSError('no network')
    monkeypatch.setattr(huggingface_hub, 'snapshot_download', offline)
    message = "'me/other' is not a local folder.*OSError: no network"
    with pytest.raises(FileNotFoundError, match=message): load('me/other')

def test_a_full_disk_is_not_a_wrong_name(monkeypatch):
    "An error of the disk in a download passes as it is."
    import huggingface_hub
    def full(*args, **kwargs): raise OSError(errno.ENOSPC, 'No space left on device')
    monkeypatch.setattr(huggingface_hub, 'snapshot_download', full)
    with pytest.raises(OSError, match='No space left') as error: load('me/other')
    assert error.value.errno==errno.ENOSPC

def test_a_misspelt_folder_does_not_ask_the_hub(tmp_path, ldm, monkeypatch):
    "Where the folder above exists, a folder in it is meant, and the nearest is named."
    import huggingface_hub
    def fail(*args, **kwargs): raise AssertionError('the hub was asked')
    monkeypatch.setattr(huggingface_hub, 'snapshot_download', fail)
    monkeypatch.chdir(tmp_path)
    save(ldm, tmp_path/'runs'/'faces')
    assert torch.equal(draw_one(load('runs/faces')), draw_one(load(tmp_path/'runs'/'faces')))
    with pytest.raises(FileNotFoundError, match="no folder 'face' in 'runs'.*did you mean 'faces'"): load('runs/face')
    with pytest.raises(FileNotFoundError, match="no folder 'other'"): load('runs/other')
