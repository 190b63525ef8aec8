"""From a folder of forty mixed photographs and a spreadsheet to pictures: train, interrupt, resume, look, score, sample
by each condition, fine-tune, export, open the page; every step by its command, at the first try."""
import csv
import json
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
import numpy as np
import pytest
from PIL import Image
from browser import free_port
from fastldm import load
from fastldm.core import read_checkpoint
from fastldm.diffusion import export_onnx

BIN = Path(sys.executable).parent
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

def run(here, *args, seconds=240, ok=True):
    "What a command prints; it ends well, within the time that is stated for two cores (ten times for busy ones)."
    done = subprocess.run([BIN/args[0], *map(str, args[1:])], capture_output=True, text=True, cwd=here,
                          timeout=10*seconds)
    assert (done.returncode==0)==ok, done.stdout+done.stderr
    return done.stdout+done.stderr

TRAIN = ('fastldm_train', 'folder', '--data', 'mine', '--size', 32, '--out', 'runs/mine', '--ae_steps', 40,
         '--steps', 60, '--channels', '32,64', '--batch_size', 16,
         '--conditions', 'thing:label, brightness:number, small:attribute, notes:text')

def test_the_whole_road(place):
    "One step after the other, as the steps need each other."
    stopped = run(place, *TRAIN, '--max_minutes', .02)
    assert 'minutes are over' in stopped and 'the same command goes on' in stopped
    done = run(place, *TRAIN, '--resume')
    assert 'going on from step' in done and 'done, in runs/mine' in done
    assert Image.open(place/'runs/mine/samples.png').width>100
    assert len((place/'runs/mine/denoiser/run/log.csv').read_text().splitlines())>1
    scores = run(place, 'fastldm_eval', 'runs/mine', '--n', 12, '--steps', 4, '--out', 'scores.json')
    assert 'memorisation_pixels' in scores
    assert json.loads((place/'scores.json').read_text())['n']==12
    for i,asked in enumerate((['--thing','cat'], ['--brightness','40'], ['--small'], ['--notes','a cat in a crop'])):
        run(place, 'fastldm_sample', 'runs/mine', *asked, '--n', 2, '--steps', 2, '--out', f'{i}.png')
        assert Image.open(place/f'{i}.png').width>60
    run(place, 'fastldm_sample', '--like', '0.png', '--out', 'again.png')
    assert (np.asarray(Image.open(place/'again.png'))==np.asarray(Image.open(place/'0.png'))).all()

def test_fine_tuning(place):
    "The shipped flowers learn the forty photographs; the card says whether they were copied."
    (place/'cats').mkdir()
    for file in list((place/'mine').glob('*.png'))[:12]: Image.open(file).convert('RGB').save(place/'cats'/file.name)
    said = run(place, 'fastldm_train', 'folder', '--data', 'cats', '--start', 'flowers', '--steps', 3, '--copies', 2,
               '--batch_size', 8, '--out', 'runs/tuned')
    assert 'start flowers' in said and 'copies' in said
    assert 'start' in load(place/'runs/tuned').meta
    assert read_checkpoint(place/'runs/tuned/denoiser/run/checkpoint.safetensors')[0]['step']==3

def test_export(place):
    "The model as ONNX, where its packages are."
    for package in ('onnx','onnxruntime','onnxscript'): pytest.importorskip(package)
    files = export_onnx(load(place/'runs/tuned'), place/'onnx')
    assert files and any((place/'onnx').glob('*.onnx'))

def test_the_page(place):
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
