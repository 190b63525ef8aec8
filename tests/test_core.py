"Models that come back as they were saved, or say why not; figures that are the same twice."
import json, math, pickle
from copy import deepcopy
import pytest, torch
from PIL import Image
from torch import nn
import fastldm
from fastldm.core import models as core
from fastldm.core import Module, Recorded, fingerprint, from_config, load_model, save_model, set_seed, write_atomic
from fastldm.core import image_grid, save_figure, show_images
from safetensors.torch import load_file, save_file


class Range(Recorded):
    "Recorded, but not a network."
    def __init__(self, low, high=1.): self.low, self.high = low, high

class Net(Module):
    def __init__(self, c_in, c_out=2, *, depth=1, act=torch.relu, **extra):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(c_in if i==0 else c_out, c_out) for i in range(depth))
        self.extra = nn.ModuleDict(extra)
        self.act = act
        self.norm = nn.BatchNorm1d(c_out)
    def forward(self, x):
        for layer in self.layers: x = self.act(layer(x))
        return self.norm(x)

class Wide(Net):
    def __init__(self, c_in, span):
        super().__init__(c_in, 8)
        self.span = span

@pytest.fixture
def saved(tmp_path):
    "The folder of a saved `Net`."
    set_seed(0)
    return save_model(Net(3, 4, depth=2), tmp_path/'net', seed=0)

def weights(folder): return load_file(folder/'model.safetensors')


# ---- the record of a model

def test_positional_keyword_and_default_are_one_record():
    "However the arguments are given, the record is the same, and holds the defaults that can be written."
    assert Net(3, 4, depth=2).config()==Net(depth=2, c_out=4, c_in=3).config()
    assert Net(3).config()['kwargs']==dict(c_in=3, c_out=2, depth=1)          # `act` is left at its default

def test_a_subclass_records_its_own_arguments():
    "The record of a subclass gives that subclass, with the recorded objects that it was given."
    written = json.dumps(Wide(3, span=Range(0.)).config())
    again = from_config(json.loads(written))
    assert type(again) is Wide
    assert again.span.high==1.
    assert again.norm.num_features==8

def test_nested_modules_come_back(tmp_path):
    "A model made of models comes back with the same record and weights, and computes the same."
    model = Net(2, 3, inner=Net(5, 6), other=Net(1)).eval()
    again = load_model(save_model(model, tmp_path/'m'), 'cpu')
    assert again.config()==model.config()
    assert fingerprint(again)==fingerprint(model)
    x = torch.randn(4,5)
    torch.testing.assert_close(again.extra['inner'](x), model.extra['inner'](x), atol=5e-3, rtol=5e-3)

def test_pickle_and_copy_of_a_module_keep_the_record():
    "A copy, and a model sent to another process, have the record of the first."
    model = Net(3, 4)
    assert pickle.loads(pickle.dumps(model)).config()==Net(3, 4).config()
    assert deepcopy(model).config()==Net(3, 4).config()

def test_an_argument_that_cannot_be_written_is_named():
    "A function as an argument is refused by its name."
    model = Net(3, act=torch.tanh)
    with pytest.raises(ValueError, match='Net: argument `act` is a'): model.config()


# ---- saving and loading

def test_weights_are_saved_in_half_precision(saved):
    "Files hold half precision, whole numbers excepted; the model that is loaded has float32, for inference."
    model = load_model(saved, 'cpu')
    assert model.layers[0].weight.dtype==torch.float32
    assert not model.training
    assert model.meta['seed']==0
    assert weights(saved)['layers.0.weight'].dtype==torch.float16
    assert weights(saved)['norm.num_batches_tracked'].dtype==torch.int64

def test_whole_precision_on_request(tmp_path, saved):
    "With `half=False` the file holds the weights exactly."
    model = load_model(saved, 'cpu')
    folder = save_model(model, tmp_path/'whole', half=False)
    assert torch.equal(weights(folder)['layers.0.weight'], model.layers[0].weight)

def test_weights_too_large_for_half_precision(tmp_path):
    "They are refused by name, with what to do: `half=False`, which saves them."
    model = Net(3)
    model.layers[0].bias.data[0] = 1e5
    with pytest.raises(ValueError, match='`layers.0.bias` .*half=False'): save_model(model, tmp_path/'m')
    again = load_model(save_model(model, tmp_path/'m', half=False), 'cpu')
    assert again.layers[0].bias[0]==1e5

def test_loading_draws_no_random_numbers(saved):
    "What is drawn after loading is what would have been drawn without."
    set_seed(1)
    without_loading = torch.rand(3)
    set_seed(1)
    load_model(saved, 'cpu')
    assert torch.equal(without_loading, torch.rand(3))

