"Symptoms of real files and folders: each set gives the right pictures, or one clear error before work starts."
import gzip, io, json, os, tarfile, unicodedata, zipfile
from pathlib import Path
import numpy as np, pytest, torch
from PIL import Image
from fastldm.data import *

def save(f, grey=0, mode='RGB', size=(8,8), **kw):
    "A picture of one colour in a file."
    f.parent.mkdir(parents=True, exist_ok=True)
    Image.new('L', size, grey).convert(mode).save(f, **kw)
    return f

def greys(ds): return [round(x.float().mean().item()) for x in ds.pixels(range(len(ds)))]


# ---- reading

LEVELS = np.array([[0,16500,33200,50000]], np.uint16)               # 16 bits, and what they are in 8
BYTES = (LEVELS/257).round()

@pytest.mark.parametrize('suffix', ['png','tif','ppm'])
def test_sixteen_bits_are_not_clipped(tmp_path, suffix):
    "From a file, from PIL and from an array, the picture is the same."
    f = tmp_path/f'deep.{suffix}'
    Image.fromarray(LEVELS.repeat(4, 0)).save(f)
    ways = open_image(f, 4),to_uint8(from_image(Image.open(f))),to_uint8(from_image(LEVELS.repeat(4, 0)))
    for x in ways: assert x[0,0].tolist()==BYTES[0].tolist()==[0,64,129,195]
    assert [len(x) for x in ways]==[3,3,1]

@pytest.mark.parametrize('dtype,scale', [
    (np.float32,1), (np.float32,1/255), (np.int32,1), (np.int32,257)])
def test_tiffs_of_32_bits_are_not_black(tmp_path, dtype, scale):
    steps = np.arange(0, 256, 5, dtype=np.uint8)[None].repeat(52, 0)
    Image.fromarray((steps*np.array(scale)).astype(dtype)).save(tmp_path/'a.tif')
    assert np.array_equal(open_image(tmp_path/'a.tif', 52)[0], steps)
    assert np.array_equal(to_uint8(from_image(Image.open(tmp_path/'a.tif')))[1], steps)

@pytest.mark.parametrize('values', [[-1.,1.], [0.,300.], [float('nan'),1.], [0.,float('inf')]])
def test_a_tiff_whose_white_is_not_known(tmp_path, values):
    Image.fromarray(np.array([values], np.float32)).save(tmp_path/'a.tif')
    with pytest.raises(ValueError, match='a.tif.*values go from .* expected 0 to 1 or 0 to 255: save it'):
        ImageFolder(tmp_path)
    with pytest.raises(ValueError, match='values go from'): from_image(Image.open(tmp_path/'a.tif'))

@pytest.mark.parametrize('mode,value', [
    ('RGBA',(200,0,0,0)), ('LA',(9,0)), ('PA',(0,0)), ('RGBA',(255,255,255,255))])
def test_what_is_transparent_is_white_everywhere(tmp_path, mode, value):
    im = Image.new(mode, (4,4), value)
    im.save(tmp_path/'a.tif') if mode=='PA' else im.save(tmp_path/'a.png')
    assert (from_image(im)==1).all() and (ImageFolder(tmp_path, size=4).image==255).all()
    assert from_image(im).shape==(3,4,4)

@pytest.mark.parametrize('mode,key', [('L',7), ('RGB',(7,7,7)), ('P',0), ('1',0), ('I;16',7)])
def test_a_transparent_colour_is_white(tmp_path, mode, key):
    x = np.full((4,4), 7, np.uint16 if mode=='I;16' else np.uint8)
    im = Image.fromarray(x) if mode=='I;16' else Image.fromarray(x).convert('L' if mode=='P' else mode)
    if mode=='P': im = im.quantize(2)
    if mode=='1': im = Image.new('1', (4,4), 0)
    im.save(tmp_path/'a.png', transparency=key)
    assert (ImageFolder(tmp_path, size=4).image==255).all()
    assert (from_image(Image.open(tmp_path/'a.png'))==1).all()

def test_an_array_with_alpha_has_three_channels_or_one():
    half = np.array([[[0,0,0,0],[0,0,0,255]]], np.uint8)
    assert from_image(half)[:,0].tolist()==[[1,-1]]*3
    assert from_image(half[...,2:])[:,0].tolist()==[[1,-1]]
    for shape in ((3,8,8),(2,8,8,3),(8,)):
        with pytest.raises(ValueError, match='is no picture: expected'): from_image(np.zeros(shape, np.uint8))
    for dtype in (np.float32,np.int64,bool):
        with pytest.raises(ValueError, match='from_image takes bytes'): from_image(np.zeros((2,2), dtype))

def sideways(orientation):
    "A picture that is black at the left when it is upright, and its EXIF block."
    upright = Image.fromarray(np.array([[0]*4+[255]*4]*8, np.uint8)).convert('RGB')
    back = {1:None,3:Image.ROTATE_180,6:Image.ROTATE_90,8:Image.ROTATE_270}[orientation]
    exif = Image.Exif()
    exif[0x112] = orientation
    return (upright if back is None else upright.transpose(back)),exif

