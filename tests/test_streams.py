"Tar shards, Parquet and Arrow files as the data of recipes."
import io, json, tarfile
import pytest, torch
from PIL import Image
from fastldm.data import (ArrowPictures, Digits, Pictures, Shards, get_dataset, hash01, to_image, write_shards,
                          write_stream)
from fastldm.recipes import captioned_set, label_denoiser, label_ldm, own_pictures, picture_set

class Captioned(Pictures):
    "Two hundred digits with captions."
    def __init__(self):
        digits = Digits()
        super().__init__(digits.image[:200], digits.label[:200], digits.classes)
    def __getitem__(self, i): return dict(super().__getitem__(i), caption=f'the digit {self.label[i]}')

@pytest.fixture(scope='module')
def sources(tmp_path_factory):
    "{kind: folder or file} with the same digits."
    folder = tmp_path_factory.mktemp('sources')
    digits = Captioned()
    write_shards(digits, folder/'shards', per_shard=25, shuffle=False)
    found = dict(shards=folder/'shards')
    try: import datasets
    except ImportError: return found
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=digits.classes),
                                 caption=datasets.Value('string'))
    rows = [dict(digits[i], image=to_image(digits[i]['image'], lo=-1.), label=int(digits.label[i])) for i in range(200)]
    table = datasets.Dataset.from_list(rows, features=features)
    table.to_parquet(folder/'digits.parquet')
    table.save_to_disk(folder/'saved')
    stream = datasets.load_dataset('parquet', data_files=str(folder/'digits.parquet'), split='train', streaming=True)
    write_stream(stream, folder/'streamed', per_shard=25, progress=False)
    return found | dict(parquet=folder/'digits.parquet', arrow=folder/'saved', streamed=folder/'streamed')

KINDS = ['shards','parquet','arrow','streamed']

def path_of(sources, kind):
    if kind not in sources: pytest.skip('pip install "fastldm[arrow]" to read tables')
    return str(sources[kind])

@pytest.mark.parametrize('kind', KINDS)
def test_a_source_by_its_path(sources, kind):
    "The pictures, labels, names of classes and captions are those that were written; a share can be kept aside."
    digits = Captioned()
    ds = get_dataset(path_of(sources, kind), size=16, channels=1)
    assert isinstance(ds, ArrowPictures if kind in ('parquet','arrow') else Shards)
    assert torch.equal(ds.pixels(range(200)), digits.image)
    assert [*ds.classes]==[*digits.classes] and ds.digest()
    batch = ds.__getitems__([150,3])
    assert batch['label'].tolist()==digits.label[[150,3]].tolist()
    assert batch['caption']==[digits[150]['caption'],digits[3]['caption']]
    parts = [picture_set(path_of(sources, kind), size=16, split=split, test=.2) for split in ('train','test')]
    assert sum(map(len, parts))==200 and 20<len(parts[1])<60
    with pytest.raises(FileNotFoundError, match="part 'test'"): picture_set(path_of(sources, kind), split='test')

@pytest.mark.parametrize('kind', KINDS)
def test_a_source_of_captions(sources, kind):
    "A tenth is held out where the source has no part for it."
    train, held_out = (captioned_set(path_of(sources, kind), split=split, size=16) for split in ('train','test'))
    assert len(train.caption)==len(train) and len(held_out.caption)==len(held_out)
    assert sorted(train.caption+held_out.caption)==sorted(Captioned()[i]['caption'] for i in range(200))

@pytest.mark.slow
@pytest.mark.parametrize('kind', ['shards','parquet'])
def test_a_recipe_from_a_source(sources, kind, tmp_path):
    "A model with the labels of the source; the same call again finds the same pictures."
    options = dict(ae_steps=2, steps=2, ae_channels=(8,), channels=(16,), c_latent=2, batch_size=16, progress=False)
    ldm = label_ldm(path_of(sources, kind), tmp_path/'run', size=16, **options)
    assert ldm.meta['classes']==[*'0123456789']
    assert ldm.sample(2, label='7', steps=1).shape==(2,3,16,16)
    again = label_ldm(path_of(sources, kind), tmp_path/'run', size=16, **options)
    assert torch.equal(again.sample(1, seed=0, steps=1), ldm.sample(1, seed=0, steps=1))

@pytest.mark.parametrize('kind', KINDS)
def test_a_share_kept_aside_is_divided(sources, kind):
    "Into pictures that choose the weights and pictures for scores, with their labels."
    own = own_pictures(path_of(sources, kind), size=16, test=.2)
    assert len(own.train)+len(own.validation)+len(own.test)==200
    whole = picture_set(path_of(sources, kind), size=16, split='test', test=.2)
    assert torch.equal(own.test[:]['label'], whole[1::2]['label'])
    assert torch.equal(own.validation[:]['image'], whole[::2]['image'])

