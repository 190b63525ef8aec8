"The words that people know, in Python and in the commands: names of samplers, settings in pictures, sizes, frames."
import argparse
import json
import os
import pydoc
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
import numpy as np
import pytest
import torch
from PIL import Image
from fastcore.script import anno_parser
from commands import run
from fastldm import available, load
from fastldm.cli import COMMANDS, list_models, list_recipes
from fastldm.core.show import read_settings, write_picture
from fastldm.data import from_image, get_dataset
from fastldm.diffusion.constraints import vary
from fastldm.diffusion.denoiser import guide
from fastldm.diffusion.ldm import LatentDiffusion
from fastldm.recipes import RECIPES
from fastldm.recipes import draw as drawing
from fastldm.recipes import score as scoring
from fastldm.recipes.commands import command_method, train_cli
from fastldm.recipes.draw import _as_before, adapter_of, sample_cli
from fastldm.recipes.pictures import Film, command_line, unpack
from fastldm.recipes.score import eval_cli


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

def test_an_interval_of_guidance_travels_with_the_picture(tmp_path):
    "It is followed, drawn again, and replaced; a student, which takes none, leaves it out."
    def draw(name, *model, **options):
        sample_cli(*model, **options, out=tmp_path/f'{name}.png')
        return pixels(tmp_path/f'{name}.png'), read_settings(tmp_path/f'{name}.png')
    first, settings = draw('first', 'fashion', n=4, steps=4, guidance_scale=4., interval='.2,.7')
    assert settings['interval']==[.2,.7]
    again, same = draw('again', like=tmp_path/'first.png')
    assert (again==first).all() and same==settings
    always, _ = draw('always', like=tmp_path/'first.png', interval='0,1')
    assert (always!=first).any()
    assert (always==draw('plain', 'fashion', n=4, steps=4, guidance_scale=4.)[0]).all()
    _, of_student = draw('student', like=tmp_path/'first.png', calls=1, guidance_scale=2.)
    assert 'interval' not in of_student
    with pytest.raises(SystemExit, match='expected two times'):
        sample_cli('fashion', interval='.7', out=tmp_path/'x.png')

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

# ---- sizes

def test_files_of_other_sizes_fit(tmp_path, capsys):
    "A thin sketch of 500×300 and its region and a mask twice as large: one line each, and lines that survive."
    sketch = np.zeros((300,500), np.uint8)
    sketch[150,120:380] = 255
    Image.fromarray(sketch).save(tmp_path/'sketch.png')
    Image.fromarray(np.full((32,32), 255, np.uint8)).save(tmp_path/'region.png')
    files = dict(control=str(tmp_path/'sketch.png'), region=str(tmp_path/'region.png'))
    sample_cli('scenes', prompt='a ship', n=1, steps=1, **files, out=tmp_path/'ship.png')
    said = capsys.readouterr().out
    assert 'sketch.png is 500×300, of which the middle 300×300 is taken: made 64×64' in said
    assert 'region.png is 32×32: made 64×64' in said
    drawn = np.array(unpack(read_settings(tmp_path/'ship.png')['control']))
    assert (drawn.max(0)[8:56]==255).all() and drawn.mean()<16
    mask = get_dataset('avatars', split='test')[0]['mask'].numpy()
    Image.fromarray(mask.repeat(2, 0).repeat(2, 1)).save(tmp_path/'mask.png')
    sample_cli('avatars', mask=str(tmp_path/'mask.png'), n=1, steps=1, out=tmp_path/'face.png')
    assert 'mask.png is 128×128: made 64×64' in capsys.readouterr().out
    assert (np.array(unpack(read_settings(tmp_path/'face.png')['mask']))==mask).all()

def test_python_names_the_way(mnist):
    "In Python another size is an error, which says what resizes."
    large = vary(torch.rand(1, 50, 50)*2-1)
    with pytest.raises(ValueError, match=r'fit_to\(picture, 28\)'): mnist.sample(1, constraint=large)

# ---- pictures on their way

