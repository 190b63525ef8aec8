"Commands as people type them: what they refuse, in one line and before work, and what `?` shows of the library."
import os
import subprocess
import sys
from pathlib import Path
import numpy as np
import pytest
import torch
from PIL import Image
from tqdm import tqdm
from fastldm import load
from fastldm.codes import VQVAE, CodeDataset, PixelSNAIL, TextToImage, write_codes
from fastldm.core import Busy, Module, save_model, show_parameters
from fastldm.data import SyntheticScenes
from fastldm.recipes import (codes_cli, command, draw_files, eval_cli, figures_cli, label_ldm, sample_cli,
                             text_denoiser, train_adapter, train_vqvae)
from fastldm.recipes import draw as drawing
from fastldm.recipes import evaluate, import_module_of
from fastldm.recipes import score as scoring

def line(run, *args, **options):
    "The one line in which a command ends that cannot do what it is asked."
    with pytest.raises(SystemExit) as end: run(*args, **options)
    assert isinstance(end.value.code, str) and '\n' not in end.value.code
    return end.value.code

@pytest.fixture
def here(tmp_path, monkeypatch):
    "An empty folder to run in, which a command that refuses leaves empty."
    monkeypatch.chdir(tmp_path)
    return tmp_path

# ---- one line, not a traceback

FAULTS = [ValueError('say'), OSError('say'), ImportError('say'), FloatingPointError('say'), Busy('say')]
BUGS = [RuntimeError('say\nmore'), TypeError('say'), AttributeError('say'), KeyError('say'), MemoryError()]

def failing(error):
    @command
    def thing_cli(): raise error
    return thing_cli

@pytest.mark.parametrize('error', FAULTS, ids=repr)
def test_what_a_user_can_put_right_is_said_alone(error): assert line(failing(error))=='thing: say'

@pytest.mark.parametrize('error', BUGS, ids=repr)
def test_any_other_error_is_one_line_too(error, monkeypatch):
    "With its type, and with a way to the traceback, which is there when it is asked for."
    said = line(failing(error))
    assert said.startswith(f'thing: {type(error).__name__}: ') and said.endswith('(FASTLDM_DEBUG=1 shows where)')
    monkeypatch.setenv('FASTLDM_DEBUG', '1')
    with pytest.raises(type(error)): failing(error)()

def test_a_command_that_is_interrupted():
    assert line(failing(KeyboardInterrupt()))=='thing: interrupted'

SAMPLE = [ # model, options, what the line has
    ('local_scenes', {}, 'local_scenes is a ControlAdapter, which has no method `sample_command`; these models have'),
    ('scenes_classifier', {}, 'which has no method `sample_command`'),
    ('nothing', {}, "no model 'nothing'"),
    ('scenes', {}, "give --prompt 'a text', or --prompt '' to draw anything"),
    ('mnist', dict(n=0), 'n=0: expected a whole number of at least 1'),
    ('mnist', dict(n=-2), 'n=-2: expected a whole number of at least 1'),
    ('scenes', dict(prompt='a ship', n=0), 'n=0: expected a whole number of at least 1'),
    ('mnist', dict(n=2*10**9), 'too many for a grid, which has 10,000 at most: give a folder as --out'),
    ('mnist', dict(steps=0), 'steps=0: expected a whole number of at least 1'),
    ('mnist', dict(step='sample'), "there is no sampler 'sample'"),
    ('mnist', dict(guidance_scale=float('nan')), 'guidance_scale=nan'),
    ('mnist', dict(label='12'), 'label=12 is out of range'),
    ('fashion', dict(label='dres'), "unknown label 'dres': did you mean 'Dress'?"),
    ('flowers', dict(condition=['label=rosee']), "did you mean 'rose'?"),
    ('mnist', dict(condition=['label=1','label=2']), '--condition label=... was given twice'),
    ('mnist', dict(label='1', condition=['label=2']), 'label was given twice'),
    ('mnist', dict(out='digits.txt'), 'digits.txt has no suffix of pictures'),
    ('mnist', dict(out='.'), '. is there already: give a new folder'),
    ('mnist', dict(precision='fp16'), "precision='fp16'"),
    ('avatars', dict(attributes='Smilling'), "did you mean 'Smiling'?"),
]

@pytest.mark.parametrize('model,options,says', SAMPLE, ids=[f'{m}-{"-".join(o)}' for m,o,_ in SAMPLE])
def test_sample_refuses_before_work(here, model, options, says):
    assert says in line(sample_cli, model, **options)
    assert not [*here.iterdir()]

