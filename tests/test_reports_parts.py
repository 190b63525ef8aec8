"Symptoms of single parts: a distance, a learner, a cache, a score or a control that was quietly not what it said."
import json
import warnings
from contextlib import suppress
from copy import deepcopy
from functools import partial
from pathlib import Path
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from fastldm import load
from fastldm.codes import WordVectors
from fastldm.codes.store import _text_identity
from fastldm.codes.text2image import TextLatents
from fastldm.codes.text_encoder import SPECIAL, cached_text_features
from fastldm.control import BlendedControl, Control, ControlData, control
from fastldm.core import (Callback, FeatureDistance, HeldOutCB, Interrupted, Learner, Module, StopTraining, find_lr,
                          fingerprint, image_grid, noise_of_batch, read_settings, set_seed, write_picture)
from fastldm.core.rows import read_rows, write_rows
from fastldm.core.train import read_checkpoint
from fastldm.data import (Captioned, Digits, DrawnFaces, ImageFolder, Part, SyntheticScenes, get_dataset, write_shards,
                          write_stream)
from fastldm.diffusion import (Autoencoder, LatentDiffusion, add_lora, ddpm_step, inpaint, invert, load_lora,
                               merge_lora, noise_from, remove_lora, sample, sample_generators, save, save_lora)
from fastldm.diffusion.ldm import model_folder
from fastldm.metrics import memorisation, retrieval
from fastldm.recipes.pictures import check_same_weights, settings_of
from fastldm.recipes.score import _about_evaluation
from fastldm.recipes.stages import _batch_size_for, full_path, picture_set
from fastldm.ui.app import _words, form_of

# ---- the learner

class Line(torch.utils.data.Dataset):
    "Points of a line."
    def __len__(self): return 64
    def __getitem__(self, i): return torch.tensor([i/64.]), torch.tensor([2*i/64.+1])

def line_loss(model, batch): return dict(loss=(model(batch[0])-batch[1]).square().mean())

class Counting(torch.optim.Optimizer):
    "A counter in the group of parameters, as some optimisers have."
    def __init__(self, params, lr=.1): super().__init__(params, dict(lr=lr, k=0))
    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group['k'] += 1
            for p in group['params']: p -= group['lr']/group['k']*p.grad

class StopAt(Callback):
    "Ask to stop after a step, as a signal does."
    def __init__(self, step): self.step = step
    def after_step(self, learn): learn.asked_to_stop |= learn.step==self.step

def trained(folder, stop=None, resume=False, **settings):
    "A line, learned in twenty steps."
    set_seed(0)
    settings = dict(steps=20, batch_size=16, lr=.1, warmup=0, schedule='constant', progress=False) | settings
    settings['cbs'] = [*settings.get('cbs', ()), StopAt(stop)]
    return Learner(nn.Linear(1,1), Line(), line_loss, folder=folder, **settings).fit(resume=resume)

def test_an_optimiser_that_counts_in_its_groups_resumes(tmp_path):
    whole = trained(tmp_path/'whole', optimizer=Counting)
    with suppress(Interrupted): trained(tmp_path/'halves', 10, optimizer=Counting)
    halves = trained(tmp_path/'halves', resume=True, optimizer=Counting)
    assert torch.equal(whole.model.weight, halves.model.weight)

def test_a_stop_in_the_last_step_keeps_the_last_weights(tmp_path):
    "The checkpoint got the best weights, beside the optimiser of the last step."
    class Worse(Callback):
        "Put other weights in at the end, as `HeldOutCB` does with the best, where patience ended in this step."
        def after_step(self, learn):
            if learn.step==5: raise StopTraining
        def after_fit(self, learn): learn.model.weight.data.zero_()
    with suppress(Interrupted): trained(tmp_path/'stopped', 5, cbs=[Worse()])
    trained(tmp_path/'free', cbs=[Worse()])
    kept = []
    for name in ('stopped','free'):
        kept.append(read_checkpoint(tmp_path/name/'checkpoint.safetensors')[1]['model']['weight'])
    assert torch.equal(*kept) and kept[0].abs().min()>0

