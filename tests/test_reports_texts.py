"Symptoms of texts: stores of codes, text encoders and what they read, prompts, and the pictures that scores compare."
import csv, json
from functools import partial
from types import SimpleNamespace
import numpy as np, pytest, torch
from PIL import Image
pytest.importorskip('lmdb')
pytest.importorskip('transformers')
from fastldm.codes import *
from fastldm.codes import store
from fastldm.codes.text_encoder import SPECIAL
from fastldm.core import save_model, set_seed
from fastldm.data import Captioned, SyntheticScenes
from fastldm.diffusion import Conditioner, Cosine, Denoiser, TextEmbedder, UNet, load
from fastldm.metrics.images import kid, precision_recall
from fastldm.recipes import (DrawnPictures, captioned_set, changed_caption, codes_cli, draw_shards, evaluate,
                             frozen_text_encoder, full_path, held_out_prompts, many, same_scene, text, unknown_words)

def pictures(folder, n, size=16):
    "Pictures of noise, each another one."
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(n): Image.fromarray(rng.integers(0, 255, (size,size,3), np.uint8)).save(folder/f'{i:03}.png')

def table(folder, **columns):
    "A table beside the pictures; every third one is for testing where the split is not given."
    n = len(next(iter(columns.values())))
    columns.setdefault('split', ['test' if i%3==0 else 'train' for i in range(n)])
    with open(folder/'captions.csv', 'w', newline='') as file:
        rows = csv.writer(file)
        rows.writerow(['file', *columns])
        rows.writerows([f'{i:03}.png', *row] for i,row in enumerate(zip(*columns.values())))

def words(seed=0, **kw):
    "A small table of word vectors."
    torch.manual_seed(seed)
    encoder = WordVectors([*SPECIAL,'red','house','a'], dim=4, n_place=4, **dict(max_len=4) | kw)
    encoder.vectors[len(SPECIAL):].normal_()
    return encoder.eval()


# ---- codes on disk

@pytest.fixture
def captioned(tmp_path):
    "`captioned(captions, cache=0)`: a set of 100 pictures, of which 64 at most are in the digest of the data."
    pictures(tmp_path/'set', 100)
    def make(captions, cache=0.):
        table(tmp_path/'set', caption=captions, split=['train']*100)
        return Captioned(tmp_path/'set', 'train', size=16, cache=cache)
    return make

CAPTIONS = [f'picture number {i}' for i in range(100)]
CORRECTED = [*CAPTIONS[:2], 'a corrected caption', *CAPTIONS[3:]]

def test_a_corrected_caption_is_noticed(captioned, tmp_path):
    "Of a set that is not in memory too, whichever caption it is; the store keeps what it had."
    vqvae = VQVAE(channels=(8,8), d_code=4, n_codes=16).eval()
    path = write_codes(captioned(CAPTIONS), vqvae, tmp_path/'codes', progress=False)
    changed = captioned(CORRECTED)
    assert changed.image is None and store._data_identity(changed)==CodeDataset(path).header['data']
    with pytest.raises(ValueError, match='holds codes of something else: content was'):
        write_codes(changed, vqvae, path, progress=False)
    assert CodeDataset(path)[:]['caption']==CAPTIONS
    before = (path/'data.mdb').read_bytes()
    write_codes(captioned(CAPTIONS), vqvae, path, progress=False)                 # again: nothing to do
    assert (path/'data.mdb').read_bytes()==before

def test_a_replaced_picture_is_noticed(captioned, tmp_path):
    "One that is not among the 64 whose pixels are looked at."
    vqvae = VQVAE(channels=(8,8), d_code=4, n_codes=16).eval()
    write_codes(captioned(CAPTIONS), vqvae, tmp_path/'codes', progress=False)
    Image.new('RGB', (16,16), 'red').save(tmp_path/'set/002.png')
    with pytest.raises(ValueError, match='content was'):
        write_codes(captioned(CAPTIONS), vqvae, tmp_path/'codes', progress=False)

