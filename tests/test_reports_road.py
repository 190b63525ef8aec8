"Symptoms on the road of a newcomer with pictures of his own: an option that was lost, a file that was not found."
import json
import sys
import warnings
import numpy as np
import pytest
import torch
from PIL import Image
from fastldm import load
from fastldm.data import PictureTable, get_dataset
from fastldm.data.images import open_image
from fastldm.diffusion import LabelEmbedder
from fastldm.recipes import evaluate_control, own_ldm, own_pictures, sample_cli, train_cli, with_adapter
from fastldm.recipes.draw import adapter_of
from fastldm.recipes.stages import training_set
from fastldm.ui.app import adapters_of

TINY = dict(size=16, steps=2, ae_steps=2, ae_channels=(8,8), channels=(16,32), c_latent=2, progress=False)

def noise(folder, *names):
    "Pictures of noise."
    for seed,name in enumerate(names):
        file = folder/name
        file.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(seed).integers(0, 255, (16,16,3), dtype=np.uint8)
        Image.fromarray(pixels).save(file)
    return folder

def table(folder, header, *cells):
    "Forty pictures and a table, whose rows have the cells by turns."
    noise(folder, *[f'{i}.png' for i in range(40)])
    rows = [f'{i}.png,{cells[i%len(cells)]}' for i in range(40)]
    (folder/'table.csv').write_text('\n'.join([f'file,{header}', *rows])+'\n')
    return folder

def warned(call):
    "What a call warns of."
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter('always')
        call()
    return ' '.join(str(w.message) for w in found)

@pytest.fixture(scope='module')
def leaves(tmp_path_factory):
    "A model of a table with conditions `g`, a number, and `wild`, an attribute; no picture was kept aside."
    place = tmp_path_factory.mktemp('leaves')
    data = table(place/'data', 'g,wild,kind', '1,0,oak', '2,1,elm')
    own_ldm(data, place/'with space', conditions='g:number,wild,kind:label', test=0., **TINY)
    return place

@pytest.fixture(scope='module')
def model(leaves): return leaves/'with space'

def typed(monkeypatch, command, *words):
    "Run a command as it is typed."
    monkeypatch.setattr(sys, 'argv', [f'fastldm_{command.__name__.removesuffix("_cli")}', *map(str, words)])
    return command()

# ---- options

def test_a_condition_that_begins_as_an_option_does(model, tmp_path, monkeypatch):
    "`--g=2` is the column g, and not --guidance_scale."
    drawn = {}
    for g in (1, 2):
        file = tmp_path/f'{g}.png'
        typed(monkeypatch, sample_cli, model, f'--g={g}', '--n', 1, '--steps', 1, '--out', file)
        drawn[g] = json.loads(Image.open(file).info['fastldm'])
    assert [drawn[g]['conditions'] for g in (1, 2)]==[{'g': '1'}, {'g': '2'}]
    assert drawn[1]['guidance_scale']==drawn[2]['guidance_scale']

def test_no_abbreviations(monkeypatch, capsys):
    with pytest.raises(SystemExit): typed(monkeypatch, train_cli, 'folder', '--dat', 'x')
    assert 'unrecognized arguments: --dat' in capsys.readouterr().err

def test_the_negation_of_an_attribute(model, tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match='there is no option --no_wild: give --wild=0'):
        typed(monkeypatch, sample_cli, model, '--no_wild', '--out', tmp_path/'x.png')

def test_home(model, tmp_path, monkeypatch):
    "`--out='~/x'` is in the home folder."
    monkeypatch.setenv('HOME', str(tmp_path))
    monkeypatch.chdir(tmp_path)
    sample_cli(str(model), n=1, steps=1, out='~/s.png')
    noise(tmp_path/'data', '0.png', '1.png')
    train_cli('folder', data='~/data', out='~/m', size=16, steps=1, ae_steps=1, channels='16,32')
    assert (tmp_path/'s.png').exists() and (tmp_path/'m'/'config.json').exists()
    assert not (tmp_path/'~').exists()

# ---- pictures that are kept aside

def test_none_of_a_table(leaves, model):
    "`--test 0` trains on all rows, and the card knows; without it a tenth is kept aside."
    assert len(own_pictures(leaves/'data', size=16, conditions='g', test=0.).train)==40
    assert len(own_pictures(leaves/'data', size=16, conditions='g').train)<40
    ldm = load(model)
    assert (ldm.meta['n_pictures'], ldm.meta['test'])==(40, 0)
    assert len(training_set(ldm, size=16))==40

