"Autoencoders, latents and perceptual distances: bad input, damaged caches, weights of others."
import importlib.util, sys, types, warnings
import pytest, torch
from fastcore.test import test_close as close, test_eq as eq
from fastldm.diffusion.autoencoder import *
from fastldm.core import load_model, save_model
from fastldm.data import Digits, Pictures, to_uint8
from fastldm.core.perceptual import *

@pytest.fixture
def ae(): return Autoencoder(c_latent=2, channels=(8,8), kl=True).requires_grad_(False).eval()
@pytest.fixture
def ds(): return Digits(split='test')

ok = torch.zeros(2,1,16,16)
bad = {'size':(ok[...,:15],'16×15'), 'channels':(ok.expand(-1,3,-1,-1),'grey or colour'), 'batch':(ok[0],'add the batch'), 'bytes':(ok.byte(),'uint8'),
       'whole':(ok.long(),'int64'), 'range':(ok+3,'from 3 to 3'), 'nan':(ok/0,'nan'), 'empty':(ok[:0],'given pictures of'), 'list':([1],'list')}
@pytest.mark.parametrize('kind', bad)
@pytest.mark.parametrize('make', [lambda: Autoencoder(channels=(8,8)), TutorialAutoencoder])
def test_bad_pictures(make, kind):
    x,says = bad[kind]
    with pytest.raises(ValueError, match=says) as e: make().encode(x)
    assert '(B,1,H,W)' in str(e.value) and '[-1,1]' in str(e.value)       # what is expected is always said

def test_too_small_for_the_tutorial():
    with pytest.raises(ValueError, match='at least 10×10'): TutorialAutoencoder().encode(ok[...,:8,:8])

@pytest.mark.parametrize('z', [torch.zeros(2,3,4,4), torch.zeros(2,4,4), None])
def test_bad_latents(ae, z):
    with pytest.raises(ValueError, match=r'\(B,2,h,w\)'): ae.decode(z)

@pytest.mark.parametrize('kw', [dict(channels=()), dict(c_latent=0), dict(patch=0), dict(channels=(8,0)), dict(n_blocks=-1)])
def test_bad_sizes(kw):
    with pytest.raises(ValueError, match='expected a positive'): Autoencoder(**kw)

def test_bad_pixel_loss():
    with pytest.raises(ValueError, match="'mse' or 'l1'"): autoencoder_loss(pixel='l2')

def test_wrong_data_is_told_before_the_cache_is_made(ae, tmp_path):
    with pytest.raises(ValueError, match='grey or colour'): LatentDataset(Pictures(torch.zeros(3,3,16,16).byte()), ae, cache=tmp_path, progress=False)
    eq(list(tmp_path.iterdir()), [])

def test_scale_is_exact_for_a_known_encoder(ds):
    "Of an encoder that only folds pixels, mean and variance are those of the pixels."
    class Fold(FirstStage):
        def encode_params(self, x): return torch.nn.functional.pixel_unshuffle(x,2),None
        def decode_raw(self, z): return torch.nn.functional.pixel_shuffle(z,2)
    x = ds[:]['image']
    f = Fold(1,4,2).fit_scale(ds, batch_size=100)
    u = torch.nn.functional.pixel_unshuffle(x,2)
    close(f.shift.flatten(), u.mean((0,2,3)), eps=1e-5); close(f.scale.flatten(), u.std((0,2,3), correction=0), eps=1e-5)
    close(f.decode(f.encode(x)), x, eps=1e-5)
    close(f.encode(x).var((0,2,3)), torch.ones(4), eps=1e-3)

def test_loading_keeps_latents(ae, ds, tmp_path):
    ae.fit_scale(ds)
    eq(data_fingerprint(ds), data_fingerprint(Digits(split='test')))
    assert data_fingerprint(ds)!=data_fingerprint(Digits())
    again = load_model(save_model(ae, tmp_path/'ae'), 'cpu')
    close(again.encode(ds[:9]['image']).detach(), ae.encode(ds[:9]['image']), eps=.05)
    eq([f.name for f in tmp_path.iterdir()], ['ae'])

# --- the cache

def make(ds, ae, d, **kw): return LatentDataset(ds, ae, cache=d, progress=False, **kw)
def cut(f): f.write_bytes(f.read_bytes()[:-100])
def empty(f): f.write_bytes(b'')
def flip_a_bit(f): b = bytearray(f.read_bytes()); b[-9] ^= 1; f.write_bytes(b)
def of_another(f):
    from safetensors.torch import save_file
    save_file(dict(latent=torch.zeros(1,5,2,4,4)), f)

