"Text to image from end to end: a small folder of captioned pictures through every stage, the commands, and what people type."
import json, shutil, subprocess, sys, warnings
from pathlib import Path
import pytest, torch
from PIL import Image
from fastldm.diffusion import load
from fastldm.core import perceptual
from fastldm.recipes import codes_cli, eval_cli, evaluate_texts, reconstruction_texts, sample_cli, text_to_image, train_cli

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

SMALL = dict(size=32, text_encoder_steps=4, ae_steps=4, prior_steps=(4,4), steps=4, channels=(8,16), prior_channels=(16,16), progress=False)

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
    assert {'text_encoder','vqvae','codes_train','codes_test','prior_0','prior_1','denoiser','samples.png','config.json','model.safetensors','README.md'} <= {f.name for f in (d/'run').iterdir()}
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
    from fastldm.codes import TextToImage
    m,_ = trained
    with pytest.raises(ValueError, match='train priors on the codes of this VQ-VAE'): TextToImage(m.text_encoder, m.vqvae, list(m.priors), size=64)

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

TEXTS = {'bleu1','bleu2','bleu3','bleu4','rouge1','rouge2','rougeL','cider','retrieval'}

def test_scores_of_texts(trained):
    "Each number beside that of the real pictures; the same seed gives the same; more prompts than pictures are all pictures."
    model,d = trained
    quiet = lambda r: {k:v for k,v in r.items() if k!='seconds_per_picture'}
    res = evaluate_texts(model, str(d/'set'), seed=1, progress=False)
    both = {k for k in res if f'real_{k}' in res}
    assert TEXTS < both and any(k.startswith('meteor') for k in both) and res['n']==4 and res['prior']=='codes' and res['seconds_per_picture']>0
    assert res['retrieval_chance']==1/3                                 # four squares, two of one colour: one colour among three
    assert quiet(res)==quiet(evaluate_texts(model, str(d/'set'), seed=1, batch_size=3, progress=False))
    assert evaluate_texts(model, str(d/'set'), 2, prior='diffusion', steps=2, candidates=2, progress=False)['prior']=='diffusion'

def test_scores_that_are_known(trained, monkeypatch):
    "A model that draws the real pictures, read by somebody who knows them, scores like them, and as high as can be; a classifier is asked for all."
    from fastldm.recipes import evaluate
    from fastldm.data import Captioned
    model,d = trained
    ds = Captioned(d/'set', 'test', size=32)
    real = dict(zip(ds.caption, ds.__getitems__(range(len(ds)))['image']))
    def said(x):
        assert x.min()<-.5                                              # pictures in [-1,1]
        return [min(real, key=lambda c: (real[c].mean((1,2))-p.mean((1,2))).abs().sum()) for p in x]
    monkeypatch.setattr(model.text_encoder, 'caption', lambda x, batch_size: said(x), raising=False)
    monkeypatch.setattr(model, 'sample', lambda asked, **kw: torch.stack([(real[c]+1)/2 for c in asked]), raising=False)
    class Classifier:
        def score(self, x, asked): return dict(colour=torch.tensor([a==b for a,b in zip(said(x), asked)]), all=torch.tensor([a==asked[0] for a in asked]))
    monkeypatch.setattr(evaluate, 'available', lambda cls: [f"{d/'set'}_classifier"])
    monkeypatch.setattr(evaluate, 'load', lambda name, device: Classifier())
    res = evaluate_texts(model, str(d/'set'), batch_size=3, progress=False)
    assert res['bleu3']==res['real_bleu3']==res['rougeL']==1 and res['colour']==res['real_colour']==1 and .25<=res['all']<1

def test_the_prompts_are_always_the_same(trained):
    "Fewer prompts are the first of more, one a picture, with all the captions that it has."
    from fastldm.recipes import held_out_pairs
    model,d = trained
    shutil.copytree(d/'set', d/'twice', dirs_exist_ok=True)
    t = d/'twice'/'captions.csv'; rows = t.read_text().splitlines()
    t.write_text('\n'.join(rows+[r.replace('a ','one ') for r in rows[1:]]+['5.png,...,test'])+'\n')
    x,asked,refs = held_out_pairs(model, str(d/'twice'), 99, None)
    y,fewer,_ = held_out_pairs(model, str(d/'twice'), 2, None)
    assert len(asked)==4 and fewer==asked[:2] and y.equal(x[:2]) and x.abs().max()<=1
    assert all(r==[c,c.replace('a ','one ')] for r,c in zip(refs,asked))