def test_two_measures_of_one_name_are_refused(tmp_path):
    "Each wrote its weights over those of the other."
    def measure(model): return 0.
    cbs = [HeldOutCB(Line(), 10, measure=measure), HeldOutCB(Line(), 10, measure=measure)]
    with pytest.raises(ValueError, match='two HeldOutCBs log'): trained(tmp_path/'m', cbs=cbs)

def test_a_rate_is_found_for_a_negative_loss():
    def lowered(model, batch): return dict(loss=line_loss(model, batch)['loss']-10)
    set_seed(0)
    usual, negative = (find_lr(nn.Linear(1,1), Line(), loss, steps=50, batch_size=16) for loss in (line_loss, lowered))
    assert len(negative.lr)>40 and negative.suggestion==pytest.approx(usual.suggestion, rel=.5)
    def nothing(model, batch): return dict(loss=line_loss(model, batch)['loss']*float('nan'))
    with pytest.raises(FloatingPointError): find_lr(nn.Linear(1,1), Line(), nothing, steps=5, batch_size=16)

def test_noise_does_not_follow_the_memory_order():
    "One process drew by memory, several drew by channels: so a picture that lies channels last got other noise."
    x = torch.zeros(4, 8, 8, 3).movedim(-1, 1)
    drawn = []
    for pictures in (x, x.contiguous()):
        torch.manual_seed(0)
        drawn.append(noise_of_batch(pictures))
    assert torch.equal(*drawn)

def test_a_distance_whose_next_layer_works_in_place():
    set_seed(0)
    conv = nn.Conv2d(3, 4, 3)
    a, b = torch.rand(2, 1, 3, 16, 16)*2-1
    found = [FeatureDistance(nn.Sequential(conv, nn.ReLU(inplace)), layers=['0'])(a, b) for inplace in (False,True)]
    assert torch.equal(*found)
    net = nn.Sequential(conv, nn.BatchNorm2d(4), nn.Flatten(1), nn.Linear(4*14*14, 2)).eval()
    distance = FeatureDistance(net, layers=['1'])
    before = distance(a, b)
    assert torch.equal(distance.train()(a, b), before) and not distance.net.training

# ---- data

def test_a_folder_that_is_called_like_a_set(tmp_path, monkeypatch):
    (tmp_path/'scenes').mkdir()
    Image.new('RGB', (8,8)).save(tmp_path/'scenes'/'0.png')
    monkeypatch.chdir(tmp_path)
    assert isinstance(get_dataset(Path('scenes')), ImageFolder)
    assert full_path(Path('scenes'))==str(tmp_path/'scenes') and full_path('scenes')=='scenes'
    assert isinstance(picture_set(Path('scenes'), size=8), ImageFolder)
    assert isinstance(get_dataset('scenes'), SyntheticScenes)

