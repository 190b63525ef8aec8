"The commands as a user types them: what they do, and the one line they print when they cannot."
import json
import numpy as np
import pytest
from PIL import Image
from commands import run
from fastldm import load
from fastldm.recipes import trained_for


def drawing(kind, size, rng):
    "A white square somewhere in the middle, or stripes."
    x = np.zeros((size,size), np.uint8)
    if kind=='square':
        k = rng.integers(3, 8)
        x[k:-k,k:-k] = 255
    else:
        x[::4] = 255
        x[1::4] = 255
    return Image.fromarray(x)

@pytest.fixture
def pictures(tmp_path):
    "Two classes, squares and stripes, of several sizes and modes."
    rng = np.random.default_rng(0)
    for kind in ('square','stripes'):
        folder = tmp_path/'pics'/kind
        folder.mkdir(parents=True)
        for i in range(24):
            size = (20,24,33)[i%3]
            drawing(kind, size, rng).convert(('L','RGB')[i%2]).save(folder/f'{i}.png')
    return tmp_path/'pics'

# ---- train

@pytest.mark.slow
def test_train_on_a_folder(pictures, tmp_path):
    "Ends with a model that loads and a grid; the same command again does nothing over; sampling works from the folder."
    out = tmp_path/'mine'
    args = ('folder', '--data', pictures, '--size', 16, '--steps', 30, '--ae_steps', 30, '--out', out)
    assert 'done' in run('fastldm_train', *args)
    ldm = load(out)
    assert ldm.meta['classes']==['square','stripes']
    assert ldm.meta['licence']=='weights Apache-2.0; data of the user'
    assert ldm.sample(2, label=[0,1], steps=2).shape==(2,3,16,16)
    assert Image.open(out/'samples.png').size[0] > 100
    before = (out/'denoiser/model.safetensors').stat().st_mtime
    assert 'done' in run('fastldm_train', *args)
    assert (out/'denoiser/model.safetensors').stat().st_mtime==before
    run('fastldm_sample', out, '--n', 4, '--label', 1, '--steps', 2, '--out', tmp_path/'grid.png')
    assert Image.open(tmp_path/'grid.png').size[0] > 100

@pytest.mark.slow
def test_train_without_labels(pictures, tmp_path):
    "A flat folder has no classes, and its model takes no conditions."
    flat = tmp_path/'flat'
    flat.mkdir()
    for i,f in enumerate(pictures.rglob('*.png')): f.rename(flat/f'{i}.png')
    run('fastldm_train', 'folder', '--data', flat, '--size', 16, '--steps', 5, '--ae_steps', 5, '--out',
        tmp_path/'mine')
    ldm = load(tmp_path/'mine')
    assert ldm.sample(2, steps=2, seed=0).shape==(2,3,16,16)
    with pytest.raises(ValueError, match='takes no conditions'): ldm.sample(2, label=1)

# ---- errors

@pytest.mark.slow
def test_one_line_for_what_is_wrong(tmp_path):
    "The nearest spelling, what is missing, what to do: and no traceback."
    def fails(*args): return run(*args, cwd=tmp_path, ok=False)
    empty = tmp_path/'empty'
    empty.mkdir()
    assert "did you mean 'mnist'?" in fails('fastldm_train', 'minst')
    assert 'needs --data' in fails('fastldm_train', 'folder')
    assert 'takes no --kinds' in fails('fastldm_train', 'avatars', '--kinds', 'edges')
    assert str(empty) in fails('fastldm_train', 'folder', '--data', empty)
    assert "did you mean 'a3_mnist'?" in fails('fastldm_figures', 'a3_mist')
    assert "did you mean 'fashion'?" in fails('fastldm_sample', 'fashon')
    assert 'out of range' in fails('fastldm_sample', 'mnist', '--label', 12)
    assert not list(tmp_path.glob('runs/**/*'))
    assert not list(tmp_path.glob('*.png'))

