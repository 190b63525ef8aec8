"Faces: errors in files, masks and attributes come before work starts; a drawn set is kept; a model of faces obeys."
import numpy as np, pytest, torch
from PIL import Image
from fastldm.diffusion import AttributeEmbedder, MaskEmbedder, unpack_rows
from fastldm.data.faces import *
from fastldm.data import to_image
from fastldm.data.drawn_faces import *

@pytest.fixture
def published(tmp_path):
    "Seven drawn faces in CelebAMask-HQ's layout."
    return write_celebamask_hq(SyntheticFaces(n=7), tmp_path)

# ---- the published layout

def test_sets_by_name():
    "Every set is known by its name, with or without an underscore, whatever was imported."
    import subprocess, sys
    program = """
from fastldm.data.images import get_dataset
sets = get_dataset('drawn_faces', n=3),get_dataset('drawnfaces', split='test', n=2),get_dataset('scenes', n=4)
print(*map(len, sets))
try: get_dataset('drawn_face')
except ValueError as e: print(e)
"""
    p = subprocess.run([sys.executable,'-c',program], capture_output=True, text=True)
    assert p.stdout.startswith('3 2 4') and "did you mean 'drawnfaces'" in p.stdout, p.stdout+p.stderr

def test_comes_back(published):
    ds,drawn = CelebAMaskHQ(published.parent),SyntheticFaces(n=7)
    assert len(ds)==7 and torch.equal(ds[:]['mask'], drawn[:]['mask'])
    assert CelebAMaskHQ(published).files==ds.files                                   # the folder itself may be given

def test_a_picture_without_masks_is_left_out(published):
    for f in (published/'CelebAMask-HQ-mask-anno/0').glob('00002_*'): f.unlink()
    with pytest.warns(UserWarning, match='no mask: 1 of 7 pictures'): ds = CelebAMaskHQ(published.parent)
    assert len(ds)==6 and '2.jpg' not in [f.name for f in ds.files] and len(ds.attrs)==len(ds.mask)==6

def test_a_mask_of_another_picture(published):
    Image.new('L', (40,40)).save(published/'CelebAMask-HQ-mask-anno/0/00003_skin.png')
    with pytest.raises(ValueError, match='00003_.*belongs to another picture'): CelebAMaskHQ(published.parent)

@pytest.mark.parametrize('spoil', [
    lambda t: t.replace('000003','x'), lambda t: '\n'.join(t.splitlines()[:4]), lambda t: t.replace('  ', ' , ')])
def test_a_table_of_other_pictures(published, spoil):
    f = published/'CelebA-HQ-to-CelebA-mapping.txt'
    f.write_text(spoil(f.read_text()))
    with pytest.raises(ValueError, match='does not match the attribute file'): CelebAMaskHQ(published.parent)

@pytest.mark.parametrize('name', ['CelebA-HQ-to-CelebA-mapping.txt','CelebAMask-HQ-attribute-anno.txt'])
def test_a_file_is_missing(published, name):
    (published/name).unlink()
    with pytest.raises(FileNotFoundError, match=name): CelebAMaskHQ(published.parent)

def test_a_damaged_mask(published):
    f = published/'CelebAMask-HQ-mask-anno/0/00001_skin.png'
    f.write_bytes(f.read_bytes()[:60])
    with pytest.raises(ValueError, match='00001_skin.png'): CelebAMaskHQ(published.parent)

@pytest.mark.parametrize('spoil,said', [
    (lambda t: t.replace(' -1', ' 2', 1),'line 3'), (lambda t: '\n'.join(t.splitlines()[:-1]),'cut off'),
    (lambda t: '','no attributes')])
def test_damaged_attributes(published, spoil, said):
    f = published/'CelebAMask-HQ-attribute-anno.txt'
    f.write_text(spoil(f.read_text()))
    with pytest.raises(ValueError, match=said): CelebAMaskHQ(published.parent)

