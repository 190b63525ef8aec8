"Flowers: the real sets, where they are on this computer."
import pytest, torch
from fastldm import load
from fastldm.metrics import EfficientNetLite, label_accuracy

@pytest.mark.parametrize('name,n,classes', [('flowers5',4317,5), ('flowers17',1190,17)])
def test_real_flowers(name, n, classes, real):
    "Where they are on this computer: every tenth picture is for testing, all classes are there, nothing is damaged."
    train,test = real(name,'train'),real(name,'test')
    assert abs(len(train)+len(test)-n)<=.2*n and len(train.classes)==classes
    assert test.label.unique().numel()==classes and train.image.shape[1:]==(3,64,64)
    assert train.image.float().std((1,2,3)).min()>2

def test_shipped_flowers():
    "Drawn by label and without one; the card says what the weights may be used for."
    m = load('flowers')
    assert m.meta['classes']==['daisy','dandelion','rose','sunflower','tulip'] and 'research only' in m.meta['licence']
    x,y = m.sample(4, label=[0,1,2,3], seed=0, steps=6),m.sample(4, seed=0, steps=6)
    assert x.shape==y.shape==(4,3,64,64) and (x-y).abs().mean()>.02 and x.std((1,2,3)).min()>.05

@pytest.mark.slow
def test_flowers_look_like_their_label():
    "By a classifier on ImageNet features that is itself right about 77 % of photographs; chance is .2."
    try: EfficientNetLite()
    except FileNotFoundError as e: pytest.skip(str(e))
    labels = torch.arange(60)%5
    x = load('flowers').sample(60, label=labels, guidance_scale=2.5, seed=0)
    assert label_accuracy(x, labels, load('flowers5_evaluator'))>.45
