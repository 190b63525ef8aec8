"The words that people know, in Python and in the commands: names of samplers, settings in pictures, sizes, frames."
import subprocess
import sys
from pathlib import Path
import numpy as np
import pytest
import torch
from PIL import Image
from fastldm import load
from fastldm.core.show import read_settings, write_picture
from fastldm.data import get_dataset
from fastldm.recipes.commands import command_method, sample_cli

BIN = Path(sys.executable).parent

def run(command, *args, cwd=None, ok=True):
    "What a command prints; it has to succeed, or with `ok=False` to fail without a traceback."
    done = subprocess.run([BIN/command, *map(str, args)], capture_output=True, text=True, cwd=cwd, timeout=600)
    assert (done.returncode==0)==ok, done.stdout+done.stderr
    assert 'Traceback' not in done.stderr, done.stderr
    return done.stdout+done.stderr

def pixels(path): return np.asarray(Image.open(path))

# ---- samplers

def test_sampler_and_its_old_name(tmp_path):
    "`--step` still chooses the sampler, as `--sampler` does, and help shows the new name only."
    for name,how in dict(new=dict(sampler='euler_a'), old=dict(step='ddpm_step'), default={}).items():
        sample_cli('mnist', n=2, steps=3, out=tmp_path/f'{name}.png', **how)
    assert (pixels(tmp_path/'new.png')==pixels(tmp_path/'old.png')).all()
    assert (pixels(tmp_path/'new.png')!=pixels(tmp_path/'default.png')).any()
    shown = run('fastldm_sample', '--help')
    assert '--sampler' in shown and '--step ' not in shown

class Plain:
    "A model that is drawn from in one way only."
    def sample_command(self, n=1): return torch.zeros(n, 1, 4, 4), n

def test_a_misspelt_sampler_is_found(mnist):
    "The hint knows the names of other programs, too."
    with pytest.raises(ValueError, match="did you mean 'dpmpp_2m'"): mnist.sample(1, step='dpmpp2m')
    with pytest.raises(SystemExit, match='are one option'): sample_cli('mnist', sampler='ddim', step='unipc')
    with pytest.raises(ValueError, match='which takes no --sampler'):
        command_method(Plain(), 'sample_command', 'mine', ['step'])

# ---- settings in pictures

def test_drawn_again_from_the_picture(tmp_path, capsys):
    "Same pixels from the file alone: of a grid, and of each file of a folder; options given beside it are followed."
    sample_cli('fashion', n=12, steps=4, sampler='heun', guidance_scale=2., seed=5, out=tmp_path/'grid.png')
    settings = read_settings(tmp_path/'grid.png')
    asked = dict(model='fashion', n=12, steps=4, step='heun_step', guidance_scale=2., seed=5)
    assert asked.items()<=settings.items() and settings['fingerprint']==load('fashion').meta['fingerprint']
    sample_cli(like=tmp_path/'grid.png', out=tmp_path/'again.png')
    assert (pixels(tmp_path/'grid.png')==pixels(tmp_path/'again.png')).all()
    assert read_settings(tmp_path/'again.png')==settings
    sample_cli(like=tmp_path/'grid.png', seed=6, label='Dress', n=2, out=tmp_path/'dresses.png')
    changed = read_settings(tmp_path/'dresses.png')
    assert changed==settings | dict(seed=6, n=2, conditions=dict(label='Dress'))

def test_a_file_of_a_folder_is_drawn_again(tmp_path):
    "Each file knows its own number."
    sample_cli('mnist', n=5, steps=3, out=tmp_path/'five')
    sample_cli(like=tmp_path/'five/000003.png', out=tmp_path/'again')
    again, = (tmp_path/'again').iterdir()
    assert (pixels(again)==pixels(tmp_path/'five/000003.png')).all()

def test_what_cannot_be_drawn_again(tmp_path):
    "Other weights, a model that is gone, a file without settings: each is one sentence."
    sample_cli('mnist', n=1, steps=1, out=tmp_path/'one.png')
    settings = read_settings(tmp_path/'one.png')
    one = Image.open(tmp_path/'one.png')
    one.save(tmp_path/'plain.png')
    write_picture(one, tmp_path/'other.png', settings | dict(fingerprint='0'*16))
    write_picture(one, tmp_path/'gone.png', settings | dict(model='runs/gone'))
    says = dict(plain='does not say how it was made', other='draw other pictures', gone='which is not here')
    for name,message in says.items():
        with pytest.raises(SystemExit, match=message): sample_cli(like=tmp_path/f'{name}.png', out=tmp_path/'new.png')
    with pytest.raises(SystemExit, match='give a model'): sample_cli(out=tmp_path/'new.png')
    assert not (tmp_path/'new.png').exists()
    sample_cli('mnist', like=tmp_path/'other.png', out=tmp_path/'new.png')
    assert (pixels(tmp_path/'new.png')==pixels(tmp_path/'one.png')).all()

def test_sketch_and_mask_travel_with_the_picture(tmp_path):
    "The files of a control and a mask are not needed to draw again."
    face = get_dataset('avatars', split='test')[0]
    Image.fromarray(face['mask'].numpy()).save(tmp_path/'mask.png')
    lines = np.zeros((64,64), np.uint8)
    lines[20,10:50] = 255
    Image.fromarray(lines).save(tmp_path/'lines.png')
    common = dict(n=2, steps=2)
    sample_cli('avatars', mask=str(tmp_path/'mask.png'), **common, out=tmp_path/'face.png')
    sample_cli('scenes', prompt='a red circle', control=str(tmp_path/'lines.png'), **common, out=tmp_path/'scene.png')
    (tmp_path/'mask.png').unlink()
    (tmp_path/'lines.png').unlink()
    for name in ('face','scene'):
        sample_cli(like=tmp_path/f'{name}.png', out=tmp_path/f'{name}_again.png')
        assert (pixels(tmp_path/f'{name}.png')==pixels(tmp_path/f'{name}_again.png')).all()
    assert read_settings(tmp_path/'scene.png')['conditions']==dict(text='a red circle')