def test_options_that_a_model_does_not_take(tmp_path, monkeypatch):
    "The message says which models take them."
    from fastldm.recipes import eval_cli, sample_cli
    monkeypatch.chdir(tmp_path)
    def fails(message, command, *args, **options):
        with pytest.raises(SystemExit, match=message): command(*args, **options)
    fails('mnist is a LatentDiffusion, which takes no --prompt; these models do: emoji, scenes',
          sample_cli, 'mnist', prompt='three')
    fails('--style: this model has no such condition; it takes --prompt', sample_cli, 'scenes', prompt='', style='flat')
    fails('scenes is a TextToImage, which takes no --label; these models do: .*mnist', sample_cli, 'scenes', label=3)
    fails('takes no --candidates', eval_cli, 'mnist', candidates=2)
    fails('mnist_evaluator is an Evaluator, which has no method `sample_command`', sample_cli, 'mnist_evaluator')
    fails('expected NAME=VALUE', sample_cli, 'mnist', condition=['label'])
    fails("no condition 'ink'", sample_cli, 'mnist', condition=['ink=1,0,0'])
    fails('give a picture to follow', sample_cli, 'scenes', region='region.png')
    assert not list(tmp_path.iterdir())

# ---- draw and score

@pytest.mark.slow
def test_a_condition_by_name(tmp_path):
    "`--condition label=3` is `--label 3`."
    for option in (('--condition', 'label=3'), ('--label', 3)):
        run('fastldm_sample', 'fashion', '--n', 4, '--steps', 3, *option, '--out', tmp_path/f'{option[0]}.png')
    assert (tmp_path/'--condition.png').read_bytes()==(tmp_path/'--label.png').read_bytes()

OWN = '''
import torch
from fastldm.core import Module
from fastldm.recipes import finish, recipe, run_stage

class Grey(Module):
    "One grey for all pictures."
    def __init__(self, value=.5):
        super().__init__()
        self.value = torch.nn.Parameter(torch.tensor(value))
    def sample_command(self, n=4, condition=None, seed=0):
        brightness = float((condition or {}).get('brightness', 1))
        return (brightness*self.value).detach().cpu().expand(n, 1, 8, 8), 2
    def evaluate_command(self, n=4, seed=0): return dict(n=n, grey=self.value.item())

def grey(folder, root=None, seed=0, precision=None, steps=1):
    model = run_stage(f'{folder}/fit', lambda: (Grey(steps/10), dict(stage='fit')))
    return finish(folder, model, ['fit'], lambda m: m.sample_command()[0], 'nothing', 'none')

recipe('grey', grey)
'''

@pytest.mark.slow
def test_a_model_of_ones_own(tmp_path):
    "Trained, drawn from and scored by the commands, from a file that they import."
    (tmp_path/'own.py').write_text(OWN)
    module = ('--module', 'own.py')
    run('fastldm_train', 'grey', '--steps', 5, '--out', 'mine', *module, cwd=tmp_path)
    run('fastldm_sample', 'mine', '--n', 3, '--condition', 'brightness=.5', *module, cwd=tmp_path)
    grid = np.asarray(Image.open(tmp_path/'samples.png').convert('L'))
    assert abs(int(grid[3,3])-.25*255)<2
    assert '0.5000' in run('fastldm_eval', 'mine', '--n', 3, *module, cwd=tmp_path)
    assert 'takes no --steps' in run('fastldm_sample', 'mine', '--steps', 3, *module, cwd=tmp_path, ok=False)
    assert 'needs the class `Grey`' in run('fastldm_sample', 'mine', cwd=tmp_path, ok=False)
    assert 'elsewhere' in run('fastldm_sample', 'mine', '--module', 'elsewhere', cwd=tmp_path, ok=False)

@pytest.mark.slow
def test_eval(tmp_path):
    "The scores are printed, and written as JSON."
    printed = run('fastldm_eval', 'mnist', '--n', 200, '--steps', 5, '--out', tmp_path/'n.json')
    numbers = json.loads((tmp_path/'n.json').read_text())
    assert numbers['n']==200
    assert .9<numbers['label_accuracy']<=1
    assert 'fid' in printed

