"Text to image from end to end: a small captioned folder through every stage, the commands, and what people type."
import copy, json, shutil, subprocess, sys, warnings
from functools import wraps
from pathlib import Path
import pytest, torch, torch.nn.functional as F
from PIL import Image
from fastldm.codes import CodeDataset, CodeLatents, TextToImage, WordVectors, sample_codes
from fastldm.core import fingerprint, perceptual
from fastldm.data import Captioned
from fastldm.diffusion import Autoencoder, load, make_student
from fastldm.metrics import psnr
from fastldm.recipes import codes_cli, eval_cli, evaluate, evaluate_texts, frozen_text_encoder, held_out_pairs
from fastldm.recipes import reconstruction_texts
from fastldm.recipes import sample_cli, text_to_image, train_cli, train_student

pytest.importorskip('transformers')
pytest.importorskip('lmdb')
pytestmark = pytest.mark.slow
COLOURS = dict(red=(220,30,30), green=(30,160,40), blue=(30,60,220), yellow=(240,220,40))

def make_set(folder, n=24):
    "Squares of four colours, with a table of captions."
    (folder/'images').mkdir(parents=True)
    rows = ['file,caption,split']
    for i in range(n):
        colour = list(COLOURS)[i%4]
        left, top = 2+i%6, 3+i//4
        image = Image.new('RGB', (32,32), 'white')
        image.paste(COLOURS[colour], (left,top,left+16,top+17))
        image.save(folder/'images'/f'{i}.png')
        rows.append(f"{i}.png,a {colour} square,{'test' if i%6==5 else 'train'}")
    (folder/'captions.csv').write_text('\n'.join(rows)+'\n', encoding='utf-8')
    return folder

SMALL = dict(size=32, text_encoder_steps=4, ae_steps=4, prior_steps=(4,4), steps=4, channels=(8,16),
             prior_channels=(16,16), progress=False)

@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    "A model of a few steps, and the folder of its stages."
    d = tmp_path_factory.mktemp('text')
    model = text_to_image(str(make_set(d/'set')), d/'run', **SMALL)
    return model, d

def test_a_run_is_resumed_with_other_settings_of_sampling(trained, tmp_path):
    "Nothing is trained anew, and the model is saved with the settings of now."
    model, d = trained
    shutil.copytree(d/'run', tmp_path/'run')
    settings = dict(guidance_scale=2., steps=3, step='DPMSolver2M')
    again = text_to_image(str(d/'set'), tmp_path/'run', **SMALL | dict(diffusion=settings))
    assert again.settings['diffusion']==settings==load(tmp_path/'run').settings['diffusion']
    assert (again.diffusion.steps, again.diffusion.step)==(3, 'DPMSolver2M')
    assert fingerprint(again.denoiser)==fingerprint(model.denoiser)

def test_the_student_stays_when_the_sampler_changes(trained):
    model = copy.copy(trained[0])
    student = make_student(model.denoiser).eval()
    student.meta = dict(teacher_fingerprint=fingerprint(model.denoiser), calls=[1,2,4], guidance=[1.,3.])
    model.__dict__['_diffusion'] = (None,None)                          # of its own
    model.diffusion.add_student(student)
    model.settings = dict(model.settings, diffusion=dict(steps=3))
    assert model.diffusion.steps==3 and model.has_student
    assert not trained[0].has_student

def run(command, *args):
    "What a command prints."
    program = Path(sys.executable).parent/f'fastldm_{command}'
    p = subprocess.run([program, *map(str,args)], capture_output=True, text=True, timeout=1200)
    assert p.returncode==0, p.stdout+p.stderr
    return p.stdout+p.stderr

def fails(message, command, *args, **kw):
    "A command ends with one line that says what is wrong."
    with pytest.raises(SystemExit, match=message): command(*map(str,args), **kw)

def times(files): return {f:f.stat().st_mtime_ns for f in files}

# ---- stages

STAGES = 'text_encoder vqvae codes_train codes_test prior_0 prior_1 denoiser'.split()
FILES = 'samples.png config.json model.safetensors README.md'.split()