try: LPIPS = {'lpips','lpips_by'} if perceptual('auto') else set()    # left out where no distance is installed
except FileNotFoundError: LPIPS = set()

def test_scores_of_codes(trained):
    model,d = trained
    res = reconstruction_texts(model, str(d/'set'))
    again = reconstruction_texts(model, str(d/'set'), batch_size=3)
    assert again=={k:pytest.approx(v, abs=1e-5) if isinstance(v,float) else v for k,v in res.items()}
    assert {'psnr','ssim'}|LPIPS <= {*res} and res['n']==4
    for l,m in enumerate((4*4*4,4*8*8)): assert 1<=res[f'perplexity_{l}']<=res[f'codes_used_{l}']*model.vqvae.n_codes+1e-3<=m+1

def test_scores_refuse_before_work(trained, monkeypatch, tmp_path):
    from fastldm.codes import TextToImage
    model,d = trained
    worked = []
    monkeypatch.setattr(TextToImage, '_by_codes', lambda *a, **kw: worked.append(1))
    class Deaf: text_features = None
    m = TextToImage.__new__(TextToImage); torch.nn.Module.__init__(m); m.text_encoder = Deaf()
    for kw,says in ((dict(n=0),'n=0'), (dict(prior='magic'),'codes and diffusion'), (dict(steps=3),"unknown setting 'steps'"), (dict(candidates=0),'candidates=0'), (dict(data='mnist'),'give a captioned set'), (dict(data=str(tmp_path)),'no table of captions'), (dict(model=m),'cannot describe')):
        with pytest.raises((ValueError,FileNotFoundError), match=says): evaluate_texts(**{**dict(model=model, data=str(d/'set'), progress=False), **kw})
    for package in ('sacrebleu','rouge_score','nltk'):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(ImportError, match=f"`{package}`: pip install 'fastldm.text.'"): evaluate_texts(model, str(d/'set'))
        monkeypatch.delitem(sys.modules, package)
    assert not worked

def test_eval_command(trained, tmp_path, capsys):
    model,d = trained
    said = run('eval', d/'run', '--n', 3, '--candidates', 2, '--out', tmp_path/'n.json')
    res = json.loads((tmp_path/'n.json').read_text())
    assert TEXTS|{'psnr','codes_used_1'} <= {*res} and res['n']==3 and res['candidates']==2 and all(k in said for k in res)
    def fails(says, *args, **kw):
        with pytest.raises(SystemExit, match=says): eval_cli(*map(str,args), **kw)
    fails('does not draw by text', 'mnist', prior='codes')
    fails('does not draw by text', 'mnist', candidates=2)
    fails("unknown setting 'step'", d/'run', step='DPMSolver2M')
    fails('n=0', d/'run', n=0)
    eval_cli(str(d/'run'), n=2, prior='diffusion', steps=2, card=True)
    assert json.loads((d/'run'/'config.json').read_text())['metrics']['prior']=='diffusion' and '| metric: psnr |' in (d/'run'/'README.md').read_text()
    assert load(d/'run').sample('a red square', seed=0).equal(model.sample('a red square', seed=0))

def test_candidates_are_what_the_reader_likes_best(trained):
    "Of the very pictures that are drawn without choosing."
    model,_ = trained
    prompts = ['a red square','a blue square']
    every = model.sample([p for p in prompts for _ in range(4)], seed=5)
    best = [model.text_encoder.match(every[4*i:4*i+4]*2-1, p).argmax().item()+4*i for i,p in enumerate(prompts)]
    assert model.sample(prompts, candidates=4, seed=5).equal(every[best])

@pytest.mark.parametrize('prior', ['codes','diffusion'])
def test_each_prompt_its_picture(trained, prior):
    "A text has a say in its own picture, and in no other."
    model,_ = trained
    for p in (p for m in (model.denoiser,*model.priors) for p in m.parameters()): p.data += .02*torch.randn_like(p)       # at the start the last layers are 0
    a,b = (model.sample(['a red square',p,'a green square'], seed=2, prior=prior, guidance_scale=4.) for p in ('a red square','a blue square'))
    changed = (a-b).abs().amax((1,2,3))
    assert changed[1]>1e-3 and changed[[0,2]].max()<1e-4

