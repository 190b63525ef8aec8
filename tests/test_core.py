"Models that come back as they were saved, or say why not; figures that are the same twice."
import json, pickle
import pytest, torch
from PIL import Image
from torch import nn
import fastldm
from fastldm.core import models as core
from fastldm.core import Module, Recorded, fingerprint, from_config, image_grid, load_model, save_figure, save_model, set_seed, show_images, write_atomic
from safetensors.torch import load_file, save_file


class Range(Recorded):
    "Recorded, but not a network."
    def __init__(self, low, high=1.): self.low,self.high = low,high

class Net(Module):
    def __init__(self, c_in, c_out=2, *, depth=1, act=torch.relu, **extra):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(c_in if i==0 else c_out, c_out) for i in range(depth))
        self.extra,self.act = nn.ModuleDict(extra),act
        self.norm = nn.BatchNorm1d(c_out)
    def forward(self, x):
        for l in self.layers: x = self.act(l(x))
        return self.norm(x)

class Wide(Net):
    def __init__(self, c_in, span): super().__init__(c_in, 8); self.span = span


@pytest.fixture
def saved(tmp_path):
    set_seed(0)
    return save_model(Net(3, 4, depth=2), tmp_path/'net', seed=0)

def change(folder, **tensors):
    "Rewrite the weights; None drops a tensor."
    w = {**load_file(folder/'model.safetensors'), **tensors}
    save_file({k:v for k,v in w.items() if v is not None}, folder/'model.safetensors')


def test_positional_keyword_and_default_are_one_record():
    assert Net(3, 4, depth=2).config() == Net(depth=2, c_out=4, c_in=3).config()
    assert Net(3).config()['kwargs'] == dict(c_in=3, c_out=2, depth=1)          # `act` is left at its default

def test_a_subclass_records_its_own_arguments():
    m = Wide(3, span=Range(0.))
    again = from_config(json.loads(json.dumps(m.config())))
    assert type(again) is Wide and again.span.high==1. and again.norm.num_features==8

def test_nested_modules_come_back(tmp_path):
    m = Net(2, 3, inner=Net(5, 6), other=Net(1)).eval()
    again = load_model(save_model(m, tmp_path/'m'), 'cpu')
    assert again.config()==m.config() and fingerprint(again)==fingerprint(m)
    x = torch.randn(4,5)
    torch.testing.assert_close(again.extra['inner'](x), m.extra['inner'](x), atol=5e-3, rtol=5e-3)

def test_pickle_and_copy_of_a_module_keep_the_record():
    m = pickle.loads(pickle.dumps(Net(3, 4)))
    assert m.config()==Net(3, 4).config()

def test_an_argument_that_cannot_be_written_is_named():
    with pytest.raises(ValueError, match='Net: argument `act` is a'): Net(3, act=torch.tanh).config()

def test_half_precision_and_whole(tmp_path, saved):
    m = load_model(saved, 'cpu')
    assert m.layers[0].weight.dtype==torch.float32 and not m.training and m.meta['seed']==0
    assert load_file(saved/'model.safetensors')['layers.0.weight'].dtype==torch.float16
    assert load_file(saved/'model.safetensors')['norm.num_batches_tracked'].dtype==torch.int64
    f = save_model(m, tmp_path/'whole', half=False)
    assert torch.equal(load_file(f/'model.safetensors')['layers.0.weight'], m.layers[0].weight)

def test_weights_too_large_for_half_precision(tmp_path):
    m = Net(3)
    m.layers[0].bias.data[0] = 1e5
    with pytest.raises(ValueError, match='`layers.0.bias` .*half=False'): save_model(m, tmp_path/'m')
    assert load_model(save_model(m, tmp_path/'m', half=False), 'cpu').layers[0].bias[0]==1e5

def test_loading_draws_no_random_numbers(saved):
    set_seed(1); a = torch.rand(3)
    set_seed(1); load_model(saved, 'cpu')
    assert torch.equal(a, torch.rand(3))

@pytest.mark.parametrize('half_written', ['save_file','replace'])
def test_a_save_that_fails_leaves_the_old_model(saved, monkeypatch, half_written):
    "Killed while the weights are written, or before they are renamed."
    def die(tensors, path, *a):
        if half_written=='save_file': path.write_bytes(b'half')
        raise KeyboardInterrupt
    monkeypatch.setattr(*(('safetensors.torch.save_file',) if half_written=='save_file' else (core.os,'replace')), die)
    old = fingerprint(load_model(saved, 'cpu'))
    with pytest.raises(KeyboardInterrupt): save_model(Net(3, 4, depth=2), saved)
    monkeypatch.undo()
    assert fingerprint(load_model(saved, 'cpu'))==old
    assert sorted(f.name for f in saved.iterdir())==['config.json','model.safetensors']


# what can be wrong with a checkpoint

def test_missing_folder_and_files(tmp_path, saved):
    with pytest.raises(FileNotFoundError, match='nowhere does not exist.*config.json and model.safetensors'): load_model(tmp_path/'nowhere')
    (saved/'config.json').rename(tmp_path/'config.json')
    with pytest.raises(FileNotFoundError, match='config.json does not exist'): load_model(saved)

@pytest.mark.parametrize('name', ['model.pt','model.pth','pytorch_model.bin','last.ckpt','weights.pkl'])
def test_a_pickle_is_refused(tmp_path, name):
    torch.save(Net(3).state_dict(), tmp_path/name)
    for path in (tmp_path/name, tmp_path):
        with pytest.raises(ValueError, match=f'{name} is a pickle.*never loads one.*save_model'): load_model(path)

