"Autoencoders, latents and perceptual distances: bad input, damaged caches, weights of others."
import importlib.util, sys, types, warnings
import pytest, torch
import safetensors.torch
from fastcore.test import test_close as close, test_eq as eq
from torch.nn.functional import pixel_shuffle, pixel_unshuffle
from fastldm.core import load_model, save_model
from fastldm.core.perceptual import *
from fastldm.core.rows import RowWriter
from fastldm.data import Digits, Pictures
from fastldm.diffusion.autoencoder import *

@pytest.fixture
def ae(): return Autoencoder(c_latent=2, channels=(8,8), kl=True).requires_grad_(False).eval()

@pytest.fixture
def ds(): return Digits(split='test')


# --- bad input

def small(): return Autoencoder(channels=(8,8))

ok = torch.zeros(2,1,16,16)
BAD_IMAGES = {                                            # what is wrong: (images, part of the message)
    'size': (ok[...,:15], '16×15'),
    'channels': (ok.expand(-1,3,-1,-1), 'grey or colour'),
    'batch': (ok[0], 'add the batch'),
    'bytes': (ok.byte(), 'uint8'),
    'whole': (ok.long(), 'int64'),
    'range': (ok+3, 'from 3 to 3'),
    'nan': (ok/0, 'nan'),
    'empty': (ok[:0], 'given no pictures'),
    'list': ([1], 'list'),
}

@pytest.mark.parametrize('wrong', BAD_IMAGES)
@pytest.mark.parametrize('make', [small, TutorialAutoencoder])
def test_bad_pictures(make, wrong):
    "The error names what was given, and always what is expected."
    images,message = BAD_IMAGES[wrong]
    with pytest.raises(ValueError, match=message) as error: make().encode(images)
    assert '(B,1,H,W)' in str(error.value)
    assert '[-1,1]' in str(error.value)

def test_too_small_for_the_tutorial():
    "Without padding, less than 10 pixels would leave nothing."
    with pytest.raises(ValueError, match='at least 10×10'): TutorialAutoencoder().encode(ok[...,:8,:8])

@pytest.mark.parametrize('z', [torch.zeros(2,3,4,4), torch.zeros(2,4,4), None])
def test_bad_latents(ae, z):
    "The error says what shape is expected."
    with pytest.raises(ValueError, match=r'\(B,2,h,w\)'): ae.decode(z)

BAD_SIZES = [dict(channels=()), dict(c_latent=0), dict(patch=0), dict(channels=(8,0)), dict(n_blocks=-1)]

@pytest.mark.parametrize('sizes', BAD_SIZES)
def test_bad_sizes(sizes):
    "A model of no channels or no patch is an error before it is built."
    with pytest.raises(ValueError, match='expected a (positive|width)'): Autoencoder(**sizes)

def test_bad_pixel_loss():
    "The error lists the losses that there are."
    with pytest.raises(ValueError, match="'mse' or 'l1'"): autoencoder_loss(pixel='l2')

def test_wrong_data_is_rejected_before_the_cache_is_made(ae, tmp_path):
    "Images that the autoencoder does not take leave no file."
    colour = Pictures(torch.zeros(3,3,16,16).byte())
    with pytest.raises(ValueError, match='grey or colour'): LatentDataset(colour, ae, cache=tmp_path, progress=False)
    eq(list(tmp_path.iterdir()), [])


# --- scale

class Fold(FirstStage):
    "An encoder that only folds pixels."
    def encode_params(self, x): return pixel_unshuffle(x, 2), None
    def decode_raw(self, z): return pixel_shuffle(z, 2)

def test_scale_is_exact_for_a_known_encoder(ds):
    "Where the encoder only folds pixels, mean and variance of the latents are those of the pixels."
    images = ds[:]['image']
    pixels = pixel_unshuffle(images, 2)
    fold = Fold(1, 4, 2).fit_scale(ds, batch_size=100)
    close(fold.shift.flatten(), pixels.mean((0,2,3)), eps=1e-5)
    close(fold.scale.flatten(), pixels.std((0,2,3), correction=0), eps=1e-5)
    close(fold.decode(fold.encode(images)), images, eps=1e-5)
    close(fold.encode(images).var((0,2,3)), torch.ones(4), eps=1e-3)

