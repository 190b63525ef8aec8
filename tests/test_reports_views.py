"Adapters of models that were trained with views, and of models with a condition that is called `caption`."
import pytest
from PIL import Image
from fastldm.recipes import own_ldm, train_adapter

TINY = dict(size=16, steps=2, batch_size=4, progress=False)
SIZES = dict(c_latent=2, ae_channels=(8,8), ae_steps=2, channels=(8,16))

@pytest.fixture
def pictures(tmp_path):
    "Eight pictures of two classes, and a table that says something of each."
    folder = tmp_path/'pictures'
    rows = ['file,caption']
    for i in range(8):
        name = f'{"ab"[i%2]}/{i}.png'
        (folder/name).parent.mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (16,16), (30*i, 255-30*i, 90)).save(folder/name)
        rows.append(f'{name},{"red dot" if i%2 else "blue dot"}')
    (tmp_path/'words.csv').write_text('\n'.join(rows))
    return folder

def adapter_of(model, tmp_path):
    return train_adapter(str(model), str(tmp_path/'adapter'), steps=2, batch_size=4, width=.5, progress=False)

def test_a_model_of_views(pictures, tmp_path):
    "Its pictures have no view, so the adapter is trained without one."
    ldm = own_ldm(str(pictures), str(tmp_path/'m'), copies=2, **SIZES, **TINY)
    assert 'augment' in ldm.denoiser.conditioner.embedders
    adapter = adapter_of(tmp_path/'m', tmp_path)
    assert all(p.isfinite().all() for p in adapter.parameters())

def test_a_condition_that_is_called_caption(pictures, tmp_path):
    "It is a column of the table, and no list of texts that are encoded."
    (pictures/'words.csv').write_text((tmp_path/'words.csv').read_text())
    ldm = own_ldm(str(pictures), str(tmp_path/'m'), conditions='caption:text', **SIZES, **TINY)
    assert 'caption' in ldm.denoiser.conditioner.embedders
    adapter_of(tmp_path/'m', tmp_path)
