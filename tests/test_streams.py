"Tar shards, Parquet and Arrow files as the data of recipes."
import pytest, torch
from fastldm.data import ArrowPictures, Digits, Pictures, Shards, get_dataset, to_image, write_shards, write_stream
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
    write_shards(digits, folder/'shards', per_shard=25)
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