def celeba(d, masks=True):
    "The layout of a part of CelebA: a table, pictures and masks in zip files."
    import io, zipfile
    (d/'celeba10k').mkdir()
    ds = SyntheticFaces(n=4, parts=PARTS8)
    def add(archive, name, im, kind):
        b = io.BytesIO()
        im.save(b, kind)
        archive.writestr(name, b.getvalue())
    with zipfile.ZipFile(d/'celeba10k/images.zip','w') as images, zipfile.ZipFile(d/'celeba10k/masks.zip','w') as ids:
        for i in range(4):
            add(images, f'{i:06d}.jpg', to_image(ds[i]['image']), 'jpeg')
            if masks or i!=2: add(ids, f'{i:06d}.png', Image.fromarray(ds[i]['mask'].numpy()), 'png')
    splits = 'train','train','val','val'
    rows = [','.join([f'{i:06d}.jpg',splits[i],*map(str, ds[i]['attrs'].tolist())]) for i in range(4)]
    (d/'celeba10k/attributes.csv').write_text('\n'.join([','.join(['file','split',*ds.attributes]),*rows])+'\n')
    return ds

def test_a_part_of_celeba(tmp_path):
    "Where there is nothing for testing, the pictures of validation take its place, with a warning."
    ds = celeba(tmp_path)
    train = CelebA(tmp_path)
    with pytest.warns(UserWarning, match="no split 'test'"): test = CelebA(tmp_path, 'test')
    assert [len(train),len(test)]==[2,2]
    assert [train.split,test.split]==['train','val']
    assert all(torch.equal(test[:][k], ds[2:4][k]) for k in ('attrs','mask'))

def test_celeba_without_training_pictures(tmp_path):
    "No other split takes the place of 'train': a network would be trained on what it is validated with."
    celeba(tmp_path)
    table = tmp_path/'celeba10k'/'attributes.csv'
    table.write_text(table.read_text().replace(',train,', ',test,'))
    with pytest.raises(FileNotFoundError, match="no picture of split 'train', only of test, val"): CelebA(tmp_path)
    assert [CelebA(tmp_path, split).split for split in ('val','test')]==['val','test']

def test_celeba_without_one_mask(tmp_path):
    celeba(tmp_path, masks=False)
    with pytest.raises(ValueError, match='000002.png.*fetch it again'): CelebA(tmp_path, 'test')

def test_celeba_is_not_there(tmp_path, monkeypatch):
    monkeypatch.delenv('FASTLDM_DATA', raising=False)
    monkeypatch.setenv('HOME', str(tmp_path))
    with pytest.raises(FileNotFoundError, match='mmlab.ie.cuhk.edu.hk'): CelebA(tmp_path)
    with pytest.raises(FileNotFoundError, match='switchablenorms/CelebAMask-HQ'): CelebAMaskHQ(tmp_path)

# ---- masks

def test_sizes_never_make_classes():
    "A mask with two classes, made smaller and larger by any factor, has these two only."
    g = torch.Generator().manual_seed(0)
    for size in (3,7,16,33,64,100):
        assert set(resize_mask(torch.randint(2, (4,64,64), generator=g)*13, size).unique().tolist()) <= {0,13}

def test_majority():
    m = torch.zeros(1,4,4, dtype=torch.uint8)
    m[0,:2,:2] = torch.tensor([[5,5],[5,2]])
    m[0,2:,2:] = 7
    assert resize_mask(m, 2)[0].tolist()==[[5,0],[0,7]]

parts = MaskEmbedder(PARTS8, 8, 16)

@pytest.mark.parametrize('given,said', [
    (torch.zeros(8,8).long(),r'shape \(8, 8\).*resize_mask'), (torch.zeros(3,16,16).long(),'for 2 samples'),
    (torch.zeros(16,16),'argmax'), (torch.rand(8,16,16),'argmax'), (torch.zeros(16,16).bool(),'bool'),
    (torch.full((16,16),9),'class 9'), (torch.full((16,16),-1),'class -1'), (np.zeros((16,16,3),np.uint8),'shape')])