@pytest.mark.parametrize('harm', [cut, empty, flip_a_bit, of_another])
def test_a_damaged_cache_is_made_again(ae, ds, tmp_path, harm):
    whole = make(ds, ae, tmp_path)
    file, = tmp_path.iterdir(); harm(file)
    with pytest.warns(UserWarning, match='is damaged'): again = make(ds, ae, tmp_path)
    eq(again.latent, whole.latent); eq(again.std, whole.std); eq(again.label, ds.label)
    with warnings.catch_warnings(): warnings.simplefilter('error'); make(ds, ae, tmp_path)    # whole again
    eq(len(list(tmp_path.iterdir())), 1)

def test_killed_while_writing_leaves_nothing(ae, ds, tmp_path, monkeypatch):
    import safetensors.torch
    def die(tensors, path, metadata): path.write_bytes(b'half'); raise KeyboardInterrupt
    monkeypatch.setattr(safetensors.torch, 'save_file', die)
    with pytest.raises(KeyboardInterrupt): make(ds, ae, tmp_path)
    eq(list(tmp_path.iterdir()), [])

def test_other_weights_labels_or_pictures_are_other_files(ae, ds, tmp_path):
    make(ds, ae, tmp_path)
    make(Pictures(ds.image, ds.label.flip(0)), ae, tmp_path)
    make(Pictures(ds.image.flip(0), ds.label), ae, tmp_path)
    make(ds, ae, tmp_path, flip=True)
    told = Pictures(ds.image, ds.label); told.caption = ['a digit']*len(ds); make(told, ae, tmp_path)
    ae.decoder.layers[0].weight.data.mul_(1.1); make(ds, ae, tmp_path)
    eq(len(list(tmp_path.iterdir())), 6)

class Items:
    "A set without batches, with a caption, a mask and no tensor in memory."
    def __init__(self, ds): self.ds = ds
    def __len__(self): return 10
    def __getitem__(self, i):
        if i>9: raise IndexError
        return dict(image=self.ds[i]['image'], caption=f'digit {i}', mask=torch.arange(256).view(16,16)+i)

def test_any_data_set_and_its_fields(ae, ds, tmp_path):
    items = Items(ds)
    for l in (make(items, ae, tmp_path, flip=True), make(items, ae, tmp_path, flip=True)):    # encoded, then from the cache
        b = l.__getitems__([3,3,3,3,3,3,3,7])
        eq(b['caption'], ['digit 3']*7+['digit 7'])
        mirrored = (b['mask'][:,0,0]>b['mask'][:,0,1])
        for z,m,s in zip(b['latent'][:7], b['mask'], mirrored):
            eq(m, items[3]['mask'].flip(-1) if s else items[3]['mask'])                       # a mask turns with its picture
            assert ((z-l.latent[int(s),3])/l.std[int(s),3]).abs().max()<6
        eq(l[-1]['caption'], 'digit 9'); eq(len(list(l)), 10)
    eq(len(list(tmp_path.iterdir())), 1)

# --- distances with weights of others

@pytest.mark.slow
def test_st_lpips_equals_its_package(monkeypatch):
    if not importlib.util.find_spec('stlpips_pytorch'): pytest.skip('pip install --no-deps stlpips-pytorch to check against it')
    for m in ('torchsummary','IPython'): monkeypatch.setitem(sys.modules, m, types.SimpleNamespace(summary=None, embed=None))   # it imports them, and uses neither
    from stlpips_pytorch import stlpips
    st,theirs = STLPIPS(),stlpips.LPIPS(net='alex', variant='shift_tolerant', verbose=False).eval()
    a,b = torch.rand(2,3,3,64,64)*2-1
    with torch.no_grad(): close(st(a,b), theirs(a,b).flatten(), eps=1e-5)

@pytest.mark.parametrize('x', [ok.byte(), ok[0], torch.zeros(1,2,8,8), None])
def test_bad_pictures_for_a_distance(x):
    with pytest.raises(ValueError, match=r'compares'): FeatureDistance(FeatureNet())(ok if x is None else x, x if x is not None else ok[:1])

def test_a_pickle_in_place_of_a_trunk(tmp_path, monkeypatch):
    class Evil:
        def __reduce__(self): return (open, (str(tmp_path/'owned'),'w'))
    (tmp_path/'checkpoints').mkdir(); torch.save(Evil(), tmp_path/'checkpoints'/TRUNKS['vgg'])
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path))
    pytest.importorskip('lpips')
    with pytest.raises(ValueError, match='is damaged, or not'): LPIPS('vgg')
    assert not (tmp_path/'owned').exists()