@pytest.mark.parametrize('kind', ['png','tif'])
@pytest.mark.parametrize('orientation', [1,3,6,8])
def test_the_camera_lay_on_its_side(tmp_path, orientation, kind):
    im,exif = sideways(orientation)
    f = tmp_path/f'a.{kind}'
    im.save(f, exif=exif)
    f.with_suffix('.txt').write_text('a picture')
    x = from_image(Image.open(f))
    assert (x[...,:4]==-1).all() and (x[...,4:]==1).all()
    assert torch.equal(to_uint8(x), ImageFolder(tmp_path, size=8).image[0])
    assert torch.equal(to_uint8(x), Captioned(tmp_path, size=8, test=0, pad=True).image[0])
    plain = plain_picture(Image.open(f))
    for again in (upright(Image.open(f)),plain): assert np.array_equal(plain_picture(again), plain)   # turned once

@pytest.mark.parametrize('kind', ['png','jpeg','webp','tiff'])
@pytest.mark.parametrize('junk', [b'', b'Exif\0\0', b'Exif\0\0II*\0\x08\0\0\0\xff\xff'+b'\x12\x01\x07\0'*9, b'\xff'*40])
def test_a_junk_exif_block_does_not_condemn_a_picture(tmp_path, kind, junk):
    im,_ = sideways(1)
    f = tmp_path/f'a.{kind}'
    im.save(f, exif=junk) if kind!='tiff' else im.save(f)
    if kind=='tiff': f.write_bytes(f.read_bytes()+junk)
    x = open_image(f, 8).int()
    assert x[...,:3].max()<60 and x[...,5:].min()>190

def test_one_bad_file_of_a_large_folder(tmp_path):
    "It is an error that names the file; `skip='warn'` leaves it out, counted and named, also without a cache."
    for c in 'ab':
        for i in range(3): save(tmp_path/c/f'{i}.png', 10*i)
    (tmp_path/'a'/'1.png').write_bytes(b'broken')
    with pytest.raises(ValueError, match='1.png cannot be read'): ImageFolder(tmp_path)
    for cache in (0,2.):
        with pytest.warns(UserWarning, match='leaves out 1 picture.*1.png'):
            ds = get_dataset(tmp_path, size=8, cache=cache, skip='warn')
        assert ds.label.tolist()==[0,0,1,1,1] and greys(ds)==[0,20,0,10,20]
        assert [*ds.failed]==[str(tmp_path/'a'/'1.png')]
    for f in tmp_path.rglob('*.png'): f.write_bytes(b'')
    with pytest.warns(UserWarning), pytest.raises(ValueError, match='none of 6 pictures can be read'):
        ImageFolder(tmp_path, skip='warn')
    with pytest.raises(ValueError, match="skip is 'yes'"): ImageFolder(tmp_path, skip='yes')


# ---- folders

def test_a_class_folder_called_train(tmp_path):
    "bus/, car/ and train/ are three classes; somebody who meant a part is told."
    for i,c in enumerate(('bus','car','train')): save(tmp_path/c/'0.png', 50*i)
    with pytest.warns(UserWarning, match="'train' is taken for a class"): ds = ImageFolder(tmp_path, size=8)
    assert ds.classes==['bus','car','train'] and ds.label.tolist()==[0,1,2] and greys(ds)==[0,50,100]
    with pytest.raises(FileNotFoundError, match='no folder `test`'): ImageFolder(tmp_path, 'test')
    for c in ('bus','car','train'): save(tmp_path/'all'/'train'/c/'0.png')          # without a warning
    assert ImageFolder(tmp_path/'all').classes==['bus','car','train']

@pytest.mark.filterwarnings('error')
@pytest.mark.parametrize('files,train,test', [
    ('train/a/1 train/b/2 test/b/3', 'a/1 b/2', 'b/3'), ('Train/a/1 TEST/a/2', 'a/1', 'a/2'),
    ('train/1 test/2', '1', '2'), ('train/a/1 val/a/2 extra/3 test/a/4', 'a/1', 'a/4'),
    ('train/1 masks/2 test/3', '1', '3'), ('train/cat/1 test/2', 'cat/1', '2'),
    ('valid/1 invalid/2','invalid/2 valid/1','')])
def test_parts_of_a_folder(tmp_path, files, train, test):
    for f in files.split(): save(tmp_path/f'{f}.png', int(f[-1])*10)
    for split,expected in (('train',train),('test',test)):
        if not expected: continue
        ds = ImageFolder(tmp_path, split, size=8)
        assert greys(ds)==[int(e[-1])*10 for e in expected.split()]
        names = [e.split('/')[0] for e in expected.split()]
        if ds.label is not None: assert [ds.classes[l] for l in ds.label]==names

@pytest.mark.parametrize('files,split,says', [
    ('a/1 b/2 test/a/3', 'train', 'no folder `train`'), ('test/1', 'train', 'no folder `train`'),
    ('a/1 b/2 val/a/3', 'train', 'no folder `train`'), ('train/1 test/a/2', 'train', 'both need the same folders'),
    ('train/a/1 test/b/2', 'test', r'does not have \(b\)'), ('train/a/1 train/2', 'train', 'beside its folders')])