def test_a_mask_that_cannot_be(given, said):
    with pytest.raises(ValueError, match=said): parts.parse(given, 2)

def test_masks_that_can():
    for m in (torch.full((16,16),8), np.full((16,16),8,np.uint8), [[8]*16]*16):
        assert torch.equal(parts.parse(m, 2), parts.parse(None, 2))

# ---- attributes

@pytest.mark.parametrize('given,said', [
    (dict(Smilling=True),"did you mean 'Smiling'"),
    (dict(Black_Hair=True,Blond_Hair=True),'Black_Hair and Blond_Hair cannot both'),
    (dict(No_Beard=1,Goatee=1),'cannot both'),
    (dict(Blurry=True),'unknown')])
def test_attributes_that_cannot_be(given, said):
    with pytest.raises(ValueError, match=said): draw_face(given)
    with pytest.raises(ValueError, match=said): AttributeEmbedder(len(DRAWN), 4, DRAWN, EXCLUSIVE).parse(given, 1)

def test_rows_of_attributes():
    e = AttributeEmbedder(3, 4, ['a','b','c'])
    want = e.parse([1,0,1], 2)
    lists = [1,-1,1],[True,False,True],np.array([1,0,1]),torch.tensor([1.,0.,1.])
    for same in (*lists, dict(a=1,b=0,c=True), [dict(a=1,b=0,c=1)]*2): assert torch.equal(e.parse(same, 2), want)
    for bad in ([1,0],[.5,0,1],[1,0,-1],[[1,0,1]]*3,[1,0,7]):
        with pytest.raises(ValueError, match='attrs'): e.parse(bad, 2)

# ---- drawn sets

def test_a_large_set_is_drawn_once(tmp_path, monkeypatch):
    "It is read from the file the next time; a damaged file is told, and made again."
    monkeypatch.setenv('FASTLDM_CACHE', str(tmp_path))
    a = SyntheticFaces(n=2000, size=16)[:40]
    f, = (tmp_path/'faces').iterdir()
    when = f.stat().st_mtime_ns
    b = SyntheticFaces(n=2000, size=16)[:40]
    few = SyntheticFaces(n=40, size=16)[:]                  # a small one is drawn when asked for: the same faces
    assert f.stat().st_mtime_ns==when and all(torch.equal(a[k], b[k]) and torch.equal(a[k], few[k]) for k in a)
    f.write_bytes(f.read_bytes()[:1000])
    with pytest.warns(UserWarning, match='damaged'): c = SyntheticFaces(n=2000, size=16)[:40]
    assert all(torch.equal(a[k], c[k]) for k in a)

def test_avatars_are_what_resvg_draws():
    "A pile of layers is the picture that resvg makes of the whole."
    pa,resvg = pytest.importorskip('python_avatars'),pytest.importorskip('resvg_py')
    import io, random
    from xml.etree import ElementTree
    def whole(on, settings):
        "The avatar as resvg draws it at once, on white."
        kinds = dict(top='HatType' if 'Wearing_Hat' in on else 'HairType', eyes='EyeType', eyebrows='EyebrowType',
                     mouth='MouthType', facial_hair='FacialHairType', accessory='AccessoryType',
                     clothing='ClothingType',
                     skin_color='SkinColor', hair_color='HairColor')
        values = {name:getattr(pa, kind)[settings[name]] for name,kind in kinds.items()}
        svg = pa.Avatar(style=pa.AvatarStyle.TRANSPARENT, clothing_color='#3C4F5C',
                        facial_hair_color=pa.HairColor[settings['hair_color']], **values).render()
        root = ElementTree.fromstring(svg)
        root.attrib.update(viewBox='24 10 216 216', width='64', height='64')
        png = bytes(resvg.svg_to_bytes(svg_string=ElementTree.tostring(root, encoding='unicode')))
        im = Image.open(io.BytesIO(png)).convert('RGBA')
        return Image.alpha_composite(Image.new('RGBA', im.size, 'white'), im).convert('RGB')
    worst = 0
    for i in range(30):
        on,settings = sample_avatar(random.Random(i))
        image,mask = draw_avatar(on, dict(settings, clothing_color='#3C4F5C'), 64, [1.,1.,1.])
        worst = max(worst, np.abs(np.asarray(whole(on, settings), dtype=float)-image).mean()/255)
        assert mask.max()<len(AVATAR_PARTS) and (mask==AVATAR_PARTS.index('skin')).mean()>.02
    assert worst<.01, worst