def test_an_empty_cell_of_pandas_is_no_caption(tmp_path):
    for i in range(3): Image.new('RGB', (8,8), (i,i,i)).save(tmp_path/f'{i}.png')
    rows = [dict(file=f'{i}.png', caption=float('nan') if i==1 else f'thing {i}') for i in range(3)]
    (tmp_path/'captions.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    with pytest.raises(ValueError, match='caption'): Captioned(tmp_path/'captions.jsonl', test=0)

def test_a_picture_with_a_hole_is_still_in_its_range():
    "One nan turned the whole grid dark."
    x = torch.full((1,1,4,4), -.5)
    x[0,0,0,0] = float('nan')
    grid = image_grid(x)
    assert (grid==64).any() and grid.min()==0

def test_faces_that_are_drawn_in_another_way_are_drawn_again(tmp_path, monkeypatch):
    monkeypatch.setenv('FASTLDM_CACHE', str(tmp_path))
    class Plain(DrawnFaces):
        grey = 10
        attributes = ['Smiling']
        mask_classes = ['background']
        def __init__(self): super().__init__('train', 16, 2000, 0, True)
        def sample(self, rng): return [], {}
        def draw(self, on, settings, rng): return np.full((16,16,3), self.grey, np.uint8), np.zeros((16,16), np.uint8)
    dark = Plain().__getitems__([0])['image'].mean()
    assert any(tmp_path.rglob('plain*'))
    monkeypatch.setattr(Plain, 'grey', 240)
    assert Plain().__getitems__([0])['image'].mean()>dark+1

def test_a_stream_does_not_take_the_shards_of_another(tmp_path):
    datasets = pytest.importorskip('datasets')
    def stream(grey):
        images = [Image.new('L', (8,8), grey+i) for i in range(4)]
        return datasets.Dataset.from_dict(dict(image=images), features=datasets.Features(image=datasets.Image()))
    write_shards(Part(Digits(), range(4)), tmp_path/'digits', per_shard=2)
    with pytest.raises(ValueError, match='begin with another picture'):
        write_stream(stream(9), tmp_path/'digits', n=4, per_shard=2, progress=False)
    own = write_stream(stream(9), tmp_path/'own', n=2, per_shard=2, progress=False)
    assert len(write_stream(stream(9), tmp_path/'own', n=4, per_shard=2, progress=False))==len(own)+1
    with pytest.raises(ValueError, match='begin with another picture'):
        write_stream(stream(100), tmp_path/'own', n=4, per_shard=2, progress=False)
    class Unreachable:
        "A stream of the same columns, offline."
        features = stream(9).features
        def cast_column(self, *args): raise ConnectionError('no network')
    assert len(write_stream(Unreachable(), tmp_path/'own', n=4, per_shard=2, progress=False))==len(own)+1

# ---- texts

def test_features_of_an_encoder_with_other_places_are_made_again(tmp_path):
    "The file was known by the weights of the encoder alone."
    vocab = [*SPECIAL, 'a', 'red', 'blue', 'bird', 'ship']
    captions = ['a red bird', 'a blue ship']
    encoders = [WordVectors(vocab, dim=6, n_place=n, max_len=length) for n,length in ((4,4),(8,4),(8,12))]
    shapes = [tuple(cached_text_features(encoder, captions, tmp_path/'texts').shape) for encoder in encoders]
    assert shapes==[(2,5,10),(2,5,14),(2,13,14)]
    class Latents(torch.utils.data.Dataset):
        "Two latents of zeros."
        def __len__(self): return 2
        def __getitems__(self, idxs): return dict(image=torch.zeros(len(idxs), 1))
    kept = [TextLatents(Latents(), captions, encoder, cache=tmp_path/'latents') for encoder in encoders]
    shapes = [tuple(latents.__getitems__([0,1])['text'].shape) for latents in kept]
    assert shapes==[(2,5,10),(2,5,14),(2,13,14)]

def test_a_partial_of_a_text_encoder_is_known_by_its_encoder():
    class Encoder(nn.Module):
        name = 'words'
        def __init__(self, value):
            super().__init__()
            self.w = nn.Parameter(torch.tensor([value]))
        def text_features(self, texts, batch_size=1): return self.w.expand(len(texts), 1, 4)
    marks = [_text_identity(partial(partial(Encoder(value).text_features, batch_size=2))) for value in (1.,2.,2.)]
    assert marks[0]!=marks[1]==marks[2] and marks[0]['name']=='words'

# ---- scores

@pytest.mark.parametrize('weights', [[1,1,5], [1], [1,-1], [1,float('nan')], [float('inf'),1]])
def test_weights_that_are_not_one_for_each_row(weights):
    with pytest.raises(ValueError, match='weights for 2 rows|all 0'): retrieval(torch.eye(2), among=2, weights=weights)

def test_weights_of_rows_still_count():
    wrong = torch.tensor([[1.,0.],[1.,0.]])
    assert retrieval(wrong, among=2, weights=[1,3])['accuracy']==.25

def test_another_thing_is_not_only_what_was_asked_for():
    "A wrong thing in place of the right one was counted as nothing else."
    judge = load('scenes_classifier', 'cpu')
    images = SyntheticScenes(4, split='test').__getitems__(range(4))['image']
    scenes = judge.read(images)
    kinds = [{kind for _,kind,_ in scene.things} for scene in scenes]
    other = next(scene for scene,kind in zip(scenes, kinds) if not kind & kinds[0])
    scores = judge.score(images[:1], [other])
    assert not scores['object'] and not scores['only']
    assert judge.score(images[:1], scenes[:1])['only']

def test_memorisation_of_features_says_so():
    features = torch.randn(24, 8, generator=torch.Generator().manual_seed(0))
    score = memorisation(features[:8], features[8:16], features[16:])
    assert 'pixels' not in repr(score) and 'features' in repr(score)

# ---- controls

@pytest.fixture(scope='module')
def scenes(): return load('scenes', 'cpu')

@pytest.fixture(scope='module')
def adapter(): return load('local_scenes', 'cpu')

@pytest.fixture
def sketch():
    planes = torch.zeros(1, 64, 64)
    planes[:,16:48,16] = planes[:,16:48,47] = planes[:,16,16:48] = planes[:,47,16:48] = 1
    return planes

def test_a_thin_region_is_blended_where_it_is_asked_for(scenes, adapter, sketch):
    thin = torch.zeros(64, 64)
    thin[:,31] = 1
    def draw(constraint): return scenes.sample('a red house', 1, steps=2, seed=0, constraint=constraint)
    plain = scenes.sample('a red house', 1, steps=2, seed=0)
    followed = control(adapter, sketch, thin)
    assert torch.equal(draw(BlendedControl(followed)), plain)               # 'nearest' misses it
    assert (draw(BlendedControl(followed, mode='max'))-plain).abs().max()>.05
    with pytest.raises(ValueError, match='mode'): BlendedControl(followed, mode='most')

@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16])
def test_a_control_of_other_floats(scenes, adapter, sketch, dtype):
    drawn = [scenes.sample('a house', 1, steps=1, seed=0, constraint=control(adapter, planes))
             for planes in (sketch, sketch.to(dtype))]
    assert torch.equal(*drawn)
    with pytest.raises(ValueError, match='expected floats from 0 to 1'): control(adapter, torch.zeros(0, 1, 64, 64))