EVAL = [
    ('mnist_evaluator', {}, 'which has no method `evaluate_command`'),
    ('mnist', dict(n=0), 'n=0: expected a whole number of at least 1'),
    ('scenes', dict(n=0), 'n=0: expected a whole number of at least 1'),
    ('local_scenes', dict(n=0), 'n=0: expected a whole number of at least 1'),
    ('avatars', dict(n=0), 'n=0: expected a whole number of at least 1'),
    ('mnist', dict(n=2*10**9), 'need about 25,088 GB of memory'),
    ('avatars', dict(n=2*10**9), 'need about 393,216 GB of memory'),
    ('local_scenes', dict(n=2*10**9), 'need about 393,216 GB of memory'),
    ('mnist', dict(data='digits'), 'this model draws pictures of (1, 28, 28), those of digits are (1, 16, 16)'),
    ('mnist', dict(data='pics'), "no data set 'pics'"),
    ('mnist', dict(out='.'), '. is a folder: give the name of a file'),
]

@pytest.mark.parametrize('model,options,says', EVAL, ids=[f'{m}-{"-".join(o)}' for m,o,_ in EVAL])
def test_eval_refuses_before_work(here, model, options, says, monkeypatch):
    def never(*args, **kwargs): raise AssertionError('pictures are drawn')
    for cls in (evaluate.LatentDiffusion, evaluate.TextToImage): monkeypatch.setattr(cls, 'sample', never)
    assert says in line(eval_cli, model, **options)
    assert not [*here.iterdir()]

def test_eval_without_torch_fidelity(here, monkeypatch):
    "Two minutes of sampling came before the message."
    monkeypatch.setitem(sys.modules, 'torch_fidelity', None)
    monkeypatch.setattr(evaluate.LatentDiffusion, 'sample', None)
    assert 'needs the package `torch_fidelity`: pip install "fastldm[eval]"' in line(eval_cli, 'mnist')

def test_eval_card_of_a_model_from_the_hub(here):
    "The scores have nowhere to go; that was noticed at the end."
    with pytest.raises(FileNotFoundError, match='leave out --card, or give --out'): scoring._record_of('user/name')
    assert scoring._record_of('mnist').parent.name=='mnist'

def test_a_place_that_cannot_be_written(here, monkeypatch):
    (here/'file').touch()
    assert 'is not a folder' in line(eval_cli, 'mnist', out='file/scores.json')
    monkeypatch.setattr(os, 'access', lambda *args: False)
    assert 'you may not write to' in line(sample_cli, 'mnist', out='new/samples.png')
    assert 'you may not write to' in line(eval_cli, 'mnist', out='new/scores.json')

# ---- many pictures

def test_pictures_in_a_folder_are_those_of_the_grid(here, capsys):
    "Drawn part by part, with labels by turns; a second process does not mix its own in."
    options = dict(n=5, steps=2, seed=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drawing, 'PART', 2)
        sample_cli('mnist', out='each', **options)
    files = sorted((here/'each').iterdir())
    assert [f.name for f in files]==[f'{i:06d}.png' for i in range(5)]
    whole = load('mnist').sample(5, label=[0,1,2,3,4], steps=2, seed=3)
    for file,picture in zip(files, whole):
        found = torch.from_numpy(np.array(Image.open(file)))
        assert (found/255-picture[0].clamp(0, 1)).abs().max()<.004
    assert 'each is there already' in line(sample_cli, 'mnist', out='each', **options)

@pytest.mark.parametrize('model,options', [('scenes', dict(prompt='a red ship', prior='codes')), ('scenes', dict(
    prompt='a red ship', prior='diffusion', steps=2, candidates=2)), ('avatars', dict(attributes='Smiling', steps=2))],
    ids='codes diffusion faces'.split())
def test_pictures_in_parts_are_those_of_one_call(model, options):
    net = load(model)
    whole, _ = net.sample_command(n=3, seed=1, **options)
    part, _ = net.sample_command(n=2, first=1, seed=1, **options)
    assert torch.allclose(whole[1:], part, atol=1e-4)

def test_a_disk_without_room(here, monkeypatch):
    "Two thousand million pictures took memory without a word."
    sizes = []
    def draw(n, first):
        sizes.append(n)
        return torch.zeros(n, 3, 64, 64)
    with pytest.raises(OSError, match='2,000,000,000 pictures need up to 32,768.0 GB, and the disk of many has'):
        draw_files(draw, 2*10**9, 'many')
    assert sizes==[drawing.PART] and not [*here.iterdir()]