def test_loading_keeps_latents(ae, ds, tmp_path):
    "A saved autoencoder encodes as before; the fingerprint of a data set depends on its content alone."
    ae.fit_scale(ds)
    eq(data_fingerprint(ds), data_fingerprint(Digits(split='test')))
    assert data_fingerprint(ds)!=data_fingerprint(Digits())
    again = load_model(save_model(ae, tmp_path/'ae'), 'cpu')
    close(again.encode(ds[:9]['image']).detach(), ae.encode(ds[:9]['image']), eps=.05)
    eq([f.name for f in tmp_path.iterdir()], ['ae'])


# --- the cache

def make(ds, ae, folder, **settings): return LatentDataset(ds, ae, cache=folder, progress=False, **settings)

def cut(file): file.write_bytes(file.read_bytes()[:-100])

def empty(file): file.write_bytes(b'')

def flip_a_bit(file):
    content = bytearray(file.read_bytes())
    content[-9] ^= 1
    file.write_bytes(content)

def of_another(file): safetensors.torch.save_file(dict(latent=torch.zeros(1,5,2,4,4)), file)

@pytest.mark.parametrize('harm', [cut, empty, flip_a_bit, of_another])
def test_a_damaged_cache_is_made_again(ae, ds, tmp_path, harm):
    "With a warning, once; the latents are the same as before."
    mapped = make(ds, ae, tmp_path)
    latent, std = mapped.latent.clone(), mapped.std.clone()
    file, = tmp_path.iterdir()
    harm(file)
    with pytest.warns(UserWarning, match='is damaged'): again = make(ds, ae, tmp_path)
    eq(again.latent, latent)
    eq(again.std, std)
    eq(again.label, ds.label)
    with warnings.catch_warnings():                       # the file is whole again
        warnings.simplefilter('error')
        make(ds, ae, tmp_path)
    eq(len(list(tmp_path.iterdir())), 1)

def test_killed_while_writing_leaves_nothing(ae, ds, tmp_path, monkeypatch):
    "A process that dies half way leaves no file that could be taken for a cache."
    whole = RowWriter.add
    def die(writer, batch):
        whole(writer, batch)
        if writer.done>100: raise KeyboardInterrupt
    monkeypatch.setattr(RowWriter, 'add', die)
    with pytest.raises(KeyboardInterrupt): make(ds, ae, tmp_path, batch_size=64)
    eq(list(tmp_path.iterdir()), [])

def test_other_weights_labels_or_pictures_are_other_files(ae, ds, tmp_path):
    "Each change of the data, the weights or the mirroring has a cache of its own."
    make(ds, ae, tmp_path)
    make(Pictures(ds.image, ds.label.flip(0)), ae, tmp_path)
    make(Pictures(ds.image.flip(0), ds.label), ae, tmp_path)
    make(ds, ae, tmp_path, flip=True)
    captioned = Pictures(ds.image, ds.label)
    captioned.caption = ['a digit']*len(ds)
    make(captioned, ae, tmp_path)
    ae.decoder.layers[0].weight.data.mul_(1.1)
    make(ds, ae, tmp_path)
    eq(len(list(tmp_path.iterdir())), 6)

class Items:
    "A set without batches, with a caption, a mask and no tensor in memory."
    def __init__(self, ds): self.ds = ds
    def __len__(self): return 10
    def __getitem__(self, i):
        if i>9: raise IndexError
        return dict(image=self.ds[i]['image'], caption=f'digit {i}', mask=torch.arange(256).view(16,16)+i)

@pytest.mark.parametrize('from_cache', [False, True])
def test_any_data_set_and_its_fields(ae, ds, tmp_path, from_cache):
    "Fields are passed through, and a mask is mirrored together with its image."
    items = Items(ds)
    latents = make(items, ae, tmp_path, flip=True)
    if from_cache: latents = make(items, ae, tmp_path, flip=True)
    batch = latents.__getitems__([3,3,3,3,3,3,3,7])
    eq(batch['caption'], ['digit 3']*7+['digit 7'])
    mirrored = batch['mask'][:,0,0]>batch['mask'][:,0,1]
    for latent,mask,side in zip(batch['latent'][:7], batch['mask'], mirrored.long()):
        eq(mask, items[3]['mask'].flip(-1) if side else items[3]['mask'])
        deviations = (latent-latents.latent[side,3])/latents.std[side,3]
        assert deviations.abs().max()<6
    eq(latents[-1]['caption'], 'digit 9')
    eq(len(list(latents)), 10)
    eq(len(list(tmp_path.iterdir())), 1)