def test_captions_of_a_set_without_files():
    "Scenes are drawn when they are asked for; their captions are looked at. In memory, `data` says it all."
    a, same, other = SyntheticScenes(9), SyntheticScenes(9), SyntheticScenes(9, seed=1)
    assert store._content_identity(a)==store._content_identity(same)!=store._content_identity(other)
    assert store._content_identity(SyntheticScenes(2, size=16, keep=True)) is None

def test_an_earlier_store_goes_on(captioned, tmp_path):
    "A header without `content` is read, and an unfinished store of that kind is completed."
    vqvae = VQVAE(channels=(8,8), d_code=4, n_codes=16).eval()
    ds = captioned(CAPTIONS)
    header = store._header(ds, vqvae, None)
    del header['content']
    path = (tmp_path/'codes').resolve()
    env, done = store._start(path, header)
    batch = ds.__getitems__(range(40))
    store._append(path, env, done, store._records(batch, vqvae, None, header))
    store._close(path)
    write_codes(ds, vqvae, path, progress=False)
    assert CodeDataset(path)[:]['caption']==CAPTIONS and 'content' not in CodeDataset(path).header


# ---- text encoders

LONG = 'a blue ship on the sea at night'

@pytest.fixture(scope='module')
def blip():
    set_seed(0)
    return Blip.small(['red', LONG], size=32, width=32, layers=(1,1), heads=2, dropout=0.).eval()

def test_a_caption_is_reconstructed_alike_in_every_batch(blip):
    "The loss of a batch is the mean over the tokens of its captions, whatever stands beside them."
    loss_fn = blip_loss(reconstruct=1.)
    def loss(captions): return loss_fn(blip, dict(image=-torch.ones(len(captions),3,32,32), caption=captions))
    short, long, both = (loss(captions)['reconstruct'].item() for captions in (['red'], [LONG], ['red',LONG]))
    n_short, n_long = (len(caption.split())+1 for caption in ('red', LONG))          # with the end token
    assert both==pytest.approx((n_short*short+n_long*long)/(n_short+n_long), abs=1e-5)

def test_what_is_reconstructed_is_what_features_have(blip, monkeypatch):
    "The decoder looks at the rows that are in the features, and at no other."
    states = []
    def encode_text(ids, mask):
        whole, rows = Blip.encode_text(blip, ids, mask)
        states.append(rows.detach().requires_grad_())
        return whole, states[-1]
    monkeypatch.setattr(blip, 'encode_text', encode_text)
    batch = dict(image=-torch.ones(2,3,32,32), caption=['red',LONG])
    blip_loss(reconstruct=1.)(blip, batch)['loss'].backward()
    looked_at = [s.grad for s in states if s.grad is not None]
    monkeypatch.undo()
    in_features = (blip.text_features(['red',LONG])!=0).any(-1)
    assert in_features.sum(1).tolist()==[1+1, 1+8]
    for grad in looked_at:
        found = (grad!=0).any(-1)
        assert found.tolist()==torch.nn.functional.pad(in_features, (0,1))[:,:found.shape[1]].tolist()
    assert len(looked_at)==1

BERT = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=9,
            max_position_embeddings=12)

def test_more_pieces_than_there_are_places():
    "Said at once, and not at the first long text."
    from fastldm.codes.text_encoder import MiniLM
    vocab = [*SPECIAL,'red','house']
    mini = MiniLM(vocab, BERT, max_len=10)
    assert mini.text_features('red '*10).any(-1).sum()==1+10
    with pytest.raises(ValueError, match='max_len=11: this model has places for 10 word pieces: give 10 or fewer'):
        MiniLM(vocab, BERT, max_len=11)
    text_layers = {k: v for k,v in BERT.items() if k!='vocab_size'}
    vision = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=8,
                  patch_size=8)
    assert Blip(vocab, vision, text_layers, 8, max_len=10).max_len==10
    with pytest.raises(ValueError, match='max_len=11: this model has places for 10'):
        Blip(vocab, vision, text_layers, 8, max_len=11)

