"Scores in words against the libraries that others use, by hand, and with bad input."
import math, random
import numpy as np, pytest, torch
from fastcore.test import test_close as close, test_eq as eq
for m in ('nltk','rouge_score','sacrebleu'): pytest.importorskip(m)
from fastldm.metrics.text import *

REAL = ['a red ship left of a yellow sun on the sea','two white flowers in a blue vase','a green bird above the brown house','there is a red fish at night','in a storm, an orange ship']
FAKE = ['a red ship on the right of the sun','two flowers in a vase','a green bird above a house','a picture of a red fish in the night','an orange ships in the storm']

def sentences(n, seed, least=1):
    rng = random.Random(seed)
    return [' '.join(rng.choices('the a red ship ships sun on sea of two'.split(), k=rng.randint(least,9))) for _ in range(n)]

# --- against others

def test_bleu_is_nltk_s():
    from nltk.translate.bleu_score import corpus_bleu
    for seed in range(3):
        real,fake = [sentences(3, 10*seed+i) for i in range(20)],sentences(20, 999+seed, least=4)      # it counts texts without a run of n otherwise
        b = bleu(real, fake)
        for n in (1,2,3,4):
            theirs = corpus_bleu([[r.split() for r in rs] for rs in real], [f.split() for f in fake], weights=(1/n,)*n)
            close(b[f'bleu{n}'], theirs if theirs>1e-6 else 0., eps=1e-6)

def test_bleu_is_what_sacrebleu_prints():
    import sacrebleu
    close(bleu(REAL, FAKE, smooth='exp')['bleu4'], sacrebleu.corpus_bleu(FAKE, [REAL], lowercase=True).score/100, eps=.03)    # it keeps the comma as a word

def test_rouge_is_that_of_its_own_cutting():
    from rouge_score.rouge_scorer import RougeScorer
    s = RougeScorer(['rouge1','rouge2','rougeL'])
    r = rouge(REAL, FAKE)
    for k in r: close(r[k], np.mean([s.score(a, b)[k].fmeasure for a,b in zip(REAL,FAKE)]), eps=1e-9)     # English: their own cutting gives the same

def test_cider_is_pycocoevalcap_s():
    scorer = pytest.importorskip('pycocoevalcap.cider.cider')
    for seed in range(5):
        real,fake = [sentences(1+i%3, 100*seed+i) for i in range(12)],sentences(12, 7+seed)
        theirs,_ = scorer.Cider().compute_score({i:r for i,r in enumerate(real)}, {i:[f] for i,f in enumerate(fake)})
        close(cider(real, fake)['cider'], theirs, eps=1e-9)

def test_meteor_by_hand():
    def by_formula(a, b):
        "For words that occur once on each side and have no other form."
        at = [(i,b.split().index(w)) for i,w in enumerate(a.split()) if w in b.split()]
        m = len(at)
        if not m: return 0.
        chunks = 1+sum(q!=(p[0]+1,p[1]+1) for p,q in zip(at,at[1:]))
        P,R = m/len(a.split()),m/len(b.split())
        return 10*P*R/(R+9*P)*(1-.5*(chunks/m)**3)
    rng = random.Random(0)
    for _ in range(60):
        a,b = (' '.join(rng.sample('zebra kiwi tango lima bravo delta echo golf'.split(), rng.randint(1,7))) for _ in range(2))
        close(meteor([b],[a],synonyms=False)['meteor_exact_stem'], by_formula(a,b), eps=1e-9)

def test_meteor_says_which_it_is(monkeypatch):
    import fastldm.metrics.text as t
    monkeypatch.setattr(t, '_wordnet', lambda: None)
    eq([*meteor(REAL, FAKE)], ['meteor_exact_stem'])
    with pytest.raises(FileNotFoundError, match="nltk.download"): meteor(REAL, FAKE, synonyms=True)
    class Net:                                                   # a WordNet of one synonym
        def synsets(self, w):
            class L: name = staticmethod(lambda: 'vessel')
            class S: lemmas = staticmethod(lambda: [L])
            return [S] if w=='ship' else []
    monkeypatch.setattr(t, '_wordnet', Net)
    m = meteor(['vessel'], ['ship']); eq([*m], ['meteor']); close(m['meteor'], .5)
    eq(meteor(['vessel'], ['ship'], synonyms=False), dict(meteor_exact_stem=0.))