def test_every_stage_is_there(trained):
    model, d = trained
    assert {*STAGES, *FILES} <= {f.name for f in (d/'run').iterdir()}
    card = json.loads((d/'run'/'config.json').read_text())
    assert card['n_pictures']==20
    for level in (0,1): assert card['stages'][f'prior_{level}']['bits_per_code']>0
    assert not list((d/'run').rglob('*.p[kt]*'))
    again = load(d/'run').sample('a red square', 2, seed=0)
    assert again.equal(model.sample('a red square', 2, seed=0))

def test_a_finished_run_is_not_trained_again(trained):
    _, d = trained
    before = times((d/'run').glob('*/model.safetensors'))
    text_to_image(str(d/'set'), d/'run', **SMALL)
    assert before==times((d/'run').glob('*/model.safetensors'))

def test_continues_from_where_it_was(trained, tmp_path):
    "Stages that are gone are made again, and come out the same; those that are there are not touched."
    _, d = trained
    run = shutil.copytree(d/'run', tmp_path/'run')
    before = load(run).sample('a red square', 2, seed=0)
    for gone in ('prior_1','denoiser','codes_test'): shutil.rmtree(run/gone)
    (run/'config.json').unlink()
    (run/'model.safetensors').unlink()
    kept = times(f for stage in ('text_encoder','vqvae','prior_0') for f in (run/stage).glob('*.*'))
    model = text_to_image(str(d/'set'), run, **SMALL)
    assert model.sample('a red square', 2, seed=0).equal(before)
    assert kept==times(kept)

def test_another_vqvae_under_the_same_codes(trained, tmp_path):
    "A VQ-VAE that is trained anew has other codes: an error, before a prior learns nonsense."
    _, d = trained
    run = shutil.copytree(d/'run', tmp_path/'run')
    for gone in ('vqvae','prior_0','prior_1'): shutil.rmtree(run/gone)
    (run/'recipe.json').unlink()                            # else the other steps are refused
    message = 'codes_train holds codes of something else: model was .*another folder, or delete it'
    with pytest.raises(ValueError, match=message): text_to_image(str(d/'set'), run, **dict(SMALL, ae_steps=6))
    assert not (run/'prior_0').exists()

def test_the_table_of_word_vectors():
    "It ships with `emoji`, needs no package, and knows what words mean that no label has."
    words = frozen_text_encoder('word_vectors')
    assert type(words) is WordVectors and not words.training
    vectors = F.normalize(words.vectors.float(), dim=1)
    def like(a, b): return vectors[words.ids[a]]@vectors[words.ids[b]]
    for word,synonym,other in (('puppy','dog','truck'), ('lorry','truck','pizza'), ('kid','child','castle')):
        assert like(word, synonym)>.4>2*like(word, other)

def test_a_frozen_text_encoder(trained, tmp_path):
    "It is that of another model, nothing of it is trained, and the model brings it along."
    model, d = trained
    options = dict(SMALL, text_encoder=str(d/'run'), prior_channels=(16,16))
    other = text_to_image(str(d/'set'), tmp_path/'run', **options)
    assert fingerprint(other.text_encoder)==fingerprint(model.text_encoder)
    assert not (tmp_path/'run'/'text_encoder').exists()
    again = load(tmp_path/'run').sample('a red square', 2, seed=0)
    assert again.equal(other.sample('a red square', 2, seed=0))
    with pytest.raises(ValueError, match="mnist.* reads no texts: expected 'minilm', 'word_vectors'"):
        text_to_image(str(d/'set'), tmp_path/'no', **dict(SMALL, text_encoder='mnist'))
    assert not (tmp_path/'no').exists()

# ---- what is sampled

@pytest.mark.parametrize('prior', ['codes','diffusion'])
def test_same_seed_same_image(trained, prior):
    "Whatever the batch size, and for each number of the seed."
    model, _ = trained
    def sample(seed, **kw): return model.sample('a red square', 5, seed=seed, prior=prior, **kw)
    x = sample(3)
    assert x.shape==(5,3,32,32)
    assert (x-sample(3, batch_size=2)).abs().max()<1e-3
    assert (x-sample(4)).abs().max()>1e-3