@pytest.mark.parametrize('wrong', [None, 5, {'red': 1}])
def test_what_is_no_text(wrong):
    with pytest.raises(ValueError, match='captions=.*expected a string, or a list of strings'):
        words().text_features(wrong)

def test_bytes_are_no_text():
    with pytest.raises(ValueError, match=r'a caption is 114 \(int\): give a string'): words().text_features(b'red')

def test_unknown_words_are_those_of_the_text_encoder():
    "It leaves accents out, so a word that it knows is none that it does not know; commas are no words."
    encoder = load('emoji', 'cpu').text_encoder
    pieces = [encoder.vocab[i] for i in encoder.tokens(['Café crème à la carte']).ids[0]]
    assert pieces==['[CLS]','cafe','cr','##eme','a','la','cart','##e','[SEP]']
    assert unknown_words(encoder, 'Café, crème à la carte!')==['creme','carte']
    assert unknown_words(encoder, '')==[]

def test_a_text_encoder_alone(tmp_path):
    "`frozen_text_encoder` takes what is a text encoder, and what has one."
    encoder = words()
    save_model(encoder, tmp_path/'words', half=False)
    assert frozen_text_encoder(str(tmp_path/'words')).name==encoder.name
    blip = Blip.small(['red house'], size=16, width=16, layers=(1,1), heads=1)
    save_model(blip, tmp_path/'blip', half=False)
    assert frozen_text_encoder(str(tmp_path/'blip')).name==blip.name

def test_codes_know_the_text_encoders_by_name(tmp_path, monkeypatch):
    "Those that `fastldm_train --text_encoder` knows."
    pictures(tmp_path/'set', 4, 64)
    table(tmp_path/'set', caption=['a red house']*4)
    monkeypatch.setattr(text.MiniLM, 'from_pretrained', words)
    for name,encoder in dict(word_vectors=frozen_text_encoder('word_vectors'), minilm=words()).items():
        codes_cli(str(tmp_path/'set'), 'scenes', str(tmp_path/name), text_encoder=name)
        stored = CodeDataset(tmp_path/name)
        assert stored.header['text']['name']==encoder.name
        assert torch.allclose(stored[0]['text'], encoder.text_features('a red house')[0], atol=1e-2)

def test_a_run_knows_its_text_encoder(tmp_path, monkeypatch, model):
    "Where another model was saved under the same path, a run that is not finished is not mixed of two."
    pictures(tmp_path/'set', 6)
    table(tmp_path/'set', caption=['a red house']*6)
    class Stopped(Exception): "Work would begin."
    def train_vqvae(*args, **kwargs): raise Stopped
    monkeypatch.setattr(text, 'train_vqvae', train_vqvae)
    def train(): text.text_to_image(str(tmp_path/'set'), tmp_path/'run', size=16, text_encoder=str(tmp_path/'words'))
    def save(encoder):
        settings = dict(vqvae=model.vqvae, priors=list(model.priors), size=16)
        save_model(TextToImage(encoder, **settings), tmp_path/'words', half=False)
    save(words())
    with pytest.raises(Stopped): train()
    assert json.loads((tmp_path/'run/recipe.json').read_text())['text_encoder_name']==words().name
    (tmp_path/'run/denoiser').mkdir()
    (tmp_path/'run/denoiser/config.json').write_text('{}')                        # a stage that is finished
    with pytest.raises(Stopped): train()
    save(words(seed=1))
    with pytest.raises(ValueError, match=f'text_encoder_name was {words().name!r}, is {words(seed=1).name!r}'): train()


# ---- prompts and seeds