def die_while_writing(tensors, path, *rest):
    path.write_bytes(b'half')
    raise KeyboardInterrupt

def die_before_renaming(*files): raise KeyboardInterrupt

@pytest.mark.parametrize('function,die', [
    ('safetensors.torch.save_file', die_while_writing),
    ('os.replace', die_before_renaming),
], ids=['writing','renaming'])
def test_a_save_that_fails_leaves_the_old_model(saved, monkeypatch, function, die):
    "Stopped while the weights are written, or before they are renamed: the old model loads, and no half file is left."
    old = fingerprint(load_model(saved, 'cpu'))
    monkeypatch.setattr(function, die)
    with pytest.raises(KeyboardInterrupt): save_model(Net(3, 4, depth=2), saved)
    monkeypatch.undo()
    assert fingerprint(load_model(saved, 'cpu'))==old
    assert sorted(f.name for f in saved.iterdir())==['config.json','model.safetensors']


# ---- files that are not what they should be

def test_missing_folder_and_files(tmp_path, saved):
    "What does not exist is named, with what a model's folder holds."
    needs = 'nowhere does not exist.*config.json and model.safetensors'
    with pytest.raises(FileNotFoundError, match=needs): load_model(tmp_path/'nowhere')
    (saved/'config.json').rename(tmp_path/'config.json')
    with pytest.raises(FileNotFoundError, match='config.json does not exist'): load_model(saved)

@pytest.mark.parametrize('name', ['model.pt','model.pth','pytorch_model.bin','last.ckpt','weights.pkl'])
def test_a_pickle_is_refused(tmp_path, name):
    "A pickle, or a folder that holds one in place of a model, is refused by its name."
    torch.save(Net(3).state_dict(), tmp_path/name)
    for path in (tmp_path/name, tmp_path):
        with pytest.raises(ValueError, match=f'{name} is a pickle.*never loads one.*save_model'): load_model(path)

class Evil:
    "A pickle of it runs a program when it is read."
    def __reduce__(self): return (pytest.fail, ('code of a pickle was run',))

def torch_zip(path): torch.save(Evil(), path)
def torch_legacy(path): torch.save(Evil(), path, _use_new_zipfile_serialization=False)
def bare_pickle(path): path.write_bytes(pickle.dumps(Evil()))

@pytest.mark.parametrize('dump', [torch_zip, bare_pickle, torch_legacy])
def test_a_pickle_under_another_name_runs_nothing(saved, dump):
    "A pickle that is called model.safetensors is refused without being read."
    dump(saved/'model.safetensors')
    with pytest.raises(ValueError, match='is a pickle'): load_model(saved)

def test_damaged_weights(saved):
    "Weights cut short, empty, or of no known format are called damaged."
    good = (saved/'model.safetensors').read_bytes()
    for bad in (good[:len(good)//2], b'', b'nonsense'*9):
        (saved/'model.safetensors').write_bytes(bad)
        with pytest.raises(ValueError, match='model.safetensors is damaged'): load_model(saved)

@pytest.mark.parametrize('bad', ['{"config"', '[]', '{"config": {}}'])
def test_damaged_record(saved, bad):
    "A record cut short, of another kind, or without what it needs is called damaged."
    (saved/'config.json').write_text(bad)
    with pytest.raises(ValueError, match='config.json is damaged'): load_model(saved)


# ---- weights that are not those of the model

def test_a_tensor_is_missing(saved):
    "The tensor that is missing is named."
    tensors = weights(saved)
    del tensors['layers.1.weight']
    save_file(tensors, saved/'model.safetensors')
    with pytest.raises(ValueError, match='`layers.1.weight` is missing'): load_model(saved)

def test_a_tensor_is_not_expected(saved):
    "The tensor that the model does not have is named."
    tensors = weights(saved)
    tensors['layers.7.weight'] = tensors['layers.1.weight'].clone()
    save_file(tensors, saved/'model.safetensors')
    with pytest.raises(ValueError, match='`layers.7.weight` is not part of the model'): load_model(saved)

def test_a_tensor_has_another_shape(saved):
    "The tensor is named, with the shape that it has and the one that the model needs."
    tensors = weights(saved)
    tensors['layers.1.weight'] = tensors['layers.1.weight'][:2].clone()
    save_file(tensors, saved/'model.safetensors')
    says = r'`layers.1.weight` is \(2, 4\), the model needs \(4, 4\)'
    with pytest.raises(ValueError, match=says): load_model(saved)

def test_a_number_was_altered(saved):
    "One weight that differs by a hundredth is noticed."
    tensors = weights(saved)
    tensors['layers.1.weight'][0,0] += .01
    save_file(tensors, saved/'model.safetensors')
    with pytest.raises(ValueError, match='altered after they were saved'): load_model(saved)

def test_weights_of_another_architecture(tmp_path, saved):
    "Weights of another network of the same class are refused as such, with the name of the class."
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
    (dict(kwargs=dict(c_in=3, depth='two')), 'does not take the recorded arguments'),
])
def test_a_class_that_is_not_there(saved, record, match):
    "A record that was altered is refused; one that was saved so is refused too, and nothing but a Module is called."
    info = json.loads((saved/'config.json').read_text())
    info['config'].update(record)
    (saved/'config.json').write_text(json.dumps(info))
    with pytest.raises(ValueError, match='the record was altered'): load_model(saved)
    info['config_fingerprint'] = core.config_fingerprint(info['config'])      # as if it had been saved so
    (saved/'config.json').write_text(json.dumps(info))
    with pytest.raises(ValueError, match=match): load_model(saved)