@pytest.mark.parametrize('prompt,warns', [
    ('',False), ('a red square '*3334,True), ('красный квадрат',True), ('赤い四角',True), ('🟥',True),
    ('\x00\n\t',None), (None,False)])
def test_whatever_people_type(trained, prompt, warns):
    "Images always; a warning where the text was cut or not understood."
    model, _ = trained
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter('always')
        x = model.sample(prompt, 2, seed=0)
    assert x.shape==(2,3,32,32) and x.isfinite().all()
    messages = [str(w.message) for w in seen]
    if warns is not None: assert any('texts' in m for m in messages)==warns, messages

def test_no_text_is_the_empty_text(trained):
    model, _ = trained
    assert model.sample(None, 2, seed=0).equal(model.sample('', 2, seed=0))

@pytest.mark.parametrize('args,kw,message', [
    ((5,), {}, 'expected a text'),
    ((['a','b'],3), {}, '2 prompts for n=3'),
    (('a',0), {}, 'n=0'),
    (('a',1), dict(prior='magic'), 'codes and diffusion'),
    (('a',1), dict(temperatur=2), "unknown setting 'temperatur'"),
    (('a',1), dict(steps=5, prior='codes'), "unknown setting 'steps'"),
    (('a',1), dict(steps=5, temperature=.5), "unknown setting 'steps'"),
    (('a',1), dict(candidates=-1), 'candidates=-1'),
    (('a',1), dict(top_p=0.), 'top_p'),
    (('a',1), dict(temperature=-1), 'temperature'),
    (('a',1), dict(temperature='x'), "temperature='x'"),
    (('a',1), dict(temperature=[.5,'x']), "temperature='x'"),
    (('a',1), dict(top_p='x'), "top_p='x'"),
    (('a',1), dict(top_k=[1]*7), 'one per level'),
    (('a',1), dict(candidates=2, latents=True), 'chooses among images'),
    (('a',1), dict(negative='sea'), 'as negative_prompt'),
    (('a',1), dict(negative=7), 'as negative_prompt'),
    (('a',1), dict(negative=['sea']), 'as negative_prompt'),
    (('a',1), dict(negative=dict(text='sea')), 'as negative_prompt'),
    (('a',1), dict(negative=dict(sea=1)), 'sea')])
def test_bad_input(trained, args, kw, message):
    with pytest.raises(ValueError, match=message): trained[0].sample(*args, **kw)

def test_priors_of_another_map(trained):
    m, _ = trained
    with pytest.raises(ValueError, match='train priors on the codes of this VQ-VAE'):
        TextToImage(m.text_encoder, m.vqvae, list(m.priors), size=64)

def test_a_student_folder_without_diffusion(trained):
    "There is none, and nothing is wrong with asking."
    m, _ = trained
    by_codes = TextToImage(m.text_encoder, m.vqvae, list(m.priors), size=32)
    assert m.student_folder is None and by_codes.student_folder is None and not by_codes.has_student
    assert by_codes.kinds==['codes'] and m.kinds==['codes','diffusion']

def test_a_denoiser_of_another_model(trained):
    "Of other latents or another text encoder: it is refused when the model is made."
    m, _ = trained
    other = copy.deepcopy(m.denoiser)
    other.net.c_in += 1
    with pytest.raises(ValueError, match='train a denoiser on the latents'):
        TextToImage(m.text_encoder, m.vqvae, (), other, size=32)
    other = copy.deepcopy(m.denoiser)
    other.conditioner.embedders['text'].d_text += 1
    with pytest.raises(ValueError, match='train a denoiser with this text encoder'):
        TextToImage(m.text_encoder, m.vqvae, (), other, size=32)

def test_candidates_are_what_the_text_encoder_finds_best(trained):
    "Of the very images that are sampled without choosing."
    model, _ = trained
    prompts = ['a red square','a blue square']
    every = model.sample([p for p in prompts for _ in range(4)], seed=5)
    best = []
    for i,p in enumerate(prompts):
        match = model.text_encoder.match(every[4*i:4*i+4]*2-1, p)
        best.append(4*i+match.argmax().item())
    assert model.sample(prompts, candidates=4, seed=5).equal(every[best])

