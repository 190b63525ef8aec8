"Stable Diffusion: SDXL, ControlNet, schedulers, precision, training and bad input, on tiny random pipelines."
import json
from contextlib import nullcontext
from copy import copy, deepcopy
import pytest, torch
from fastldm.control import ControlAdapter, StableAdapter, StableVAE, Tabulated, control, control_loss, feature_shapes
from fastldm.control import from_diffusers, local_features, scheduler_times, to_diffusers
from fastldm.core import set_seed
from fastldm.diffusion import Denoiser, DPMSolver2M, UniPC, ddim_step, euler_step, heun_step, sample_generators
diffusers = pytest.importorskip('diffusers')
transformers = pytest.importorskip('transformers')

pytestmark = pytest.mark.slow
BETAS = dict(beta_start=.00085, beta_end=.012, beta_schedule='scaled_linear')

@pytest.fixture(scope='module', autouse=True)
def one_thread():
    "So little to compute that threads would wait for each other."
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)


# ---- tiny pipelines

@pytest.fixture(scope='module')
def tokenizer(tmp_path_factory):
    d = tmp_path_factory.mktemp('tokenizer')
    letters = 'abcdefghijklmnopqrstuvwxyz'
    words = [*letters, *(c+'</w>' for c in letters), '<|startoftext|>', '<|endoftext|>']
    (d/'vocab.json').write_text(json.dumps({w: i for i,w in enumerate(words)}))
    (d/'merges.txt').write_text('#version: 0.2\n')
    return transformers.CLIPTokenizer(str(d/'vocab.json'), str(d/'merges.txt'), model_max_length=16)

def text_encoder(cls='CLIPTextModel'):
    config = transformers.CLIPTextConfig(
        vocab_size=54, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=16, projection_dim=24, bos_token_id=52, eos_token_id=53)
    return getattr(transformers, cls)(config)

def vae(**options):
    return diffusers.AutoencoderKL(
        block_out_channels=(8,8,8), norm_num_groups=4, scaling_factor=.3,
        down_block_types=('DownEncoderBlock2D',)*3, up_block_types=('UpDecoderBlock2D',)*3, **options)