@pytest.fixture(scope='module')
def model():
    "A model of random numbers, with both priors."
    set_seed(0)
    encoder = words()
    vqvae = VQVAE(n_codes=16, d_code=4, channels=(8,8))
    prior = partial(PixelSNAIL, 16, channels=8, n_blocks=1, n_res=1, n_heads=1, d_text=encoder.d_text, attention=False)
    priors = [prior(shape=(2,2)), prior(shape=(4,4), above=(16,(2,2)))]
    denoiser = Denoiser(UNet(vqvae.c_latent, (8,), d_emb=16, d_context=8), Cosine(),
                        Conditioner(text=TextEmbedder(encoder.d_text, 16, 8)))
    for part in (*priors, denoiser, vqvae.decoder):
        for p in part.parameters(): torch.nn.init.normal_(p, std=.2)
    return TextToImage(encoder, vqvae, priors, denoiser, size=16, diffusion=dict(steps=2)).eval()

def test_a_seed_for_each_picture(model):
    "Picture by picture what its seed alone gives, in any number at a time; as in `LatentDiffusion.sample`."
    seeds = [5,0,5]
    alone = torch.cat([model.sample('a red house', seed=seed) for seed in seeds])
    assert (alone[0]-alone[1]).abs().max()>1e-3
    for batch_size in (1,64):
        assert torch.allclose(model.sample('a red house', 3, seed=seeds, batch_size=batch_size), alone, atol=1e-4)

@pytest.mark.parametrize('how,message', [
    (dict(seed=[1,2]), 'got 2 seeds for 3 pictures'),
    (dict(seed=[1,2,3], first=2), 'first=2 counts the pictures of one seed'),
    (dict(seed=[1,2,3], prior='codes'), r'seed=\[1, 2, 3\]: sampling by codes takes one seed for all images'),
    (dict(negative_prompt=5), 'negative_prompt=5: expected a text'),
    (dict(negative_prompt=['red','house']), 'got 2 negative_prompts for n=3 images'),
    (dict(prompt=['red','house']), 'got 2 prompts for n=3 images')])
def test_the_message_names_the_argument(model, how, message):
    with pytest.raises(ValueError, match=message): model.sample(**dict(prompt='red', n=3) | how)

def test_candidates_are_of_one_seed(model, monkeypatch):
    "A message counts pictures as the user does, not their candidates."
    monkeypatch.setattr(WordVectors, 'match', None, raising=False)
    with pytest.raises(ValueError, match='candidates=2 are sampled from one seed'):
        model.sample('red', 3, seed=[1,2,3], candidates=2)
    with pytest.raises(ValueError, match='got 2 negative_prompts for n=3 images'):
        model.sample('red', 3, candidates=2, negative_prompt=['red','house'])


# ---- captions of scenes

@pytest.mark.parametrize('caption,part,changed', [
    ('A red ship on the sea', 'background', 'a red ship in a storm'),
    ('a red  ship  at night', 'background', 'a red ship on the sea'),
    ('on the sea, a red ship', 'background', 'in a storm, a red ship'),
    ('A red ship left of a blue house at night', 'relation', 'a red ship right of a blue house at night'),
    ('a RED ship over a blue house at night', 'relation', 'a red ship below a blue house at night')])
def test_any_spelling_of_a_caption_is_changed(caption, part, changed):
    assert changed_caption(caption, part)==changed
    assert not same_scene(caption, changed)

def test_one_thing_has_no_relation():
    with pytest.raises(ValueError, match="'a red ship on the sea' has one thing, and so no relation"):
        changed_caption('a red ship on the sea', 'relation')


# ---- pictures that are compared

class Pixels(torch.nn.Module):
    "Features of a picture: some of its pixels."
    def __init__(self):
        super().__init__()
        self.where = torch.nn.Parameter(torch.zeros(1))
    def features(self, x): return x.flatten(1)[:,:6].float()

@pytest.fixture
def many_captions(tmp_path):
    "A folder of 60 pictures, each with three captions."
    pictures(tmp_path/'set', 60, 8)
    for i in range(60): (tmp_path/f'set/{i:03}.txt').write_text(f'picture {i}\nnumber {i}\n{i} it is')
    return tmp_path/'set'