@pytest.mark.parametrize('prior', ['codes','diffusion'])
def test_each_prompt_its_image(trained, prior):
    "A text changes its own image, and no other."
    model = copy.deepcopy(trained[0])
    torch.manual_seed(0)
    for part in (model.denoiser,*model.priors):                         # at the start the last layers are 0, and a
        for p in part.parameters(): p.data += .1*torch.randn_like(p)    # small change of latents leaves their codes
    def sample(middle):
        return model.sample(['a red square',middle,'a green square'], seed=2, prior=prior, guidance_scale=4.)
    changed = (sample('a red square')-sample('a blue square')).abs().amax((1,2,3))
    assert changed[1]>1e-3 and changed[[0,2]].max()<1e-4

def test_settings_for_each_level(trained):
    "A pair of settings is one for each level, the coarser first."
    model, _ = trained
    text = model.text_encoder.text_features(['a red square']*3)
    top = sample_codes(model.priors[0], 3, None, text, seed=1, temperature=0., guidance_scale=2.)
    fine = sample_codes(model.priors[1], 3, top, text, seed=1, temperature=.5, top_k=3)
    x = (model.vqvae.decode_codes([top,fine])+1)/2
    pairs = dict(temperature=(0.,.5), top_k=(None,3), guidance_scale=(2.,1.))
    assert model.sample('a red square', 3, seed=1, **pairs).equal(x)

def test_latents_of_codes_are_those_of_images(trained):
    model, d = trained
    batch = CodeLatents(CodeDataset(d/'run'/'codes_test', model.vqvae), model.vqvae).__getitems__(range(4))
    images = Captioned(d/'set', 'test', size=32).__getitems__(range(4))['image']
    assert torch.allclose(batch['latent'], model.vqvae.encode(images), atol=1e-5)
    assert batch['text'].shape[0]==4 and 'caption' not in batch

# ---- commands

def test_commands(trained, tmp_path, capsys):
    "Each once as a program; again, and what goes wrong, as the function behind it."
    _, d = trained
    assert '4 pictures' in run('sample', d/'run', '--prompt', 'a red square', '--n', 4, '--out', tmp_path/'x.png')
    assert Image.open(tmp_path/'x.png').size[0]>100
    assert 'CodeDataset(20' in run('codes', d/'set', d/'run', tmp_path/'codes', '--size', 32)
    codes_cli(str(d/'set'), str(d/'run'), str(tmp_path/'codes'), size=32)                # again: nothing to do
    assert 'CodeDataset(20' in capsys.readouterr().out
    out = tmp_path/'y.png'
    sample_cli(str(d/'run'), prompt='a red square', prior='diffusion', steps=3, n=2, candidates=2, out=str(out))
    assert out.exists()
    fails('takes no --label', sample_cli, d/'run', label=3)
    fails('takes no --prompt', sample_cli, 'mnist', prompt='three')
    fails('codes are made by a VQVAE', codes_cli, d/'set', 'mnist', tmp_path/'other')
    fails('does not exist', codes_cli, tmp_path/'nothing', d/'run', tmp_path/'other')
    fails('needs --data', train_cli, 'captioned')
    assert not (tmp_path/'other').exists()

def test_codes_of_anything(trained, tmp_path):
    "By a VQ-VAE alone, with another text encoder, by worker processes."
    _, d = trained
    data, vqvae, encoder = (str(d/f) for f in ('set','run/vqvae','run/text_encoder'))
    codes_cli(data, vqvae, str(tmp_path/'a'), workers=1, size=32, split='test')
    codes_cli(data, vqvae, str(tmp_path/'b'), text_encoder=encoder, size=32, split='test')
    a, b, c = (CodeDataset(p)[:] for p in (tmp_path/'a',tmp_path/'b',d/'run'/'codes_test'))
    assert 'text' not in a and b['text'].equal(c['text'])
    for x,y,z in zip(a['codes'],b['codes'],c['codes']): assert x.equal(y) and y.equal(z)
    settings = dict(size=32, split='test')
    fails('holds codes of something else: .*text was', codes_cli, d/'set', d/'run', tmp_path/'a', **settings)
    fails('makes codes of 32×32 pictures', codes_cli, d/'set', d/'run', tmp_path/'c', size=20, split='test')
    fails('is a set without caption', codes_cli, 'digits', d/'run', tmp_path/'c', **settings)