def test_meteor_with_wordnet():
    import fastldm.metrics.text as t
    if t._wordnet() is None: pytest.skip("WordNet is not installed: python -c \"import nltk; nltk.download('wordnet')\"")
    assert meteor(['a cat sat on the mat'],['a kitten was sitting on the carpet'])['meteor']>meteor(['a cat sat on the mat'],['a kitten was sitting on the carpet'],synonyms=False)['meteor_exact_stem']

# --- what holds for all

@pytest.mark.parametrize('f', [bleu,rouge,meteor,cider])
def test_equal_and_unlike(f):
    same,other,none = f(REAL, REAL),f(REAL, ['zzz qqq']*5),f(REAL, ['']*5)
    assert all(v>=.9 for v in same.values()); assert not any(other.values()) and not any(none.values())
    upper = f(REAL, [r.upper()+'!!' for r in REAL])
    for k in same: close(upper[k], same[k], eps=1e-9)             # case and punctuation do not count
    russian = f(['корабль в шторме','嵐の中の赤い船','سفينة في عاصفة']*2, ['Корабль в шторме.','嵐の中の赤い船','سفينة في عاصفة']*2)
    assert all(v>=.7 for v in russian.values())                      # CIDEr: each reference twice; the rest 1

@pytest.mark.parametrize('f', [bleu,rouge,meteor,cider,caption_scores])
@pytest.mark.parametrize('real,fake,says', [(['a'],['a','b'],'1 texts and 2'),([],[],'at least one'),('a ship','a ship','give lists'),([''],['a'],'without words'),([[]],['a'],'without words'),(['a'],[None],'expected strings'),([['a',3]],['a'],'expected strings')])
def test_bad_texts(f, real, fake, says):
    with pytest.raises(ValueError, match=says): f(real, fake)

@pytest.mark.parametrize('f', [bleu,rouge,meteor])
def test_more_references_cannot_hurt(f):
    one,two = f(REAL, FAKE),f([[r,f] for r,f in zip(REAL,FAKE)], FAKE)
    assert all(two[k]>=one[k] for k in one) and max(two.values())>.99

def test_ten_thousand_words():
    long = ' '.join(f'w{i%997}' for i in range(10_000))
    r = bleu([long], [long]); close(r['bleu4'], 1.)
    assert meteor([long[:3000]], ['w1'])['meteor_exact_stem' if 'meteor_exact_stem' in meteor(['a'],['a']) else 'meteor']<.1

def test_all_at_once():
    r = caption_scores(REAL, FAKE)
    assert {'bleu1','bleu4','rouge1','rougeL','cider','n'}<=r.keys() and any(k.startswith('meteor') for k in r)
    eq(r['n'], 5); assert 'cider' not in caption_scores(REAL[:1], FAKE[:1])

def test_tokenise():
    eq(tokenise("It's a SHIP-wreck, No. 5…"), ['it','s','a','ship','wreck','no','5'])
    eq(tokenise('हिन्दी भाषा'), ['हिन्दी','भाषा'])                       # vowel signs stay in their word
    eq(tokenise('Ünïcödé'), tokenise('U\u0308ni\u0308co\u0308de\u0301')); eq(tokenise(' \n'), [])

# --- matching

def test_report_against_sklearn():
    sk = pytest.importorskip('sklearn.metrics')
    rng = np.random.default_rng(1)
    for n in (5,50,500):
        y = rng.integers(0,2,n); y[:2] = 0,1; s = (.3*y+.7*rng.random(n)).round(1)
        r = match_report(torch.from_numpy(s), torch.from_numpy(y), threshold=.4); p = s>=.4
        close([r['precision'],r['recall'],r['f1']], sk.precision_recall_fscore_support(y, p, average='binary', zero_division=0)[:3], eps=1e-9)
        close([r['accuracy'],r['auroc']], [sk.accuracy_score(y,p),sk.roc_auc_score(y,s)], eps=1e-9)
        eq(r['confusion'], sk.confusion_matrix(y,p).tolist()); eq(r['n'], n)
        close([r['similarity_mean'],r['similarity_median'],r['similarity_std']], [s.mean(),np.median(s),s.std()], eps=1e-9)