def test_candidates_with_a_control_or_a_picture_for_each(scenes, adapter, sketch):
    "Two for each of two prompts, each with a sketch of its own; one control for two prompts was refused."
    sketches = torch.stack([sketch, sketch.roll(9, -1)])
    prompts = ['a red house', 'a blue bird']
    both = scenes.sample(prompts, steps=2, seed=0, candidates=2, constraint=control(adapter, sketches))
    assert both.shape==(2,3,64,64)
    blended = BlendedControl(control(adapter, sketches, torch.ones(64, 64)))
    assert scenes.sample(prompts, steps=1, seed=0, candidates=2, constraint=blended).shape==(2,3,64,64)
    repeated = control(adapter, sketches).repeated(2, 3)
    assert torch.equal(repeated.parts[0].picture, sketches.repeat_interleave(3, 0))
    assert len(repeated.parts[0].region)==1
    pictures = inpaint(torch.zeros(2,3,64,64), torch.ones(64,64)).repeated(2, 3)
    assert len(pictures.data[0])==6

def test_an_adapter_is_trained_on_all_classes_of_a_folder():
    "Of fewer pictures than a sorted set has, some are of each class."
    digits = Digits()
    in_order = Part(digits, digits.label.argsort().tolist())
    some = ControlData(in_order, Autoencoder(c_in=1, c_latent=2, channels=(8,)).eval(), ['edges'], ['label'], n=40,
                       progress=False)
    assert len(some)==40 and sorted({*some.latents.fields['label'].tolist()})==[*range(10)]
    few = torch.tensor([0,9,39])
    chosen = torch.tensor([i*len(in_order)//40 for i in few.tolist()])
    assert some.__getitems__(few.tolist())['label'].tolist()==in_order.__getitems__(chosen.tolist())['label'].tolist()

def test_a_picture_names_the_adapter_that_controlled_it(scenes, adapter, sketch):
    "By the fingerprint of its weights, as another of the same name draws another picture."
    options = dict(prompt='a red house', n=1, constraint=control(adapter, sketch[0], torch.ones(64,64)))
    before = settings_of(scenes, 'scenes', options, 'mine')
    assert before['adapter_fingerprint']==fingerprint(adapter)
    other = deepcopy(adapter)
    with torch.no_grad(): next(other.parameters()).add_(1.)
    after = settings_of(scenes, 'scenes', options | dict(constraint=control(other, sketch[0])), 'mine')
    assert after['adapter_fingerprint']!=before['adapter_fingerprint']
    assert 'adapter_fingerprint' not in settings_of(scenes, 'scenes', dict(prompt='a red house', n=1))

def test_a_picture_of_other_settings_of_its_model_is_not_drawn_again(scenes, monkeypatch):
    "The weights are the same, the model's own interval of guidance is not."
    settings = settings_of(scenes, 'scenes', dict(prompt='a red house', n=1))
    check_same_weights(settings, scenes, 'a.png')
    own = deepcopy(scenes.settings)
    own['codes']['temperature'] = .1
    own['diffusion']['guidance_scale'] = 9.                             # which the picture gives itself
    monkeypatch.setattr(scenes, 'settings', own)
    check_same_weights(settings, scenes, 'a.png')
    own['diffusion']['interval'] = [0.,.6]
    with pytest.raises(ValueError, match='drawn by scenes with settings of its own'):
        check_same_weights(settings, scenes, 'a.png')
    del settings['own_settings']                                        # a picture from before they were recorded
    check_same_weights(settings, scenes, 'a.png')

def test_half_characters_are_kept(tmp_path):
    "As a shell passes bytes that are no UTF-8: in the settings of a picture, and in a file of rows."
    prompt = 'apple \udcff'
    write_picture(Image.new('L', (4,4)), tmp_path/'a.png', dict(prompt=prompt, of='Äpfel'))
    assert read_settings(tmp_path/'a.png')==dict(prompt=prompt, of='Äpfel')
    write_rows(tmp_path/'a.safetensors', 2, [dict(caption=[prompt,'Äpfel'])])
    assert [*read_rows(tmp_path/'a.safetensors')['caption']]==[prompt,'Äpfel']

def test_a_word_without_a_known_piece_is_named():
    "Beside words that are known; signs between words are no words."
    encoder = load('emoji').text_encoder
    with pytest.warns(UserWarning, match="'🚒' in '🚒 on the road' cannot be read by this model"):
        encoder.text_features(['a cat', '🚒 on the road'])
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        encoder.text_features(['a woman’s hat', 'a cat, a dog!'])

def test_a_part_of_an_evaluation_is_of_one_student(clothes):
    "Parts of an interrupted evaluation in few calls belong to the student that drew them."
    about = _about_evaluation(clothes, dict(calls=2))['model']
    assert about['student_fingerprint']==fingerprint(clothes.student())
    assert 'student_fingerprint' not in _about_evaluation(clothes, dict(steps=2))['model']

@pytest.mark.parametrize('n, processes, expected', [(50,1,50), (50,4,48), (640,4,64), (3,1,3)])
def test_a_batch_that_the_processes_can_share(n, processes, expected, monkeypatch):
    "Of fewer pictures than a batch has."
    monkeypatch.setenv('WORLD_SIZE', str(processes))
    assert _batch_size_for(range(n), 64)==expected

def test_more_processes_than_pictures(monkeypatch):
    monkeypatch.setenv('WORLD_SIZE', '4')
    with pytest.raises(ValueError, match='3 examples for 4 processes: start fewer'): _batch_size_for(range(3), 64)

def test_adapters_with_and_without_a_middle_add_up():
    "The last map of the longer list was dropped."
    class Fits:
        shape = (4,16,16)
        device = 'cpu'
    class Maps(nn.Module):
        "As many maps as it is told."
        def __init__(self, n):
            super().__init__()
            self.n = n
            self.c_in = 1
        def forward(self, picture): return [torch.full((len(picture),1,4,4), 1.) for _ in range(self.n)]
    def of(n):
        part, = control(Maps(n), torch.zeros(16,16)).parts
        part.check = fits
        return part
    def fits(ldm, n): "Any model."
    both = Control([of(2), of(3)], 'conditional')
    found = both.prepare(Fits(), 1)
    assert [float(f.max()) for f in found]==[2.,2.,1.]

# ---- sampling

@pytest.fixture
def clothes(): return load('fashion', 'cpu')

def test_latents_are_no_pictures(clothes, scenes):
    "They were clamped, transposed, and shown as the last picture of the way."
    for kind in ('np','pil'):
        with pytest.raises(ValueError, match='is for pictures'):
            clothes.sample(1, label=3, latents=True, output_type=kind)
        with pytest.raises(ValueError, match='is for pictures'):
            scenes.sample('', 1, latents=True, output_type=kind, prior='diffusion')
    shown = []
    clothes.sample(1, label=3, steps=2, latents=True, watch=shown.append)
    assert {tuple(x.shape) for x in shown}=={(1,1,28,28)}

def test_what_watches_sees_single_precision(clothes):
    shown = []
    clothes.sample(1, label=3, steps=2, precision='bf16', watch=shown.append)
    assert {x.dtype for x in shown}=={torch.float}

@pytest.mark.parametrize('options, says', [
    (dict(times=[1.]), 'expected two or more'), (dict(latents=torch.full((2,8,7,7), torch.nan)), 'not finite'),
    (dict(latents=torch.zeros(2,8,7,7), constraint=invert(torch.zeros(1,28,28)-1)), 'and so is Inversion')])
def test_a_start_that_makes_no_sense(clothes, options, says):
    with pytest.raises(ValueError, match=says): clothes.sample(2, **options)

def test_noise_of_a_context_around_the_sampler(clothes):
    "It was switched off, and the global generator was used."
    def drawn():
        with noise_from(sample_generators(0, 2)):
            return sample(clothes.denoiser, torch.zeros(2,8,7,7), torch.tensor([1.,.5,0.]), ddpm_step)
    assert torch.equal(drawn(), drawn())

def test_an_attribute_by_its_name_and_in_a_dict():
    with pytest.raises(ValueError, match='Smiling is given twice'):
        load('avatars', 'cpu').sample(1, steps=1, attrs=dict(Smiling=True), Smiling=False)

def test_a_sampler_that_cannot_be_loaded_is_not_saved(clothes, tmp_path):
    clothes.times = [1., .5, 0.]
    with pytest.raises(ValueError, match='times'): save(clothes, tmp_path/'m')
    assert not (tmp_path/'m'/'config.json').exists()

def test_codes_of_the_page_keep_their_own_scale():
    "A picture by codes that named no scale was restored with that of the diffusion prior."
    form = form_of(dict(config=json.loads((Path(model_folder('scenes'))/'config.json').read_text())['config']))
    drawn = dict(model='scenes', n=1, seed=0, prior='codes', conditions=dict(text='a ship'))
    assert _words(drawn, form)['guidance_scale']==form['codes_guidance_scale']

# ---- a student of other weights, and low rank

def test_a_student_of_weights_that_were_changed_since(clothes, tmp_path):
    "In few calls the old student drew on; saving broke the folder, or wrote half of it."
    clothes.sample(1, label=3, calls=1, seed=0)
    network = clothes.denoiser
    before = deepcopy(clothes)
    assert torch.equal(before.sample(1, label=3, calls=1, seed=0), clothes.sample(1, label=3, calls=1, seed=0))
    with torch.no_grad(): next(network.parameters()).mul_(1.5)
    with pytest.raises(ValueError, match='was trained for weights'): clothes.sample(1, label=3, calls=1)
    save(before, tmp_path/'m')
    assert load(tmp_path/'m').has_student
    with pytest.warns(UserWarning, match='the student is left out'): save(clothes, tmp_path/'m')
    assert not load(tmp_path/'m').has_student
    before.sample(1, label=3, calls=1)

def test_a_student_of_rounded_weights_that_were_changed(clothes, tmp_path):
    "In 16 bit the fingerprint is another one anyway, so it cannot tell."
    clothes.bfloat16().sample(1, label=3, calls=1)
    save(clothes, tmp_path/'m')
    assert load(tmp_path/'m').has_student
    with torch.no_grad():
        for p in clothes.denoiser.parameters(): p.mul_(1.5)
    with pytest.raises(ValueError, match='was trained since'): clothes.sample(1, label=3, calls=1)
    with pytest.warns(UserWarning, match='left out'): save(clothes, tmp_path/'m')
    assert not load(tmp_path/'m').has_student

def test_few_calls_in_inference_mode():
    with torch.inference_mode(): drawn = load('fashion', 'cpu').sample(1, label=3, calls=1, seed=0)
    assert torch.equal(drawn, load('fashion', 'cpu').sample(1, label=3, calls=1, seed=0))

def test_a_callback_that_samples_does_not_change_the_pictures(clothes):
    inner = []
    def also(x, t, s): inner.append(sample(clothes.denoiser, torch.zeros(3,8,7,7), torch.tensor([1.,.5,0.]), ddpm_step))
    how = dict(label=3, steps=3, step='ddpm_step', seed=0)
    assert torch.equal(clothes.sample(2, **how, callback=also), clothes.sample(2, **how)) and len(inner)==3

def test_other_parametrisations_are_saved(tmp_path):
    "Weight norm is no LoRA."
    save(Normed(), tmp_path/'m')
    assert torch.equal(load(tmp_path/'m').layer.weight, load(tmp_path/'m').layer.weight)

class Normed(Module):
    "A layer whose weight is normalised."
    def __init__(self):
        super().__init__()
        self.layer = nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))

