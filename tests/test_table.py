"""A folder of pictures with a table, as a user has them: trained by the command, gone on with, sampled by each
condition; every mistake in the table ends in one sentence before any work."""
import csv
import json
import os
import subprocess
import sys
import warnings
from copy import deepcopy
import numpy as np
import pytest
import torch
from PIL import Image
from commands import run
from fastldm import load, save
from fastldm.core.show import read_settings
from fastldm.data import Augmented, PictureTable
from fastldm.diffusion import Autoencoder, Cosine, Denoiser, LatentDiffusion, UNet
from fastldm.diffusion.cond import Conditioner, LabelEmbedder, MaskEmbedder, NumberEmbedder
from fastldm.recipes import own_ldm
from fastldm.recipes.draw import read_conditions, sample_cli
from fastldm.ui.app import draw_settings, form_of, read_config

CONDITIONS = 'species:label, length:number, notes:text, wet:attribute, fallen:attribute'
TINY = dict(size=16, c_latent=2, ae_channels=(8,8), ae_steps=2, channels=(8,16), steps=2, progress=False)

def leaf(i):
    "The row of a picture; some cells are empty."
    row = dict(file=f'{"ab"[i%2]}/{i:02}.png', species=('oak','elm','ash')[i%3], length=f'{1+i/10:.1f}',
               notes=('late autumn','"red",\nand dry')[i%2], wet=i//2%2, fallen=('yes','no')[i//3%2])
    return row | {name: '' for name in row if name!='file' and i==7}

def write(path, rows, delimiter=',', encoding='utf-8'):
    with open(path, 'w', newline='', encoding=encoding) as file:
        table = csv.DictWriter(file, rows[0], delimiter=delimiter)
        table.writeheader()
        table.writerows(rows)

@pytest.fixture(scope='module')
def leaves(tmp_path_factory):
    "Forty drawn pictures in two folders, with a table as spreadsheets write it."
    folder = tmp_path_factory.mktemp('own')/'leaves'
    rng = np.random.default_rng(0)
    rows = [leaf(i) for i in range(40)]
    for i,row in enumerate(rows):
        (folder/row['file']).parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 60, (20,20+i%2*6,3), dtype=np.uint8)
        pixels[5:5+i//3,5:15] += 150
        Image.fromarray(pixels).save(folder/row['file'])
    write(folder/'leaves.csv', rows, ';', 'utf-8-sig')
    return folder

@pytest.fixture(scope='module')
def model(leaves):
    "A model of a few steps, trained by the recipe."
    return own_ldm(leaves, leaves.parent/'tiny', conditions=CONDITIONS, **TINY)

def table(leaves, rows, name='table.csv'):
    "A table beside the pictures, in place of the one that is there."
    path = leaves/name
    if isinstance(rows, str): path.write_text(rows, encoding='utf-8')
    else: write(path, rows)
    return path

# ---- the road of a user

@pytest.mark.slow
def test_train_resume_and_sample_by_the_commands(leaves, tmp_path):
    "Train; the same again does nothing over, more steps go on; each condition is an option, mistakes are one line."
    out = tmp_path/'mine'
    args = ('folder', '--data', leaves, '--size', 16, '--conditions', 'species, length, notes:text, wet, fallen',
            '--ae_steps', 2, '--channels', '8,16', '--out', out)
    printed = run('fastldm_train', *args, '--steps', 2)
    assert 'species: label, 3 classes (ash, elm, oak)' in printed and 'chosen from the values' in printed
    assert 'resuming from step 2 of 3' in run('fastldm_train', *args, '--steps', 3)
    card = json.loads((out/'config.json').read_text())
    assert card['columns']==dict(species='label', length='number', notes='text', wet='attribute', fallen='attribute')
    assert '| condition length | number from 1 to' in (out/'README.md').read_text()
    grid = tmp_path/'grid.png'
    draw = ('fastldm_sample', out, '--n', 2, '--steps', 1, '--out', grid)
    run(*draw, '--species', 'oak', '--length', '3.2', '--notes', 'late autumn', '--wet', '--fallen=0')
    assert Image.open(grid).size[0]>90
    assert 'there is no option --setps: did you mean --steps?' in run(*draw, '--setps', '3', ok=False)
    assert 'psnr' in run('fastldm_eval', out, '--n', 4, '--steps', 1)

def test_each_condition_in_python(model, leaves):
    "A value for all, or one per picture; two values give two pictures from one seed; nothing given is nothing."
    for name,values in dict(species=('oak','elm'), length=(1.5,4.), notes=('late','autumn'), wet=(0,1)).items():
        assert model.sample(2, steps=1, seed=0, **{name: values[0]}).isfinite().all(), name
        fields = [model.denoiser.conditioner.parse(2, **model.denoiser.conditioner.by_condition({name: v}))
                  for v in values]
        assert any(not torch.equal(fields[0][k], fields[1][k]) for k in fields[0])
    x = model.sample(2, steps=1, seed=0, species=['oak',None], length=[1.5,None], attrs=dict(wet=1))
    assert x.shape==(2,3,16,16)
    ds = PictureTable(leaves, CONDITIONS, size=16, test=0)
    rows = {name: values[6:9] for name,values in ds.fields.items()}         # the second has empty cells
    assert model.sample(3, steps=1, seed=0, **rows).isfinite().all()
    nothing = model.sample(2, steps=1, seed=0, species=None, length=None, notes=None, attrs=None)
    assert torch.equal(nothing, model.sample(2, steps=1, seed=0))
    mistakes = {"did you mean 'oak'": dict(species='okk'), 'length=': dict(length='x'), 'wet=2': dict(wet=2),
                "unknown word 'green'": dict(notes='green'), 'did you mean length?': dict(lenght=2),
                'not finite': dict(length=float('inf'))}
    for said,wrong in mistakes.items():
        with pytest.raises(ValueError) as error: model.sample(2, steps=1, **wrong)
        assert said in str(error.value)
    with pytest.warns(UserWarning, match='length=30 lies far outside'): model.sample(1, steps=1, length=30)

def test_guidance_moves_away_from_each_condition(model, tmp_path, monkeypatch):
    "A column of the table can be negative, too, by its own name: other pictures, which `--like` draws again."
    noisy = deepcopy(model)
    for p in noisy.parameters(): p.data += .1*torch.randn_like(p)           # so that every condition counts
    folder = save(noisy, tmp_path/'noisy')
    def draw(name, *words, **options):
        monkeypatch.setattr(sys, 'argv', ['fastldm_sample', *words])
        sample_cli(out=tmp_path/f'{name}.png', **options)
        return np.asarray(Image.open(tmp_path/f'{name}.png')).tobytes()
    kw = dict(model=str(folder), n=2, steps=2, guidance_scale=4.)
    wanted = '--species=oak'
    drawn = {draw('plain', wanted, **kw)}
    for word in ('species=elm', 'length=3.2', 'notes=late autumn', 'wet'):
        away = draw('away', wanted, f'--negative_{word}', **kw)
        assert draw('again', like=tmp_path/'away.png')==away
        drawn.add(away)
    assert len(drawn)==5

def test_other_values_are_another_run(leaves, model, tmp_path):
    "The same table in another form goes on; another value, or other conditions, are named."
    def train(rows, conditions=CONDITIONS):
        return own_ldm(table(leaves, rows, 'other.csv'), tmp_path/'run', conditions=conditions, **TINY)
    rows = [leaf(i) for i in range(40)]
    first = train(rows)
    again = train([dict(reversed(row.items())) for row in rows])
    assert again.meta['fingerprint']==first.meta['fingerprint']
    with pytest.raises(ValueError, match='column length was'): train([dict(rows[0], length='1.05'), *rows[1:]])
    with pytest.raises(ValueError, match='conditions was'): train(rows, 'species:label')
    (leaves/'other.csv').unlink()

def test_names_of_labels_are_kept(model, leaves):
    "Two labels with equally many classes keep their own names, also when they are numbers."
    assert load(leaves.parent/'tiny').sample(1, steps=1, species='Oak').shape[0]==1
    years = LabelEmbedder(3, 4, names=('3','1','2'))
    assert years.parse([3,'1',0], 3).tolist()==[0,1,0]
    assert read_conditions(model, dict(species='elm', length='2', attrs='wet=0'))==\
        dict(species=1, length=2., attrs=dict(wet=False))

def test_the_page_draws_it(model, leaves):
    "Label, text and attributes have widgets, the number is typed."
    name = str(leaves.parent/'tiny')
    form = form_of(read_config(name))
    assert form['label']==('species',['ash','elm','oak']) and form['text']==('notes',[])
    assert form['attributes']==('attrs',['wet','fallen']) and form['others']==['length']
    settings = dict(model=name, tab='new', n=2, seed=0, steps=1,
                    conditions=dict(species='oak', length='2.5', notes='late', attrs='wet=1'))
    assert draw_settings(settings).shape==(2,3,16,16)

# ---- the table

@pytest.mark.parametrize('problem,change,conditions,said', [
    ('missing file', lambda rows: rows[2].update(file='a/nothing.png'), 'length', '1 of the 40 pictures are not there'),
    ('no number', lambda rows: rows[2].update(length='3 cm'), 'length:number', "row 3 (a/02.png): length is '3 cm'"),
    ('infinite', lambda rows: rows[2].update(length='inf'), 'length:number', 'expected a finite number'),
    ('decimal comma', lambda rows: rows[2].update(length='3,2'), 'length:number', 'with a point'),
    ('no such kind', lambda rows: None, 'length:numbr', "did you mean 'number'"),
    ('no such column', lambda rows: None, 'lengt', "did you mean 'length'"),
    ('given twice', lambda rows: None, 'length, length', 'given twice'),
    ('no attribute', lambda rows: rows[2].update(wet=3), 'wet:attribute', "wet is '3'; expected 1 or 0"),
    ('one value', lambda rows: [row.update(wet=1) for row in rows], 'wet:attribute', 'is always 1'),
    ('one class', lambda rows: [row.update(species='oak') for row in rows], 'species:label', 'has the one value oak'),
    ('capitals', lambda rows: rows[0].update(species='Oak'), 'species:label', 'differ in capitals only'),
    ('twice', lambda rows: rows.append(dict(rows[0], length='9')), 'length', 'is in row 1 and in row 41'),
    ('no name', lambda rows: rows[2].update(file=' '), 'length', 'row 3 has no file'),
    ('long text', lambda rows: rows[2].update(notes='so '*70), 'notes:text', 'it has 70 words'),
    ('both parts', lambda rows: [row.update(split='val') for row in rows], 'length', "the column split has ['val']"),
    ('no mask', lambda rows: rows[2].update(notes='none.png'), 'notes:mask', 'there is no such file'),
    ('empty', lambda rows: [row.update(notes='') for row in rows], 'notes', 'the column notes is empty'),
])
def test_mistakes(leaves, problem, change, conditions, said):
    "Each has one message, before anything is written."
    rows = [leaf(i) for i in range(40)]
    change(rows)
    path = table(leaves, rows)
    with pytest.raises((ValueError,FileNotFoundError)) as error:
        own_ldm(path, leaves.parent/'never', conditions=conditions, **TINY)
    assert said in str(error.value)
    assert not (leaves.parent/'never').exists()
    path.unlink()

def test_names_that_sample_has(leaves, tmp_path):
    "A column called like an argument of `sample` cannot be asked for; one like a method of a dict can."
    rows = [dict(file=row['file'], seed=row['length'], type=row['species']) for row in map(leaf, range(40))]
    path = table(leaves, rows)
    with pytest.raises(ValueError, match="'seed' is a name that the library uses itself: rename"):
        own_ldm(path, tmp_path/'never', conditions='seed:number', **TINY)
    ldm = own_ldm(path, tmp_path/'types', conditions='type:label', **TINY)
    assert load(tmp_path/'types').sample(2, steps=1, type='oak').shape==ldm.sample(2, steps=1, type=1).shape
    path.unlink()
    with pytest.raises(FileNotFoundError, match='has no table'): own_ldm(leaves/'a', tmp_path/'none', conditions='x')
    with pytest.raises(ValueError, match='digits has no table'): own_ldm('digits', tmp_path/'none', conditions='x')

@pytest.mark.parametrize('form', ['csv','tsv','jsonl'])
def test_every_form_of_table(leaves, form):
    "Separators, encodings and JSON lines give the same set."
    rows = [leaf(i) for i in range(40)]
    whole = PictureTable(leaves, CONDITIONS, size=16)
    path = leaves/f'other.{form}'
    if form=='jsonl': path.write_text('\n'.join(map(json.dumps, rows)))
    else: write(path, rows, '\t' if form=='tsv' else ',', 'utf-16')
    assert PictureTable(path, CONDITIONS, size=16).digest()==whole.digest()
    path.unlink()

def test_masks_and_views(leaves, tmp_path):
    "A mask has the shape of its picture and is moved with it; a model of masks is drawn from by a file."
    rows = []
    for i,row in enumerate(leaf(i) for i in range(40)):
        picture = np.array(Image.open(leaves/row['file']))
        Image.fromarray((picture[...,0]>100).astype(np.uint8)).save(leaves/f'mask{i:02}.png')
        rows.append(dict(file=row['file'], bright=f'mask{i:02}.png' if i else ''))
    path = table(leaves, rows)
    ds = PictureTable(path, 'bright', size=16, test=0)
    assert ds.conditions['bright']==dict(kind='mask', classes=['0','1'], size=16)
    assert (ds.fields['bright'][0]==2).all()
    views = Augmented(ds, 2)
    for i in range(1, 80):
        picture, mask = views[i]['image'].mean(0), views[i]['bright']
        if i%40>9: assert picture[mask==1].mean()>picture[mask==0].mean()
    ldm = own_ldm(path, tmp_path/'masks', conditions='bright:mask', copies=2, **TINY)
    for weights in ldm.denoiser.net.parameters():                       # some begin as zeros, and would hide the mask
        if not weights.any(): torch.nn.init.normal_(weights, std=.1)
    drawn = [ldm.sample(1, steps=1, seed=0, bright=mask) for mask in (ds.fields['bright'][20].long(), None)]
    assert not torch.equal(*drawn)
    with pytest.raises(ValueError, match='bright: shape'): ldm.sample(1, steps=1, bright=torch.zeros(9,9).long())
    path.unlink()
    for file in leaves.glob('mask*.png'): file.unlink()

def test_two_masks_travel_with_a_picture(tmp_path):
    "The settings kept the last one only, and `--like` drew without the other."
    masks = {name: MaskEmbedder(['0','1'], 16, size=8, patch=4, slot='vector') for name in ('roof','wall')}
    torch.manual_seed(0)
    denoiser = Denoiser(UNet(1, (8,16), d_emb=16), Cosine(), Conditioner(**masks))
    for weights in denoiser.parameters(): weights.data += .2*torch.randn_like(weights)
    folder = save(LatentDiffusion(Autoencoder(1, 1, (8,)), denoiser, (1,8,8), steps=2).eval(), tmp_path/'house')
    for name in masks:
        ids = (torch.arange(64).view(8,8)%(2 if name=='roof' else 3)==0).byte().numpy()
        Image.fromarray(ids).save(tmp_path/f'{name}.png')
    def draw(file, *model, **options):
        sample_cli(*model, **options, out=str(tmp_path/file))
        return (tmp_path/file).read_bytes()
    given = [f'{name}={tmp_path/name}.png' for name in masks]
    both = draw('both.png', str(folder), condition=given, n=1, seed=0)
    assert draw('again.png', like=str(tmp_path/'both.png'))==both
    settings = read_settings(tmp_path/'both.png')
    assert {settings['mask_name'], *settings['more_masks']}=={'roof','wall'}
    for place in (given[:1], given[1:]): assert draw('one.png', str(folder), condition=place, n=1, seed=0)!=both
    swapped = draw('swapped.png', like=str(tmp_path/'both.png'), condition=[f'wall={tmp_path/"roof"}.png'])
    assert read_settings(tmp_path/'swapped.png')['conditions']=={} and swapped!=both

# ---- numbers

def test_a_number_in_another_unit():
    "Centimetres and millimetres are the same to the network; one that is left out is not zero."
    cm, mm = NumberEmbedder(8, 2., .5, 1., 3.), NumberEmbedder(8, 20., 5., 10., 30.)
    mm.load_state_dict(cm.state_dict())
    with torch.no_grad():
        assert torch.allclose(cm(cm.parse(2.4, 1)).vector, mm(mm.parse(24, 1)).vector, atol=1e-5)
        conditioner = Conditioner(length=cm).eval()
        left_out = conditioner(conditioner.parse(1)).vector
        assert torch.equal(left_out, conditioner(conditioner.parse(1, length=2.4), without=['length']).vector)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        cm.parse([1.,3.,3.4], 3)                                        # a little outside
        with pytest.raises(UserWarning): cm.parse(3.6, 1)

NAN = """
from fastldm.data.table import Column, read_classes
cells = '3 1 nan 10 2 NaN 7 oak 1'.split()
values, facts = read_classes(Column('x', cells, 't.csv', cells, [None]*len(cells), None, 16))
print(values.tolist(), facts['classes'])
"""

@pytest.mark.parametrize('seed', ['1','5'])
def test_nan_is_an_empty_cell_of_labels(seed):
    "The order of classes is the same in each process."
    env = dict(os.environ, PYTHONHASHSEED=seed)
    done = subprocess.run([sys.executable,'-c',NAN], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip()=="[2, 0, 6, 4, 1, 6, 3, 5, 0] ['1', '2', '3', '7', '10', 'oak']"
