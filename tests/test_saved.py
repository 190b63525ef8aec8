"Files of version 0.1: a model of each class gives the numbers that it gave then, and a run goes on where it stopped."
import json, shutil
from functools import partial
from pathlib import Path
import pytest, torch
from fastldm.codes import *
from fastldm.control import *
from fastldm.core import *
from fastldm.data import *
from fastldm.diffusion import *
from fastldm.metrics import *

SAVED = Path(__file__).parent/'data'/'saved_0_1'
EXPECTED = json.loads((SAVED/'expected.json').read_text(encoding='utf-8'))

def wave(*shape):
    "Numbers that are the same everywhere."
    return (torch.arange(torch.Size(shape).numel()).float()*.37).sin().view(shape)

T = torch.tensor([.2,.7])
TIMES = torch.linspace(.02, 1, 7).double()
SCHEDULES = ('VE', 'VP', 'SubVP', 'Cosine', 'SqrtLinear', 'EDM', 'Flow', 'Tabulated')
HALVES = (torch.arange(64).view(8,8)//9)%2                           # a mask of two classes
FACE = dict(attrs=dict(Bald=True), mask=torch.ones(8,8).long(), text='a face', label=1)
PROMPTS = ['a red ship','the blue tree']
SENTENCES = ['a red ship on the sea','the blue trees']

def slots(embedder, *raw): return [s for s in embedder(embedder.parse(*raw)).slots().values() if torch.is_tensor(s)]
def guided(model, **conditions): return model.sample(2, seed=3, steps=3, guidance_scale=2., **conditions)

CALLS = { # folder: what its model is asked
    'Encoder': lambda m: dict(z=m(wave(1,1,8,8))),
    'Decoder': lambda m: dict(x=m(wave(1,2,2,2))),
    'Autoencoder_plain': lambda m: dict(z=m.encode(wave(1,3,8,8))),
    'TutorialAutoencoder': lambda m: dict(z=m.encode(wave(1,1,12,12))),
    'VectorQuantizer': lambda m: dict(q=m(wave(1,2,3,3))[0]),
    'VQVAE_narrow': lambda m: dict(coarse=m.encode_codes(wave(1,3,16,16))[0], latent=m.encode(wave(1,3,16,16))),
    **dict.fromkeys(SCHEDULES, lambda m: dict(log_snr=m.log_snr(TIMES))),
    'FourierFeatures': lambda m: dict(f=m(T)),
    'CrossAttention': lambda m: dict(y=m(wave(1,3,8), wave(1,2,4))),
    'SelfAttention': lambda m: dict(y=m(wave(1,3,8))),
    'SpatialTransformer': lambda m: dict(y=m(wave(1,8,2,2), wave(1,3,4))),
    'ResBlock': lambda m: dict(y=m(wave(1,8,3,3), wave(1,6))),
    'UNet': lambda m: dict(plain=m(wave(2,2,6,6), T, concat=wave(2,1,6,6))),
    'TutorialUNet': lambda m: dict(y=m(wave(2,2,10,10), T, context=wave(2,1,4))),
    'LabelEmbedder': lambda m: dict(said=slots(m, [0,2], 2)[0]),
    'AttributeEmbedder': lambda m: dict(said=slots(m, dict(Hat=True), 2)[0],
                                        complete=m.sample_missing(dict(Hat=True), 2, seed=1)),
    'MaskEmbedder': lambda m: dict(said=slots(m, HALVES, 1)[0]),
    'MaskEmbedder_concat': lambda m: dict(said=slots(m, HALVES, 1)[0]),
    'WordEmbedder': lambda m: dict(said=slots(m, 'a face hat', 2)[0]),
    'VectorEmbedder': lambda m: dict(said=slots(m, [.5,-1.], 2)[0]),
    'TextEmbedder': lambda m: dict(vector=slots(m, wave(3,6), 2)[0]),
    'LatentDiffusion': lambda m: dict(guided=guided(m, label=[0,2]), z=m.encode(wave(1,1,16,16))),
    'LatentDiffusion_tutorial': lambda m: dict(guided=guided(m, label=[0,2])),
    'LatentDiffusion_face': lambda m: dict(guided=guided(m, **FACE)),
    'Blip_stem': lambda m: dict(match=m.match(wave(2,3,8,8), SENTENCES)),
    'MiniLM': lambda m: dict(text=m.text_features(['a red ship','the'])),
    'TextToImage': lambda m: dict(codes=m.sample(PROMPTS, prior='codes', seed=2),
                                  diffusion=m.sample(PROMPTS, prior='diffusion', seed=2, steps=3)),
    'FeatureNet': lambda m: dict(logits=m(wave(2,1,8,8))),
    'Evaluator': lambda m: dict(logits=m(wave(2,1,8,8))),
    'PhotoEvaluator': lambda m: dict(head=m.head(wave(2,1280))),
    'SceneJudge': lambda m: dict(zip(('kind','colour','place'), m(wave(1,3,16,16)))),
    'FaceJudge': lambda m: dict(zip(('attributes','parts'), m(wave(1,3,32,32)))),
    'ControlAdapter': lambda m: dict(level0=m(wave(1,1,8,8).abs())[0]),
}

def described(tensor):
    "Shape, mean, standard deviation and the first six values."
    x = tensor.double()
    return dict(shape=[*x.shape], mean=x.mean().item(), std=x.std(correction=0).item(), first=x.flatten()[:6].tolist())

@pytest.mark.parametrize('name', CALLS)
def test_a_saved_model_gives_the_same_numbers(name):
    "Also where its class, its module, an argument or a weight has another name now."
    if name in ('Blip_stem','MiniLM','TextToImage'): pytest.importorskip('transformers')
    with torch.no_grad(): given = CALLS[name](load_model(SAVED/'models'/name, 'cpu'))
    for what, tensor in given.items():
        now, then = described(tensor), EXPECTED['models'][name][what]
        assert now['shape']==then['shape'], what
        numbers = [then['mean'], then['std'], *then['first']]
        assert [now['mean'], now['std'], *now['first']]==pytest.approx(numbers, rel=1e-5, abs=2e-6), what

def test_every_folder_is_tested():
    assert {f.name for f in (SAVED/'models').iterdir()}==CALLS.keys()

def resumed(folder, **changed):
    "The run that version 0.1 began, and that was stopped at step 6 of 12, with the model and data of then."
    digits = Digits()
    first = Pictures(digits.image[:32], digits.label[:32], digits.classes)
    autoencoder = load_model(SAVED/'models'/'LatentDiffusion', 'cpu').autoencoder
    latents = LatentDataset(first, autoencoder, cache=None, progress=False)
    conditioner = Conditioner(drop=.2, label=LabelEmbedder(10,8))
    denoiser = Denoiser(UNet(2, (4,8), d_emb=8, head_dim=4, dropout=.1), Cosine(), conditioner)
    settings = dict(steps=12, batch_size=8, lr=1e-2, warmup=4, ema=.9, accumulate=2, save_every=6, log_every=1,
                    seed=5, progress=False) | changed
    loss = partial(diffusion_loss, weight=edm_weight)
    return Learner(denoiser, latents, loss, folder=folder, **settings)

def test_a_run_goes_on_after_its_classes_have_moved(tmp_path):
    "Every loss from step 7 on is that of the run of then; the rows before it are kept."
    shutil.copytree(SAVED/'run', tmp_path/'run')
    log = resumed(tmp_path/'run').fit(resume=True).log
    assert [row['step'] for row in log]==[*range(1,13)]
    assert [row['loss'] for row in log]==pytest.approx(EXPECTED['losses'], rel=1e-6)

def test_other_settings_are_refused_for_an_old_run(tmp_path):
    shutil.copytree(SAVED/'run', tmp_path/'run')
    with pytest.raises(ValueError, match='lr was 0.01, is 0.02; ema was 0.9, is 0.99'):
        resumed(tmp_path/'run', lr=.02, ema=.99).fit(resume=True)
    learn = resumed(tmp_path/'run')
    learn.model = learn.ema_model = UNet(2, (4,), d_emb=8, head_dim=4)
    with pytest.raises(ValueError, match="model was 'Denoiser of 8,442 parameters', is 'UNet of"):
        learn.fit(resume=True)