def test_folders_that_can_be_read_in_two_ways(tmp_path, files, split, says):
    for f in files.split(): save(tmp_path/f'{f}.png')
    with pytest.raises((ValueError,FileNotFoundError), match=says): ImageFolder(tmp_path, split)

@pytest.mark.parametrize('name', ['val','valid','validation','Val'])
def test_a_part_for_validation(tmp_path, name):
    for f in ('train/a/1','train/b/2',f'{name}/b/3','test/a/4'): save(tmp_path/f'{f}.png', int(f[-1])*10)
    ds = get_dataset(tmp_path, split='val', size=8)
    assert (greys(ds),ds.label.tolist(),ds.classes,ds.split)==([30],[1],['a','b'],'val')
    with pytest.raises(FileNotFoundError, match='no folder `val`'): ImageFolder(tmp_path/'train', 'val')
    with pytest.raises(ValueError, match="split is 'dev'; it can be 'train', 'val' or 'test'"):
        ImageFolder(tmp_path, 'dev')

def test_labels_of_the_two_parts_agree(tmp_path):
    "A class that has no picture for testing does not move the others."
    for f in ('train/a','train/b','train/c','test/a','test/c'): save(tmp_path/f/'1.png')
    assert ImageFolder(tmp_path, 'test').label.tolist()==[0,2]
    assert ImageFolder(tmp_path, 'test').classes==['a','b','c']

def test_linked_class_folders(tmp_path):
    "Links to folders are followed, as torchvision does; a link back to a folder above adds nothing."
    save(tmp_path/'real'/'1.png', 90)
    save(tmp_path/'set'/'b'/'1.png', 20)
    (tmp_path/'set'/'a').symlink_to(tmp_path/'real')
    (tmp_path/'set'/'b'/'up').symlink_to(tmp_path/'set')
    (tmp_path/'set'/'loop').symlink_to('loop')
    ds = ImageFolder(tmp_path/'set', size=8)
    assert ds.classes==['a','b'] and greys(ds)[:1]==[90] and 20 in greys(ds)
    (tmp_path/'set'/'b'/'2.png').symlink_to(tmp_path/'nowhere.png')
    with pytest.raises(ValueError, match='2.png cannot be read'): ImageFolder(tmp_path/'set')

def test_only_pictures_are_pictures(tmp_path):
    "A folder with a picture's name is a folder, and a pipe is not opened."
    save(tmp_path/'a.png'/'1.png')
    save(tmp_path/'b.png'/'1.PNG')
    os.mkfifo(tmp_path/'a.png'/'pipe.png')
    assert ImageFolder(tmp_path).classes==['a.png','b.png']
    for folder in ('.ipynb_checkpoints','__MACOSX'): save(tmp_path/'a.png'/folder/'._1.png')
    assert len(ImageFolder(tmp_path))==2

def test_class_names_that_are_not_utf8(tmp_path):
    "They are escaped, so that whatever is trained on them can be saved."
    os.mkdir(os.fsencode(tmp_path)+b'/caf\xe9')
    save(tmp_path/'b'/'1.png').rename(os.fsdecode(os.fsencode(tmp_path)+b'/caf\xe9/1.png'))
    save(tmp_path/'b'/'1.png')
    ds = ImageFolder(tmp_path)
    assert ds.classes==['b','caf\\udce9'] and [c.encode() for c in ds.classes]
    assert Pictures(ds.image, ds.label, ['a','\ud800']).classes==['a','\\ud800']


# ---- shards

def png(grey=0): return raw(Image.new('L', (4,4), grey), 'png')

def raw(im, kind):
    out = io.BytesIO()
    im.save(out, kind)
    return out.getvalue()

def tar(f, *files):
    "A tar file of (name, bytes), and its path."
    with tarfile.open(f, 'w') as t:
        for name,content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            t.addfile(info, io.BytesIO(content))
    return f

def test_one_name_in_two_folders_is_two_pictures(tmp_path):
    ds = Shards([tar(tmp_path/'a.tar', ('cat/1.png',png(10)), ('dog/1.png',png(20)), ('./dog/1.txt',b'b'),
                     ('./cat/1.txt',b'a'))], size=4)
    assert greys(ds)==[10,20] and ds[:]['caption']==['a','b']

def test_a_key_twice_is_an_error(tmp_path):
    for second in ('1.png','./1.png','1.PNG'):
        shard = tar(tmp_path/'a.tar', ('1.png',png()), (second,png(1)))
        with pytest.raises(ValueError, match=f'a.tar has two files {second}'): Shards(shard)

@pytest.mark.parametrize('order', [1,-1])
def test_which_of_two_files_is_the_picture(tmp_path, order):
    "The photograph is jpg, its mask png, however they are ordered, and whatever Python's hash seed is."
    files = ('1.png',png(0)),('1.jpg',raw(Image.new('L', (4,4), 200), 'jpeg'))
    assert greys(Shards(tar(tmp_path/'a.tar', *files[::order]), size=4))==[200]
    assert IMAGE_SUFFIXES[:3]==('.jpg','.jpeg','.png')                              # an order, not a set