# ---- files and figures

def test_write_atomic_replaces_whole_files_only(tmp_path):
    "The file appears when all of it is written, and stays as it was, alone in its folder, when writing fails."
    path = tmp_path/'deep'/'a.txt'
    with write_atomic(path) as draft:
        draft.write_text('one')
        assert not path.exists()
        assert draft.parent==path.parent
        assert draft.suffix=='.txt'
    with pytest.raises(RuntimeError), write_atomic(path) as draft:
        draft.write_text('tw')
        raise RuntimeError
    assert path.read_text()=='one'
    assert [*path.parent.iterdir()]==[path]

def test_grid_places_every_picture():
    "Row by row, with white between the pictures and where there are none."
    n, height, width, pad = 5, 2, 3, 2
    grey = torch.arange(n)/4
    grid = image_grid(grey.view(n,1,1,1).expand(n,1,height,width), ncol=3, pad=pad)
    assert grid.shape==(2*height+pad, 3*width+2*pad, 3)
    for i in range(n):
        row, col = divmod(i, 3)
        top, left = row*(height+pad), col*(width+pad)
        assert (grid[top:top+height, left:left+width]==round(i/4*255)).all()
    assert (grid[height:height+pad]==255).all()
    assert (grid[height+pad:, 2*(width+pad):]==255).all()

def test_grid_takes_colour_bytes_and_pictures():
    "Red is red, as numbers from -1 to 1, as bytes and as a picture."
    red = torch.tensor([1.,-1,-1]).view(1,3,1,1).expand(1,3,2,2)
    for pictures in (red, ((red+1)*127.5).byte(), [Image.new('RGB', (2,2), 'red')]):
        assert (image_grid(pictures)==[255,0,0]).all()

def test_a_figure_is_the_same_twice(tmp_path):
    "Both files, byte for byte; and the record holds the numbers, and nothing of the machine."
    fade = torch.linspace(-1,1,4).view(4,1,1,1).expand(4,1,6,6)
    def draw(folder):
        fig = show_images(fade, titles='abcd')
        save_figure('f', fig, tmp_path/folder, seed=3, weights='abc', fid=torch.tensor(2.5), path=[1,2])
    draw('a')
    draw('b')
    assert (tmp_path/'a'/'f.png').read_bytes()==(tmp_path/'b'/'f.png').read_bytes()
    assert (tmp_path/'a'/'f.json').read_bytes()==(tmp_path/'b'/'f.json').read_bytes()
    record = json.loads((tmp_path/'a'/'f.json').read_text())
    assert record['numbers']==dict(fid=2.5, path=[1,2])
    assert record['seed']==3
    assert record['weights']=='abc'
    assert record['version']==fastldm.__version__
    with Image.open(tmp_path/'a'/'f.png') as picture:
        assert not picture.text
        assert picture.width>picture.height>50

@pytest.mark.parametrize('old,new', [(2.5,math.nan), (math.nan,2.5), (True,False), (2.5,None), ('a','b')])
def test_a_figure_is_written_again_where_a_number_or_bool_has_moved(tmp_path, old, new):
    "A score that turns NaN and a yes that turns no are changes; the same value is none."
    def written(value):
        picture = save_figure('f', Image.new('L', (8,8)), tmp_path, score=value)
        return picture.stat().st_mtime_ns
    first = written(old)
    assert written(old)==first
    assert written(new)>first

def test_a_mask_is_black_and_white():
    "Bools are 0 and 255, not 0 and 1."
    assert (image_grid(torch.ones(1,1,2,2, dtype=torch.bool))==255).all()