def test_animate(tmp_path):
    "A film of as many frames as there are steps, the last of which is held; a kind of film that is not known is named."
    sample_cli('mnist', n=4, steps=5, animate=tmp_path/'four.gif', out=tmp_path/'four.png')
    with Image.open(tmp_path/'four.gif') as film:
        assert film.n_frames==5
        film.seek(4)
        assert film.info['duration']>=2000
        last = np.asarray(film.convert('L'), int)
    assert abs(last-np.asarray(Image.open(tmp_path/'four.png').convert('L'), int)).max()<=2
    with pytest.raises(SystemExit, match='give a .gif file'): sample_cli('mnist', n=1, animate='four.avi')
    with pytest.raises(ValueError, match='takes no --animate'):
        command_method(Plain(), 'sample_command', 'mine', ['watch'])

def test_a_film_shows_all_pictures_in_each_frame(tmp_path, mnist):
    "Also of more than a batch; in Python, pictures that came in several batches are refused."
    sample_cli('mnist', n=300, steps=1, animate=tmp_path/'many.gif', out=tmp_path/'many.png')
    with Image.open(tmp_path/'many.gif') as film, Image.open(tmp_path/'many.png') as grid: assert film.size==grid.size
    film = Film(tmp_path/'film.gif')
    mnist.sample(6, batch_size=4, steps=2, watch=film)
    with pytest.raises(ValueError, match='the frames have 2 to 6 pictures'): film.save()
    assert not (tmp_path/'film.gif').exists()

def test_more_of_the_same(tmp_path):
    "`--first 2` goes on after two pictures of the seed, and says so in the command that draws the same."
    for name,options in dict(all=dict(n=4), rest=dict(n=2, first=2)).items():
        sample_cli('mnist', **options, steps=2, out=str(tmp_path/name))
    both = [pixels(sorted((tmp_path/name).glob('*.png'))[-1]) for name in ('all','rest')]
    assert (both[0]==both[1]).all()
    settings = read_settings(sorted((tmp_path/'rest').glob('*.png'))[-1])
    assert settings['first']==3 and '--first 3' in command_line(settings)

def test_the_same_prior_again_keeps_its_settings():
    "Only a prior that is another one replaces what was said of the steps."
    drawn = dict(model='scenes', prior='diffusion', n=1, seed=0, steps=50, step='DPMSolver2M', guidance_scale=5.,
                 precision='bf16', conditions=dict(text='a ship'))
    scenes = load('scenes', 'cpu')
    assert _as_before(drawn, scenes, dict(prior='diffusion'))['steps']==50
    by_codes = _as_before(drawn, scenes, dict(prior='codes'))
    assert by_codes=={'n': 1, 'seed': 0, 'prior': 'codes', 'prompt': 'a ship'}

def test_an_attribute_that_is_given_twice():
    with pytest.raises(ValueError, match='Smiling was given twice'):
        load('avatars', 'cpu').sample_command(1, attributes='Smiling,Smiling=0')

def test_a_film_by_ffmpeg(tmp_path, monkeypatch):
    "An .mp4 file is written by ffmpeg, installed or of the extra, which the message names; what it says is passed on."
    monkeypatch.setenv('PATH', str(tmp_path))
    monkeypatch.setitem(sys.modules, 'imageio_ffmpeg', None)
    message = r'program ffmpeg .*"fastldm\[film\]", or give a .gif'
    with pytest.raises(ValueError, match=message): Film(tmp_path/'film.mp4')
    program = tmp_path/'ffmpeg'
    program.write_text(f'#!{sys.executable}\nimport sys\nopen(sys.argv[-1], "wb").write(sys.stdin.buffer.read())\n')
    program.chmod(0o755)
    program.rename(tmp_path/'theirs')
    theirs = SimpleNamespace(get_ffmpeg_exe=lambda: str(tmp_path/'theirs'))
    monkeypatch.setitem(sys.modules, 'imageio_ffmpeg', theirs)
    film = Film(tmp_path/'film.mp4')
    for shade in (0., 1.): film(torch.full((1,1,56,56), shade))
    film.save(seconds=.4, hold=2.)
    assert (tmp_path/'film.mp4').stat().st_size==56*56*3*(2+10)
    (tmp_path/'theirs').write_text(f'#!{sys.executable}\nimport sys\nsys.exit("no such codec")\n')
    with pytest.raises(OSError, match='could not write the film: no such codec'): film.save()
    assert (tmp_path/'film.mp4').stat().st_size==56*56*3*(2+10)