def draw(folder, ds, **settings):
    "Pictures of a set as if a model had drawn them."
    def drawn(n, first): return (ds.__getitems__(ds.firsts[first:first+n])['image']+1)/2
    draw_shards(drawn, len(ds.firsts), folder, settings, per_shard=32, part=32, progress=False)
    return DrawnPictures(folder)

def features(ds): return Pixels().features(ds.__getitems__(ds.firsts)['image'])             # of pictures in [-1,1]

def test_each_picture_is_compared_once(many_captions, tmp_path, monkeypatch):
    "With those that the recipe kept aside, and not with each as often as it has captions, nor with those of training."
    monkeypatch.setattr(many, '_scorer', lambda data: (Pixels(), None))
    data = full_path(many_captions)
    train, test = (captioned_set(data, split=split, size=8) for split in ('train','test'))
    scores = draw(tmp_path/'drawn', train, prior='codes', data=data, model='gone').evaluate_command()
    assert (scores['real'], scores['real_n'])==('test', len(test.firsts)) and len(test)==3*len(test.firsts)
    precision, recall = precision_recall(features(test), features(train))
    assert scores['precision']==pytest.approx(float(precision)) and scores['precision']>.5
    assert scores['recall']==pytest.approx(float(recall))
    assert scores['kid']==pytest.approx(float(kid(features(test), features(train))), abs=1e-4)

def test_the_column_of_captions_of_the_model(tmp_path, monkeypatch):
    "The card of the model that drew says how its set is read; another set is opened as ever."
    pictures(tmp_path/'set', 12, 8)
    table(tmp_path/'set', headline=[f'title {i}' for i in range(12)])
    data = full_path(tmp_path/'set')
    reading = SimpleNamespace(meta=dict(data=data, caption='headline'))
    monkeypatch.setattr(many, 'load', lambda name, device: reading)
    ds = captioned_set(data, split='test', size=8, caption='headline')
    drawing = draw(tmp_path/'drawn', ds, prior='diffusion', data=data, model='mine')
    found, split = many._real(data, None, 8, Pixels(), 100, drawing._opener_of(data))
    assert split=='test' and torch.allclose(found, features(ds)) and len(found)==4
    assert drawing._opener_of('digits') is many.comparable_set

def test_pictures_of_a_set_are_each_taken_once(many_captions):
    "For the distances of drawn pictures to real ones."
    ds = Captioned(many_captions, 'train', size=8)
    taken = evaluate._some_pictures(ds, 1000)
    assert torch.equal(taken, (ds.__getitems__(ds.firsts)['image']+1)/2) and len(ds)==3*len(taken)
    assert len(evaluate._some_pictures(ds, 5).unique(dim=0))==5


# ---- prompts that are kept

def test_prompts_are_kept_for_each_column_of_captions(tmp_path):
    "And measured anew where the table has changed."
    pictures(tmp_path/'set', 6, 8)
    def write(sort):
        table(tmp_path/'set', title=[f'{sort} {i}' for i in range(6)], long=[f'a sentence {i}' for i in range(6)])
    def prompts(caption):
        meta = dict(data=full_path(tmp_path/'set'), caption=caption)
        model = SimpleNamespace(text_encoder=1, size=8, device='cpu', meta=meta)
        return sorted(held_out_prompts(model, 2, tmp_path))
    write('short')
    assert prompts('title')==['short 0','short 3']
    assert prompts('long')==['a sentence 0','a sentence 3']
    assert prompts('title')==['short 0','short 3']
    write('new')
    assert prompts('title')==['new 0','new 3']

def test_prompts_of_shipped_models_stay_under_their_key(monkeypatch):
    "They are read from `figures/measured.json`, without the set."
    monkeypatch.setenv('FASTLDM_KEPT', '1')
    for name in ('scenes','emoji'): assert len(held_out_prompts(load(name, 'cpu')))==32
