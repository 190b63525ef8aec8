"Symptoms of pictures of one's own: a folder that changed, a path, a mask or a name that was quietly taken for another."
import pytest
import torch
from PIL import Image
from fastldm import load
from fastldm.recipes import eval_cli, own_ldm, train_cli
from fastldm.recipes.stages import check_same_classes, training_set

TINY = dict(size=16, steps=2, ae_steps=2, ae_channels=(8,8), channels=(8,8), c_latent=2, progress=False)

def pictures(folder, **counts):
    "A folder of noise for each class."
    for k,(name,n) in enumerate(counts.items()):
        (folder/name).mkdir(parents=True, exist_ok=True)
        for i in range(n):
            noise = torch.randint(0, 255, (16,16,3), dtype=torch.uint8, generator=torch.Generator().manual_seed(100*k+i))
            Image.fromarray(noise.numpy()).save(folder/name/f'{i}.png')
    return folder

# ---- a folder that changed

@pytest.fixture(scope='module')
def pets(tmp_path_factory):
    "A model of cats and dogs, whose folder has zebras and dogs today."
    place = tmp_path_factory.mktemp('pets')
    folder = pictures(place/'data', cat=4, dog=4)
    own_ldm(folder, place/'model', **TINY)
    (folder/'cat').rename(folder/'zebra')
    return place

def test_classes_that_changed_since_training(pets):
    "Dogs were scored, and trained on, as cats."
    model = load(pets/'model')
    says = 'has learned the classes cat, dog, and the set has dog, zebra'
    with pytest.raises(ValueError, match=says): training_set(model, size=16)
    with pytest.raises(SystemExit, match=says): eval_cli(str(pets/'model'), n=4, steps=2)
    local = dict(model=str(pets/'model'), kinds='edges', steps=2, out=str(pets/'adapter'))
    with pytest.raises(SystemExit, match=says): train_cli('local', **local)

def test_another_set_with_other_classes(pets, tmp_path):
    "Where a set has the same classes, it serves."
    model = load(pets/'model')
    dogs = pictures(tmp_path/'dogs', dog=4)
    with pytest.raises(SystemExit, match='and the set has dog,'): eval_cli(str(pets/'model'), data=str(dogs), n=4, steps=2)
    same = own_ldm(pictures(tmp_path/'same', cat=2, dog=2), tmp_path/'other', **TINY)
    check_same_classes(training_set(same, size=16), model)