def test_a_film_is_another_file_than_the_picture(tmp_path, monkeypatch):
    "Both names, and whether both can be written, are checked before a model is loaded."
    monkeypatch.setattr(drawing, 'load', lambda name: pytest.fail('a model was loaded'))
    (tmp_path/'file').touch()
    for animate, message in ((tmp_path/'x.gif', 'give two names'), (tmp_path, 'as --animate'),
                             (tmp_path/'file/x.gif', 'is not a folder')):
        with pytest.raises(SystemExit, match=message): sample_cli('mnist', animate=animate, out=tmp_path/'x.gif')

def test_watch_needs_a_notebook(mnist):
    "Elsewhere the message says what else can be given."
    with pytest.raises(ValueError, match='give a function'): mnist.sample(1, watch=True, steps=1)
    with pytest.raises(ValueError, match='expected True'): mnist.sample(1, watch='yes', steps=1)

# ---- what users of diffusers type

def test_negative_prompt():
    "An empty negative prompt is guidance as it always is, bit for bit; another text changes the picture."
    scenes = load('scenes')
    kw = dict(n=2, prior='diffusion', guidance_scale=3., steps=3, seed=0)
    usual = scenes.sample('a red ship', **kw)
    assert torch.equal(scenes.sample('a red ship', negative_prompt='', **kw), usual)
    assert (scenes.sample('a red ship', negative_prompt='the sea', **kw)-usual).abs().max()>.05
    with pytest.raises(ValueError, match='guidance only'):
        scenes.sample('a ship', negative_prompt='the sea', **kw | dict(guidance_scale=1.))

def test_a_negative_prompt_by_its_condition(monkeypatch, tmp_path):
    "Of a model of texts the text is a condition like others: --negative_text is --negative_prompt."
    scenes = load('scenes')
    monkeypatch.setattr(drawing, 'load', lambda name: scenes)
    kw = dict(prompt='a red ship', n=1, steps=2, guidance_scale=3.)
    sample_cli('scenes', negative_prompt='the sea', out=tmp_path/'prompt.png', **kw)
    sample_cli('scenes', negative=['prompt=the sea'], out=tmp_path/'named.png', **kw)
    monkeypatch.setattr(sys, 'argv', ['fastldm_sample', '--negative_text=the sea'])
    sample_cli('scenes', out=tmp_path/'text.png', **kw)
    for name in ('named','text'): assert (pixels(tmp_path/f'{name}.png')==pixels(tmp_path/'prompt.png')).all()
    with pytest.raises(SystemExit, match='given twice'):
        sample_cli('scenes', negative_prompt='a', out=tmp_path/'x.png', **kw)

def test_guidance_moves_away_from_a_negative_condition(mnist):
    "The equation, from two predictions of the network: x0 = x0(n) + w (x0(c) - x0(n))."
    w = 3.
    batch = {name: mnist.denoiser.conditioner.parse(2, **dict(label=label)) for name,label in dict(c=3, n=8).items()}
    x, t = torch.randn(2, *mnist.shape), torch.tensor(.5)
    with torch.no_grad():
        guided = guide(mnist.denoiser, batch['c'], negative=batch['n'], label=w)(x, t)
        c, n = (mnist.denoiser(x, t, mnist.denoiser.conditioner(batch[name])) for name in 'cn')
    assert torch.allclose(guided, n+w*(c-n), atol=1e-4)

