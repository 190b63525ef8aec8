"Our scores against those of torch-fidelity and torchmetrics, from pictures to number; and what happens to pictures that cannot be scored."
import json, pickle
import pytest, torch
from fastldm.core import save_model, set_seed
from fastldm.data import Digits, Pictures, to_image
from fastldm.metrics.images import *

@pytest.fixture(scope='module')
def net():
    "An evaluator whose features spread: untrained, but with statistics of the digits."
    set_seed(0)
    net = Evaluator(channels=(8,16), hidden=12)
    for _ in range(20):
        with torch.no_grad(): net(torch.cat([Digits()[:200]['image'], Digits()[:200]['image'].roll(2,2)]))
    torch.nn.init.normal_(net.head[0].weight, 0, 2)
    net.meta = dict(name='digits_evaluator')
    return net.eval()

@pytest.fixture(scope='module')
def sets():
    "Real and changed pictures, bytes."
    real,fake = Digits()[:600]['image'],Digits()[600:1000]['image']
    g = torch.Generator().manual_seed(0)
    fake = (fake*.6+.3*torch.randn(fake.shape, generator=g)).clamp(-1,1)
    return tuple(((x+1)*127.5).round().to(torch.uint8) for x in (real,fake))

class Bytes(torch.utils.data.Dataset):
    "As torch-fidelity wants pictures."
    def __init__(self, x): self.x = x
    def __len__(self): return len(self.x)
    def __getitem__(self, i): return self.x[i]

def theirs(real, fake, net, **kw):
    from torch_fidelity import calculate_metrics
    inputs = [o if isinstance(o, str) else Bytes(o) for o in (fake,real)]
    return calculate_metrics(input1=inputs[0], input2=inputs[1], feature_extractor=register_evaluator(net), cuda=False, cache=False, save_cpu_ram=True, verbose=False,
                             fid=True, kid=True, prc=True, kid_subset_size=300, kid_subsets=20, **kw)

def ours(real, fake, net):
    p,r = precision_recall(real, fake, net)
    return dict(frechet_inception_distance=fid(real, fake, net), kernel_inception_distance_mean=kid(real, fake, net, subset=300, subsets=20), precision=p, recall=r)


# ---- against others

def test_torch_fidelity_from_pictures_to_number(net, sets):
    a,b = ours(*sets, net),theirs(*sets, net)
    assert a=={k:pytest.approx(b[k], rel=2e-3, abs=1e-6) for k in a}
    assert a['frechet_inception_distance']>.01 and a['precision']<1               # the sets differ