def test_report_corner_cases():
    r = match_report([.1,.2],[1,1]); eq((r['precision'],r['recall'],r['f1'],r['auroc']), (0.,0.,0.,None))
    r = match_report([.9,.8],['yes ','YES']); eq((r['precision'],r['f1'],r['confusion']), (1.,1.,[[0,0],[0,2]]))
    eq(match_report([1,0],[True,False])['accuracy'], 1.)

@pytest.mark.parametrize('s,y,says', [([.5,.5],['YES',''],'1 of 2 labels are blank'),([.5],[None],'blank'),([.5,.5],[1,-1],"such as '-1'"),([.5],[1,0],'one number for each'),([],[],'one number for each'),([math.nan],[1],'NaN')])
def test_bad_labels(s, y, says):
    with pytest.raises(ValueError, match=says): match_report(s, y)

# --- retrieval

def test_retrieval_against_every_choice():
    "All ways to choose the others, one by one."
    from itertools import combinations
    g = torch.Generator().manual_seed(0)
    for trial in range(6):
        s = (torch.randn(7,7,generator=g)+torch.eye(7)).mul(2).round(); k = 2+trial%4
        def one(i, o): v,w = s[i,i],s[i,list(o)]; return 0. if (w>v).any() else 1/(1+(w==v).sum().item())
        want = np.mean([one(i,o) for i in range(7) for o in combinations([j for j in range(7) if j!=i], k-1)])
        close(retrieval(s, among=k)['accuracy'], want, eps=1e-9)

def test_retrieval_of_noise_is_chance():
    s = torch.randn(600,600,generator=torch.Generator().manual_seed(0))
    r = retrieval(s); close(r['accuracy'], .01, eps=.006); close(r['rank'], 300, eps=40); eq(r['chance'], .01)

def test_retrieval_with_equal_captions():
    c = ['a','a','b','c','d']; s = torch.eye(5); s[0,1] = 2.                    # the same text, liked more
    eq(retrieval(s, c, among=4)['accuracy'], 1.); assert retrieval(s, among=4)['accuracy']<1

@pytest.mark.parametrize('s,kw,says', [(torch.eye(9),{},'too few to choose among 100'),(torch.ones(3,4),{},r'\(3, 4\)'),(torch.full((3,3),math.nan),{},'NaN'),(torch.eye(3),dict(captions=['a']),'1 captions'),(torch.eye(3),dict(captions=['a']*3,among=2),'as few as 0')])
def test_bad_matrix(s, kw, says):
    with pytest.raises(ValueError, match=says): retrieval(s, **kw)

# --- the bound that the slides' table breaks

def test_meteor_is_never_below_the_bound_of_rouge():
    rng = random.Random(3)
    for _ in range(200):
        a,b = (' '.join(rng.choices('kiwi tango lima bravo delta'.split(), k=rng.randint(1,12))) for _ in range(2))
        f = rouge([a],[b])['rouge1']
        assert meteor([a],[b],synonyms=False)['meteor_exact_stem']>=5*f/(18-8*f)-1e-9

# --- diversity

def test_diversity_and_bad_pictures():
    def far(a, b): return (a-b).abs().amax((1,2,3))
    x = torch.zeros(4,1,8,8); x[2:] = 1
    close(pairwise_diversity(x, far)['diversity'], 2*4/6)
    eq(pairwise_diversity((x*255).byte(), far)['diversity'], pairwise_diversity(x, far)['diversity'])
    eq(pairwise_diversity(torch.rand(40,1,8,8), far, pairs=10)['pairs'], 10)
    for bad in (x[:1], x[0], x*2, x-1, 'x'):
        with pytest.raises(ValueError): pairwise_diversity(bad, far)
