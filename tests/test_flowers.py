"Flowers: the real sets, where they are on this computer."
import pytest

@pytest.mark.parametrize('name,n,classes', [('flowers5',4317,5), ('flowers17',1190,17)])
def test_real_flowers(name, n, classes, real):
    "Where they are on this computer: every tenth picture is for testing, all classes are there, nothing is damaged."
    train,test = real(name,'train'),real(name,'test')
    assert abs(len(train)+len(test)-n)<=.2*n and len(train.classes)==classes
    assert test.label.unique().numel()==classes and train.image.shape[1:]==(3,64,64)
    assert train.image.float().std((1,2,3)).min()>2
