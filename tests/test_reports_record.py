"What is saved is the model as it is now: parts that were replaced, and settings that were set, after it was built."
import pytest, torch
from fastldm import load
from fastldm.codes import TextToImage
from fastldm.diffusion import Denoiser, Flow, save

@pytest.fixture
def clothes(): return load('fashion', 'cpu')

def saved_and_loaded(model, folder): return load(save(model, folder), 'cpu')
def two_dresses(ldm): return ldm.sample(2, label=3, seed=0, steps=3)

def replace_the_denoiser(ldm):
    old = ldm.denoiser
    ldm.denoiser = Denoiser(old.net, Flow(), old.conditioner, 'eps').eval()

def set_the_schedule(ldm): ldm.denoiser.schedule = Flow()
def set_the_prediction(ldm): ldm.denoiser.predict = 'x0'

@pytest.mark.parametrize('change', [replace_the_denoiser, set_the_schedule, set_the_prediction])
def test_a_changed_model_comes_back_changed(tmp_path, clothes, change):
    "The same pictures as before it was saved, and others than those of the model that was changed."
    before = two_dresses(clothes)
    change(clothes)
    clothes.student_folder = None
    changed = two_dresses(clothes)
    assert not torch.equal(before, changed)
    assert torch.equal(two_dresses(saved_and_loaded(clothes, tmp_path/'m')), changed)

def test_an_unchanged_model_keeps_its_record(clothes):
    "Saved once more, it has the record that it came with."
    assert load('fashion', 'cpu').config()==clothes.config()

def test_the_sampler_that_was_set(tmp_path, clothes):
    "By name, whether a name was given or a function."
    from fastldm.diffusion import ddim_step
    clothes.step = ddim_step
    clothes.steps = 7
    record = saved_and_loaded(clothes, tmp_path/'m').config()['kwargs']
    assert (record['step'], record['steps'])==('ddim_step', 7)

def test_settings_of_a_prior_and_of_an_adapter(tmp_path):
    "What was set after the model was loaded comes back."
    scenes = load('scenes', 'cpu')
    scenes.settings['diffusion']['guidance_scale'] = 7.
    assert saved_and_loaded(scenes, tmp_path/'scenes').settings['diffusion']['guidance_scale']==7.
    adapter = load('local_scenes', 'cpu')
    adapter.interval = (0.,1.)
    assert tuple(saved_and_loaded(adapter, tmp_path/'adapter').interval)==(0.,1.)

def test_a_model_with_one_prior_is_saved(tmp_path):
    "Its other prior, a property that raises where there is none, is not asked for."
    scenes = load('scenes', 'cpu')
    alone = TextToImage(scenes.text_encoder, scenes.vqvae, list(scenes.priors), codes=scenes.settings['codes'])
    assert alone.config()['kwargs']['denoiser'] is None
    assert saved_and_loaded(alone, tmp_path/'codes').kinds==['codes']