def test_a_negative_label(monkeypatch, tmp_path):
    "The command moves away from it as Python does, by each of its options; `--like` draws the same, or without it."
    kw = dict(n=2, label='coat', guidance_scale=3., steps=3)
    sample_cli('fashion', negative=['label=shirt'], out=tmp_path/'a.png', **kw)
    sample_cli(like=tmp_path/'a.png', out=tmp_path/'like.png')
    sample_cli(like=tmp_path/'a.png', negative=['label='], out=tmp_path/'without.png')
    sample_cli('fashion', out=tmp_path/'plain.png', **kw)
    monkeypatch.setattr(sys, 'argv', ['fastldm_sample', '--negative_label=shirt'])
    sample_cli('fashion', out=tmp_path/'b.png', **kw)
    drawn = {name: pixels(tmp_path/f'{name}.png') for name in ('a','b','like','without','plain')}
    for one,other in (('a','b'), ('a','like'), ('plain','without')): assert (drawn[one]==drawn[other]).all()
    assert (drawn['a']!=drawn['plain']).any()
    assert read_settings(tmp_path/'a.png')['negative']==dict(label='shirt')
    x = load('fashion').sample(2, label='coat', negative=dict(label='shirt'), guidance_scale=3., steps=3, seed=0)
    grid = (x[1,0].clamp(0, 1)*255).round().byte().numpy()
    assert (drawn['a'][::2,58::2,0]==grid).all()

def test_anything_but(mnist):
    "Without a label, guidance moves from the negative one: x0 = x0(n) + w (x0() - x0(n)); it draws fewer of it."
    guided = mnist.sample(40, negative=dict(label=1), guidance_scale=4., steps=6, seed=0)
    for_all = mnist.sample(40, negative=dict(label=[1]*40), guidance_scale=dict(label=4.), steps=6, seed=0)
    assert torch.equal(guided, for_all)
    classes = load('mnist_evaluator')(torch.cat([guided, mnist.sample(40, steps=6, seed=0)])*2-1).argmax(1)
    assert (classes[:40]==1).sum()<(classes[40:]==1).sum()

def test_negative_attributes_and_masks_travel(tmp_path):
    "A negative mask is in the picture, as text: it is drawn again where the file is gone."
    face = get_dataset('avatars', split='test')[0]
    Image.fromarray(face['mask'].numpy().astype(np.uint8)).save(tmp_path/'mask.png')
    negative = [f"mask={tmp_path/'mask.png'}", 'attributes=Smiling']
    sample_cli('avatars', negative=negative, guidance_scale=2., n=1, steps=2, out=tmp_path/'face.png')
    (tmp_path/'mask.png').unlink()
    sample_cli(like=tmp_path/'face.png', out=tmp_path/'again.png')
    assert (pixels(tmp_path/'face.png')==pixels(tmp_path/'again.png')).all()
    avatars = load('avatars')
    kw = dict(guidance_scale=2., steps=2, seed=0)
    by_dict = avatars.sample(1, negative=dict(attrs=dict(Smiling=1)), **kw)
    assert torch.equal(avatars.sample(1, negative=dict(Smiling=True), **kw), by_dict)

@pytest.mark.parametrize('negative, message', [
    (['label=8','label=9'], 'given twice'), (['the sea'], 'expected NAME=VALUE, as in label=5'), (['=8'], 'NAME=VALUE'),
    (['label=18'], 'negative: label=18 is out of range'), (['lable=8'], 'did you mean --negative_label'),
    (['label=8'], 'counts with guidance only: give a guidance_scale above 1'),
])
def test_what_is_wrong_with_a_negative_condition(idle, monkeypatch, tmp_path, negative, message):
    "One line, before the network is called and a file is written."
    monkeypatch.setattr(drawing, 'load', lambda name: idle)
    with pytest.raises(SystemExit, match=message): sample_cli('mnist', negative=negative, out=tmp_path/'x.png')
    assert not any(tmp_path.iterdir())

