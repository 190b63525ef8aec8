"Our scores against those of torch-fidelity and torchmetrics; and pictures that cannot be scored."
import json, pickle
import pytest, torch
import torch.nn.functional as F
from fastldm.core import save_model, set_seed
from fastldm.data import Digits, Pictures, to_image
from fastldm.metrics import Evaluator, Inception, Reference, evaluate, fid, image_features, kid, label_accuracy
from fastldm.metrics import memorisation, nearest_neighbours, precision_recall, psnr, register_evaluator, ssim

@pytest.fixture(scope='module')
def net():
    "An evaluator whose features spread: untrained, but with statistics of the digits."
    set_seed(0)
    net = Evaluator(channels=(8,16), hidden=12)
    digits = Digits()[:200]['image']
    for _ in range(20):
        with torch.no_grad(): net(torch.cat([digits, digits.roll(2,2)]))
    torch.nn.init.normal_(net.head[0].weight, 0, 2)
    net.meta = dict(name='digits_evaluator')
    return net.eval()

@pytest.fixture(scope='module')
def sets():
    "Real and changed pictures, bytes."
    real = Digits()[:600]['image']
    fake = Digits()[600:1000]['image']
    generator = torch.Generator().manual_seed(0)
    fake = (fake*.6+.3*torch.randn(fake.shape, generator=generator)).clamp(-1,1)
    return tuple(((x+1)*127.5).round().to(torch.uint8) for x in (real,fake))

class Bytes(torch.utils.data.Dataset):
    "Pictures as torch-fidelity takes them."
    def __init__(self, x): self.x = x
    def __len__(self): return len(self.x)
    def __getitem__(self, i): return self.x[i]

def theirs(real, fake, net):
    "Scores by torch-fidelity, of tensors or folders."
    from torch_fidelity import calculate_metrics
    inputs = [x if isinstance(x, str) else Bytes(x) for x in (fake,real)]
    return calculate_metrics(
        input1=inputs[0], input2=inputs[1], feature_extractor=register_evaluator(net), cuda=False, cache=False,
        save_cpu_ram=True, verbose=False, fid=True, kid=True, prc=True, kid_subset_size=300, kid_subsets=20)

def ours(real, fake, net):
    "The same scores by ours, under their names."
    precision, recall = precision_recall(real, fake, net)
    return dict(frechet_inception_distance=fid(real, fake, net), precision=precision, recall=recall,
                kernel_inception_distance_mean=kid(real, fake, net, subset=300, subsets=20))

def assert_close(a, b):
    assert a=={name: pytest.approx(b[name], rel=2e-3, abs=1e-6) for name in a}


# ---- against others

def test_torch_fidelity_from_pictures_to_number(net, sets):
    scores = ours(*sets, net)
    assert_close(scores, theirs(*sets, net))
    assert scores['frechet_inception_distance']>.01 and scores['precision']<1         # the sets differ