def test_labels_without_names(sources, tmp_path):
    "Nobody could ask for a class without a name, so a warning says that the labels are left out."
    write_shards(Captioned(), tmp_path, per_shard=100)
    (tmp_path/'classes.json').unlink()
    with pytest.warns(UserWarning, match='labels are left out'):
        assert label_denoiser(get_dataset(tmp_path, size=16), 4, (8,8)).conditioner is None

@pytest.mark.parametrize('column, message', [('image','row 3 of the table has no picture'),
                                             ('label','row 3 of the table has no label')])
def test_a_row_without_something(tmp_path, column, message):
    "The row is named; without a caption nothing is said about the picture."
    datasets = pytest.importorskip('datasets')
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=['a','b']),
                                 caption=datasets.Value('string'))
    rows = [dict(image=to_image(torch.zeros(3, 8, 8)), label=0, caption=None) for _ in range(5)]
    assert ArrowPictures(datasets.Dataset.from_list(rows, features=features), size=8).caption==['']*5
    rows[3][column] = None
    with pytest.raises(ValueError, match=message):
        ArrowPictures(datasets.Dataset.from_list(rows, features=features), size=8)

def test_whole_numbers_are_no_classes():
    "A column of labels that names no classes is left out with a warning, which says how to name them."
    datasets = pytest.importorskip('datasets')
    features = datasets.Features(image=datasets.Image(), label=datasets.Value('int64'))
    rows = [dict(image=to_image(torch.zeros(3, 8, 8)), label=0) for _ in range(3)]
    with pytest.warns(UserWarning, match="'label' is left out.*ClassLabel"):
        assert ArrowPictures(datasets.Dataset.from_list(rows, features=features), size=8).label is None

def labelled_shards(folder, labels, classes):
    "A folder of two shards whose labels are not checked when they are written."
    image = torch.zeros(len(labels), 1, 8, 8, dtype=torch.uint8)
    write_shards(Pictures(image, labels), folder, per_shard=2, shuffle=False)
    (folder/'classes.json').write_text(json.dumps(classes))
    return folder

def test_labels_of_shards_that_count_from_one(tmp_path):
    "The last class would be trained as 'no label': it is an error when its shard is read."
    folder = labelled_shards(tmp_path, [1,1,2,1], ['cat','dog'])
    ds = get_dataset(folder, size=8, channels=1)
    assert ds[:2]['label'].tolist()==[1,1]
    with pytest.raises(ValueError, match='000001.tar has the label 2, and 2 classes have names'): ds[2]

def test_class_names_of_an_earlier_set_are_removed(tmp_path):
    labelled_shards(tmp_path, [0,1], ['cat','dog'])
    write_shards(Pictures(torch.zeros(2, 1, 8, 8, dtype=torch.uint8)), tmp_path, per_shard=2)
    assert list(get_dataset(tmp_path, size=8).classes)==[]

def test_rows_in_any_order_read_each_shard_once(tmp_path, reads):
    image = torch.arange(40, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 8, 8)
    ds = Shards(write_shards(Pictures(image), tmp_path, per_shard=4, shuffle=False), size=8, channels=1, keep=1)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0)).tolist()
    assert ds.pixels(order)[:,0,0,0].tolist()==order
    assert len(reads)<=10 and reads==sorted(reads)

def a_table(n=60, labels=None, picture=None):
    "A table of grey pictures, and of labels."
    datasets = pytest.importorskip('datasets')
    def png(i):
        out = io.BytesIO()
        Image.new('L', (8,8), i).save(out, 'png')
        return out.getvalue()
    features = dict(image=datasets.Image()) | (dict(label=datasets.ClassLabel(names=['a','b'])) if labels else {})
    pictures = [dict(bytes=(picture or png)(i), path=None) for i in range(n)]
    return datasets.Dataset.from_dict(dict(image=pictures) | (dict(label=labels) if labels else {}),
                                      features=datasets.Features(features))

def greys(folder):
    corners = get_dataset(folder, size=8, channels=1)[:]['image'][:,0,0,0]
    return corners.add(1).mul(127.5).round().tolist()