def test_names_of_diffusers(mnist, tmp_path):
    "Saving, loading and calling by their names; half precision; arguments that have another name here are named."
    mnist.save_pretrained(tmp_path/'copy')
    copy = LatentDiffusion.from_pretrained(tmp_path/'copy', 'cpu')
    assert torch.equal(copy(2, label=3, steps=2, seed=0), mnist.sample(2, label=3, steps=2, seed=0))
    assert (copy.half().sample(2, label=3, steps=2, seed=0)-mnist.sample(2, label=3, steps=2, seed=0)).abs().max()<.1
    with pytest.raises(ValueError, match='did you mean steps'): mnist.sample(1, num_inference_steps=3)
    scenes = load('scenes')
    with pytest.raises(ValueError, match="unknown setting 'num_inference_steps': .*did you mean steps"):
        scenes.sample('a ship', prior='diffusion', num_inference_steps=3)
    with pytest.raises(ValueError, match="sampling by codes takes temperature.* the prior 'diffusion' has it"):
        scenes.sample('a ship', prior='codes', steps=3)
    varied = [mnist.sample(1, constraint=vary(x), steps=2, seed=0) for x in pil_and_tensor()]
    assert torch.equal(*varied)

def pil_and_tensor():
    "A picture as PIL has it, and as a tensor."
    picture = Image.fromarray(np.arange(28*28, dtype=np.uint8).reshape(28,28))
    return picture, from_image(picture)

def test_help_shows_no_address(mnist):
    "The signature of `sample` reads the same in each process."
    assert ' at 0x' not in pydoc.render_doc(mnist.sample)

# ---- grids

def test_a_grid_has_the_names_of_its_rows(tmp_path):
    "With names beside them, classes are rows: what stands right of the names is the pictures, in their order."
    fashion = load('fashion')
    sample_cli('fashion', n=20, steps=2, out=tmp_path/'rows.png')
    grid = pixels(tmp_path/'rows.png')[...,0]
    left = grid.shape[1]-2*57+1
    assert (grid[:,:left-10]<128).any() and (grid[:,left-3:left]==255).all()
    drawn = fashion.sample(20, label=[i%10 for i in range(20)], seed=0, steps=2)
    expected = (drawn[13,0].clamp(0, 1)*255).round().byte().numpy()        # the second picture of the fourth row
    assert (grid[3*57:3*57+56, left+57:left+57+56][::2,::2]==expected).all()

# ---- help

@pytest.mark.parametrize('command', COMMANDS)
def test_help_is_quick_and_whole(command):
    "Less than two seconds of processor time, without torch, and the options that the command itself has."
    program = f'''import sys
sys.argv = ['fastldm_{command}', '--help']
from fastldm.cli.start import {command}_cli
{command}_cli()
assert 'torch' not in sys.modules'''
    before = os.times()
    done = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True)
    after = os.times()
    assert done.returncode==0, done.stderr
    assert sum(after[2:4])-sum(before[2:4])<2
    itself = getattr(import_module(f'fastldm.{COMMANDS[command]}'), f'{command}_cli')
    options = {action.dest for action in anno_parser(itself)._actions if action.help!=argparse.SUPPRESS}
    assert options<={word.strip('-,') for word in done.stdout.split()} | {'help'}

def test_help_can_be_cut_short():
    "A reader that leaves after one line, as `head -1` does: there was the traceback of a BrokenPipeError."
    command = ['fastldm_train', '--help']
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1) as process:
        process.stdout.close()
        assert process.stderr.read()==''
    assert process.returncode==0

def test_help_lists_what_there_is():
    "Recipes and models with their sizes and steps, as the library has them."
    assert {*list_recipes()}=={*RECIPES}
    models = list_models()
    assert {*available()}<={*models}
    assert models['flowers']==dict(size=64, steps=20, options=['--label'])
    for name,facts in models.items():
        conditioner = load(name, 'cpu').denoiser.conditioner
        told = [name for name in conditioner.embedders if name!='augment']
        assert len(facts['options'])==len(told), name