def test_avatars_of_the_two_sides():
    pytest.importorskip('python_avatars')
    pytest.importorskip('resvg_py')
    train,test = Avatars(n=40),Avatars(n=40, split='test')
    assert all(is_held_out_face(d.sample_face(i)[0])==(d is test) for d in (train,test) for i in range(40))
    b = train[:]
    hat,glasses = (b['attrs'][:,AVATAR_ATTRIBUTES.index(a)]==1 for a in ('Wearing_Hat','Eyeglasses'))
    assert torch.equal((b['mask']==AVATAR_PARTS.index('hat')).flatten(1).any(1),
                       hat) and (b['mask'][glasses]==AVATAR_PARTS.index('glasses')).flatten(1).any(1).all()

# ---- models

@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    "A model of small drawn faces and its classifier, trained for a few steps, in the folder where `load` looks first."
    from fastldm.data import DATASETS
    from fastldm.recipes import face_ldm, train_face_classifier
    d = tmp_path_factory.mktemp('faces')
    with pytest.MonkeyPatch.context() as m:
        m.setenv('FASTLDM_CACHE', str(d/'cache'))
        m.setenv('FASTLDM_WEIGHTS', str(d))
        m.setitem(DATASETS, 'few', lambda root=None, split='train', size=32,
                  download=True: SyntheticFaces(n=64, split=split, parts=PARTS8, size=size))
        train_face_classifier('few', d/'few_classifier', size=32, steps=6, channels=(8,16), d=16, n_blocks=1,
                              hidden=16, progress=False)
        face_ldm('few', d/'few', size=32, ae_channels=(8,16), ae_steps=6, steps=6, channels=(16,32), d_context=16,
                 progress=False)
        yield d

@pytest.mark.slow
def test_a_model_of_faces(trained):
    "The model comes back from its folder, and takes any part of the conditions, alone or in either order."
    from fastldm.diffusion import load
    ldm,b = load('few'),SyntheticFaces(n=2, parts=PARTS8, size=32)[:]
    for said in (dict(), dict(attrs=dict(Smiling=True)), dict(mask=b['mask']), dict(attrs=b['attrs'], mask=b['mask'])):
        x = ldm.sample(2, steps=3, seed=0, guidance_scale=2. if said else 1., **said)
        assert x.shape==(2,3,32,32) and torch.equal(x,
                                                    ldm.sample(2, steps=3, seed=0, guidance_scale=2. if said else 1.,
                                                               **said))
    a,m = (ldm.sample(2, steps=3, seed=0, guidance_scale=dict(attrs=3., mask=2.), attrs=b['attrs'], mask=b['mask'],
                      order=o) for o in (['attrs','mask'],['mask','attrs']))
    assert not torch.equal(a, m)
    with pytest.raises(ValueError, match="did you mean 'Smiling'"): ldm.sample(2, attrs=dict(smiling=True))
    with pytest.raises(ValueError, match='resize_mask'): ldm.sample(2, mask=torch.zeros(64,64).long())
    with pytest.raises(ValueError, match='cannot both'): ldm.sample(2, attrs=dict(Bald=True, Bangs=True))
    with pytest.raises(ValueError, match='each of'): ldm.sample(2, attrs=b['attrs'], order=['attrs'])