def test_files_are_not_drawn_for_a_folder_that_is_there(here):
    "The first part was drawn before that was noticed."
    def never(n, first): raise AssertionError('pictures are drawn')
    Path('there').mkdir()
    with pytest.raises(FileExistsError, match='there is there already'): draw_files(never, 5, 'there')
    for options in (dict(n=0), dict(n=5, part=0)):
        with pytest.raises(ValueError, match='expected a whole number'): draw_files(never, folder='new', **options)

class Plain(Module):
    "A model of one's own whose method takes no `first`, and no `n`."
    def sample_command(self, seed=0): return torch.full((3,1,8,8), .5), 3

def test_a_model_of_ones_own_without_parts(here, capsys):
    save_model(Plain(), 'mine')
    sample_cli('mine', out='grid.png')
    sample_cli('mine', out='each')
    assert len([*Path('each').iterdir()])==3
    assert capsys.readouterr().out=='3 pictures in grid.png\n3 pictures in each\n'

# ---- codes

def test_codes_of_another_size(here):
    "A model of 32 pixels was given pictures of 64."
    for size in (32, 128):
        said = line(codes_cli, 'scenes', 'scenes', 'c', size=size)
        assert f'--size {size}: scenes makes codes of 64×64 pictures' in said
    save_model(load('scenes', 'cpu').vqvae, 'vqvae', size=32)
    assert '--size 64: vqvae makes codes of 32×32 pictures' in line(codes_cli, 'scenes', 'vqvae', 'c', size=64)
    save_model(load('scenes', 'cpu').vqvae, 'bare')
    assert 'give --size, the side of the pictures that it was trained on' in line(codes_cli, 'scenes', 'bare', 'c')
    assert not Path('c').exists()

def test_codes_refuses_before_work(here):
    assert 'codes are made by a VQVAE' in line(codes_cli, 'scenes', 'mnist', 'c')
    said = line(codes_cli, 'scenes', 'scenes', 'c', text_encoder='mnist')
    assert "reads no texts: expected 'minilm', 'word_vectors'" in said
    assert 'batch_size=0' in line(codes_cli, 'scenes', 'scenes', 'c', batch_size=0)
    assert 'workers=-1' in line(codes_cli, 'scenes', 'scenes', 'c', workers=-1)
    assert not Path('c').exists()

def test_two_processes_that_write_codes_into_one_folder(here):
    "The second is told in one line, before it encodes anything; the first is not disturbed."
    save_model(VQVAE(channels=(8,8), d_code=4, n_codes=8), 'vqvae', size=16)
    def second():
        "The exit status of another process: 7 where it is refused in one line."
        child = os.fork()
        if child: return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        try: codes_cli('scenes', 'vqvae', 'c', split='test')
        except SystemExit as end: os._exit(7 if str(end.code).startswith('codes: another process is writing') else 1)
        finally: os._exit(2)
    refused = []
    class Scenes(SyntheticScenes):
        "Two batches; while the second is read, another process begins."
        def __getitems__(self, idxs):
            if 4 in idxs and Path('c').exists(): refused.append(second())
            return super().__getitems__(idxs)
    path = write_codes(Scenes(8, 'test', 16), load('vqvae', 'cpu'), 'c', batch_size=4, progress=False)
    assert refused==[7]
    assert len(CodeDataset(path))==8
    assert write_codes(Scenes(8, 'test', 16), load('vqvae', 'cpu'), 'c', progress=False)==path      # it is free again

class Words(Module):
    "Features of no text in particular."
    d_text = 4
    def text_features(self, captions): return torch.zeros(len(captions), 3, 4)

@pytest.mark.parametrize('prior,positions', [('codes',5*(2*2+4*4)), ('diffusion',5)])
def test_one_bar_for_pictures_of_a_text(monkeypatch, prior, positions):
    "There was one for each map of codes."
    shown = []
    class Bar(tqdm):
        "It notes how far it came."
        def close(self):
            if not self.disable: shown.append((self.n, self.total))
            self.disable = True
    for name in ('codes.pixelsnail','codes.text2image','core.processes','diffusion.samplers'):
        monkeypatch.setattr(f'fastldm.{name}.tqdm', Bar)
    vqvae = VQVAE(channels=(8,8), d_code=4, n_codes=8)
    priors = [PixelSNAIL(8, (2,2), 8, d_text=4), PixelSNAIL(8, (4,4), 8, above=(8,(2,2)), d_text=4)]
    model = TextToImage(Words(), vqvae, priors, text_denoiser(vqvae.c_latent, 4, (8,8)), size=16).eval()
    options = dict(steps=2) if prior=='diffusion' else {}
    model.sample('a red ship', 5, prior=prior, batch_size=1, seed=0, progress=True, **options)
    assert shown==[(positions, positions)]