def test_what_cameras_and_macs_write(tmp_path):
    shard = tar(tmp_path/'a.tar', ('IMG_1.JPG',raw(Image.new('L', (4,4), 90), 'jpeg')), ('._IMG_1.JPG',b'junk'),
                ('IMG_1.CLS',b'3\n'), ('__MACOSX/._IMG_1.JPG',b'junk'), ('.DS_Store',b'junk'))
    ds = Shards(shard, size=4)
    assert greys(ds)==[90] and ds[0]['label']==3

@pytest.mark.parametrize('files,says', [
    ([('1.cls',b'cat')], "1.cls is b'cat', expected the number of a class"),
    ([('1.txt',b'caf\xe9')], '1.txt is not UTF-8'),
    ([('1.png',b'junk')], '1.png cannot be read'), ([('2.png',png()),('2.cls',b'1')], '1 has no .cls, and 1 of 2'),
    ([('2.txt',b'')], '2 has no .jpg/jpeg/png, and 1 of 2')])
def test_what_is_wrong_with_a_shard_is_named(tmp_path, files, says):
    first = [] if files[0][0]=='1.png' else [('1.png',png())]
    with pytest.raises(ValueError, match=f'a.tar: {says}'): Shards(tar(tmp_path/'a.tar', *first, *files))

def test_links_in_a_shard(tmp_path):
    tar(tmp_path/'a.tar', ('1.png',png()))
    with tarfile.open(tmp_path/'a.tar', 'a') as t:
        info = tarfile.TarInfo('2.png')
        info.type,info.linkname = tarfile.LNKTYPE,'1.png'
        t.addfile(info)
    with pytest.raises(ValueError, match='2.png is a link.*--hard-dereference'): Shards(tmp_path/'a.tar')

def test_shards_of_two_kinds_or_of_other_counts(tmp_path):
    one,two = tar(tmp_path/'a.tar', ('1.png',png()), ('1.cls',b'0')),tar(tmp_path/'b.tar', ('1.png',png()))
    with pytest.raises(ValueError, match='b.tar has image, other shards have image, label'): Shards([one,two])
    (tmp_path/'index.json').write_text('{"a.tar":2}')
    with pytest.raises(ValueError, match='a.tar has 1 picture, and 2 were counted: write index.json'): Shards(one)[0]
    with pytest.raises(ValueError, match='1 shards but 2 counts'): Shards(one, counts=[1,1])
    with pytest.raises(ValueError, match='keep is 0'): Shards(one, keep=0)

def test_shards_show_themselves(tmp_path):
    ds = Shards(tar(tmp_path/'a.tar', ('1.png',png(7))), size=4)                # one may be given
    assert repr(ds)=='Shards(train: 1 picture of 3×4×4 in 1 shard)' and greys(ds)==[7]
    with pytest.raises(ValueError, match=r'Shards\(train: .* is not in memory'): Augmented(ds)
    packed = tmp_path/'b.tar.gz'
    packed.write_bytes(gzip.compress((tmp_path/'a.tar').read_bytes()))
    assert greys(Shards(packed, size=4))==[7]
    packed.write_bytes(packed.read_bytes()[:60])
    with pytest.raises(ValueError, match='b.tar.gz is damaged'): Shards(packed)

def test_one_bad_picture_in_a_large_tar(tmp_path):
    """`ImageFolder` and `Captioned` could leave it out, `Shards` could not. It is counted and named, its label goes
    with it, and the counts of index.json are those of all pictures."""
    good = [(f'{i}.png',png(10*i)) for i in range(1,5)]
    labels = [(f'{i}.cls',str(i).encode()) for i in range(1,5)]
    cut = [(name,content[:30] if name=='3.png' else content) for name,content in good]
    shards = [tar(tmp_path/'a.tar', *cut[:2], *labels[:2]), tar(tmp_path/'b.tar', *cut[2:], *labels[2:])]
    (tmp_path/'index.json').write_text('{"a.tar": 2, "b.tar": 2}')
    with pytest.raises(ValueError, match='b.tar: 3.png cannot be read'): greys(Shards(shards, size=4))
    with pytest.warns(UserWarning, match='Shards leaves out 1 picture. .*b.tar: 3.png'):
        ds = Shards(shards, size=4, keep=1, skip='warn')
    assert [*ds.failed]==[f'{shards[1]}: 3.png']
    assert (len(ds),ds.counts,greys(ds),ds[:]['label'].tolist())==(3,[2,1],[10,20,40],[1,2,4])
    assert greys(ds)==[10,20,40]                                            # the first shard is read again
    assert sorted(ds.order(torch.Generator()).tolist())==[0,1,2]

def test_shards_without_a_good_picture(tmp_path):
    "Of a shard all may be bad; of all shards not."
    shards = [tar(tmp_path/'a.tar', ('1.png',b'cut')), tar(tmp_path/'b.tar', ('2.png',png(7)))]
    with pytest.warns(UserWarning, match='a.tar: 1.png'): assert greys(Shards(shards, size=4, skip=True))==[7]
    with pytest.warns(UserWarning), pytest.raises(ValueError, match='none of 1 pictures can be read. .*a.tar: 1.png'):
        Shards(shards[0], skip='warn')
    with pytest.raises(ValueError, match="skip is 'all'; it can be True or False"): Shards(shards[1], skip='all')
    with pytest.raises(ValueError, match='b.tar has 1 picture, and 2 were counted'):
        Shards(shards[1], counts=[2], skip='warn')