@pytest.mark.slow
def test_new_conditions_for_a_trained_model(trained, monkeypatch):
    "`start` keeps the autoencoder and every weight that the new model has too, and adds embedders for what is new."
    from fastldm.data import DATASETS
    from fastldm.data import Described
    from fastldm.diffusion import load
    from fastldm.recipes import face_ldm
    monkeypatch.setitem(DATASETS, 'saidfew', lambda *args, **kw: Described(DATASETS['few'](*args, **kw)))
    small = dict(size=32, channels=(16,32), d_context=16, progress=False, text='context')
    ldm = face_ldm('said_few', trained/'said', steps=1, start='few', **small)
    a,b = load('few').denoiser.state_dict(),ldm.denoiser.state_dict()
    assert {k.split('.')[2] for k in b.keys()-a.keys()}=={'text'} and not a.keys()-b.keys()
    step = max(float((a[k].float()-b[k].float()).abs().max()) for k in a)
    assert 0<step<.01, step                                                             # one step from where it began
    old,new = (m.autoencoder.state_dict().values() for m in (load('few'),ldm))
    assert ldm.meta['start']=='few' and all(torch.equal(v,w) for v,w in zip(old, new))
    with pytest.raises(ValueError, match=r"start='few'.*network.channels was \[16, 32\], is \[24, 32\]"):
        face_ldm('said_few', trained/'other', steps=1, start='few', **small|dict(channels=(24,32)))
    with pytest.raises(ValueError, match='leave one out'):
        face_ldm('said_few', trained/'none', steps=1, start='few', autoencoder=ldm.autoencoder, **small)
    with pytest.raises(FileNotFoundError, match="did you mean 'few'"):
        face_ldm('said_few', trained/'none', steps=1, start='feww', **small)

@pytest.mark.slow
@pytest.mark.parametrize('given', [('attrs','mask'),('attrs',),()])
def test_scores_of_faces(trained, given):
    from fastldm.diffusion import load
    from fastldm.recipes import evaluate_faces
    res = evaluate_faces(load('few'), 'few', 40, given, steps=2, progress=False)
    assert res['conditions']==[*given] and res['n']==40
    assert 0<=res['accuracy_mean']<=1 and 0<=res['iou_mean']<=1
    assert {*res['accuracy']}=={*DRAWN} and {*res['iou']}=={*PARTS8}
    assert res['fid']>0 and res['real_accuracy_mean']>0 and res['memorisation']>0
    with pytest.raises(ValueError, match="unknown classifier 'fashion_classifier'"):
        evaluate_faces(load('few'), 'fashion')

@pytest.mark.slow
def test_real_faces_are_as_many_as_drawn(trained):
    "Beside the distance of 40 drawn faces stands that of 40 real training faces, though 20 are held out."
    from fastldm.data import get_dataset
    from fastldm.diffusion import load
    from fastldm.metrics import fid
    from fastldm.recipes import evaluate_faces
    res = evaluate_faces(load('few'), 'few', 40, steps=2, progress=False)
    classifier = load('few_classifier')
    train, held_out = (get_dataset('few', split=split, size=classifier.size) for split in ('train','test'))
    expected = fid(held_out.pixels(range(len(held_out))), train.pixels(range(40)), classifier)
    assert res['train_n']==40 and res['train_fid']==pytest.approx(expected, rel=1e-3)

@pytest.mark.slow
def test_slots_of_the_ablation(trained):
    "Conditions reach the U-Net by tokens, planes or one vector, or not at all."
    from fastldm.recipes import face_denoiser
    ds = SyntheticFaces(n=4, parts=PARTS8, size=32)
    b = ds[:]
    b['latent'] = torch.randn(4,3,8,8)
    slots = [('context','context'), ('vector','vector'), ('context','concat'), (None,'concat'), ('context',None),
             (None,None)]
    for attrs,mask in slots:
        net = face_denoiser(ds, 3, channels=(16,32), d_context=16, attrs=attrs, mask=mask).eval()
        for p in net.parameters(): p.data += .05*torch.randn_like(p)
        cond = net.conditioner(b) if net.conditioner is not None else None
        out = net(b['latent'], torch.tensor(.5), cond)
        assert out.shape==(4,3,8,8)
        for k in ['attrs']*bool(attrs)+['mask']*bool(mask):
            without = net(b['latent'], torch.tensor(.5), net.conditioner(b, without=[k]))
            assert (without-out).abs().amax((1,2,3)).min()>1e-6, (attrs,mask,k)