def test_figures_refuses_a_name(here): assert "did you mean 'a3_mnist'" in line(figures_cli, ['a3_mist'])

# ---- help

def test_help_shows_the_comments_of_parameters():
    "`load?` showed names and types only."
    interactiveshell = pytest.importorskip('IPython.core.interactiveshell')
    shell = interactiveshell.InteractiveShell()
    untouched = shell.inspector.mime_hooks
    assert show_parameters(shell) and show_parameters(shell)
    def page(obj, **how):
        shell.user_ns['thing'] = obj
        return shell.object_inspect_mime('thing', **how)['text/plain']
    assert 'a shipped model, a folder, or `user/name` on the Hugging Face hub' in page(load)
    assert 'one latent, (c,h,w)' in page(evaluate.LatentDiffusion)
    assert 'how closely to follow the conditions' in page(load('mnist').sample)
    assert 'how closely to follow the conditions' in page(sample_cli)
    assert 'steps of the sampler' not in page(print) and 'Prints the values' in page(print)
    assert 'interval' in page(load('mnist').sample, detail_level=1)      # the source, as ever
    assert untouched=={}                                                  # other shells have theirs

def test_import_does_nothing_outside_of_ipython():
    "Not even an import."
    code = 'import sys, fastldm; print("IPython" in sys.modules, fastldm.show_parameters())'
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.stdout.split()==['False','False'], done.stderr

# ---- from another folder

@pytest.fixture
def pics(here):
    "A folder of pictures to train and to test with, given by a path that is good in this folder only."
    rng = np.random.default_rng(0)
    for split,n in dict(train=8, test=2).items():
        Path('pics', split).mkdir(parents=True)
        for i in range(n): Image.fromarray(rng.integers(0, 256, (16,16,3), np.uint8)).save(f'pics/{split}/{i}.png')
    return 'pics'

def test_an_adapter_of_a_model_from_another_folder(here, pics, monkeypatch):
    "Paths on the cards of both were kept as they were typed, and the data was not found."
    label_ldm(pics, 'runs/base', size=16, ae_channels=(8,8), channels=(16,32), ae_steps=2, steps=2, progress=False)
    assert load('runs/base').meta['data']==str((here/'pics').resolve())
    monkeypatch.chdir(here/'runs')
    train_adapter('base', 'adapter', steps=2, progress=False)
    (here/'elsewhere').mkdir()
    monkeypatch.chdir(here/'elsewhere')
    adapter = load(here/'runs'/'adapter')
    assert adapter.meta['base']==str((here/'runs'/'base').resolve())
    scores = adapter.evaluate_command(n=2, steps=2)
    assert scores['n']==2

def test_a_vqvae_says_for_which_pictures_its_codes_are(here):
    vqvae = train_vqvae(SyntheticScenes(8, 'train', 32), 'text', steps=2, batch_size=4, progress=False)
    assert vqvae.meta['size']==32
    said = line(codes_cli, 'scenes', 'text/vqvae', 'c', size=64)
    assert '--size 64: text/vqvae makes codes of 32×32 pictures' in said

def test_a_module_that_has_a_name_of_pythons(tmp_path):
    "`--module calendar.py` did nothing, as Python had a module of that name."
    (tmp_path/'calendar.py').write_text('raise SystemExit("this file is run")')
    with pytest.raises(ImportError, match='another module calendar is loaded already .*: rename the file'):
        import_module_of(str(tmp_path/'calendar.py'))
    with pytest.raises(ImportError, match='none.py does not exist'): import_module_of(str(tmp_path/'none.py'))
    assert str(tmp_path) not in sys.path                                 # where processes would import it

def test_a_module_from_a_file(tmp_path, monkeypatch):
    "It is run once, finds what lies beside it, and is forgotten where it fails."
    monkeypatch.setattr(sys, 'path', [*sys.path])
    (tmp_path/'beside_mine.py').write_text('VALUE = 3')
    mine = tmp_path/'mine_for_this_test.py'
    mine.write_text('1/0')
    with pytest.raises(ZeroDivisionError): import_module_of(str(mine))
    mine.write_text('import beside_mine\nruns = globals().get("runs", 0)+1\nVALUE = beside_mine.VALUE')
    for _ in range(2): import_module_of(str(mine))
    module = sys.modules.pop('mine_for_this_test')
    assert (module.VALUE, module.runs)==(3, 1)
