"Scores in words against the libraries that others use, by hand, and with bad input."
import math, random
import numpy as np, pytest, torch
from fastcore.test import test_close as close, test_eq as eq
from itertools import combinations
from fastldm.metrics import bleu, caption_scores, cider, match_report, meteor, retrieval, rouge, tokenise
from fastldm.metrics.text import retrieval_candidates
from fastldm.metrics import pairwise_diversity
import fastldm.metrics.text as text_module
for package in ('nltk','rouge_score','sacrebleu'): pytest.importorskip(package)

REAL = ['a red ship left of a yellow sun on the sea', 'two white flowers in a blue vase',
        'a green bird above the brown house', 'there is a red fish at night', 'in a storm, an orange ship']
FAKE = ['a red ship on the right of the sun', 'two flowers in a vase', 'a green bird above a house',
        'a picture of a red fish in the night', 'an orange ships in the storm']
WORDS = 'the a red ship ships sun on sea of two'.split()

def sentences(n, seed, least=1):
    "Random words, from `least` to nine a sentence."
    rng = random.Random(seed)
    return [' '.join(rng.choices(WORDS, k=rng.randint(least,9))) for _ in range(n)]

# --- against others

def test_bleu_is_nltk_s():
    from nltk.translate.bleu_score import corpus_bleu
    for seed in range(3):
        real = [sentences(3, 10*seed+i) for i in range(20)]
        fake = sentences(20, 999+seed, least=4)                   # it counts texts without a run of n otherwise
        b = bleu(real, fake)
        for n in (1,2,3,4):
            theirs = corpus_bleu([[r.split() for r in rs] for rs in real], [f.split() for f in fake], weights=(1/n,)*n)
            close(b[f'bleu{n}'], theirs if theirs>1e-6 else 0., eps=1e-6)

def test_bleu_is_what_sacrebleu_prints():
    import sacrebleu
    theirs = sacrebleu.corpus_bleu(FAKE, [REAL], lowercase=True).score/100
    close(bleu(REAL, FAKE, smooth='exp')['bleu4'], theirs, eps=.03)          # it keeps the comma as a word

def test_rouge_with_its_tokeniser():
    "For English, rouge-score's tokeniser gives the same."
    from rouge_score.rouge_scorer import RougeScorer
    scorer = RougeScorer(['rouge1','rouge2','rougeL'])
    theirs = [scorer.score(a, b) for a,b in zip(REAL, FAKE)]
    for kind,value in rouge(REAL, FAKE).items(): close(value, np.mean([s[kind].fmeasure for s in theirs]), eps=1e-9)

def test_cider_is_pycocoevalcap_s():
    scorer = pytest.importorskip('pycocoevalcap.cider.cider')
    for seed in range(5):
        real = [sentences(1+i%3, 100*seed+i) for i in range(12)]
        fake = sentences(12, 7+seed)
        theirs, _ = scorer.Cider().compute_score(dict(enumerate(real)), {i: [f] for i,f in enumerate(fake)})
        close(cider(real, fake)['cider'], theirs, eps=1e-9)

def meteor_by_formula(a, b):
    "For words that occur once on each side and have no other form."
    a, b = a.split(), b.split()
    pairs = [(i, b.index(word)) for i,word in enumerate(a) if word in b]
    m = len(pairs)
    if not m: return 0.
    chunks = 1+sum(later!=(earlier[0]+1, earlier[1]+1) for earlier,later in zip(pairs, pairs[1:]))
    P, R = m/len(a), m/len(b)
    return 10*P*R/(R+9*P)*(1-.5*(chunks/m)**3)

def meteor_of(real, fake): return meteor([real], [fake], synonyms=False)['meteor_exact_stem']

def test_meteor_by_hand():
    rng = random.Random(0)
    words = 'zebra kiwi tango lima bravo delta echo golf'.split()
    for _ in range(60):
        a, b = (' '.join(rng.sample(words, rng.randint(1,7))) for _ in range(2))
        close(meteor_of(b, a), meteor_by_formula(a, b), eps=1e-9)

class OneSynonym:
    "A WordNet in which a ship is a vessel."
    def synsets(self, word):
        class Lemma: name = staticmethod(lambda: 'vessel')
        class Synset: lemmas = staticmethod(lambda: [Lemma])
        return [Synset] if word=='ship' else []

def test_meteor_names_its_kind(monkeypatch):
    "Without WordNet the score has another name; with it synonyms count."
    monkeypatch.setattr(text_module, '_wordnet', lambda: None)
    eq([*meteor(REAL, FAKE)], ['meteor_exact_stem'])
    with pytest.raises(FileNotFoundError, match='nltk.download'): meteor(REAL, FAKE, synonyms=True)
    monkeypatch.setattr(text_module, '_wordnet', OneSynonym)
    scores = meteor(['vessel'], ['ship'])
    eq([*scores], ['meteor'])
    close(scores['meteor'], .5)
    eq(meteor(['vessel'], ['ship'], synonyms=False), dict(meteor_exact_stem=0.))

