"The four commands as a user types them: what they do, and the one line they say when they cannot."
import json, subprocess, sys
from pathlib import Path
import numpy as np, pytest, torch
from PIL import Image
from fastldm import load

BIN = Path(sys.executable).parent

def run(command, *args, cwd=None, ok=True):
    p = subprocess.run([BIN/command, *map(str,args)], capture_output=True, text=True, cwd=cwd, timeout=300)
    assert (p.returncode==0)==ok, p.stdout+p.stderr
    if not ok: assert 'Traceback' not in p.stderr, p.stderr
    return p.stdout+p.stderr

@pytest.fixture
def pictures(tmp_path):
    "Two classes, squares and stripes, of several sizes and modes."
    rng = np.random.default_rng(0)
    for c in ('square','stripes'):
        (tmp_path/'pics'/c).mkdir(parents=True)
        for i in range(24):
            n = (20,24,33)[i%3]
            x = np.zeros((n,n), np.uint8)
            if c=='square': k = rng.integers(3,8); x[k:-k,k:-k] = 255
            else: x[::4] = 255; x[1::4] = 255
            Image.fromarray(x).convert(('L','RGB')[i%2]).save(tmp_path/'pics'/c/f'{i}.png')
    return tmp_path/'pics'

@pytest.mark.slow
def test_train_on_a_folder(pictures, tmp_path):
    "Ends with a model that loads and a grid; the same command again does nothing over; sampling works from the folder."
    args = ('folder','--data',pictures,'--size',16,'--steps',30,'--ae_steps',30,'--out',tmp_path/'mine')
    assert 'done' in run('fastldm_train', *args)
    ldm = load(tmp_path/'mine')
    assert ldm.meta['classes']==['square','stripes'] and ldm.sample(2,label=[0,1],steps=2).shape==(2,3,16,16)
    assert Image.open(tmp_path/'mine/samples.png').size[0] > 100
    before = (tmp_path/'mine/denoiser/model.safetensors').stat().st_mtime
    assert 'done' in run('fastldm_train', *args)
    assert (tmp_path/'mine/denoiser/model.safetensors').stat().st_mtime==before
    run('fastldm_sample', tmp_path/'mine', '--n', 4, '--label', 1, '--steps', 2, '--out', tmp_path/'grid.png')
    assert Image.open(tmp_path/'grid.png').size[0] > 100

@pytest.mark.slow
def test_train_without_labels(pictures, tmp_path):
    flat = tmp_path/'flat'; flat.mkdir()
    for i,f in enumerate(pictures.rglob('*.png')): f.rename(flat/f'{i}.png')
    run('fastldm_train', 'folder', '--data', flat, '--size', 16, '--steps', 5, '--ae_steps', 5, '--out', tmp_path/'mine')
    ldm = load(tmp_path/'mine')
    assert ldm.sample(2, steps=2, seed=0).shape==(2,3,16,16)
    with pytest.raises(ValueError, match='takes no conditions'): ldm.sample(2, label=1)

@pytest.mark.slow
def test_one_line_for_what_is_wrong(tmp_path):
    "The nearest spelling, what is missing, what to do: and no traceback."
    assert "did you mean 'mnist'?" in run('fastldm_train', 'minst', cwd=tmp_path, ok=False)
    assert 'needs --data' in run('fastldm_train', 'folder', cwd=tmp_path, ok=False)
    assert 'takes no --kinds' in run('fastldm_train', 'avatars', '--kinds', 'edges', cwd=tmp_path, ok=False)
    (tmp_path/'empty').mkdir()
    assert str(tmp_path/'empty') in run('fastldm_train', 'folder', '--data', tmp_path/'empty', cwd=tmp_path, ok=False)
    assert "did you mean 'a3_mnist'?" in run('fastldm_figures', 'a3_mist', cwd=tmp_path, ok=False)
    assert "did you mean 'fashion'?" in run('fastldm_sample', 'fashon', cwd=tmp_path, ok=False)
    assert 'out of range' in run('fastldm_sample', 'mnist', '--label', 12, cwd=tmp_path, ok=False)
    assert not list(tmp_path.glob('runs/**/*')) and not list(tmp_path.glob('*.png'))

@pytest.mark.slow
def test_eval(tmp_path):
    said = run('fastldm_eval', 'mnist', '--n', 200, '--steps', 5, '--out', tmp_path/'n.json')
    numbers = json.loads((tmp_path/'n.json').read_text())
    assert numbers['n']==200 and .9<numbers['label_accuracy']<=1 and 'fid' in said

@pytest.mark.slow
def test_figures(tmp_path, monkeypatch):
    "A figure is drawn into the folder asked for, with its numbers and the closing table."
    monkeypatch.setenv('FASTLDM_FIGURES', str(tmp_path))
    said = run('fastldm_figures', 'a5_one_dimension')
    assert (tmp_path/'a5_one_dimension.png').exists() and 'seconds' in said and '1 figures' in said
    again = run('fastldm_figures', 'a5_one_dimension')
    row, = [l for l in again.splitlines() if l.startswith('a5_one_dimension ')]
    assert row.endswith('none')                                       # drawn twice, no number moved
