"What a user can get wrong with a model, end to end on the shipped ones: one clear error each, before work starts."
import json, shutil
import pytest, torch
from safetensors.torch import load_file, save_file
from fastldm import available, load, save
from fastldm.diffusion import push_to_hub
from fastldm.diffusion import ldm as ldm_module

@pytest.fixture(scope='module')
def ldm(): return load('mnist')

@pytest.mark.parametrize('given,says', [
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
    (dict(label=1, step='heun'), "did you mean 'heun_step'?"),
    (dict(label=1, times='karras'), "did you mean 'karras_times'?"),
])
def test_sample_refuses(ldm, given, says, monkeypatch):
    monkeypatch.setattr(ldm.denoiser, 'forward', lambda *a,**k: pytest.fail('work was started'))
    with pytest.raises(ValueError) as e: ldm.sample(4, **given)
    assert says in str(e.value)

@pytest.mark.parametrize('n', [0, -1, 2.5, '3'])
def test_sample_refuses_count(ldm, n):
    with pytest.raises(ValueError, match='n='): ldm.sample(n, label=1)

@pytest.mark.parametrize('x', [torch.zeros(2,1,27,28), torch.zeros(2,3,28,28), torch.zeros(1,28,28), torch.zeros(2,1,28,28).byte(), torch.full((2,1,28,28),7.), 'picture.png'])
def test_encode_refuses(ldm, x):
    with pytest.raises(ValueError, match='expected float pictures'): ldm.encode(x)

def test_decode_refuses(ldm):
    with pytest.raises(ValueError, match=r'this model has \(B,4,7,7\)'): ldm.decode(torch.zeros(1,8,7,7))

@pytest.mark.parametrize('name', available('LatentDiffusion'))
def test_shipped_models_draw(name):
    "Pictures in [0,1]; the same seed is the same picture alone and in company; a label, or an attribute, changes it."
    m = load(name)
    faces = 'attrs' in m.denoiser.conditioner.embedders
    def draw(*which): return m.sample(len(which), steps=4, seed=5, **(dict(attrs=[{m.denoiser.conditioner.embedders['attrs'].names[k]:True} for k in which]) if faces else dict(label=[*which])))
    two = draw(3,1)
    assert two.min()>=0 and two.max()<=1 and two.std()>(.1 if two.shape[1]==1 else .05)      # photographs have less contrast than digits
    assert (draw(3)-two[:1]).abs().max() < 1e-3
    assert (draw(4)-two[:1]).abs().mean() > 1e-3
    assert {'data','stages','seed','licence'} <= set(m.meta)

def test_encode_decode(ldm):
    z = ldm.encode(ldm.sample(64, label=[i%10 for i in range(64)], steps=8, seed=0)*2-1)
    assert abs(z.std()-1) < .25 and abs(z.mean()) < .25
    x = ldm.decode(z)
    assert (ldm.decode(ldm.encode(x))-x).square().mean() < 5e-3

def test_load_refuses(tmp_path, ldm):
    folder = save(ldm, tmp_path/'m')
    weights = load_file(folder/'model.safetensors')
    key = next(k for k in weights if k.endswith('conv1.weight'))
    def broken(change):
        w = {k:v.clone() for k,v in weights.items()}; change(w)
        save_file(w, folder/'model.safetensors')
        with pytest.raises(ValueError) as e: load(folder)
        return str(e.value)
    assert key in broken(lambda w: w.pop(key)) and 'altered' in broken(lambda w: w[key].add_(.1))
    assert key in broken(lambda w: w.update({key:w[key][:1]}))
    save_file(weights, folder/'model.safetensors')
    assert torch.equal(load(folder).sample(1,label=1,steps=2,seed=0), load(folder).sample(1,label=1,steps=2,seed=0))
    shutil.copy(folder/'model.safetensors', tmp_path/'w.pth')
    with pytest.raises(ValueError, match='pickle'): load(tmp_path/'w.pth')
    with pytest.raises(FileNotFoundError, match="did you mean 'mnist'"): load('mnits')

def test_hub(tmp_path, ldm, monkeypatch):
    "What goes to the hub is the folder, checked first; what comes from it is loaded as a folder is."
    import huggingface_hub
    folder,calls = save(ldm, tmp_path/'m'),[]
    class Api:
        def create_repo(self, repo, **kw): calls.append(('create',repo,kw['private']))
        def upload_folder(self, **kw): calls.append(('upload',kw['repo_id'],kw['folder_path'])); return 'address'
    monkeypatch.setattr(huggingface_hub, 'HfApi', Api)
    assert push_to_hub(folder, 'me/model', private=True)=='address'
    assert calls==[('create','me/model',True), ('upload','me/model',str(folder))]
    with pytest.raises(FileNotFoundError): push_to_hub(tmp_path/'nothing', 'me/model')
    assert len(calls)==2
    monkeypatch.setattr(huggingface_hub, 'snapshot_download', lambda repo, allow_patterns: str(folder))
    assert torch.equal(load('me/model').sample(1,label=1,steps=2,seed=0), load(folder).sample(1,label=1,steps=2,seed=0))
    def offline(*a, **k): raise OSError('no network')
    monkeypatch.setattr(huggingface_hub, 'snapshot_download', offline)
    with pytest.raises(FileNotFoundError, match="'me/other' is no folder here"): load('me/other')

@pytest.mark.parametrize('kw', [dict(), dict(step='ddpm_step'), dict(step='pc_step', times='uniform_times'), dict(guidance_scale=3.)])
def test_same_seed_same_picture(ldm, kw):
    "Whatever the batch size, the split, the number of threads: to float error. Another seed gives another picture."
    ask = dict(label=[3,1,4,1,5,9,2], steps=5, seed=11, **kw)
    whole,n = ldm.sample(7, **ask),torch.get_num_threads()
    for size in (1,3,4): assert (ldm.sample(7, batch_size=size, **ask)-whole).abs().max()<1e-3
    torch.set_num_threads(1 if n>1 else 2)
    try: other = ldm.sample(7, **ask)
    finally: torch.set_num_threads(n)
    assert (other-whole).abs().max()<1e-3
    assert torch.equal(ldm.sample(7, **ask), whole)
    assert (ldm.sample(3, **{**ask,'label':[3,1,4]})-whole[:3]).abs().max()<1e-3             # the first of fewer are the first of more
    assert (ldm.sample(7, **{**ask,'seed':12})-whole).abs().max()>.1

def test_half_precision_is_near(ldm):
    ask = dict(label=list(range(10)), steps=10, seed=0)
    a,b = ldm.sample(10, **ask),ldm.sample(10, precision='bf16', **ask)
    assert 0<(a-b).abs().mean()<.02 and b.dtype==torch.float32
