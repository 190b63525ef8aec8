"ONNX: the graphs of a model compute what the model does, for every batch; what is refused; what a failure leaves."
import json
import numpy as np
import pytest
import torch
from fastldm import load
from fastldm.diffusion import (Conditioner, Cosine, Denoiser, Flow, LatentDiffusion, NumberEmbedder, PixelSpace,
                               TextEmbedder, UNet, compare_onnx, export_onnx)

onnxruntime = pytest.importorskip('onnxruntime')
pytest.importorskip('onnxscript')

def tiny(schedule=None, **embedders):
    "An untrained model that is quickly exported."
    torch.manual_seed(0)
    net = UNet(1, (8,16), d_emb=16)
    for p in net.parameters(): p.data += .05*torch.randn_like(p)
    conditioner = Conditioner(**embedders) if embedders else None
    return LatentDiffusion(PixelSpace(), Denoiser(net, schedule or Cosine(), conditioner), (1,8,8)).eval()

@pytest.mark.slow
def test_without_conditions(tmp_path):
    "The denoiser takes x and t alone; and the times are as many as asked for."
    ldm = tiny(Flow())
    folder = export_onnx(ldm, tmp_path/'a'/'b', steps=3)
    session = onnxruntime.InferenceSession(folder/'denoiser.onnx')
    assert [i.name for i in session.get_inputs()]==['x','t']
    assert max(compare_onnx(ldm, folder, sizes=(1,2,7)).values())<1e-4
    info = json.loads((folder/'model.json').read_text())
    assert len(info['times'])==4 and info['times'][-1]==0 and info['alphas'][-1]==1 and info['sigmas'][-1]==0
    assert info['conditions']=={} and info['opset']==20
    assert {file.name for file in folder.iterdir()}=={'decoder.onnx','denoiser.onnx','model.json'}

@pytest.mark.slow
def test_graphs_that_differ(tmp_path):
    "They are not kept, and what was there before is."
    (tmp_path/'decoder.onnx').write_bytes(b'of before')
    with pytest.raises(ValueError, match='the graphs differ from the model by'):
        export_onnx(tiny(Flow()), tmp_path, tolerance=0.)
    assert [file.read_bytes() for file in tmp_path.iterdir()]==[b'of before']

@pytest.mark.slow
def test_half_precision_is_exported_in_single(tmp_path):
    "A model in 16 bit stays as it is, and its graphs take and give 32."
    ldm = tiny(length=NumberEmbedder(16)).half()
    folder = export_onnx(ldm, tmp_path)
    assert next(ldm.parameters()).dtype==torch.half
    session = onnxruntime.InferenceSession(folder/'denoiser.onnx')
    assert [i.type for i in session.get_inputs()]==['tensor(float)','tensor(double)','tensor(float)']
    assert json.loads((folder/'model.json').read_text())['conditions']['length']['null'] is None
    x = np.zeros((2,1,8,8), 'float32')
    t = np.full(2, .5)
    short, long = (session.run(None, dict(x=x, t=t, length=np.full(2, v, 'float32')))[0] for v in (.1, .9))
    none, = session.run(None, dict(x=x, t=t, length=np.full(2, np.nan, 'float32')))
    assert np.isfinite(none).all() and abs(short-long).max()>1e-4 and abs(short-none).max()>1e-4

@pytest.mark.slow
@pytest.mark.parametrize('name', ['avatars','mnist_tutorial'])
def test_shipped(name, tmp_path):
    "Attributes and a mask, and the tutorial's network: within 1e-4 for several batches, with random conditions."
    ldm = load(name, 'cpu')
    folder = export_onnx(ldm, tmp_path)
    session = onnxruntime.InferenceSession(folder/'denoiser.onnx')
    conditioner = ldm.denoiser.conditioner
    for n in (1,4,9):
        fields = {key: torch.randint(int(field.max())+1, field.shape)
                  for key,field in ((key, e.empty(n)) for key,e in conditioner.embedders.items())}
        x, t = torch.randn(n, *ldm.shape), torch.rand(n).double()*.9+.1
        with torch.no_grad(): expected = ldm.denoiser(x, t, conditioner(fields))
        inputs = {key: value.numpy() for key,value in dict(x=x, t=t, **fields).items()}
        found, = session.run(None, inputs)
        assert np.abs(found-expected.numpy()).max()<1e-4*max(1, expected.abs().max())

@pytest.mark.slow
def test_a_text_of_any_length(tmp_path):
    "The graph had two rows of a text, as no text has, and took no other."
    torch.manual_seed(0)
    conditioner = Conditioner(text=TextEmbedder(12, 16, 16))
    net = UNet(1, (8,16), d_emb=16, d_context=16, attention=(False,True))
    for p in net.parameters(): p.data += .05*torch.randn_like(p)
    ldm = LatentDiffusion(PixelSpace(), Denoiser(net, Cosine(), conditioner), (1,8,8)).eval()
    folder = export_onnx(ldm, tmp_path)
    session = onnxruntime.InferenceSession(folder/'denoiser.onnx')
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([.3,.8]).double()
    def of_graph(text): return session.run(None, dict(x=x.numpy(), t=t.numpy(), text=text.numpy()))[0]
    for rows in (3, 4, 17):
        text = torch.randn(2, rows, 12)
        with torch.no_grad(): expected = ldm.denoiser(x, t, conditioner(dict(text=text))).numpy()
        assert np.abs(of_graph(text)-expected).max()<1e-4
    null = torch.tensor(json.loads((folder/'model.json').read_text())['conditions']['text']['null'])
    with torch.no_grad(): expected = ldm.denoiser(x, t, conditioner(dict(text=conditioner.embedders['text'].empty(2))))
    assert np.abs(of_graph(null.expand(2, -1, -1))-expected.numpy()).max()<1e-4

class Moody(PixelSpace):
    "Its picture depends on a value, by a branch in Python."
    def decode_raw(self, z): return z if z.sum()>0 else -z

@pytest.mark.slow
def test_what_cannot_be_a_graph(tmp_path):
    "The error says which part, and why; nothing is left."
    ldm = tiny()
    ldm.autoencoder = Moody()
    with pytest.raises(ValueError, match='cannot write what computes `image` as a graph'): export_onnx(ldm, tmp_path)
    assert not [*tmp_path.iterdir()]

def test_a_missing_package(monkeypatch, tmp_path):
    "The error names the extra, before any file is written."
    monkeypatch.setitem(__import__('sys').modules, 'onnxscript', None)
    with pytest.raises(ImportError, match=r'pip install "fastldm\[export\]"'): export_onnx(tiny(), tmp_path/'out')
    assert not (tmp_path/'out').exists()

def test_no_diffusion(tmp_path):
    with pytest.raises(ValueError, match='FaceClassifier has no denoiser'):
        export_onnx(load('avatars_classifier', 'cpu'), tmp_path)