def test_scores_of_an_adapter_whose_base_kept_nothing(model, tmp_path, monkeypatch, capsys):
    "They are those of training pictures, which is said."
    train_cli('local', model=str(model), kinds='edges', steps=1, out=str(tmp_path/'a'))
    monkeypatch.setattr('fastldm.recipes.evaluate._fid', lambda *_: {})
    assert evaluate_control(load(model), load(tmp_path/'a'), n=4, steps=1, progress=False)['n']==4
    assert 'no pictures were kept aside' in capsys.readouterr().out

def test_a_class_whose_pictures_are_damaged(tmp_path):
    "They were said to be kept aside."
    noise(tmp_path, 'a/0.png', 'a/1.png', 'b/0.png')
    (tmp_path/'b'/'0.png').write_bytes(b'nothing')
    said = warned(lambda: own_pictures(tmp_path, size=16, skip=True))
    assert 'b: no picture for training, as all are missing or damaged: add some, or leave these classes out' in said

# ---- what is read

@pytest.mark.parametrize('word', ['NA','n/a','none','-','?'])
def test_a_class_that_looks_like_no_value(tmp_path, word):
    "It stays a class, as one may be called so; a warning says how to leave it open."
    folder = table(tmp_path, 'kind', 'oak', 'elm', word)
    said = warned(lambda: PictureTable(folder, 'kind:label', size=16))
    assert f"{word!r} in the column kind is taken for a class" in said and 'leave the cell empty' in said
    assert not warned(lambda: PictureTable(table(tmp_path/'empty', 'kind', 'oak', 'elm', ''), 'kind:label', size=16))

@pytest.mark.parametrize('white, bits', [(255,'8'), (4095,'12'), (65535,None)])
def test_white_of_sixteen_bits(tmp_path, white, bits):
    "A TIFF file with values up to 255 was black without a word."
    values = np.linspace(0, white, 256).astype(np.uint16).reshape(16,16)
    Image.fromarray(values).save(tmp_path/'x.tif')
    said = warned(lambda: open_image(tmp_path/'x.tif', 16))
    assert (f'if it has {bits} bits' in said) if bits else not said

def test_a_table_of_captions(tmp_path):
    table(tmp_path, 'caption', 'an oak')
    assert '`fastldm_train captioned`' in warned(lambda: own_pictures(tmp_path, size=16))

def test_drawn_shards_are_data(model, tmp_path):
    "The names of the classes lie beside them."
    sample_cli(str(model), n=4, steps=1, per_shard=2, out=str(tmp_path/'drawn'))
    assert get_dataset(str(tmp_path/'drawn'), size=16).classes==['elm','oak']

# ---- adapters

def test_adapters_behind_a_symbolic_link(model, tmp_path, monkeypatch):
    "The page found none."
    train_cli('local', model=str(model), kinds='edges', steps=1, out=str(tmp_path/'real'/'runs'/'a'))
    (tmp_path/'link').symlink_to(tmp_path/'real')
    (tmp_path/'link'/'base').symlink_to(model)
    monkeypatch.chdir(tmp_path/'link')
    assert adapters_of('base')=={'runs/a': 'edges'}

def test_how_to_train_an_adapter(model, tmp_path, monkeypatch):
    "The command in the message can be typed as it is."
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"--model '{model}' --kinds"): adapter_of(str(model))

def test_a_low_rank_file_alone(model, leaves, tmp_path):
    "It draws what its run draws, at its size; with another autoencoder than it was trained with it is refused."
    settings = dict(conditions='kind:label', steps=2, ae_steps=2, lora=2, copies=1, start=str(model), progress=False)
    larger = own_ldm(leaves/'data', tmp_path/'larger', size=32, **settings)
    alone = with_adapter(load(model), tmp_path/'larger'/'adapter.safetensors')
    assert alone.shape==larger.shape
    drawn = [ldm.sample(2, kind=[0,1], steps=2, seed=0) for ldm in (alone, larger)]
    torch.testing.assert_close(*drawn, rtol=0, atol=1e-2)
    own_ldm(leaves/'data', tmp_path/'tuned', size=16, tune_autoencoder=True, **settings)
    with pytest.raises(ValueError, match='another autoencoder .* load the folder of its run'):
        with_adapter(load(model), tmp_path/'tuned'/'adapter.safetensors')

def test_classes_that_are_named_by_numbers():
    "A number that is no name is no class, whatever stands at that place; zeros before it do not count."
    label = LabelEmbedder(5, 4, names=['1','10','2','20','3'])
    assert [label.number_of(text, 'label') for text in ('1','02','3','20')]==[0, 2, 4, 3]
    for text in ('4','0'):
        with pytest.raises(ValueError, match=f"unknown label '{text}'"): label.number_of(text, 'label')
    assert LabelEmbedder(5, 4, names=list('abcde')).number_of('4', 'label')==4
