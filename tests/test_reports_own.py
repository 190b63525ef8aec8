"Symptoms of pictures of one's own: a folder that changed, a path, a mask or a name that was quietly taken for another."
import errno
import warnings
from inspect import signature
import pytest
import torch
from PIL import Image
from fastldm import load
from fastldm.core import write_atomic
from fastldm.data import Captioned, ImageFolder, PictureTable, get_dataset
from fastldm.recipes import eval_cli, own_ldm, own_pictures, sample_cli, train_cli
from fastldm.recipes.stages import check_free, check_same_classes, full_path, picture_set, training_set

TINY = dict(size=16, steps=2, ae_steps=2, ae_channels=(8,8), channels=(8,8), c_latent=2, progress=False)

def pictures(folder, **counts):
    "A folder of noise for each class."
    for k,(name,n) in enumerate(counts.items()):
        (folder/name).mkdir(parents=True, exist_ok=True)
        for i in range(n):
            generator = torch.Generator().manual_seed(100*k+i)
            noise = torch.randint(0, 255, (16,16,3), generator=generator)
            Image.fromarray(noise.byte().numpy()).save(folder/name/f'{i}.png')
    return folder

# ---- a folder that changed

@pytest.fixture(scope='module')
def pets(tmp_path_factory):
    "A model of cats and dogs, whose folder has zebras and dogs today."
    place = tmp_path_factory.mktemp('pets')
    folder = pictures(place/'data', cat=4, dog=4)
    own_ldm(folder, place/'model', **TINY)
    (folder/'cat').rename(folder/'zebra')
    return place

def test_classes_that_changed_since_training(pets):
    "Dogs were scored, and trained on, as cats."
    model = load(pets/'model')
    says = 'has learned the classes cat, dog, and the set has dog, zebra'
    with pytest.raises(ValueError, match=says): training_set(model, size=16)
    with pytest.raises(SystemExit, match=says): eval_cli(str(pets/'model'), n=4, steps=2)
    local = dict(model=str(pets/'model'), kinds='edges', steps=2, out=str(pets/'adapter'))
    with pytest.raises(SystemExit, match=says): train_cli('local', **local)

def test_another_set_with_other_classes(pets, tmp_path):
    "Where a set has the same classes, it serves."
    model = load(pets/'model')
    dogs = pictures(tmp_path/'dogs', dog=4)
    with pytest.raises(SystemExit, match='and the set has dog,'):
        eval_cli(str(pets/'model'), data=str(dogs), n=4, steps=2)
    same = own_ldm(pictures(tmp_path/'same', cat=2, dog=2), tmp_path/'other', **TINY)
    check_same_classes(training_set(same, size=16), model)

# ---- a table

def table(folder, header, rows):
    "A table beside twenty pictures, with a cell of its own for each."
    pictures(folder, all=20)
    lines = [f'file,{header}', *(f'all/{i}.png,{cell}' for i,cell in enumerate(rows))]
    (folder/'table.csv').write_text('\n'.join(lines)+'\n')
    return folder

def masks(folder, suffix, values=(0,1), missing=None):
    "A mask for each of twenty pictures, and their names; one may not be there."
    (folder/'seg').mkdir(parents=True)
    for i in range(20):
        if i==missing: continue
        mask = torch.tensor(values, dtype=torch.uint8).repeat_interleave(8).repeat(16,1)
        Image.fromarray(mask.numpy()).save(folder/'seg'/f'{i}{suffix}')
    return [f'seg/{i}{suffix}' for i in range(20)]

@pytest.mark.parametrize('given, says', [
    (dict(suffix='.png', missing=8), r'row 9 \(all/8.png\): seg is .seg/8.png.; there is no such file'),
    (dict(suffix='.jpg'), 'is a JPEG, whose pixels are not exact: save the mask as PNG'),
    (dict(suffix='.png', values=(0,255)), 'it is black and white: save it with the ids 0 and 1'),
])
def test_a_column_of_masks_is_no_text(tmp_path, given, says):
    "One name that was misspelt made sentences of all, and the pixels of a JPEG are others than those that were saved."
    folder = table(tmp_path, 'seg', masks(tmp_path, **given))
    with pytest.raises(ValueError, match=says): PictureTable(folder, 'seg', size=16)

def test_names_of_files_that_are_elsewhere(tmp_path):
    folder = table(tmp_path, 'seg', [f'other/{i}.png' for i in range(20)])
    with pytest.raises(ValueError, match='names of files that are not there, such as other/0.png'):
        PictureTable(folder, 'seg', size=16)

@pytest.mark.parametrize('name', ['latent','region','adapter','like'])
def test_a_column_that_is_called_as_something_of_the_library(tmp_path, name):
    "A column `latent` took the place of the latents, after the autoencoder had been trained."
    folder = table(tmp_path, name, [('a','b')[i%2] for i in range(20)])
    with pytest.raises(ValueError, match=f"'{name}' is a name that the library uses itself: rename the column"):
        picture_set(folder, size=16, conditions=name)

# ---- paths

def test_a_home_folder(tmp_path, monkeypatch):
    "A path that begins with a tilde is the same place: a tenth is kept aside, and no model goes into the data."
    monkeypatch.setenv('HOME', str(tmp_path))
    pictures(tmp_path/'many', cat=120, dog=120)
    assert own_pictures('~/many', size=16).share==own_pictures(tmp_path/'many', size=16).share==.1
    with pytest.raises(ValueError, match='the folder of the data'): check_free(tmp_path/'many'/'model', '~/many')
    assert full_path('~/many')==str(tmp_path/'many')