def test_a_pickle_under_another_name_runs_nothing(saved):
    class Evil:
        def __reduce__(self): return (pytest.fail, ('code of a pickle was run',))
    for dump in (lambda f: torch.save(Evil(), f), lambda f: f.write_bytes(pickle.dumps(Evil())), lambda f: torch.save(Evil(), f, _use_new_zipfile_serialization=False)):
        dump(saved/'model.safetensors')
        with pytest.raises(ValueError, match='is a pickle'): load_model(saved)

def test_damaged_files(saved):
    raw = (saved/'model.safetensors').read_bytes()
    for bad in (raw[:len(raw)//2], b'', b'nonsense'*9):
        (saved/'model.safetensors').write_bytes(bad)
        with pytest.raises(ValueError, match='model.safetensors is damaged'): load_model(saved)
    for bad in ('{"config"', '[]', '{"config": {}}'):
        (saved/'config.json').write_text(bad)
        with pytest.raises(ValueError, match='config.json is damaged'): load_model(saved)

def test_tensor_missing_unexpected_of_another_shape_altered(saved):
    w = load_file(saved/'model.safetensors')['layers.1.weight']
    for tensors,match in ({'layers.1.weight':None}, '`layers.1.weight` is missing'), ({'layers.7.weight':w}, '`layers.7.weight` is not part of the model'), \
                         ({'layers.1.weight':w[:2].clone()}, r'`layers.1.weight` is \(2, 4\), the model needs \(4, 4\)'):
        whole = (saved/'model.safetensors').read_bytes()
        change(saved, **tensors)
        with pytest.raises(ValueError, match=match): load_model(saved)
        (saved/'model.safetensors').write_bytes(whole)
    w[0,0] += .01
    change(saved, **{'layers.1.weight':w})
    with pytest.raises(ValueError, match='altered after they were saved'): load_model(saved)

def test_weights_of_another_architecture(tmp_path, saved):
    other = save_model(Net(3, 5, depth=4), tmp_path/'other')
    (other/'model.safetensors').replace(saved/'model.safetensors')
    with pytest.raises(ValueError, match='not those of the Net: .*another architecture'): load_model(saved)

@pytest.mark.parametrize('record,match', [
    (dict(module='some_project.nets'), '`import some_project.nets` first'),
    (dict(module='fastldm.nets'), 'upgrade fastldm'),
    (dict(cls='Gone'), 'there is no such Module'),
    (dict(module='os', cls='system', kwargs=dict(command='true')), 'there is no such Module'),
    (dict(module='builtins', cls='dict'), 'there is no such Module'),
    (dict(kwargs=dict(c_out=3)), "does not take the recorded arguments.*'c_in'"),
    (dict(kwargs=dict(c_in=3, depth='two')), 'does not take the recorded arguments')])
def test_a_class_that_is_not_there(saved, record, match):
    info = json.loads((saved/'config.json').read_text())
    info['config'].update(record)
    (saved/'config.json').write_text(json.dumps(info))
    with pytest.raises(ValueError, match='the record was altered'): load_model(saved)
    (saved/'config.json').write_text(json.dumps({**info, 'config_fingerprint':core.config_fingerprint(info['config'])}))   # as if it had been saved so
    with pytest.raises(ValueError, match=match): load_model(saved)


# files and figures

def test_write_atomic_replaces_whole_files_only(tmp_path):
    f = tmp_path/'deep'/'a.txt'
    with write_atomic(f) as t: t.write_text('one'); assert not f.exists() and t.parent==f.parent and t.suffix=='.txt'
    with pytest.raises(RuntimeError):
        with write_atomic(f) as t: t.write_text('tw'); raise RuntimeError
    assert f.read_text()=='one' and len(list(f.parent.iterdir()))==1

def test_grid_places_every_picture():
    x = torch.arange(5).view(5,1,1,1).expand(5,1,2,3)/4
    g = image_grid(x, ncol=3, pad=2)
    assert g.shape==(2*2+2, 3*3+2*2, 3)
    for i in range(5): assert (g[i//3*4:i//3*4+2, i%3*5:i%3*5+3]==round(i/4*255)).all()
    assert (g[4:, 10:]==255).all() and (g[2:4]==255).all()

def test_grid_takes_colour_bytes_and_pictures():
    red = torch.tensor([1.,-1,-1]).view(3,1,1).expand(3,2,2)
    for x in (red[None], ((red+1)*127.5).byte()[None], [Image.new('RGB', (2,2), 'red')]):
        assert (image_grid(x)==[255,0,0]).all()

def test_a_figure_is_the_same_twice(tmp_path):
    "Both files, byte for byte; and the record holds the numbers, and nothing of the machine."
    fade = torch.linspace(-1,1,4).view(4,1,1,1).expand(4,1,6,6)
    def draw(folder):
        fig = show_images(fade, titles='abcd')
        save_figure('f', fig, tmp_path/folder, seed=3, weights='abc', fid=torch.tensor(2.5), path=[1,2])
    draw('a')
    draw('b')
    for name in ('f.png','f.json'): assert (tmp_path/'a'/name).read_bytes()==(tmp_path/'b'/name).read_bytes()
    record = json.loads((tmp_path/'a'/'f.json').read_text())
    assert record['numbers']==dict(fid=2.5, path=[1,2])
    assert record['seed']==3 and record['weights']=='abc' and record['version']==fastldm.__version__
    with Image.open(tmp_path/'a'/'f.png') as picture:
        assert not picture.text
        assert picture.width>picture.height>50