class Sided(Items):
    "A set with a mask of sides and an encoded text."
    mask_classes = ['background','l_eye','nose','r_eye']
    def __getitem__(self, i):
        item = super().__getitem__(i)
        return dict(item, mask=torch.tensor([[1,2,0,3]]), text=torch.arange(15.).view(3,5)+i, region=torch.eye(4)[None])

@pytest.mark.parametrize('from_cache', [False, True])
def test_mirroring_exchanges_sides_and_leaves_texts(ae, ds, tmp_path, from_cache):
    "The features of half of the texts came back in reverse, and the left eye stayed the left one."
    items = Sided(ds)
    for _ in range(1+from_cache): latents = make(items, ae, tmp_path, flip=True)
    batch = latents.__getitems__([4]*20)
    eq(batch['text'], items[4]['text'].expand(20,-1,-1))
    is_mirrored = batch['mask'][:,0,1]==0
    assert 0<is_mirrored.sum()<20
    for mask,region,mirrored in zip(batch['mask'], batch['region'], is_mirrored):
        eq(mask, torch.tensor([[1,0,2,3] if mirrored else [1,2,0,3]]))
        eq(region, items[4]['region'].flip(-1) if mirrored else items[4]['region'])

def test_settings_have_a_cache_of_their_own(ds, tmp_path):
    "Two first stages without weights shared one file."
    class Plain(FirstStage):
        def encode_params(self, x): return x, None
        def decode_raw(self, z): return z
    class Louder(Plain):
        def encode_params(self, x): return 5*x, None
    plain,louder = (make(ds, first(1, 1, 1), tmp_path).latent for first in (Plain, Louder))
    close(louder, 5*plain)


# --- distances with weights of others

@pytest.mark.slow
def test_st_lpips_equals_its_package(monkeypatch):
    "The same distance, from the same weights."
    if not importlib.util.find_spec('stlpips_pytorch'):
        pytest.skip('pip install --no-deps stlpips-pytorch to check against it')
    for module in ('torchsummary','IPython'):             # it imports them, and uses neither
        monkeypatch.setitem(sys.modules, module, types.SimpleNamespace(summary=None, embed=None))
    from stlpips_pytorch import stlpips
    ours = STLPIPS()
    theirs = stlpips.LPIPS(net='alex', variant='shift_tolerant', verbose=False).eval()
    a,b = torch.rand(2,3,3,64,64)*2-1
    with torch.no_grad(): close(ours(a,b), theirs(a,b).flatten(), eps=1e-5)

two_channels = torch.zeros(1,2,8,8)
BAD_PAIRS = {'bytes': (ok.byte(),ok.byte()), 'no batch': (ok[0],ok[0]), 'channels': (two_channels,two_channels),
             'counts': (ok,ok[:1])}

@pytest.mark.parametrize('wrong', BAD_PAIRS)
def test_bad_pictures_for_a_distance(wrong):
    "A distance compares batches of float images of one shape, grey or colour."
    distance = FeatureDistance(FeatureNet())
    with pytest.raises(ValueError, match=r'compares'): distance(*BAD_PAIRS[wrong])

def test_a_pickle_in_place_of_a_trunk(tmp_path, monkeypatch):
    "It is not loaded: what it would run is not run."
    class Evil:
        def __reduce__(self): return (open, (str(tmp_path/'owned'),'w'))
    (tmp_path/'checkpoints').mkdir()
    torch.save(Evil(), tmp_path/'checkpoints'/TRUNKS['vgg'])
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path))
    pytest.importorskip('lpips')
    with pytest.raises(ValueError, match='is damaged, or not'): LPIPS('vgg')
    assert not (tmp_path/'owned').exists()