def test_floats_bytes_and_png_files_score_the_same(sets, tmp_path):
    "Colour, read by torch-fidelity from a folder; ours from floats in memory."
    real,fake = (x.expand(-1,3,-1,-1)//torch.tensor([1,2,3],dtype=torch.uint8).view(1,3,1,1) for x in sets)
    colour = Evaluator(c_in=3, channels=(8,16), hidden=12).eval()
    for n,x in dict(real=real, fake=fake).items():
        (tmp_path/n).mkdir()
        for i,o in enumerate(x): to_image(o.float()/127.5-1).save(tmp_path/n/f'{i:04}.png')
    b = theirs(str(tmp_path/'real'), str(tmp_path/'fake'), colour)
    for x in (fake,fake/255.): assert ours(real, x, colour)=={k:pytest.approx(b[k], rel=2e-3, abs=1e-6) for k in b if not k.endswith('std') and k!='f_score'}

def test_torchmetrics_fid_and_kid(net, sets):
    "An implementation that shares no code with torch-fidelity's."
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.kid import KernelInceptionDistance
    class Look(torch.nn.Module):
        num_features = 16
        def forward(self, x): return net.features(x/127.5-1)
    score = []
    for m in (FrechetInceptionDistance(feature=Look()), KernelInceptionDistance(feature=Look(), subsets=1, subset_size=400)):
        m.update(sets[0][:400], real=True); m.update(sets[1], real=False)
        score.append(m.compute())
    assert fid(sets[0][:400], sets[1], net)==pytest.approx(score[0].item(), rel=2e-3)
    assert kid(sets[0][:400], sets[1], net, subset=400, subsets=1)==pytest.approx(score[1][0].item(), rel=1e-2, abs=5e-5)

@pytest.mark.parametrize('shape', [(3,1,28,28),(2,3,40,24)])
def test_torchmetrics_psnr_and_ssim(shape):
    from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure
    a = torch.nn.functional.avg_pool2d(torch.rand(shape), 3, 1, 1); b = (a+.1*torch.randn(shape)).clamp(0,1)
    assert torch.allclose(ssim(a, b, each=True), structural_similarity_index_measure(b, a, data_range=1., reduction='none'), atol=1e-4)
    assert torch.allclose(psnr(a, b, each=True), peak_signal_noise_ratio(b, a, data_range=1., dim=(1,2,3), reduction='none'), atol=1e-3)
    assert psnr((a*255).to(torch.uint8), (b*255).to(torch.uint8))==pytest.approx(psnr(a, b), abs=.3)

@pytest.mark.slow
def test_inception_is_torch_fidelitys(tmp_path, sets, monkeypatch):
    "With random weights in the place of the real file: found in torch's hub folder, and given the bytes that torch-fidelity would be given."
    from torch_fidelity import feature_extractor_inceptionv3 as m
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    with pytest.raises(FileNotFoundError, match='weights-inception.*load\\(.mnist_evaluator'): Inception()
    (tmp_path/'hub'/'checkpoints').mkdir(parents=True)
    with monkeypatch.context() as c:
        c.setattr(m, 'load_state_dict_from_url', lambda *a, **k: None)
        c.setattr(m.FeatureExtractorInceptionV3, 'load_state_dict', lambda *a: None)
        peer = m.FeatureExtractorInceptionV3('inception', ['2048'])
    torch.save(peer.state_dict(), tmp_path/'hub'/'checkpoints'/Inception.file)
    x = sets[0][:2]
    assert torch.equal(image_features(x/255., Inception()), peer(x.expand(-1,3,-1,-1))[0])
    assert fid(torch.eye(4), torch.eye(4), Inception()).name=='fid_inception'


# ---- the real set, kept

def test_evaluation_needs_no_real_pictures(net, tmp_path):
    train,test = Digits(),Digits(split='test')
    save_model(net, tmp_path, name='digits_evaluator')
    Reference.of(test, net, train, sizes=(100,)).save(tmp_path)
    got = evaluate(train.image[:200], train.label[:200], tmp_path)
    ref = Reference.load(tmp_path)
    assert got['n']==200 and ref.floor['100'].keys()==got.keys() and json.dumps(got)
    assert got['fid_digits_evaluator']==pytest.approx(fid(test, train.image[:200], net), rel=.02)  # the weights and features are halves
    with pytest.raises(ValueError, match='pictures \\(1, 16, 16\\)'): evaluate(torch.rand(5,1,28,28), evaluator=tmp_path)
    with pytest.raises(ValueError, match='give the network that made it'): fid(ref, test, Evaluator())
    (tmp_path/'reference.safetensors').write_bytes((tmp_path/'reference.safetensors').read_bytes()[:3000])
    with pytest.raises(ValueError, match='is damaged'): evaluate(test, evaluator=tmp_path)
    (tmp_path/'reference.safetensors').unlink()
    with pytest.raises(FileNotFoundError, match='Reference.of'): evaluate(test, evaluator=tmp_path)

def test_floor_is_of_training_pictures_with_the_labels_of_the_test_set(net):
    "Shown by a training set in which each class is one picture."
    one = torch.stack([torch.full((1,16,16), 25*c, dtype=torch.uint8) for c in range(10)])
    labels = torch.arange(10).repeat_interleave(30)
    test,train = Pictures(one[labels], labels),Pictures(one[labels.flip(0)], labels.flip(0))
    floor = Reference.of(test, net, train, sizes=(300,)).floor
    assert floor['300']['fid_digits_evaluator']==pytest.approx(0, abs=1e-3) and floor['nearest']=={'pixels':0, 'digits_evaluator':pytest.approx(0, abs=1e-2)}

def test_copies_are_found(net):
    train,test = Digits(),Digits(split='test')
    assert memorisation(train.image[:100], train, test)==0 and memorisation(test, train, test, net)==1
    d,i = nearest_neighbours(train.image[7:9].clone(), train)
    assert i.tolist()==[7,8] and d.tolist()==[0,0]


# ---- numbers

def test_scores_are_numbers_with_names(net):
    s = fid(torch.eye(9), torch.eye(9)+1, net)
    assert s.name=='fid_digits_evaluator' and s==pytest.approx(9) and f'{s:.1f}'=='9.0' and json.loads(json.dumps(dict(a=s)))=={'a':float(s)}
    assert pickle.loads(pickle.dumps(s)).name==s.name

def test_scoring_leaves_no_trace(net, sets):
    "Batch size does not matter, and a network in training is put in eval mode first."
    a = image_features(sets[0], net)
    net.train()
    assert torch.allclose(image_features(sets[0], net, batch_size=7), a, atol=1e-4)


# ---- bad input

@pytest.mark.parametrize('bad,says', [
    (torch.rand(4,1,16,16)*2-1, '\\(x\\+1\\)/2'), (torch.rand(4,1,16,16)*255, 'must be in \\[0,1\\]'), (torch.full((4,1,16,16),float('nan')), 'given nan'),
    (torch.rand(1,16,16), '\\(N,C,H,W\\)'), (torch.rand(4,2,16,16), 'C 1 or 3'), (torch.zeros(4,1,16,16).long(), 'torch.int64'), ([1,2], 'given list'),
    (torch.rand(0,1,16,16), 'at least 1'), (torch.rand(4,3,16,16), 'pictures of 1 channels')])
def test_pictures_that_are_none(net, sets, bad, says):
    with pytest.raises(ValueError, match=says): fid(sets[0], bad, net)
    with pytest.raises(ValueError, match=says): label_accuracy(bad, [0]*4, net)

@pytest.mark.parametrize('f,says', [
    (lambda x,net: fid(x, x[:1], net), '1 fake pictures are too few'), (lambda x,net: precision_recall(x, x[:3], net), 'at least 4'), (lambda x,net: fid(x, x), 'give `net`'),
    (lambda x,net: kid(torch.rand(9,2), torch.rand(9,3)), '2 and 3 features'), (lambda x,net: fid(torch.rand(9,2), torch.rand(9,2)/0), 'not finite'),
    (lambda x,net: label_accuracy(x, [0,1], net), 'as many labels'), (lambda x,net: label_accuracy(x[:2], [0,10], net), 'from 0 to 9; given 0 to 10'),
    (lambda x,net: psnr(x, x[:5]), 'differ in shape'), (lambda x,net: ssim(x[...,:5], x[...,:5]), '6×6'), (lambda x,net: nearest_neighbours(x, x[...,:8]), 'of one shape')])
def test_sets_that_cannot_be_compared(net, sets, f, says):
    with pytest.raises(ValueError, match=says): f(sets[0][:20], net)