def test_settings_a_level(trained):
    "A pair of settings is one for each level, the coarser first."
    from fastldm.codes import sample_codes
    model,_ = trained
    text = model.text_encoder.text_features(['a red square']*3)
    top = sample_codes(model.priors[0], 3, None, text, seed=1, temperature=0., guidance_scale=2.)
    fine = sample_codes(model.priors[1], 3, top, text, seed=1, temperature=.5, top_k=3)
    x = (model.vqvae.decode_codes([top,fine])+1)/2
    assert model.sample('a red square', 3, seed=1, temperature=(0.,.5), top_k=(None,3), guidance_scale=(2.,1.)).equal(x)

def test_latents_of_codes_are_those_of_pictures(trained):
    from fastldm.data import Captioned
    from fastldm.codes import CodeDataset
    from fastldm.codes import CodeLatents
    model,d = trained
    b = CodeLatents(CodeDataset(d/'run'/'codes_test', model.vqvae), model.vqvae).__getitems__(range(4))
    ds = Captioned(d/'set', 'test', size=32)
    assert torch.allclose(b['latent'], model.vqvae.encode(ds.__getitems__(range(4))['image']), atol=1e-5) and b['text'].shape[0]==4 and 'caption' not in b

def test_goes_on_from_where_it_was(trained, tmp_path):
    "Stages that are gone are made again, and come out the same; those that are there are not touched."
    _,d = trained
    run = shutil.copytree(d/'run', tmp_path/'run')
    before = load(run).sample('a red square', 2, seed=0)
    for gone in ('prior_1','denoiser','codes_test'): shutil.rmtree(run/gone)
    (run/'config.json').unlink(); (run/'model.safetensors').unlink()
    kept = {f:f.stat().st_mtime_ns for s in ('text_encoder','vqvae','prior_0') for f in (run/s).glob('*.*')}
    model = text_to_image(str(d/'set'), run, **SMALL)
    assert model.sample('a red square', 2, seed=0).equal(before) and kept=={f:f.stat().st_mtime_ns for f in kept}

def test_another_vqvae_under_the_same_codes(trained, tmp_path):
    "Who trains the VQ-VAE anew is told that the codes are not its own, before a prior learns nonsense."
    _,d = trained
    run = shutil.copytree(d/'run', tmp_path/'run')
    for gone in ('vqvae','prior_0','prior_1'): shutil.rmtree(run/gone)
    with pytest.raises(ValueError, match='codes_train holds codes of something else: model was .*another folder, or delete it'): text_to_image(str(d/'set'), run, **{**SMALL,'ae_steps':6})
    assert not (run/'prior_0').exists()

def test_codes_of_anything(trained, tmp_path, capsys):
    "By a VQ-VAE alone, with another reader, by worker processes; and what cannot be."
    from fastldm.codes import CodeDataset
    _,d = trained
    kw = dict(size=32, split='test')
    codes_cli(str(d/'set'), str(d/'run'/'vqvae'), str(tmp_path/'a'), workers=1, **kw)
    codes_cli(str(d/'set'), str(d/'run'/'vqvae'), str(tmp_path/'b'), text_encoder=str(d/'run'/'text_encoder'), **kw)
    a,b,c = (CodeDataset(p)[:] for p in (tmp_path/'a',tmp_path/'b',d/'run'/'codes_test'))
    assert 'text' not in a and b['text'].equal(c['text']) and all(x.equal(y) and y.equal(z) for x,y,z in zip(a['codes'],b['codes'],c['codes']))
    def fails(says, *args, **more):
        with pytest.raises(SystemExit, match=says): codes_cli(*map(str,args), **{**kw,**more})
    fails('holds codes of something else: .*text was', d/'set', d/'run', tmp_path/'a')
    fails('multiples of 8', d/'set', d/'run', tmp_path/'c', size=20)
    fails('give a captioned set', 'digits', d/'run', tmp_path/'c')
    assert not (tmp_path/'c').exists()

@pytest.mark.parametrize('kw,says', [(dict(prior='magic'),'this model has codes and diffusion'), (dict(step='euler'),"unknown setting 'step'"), (dict(n=-3),'n=-3'), (dict(candidates=-2),'candidates=-2'), (dict(prior='diffusion', step='eulr_step'),'eulr_step')])
def test_one_line_for_what_is_wrong(trained, tmp_path, kw, says):
    with pytest.raises(SystemExit, match=says): sample_cli(str(trained[1]/'run'), prompt='a red square', out=str(tmp_path/'x.png'), **kw)
    assert not list(tmp_path.iterdir())