def ddim(**options):
    defaults = dict(BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    return diffusers.DDIMScheduler(**(defaults|options))

def pipeline(cls, **parts):
    "A pipeline without bar or checker."
    if 'XL' not in cls: parts |= dict(safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    pipe = getattr(diffusers, cls)(**parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe

CROSS_DOWN, CROSS_UP = 'CrossAttnDownBlock2D', 'CrossAttnUpBlock2D'
SMALL = dict(block_out_channels=(16,32,32), layers_per_block=1, norm_num_groups=8, attention_head_dim=4, sample_size=16)

def sd(tokenizer, cls='StableDiffusionPipeline', scheduler=None, in_channels=4, **more):
    "The layout of 1.x: three levels, the last without cross-attention."
    set_seed(0)
    unet = diffusers.UNet2DConditionModel(
        in_channels=in_channels, cross_attention_dim=32, down_block_types=(CROSS_DOWN, CROSS_DOWN, 'DownBlock2D'),
        up_block_types=('UpBlock2D', CROSS_UP, CROSS_UP), **SMALL)
    return pipeline(cls, unet=unet, vae=vae(), text_encoder=text_encoder(), tokenizer=tokenizer,
                    scheduler=scheduler or ddim(), **more)

def sdxl(tokenizer, cls='StableDiffusionXLPipeline', scheduler=None, **more):
    "The layout of SDXL: the first level without cross-attention, two text encoders, conditioned on sizes."
    set_seed(0)
    unet = diffusers.UNet2DConditionModel(
        cross_attention_dim=64, transformer_layers_per_block=(1,1,1), use_linear_projection=True,
        addition_embed_type='text_time', addition_time_embed_dim=8, projection_class_embeddings_input_dim=6*8+24,
        down_block_types=('DownBlock2D', CROSS_DOWN, CROSS_DOWN),
        up_block_types=(CROSS_UP, CROSS_UP, 'UpBlock2D'), **SMALL)
    return pipeline(cls, unet=unet, vae=vae(force_upcast=True), tokenizer=tokenizer, tokenizer_2=tokenizer,
                    text_encoder=text_encoder(), text_encoder_2=text_encoder('CLIPTextModelWithProjection'),
                    scheduler=scheduler or ddim(), **more)

def adapter(seed=1, channels=(16,32,32), downscale_factor=4, **options):
    set_seed(seed)
    net = diffusers.T2IAdapter(in_channels=1, channels=[*channels], num_res_blocks=1, downscale_factor=downscale_factor,
                               **options)
    return net.eval()

def xl_adapter(): return adapter(channels=(16,32,32,32), downscale_factor=8, adapter_type='full_adapter_xl')

def controlnet(pipe, seed=1):
    "A ControlNet whose zero convolutions are not zero, for controls of four times the side of the latent."
    set_seed(seed)
    net = diffusers.ControlNetModel.from_unet(pipe.unet, conditioning_channels=1)
    embedding = type(net.controlnet_cond_embedding)
    net.controlnet_cond_embedding = embedding(16, conditioning_channels=1, block_out_channels=(8,8,8))
    convolutions = (*net.controlnet_down_blocks, net.controlnet_mid_block, net.controlnet_cond_embedding.conv_out)
    for conv in convolutions: torch.nn.init.normal_(conv.weight, std=.1)
    return net.eval()


# ---- the same call of both

EDGES = (torch.rand(1,1,64,64, generator=torch.Generator().manual_seed(0))<.1).float()
LEFT = torch.zeros(1, 1, 64, 64)
LEFT[...,:32] = 1
NOISE = torch.randn(1,4,16,16, generator=torch.Generator().manual_seed(0))

def drawn(pipe, region=None, n=1, branch='both', **options):
    "Latents of a pipeline, local where a region is given."
    defaults = dict(prompt=['a cat']*n, num_inference_steps=3, guidance_scale=5., latents=NOISE.repeat(n,1,1,1),
                    output_type='latent')
    is_local = region is not None
    with local_features(pipe, region, branch=branch) if is_local else nullcontext():
        return pipe(**(defaults|options)).images

def ours(ldm, n=4, **options):
    "Latents of this library, by DDIM at the steps of the pipeline's scheduler."
    defaults = dict(prompt='a cat', guidance_scale=5., steps=n, step=ddim_step, seed=0, latents=True,
                    times=scheduler_times(ldm.scheduler))
    return ldm.sample(1, **(defaults|options))

def start(ldm, n=4):
    "The noise that `ours` starts from."
    first = scheduler_times(ldm.scheduler)(None, n)[:1]
    generator, = sample_generators(0, 1)
    return ldm.denoiser.schedule(first)[1].float()*torch.randn(1, *ldm.shape, generator=generator)

def difference(a, b):
    "The largest difference, over the standard deviation."
    return ((a-b).abs().max()/b.std()).item()

def tokens_of(ldm, prompt, n): return ldm.denoiser.conditioner.embedders['prompt'].parse(prompt, n)

def n_hooks(*modules): return sum(len(m._forward_hooks)+len(m._forward_pre_hooks) for m in modules)


# ---- the same pictures as diffusers

SCHEDULERS = [dict(set_alpha_to_one=True), dict(prediction_type='sample'), dict(beta_schedule='squaredcos_cap_v2'),
              dict(rescale_betas_zero_snr=True, timestep_spacing='trailing', prediction_type='v_prediction')]

@pytest.mark.parametrize('options', SCHEDULERS, ids=lambda d: next(iter(d)))
def test_ddim_is_theirs(tokenizer, options):
    pipe = sd(tokenizer, scheduler=ddim(**options))
    ldm = from_diffusers(pipe)
    theirs = drawn(pipe, num_inference_steps=4, latents=start(ldm))
    d = difference(ours(ldm), theirs)
    print(f'differs by {d:.1e}')
    assert d<(2e-3 if 'rescale_betas_zero_snr' in options else 1e-4)

@pytest.mark.parametrize('negative', [None,'a dog'])
def test_sdxl_is_theirs(tokenizer, negative):
    pipe = sdxl(tokenizer)
    ldm = from_diffusers(pipe, negative=negative)
    theirs = drawn(pipe, num_inference_steps=4, latents=start(ldm), negative_prompt=negative and [negative])
    d = difference(ours(ldm), theirs)
    print(f'differs by {d:.1e}')
    assert d<1e-4
    assert difference(ours(ldm, prompt='a dog'), theirs)>1e-3

@pytest.mark.parametrize('layout', [sd,sdxl])
def test_a_negative_prompt_of_a_call_is_theirs(tokenizer, layout):
    "`negative=dict(prompt=...)` is their `negative_prompt`, in one model for any of them."
    pipe = layout(tokenizer)
    ldm = from_diffusers(pipe)
    theirs = drawn(pipe, num_inference_steps=4, latents=start(ldm), negative_prompt=['a dog'])
    assert difference(ours(ldm, negative=dict(prompt='a dog')), theirs)<1e-4
    assert difference(ours(ldm), theirs)>1e-3
    hint = r'did you mean negative=dict\(prompt=...\)'
    with pytest.raises(ValueError, match=hint): ours(ldm, negative_prompt='a dog')

def test_negative_and_size(tokenizer):
    pipe = sd(tokenizer)
    ldm = from_diffusers(pipe, size=(48,64), negative='a dog')
    assert ldm.shape==(4,12,16)
    size = dict(height=48, width=64)
    theirs = drawn(pipe, num_inference_steps=4, latents=start(ldm), negative_prompt=['a dog'], **size)
    assert difference(ours(ldm), theirs)<1e-4
    assert ldm.sample(1, prompt='a cat', steps=2).shape==(1,3,48,64)

def test_pndm_times(tokenizer):
    "A scheduler that visits a step twice gives a grid that falls."
    times = scheduler_times(diffusers.PNDMScheduler(**BETAS, skip_prk_steps=True, steps_offset=1))(None, 10)
    assert (times.diff()<0).all() and times[-1]==1/1000

def test_dpm_solver_is_theirs(tokenizer):
    scheduler = diffusers.DPMSolverMultistepScheduler(
        **BETAS, steps_offset=1, solver_order=2, algorithm_type='dpmsolver++', solver_type='midpoint',
        final_sigmas_type='zero')
    pipe = sd(tokenizer, scheduler=scheduler)
    ldm = from_diffusers(pipe)
    theirs = drawn(pipe, num_inference_steps=6, latents=start(ldm, 6))
    d = difference(ours(ldm, 6, step='DPMSolver2M'), theirs)
    print(f'differs by {d:.1e}')
    assert d<1e-3


# ---- schedulers that were swapped by `from_config`

SOURCES = {
    'SD 1.x': lambda: ddim(),
    'PNDM': lambda: diffusers.PNDMScheduler(**BETAS, skip_prk_steps=True, steps_offset=1),
    'ends at 0': lambda: ddim(set_alpha_to_one=True),
    'trailing': lambda: ddim(timestep_spacing='trailing'),
    'no offset': lambda: ddim(steps_offset=0),
    'Euler': lambda: diffusers.EulerDiscreteScheduler(**BETAS),
    'Euler to sigma_min': lambda: diffusers.EulerDiscreteScheduler(**BETAS, final_sigmas_type='sigma_min'),
    'DPM': lambda: diffusers.DPMSolverMultistepScheduler(**BETAS),
    'DPM to sigma_min': lambda: diffusers.DPMSolverMultistepScheduler(**BETAS, final_sigmas_type='sigma_min'),
    'UniPC to sigma_min': lambda: diffusers.UniPCMultistepScheduler(**BETAS, final_sigmas_type='sigma_min'),
    'DEIS': lambda: diffusers.DEISMultistepScheduler(**BETAS),
    'Heun': lambda: diffusers.HeunDiscreteScheduler(**BETAS),
}
SOLVERS = dict(DDIM=ddim_step, EulerDiscrete=euler_step, HeunDiscrete=heun_step, DPMSolverMultistep='DPMSolver2M',
               UniPCMultistep='UniPC')

class SmallNetwork(torch.nn.Module):
    "Noise, predicted by a smooth function of sample and step, in next to no time."
    def __init__(self):
        super().__init__()
        set_seed(0)
        self.conv = torch.nn.Conv2d(4, 4, 3, padding=1)

    def at_step(self, x, step): return x*.5 + (self.conv(x) + step.view(-1,1,1,1)/300).tanh()
    def forward(self, x, t): return self.at_step(x, t.float()*1000-1)

def their_run(scheduler, net, x):
    "What a scheduler of diffusers makes of noise of variance 1 at its first step."
    for t in scheduler.timesteps:
        predicted = net.at_step(scheduler.scale_model_input(x, t), t.float()[None])
        x = scheduler.step(predicted, t, x).prev_sample
    return x

def our_run(scheduler, net, x, n, step):
    "The same by this library, from a latent in its own units to one in its own units."
    schedule = Tabulated(scheduler.alphas_cumprod)
    denoiser = Denoiser(net, schedule, predict='eps', scale_input=False).eval()
    if isinstance(step, str): step = UniPC(2) if step=='UniPC' else DPMSolver2M()
    times = scheduler_times(scheduler)(schedule, n)
    for t,s in zip(times, times[1:]): x = step(denoiser, x, t, s)
    return x, schedule(times[[0,-1]])[0].float()

@torch.no_grad()
@pytest.mark.parametrize('n', [8,20])
@pytest.mark.parametrize('target', SOLVERS)
@pytest.mark.parametrize('source', SOURCES)
def test_swapped_schedulers_end_where_they_end(source, target, n):
    "A whole run is that of diffusers, whatever options of the scheduler before are left in the config."
    config = SOURCES[source]().config
    options = dict(clip_sample=False)
    if 'sigma_min' in source: options['lower_order_final'] = False          # or a short run ends by Euler's method
    scheduler = getattr(diffusers, f'{target}Scheduler').from_config(config, **options)
    if target=='DDIM' and scheduler.config.timestep_spacing=='linspace':
        pytest.skip("diffusers' DDIM steps to a time that it does not visit next")
    scheduler.set_timesteps(n)
    net = SmallNetwork()
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    found, (first, last) = our_run(scheduler, net, noise, n, SOLVERS[target])
    in_units_of_alpha = target in ('EulerDiscrete','HeunDiscrete')
    if in_units_of_alpha: noise, found = noise/first, found/last
    assert difference(found, their_run(scheduler, net, noise))<2e-4

OTHER_ENDS = dict(DEISMultistep=1/1000, LMSDiscrete=0., EulerAncestralDiscrete=0., DPMSolverSinglestep=0., DDPM=0.,
                  KDPM2Discrete=0., PNDM=1/1000, LCM=1/1000, DDIMParallel=1/1000)

@pytest.mark.parametrize('target', OTHER_ENDS)
def test_ends_of_the_other_schedulers(target):
    "From a config with set_alpha_to_one=False, which counts for those that know it only."
    scheduler = getattr(diffusers, f'{target}Scheduler').from_config(ddim().config)
    times = scheduler_times(scheduler)(None, 6)
    assert times[-1]==OTHER_ENDS[target] and (times.diff()<0).all()


# ---- local features in their pipelines

def test_sdxl_adapter(tokenizer):
    "The whole picture is the pipeline as it is, an empty region the base model; and the library gives the same."
    pipe = sdxl(tokenizer, 'StableDiffusionXLAdapterPipeline', adapter=xl_adapter())
    base = sdxl(tokenizer)
    size = dict(height=64, width=64)
    ask = dict(image=EDGES, **size)
    shapes, _ = feature_shapes(pipe.unet, 16, 16)
    assert shapes==[(16,8,8),(32,8,8),(32,4,4),(32,4,4)]
    assert [tuple(f.shape[1:]) for f in pipe.adapter(EDGES)]==shapes
    plain = drawn(pipe, **ask)
    free = drawn(base, **size)
    assert torch.equal(drawn(pipe, LEFT*0+1, **ask), plain) and torch.equal(drawn(pipe, LEFT*0, **ask), free)
    some = drawn(pipe, LEFT, **ask)
    assert difference(some, plain)>1e-3 and difference(some, free)>1e-3
    assert torch.equal(drawn(pipe, **ask), plain)
    ldm = from_diffusers(pipe)
    in_left = control(StableAdapter(pipe.adapter), EDGES, LEFT, branch='both', mask_control=False)
    d = difference(ours(ldm, 3, constraint=in_left), drawn(pipe, LEFT, latents=start(ldm, 3), **ask))
    print(f'differs by {d:.1e}')
    assert d<1e-4
    assert torch.equal(ours(ldm, 3, constraint=control(StableAdapter(pipe.adapter), EDGES, LEFT*0)), ours(ldm, 3))

@pytest.mark.parametrize('scale', [1.,5.])
def test_controlnet(tokenizer, scale):
    "Skips and middle are masked, with and without guidance."
    base = sd(tokenizer)
    net = controlnet(base)
    pipe = sd(tokenizer, 'StableDiffusionControlNetPipeline', controlnet=net)
    ask = dict(image=EDGES, guidance_scale=scale)
    plain = drawn(pipe, **ask)
    free = drawn(base, guidance_scale=scale)
    assert torch.equal(drawn(pipe, LEFT*0+1, **ask), plain) and torch.equal(drawn(pipe, LEFT*0, **ask), free)
    assert difference(drawn(pipe, LEFT, **ask), plain)>1e-3
    with local_features(pipe, LEFT), torch.no_grad():
        skips, middle = net(NOISE, 1, torch.zeros(1,16,32), controlnet_cond=EDGES, return_dict=False)
    for f in (*skips, middle):
        half = f.shape[3]//2
        assert f[...,half:].abs().max()==0 and f[...,:half].abs().max()>0
    assert not n_hooks(net, pipe.unet)

def test_controlnet_rows_and_branches(tokenizer):
    "A region for each of two pictures, repeated for guidance; two nets with a region each; each branch alone."
    base = sd(tokenizer)
    nets = [controlnet(base, 1), controlnet(base, 2)]
    pipe = sd(tokenizer, 'StableDiffusionControlNetPipeline', controlnet=nets[0])
    each = drawn(pipe, torch.cat([LEFT,1-LEFT]), n=2, image=EDGES.repeat(2,1,1,1))
    for i,region in enumerate((LEFT,1-LEFT)): assert difference(each[i:i+1], drawn(pipe, region, image=EDGES))<1e-4
    by_branch = {b: drawn(pipe, LEFT, branch=b, image=EDGES) for b in ('both','conditional','unconditional')}
    assert difference(by_branch['both'], by_branch['conditional'])>1e-3
    assert difference(by_branch['conditional'], by_branch['unconditional'])>1e-3
    # without guidance there is only the conditional branch
    unguided = drawn(pipe, LEFT, branch='unconditional', image=EDGES, guidance_scale=1.)
    assert torch.equal(unguided, drawn(base, guidance_scale=1.))
    has_multi = hasattr(diffusers.models, 'MultiControlNetModel')
    several = diffusers.models.MultiControlNetModel(nets) if has_multi else nets
    both = sd(tokenizer, 'StableDiffusionControlNetPipeline', controlnet=several)
    assert difference(drawn(both, [LEFT,LEFT*0], image=[EDGES,EDGES]), drawn(pipe, LEFT, image=EDGES))<1e-4

def test_regions_of_several_controls(tokenizer):
    pipe = sd(tokenizer, 'StableDiffusionAdapterPipeline', adapter=adapter())
    each = drawn(pipe, torch.cat([LEFT,1-LEFT]), n=2, image=EDGES.repeat(2,1,1,1))
    for i,region in enumerate((LEFT,1-LEFT)): assert difference(each[i:i+1], drawn(pipe, region, image=EDGES))<1e-4

def test_hooks_are_gone_after_an_error(tokenizer):
    pipe = sd(tokenizer, 'StableDiffusionAdapterPipeline', adapter=adapter())
    with pytest.raises(ZeroDivisionError), local_features(pipe, LEFT): 1/0
    with pytest.raises(ValueError, match='the control'), local_features(pipe, LEFT):
        pipe('a cat', image=EDGES[...,:32], latents=NOISE)
    assert not n_hooks(pipe.unet, pipe.adapter)


# ---- adapters

def test_light_adapter_and_ours(tokenizer):
    "A light one of diffusers, and an adapter of this library, which starts at zero and changes nothing."
    ldm = from_diffusers(sd(tokenizer))
    light = StableAdapter(adapter(channels=(16,32), adapter_type='light_adapter'))
    assert light.widths==[16,32,32] and difference(ours(ldm, constraint=control(light, EDGES)), ours(ldm))>1e-4
    untrained = ControlAdapter(['edges'], 1, (16,32,32), factor=4)
    assert torch.equal(ours(ldm, constraint=control(untrained, EDGES, LEFT)), ours(ldm))

def test_gradient_reaches_the_adapter_only(tokenizer):
    for make,net in ((sd, adapter()), (sdxl, xl_adapter())):
        ldm = from_diffusers(make(tokenizer))
        net = StableAdapter(net)
        batch = dict(latent=torch.randn(2,4,16,16), control=EDGES.repeat(2,1,1,1), region=LEFT.repeat(2,1,1,1),
                     prompt=tokens_of(ldm, ['a cat','a dog'], 2))
        control_loss(ldm.denoiser)(net, batch)['loss'].backward()
        gradients = [p.grad for p in net.parameters()]
        assert all(g is not None and g.isfinite().all() for g in gradients)
        assert all(p.grad is None for p in ldm.parameters())
        assert sum(g.abs().sum() for g in gradients)>0

def test_empty_region_teaches_nothing(tokenizer):
    ldm = from_diffusers(sd(tokenizer))
    net = StableAdapter(adapter())
    batch = dict(latent=torch.randn(1,4,16,16), control=EDGES, region=LEFT*0, prompt=tokens_of(ldm, 'a cat', 1))
    out = control_loss(ldm.denoiser, by_area=True)(net, batch)
    out['loss'].backward()
    assert out['edges']==0 and all(p.grad.abs().max()==0 for p in net.parameters())


# ---- precision

@pytest.mark.parametrize('dtype', [torch.float16,torch.bfloat16])
def test_half_precision(tokenizer, dtype):
    "Near t=1 the clean latent is finite and in 32 bit; SDXL's autoencoder is copied to 32 bit."
    pipe = sdxl(tokenizer).to(dtype)
    ldm = from_diffusers(pipe)
    cond = ldm.denoiser.conditioner(ldm.denoiser.conditioner.parse(1, prompt='a cat'))
    for t in (.98,.999,1.):
        with torch.no_grad(): x0 = ldm.denoiser(100*NOISE, torch.tensor(t), cond)
        assert x0.dtype==torch.float32 and x0.isfinite().all()
    assert pipe.vae.dtype==dtype and ldm.autoencoder.vae.dtype==torch.float32
    in_left = control(StableAdapter(xl_adapter().to(dtype)), EDGES, LEFT)
    assert ldm.sample(1, prompt='a cat', guidance_scale=5., steps=2, constraint=in_left).isfinite().all()
    loss = control_loss(ldm.denoiser, sample_t=lambda schedule, n, device: torch.ones(n))
    batch = dict(latent=NOISE, control=EDGES, region=LEFT, prompt=tokens_of(ldm, 'a cat', 1))
    assert all(v.isfinite() for v in loss(StableAdapter(xl_adapter()), batch).values())

def test_zero_terminal_snr():
    "A table that ends in nothing gives finite scales, which fall and rise."
    α, σ = Tabulated(torch.linspace(.999, 0, 100))(torch.tensor([1e-6,.005,.01,.5,1.]).double())
    assert (α.diff()<0).all() and (σ.diff()>0).all() and abs(α[-1]-2**-12)<1e-9
    assert torch.allclose(α**2+σ**2, torch.ones(5).double())

def test_shifted_autoencoder():
    stage = StableVAE(vae(shift_factor=.2).eval())
    x = torch.zeros(1, 3, 64, 64)
    z = stage.encode(x)
    with torch.no_grad(): mean = stage.vae.encode(x).latent_dist.mean
    assert torch.allclose(z, (mean-.2)*.3, atol=1e-5)


# ---- bad input

def test_no_pipeline(tokenizer, tmp_path):
    index = tmp_path/'model_index.json'
    with pytest.raises(FileNotFoundError, match='not a local folder'): from_diffusers('nobody/nothing')
    with pytest.raises(ValueError, match='no model_index.json'): from_diffusers(tmp_path)
    index.write_text('{"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"]}')
    with pytest.raises(ValueError, match='could not be loaded'): from_diffusers(tmp_path)
    with pytest.raises(ValueError, match='is a file'): from_diffusers(index)
    with pytest.raises(ValueError, match='int is no Stable Diffusion'): from_diffusers(3)

def test_pickled_weights(tokenizer, tmp_path):
    "A folder that has only .bin files is refused with diffusers' words and the way out; then it can be read."
    pipe = sd(tokenizer)
    pipe.save_pretrained(tmp_path, safe_serialization=False)
    # transformers 5 writes safetensors only
    for weights in tmp_path.glob('text_encoder/*.safetensors'): weights.unlink()
    torch.save(pipe.text_encoder.state_dict(), tmp_path/'text_encoder'/'pytorch_model.bin')
    with pytest.raises(ValueError, match='use_safetensors=False. reads its .bin files, which are pickles'):
        from_diffusers(tmp_path)
    ldm = from_diffusers(tmp_path, use_safetensors=False)
    assert torch.equal(ldm.denoiser.net.unet.conv_in.weight, pipe.unet.conv_in.weight)

def test_the_words_of_the_hub(monkeypatch):
    "What the hub says of a name is part of the message."
    def refuse(*args, **options): raise OSError('Could not find the necessary `safetensors` weights in {"a.bin"}')
    monkeypatch.setattr(diffusers.DiffusionPipeline, 'from_pretrained', refuse)
    with pytest.raises(FileNotFoundError, match='necessary `safetensors` weights.*use_safetensors=False'):
        from_diffusers('some/pickles')
    def gated(*args, **options): raise OSError('Access to model some/gated is restricted')
    monkeypatch.setattr(diffusers.DiffusionPipeline, 'from_pretrained', gated)
    with pytest.raises(FileNotFoundError, match=r'OSError: Access to model some/gated is restricted\)$'):
        from_diffusers('some/gated')

def test_a_tokenizer_without_a_limit(tokenizer):
    "A tokenizer that names 1e30 as its limit: the text encoder has one."
    pipe = sd(copy(tokenizer))
    pipe.tokenizer.model_max_length = int(1e30)
    embedder = from_diffusers(pipe).denoiser.conditioner.embedders['prompt']
    assert embedder.length==16 and embedder.parse('a cat', 1).shape==(1,1,16)

@torch.no_grad()
@pytest.mark.parametrize('n', [1,3])
def test_textual_inversion_counts_all_its_vectors(tokenizer, n):
    "A word that stands for several vectors is read as in diffusers, in prompts and in the negative one."
    pipe = sd(deepcopy(tokenizer))
    pipe.load_textual_inversion(torch.randn(n, 32), token='<toy>')
    embedder = from_diffusers(pipe, negative='<toy>').denoiser.conditioner.embedders['prompt']
    wanted, unwanted = pipe.encode_prompt('a <toy> cat', 'cpu', 1, True, negative_prompt='<toy>')
    ids = embedder.parse('a <toy> cat', 1)
    assert torch.allclose(embedder(ids).context, wanted, atol=1e-5)
    assert torch.allclose(embedder(embedder.null(ids)).context, unwanted, atol=1e-5)
    with pytest.raises(ValueError, match='a prompt of 17 tokens'): embedder.parse('<toy> '*5+' a'*(15-5*n), 1)

def test_another_kind(tokenizer):
    with pytest.raises(ValueError, match='9 channels, its latents have 4'): from_diffusers(sd(tokenizer, in_channels=9))
    unet = diffusers.UNet2DModel(block_out_channels=(8,8), norm_num_groups=4, down_block_types=('DownBlock2D',)*2,
                                 up_block_types=('UpBlock2D',)*2)
    ddpm = diffusers.DDPMPipeline(unet, ddim())
    with pytest.raises(ValueError, match='expected a UNet2DConditionModel'): from_diffusers(ddpm)
    pipe = sd(tokenizer)
    pipe.text_encoder = None
    with pytest.raises(ValueError, match='a tokenizer and a text encoder'): from_diffusers(pipe)
    pipe = sd(tokenizer)
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    with pytest.raises(ValueError, match='alphas_cumprod'): from_diffusers(pipe)

def test_adapters_of_another_layout(tokenizer):
    "SDXL's on 1.x has the right widths and the wrong sizes; too few levels; too many."
    ldm = from_diffusers(sd(tokenizer))
    def sample_with(net): return ldm.sample(1, prompt='a', constraint=control(StableAdapter(net), EDGES))
    with pytest.raises(ValueError, match='another layout'): sample_with(xl_adapter())
    for channels in ((16,32), (16,32,32,32,32), (16,16,32)):
        with pytest.raises(ValueError, match='channels for a picture'): sample_with(adapter(channels=channels))
    pipe = sd(tokenizer, 'StableDiffusionAdapterPipeline', adapter=xl_adapter())
    with pytest.raises(ValueError, match='another layout'): drawn(pipe, LEFT, image=EDGES, height=64, width=64)

def test_controlnet_of_another_layout(tokenizer):
    base = sd(tokenizer)
    base.unet = diffusers.UNet2DConditionModel(
        cross_attention_dim=32, down_block_types=(CROSS_DOWN,'DownBlock2D'), up_block_types=('UpBlock2D',CROSS_UP),
        **(SMALL|dict(block_out_channels=(16,32))))
    pipe = sd(tokenizer, 'StableDiffusionControlNetPipeline', controlnet=controlnet(base))
    with pytest.raises(ValueError, match='another layout'): drawn(pipe, LEFT, image=EDGES)

def test_old_diffusers(tokenizer, monkeypatch):
    pipe = sd(tokenizer)
    monkeypatch.setattr(pipe.unet, 'forward', lambda sample, timestep: None)
    with pytest.raises(ImportError, match='pip install'): from_diffusers(pipe)

def test_without_diffusers(monkeypatch):
    monkeypatch.setitem(__import__('sys').modules, 'diffusers', None)
    with pytest.raises(ImportError, match='pip install .fastldm.stable.'): from_diffusers('some/model')

@pytest.mark.parametrize('region,says', [
    (LEFT*255, '0 to 255'),
    (LEFT[...,:62], 'multiples of 4'),
    (LEFT[...,:32], r'the region is \(64, 32\), the control \(64, 64\)'),
    (LEFT.repeat(3,1,1,1), '3 regions'),
    (LEFT*float('nan'), 'expected floats'),
])
def test_bad_regions(tokenizer, region, says):
    pipe = sd(tokenizer, 'StableDiffusionAdapterPipeline', adapter=adapter())
    with pytest.raises(ValueError, match=says): drawn(pipe, region, image=EDGES)
    ldm = from_diffusers(pipe)
    with pytest.raises(ValueError):
        ldm.sample(2, prompt='a', constraint=control(StableAdapter(pipe.adapter), EDGES, region))

def test_bad_prompts(tokenizer):
    ldm = from_diffusers(sd(tokenizer))
    with pytest.raises(ValueError, match='reads 16'): ldm.sample(1, prompt='a very long story of a cat')
    for bad in (['a','b','c'], torch.zeros(2,5,5), [], ['a',3], 3):
        with pytest.raises(ValueError): ldm.sample(2, prompt=bad)


# ---- and back

def assert_same_weights(a, b):
    state = b.state_dict()
    assert a.state_dict().keys()==state.keys()
    for name,value in a.state_dict().items(): assert torch.equal(value, state[name]), name

@pytest.mark.parametrize('layout', [sd,sdxl])
def test_written_pipelines_are_read_again(tokenizer, layout, tmp_path):
    "By diffusers' own loaders, network by network and as a whole: the same weights to the bit, the same latents."
    ldm = from_diffusers(layout(tokenizer))
    for p in ldm.parameters(): p.data += .01*torch.randn_like(p)                # as if it was trained
    folder = to_diffusers(ldm, tmp_path/'new'/'sd')
    assert {file.name for file in (folder/'vae').iterdir()}=={'config.json','diffusion_pytorch_model.safetensors'}
    networks = {'vae': (diffusers.AutoencoderKL, ldm.autoencoder.vae),
                'unet': (diffusers.UNet2DConditionModel, ldm.denoiser.net.unet)}
    for name,(cls,network) in networks.items():
        assert_same_weights(cls.from_pretrained(folder/name), network)
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
    again = from_diffusers(pipe)
    assert_same_weights(again, ldm)
    assert (ours(again)-ours(ldm)).abs().max()<1e-4*ours(ldm).std()

def test_a_pipeline_appears_whole_or_not_at_all(tokenizer, tmp_path, monkeypatch):
    "After an error there is no folder, and nothing is left beside it; a folder with files in it is not touched."
    ldm = from_diffusers(sd(tokenizer))
    def full(self, folder, **kw):
        folder.mkdir()
        raise OSError('no space left')
    monkeypatch.setattr(diffusers.StableDiffusionPipeline, 'save_pretrained', full)
    with pytest.raises(OSError, match='no space left'): to_diffusers(ldm, tmp_path/'sd')
    assert not any(tmp_path.iterdir())
    (tmp_path/'notes.txt').write_text('mine')
    with pytest.raises(FileExistsError, match='give a new folder'): to_diffusers(ldm, tmp_path)
    assert [file.name for file in tmp_path.iterdir()]==['notes.txt']

def test_options_of_loading_beside_a_loaded_pipeline():
    "They would have been ignored."
    with pytest.raises(ValueError, match='dtype: for loading, and this pipeline is loaded already'):
        from_diffusers(object(), dtype=torch.float16)