def test_a_stream_in_several_calls(tmp_path):
    "More rows are added to what is there, also to a shard that is not full; nothing is lost or written twice."
    table = a_table()
    for n in (25,50,None,None): write_stream(table, tmp_path, n=n, per_shard=10, progress=False)
    assert greys(tmp_path)==[*range(60)]
    assert json.loads((tmp_path/'index.json').read_text())=={f'{i:06}.tar':10 for i in range(6)}
    with pytest.raises(ValueError, match='has 60 rows of the stream already, and n=30'):
        write_stream(table, tmp_path, n=30, per_shard=10, progress=False)
    with pytest.raises(ValueError, match='has shards of 10 pictures, and per_shard=5'):
        write_stream(table, tmp_path, per_shard=5, progress=False)

def test_an_interrupted_stream(tmp_path):
    "After its second shard, and after its last one, which is not full, but before the index."
    table = a_table(25)
    write_stream(table, tmp_path, n=20, per_shard=10, progress=False)
    (tmp_path/'index.json').unlink()
    with pytest.raises(ValueError, match='shards of 10 pictures'): write_stream(table, tmp_path, per_shard=5)
    write_stream(table, tmp_path, per_shard=10, progress=False)
    for name in ('index.json','stream.json'): (tmp_path/name).unlink()
    write_stream(table, tmp_path, per_shard=10, progress=False)
    assert greys(tmp_path)==[*range(25)]

def test_a_whole_stream_is_not_read_again(tmp_path):
    table = a_table(25)
    files = write_stream(table, tmp_path, per_shard=10, progress=False)
    times = [file.stat().st_mtime_ns for file in files]
    assert write_stream(table, tmp_path, per_shard=10, progress=False)==files
    assert [file.stat().st_mtime_ns for file in files]==times

@pytest.mark.parametrize('kind,suffix', [('mpo','jpeg'), ('ico','png'), ('webp','webp')])
def test_pictures_of_a_stream_in_any_format(tmp_path, kind, suffix):
    "A phone's files keep their bytes; what shards cannot hold becomes PNG."
    def picture(i):
        out = io.BytesIO()
        Image.new('RGB', (16,16), (200,100,50)).save(out, kind)
        return out.getvalue()
    file, = write_stream(a_table(2, picture=picture), tmp_path, progress=False)
    with tarfile.open(file) as tar: assert tar.getnames()==[f'0000000{i}.{suffix}' for i in range(2)]
    pixel = Shards(file, size=8).pixels([1])[0,:,4,4].tolist()
    assert pixel==pytest.approx([200,100,50], abs=4)

def test_labels_of_a_stream(tmp_path):
    "-1 in all rows is no label; in some, an error, as in a table."
    file, = write_stream(a_table(4, labels=[-1]*4), tmp_path/'none', progress=False)
    with tarfile.open(file) as tar: assert [name[-4:] for name in tar.getnames()]==['.png']*4
    with pytest.raises(ValueError, match='rows 0 to 2 of the stream some have a label'):
        write_stream(a_table(4, labels=[0,1,-1,1]), tmp_path/'some', progress=False)
    with pytest.raises(ValueError, match='row 2 of the table has no label'):
        ArrowPictures(a_table(4, labels=[0,1,-1,1]))
    assert ArrowPictures(a_table(4, labels=[-1]*4)).label is None

def class_folders(folder, splits, classes, n=5):
    for split in splits:
        for i,name in enumerate(classes):
            (folder/split/name).mkdir(parents=True)
            for k in range(n): Image.new('L', (8,8), 40*i+k).save(folder/split/name/f'{k}.png')
    return folder

def test_pictures_for_testing_that_cannot_be_read(tmp_path):
    "They were left aside without a word, and the run had no scores."
    folder = class_folders(tmp_path, ('train','test'), 'ab')
    assert len(own_pictures(folder, size=8).test)==5
    (folder/'test'/'a'/'0.png').write_bytes(b'no picture')
    with pytest.raises(ValueError, match='0.png cannot be read'): own_pictures(folder, size=8)
    (folder/'test'/'a'/'0.png').unlink()
    (folder/'test'/'c').mkdir()
    Image.new('L', (8,8)).save(folder/'test'/'c'/'0.png')
    with pytest.raises(ValueError, match='has folders that .* does not have'): own_pictures(folder, size=8)

def test_a_table_too_small_for_a_part_for_testing(tmp_path):
    "It has none, which is no error."
    names = [name for name in (f'{i}.png' for i in range(20)) if hash01(name)>=.1][:3]      # all for training
    for i,name in enumerate(names): Image.new('L', (8,8), i).save(tmp_path/name)
    rows = [f'{name},{"ab"[i%2]}' for i,name in enumerate(names)]
    (tmp_path/'table.csv').write_text('\n'.join(['file,kind',*rows]))
    assert own_pictures(tmp_path, size=8, conditions='kind:label').test is None