def test_meteor_with_wordnet():
    if text_module._wordnet() is None:
        pytest.skip("WordNet is not installed: python -c \"import nltk; nltk.download('wordnet')\"")
    real, fake = 'a cat sat on the mat', 'a kitten was sitting on the carpet'
    assert meteor([real], [fake])['meteor']>meteor_of(real, fake)

# --- what holds for all

@pytest.mark.parametrize('score', [bleu,rouge,meteor,cider])
def test_equal_and_unlike(score):
    "Equal texts score nearly 1 or more, unlike and empty ones 0."
    assert all(value>=.9 for value in score(REAL, REAL).values())
    assert not any(score(REAL, ['zzz qqq']*5).values())
    assert not any(score(REAL, ['']*5).values())

@pytest.mark.parametrize('score', [bleu,rouge,meteor,cider])
def test_case_and_punctuation_do_not_count(score):
    same = score(REAL, REAL)
    upper = score(REAL, [text.upper()+'!!' for text in REAL])
    for name,value in same.items(): close(upper[name], value, eps=1e-9)

@pytest.mark.parametrize('score', [bleu,rouge,meteor,cider])
def test_other_scripts(score):
    "Each text twice, so that CIDEr is below 1."
    real = ['корабль в шторме','嵐の中の赤い船','سفينة في عاصفة']*2
    fake = ['Корабль в шторме.','嵐の中の赤い船','سفينة في عاصفة']*2
    assert all(value>=.7 for value in score(real, fake).values())

@pytest.mark.parametrize('score', [bleu,rouge,meteor,cider,caption_scores])
@pytest.mark.parametrize('real,fake,says', [
    (['a'], ['a','b'], '1 texts and 2'),
    ([], [], 'at least one'),
    ('a ship', 'a ship', 'give lists'),
    ([''], ['a'], 'without words'),
    ([[]], ['a'], 'without words'),
    (['a'], [None], 'expected strings'),
    ([['a',3]], ['a'], 'expected strings'),
])
def test_bad_texts(score, real, fake, says):
    with pytest.raises(ValueError, match=says): score(real, fake)

@pytest.mark.parametrize('score', [bleu,rouge,meteor])
def test_more_references_cannot_hurt(score):
    one = score(REAL, FAKE)
    two = score([list(pair) for pair in zip(REAL, FAKE)], FAKE)
    assert all(two[name]>=one[name] for name in one) and max(two.values())>.99

def test_ten_thousand_words():
    words = [f'w{i%997}' for i in range(10_000)]
    close(bleu([' '.join(words)], [' '.join(words)])['bleu4'], 1.)
    score, = meteor([' '.join(words[:3000])], ['w1']).values()
    assert score<.1

def test_all_at_once():
    scores = caption_scores(REAL, FAKE)
    assert {'bleu1','bleu4','rouge1','rougeL','cider','n'}<=scores.keys()
    assert any(name.startswith('meteor') for name in scores)
    eq(scores['n'], 5)
    assert 'cider' not in caption_scores(REAL[:1], FAKE[:1])

def test_tokenise():
    eq(tokenise("It's a SHIP-wreck, No. 5…"), ['it','s','a','ship','wreck','no','5'])
    eq(tokenise('हिन्दी भाषा'), ['हिन्दी','भाषा'])                       # vowel signs stay in their word
    eq(tokenise('Ünïcödé'), tokenise('U\u0308ni\u0308co\u0308de\u0301'))
    eq(tokenise(' \n'), [])

# --- matching

@pytest.mark.parametrize('n', [5,50,500])
def test_report_against_sklearn(n):
    sk = pytest.importorskip('sklearn.metrics')
    rng = np.random.default_rng(n)
    y = rng.integers(0, 2, n)
    y[:2] = 0, 1
    s = (.3*y+.7*rng.random(n)).round(1)
    report = match_report(torch.from_numpy(s), torch.from_numpy(y), threshold=.4)
    predicted = s>=.4
    theirs = sk.precision_recall_fscore_support(y, predicted, average='binary', zero_division=0)[:3]
    close([report[name] for name in ('precision','recall','f1')], theirs, eps=1e-9)
    close([report['accuracy'], report['auroc']], [sk.accuracy_score(y, predicted), sk.roc_auc_score(y, s)], eps=1e-9)
    eq(report['confusion'], sk.confusion_matrix(y, predicted).tolist())
    eq(report['n'], n)
    statistics = [report[f'similarity_{name}'] for name in ('mean','median','std')]
    close(statistics, [s.mean(), np.median(s), s.std()], eps=1e-9)

def test_report_corner_cases():
    "0/0 counts as 0; labels may be texts or booleans."
    report = match_report([.1,.2], [1,1])
    eq([report[name] for name in ('precision','recall','f1','auroc')], [0.,0.,0.,None])
    report = match_report([.9,.8], ['yes ','YES'])
    eq((report['precision'], report['f1'], report['confusion']), (1.,1.,[[0,0],[0,2]]))
    eq(match_report([1,0], [True,False])['accuracy'], 1.)