@pytest.mark.parametrize('per_shard', [0, -1, 2.5, '3'])
def test_shards_of_no_pictures(tmp_path, per_shard):
    "A raw error of `range`; nothing is written."
    with pytest.raises(ValueError, match='per_shard='): write_shards(Digits(split='test'), tmp_path/'d', per_shard)
    with pytest.raises(ValueError, match='the set is empty'): write_shards([], tmp_path/'d')
    assert not (tmp_path/'d').exists()

def test_shards_among_those_of_a_larger_set(tmp_path):
    "What was left of the larger one was read as a part of the smaller one, by whoever lists the folder."
    ds = ImageFolder(save(tmp_path/'pics'/'1.png').parent, size=8)
    assert write_shards(ds, tmp_path/'d')==write_shards(ds, tmp_path/'d')      # the same may be written again
    tar(tmp_path/'d'/'000001.tar', ('1.png',png()))
    with pytest.raises(ValueError, match=r'other tar files \(000001.tar\)'): write_shards(ds, tmp_path/'d')

def test_faces_that_cannot_be_written(tmp_path):
    "Too few numbers cut the set short in silence; a set without masks failed after the first picture."
    faces = SyntheticFaces(n=3, size=16)
    with pytest.raises(ValueError, match='2 numbers for 3 faces'): write_celebamask_hq(faces, tmp_path/'d', [1,2])
    with pytest.raises(ValueError, match='has no attrs and no mask'): write_celebamask_hq(Digits(), tmp_path/'d')
    assert not (tmp_path/'d').exists()

@pytest.mark.parametrize('options,says', [(dict(workers=0), 'workers=0'), (dict(retries=-1), 'retries=-1'),
                                          (dict(timeout=0), 'timeout=0')], ids=['workers','retries','timeout'])
def test_numbers_that_fetch_nothing(tmp_path, options, says):
    "They were an UnboundLocalError, or an error of a thread pool."
    with pytest.raises(ValueError, match=says): fetch_images(['http://127.0.0.1:9/a.png'], tmp_path/'d', **options)
    (tmp_path/'file').touch()
    with pytest.raises(ValueError, match='file is a file'): fetch_images([], tmp_path/'file')
    assert [*fetch_images('ftp://x/a.png', tmp_path/'d', progress=False)[1]]==['ftp://x/a.png']      # one address

def test_captions_are_written_into_shards(tmp_path):
    for i in range(3): save(tmp_path/f'{i}.png', i)
    table = 'file,caption\n'+''.join(f'{i}.png,é {i}\n' for i in range(3))
    (tmp_path/'captions.csv').write_text(table, encoding='utf-8')
    ds = Captioned(tmp_path, test=0, size=4)
    assert Shards(write_shards(ds, tmp_path/'tars', 2, shuffle=False), size=4)[:]['caption']==ds.caption

def test_shards_are_not_augmented(tmp_path):
    "Shards with captions are refused as those without: there was an AttributeError."
    for i in range(3): save(tmp_path/f'{i}.png', i)
    rows = ''.join(f'{i}.png,x\n' for i in range(3))
    (tmp_path/'captions.csv').write_text('file,caption\n'+rows, encoding='utf-8')
    shards = Shards(write_shards(Captioned(tmp_path, test=0, size=4), tmp_path/'tars', 2), size=4)
    with pytest.raises(ValueError, match='shards cannot be augmented'): Augmented(shards, 2)


# ---- captions

def table(f, *rows, header='file,caption'):
    f.parent.mkdir(parents=True, exist_ok=True)
    f.write_text('\n'.join([header,*rows])+'\n', encoding='utf-8')

def zipped(f, folder, *more):
    "A zip file of a folder, and of what macOS or others add: (name, bytes)."
    with zipfile.ZipFile(f, 'w') as z:
        for p in sorted(folder.rglob('*')):
            if p.is_file(): z.write(p, p.relative_to(folder).as_posix())
        for name,content in more: z.writestr(name, content)
    return f

def test_what_macs_and_jupyter_add_to_a_captioned_set(tmp_path):
    "In a folder and in a zip file."
    d = tmp_path/'d'
    for i in range(3): save(d/f'{i}.png', 10*i)
    table(d/'captions.csv', *(f'{i}.png,picture {i}' for i in range(3)))
    junk = [(f'__MACOSX/._{n}',b'\0\5\x16\7') for n in ('captions.csv','0.png')]
    junk.append(('.ipynb_checkpoints/captions.csv',b''))
    ds = Captioned(zipped(tmp_path/'a.zip', d, *junk), test=0, size=4)
    assert ds.caption==['picture 0','picture 1','picture 2'] and greys(ds)==[0,10,20]
    (d/'captions.csv').rename(d/'mine.csv')
    (d/'._mine.csv').write_bytes(b'\0\5\x16\7')
    assert len(Captioned(d, test=0, size=4))==3