def test_help_of_a_model(tmp_path):
    "`fastldm_sample avatars --help` lists the attributes by name; for what is no model there is the usual help."
    def help_of(*words):
        done = subprocess.run(['fastldm_sample', *words, '--help'], capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode==0, done.stderr
        return done.stdout
    assert 'What avatars can be told' in help_of('avatars') and 'Eyeglasses' in help_of('avatars', '--n', '2')
    assert 'models:' in help_of('nothing')

def test_names_of_the_package_come_when_they_are_used():
    "`import fastldm` imports no torch; its names and its parts are there all the same."
    program = '''import sys, fastldm
assert 'torch' not in sys.modules
assert fastldm.core.__name__=='fastldm.core' and 'torch' in sys.modules
from fastldm import load, images
assert fastldm.load is load and 'load' in dir(fastldm)
assert not hasattr(fastldm, 'lode')'''
    assert subprocess.run([sys.executable, '-c', program], capture_output=True, text=True).returncode==0

# ---- devices

def test_a_device_for_sampling_and_scoring(monkeypatch, tmp_path):
    "The one that is named is used; one that is not here is refused in a sentence, before a model is loaded."
    monkeypatch.setenv('FASTLDM_DEVICE', '')                            # put back after the test
    for device in (None, 'cpu'): sample_cli('mnist', n=1, steps=2, device=device, out=tmp_path/f'{device}.png')
    assert os.environ['FASTLDM_DEVICE']=='cpu'
    if not torch.cuda.is_available(): assert (pixels(tmp_path/'cpu.png')==pixels(tmp_path/'None.png')).all()
    for module in (drawing, scoring):
        monkeypatch.setattr(module, 'load', lambda name: pytest.fail('a model was loaded'))
    for device in ('gpu', 'cuda:99', 'meta', ''):
        for command in (sample_cli, eval_cli):
            with pytest.raises(SystemExit, match=f"^(sample|eval): device '{device}' cannot be used here: [^.]*$"):
                command('mnist', device=device)

@pytest.mark.parametrize('command', ['train','sample','eval','app'])
def test_the_help_of_device_is_one(command):
    "Wherever there is the option `--device`, its help has the same words."
    assert ' '.join(run(f'fastldm_{command}', '--help').split()).count(
        '--device DEVICE cpu, cuda, cuda:1, mps (default: a GPU where there is one)')==1

# ---- adapters and advice

def test_an_own_adapter_is_found_beside_its_base(tmp_path, monkeypatch):
    "The only one in `runs` for a model is taken; of two, or none, the message says how to choose or train one."
    monkeypatch.chdir(tmp_path)
    assert adapter_of('scenes')=='local_scenes'
    with pytest.raises(ValueError, match='--adapter FOLDER: there is none in runs; `fastldm_train local --model mnist'):
        adapter_of('mnist')
    card = dict(config=dict(cls='ControlAdapter'), base='mnist')
    for name in ('first','second'):
        folder = tmp_path/'runs'/name
        folder.mkdir(parents=True)
        (folder/'config.json').write_text(json.dumps(card | (dict(base='flowers') if name=='second' else {})))
    assert adapter_of('mnist')==str(Path('runs/first'))
    (tmp_path/'runs/second/config.json').write_text(json.dumps(card))
    with pytest.raises(ValueError, match='choose from runs/first, runs/second'): adapter_of('mnist')

def test_advice_after_training_can_be_followed(tmp_path, capsys):
    "A classifier draws nothing, so nothing is said of samples."
    train_cli('digits_evaluator', out=tmp_path/'run', epochs=1)
    said = capsys.readouterr().out.partition('done')[2]
    assert f"fastldm.load('{tmp_path}/run')" in said and 'sample' not in said

def test_an_inpainting_warns_of_nothing():
    "Torch's rules for Jacobians are imported without the warnings that are meant for its authors."
    program = '''import torch, warnings
warnings.simplefilter('error', FutureWarning)
from fastldm import load
from fastldm.diffusion.constraints import inpaint
hole = torch.zeros(28, 28, dtype=bool)
hole[5:9] = True
load('mnist').sample(1, label=3, constraint=inpaint(torch.rand(1, 28, 28)*2-1, hole), steps=1)'''
    done = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True)
    assert done.returncode==0 and 'FutureWarning' not in done.stderr, done.stderr