def test_floats_bytes_and_png_files_score_the_same(sets, tmp_path):
    "Colour, read by torch-fidelity from a folder; ours from floats in memory."
    tint = torch.tensor([1,2,3], dtype=torch.uint8).view(1,3,1,1)
    real, fake = (x.expand(-1,3,-1,-1)//tint for x in sets)
    net = Evaluator(c_in=3, channels=(8,16), hidden=12).eval()
    for name,x in dict(real=real, fake=fake).items():
        (tmp_path/name).mkdir()
        for i,picture in enumerate(x): to_image(picture.float()/127.5-1).save(tmp_path/name/f'{i:04}.png')
    from_files = theirs(str(tmp_path/'real'), str(tmp_path/'fake'), net)
    for x in (fake, fake/255.): assert_close(ours(real, x, net), from_files)

def test_torchmetrics_fid_and_kid(net, sets):
    "An implementation that shares no code with torch-fidelity's."
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.kid import KernelInceptionDistance
    class Features(torch.nn.Module):
        num_features = 16
        def forward(self, x): return net.features(x/127.5-1)
    real, fake = sets[0][:400], sets[1]
    def computed(metric):
        metric.update(real, real=True)
        metric.update(fake, real=False)
        return metric.compute()
    their_fid = computed(FrechetInceptionDistance(feature=Features())).item()
    their_kid = computed(KernelInceptionDistance(feature=Features(), subsets=1, subset_size=400))[0].item()
    assert fid(real, fake, net)==pytest.approx(their_fid, rel=2e-3)
    assert kid(real, fake, net, subset=400, subsets=1)==pytest.approx(their_kid, rel=1e-2, abs=5e-5)

@pytest.mark.parametrize('shape', [(3,1,28,28),(2,3,40,24)])
def test_torchmetrics_psnr_and_ssim(shape):
    from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure
    a = F.avg_pool2d(torch.rand(shape), 3, 1, 1)
    b = (a+.1*torch.randn(shape)).clamp(0,1)
    their_ssim = structural_similarity_index_measure(b, a, data_range=1., reduction='none')
    their_psnr = peak_signal_noise_ratio(b, a, data_range=1., dim=(1,2,3), reduction='none')
    assert torch.allclose(ssim(a, b, each=True), their_ssim, atol=1e-4)
    assert torch.allclose(psnr(a, b, each=True), their_psnr, atol=1e-3)
    assert psnr((a*255).to(torch.uint8), (b*255).to(torch.uint8))==pytest.approx(psnr(a, b), abs=.3)

@pytest.mark.slow
def test_inception_is_torch_fidelitys(tmp_path, sets, monkeypatch):
    """With random weights in the place of the real file: found in torch's hub folder, and given the bytes that
    torch-fidelity would be given."""
    from torch_fidelity import feature_extractor_inceptionv3 as module
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    with pytest.raises(FileNotFoundError, match='weights-inception.*load\\(.mnist_evaluator'): Inception()
    folder = tmp_path/'hub'/'checkpoints'
    folder.mkdir(parents=True)
    with monkeypatch.context() as patched:
        patched.setattr(module, 'load_state_dict_from_url', lambda *a, **k: None)
        patched.setattr(module.FeatureExtractorInceptionV3, 'load_state_dict', lambda *a: None)
        peer = module.FeatureExtractorInceptionV3('inception', ['2048'])
    torch.save(peer.state_dict(), folder/Inception.file)
    x = sets[0][:2]
    assert torch.equal(image_features(x/255., Inception()), peer(x.expand(-1,3,-1,-1))[0])
    assert fid(torch.eye(4), torch.eye(4), Inception()).name=='fid_inception'


# ---- the real set, stored

@pytest.fixture
def stored(net, tmp_path):
    "An evaluator and its reference in a folder."
    save_model(net, tmp_path, name='digits_evaluator')
    Reference.of(Digits(split='test'), net, Digits(), sizes=(100,)).save(tmp_path)
    return tmp_path

def test_evaluation_needs_no_real_pictures(net, stored):
    train = Digits()
    scores = evaluate(train.image[:200], train.label[:200], stored)
    assert scores['n']==200 and Reference.load(stored).train_scores['100'].keys()==scores.keys() and json.dumps(scores)
    exact = fid(Digits(split='test'), train.image[:200], net)
    assert scores['fid_digits_evaluator']==pytest.approx(exact, rel=.02)     # weights and features are halves

def test_a_reference_of_another_network_or_damaged(stored):
    test = Digits(split='test')
    reference = Reference.load(stored)
    with pytest.raises(ValueError, match='pictures \\(1, 16, 16\\)'): evaluate(torch.rand(5,1,28,28), evaluator=stored)
    with pytest.raises(ValueError, match='give the network that made it'): fid(reference, test, Evaluator())
    file = stored/'reference.safetensors'
    file.write_bytes(file.read_bytes()[:3000])
    with pytest.raises(ValueError, match='is damaged'): evaluate(test, evaluator=stored)
    file.unlink()
    with pytest.raises(FileNotFoundError, match='Reference.of'): evaluate(test, evaluator=stored)

def test_train_scores_are_of_pictures_with_the_labels_of_the_test_set(net):
    "Shown by a training set in which each class is one picture."
    shades = torch.stack([torch.full((1,16,16), 25*c, dtype=torch.uint8) for c in range(10)])
    labels = torch.arange(10).repeat_interleave(30)
    backwards = labels.flip(0)
    test, train = Pictures(shades[labels], labels), Pictures(shades[backwards], backwards)
    train_scores = Reference.of(test, net, train, sizes=(300,)).train_scores
    assert train_scores['300']['fid_digits_evaluator']==pytest.approx(0, abs=1e-3)
    assert train_scores['nearest']=={'pixels': 0, 'digits_evaluator': pytest.approx(0, abs=1e-2)}

def test_copies_are_found(net):
    train, test = Digits(), Digits(split='test')
    assert memorisation(train.image[:100], train, test)==0 and memorisation(test, train, test, net)==1
    distances, indices = nearest_neighbours(train.image[7:9].clone(), train)
    assert indices.tolist()==[7,8] and distances.tolist()==[0,0]


# ---- numbers

def test_scores_are_numbers_with_names(net):
    score = fid(torch.eye(9), torch.eye(9)+1, net)
    assert score.name=='fid_digits_evaluator' and score==pytest.approx(9) and f'{score:.1f}'=='9.0'
    assert json.loads(json.dumps(dict(a=score)))=={'a': float(score)}
    assert pickle.loads(pickle.dumps(score)).name==score.name

def test_scoring_leaves_no_trace(net, sets):
    "Batch size does not matter, and a network in training is put in eval mode first."
    features = image_features(sets[0], net)
    net.train()
    assert torch.allclose(image_features(sets[0], net, batch_size=7), features, atol=1e-4)


# ---- bad input

@pytest.mark.parametrize('bad,says', [
    (torch.rand(4,1,16,16)*2-1, '\\(x\\+1\\)/2'),
    (torch.rand(4,1,16,16)*255, 'must be in \\[0,1\\]'),
    (torch.full((4,1,16,16), float('nan')), 'given nan'),
    (torch.rand(1,16,16), '\\(N,C,H,W\\)'),
    (torch.rand(4,2,16,16), 'C 1 or 3'),
    (torch.zeros(4,1,16,16).long(), 'torch.int64'),
    ([1,2], 'given list'),
    (torch.rand(0,1,16,16), 'at least 1'),
    (torch.rand(4,3,16,16), 'pictures of 1 channels'),
])
def test_pictures_that_are_none(net, sets, bad, says):
    with pytest.raises(ValueError, match=says): fid(sets[0], bad, net)
    with pytest.raises(ValueError, match=says): label_accuracy(bad, [0]*4, net)

@pytest.mark.parametrize('score,says', [
    (lambda x,net: fid(x, x[:1], net), '1 fake pictures are too few'),
    (lambda x,net: precision_recall(x, x[:3], net), 'at least 4'),
    (lambda x,net: fid(x, x), 'give `net`'),
    (lambda x,net: kid(torch.rand(9,2), torch.rand(9,3)), '2 and 3 features'),
    (lambda x,net: fid(torch.rand(9,2), torch.rand(9,2)/0), 'not finite'),
    (lambda x,net: label_accuracy(x, [0,1], net), 'as many labels'),
    (lambda x,net: label_accuracy(x[:2], [0,10], net), 'from 0 to 9; given 0 to 10'),
    (lambda x,net: psnr(x, x[:5]), 'differ in shape'),
    (lambda x,net: ssim(x[...,:5], x[...,:5]), '6×6'),
    (lambda x,net: nearest_neighbours(x, x[...,:8]), 'of one shape'),
])
def test_sets_that_cannot_be_compared(net, sets, score, says):
    with pytest.raises(ValueError, match=says): score(sets[0][:20], net)