def test_the_outermost_table_of_a_zip_file(tmp_path):
    "As in a folder: captions.csv comes before other tables, and before those in folders."
    save(tmp_path/'d'/'0.png', 50)
    table(tmp_path/'d'/'captions.csv', '0.png,a')
    z = zipped(tmp_path/'a.zip', tmp_path/'d', ('old/captions.csv',b''), ('notes.csv',b''))
    assert greys(Captioned(z, test=0, size=4))==[50]
    z = zipped(tmp_path/'b.zip', tmp_path/'none', ('pairs.json',b'[{"file":"0.png","caption":"a"}]'), ('0.png',png(60)))
    assert greys(Captioned(z, test=0, size=4))==[60]

def test_checkpoints_are_no_pictures(tmp_path):
    for f in ('a','.ipynb_checkpoints/a','._b'):
        save(tmp_path/f'{f}.png')
        (tmp_path/f'{f}.txt').write_text('a picture')
    assert Captioned(tmp_path, test=0, size=4).name==['a.png']

def test_captions_in_linked_folders(tmp_path):
    save(tmp_path/'real'/'a.png', 70)
    (tmp_path/'real'/'a.txt').write_text('a picture')
    (tmp_path/'set').mkdir()
    (tmp_path/'set'/'b').symlink_to(tmp_path/'real')
    ds = Captioned(tmp_path/'set', test=0, size=4)
    assert ds.name==['b/a.png'] and greys(ds)==[70]

@pytest.mark.parametrize('of_table,of_file', [('NFC','NFD'),('NFD','NFC')])
def test_accents_in_two_spellings_meet(tmp_path, of_table, of_file):
    d = tmp_path/'d'
    save(d/f"{unicodedata.normalize(of_file, 'Café')}.png", 30)
    table(d/'captions.csv', f"{unicodedata.normalize(of_table, 'Café')}.png,a café")
    assert greys(Captioned(d, test=0, size=4))==[30]
    assert greys(Captioned(zipped(tmp_path/'a.zip', d), test=0, size=4))==[30]
    inner = tmp_path/'inner'
    table(inner/'captions.csv', f"{unicodedata.normalize(of_table, 'Café')}.png,a café")
    (d/'captions.csv').unlink()
    zipped(inner/'images.zip', d)
    assert greys(Captioned(inner, test=0, size=4))==[30]

def test_a_zip_file_of_windows(tmp_path):
    z = zipped(tmp_path/'a.zip', tmp_path/'none', ('captions.csv',b'file,caption\n./images\\0.png,x'),
               ('images\\0.png',png(40)))
    assert greys(Captioned(z, test=0, size=4))==[40]

@pytest.mark.parametrize('packed', [False,True])
def test_one_table_for_the_folders_train_and_test(tmp_path, packed):
    "metadata.csv at the root naming train/0.png, as the Hugging Face hub has it."
    d = tmp_path/'d'
    for f,grey in (('train/0',0),('train/1',10),('test/0',20)): save(d/f'{f}.png', grey)
    table(d/'metadata.csv', 'train/0.png,a', 'train/1.png,b', 'test/0.png,c', header='file_name,text')
    root = zipped(tmp_path/'a.zip', d) if packed else d
    train,test = (Captioned(root, split, size=4) for split in ('train','test'))
    assert (train.caption,greys(train),test.caption,greys(test))==(['a','b'],[0,10],['c'],[20])
    save(d/'val'/'0.png', 30)
    table(d/'metadata.csv', 'train/0.png,a', 'test/0.png,c', 'val/0.png,d', header='file_name,text')
    with pytest.warns(UserWarning, match='val/0.png: it lies neither in train nor in test'):
        assert len(Captioned(d, size=4))==1

def test_one_file_under_two_names_is_on_one_side(tmp_path):
    for i in range(30): save(tmp_path/f'{i}.png', 8*i)
    table(tmp_path/'captions.csv', *(f'{i}.png,a' for i in range(30)), *(f'./{i}.png,b' for i in range(30)))
    sides = [{n.removeprefix('./') for n in Captioned(tmp_path, s, size=4, test=.4).name} for s in ('train','test')]
    assert not sides[0]&sides[1] and len(sides[0]|sides[1])==30

def test_names_and_captions_that_are_not_unicode(tmp_path):
    "They are escaped, so that codes and models made of them can be saved."
    latin = Path(os.fsdecode(os.fsencode(tmp_path)+b'/caf\xe9.png'))
    save(latin)
    latin.with_suffix('.txt').write_text('coffee')
    ds = Captioned(tmp_path, test=0, size=4)
    assert ds.name==['caf\\udce9.png'] and ds[0]['name'].encode()
    save(tmp_path/'b'/'0.png')
    (tmp_path/'b'/'captions.jsonl').write_text('{"file":"0.png","caption":"half \\ud800","more":"\\udc00"}')
    ds = Captioned(tmp_path/'b', test=0, size=4)
    assert ds.caption==['half \\ud800'] and ds.rows[0]['more']=='\\udc00'

@pytest.mark.parametrize('name,text,says', [
    ('captions.json', '['*100000, 'is not JSON'), ('captions.json', '1'*5000, 'is not JSON'),
    ('captions.jsonl', '{"file":"0.png","caption":["a",null]}', 'row 1 has no caption'),
    ('captions.jsonl', '{"file":"0.png","caption":"a","split":["x"]}', 'the column split has')])