# ---- figures

@pytest.mark.slow
def test_figures(tmp_path, monkeypatch):
    """A figure is drawn into the folder asked for, with its numbers and the closing table; a second time, nothing
    is written."""
    monkeypatch.setenv('FASTLDM_FIGURES', str(tmp_path))
    printed = run('fastldm_figures', 'a5_one_dimension')
    picture = tmp_path/'a5_one_dimension.png'
    assert picture.exists()
    assert 'seconds' in printed and '1 figures' in printed
    written = picture.stat().st_mtime_ns
    again = run('fastldm_figures', 'a5_one_dimension')
    row, = [line for line in again.splitlines() if line.startswith('a5_one_dimension ')]
    assert row.endswith('none')                                       # drawn twice, no number moved
    assert picture.stat().st_mtime_ns==written

def test_kept_numbers(tmp_path, monkeypatch, capsys):
    "Rows without provenance are valid, and say so; new ones say where they were made; FASTLDM_KEPT forbids to measure."
    from fastldm.recipes import cached, figures
    monkeypatch.setattr(figures, '_printed', set())
    rows = dict(old=dict(settings=dict(seed=0), numbers=dict(fid=1.5)))
    (tmp_path/'measured.json').write_text(json.dumps(rows))
    def never(): raise AssertionError('measured')
    assert cached('old', never, tmp_path, seed=0)==dict(fid=1.5)
    assert capsys.readouterr().out=='kept, undated\n'
    assert cached('new', lambda: dict(fid=2.5), tmp_path, peers=['numpy'], seed=0)==dict(fid=2.5)
    about = json.loads((tmp_path/'measured.json').read_text())['new']['provenance']
    assert about.keys()=={'date','processor','threads','versions','source'}
    assert about['versions'].keys()=={'torch','numpy'}
    assert cached('new', never, tmp_path, peers=['numpy'], seed=0)==dict(fid=2.5)
    assert f"kept since {about['date']}, on {about['processor']}" in capsys.readouterr().out
    monkeypatch.setenv('FASTLDM_KEPT', '1')
    with pytest.raises(RuntimeError, match='seed was 0, is 1'): cached('new', never, tmp_path, seed=1)
    with pytest.raises(RuntimeError, match="'other' was never measured"): cached('other', never, tmp_path, seed=1)

def test_a_missing_package_is_named_before_work(tmp_path, monkeypatch):
    "Of all figures that are asked for, before the first is drawn."
    from fastldm.recipes import figures, figures_cli
    book = tmp_path/'book.ipynb'
    book.write_text(json.dumps(dict(cells=[dict(cell_type='code', source='import no_such_package')])))
    monkeypatch.setattr(figures, '_figure_notebooks', lambda: dict(book=book))
    with pytest.raises(SystemExit, match='no_such_package not installed, needed for book'): figures_cli(['book'])

@pytest.mark.parametrize('name', ['icons_classifier','avatars_classifier','mnist_evaluator','pens_classifier'])
def test_a_network_of_ones_own_scores_first(tmp_path, monkeypatch, name):
    "One that was trained in `runs` comes before the shipped one, which may know other classes."
    monkeypatch.chdir(tmp_path)
    data, what = name.split('_')
    kind = dict(icons='IconClassifier', avatars='FaceClassifier', mnist='Evaluator', pens='FaceClassifier')[data]
    shipped = None if data=='pens' else name
    assert trained_for(data, what, kind)==shipped
    own = tmp_path/'runs'/name
    own.mkdir(parents=True)
    assert trained_for(data, what, kind)==shipped       # nothing was saved yet
    (own/'config.json').write_text('{}')
    assert trained_for(data, what, kind)==str(own.relative_to(tmp_path))
    assert trained_for(f'sets/{data}', what, kind) is None