# ---- what was interrupted

def test_a_training_that_has_not_ended(tmp_path):
    (tmp_path/'run').mkdir()
    (tmp_path/'run'/'recipe.json').write_text('{}')
    with pytest.raises(FileNotFoundError, match='has not ended; repeat its command to go on'): load(tmp_path/'run')

@pytest.mark.parametrize('error', [OSError(errno.ENOSPC, 'No space left on device'),
                                   RuntimeError('Error while serializing: I/O error: ... (os error 28)')])
def test_a_full_disk_is_said_to_be_full(tmp_path, error):
    "With the file, and what to do; nothing is left."
    with pytest.raises(OSError, match='note.txt could not be written .*: make room on the disk, and repeat'):
        with write_atomic(tmp_path/'note.txt'): raise error
    assert not [*tmp_path.iterdir()]

def test_drawn_files_after_an_interruption(tmp_path, monkeypatch, capsys):
    "The command says how many there are, and how to draw the others."
    ldm = load('mnist')
    draws = []
    sample = type(ldm).sample_command
    def once(self, *args, **options):
        draws.append(options)
        if len(draws)>1: raise KeyboardInterrupt
        return sample(self, *args, **options)
    once.__signature__ = signature(sample)
    monkeypatch.setattr(type(ldm), 'sample_command', once)
    with pytest.raises((KeyboardInterrupt,SystemExit)):
        sample_cli('mnist', n=600, steps=1, first=10, out=str(tmp_path/'many'))
    assert '256 of 600 pictures are in' in (said := capsys.readouterr().out) and '--first 266 --n 344' in said

# ---- folders

def says(action):
    "The warnings of an action, in one text."
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter('always')
        action()
    return ' '.join(str(warning.message) for warning in found)

def test_folders_that_look_like_something_else(tmp_path):
    "One class with folders in it, parts under other names, and pictures beside their masks; usual folders say nothing."
    pictures(tmp_path/'zip'/'animals', cat=2, dog=2)
    assert f"give {tmp_path/'zip'/'animals'}" in says(lambda: ImageFolder(tmp_path/'zip', size=16))
    pictures(tmp_path/'kaggle', training_set=2, test_set=2)
    assert 'test_set, training_set are taken for classes' in says(lambda: ImageFolder(tmp_path/'kaggle', size=16))
    pictures(tmp_path/'seg', images=2, masks=2)
    assert 'images, masks are taken for classes' in says(lambda: ImageFolder(tmp_path/'seg', size=16))
    pictures(tmp_path/'usual', cat=2, dog=2, test_bench=1)
    assert not says(lambda: ImageFolder(tmp_path/'usual', size=16))

def test_pictures_in_other_formats(tmp_path):
    "What browsers save is read; what is not read is counted."
    pictures(tmp_path, cat=2)
    (tmp_path/'cat'/'0.png').rename(tmp_path/'cat'/'0.jfif')
    for i in range(3): (tmp_path/'cat'/f'{i}.HEIC').write_bytes(b'...')
    found = says(lambda: ImageFolder(tmp_path, size=16))
    assert '(3 .heic): save them as PNG or JPEG' in found
    assert len(ImageFolder(tmp_path, size=16))==2

def test_a_folder_that_is_called_like_a_public_set(tmp_path, monkeypatch):
    monkeypatch.chdir(pictures(tmp_path, all=1))
    pictures(tmp_path/'digits', zero=2)
    assert 'write ./digits for that' in says(lambda: get_dataset('digits'))
    assert len(get_dataset('./digits', size=16))==2

def test_twelve_bits_in_sixteen(tmp_path):
    "A picture that would be nearly black."
    Image.fromarray(torch.arange(0, 4096, 16).view(16,16).numpy().astype('uint16')).save(tmp_path/'a.png')
    assert 'if it has 12 bits, multiply it by 16' in says(lambda: ImageFolder(tmp_path, size=16))

def test_classes_that_are_all_kept_aside(tmp_path):
    "Of a folder and of a column: they could be asked for, and had never been seen."
    folder = pictures(tmp_path/'rare', cat=220, **{f'rare{i:02d}': 1 for i in range(60)})
    found = says(lambda: own_pictures(folder, size=16))
    kept = {name for name,n in zip(own_pictures(folder, size=16).train.classes,
                                   own_pictures(folder, size=16).train.label.bincount(minlength=61)) if not n}
    assert kept and all(name in found for name in kept) and 'give --test 0' in found
    (tmp_path/'all').mkdir()
    for i in range(4): Image.new('RGB', (16,16), (60*i,0,0)).save(tmp_path/'all'/f'{i}.png')
    wood = ['oak,train', 'pine,train', 'zebra,test', 'oak,test']
    rows = ['file,wood,split', *(f'all/{i}.png,{row}' for i,row in enumerate(wood))]
    (tmp_path/'table.csv').write_text('\n'.join(rows)+'\n')
    found = says(lambda: own_pictures(tmp_path/'table.csv', size=16, conditions='wood:label'))
    assert 'wood zebra: no picture for training' in found

def test_pictures_without_a_text(tmp_path):
    folder = pictures(tmp_path, all=5)
    for i in range(3): (folder/'all'/f'{i}.txt').write_text('a picture')
    assert '2 of 5 pictures' in says(lambda: Captioned(folder/'all', size=16, test=0.))