def test_a_model_with_a_lora_is_not_saved(clothes, tmp_path):
    clothes.sample(1, label=3, calls=1)
    add_lora(clothes.denoiser, 2)
    with pytest.raises(ValueError, match='merge_lora'): save(clothes, tmp_path/'m')
    with pytest.raises(ValueError): clothes.sample(1, label=3, calls=1)
    merge_lora(clothes.denoiser)
    save(clothes, tmp_path/'m')
    assert load(tmp_path/'m').has_student                               # nothing was trained

def test_whole_layers_beside_a_low_rank(clothes, tmp_path):
    "Names were looked for while they were those of adapted layers; and a text was read letter by letter."
    network = clothes.denoiser
    other = deepcopy(network)
    add_lora(network, 2)
    with torch.no_grad():
        for name,p in network.named_parameters():
            if name.endswith('.B') or name.startswith('net.head'): p.add_(.05*torch.randn_like(p))
    files = []
    for whole in ('net.head',['net.head']):
        files.append(save_lora(network, tmp_path/f'{len(files)}.safetensors', whole=whole))
    assert files[0].read_bytes()==files[1].read_bytes()
    with pytest.raises(ValueError, match='no weight .* begins so'):
        save_lora(network, tmp_path/'x.safetensors', whole='net.haed')
    original = {name: tensor.clone() for name,tensor in other.state_dict().items()}
    load_lora(other, files[0])
    x = torch.randn(2, 8, 7, 7)
    t = torch.tensor([.3,.8])
    assert (other(x, t)-network(x, t)).abs().max()<.01
    ldm = LatentDiffusion(clothes.autoencoder, other, clothes.shape)
    remove_lora(ldm)                                                    # the record is the network's, a level below
    assert all(torch.equal(tensor, original[name]) for name,tensor in other.state_dict().items())

def test_low_ranks_on_two_levels_are_undone_from_the_last():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    add_lora(model, 1, 'outer')
    add_lora(model[0], 1, 'inner')
    remove_lora(model)
    assert all(p.requires_grad for p in model.parameters())

def test_to_remove_no_lora_freezes_nothing():
    network = nn.Linear(2, 2)
    assert all(p.requires_grad for p in remove_lora(network).parameters())
    add_lora(network, 1)
    merge_lora(nn.Sequential(network))
    assert all(p.requires_grad for p in network.parameters()) and '_before_lora' not in network.__dict__
