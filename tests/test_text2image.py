"Text to image from end to end: a small folder of captioned pictures through every stage, the commands, and what people type."
import json, subprocess, sys, warnings
from pathlib import Path
import pytest, torch
from PIL import Image
from fastldm.ldm import load
from fastldm.recipes import codes_cli, sample_cli, text_to_image, train_cli

pytest.importorskip('transformers'); pytest.importorskip('lmdb')
COLOURS = dict(red=(220,30,30), green=(30,160,40), blue=(30,60,220), yellow=(240,220,40))
pytestmark = pytest.mark.slow

def make_set(folder, n=24):
    "Squares of four colours, with a table of captions."
    (folder/'images').mkdir(parents=True)
    rows = ['file,caption,split']
    for i in range(n):
        c = list(COLOURS)[i%4]
        im = Image.new('RGB', (32,32), 'white'); im.paste(COLOURS[c], (2+i%6,3+i//4,18+i%6,20+i//4)); im.save(folder/'images'/f'{i}.png')
        rows.append(f"{i}.png,a {c} square,{'test' if i%6==5 else 'train'}")
    (folder/'captions.csv').write_text('\n'.join(rows)+'\n', encoding='utf-8')
    return folder

SMALL = dict(size=32, reader_steps=4, ae_steps=4, prior_steps=(4,4), steps=4, channels=(8,16), prior_channels=(16,16), progress=False)

@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    "A model of a few steps, and the folder of its stages."
    d = tmp_path_factory.mktemp('text')
    model = text_to_image(str(make_set(d/'set')), d/'run', **SMALL)
    return model,d

def run(command, *args, ok=True):
    p = subprocess.run([Path(sys.executable).parent/f'fastldm_{command}',*map(str,args)], capture_output=True, text=True, timeout=300)
    assert (p.returncode==0)==ok, p.stdout+p.stderr
    assert ok or 'Traceback' not in p.stderr, p.stderr
    return p.stdout+p.stderr

def test_every_stage_is_there(trained):
    model,d = trained
    assert {'reader','vqvae','codes_train','codes_test','prior_0','prior_1','denoiser','samples.png','config.json','model.safetensors','README.md'} <= {f.name for f in (d/'run').iterdir()}
    card = json.loads((d/'run'/'config.json').read_text())
    assert card['n_pictures']==20 and all(card['stages'][f'prior_{l}']['bits_per_code']>0 for l in (0,1))
    assert not list((d/'run').rglob('*.p[kt]*'))
    assert load(d/'run').sample('a red square', 2, seed=0).equal(model.sample('a red square', 2, seed=0))

def test_a_finished_run_is_not_trained_again(trained):
    _,d = trained
    before = {f:f.stat().st_mtime_ns for f in (d/'run').glob('*/model.safetensors')}
    text_to_image(str(d/'set'), d/'run', **SMALL)
    assert before=={f:f.stat().st_mtime_ns for f in (d/'run').glob('*/model.safetensors')}

@pytest.mark.parametrize('prior', ['codes','diffusion'])
def test_same_seed_same_picture(trained, prior):
    "Whatever the batch size, and for each number of the seed."
    model,_ = trained
    all_at_once = model.sample('a red square', 5, seed=3, prior=prior)
    assert (all_at_once-model.sample('a red square', 5, seed=3, prior=prior, batch_size=2)).abs().max()<1e-3
    assert all_at_once.shape==(5,3,32,32) and (all_at_once-model.sample('a red square', 5, seed=4, prior=prior)).abs().max()>1e-3

@pytest.mark.parametrize('prompt,warns', [('',False), ('a red square '*3334,True), ('красный квадрат',True), ('赤い四角',True), ('🟥',True), ('\x00\n\t',None), (None,False)])
def test_whatever_people_type(trained, prompt, warns):
    "Pictures always; a warning where the text was cut or not understood."
    model,_ = trained
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter('always')
        x = model.sample(prompt, 2, seed=0)
    assert x.shape==(2,3,32,32) and x.isfinite().all()
    if warns is not None: assert bool([w for w in seen if 'texts' in str(w.message)])==warns, [str(w.message) for w in seen]

def test_no_text_is_the_empty_text(trained):
    model,_ = trained
    assert model.sample(None, 2, seed=0).equal(model.sample('', 2, seed=0))

@pytest.mark.parametrize('args,kw,says', [((5,),{},'expected a text'), ((['a','b'],3),{},'2 prompts for n=3'), (('a',0),{},'n=0'), (('a',1),dict(prior='magic'),'codes and diffusion'),
    (('a',1),dict(temperatur=2),"unknown setting 'temperatur'"), (('a',1),dict(steps=5),"unknown setting 'steps'"), (('a',1),dict(candidates=-1),'candidates=-1'), (('a',1),dict(top_p=0.),'top_p'), (('a',1),dict(temperature=-1),'temperature')])
def test_bad_input(trained, args, kw, says):
    with pytest.raises(ValueError, match=says.replace('(','.')): trained[0].sample(*args, **kw)

def test_priors_of_another_map(trained):
    from fastldm.text2image import TextToImage
    m,_ = trained
    with pytest.raises(ValueError, match='train priors on the codes of this VQ-VAE'): TextToImage(m.reader, m.vqvae, list(m.priors), size=64)

def test_commands(trained, tmp_path, capsys):
    "Each once as a program; again, and what goes wrong, as the function behind it."
    _,d = trained
    assert '4 pictures' in run('sample', d/'run', '--prompt', 'a red square', '--n', 4, '--out', tmp_path/'x.png') and Image.open(tmp_path/'x.png').size[0]>100
    assert 'CodeDataset(20' in run('codes', d/'set', d/'run', tmp_path/'codes', '--size', 32)
    codes_cli(str(d/'set'), str(d/'run'), str(tmp_path/'codes'), size=32)                                        # again: nothing to do
    sample_cli(str(d/'run'), prompt='a red square', prior='diffusion', steps=3, n=2, candidates=2, out=str(tmp_path/'y.png'))
    assert 'CodeDataset(20' in capsys.readouterr().out and (tmp_path/'y.png').exists()
    def fails(says, f, *args, **kw):
        with pytest.raises(SystemExit, match=says): f(*map(str,args), **kw)
    fails('draws by text', sample_cli, d/'run', label=3)
    fails('does not draw by text', sample_cli, 'mnist', prompt='three')
    fails('codes are made by a VQVAE', codes_cli, d/'set', 'mnist', tmp_path/'other')
    fails('does not exist', codes_cli, tmp_path/'nothing', d/'run', tmp_path/'other')
    fails('needs --data', train_cli, 'captioned')
    assert not (tmp_path/'other').exists()