def test_sentences_as_a_condition():
    "A `Described` set has a sentence to each face, and a network can be told it, alone or beside a mask."
    from fastldm.data import Described, describe_face, word_ids
    from fastldm.recipes import face_denoiser
    ds = Described(SyntheticFaces(n=4, parts=PARTS8, size=32))
    b = ds[:]
    b['latent'] = torch.randn(4,3,8,8)
    said = [describe_face([a for a,v in zip(ds.attributes,row) if v]) for row in b['attrs']]
    assert torch.equal(b['text'], word_ids(said, ds.words)) and len(ds)==4
    net = face_denoiser(ds, 3, channels=(16,32), d_context=16, attrs=None, text='context').eval()
    assert {*net.conditioner.embedders}=={'mask','text'}
    for p in net.parameters(): p.data += .05*torch.randn_like(p)
    def tell(text):
        conditions = net.conditioner.parse(4, mask=b['mask'], text=text)
        return net(b['latent'], torch.tensor(.5), net.conditioner(conditions))
    assert torch.equal(tell(said), tell(b['text'])) and not torch.equal(tell(said), tell(None))
    with pytest.raises(ValueError, match="did you mean 'smiling'"): tell('a face, smilling')

@pytest.mark.slow
def test_faces_from_the_command_line(trained, tmp_path, monkeypatch):
    from fastldm.diffusion import load
    from fastldm.recipes import save_grid, sample_cli
    monkeypatch.chdir(tmp_path)
    ldm = load('few')
    e = ldm.denoiser.conditioner.embedders['attrs']
    few = SyntheticFaces(n=64, parts=PARTS8, size=32)[:]
    assert torch.equal(unpack_rows(e.examples, e.n_attrs), few['attrs'].long())
    sample_cli('few', n=3, steps=2, seed=4, attributes='Smiling')                     # alone: the rest is drawn, too
    save_grid(ldm.sample(3, steps=2, seed=4, attrs=e.sample_missing(dict(Smiling=True), 3, 4)), 'whole.png', 8)
    drawn, whole = (np.asarray(Image.open(f'{name}.png')) for name in ('samples','whole'))
    assert (drawn==whole).all()
    Image.fromarray(SyntheticFaces(n=1, parts=PARTS8, size=32)[0]['mask'].numpy()).save('mask.png')
    sample_cli('few', n=2, steps=2, attributes='Smiling, Eyeglasses=0', mask='mask.png')
    assert Image.open('samples.png').size[0]>32
    Image.new('RGB', (32,32)).save('colours.png')
    open('text.png','w').write('no picture')
    wrong = [(dict(attributes='Smiling=2'),'Smiling=2'), (dict(attributes='Smilling'),"did you mean 'Smiling'"),
             (dict(attributes='Bald,Bangs'),'cannot both be true'), (dict(mask='colours.png'),'class ids'),
             (dict(mask='text.png'),'cannot be read as a mask'), (dict(mask='none.png'),'none.png'),
             (dict(label=3),"no condition 'label'")]
    for how,said in wrong:
        with pytest.raises(SystemExit, match=said): sample_cli('few', n=2, steps=2, **how)

def test_sets_made_of_others_know_what_excludes_each_other():
    "A garment is of one of ten kinds, also mirrored or described; a face has its own exclusions."
    faces = SyntheticFaces(n=3, size=16)
    assert Mirrored(faces).exclusive==faces.exclusive==Faces.exclusive
    faces.exclusive = [['Dress','Bag']]
    assert Mirrored(faces).exclusive==Described(Mirrored(faces)).exclusive==[['Dress','Bag']]
    assert len(Garments.exclusive[0])==10
