"Scenes: bad sentences and sizes, other processes, what is held out."
import subprocess, sys
from itertools import product
import pytest, torch
from fastcore.test import test_eq as eq
from fastldm.data import Pictures, dataloader, get_dataset
from fastldm.data.synthetic import *

@pytest.mark.parametrize('kw,says', [
    (dict(colour='crimson',kind='ship'),"colour is 'crimson'; it can be red"),
    (dict(colour='red',kind='ship',background='moon'),"background is 'moon'"),
    (dict(colour='red',kind='ship',relation='beside',colour2='red',kind2='sun'),"relation is 'beside'"),
    (dict(colour='red',kind='ship',relation='above'),"second colour is None"),
    (dict(colour='red',kind='ship',kind2='sun'),"second kind is 'sun'"),
    (dict(colour='red',kind='ship',relation='above',colour2='blue',kind2='ship'),'both a ship')])
def test_words_that_the_grammar_has_not(kw, says):
    with pytest.raises(ValueError, match=says): Scene(**kw)

@pytest.mark.parametrize('said', [
    '', ' ', 'ship', 'a red ship at sea in a storm', 'a red ship left of a yellow sun',
    'a red ship left of a yellow sun above a blue fish at night', 'a red ship left of above a yellow sun at night',
    'a red ship left of at night', '船 в шторм', 'a red ship '*3000, 'redship in the snow'])
def test_sentences_that_say_no_scene(said):
    with pytest.raises(ValueError, match='expected one thing, or two and a relation, and a background') as e:
        parse_scene(said)
    assert len(str(e.value))<2000 and 'Things: ship, house' in str(e.value)

@pytest.mark.parametrize('kw', [dict(n=0), dict(size=8), dict(n=-3)])
def test_bad_sizes(kw):
    with pytest.raises(ValueError, match='at least'): SyntheticScenes(**kw)

def test_bad_splits_and_small_drawings():
    with pytest.raises(ValueError, match="'train' or 'test'"): SyntheticScenes(split='valid')
    with pytest.raises(ValueError, match='at least 16'): draw_scene('a red ship at night', size=4)
    with pytest.raises(IndexError): SyntheticScenes(5)[5]

def test_what_is_held_out():
    "A tenth of the combinations, four or five of each colour, kind and role, and no pair of words entirely."
    held = [(c,k,r) for c,k,r in product(COLOURS, KINDS, ROLES) if is_held_out(type('S', (), dict(things=[(c,k,r)]))())]
    eq(len(held), 40)
    for words,i in ((COLOURS,0),(KINDS,1),(ROLES,2)): eq({sum(h[i]==w for h in held) for w in words}, {40//len(words)})
    train,test = SyntheticScenes(),SyntheticScenes(split='test')
    assert all(is_held_out(test.scene(i)) and not is_held_out(train.scene(i)) for i in range(500))
    for s in ('red ship left of yellow sun','yellow sun right of red ship'):
        eq(is_held_out(parse_scene(s+', night')), is_held_out(parse_scene('red ship left of yellow sun, night')))

@pytest.mark.parametrize('size', [16,33,64,128])
def test_any_size_has_each_thing_where_it_is_said(size):
    ds = SyntheticScenes(60, 'test', size=size)
    for i,b in enumerate(ds):
        s,m = ds.scene(i),b['mask']
        eq((b['image'].shape,m.shape,b['depth'].shape), ((3,size,size),(size,size),(1,size,size)))
        eq(set(m.unique().tolist()), {0}|{KINDS.index(k)+1 for _,k,_ in s.things})
        eq(parse_scene(b['caption']), s)
        at = [(m==KINDS.index(k)+1).nonzero().float().mean(0)/size for _,k,_ in s.things]
        if s.relation:
            down,right = at[0]-at[1]                                        # of the first thing, seen from the second
            assert {'left of':-right, 'right of':right, 'above':-down, 'below':down}[s.relation]>.3
        assert all(len(b['depth'][0][m==c].unique())==1 for c in m.unique().tolist() if c)
        assert 0<b['depth'].min() and b['depth'].max()==1

def test_twice_as_near_is_twice_as_large():
    "Area times squared distance is one number for a kind."
    ds = SyntheticScenes(400, size=64)
    law = {}
    for i in range(400):
        b,s = ds[i],ds.scene(i)
        for _,k,_ in s.things:
            m = b['mask']==KINDS.index(k)+1
            law.setdefault((k,s.relation is None), []).append(m.sum()*b['depth'][0][m][0]**2)
    for v in law.values():
        v = torch.stack(v)
        assert v.std()/v.mean()<.06

@pytest.mark.slow
def test_another_process_draws_the_same():
    here = SyntheticScenes(3, 'test', seed=5)[:]
    program = """
from fastldm.data.synthetic import SyntheticScenes
b = SyntheticScenes(9, 'test', seed=5)[:3]
print(b['caption'], b['image'].sum().item(), b['mask'].sum().item())
"""
    there = subprocess.run([sys.executable,'-c',program],
        capture_output=True, text=True, check=True).stdout.strip()
    eq(there, f"{here['caption']} {here['image'].sum().item()} {here['mask'].sum().item()}")

def test_edges_of_a_square():
    m = torch.zeros(7,7, dtype=torch.long)
    m[1:6,2:7] = 3
    e = mask_edges(m)
    eq(e.shape, (1,7,7))
    eq(e.sum().item(), 5*2+3) # above, below, left; the rim of the picture is no edge
    eq(mask_edges(torch.stack([m,m*0])).flatten(1).sum(1), [13,0])

def test_scenes_by_name_and_from_workers():
    ds = get_dataset('scenes', split='test', n=20)
    assert isinstance(ds, Pictures) and len(ds.caption)==20 and len(set(ds[:]['name']))==20
    a,b = ([x for x in dataloader(ds, 7, workers=w)] for w in (0,1))
    for x,y in zip(a, b, strict=True):
        for k in x: eq(x[k], y[k])

def test_a_near_miss_is_another_sentence():
    "Also where both things have one colour, which cannot be exchanged."
    said = 'a red ship left of a red sun on the sea'
    background = next(iter(BACKGROUNDS))
    said = Scene('red', 'ship', 'left of', 'red', 'sun', background).caption(0)
    missed = {near_miss(said, seed) for seed in range(40)}
    assert said not in missed and len(missed)>=2