def test_codes_of_a_chosen_column(trained, tmp_path):
    "The captions of codes are those that the model was trained on, or those that are asked for."
    _, d = trained
    table = make_set(tmp_path/'set')/'captions.csv'
    head, *rows = table.read_text(encoding='utf-8').splitlines()
    both = [f'{head},notes', *(f'{row},note {i}' for i,row in enumerate(rows))]
    table.write_text('\n'.join(both), encoding='utf-8')
    model = tmp_path/'run'
    shutil.copytree(d/'run', model)
    card = json.loads((model/'config.json').read_text())
    (model/'config.json').write_text(json.dumps(card | dict(data=str(tmp_path/'set'), caption='notes')))
    def captions(out, **options):
        codes_cli(str(tmp_path/'set'), str(model), str(tmp_path/out), split='test', size=32, **options)
        return CodeDataset(tmp_path/out)[:]['caption']
    assert captions('as_trained')==[f'note {i}' for i in range(5, 24, 6)]
    assert captions('asked', caption='caption')==['a green square','a yellow square']*2
    assert not (tmp_path/'c').exists()

@pytest.mark.parametrize('kw,message', [
    (dict(prior='magic'), 'this model has codes and diffusion'),
    (dict(step='euler', prior='codes'), "unknown setting 'step'"),
    (dict(n=-3), 'n=-3'),
    (dict(candidates=-2), 'candidates=-2'),
    (dict(prior='diffusion', step='eulr_step'), 'eulr_step')])
def test_one_line_for_what_is_wrong(trained, tmp_path, kw, message):
    fails(message, sample_cli, trained[1]/'run', prompt='a red square', out=str(tmp_path/'x.png'), **kw)
    assert not list(tmp_path.iterdir())

# ---- scores

TEXTS = {'bleu1','bleu2','bleu3','bleu4','rouge1','rouge2','rougeL','cider','retrieval'}

try: LPIPS = {'lpips','lpips_by'} if perceptual('auto') else set()    # left out where no distance is installed
except FileNotFoundError: LPIPS = set()

def untimed(scores): return {k:v for k,v in scores.items() if k!='seconds_per_picture'}

def test_scores_of_texts(trained):
    "Each number beside that of the real images; the same seed gives the same; more prompts than images are all images."
    model, d = trained
    scores = evaluate_texts(model, str(d/'set'), seed=1, progress=False)
    both = {k for k in scores if f'real_{k}' in scores}
    assert TEXTS < both and any(k.startswith('meteor') for k in both)
    assert scores['n']==4 and scores['prior']=='diffusion' and scores['seconds_per_picture']>0
    assert scores['retrieval_chance']==1/2                              # four squares of two colours
    again = evaluate_texts(model, str(d/'set'), seed=1, batch_size=3, progress=False)
    assert untimed(scores)==untimed(again)
    other = evaluate_texts(model, str(d/'set'), 2, prior='diffusion', steps=2, candidates=2, progress=False)
    assert other['prior']=='diffusion'

class Perfect:
    "Knows the caption of each real image."
    def __init__(self, ds): self.real = dict(zip(ds.caption, ds.__getitems__(range(len(ds)))['image']))
    def sample(self, asked, **kw): return torch.stack([(self.real[c]+1)/2 for c in asked])
    def caption(self, images, batch_size=None):
        assert images.min()<-.5                                         # images in [-1,1]
        def distance(c, image): return (self.real[c].mean((1,2))-image.mean((1,2))).abs().sum()
        return [min(self.real, key=lambda c: distance(c, image)) for image in images]
    def score(self, images, asked):
        right = [a==b for a,b in zip(self.caption(images), asked)]
        return dict(colour=torch.tensor(right), all=torch.tensor([a==asked[0] for a in asked]))