def test_tables_that_cannot_be(tmp_path, name, text, says):
    save(tmp_path/'0.png')
    (tmp_path/name).write_text(text)
    with pytest.raises(ValueError, match=says): Captioned(tmp_path)

def test_a_line_separator_within_a_caption(tmp_path):
    save(tmp_path/'0.png')
    text = json.dumps(dict(file='0.png', caption='a\u2028b', group=7), ensure_ascii=False)
    (tmp_path/'captions.jsonl').write_text(text+'\r\n', encoding='utf-8', newline='')
    assert Captioned(tmp_path, test=0).caption==['a b']

def test_a_damaged_table_in_a_zip_file(tmp_path):
    z = zipped(tmp_path/'a.zip', tmp_path/'none', ('captions.csv',b'file,caption\n0.png,abcdefgh'))
    z.write_bytes(z.read_bytes().replace(b'abcdefgh', b'abcdefgx', 1))
    with pytest.raises(ValueError, match='captions.csv cannot be read'): Captioned(z)


# ---- loader processes

class Several(torch.utils.data.Dataset):
    "Two pictures of each set."
    def __init__(self, sets): self.sets = sets
    def __len__(self): return len(self.sets)
    def __getitem__(self, i): return self.sets[i].__getitems__([1,0])

def same(items): return items

def alike(a, b): return torch.equal(a, b) if torch.is_tensor(a) else a==b

def celeba(folder, **more):
    "A part of CelebA in zip files, four faces of which half are for training."
    faces,names = SyntheticFaces(n=4, parts=PARTS8),[f'{i:06d}' for i in range(4)]
    folder.mkdir(parents=True)
    with zipfile.ZipFile(folder/'images.zip', 'w') as z:
        for name,x in zip(names, faces[:]['image']): z.writestr(f'{name}.jpg', raw(to_image(x), 'png'))
    with zipfile.ZipFile(folder/'masks.zip', 'w') as z:
        for name,mask in zip(names, faces[:]['mask'].numpy()):
            z.writestr(f'{name}.png', raw(Image.fromarray(mask), 'png'))
    attrs = faces[:]['attrs'].tolist()
    rows = [f"{n}.jpg,{'train' if i<2 else 'val'},{','.join(map(str, attrs[i]))}" for i,n in enumerate(names)]
    table(folder/'attributes.csv', *rows, header=','.join(['file','split',*faces.attributes]))
    return faces

def every_set(d):
    "One set of each kind that reads, from folders and from zip files, without a cache."
    files = [save(d/'folder'/c/f'{i}.png', 40*i+9) for c in 'ab' for i in range(2)]
    for i,f in enumerate(files): table(f.with_suffix('.txt'), header=f'picture {i}')
    for name,columns in (('captions','file,caption'),('paintings','file,style,artist,title')):
        rows = [','.join([f'{c}/{i}.png',*'xyz'[:columns.count(',')]]) for c in 'ab' for i in range(2)]
        zipped(d/f'{name}.zip', d/'folder', ('captions.csv','\n'.join([columns,*rows])))
    for name in ('wikiart-titles','flickr8k-1k'):
        rows = [f'{c}/{i}.png,x,y,z' for c in 'ab' for i in range(2)]
        table(d/name/'captions.csv', *rows, header='file,style,artist,title')
        zipped(d/name/'images.zip', d/'folder')
    table(d/'flickr8k-1k'/'captions.csv', *(f'{c}/{i}.png,x' for c in 'ab' for i in range(2)))
    table(d/'flowers17'/'labels.csv', *(f'{c}/{i}.png,{"ab".index(c)},{c}' for c in 'ab' for i in range(2)),
          header='file,label,name')
    zipped(d/'flowers17'/'images.zip', d/'folder')
    pairs = [dict(image=f'{c}/{i}.png', text='x') for c in 'ab' for i in range(2)]
    (d/'folder'/'musti.json').write_text(json.dumps(pairs))
    celeba(d/'celeba10k')
    write_celebamask_hq(SyntheticFaces(n=2), d)
    how = dict(size=8, cache=0)
    folder = ImageFolder(d/'folder', **how)
    captioned = Captioned(d/'captions.zip', test=0, **how)
    faces = CelebA(d, **how)
    return [Digits(), folder, Captioned(d/'folder', test=0, **how), captioned, ClipArt(**how),
            Captioned(d/'captions.zip', test=0, pad=True, **how), Together(captioned, captioned),
            Paintings(d, test=0, **how), Photos(d, test=0, **how), Flowers17(d, **how),
            MUSTI(d/'folder'/'musti.json', test=0, **how), Shards(write_shards(folder, d/'tars', 2), size=8),
            faces, Mirrored(faces), Described(faces), CelebAMaskHQ(d, **how), SyntheticFaces(n=2, size=16),
            SyntheticScenes(n=2), Augmented(ImageFolder(d/'folder', size=8))]

