"""From a folder of forty mixed photographs and a spreadsheet to pictures: train, interrupt, resume, look, score, sample
by each condition, fine-tune, export, open the page; every step by its command, at the first try. Each test can be run
alone: what it needs is trained for it."""
import csv
import json
import subprocess
import time
import urllib.request
import numpy as np
import pytest
from PIL import Image
from browser import free_port
from commands import BIN, run
from fastldm import load
from fastldm.core import read_checkpoint
from fastldm.diffusion import export_onnx

pytestmark = pytest.mark.slow

@pytest.fixture(scope='module')
def place(tmp_path_factory):
    "The folder in which everything happens, with forty crops of photographs and a table of what is known of them."
    data = pytest.importorskip('skimage.data')
    here = tmp_path_factory.mktemp('newcomer')
    (here/'mine').mkdir()
    rng = np.random.default_rng(0)
    sources = dict(person=data.astronaut(), cat=data.chelsea(), coffee=data.coffee(), text=data.page())
    rows = [draw_row(here/'mine', i, *list(sources.items())[i%4], rng) for i in range(40)]
    with open(here/'mine'/'metadata.csv', 'w', newline='') as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return here

def draw_row(folder, i, thing, picture, rng):
    "A crop of a photograph, of some size, mode and format; and its row of the table."
    side = int(rng.integers(60, min(picture.shape[:2])))
    top, left = (int(rng.integers(0, length-side+1)) for length in picture.shape[:2])
    crop = Image.fromarray(picture[top:top+side,left:left+side])
    crop = crop.resize((int(rng.integers(40, 120)), int(rng.integers(40, 120)))).convert(('RGB','L','P')[i%3])
    name = f'{i}.{("png","jpg","webp")[i%3] if crop.mode!="P" else "png"}'
    crop.save(folder/name)
    grey = float(np.asarray(crop.convert('L')).mean())
    facts = dict(thing=thing, brightness=round(grey, 1), small=int(side<200), notes=f'a {thing} in a crop')
    return dict(file_name=name, **facts)

TRAIN = ('fastldm_train', 'folder', '--data', 'mine', '--size', 32, '--out', 'runs/mine', '--ae_steps', 40,
         '--steps', 60, '--channels', '32,64', '--batch_size', 16,
         '--conditions', 'thing:label, brightness:number, small:attribute, notes:text')

@pytest.fixture(scope='module')
def trained(place):
    "What the first command printed before its time was over, and what the second one did, which goes on."
    stopped = run(*TRAIN, '--max_minutes', .02, cwd=place, ok=False)
    return stopped, run(*TRAIN, '--resume', cwd=place)

@pytest.fixture(scope='module')
def tuned(place):
    "What fine-tuning prints: the shipped flowers learn twelve of the photographs."
    (place/'cats').mkdir()
    for file in list((place/'mine').glob('*.png'))[:12]: Image.open(file).convert('RGB').save(place/'cats'/file.name)
    return run('fastldm_train', 'folder', '--data', 'cats', '--start', 'flowers', '--steps', 3, '--copies', 2,
               '--batch_size', 8, '--out', 'runs/tuned', cwd=place)

def test_training(place, trained):
    "A run that was interrupted goes on; at the end there are samples, their nearest pictures, and a log."
    stopped, done = trained
    assert 'minutes are over' in stopped and 'run the same command to resume' in stopped
    assert 'resuming from step' in done and 'done, in runs/mine' in done
    assert 'runs/mine/nearest.png' in done and 'samples are copies of a training picture' in done
    for name in ('samples','nearest','pictures/data'): assert Image.open(place/f'runs/mine/{name}.png').width>100
    assert len((place/'runs/mine/denoiser/run/log.csv').read_text().splitlines())>1

def test_scores(place, trained):
    "How far samples are from photographs, and from those that were trained on."
    scores = run('fastldm_eval', 'runs/mine', '--n', 12, '--steps', 4, '--out', 'scores.json', cwd=place)
    assert 'memorisation_pixels' in scores
    assert json.loads((place/'scores.json').read_text())['n']==12

@pytest.mark.parametrize('asked', (['--thing','cat'], ['--brightness','40'], ['--small'],
                                   ['--notes','a cat in a crop']), ids=lambda asked: asked[0][2:])
def test_each_condition(place, trained, asked):
    "Pictures by each column of the table."
    file = f'{asked[0][2:]}.png'
    run('fastldm_sample', 'runs/mine', *asked, '--n', 2, '--steps', 2, '--out', file, cwd=place)
    assert Image.open(place/file).width>60

def test_the_same_picture_again(place, trained):
    "A picture has the settings that made it, and is drawn again from them."
    run('fastldm_sample', 'runs/mine', '--thing', 'cat', '--n', 2, '--steps', 2, '--out', 'first.png', cwd=place)
    run('fastldm_sample', '--like', 'first.png', '--out', 'again.png', cwd=place)
    assert (np.asarray(Image.open(place/'again.png'))==np.asarray(Image.open(place/'first.png'))).all()

def test_fine_tuning(place, tuned):
    "The card says what the model began with, and the report whether the photographs were copied."
    assert 'start flowers' in tuned and 'copies' in tuned
    assert 'start' in load(place/'runs/tuned').meta
    assert read_checkpoint(place/'runs/tuned/denoiser/run/checkpoint.safetensors')[0]['step']==3

def test_export(place, tuned):
    "The model as ONNX, where its packages are."
    for package in ('onnx','onnxruntime','onnxscript'): pytest.importorskip(package)
    files = export_onnx(load(place/'runs/tuned'), place/'onnx')
    assert files and any((place/'onnx').glob('*.onnx'))

def test_the_page(place, trained):
    "The page opens with the model that was just trained."
    pytest.importorskip('gradio')
    port = free_port()
    page = subprocess.Popen([BIN/'fastldm_app', '--model', 'runs/mine', '--port', str(port)], cwd=place,
                            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(600):
            time.sleep(.5)
            assert page.poll() is None, 'the page ended'
            try: answer = urllib.request.urlopen(f'http://127.0.0.1:{port}', timeout=30).read().decode()
            except OSError: continue
            assert 'runs/mine' in answer
            return
        pytest.fail('the page does not answer')
    finally:
        page.terminate()
        page.wait(60)