def test_scores_that_are_known(trained, monkeypatch):
    "A model that samples the real images, described perfectly, scores like them, and as high as can be."
    model, d = trained
    perfect = Perfect(Captioned(d/'set', 'test', size=32))
    monkeypatch.setattr(model.text_encoder, 'caption', perfect.caption, raising=False)
    monkeypatch.setattr(model, 'sample', perfect.sample, raising=False)
    monkeypatch.setattr(evaluate, 'available', lambda cls: [f"{d/'set'}_classifier"])
    monkeypatch.setattr(evaluate, 'load', lambda name, device: perfect)
    scores = evaluate_texts(model, str(d/'set'), batch_size=3, progress=False)
    assert scores['bleu3']==scores['real_bleu3']==scores['rougeL']==1
    assert scores['colour']==scores['real_colour']==1 and .25<=scores['all']<1

def test_the_prompts_are_always_the_same(trained):
    "Fewer prompts are the first of more, one an image, with all the captions that it has."
    model, d = trained
    shutil.copytree(d/'set', d/'twice', dirs_exist_ok=True)
    table = d/'twice'/'captions.csv'
    rows = table.read_text().splitlines()
    others = [r.replace('a ','one ') for r in rows[1:]]
    table.write_text('\n'.join([*rows,*others,'5.png,...,test'])+'\n')
    x, asked, references = held_out_pairs(model, str(d/'twice'), 99, None)
    y, fewer, _ = held_out_pairs(model, str(d/'twice'), 2, None)
    assert len(asked)==4 and fewer==asked[:2] and y.equal(x[:2]) and x.abs().max()<=1
    for r,c in zip(references,asked): assert r==[c,c.replace('a ','one ')]

def test_scores_of_codes(trained):
    model, d = trained
    scores = reconstruction_texts(model, str(d/'set'))
    again = reconstruction_texts(model, str(d/'set'), batch_size=3)
    assert again=={k:pytest.approx(v, abs=1e-5) if isinstance(v,float) else v for k,v in scores.items()}
    assert {'psnr','ssim'}|LPIPS <= {*scores} and scores['n']==4
    for level,n_codes in enumerate((4*4*4,4*8*8)):                      # codes of all images together
        used = scores[f'codes_used_{level}']*model.vqvae.n_codes
        assert 1<=scores[f'perplexity_{level}']<=used+1e-3<=n_codes+1

def test_reconstruction_by_what_draws(trained):
    "An autoencoder of the diffusion prior is measured, and the codes beside it, as they are of a model without one."
    m, d = trained
    torch.manual_seed(0)
    autoencoder = Autoencoder(3, 2, (8,), patch=4).eval()
    two = TextToImage(m.text_encoder, m.vqvae, list(m.priors), size=32, autoencoder=autoencoder)
    of_codes, of_both = (reconstruction_texts(model, str(d/'set')) for model in (m, two))
    for name in ('psnr','ssim'):
        assert of_both[f'codes_{name}']==pytest.approx(of_codes[name], rel=1e-5) and of_both[name]!=of_codes[name]
    assert {k: v for k,v in of_both.items() if k[-2:] in ('_0','_1')}=={
        k: v for k,v in of_codes.items() if k[-2:] in ('_0','_1')}
    assert not any(name.startswith('codes_psnr') for name in of_codes)
    images = held_out_pairs(two, str(d/'set'), 4)[0]
    with torch.no_grad(): decoded = autoencoder.decode(autoencoder.encode(images)).clamp(-1, 1)
    assert of_both['psnr']==pytest.approx(float(psnr((decoded+1)/2, (images+1)/2)), rel=1e-4)

class Deaf: text_features = None

def test_scores_refuse_before_work(trained, monkeypatch, tmp_path):
    model, d = trained
    worked = []
    for name in ('_by_codes','_by_diffusion'):
        draw = wraps(getattr(TextToImage, name))(lambda *args, **kw: worked.append(1))
        monkeypatch.setattr(TextToImage, name, draw)
    no_captions = TextToImage.__new__(TextToImage)
    torch.nn.Module.__init__(no_captions)
    no_captions.text_encoder = Deaf()
    good = dict(model=model, data=str(d/'set'), progress=False)
    wrong = {
        'n=0': dict(n=0),
        'codes and diffusion': dict(prior='magic'),
        "unknown setting 'steps'": dict(steps=3, prior='codes'),
        'candidates=0': dict(candidates=0),
        'is a set without caption': dict(data='digits'),
        'no table of captions': dict(data=str(tmp_path)),
        'cannot describe': dict(model=no_captions),
    }
    for message, kw in wrong.items():
        with pytest.raises((ValueError,FileNotFoundError), match=message): evaluate_texts(**dict(good, **kw))
    for package in ('sacrebleu','rouge_score','nltk'):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(ImportError, match=f"`{package}`: pip install .fastldm.text."):
            evaluate_texts(model, str(d/'set'))
        monkeypatch.delitem(sys.modules, package)
    assert not worked