@pytest.mark.parametrize('scores,labels,says', [
    ([.5,.5], ['YES',''], '1 of 2 labels are blank'),
    ([.5], [None], 'blank'),
    ([.5,.5], [1,-1], "such as '-1'"),
    ([.5], [1,0], 'one number for each'),
    ([], [], 'one number for each'),
    ([math.nan], [1], 'NaN'),
])
def test_bad_labels(scores, labels, says):
    with pytest.raises(ValueError, match=says): match_report(scores, labels)

# --- retrieval

@pytest.mark.parametrize('k', [2,3,4,5])
def test_retrieval_against_every_choice(k):
    "All ways to choose the others, one by one."
    generator = torch.Generator().manual_seed(k)
    s = (torch.randn(7, 7, generator=generator)+torch.eye(7)).mul(2).round()
    def won(i, others):
        right, rest = s[i,i], s[i,list(others)]
        return 0. if (rest>right).any() else 1/(1+(rest==right).sum().item())
    choices = [(i, others) for i in range(7) for others in combinations([j for j in range(7) if j!=i], k-1)]
    close(retrieval(s, among=k)['accuracy'], np.mean([won(*choice) for choice in choices]), eps=1e-9)

def test_retrieval_of_noise_is_chance():
    res = retrieval(torch.randn(600, 600, generator=torch.Generator().manual_seed(0)))
    close(res['accuracy'], .01, eps=.006)
    close(res['rank'], 300, eps=40)
    eq(res['chance'], .01)

def test_retrieval_with_equal_captions():
    s = torch.eye(5)
    s[0,1] = 2.                                                   # the same text, more similar
    eq(retrieval(s, ['a','a','b','c','d'], among=4)['accuracy'], 1.)
    assert retrieval(s, among=4)['accuracy']<1

@pytest.mark.parametrize('copies', [1,5,25])
def test_copies_of_a_caption_are_one_candidate(copies):
    "Repeated captions change neither what is right nor chance: it is as among the different ones, each once."
    generator = torch.Generator().manual_seed(copies)
    texts = [str(i) for i in range(12)]*25
    of_texts = torch.randn(300, 12, generator=generator)
    s = of_texts.repeat(1, 25)
    different = texts[:12*copies]
    res = retrieval(s[:12*copies,:12*copies], different, among=12)
    best = of_texts[:12*copies].argmax(1)==torch.arange(12*copies)%12
    close(res['accuracy'], best.float().mean().item(), eps=1e-6)
    eq(retrieval_candidates(different), 12)
    for unequal in (['a','b','b','b'],['a','a','a','b']): eq(retrieval_candidates(unequal), 2)

@pytest.mark.parametrize('among', [2,5,12])
def test_copies_do_not_lower_chance(among):
    generator = torch.Generator().manual_seed(0)
    texts = ['the most frequent']*200+[f'text {i}' for i in range(11) for _ in range(9)]
    s = torch.randn(299, 12, generator=generator)[:,[0]*200+[i for i in range(1,12) for _ in range(9)]]
    close(retrieval(s, texts, among=among)['accuracy'], 1/among, eps=.05)

@pytest.mark.parametrize('s,options,says', [
    (torch.eye(9), {}, 'too few to choose among 100'),
    (torch.ones(3,4), {}, r'\(3, 4\)'),
    (torch.full((3,3), math.nan), {}, 'NaN'),
    (torch.eye(3), dict(captions=['a']), '1 captions'),
    (torch.eye(3), dict(captions=['a']*3, among=2), '3 pairs of 1 different texts'),
    (torch.eye(4), dict(captions=['a','a','b','c'], among=4), '4 pairs of 3 different texts'),
])
def test_bad_matrix(s, options, says):
    with pytest.raises(ValueError, match=says): retrieval(s, **options)

# --- the bound that the slides' table breaks

def test_meteor_is_never_below_the_bound_of_rouge():
    rng = random.Random(3)
    words = 'kiwi tango lima bravo delta'.split()
    for _ in range(200):
        a, b = (' '.join(rng.choices(words, k=rng.randint(1,12))) for _ in range(2))
        f = rouge([a], [b])['rouge1']
        assert meteor_of(a, b)>=5*f/(18-8*f)-1e-9

# --- diversity

def largest_difference(a, b): return (a-b).abs().amax((1,2,3))

def test_diversity():
    x = torch.zeros(4, 1, 8, 8)
    x[2:] = 1
    res = pairwise_diversity(x, largest_difference)
    close(res['diversity'], 2*4/6)
    eq(pairwise_diversity((x*255).byte(), largest_difference)['diversity'], res['diversity'])
    eq(pairwise_diversity(torch.rand(40,1,8,8), largest_difference, pairs=10)['pairs'], 10)

def test_diversity_of_bad_pictures():
    x = torch.zeros(4, 1, 8, 8)
    x[2:] = 1
    for bad in (x[:1], x[0], x*2, x-1, 'x'):
        with pytest.raises(ValueError): pairwise_diversity(bad, largest_difference)