@pytest.mark.filterwarnings('ignore:.*worker')
@pytest.mark.parametrize('method', ['fork',pytest.param('spawn', marks=pytest.mark.slow)])
def test_every_set_in_loader_processes(tmp_path, method):
    "The pictures of this process, read before, are those of two processes at once, forked or new."
    ds = Several(every_set(tmp_path))
    here = [ds[i] for i in range(len(ds))]
    sampler = [*range(len(ds))]*(5 if method=='fork' else 1)
    workers = dict(num_workers=2 if method=='fork' else 1, multiprocessing_context=method)
    for i,batch in zip(sampler, torch.utils.data.DataLoader(ds, 1, sampler=sampler, collate_fn=same, **workers)):
        for key,value in here[i].items(): assert alike(value, batch[0][key]), (type(ds.sets[i]),key)

def test_every_set_shows_itself(tmp_path):
    for ds in every_set(tmp_path): assert type(ds).__name__ in repr(ds) and str(len(ds)) in repr(ds)


# ---- faces

def kaggle(d, splits, nested=True):
    "CelebA as Kaggle has it."
    pictures = d/'img_align_celeba'/('img_align_celeba' if nested else '')
    for i in range(len(splits)): save(pictures/f'{i+1:06d}.jpg', 20*i)
    rows = [f"{i+1:06d}.jpg,{','.join('1' if a%2==i%2 else '-1' for a in range(40))}" for i in range(len(splits))]
    table(d/'list_attr_celeba.csv', *rows, '', header=','.join(['image_id',*ATTRIBUTES]))
    rows = [f'{i+1:06d}.jpg,{s}' for i,s in enumerate(splits)]
    table(d/'list_eval_partition.csv', *rows, header='image_id,partition')

@pytest.mark.parametrize('nested', [True,False])
def test_celeba_as_kaggle_has_it(tmp_path, nested):
    kaggle(tmp_path/'celeba-dataset', [0,0,1,2], nested)
    train,test = (CelebA(tmp_path, split, size=8) for split in ('train','test'))
    assert (greys(train),greys(test))==([0,20],[60]) and train.attributes==ATTRIBUTES
    assert train.attrs[:,:2].tolist()==[[1,0],[0,1]]
    assert len(CelebA(tmp_path/'celeba-dataset', size=8))==2                    # the folder itself may be given

def test_celeba_without_rows_of_a_split(tmp_path):
    kaggle(tmp_path/'celeba', [0,0])
    for split in ('val','test'):
        with pytest.raises(FileNotFoundError, match=f"no picture of split '{split}'"): CelebA(tmp_path, split)

def test_celeba_without_some_pictures(tmp_path):
    "It is said at the start, also without a cache, from folders and from zip files."
    kaggle(tmp_path/'celeba', [0,0,0])
    (tmp_path/'celeba'/'img_align_celeba'/'img_align_celeba'/'000002.jpg').unlink()
    with pytest.raises(FileNotFoundError, match='1 of 3 pictures are not in .*000002.jpg'): CelebA(tmp_path, cache=0)
    celeba(tmp_path/'b'/'celeba10k')
    with zipfile.ZipFile(tmp_path/'b'/'celeba10k'/'images.zip', 'w') as z: z.writestr('000001.jpg', b'')
    with pytest.raises(FileNotFoundError, match='1 of 2 pictures are not in .*images.zip'):
        CelebA(tmp_path/'b', cache=0)
    (tmp_path/'celeba'/'list_eval_partition.csv').unlink()
    with pytest.raises(FileNotFoundError, match='list_eval_partition.txt .or .csv. does not exist'): CelebA(tmp_path)

def test_masks_that_were_restored_come_back(tmp_path):
    "In the same process."
    folder = write_celebamask_hq(SyntheticFaces(n=3), tmp_path)
    masks = [*(folder/'CelebAMask-HQ-mask-anno'/'0').glob('00001_*')]
    kept = {f:f.read_bytes() for f in masks}
    for f in masks: f.unlink()
    with pytest.warns(UserWarning, match='no mask: 1 of 3 pictures'): assert len(CelebAMaskHQ(tmp_path))==2
    for f,content in kept.items(): f.write_bytes(content)
    assert len(CelebAMaskHQ(tmp_path))==3

@pytest.mark.parametrize('content,says', [
    (b'caf\xe9', 'is not UTF-8'), (b'name,Smiling\na.jpg,1\n', 'no attributes: expected'),
    (b'file,Smiling\na.jpg,2\n', 'line 2'), (b'', 'no attributes')])
def test_attribute_tables_that_cannot_be(tmp_path, content, says):
    (tmp_path/'attributes.csv').write_bytes(content)
    with pytest.raises(ValueError, match=says): read_attributes(tmp_path/'attributes.csv')

@pytest.mark.parametrize('rows,says', [
    (['0.png,1,a'], r'labels \[1\]: expected 0, 1'), (['1.png,0,a'], '1 of 1 pictures.*1.png'), ([], 'expected 0, 1'),
    (['0.png,a,a'], 'is damaged'), (['0.png'], 'is damaged')])
def test_tables_of_labels_that_cannot_be(tmp_path, rows, says):
    save(tmp_path/'flowers17'/'0.png')
    table(tmp_path/'flowers17'/'labels.csv', *rows, header='file,label,name')
    with pytest.raises((ValueError,FileNotFoundError), match=says): Flowers17(tmp_path)