# ---- a student of the diffusion prior

def test_a_student_draws_in_few_calls(trained, tmp_path):
    "Trained, saved and loaded with the whole model; the same seed gives the same picture in any batch."
    model, d = trained
    few = dict(root=None, n=12, path_steps=2, steps=3, batch_size=4, progress=False)
    both = train_student(str(d/'run'), tmp_path/'both', **few)
    assert both.has_student and not model.has_student and (tmp_path/'both'/'student'/'student.json').exists()
    prompts = ['a red square', 'a green square', '']
    x = both.sample(prompts, calls=2, seed=3)
    assert x.shape==(3,3,32,32)
    one_by_one = load(tmp_path/'both').sample(prompts, calls=2, seed=3, batch_size=1)
    torch.testing.assert_close(one_by_one, x, atol=1e-4, rtol=0)
    torch.testing.assert_close(both.sample(prompts, seed=3), model.sample(prompts, seed=3), atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match='no student'): model.sample('a red square', calls=2)
    with pytest.raises(ValueError, match='give one of the two'): both.sample('a red square', calls=2, steps=3)
    with pytest.raises(ValueError, match='expected one of 1, 2, 4'): both.sample('a red square', calls=3)
    with pytest.raises(ValueError, match="prior 'diffusion' has it"): both.sample('a', calls=2, prior='codes')
    sample_cli(str(tmp_path/'both'), prompt='a red square', calls=4, n=2, out=str(tmp_path/'x.png'))
    assert Image.open(tmp_path/'x.png').width>=64

def test_a_student_that_has_learned_nothing_is_its_teacher(trained):
    "With a scale of one, it draws what the teacher draws in as many steps of DDIM."
    model = copy.deepcopy(trained[0])
    student = make_student(model.denoiser).eval()
    student.meta = dict(teacher_fingerprint=fingerprint(model.denoiser), guidance=[1.,3.], calls=[1,2,4])
    model.add_student(student)
    few = model.sample('a red square', 2, calls=4, seed=1, guidance_scale=1.)
    steps = dict(steps=4, step='ddim_step', times='angle_times', guidance_scale=1., interval=(0.,1.))
    by_teacher = model.sample('a red square', 2, seed=1, **steps)
    torch.testing.assert_close(few, by_teacher, atol=1e-4, rtol=0)

def test_eval_command(trained, tmp_path):
    model, d = trained
    printed = run('eval', d/'run', '--n', 3, '--candidates', 2, '--out', tmp_path/'n.json')
    scores = json.loads((tmp_path/'n.json').read_text())
    assert TEXTS|{'psnr','codes_used_1'} <= {*scores}
    assert scores['n']==3 and scores['candidates']==2 and all(k in printed for k in scores)
    fails('takes no --prior', eval_cli, 'mnist', prior='codes')
    fails('takes no --candidates', eval_cli, 'mnist', candidates=2)
    fails("unknown setting 'step'", eval_cli, d/'run', step='DPMSolver2M', prior='codes')
    fails('n=0', eval_cli, d/'run', n=0)
    eval_cli(str(d/'run'), n=2, prior='diffusion', steps=2, card=True)
    card = json.loads((d/'run'/'config.json').read_text())
    assert card['metrics']['prior']=='diffusion'
    assert '`fastldm_eval --n 2 --steps 2 --prior diffusion --seed 0`' in card['metrics_of']
    assert '| metric: psnr |' in (d/'run'/'README.md').read_text()
    assert load(d/'run').sample('a red square', seed=0).equal(model.sample('a red square', seed=0))
