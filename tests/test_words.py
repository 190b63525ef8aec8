"The words that people know, in Python and in the commands: names of samplers, settings in pictures, sizes, frames."
import subprocess
import sys
from pathlib import Path
import numpy as np
import pytest
import torch
from PIL import Image
from fastldm import load
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
