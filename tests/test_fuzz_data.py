"""Random trees of files: each set gives a right result, or one clear error before work. Not run by default:
`pytest -m fuzz tests/test_fuzz_data.py`; FASTLDM_FUZZ is the number of trees (300) and FASTLDM_SEED the first."""
import io, json, os, random, shutil, tarfile, traceback, zipfile
from pathlib import Path
import numpy as np, pytest, torch
from PIL import Image
from fastldm.data import *

pytestmark = [pytest.mark.fuzz, pytest.mark.filterwarnings('ignore')]
N,FIRST = int(os.environ.get('FASTLDM_FUZZ', 300)),int(os.environ.get('FASTLDM_SEED', 0))
CLEAR = ValueError,FileNotFoundError,PermissionError,NotADirectoryError
NAMES = ['a','b','1','train','test','val','Train','images','café','cafe\u0301','日本','x y','a.b','._a','.hidden',
         '__MACOSX','.ipynb_checkpoints','captions','metadata','😀','a\nb','-','[a]',"it's",'caf\udce9','A'*200]
SUFFIXES = ['.png','.jpg','.PNG','.jpeg','.gif','.tif','.txt','','.png.txt','.zip','.csv','.json','.jsonl']


# ---- what is in the files

def picture(rng):
    "(bytes of a picture, its grey, None if it is damaged)"
    grey = rng.randrange(256)
    mode = rng.choice(['L','RGB','RGBA','LA','P','1','I;16','F','CMYK'])
    if mode=='1': grey = 255*(grey>127)
    if mode=='I;16': im = Image.fromarray(np.full((8,9), grey*257, np.uint16))
    elif mode=='F': im = Image.fromarray(np.full((8,9), grey, np.float32))
    else: im = Image.new('L', (9,8), grey).convert(mode)
    kind = 'tiff' if mode=='F' else 'jpeg' if mode=='CMYK' else rng.choice(['png','tiff'])
    out = io.BytesIO()
    im.save(out, kind)
    return out.getvalue(),grey

def damage(rng, raw):
    "Bytes with something changed."
    raw = bytearray(raw)
    kind = rng.randrange(4)
    if kind==0: return bytes(raw[:rng.randrange(len(raw)+1)])
    if kind==1: return b''
    for _ in range(1+len(raw)//40): raw[rng.randrange(len(raw))] = rng.randrange(256)
    return bytes(raw)

def text(rng):
    "A caption, a class, or what is neither."
    odd = ['"quoted, and more"','1','-1','3.5','','\u2028','\ud800','x'*500,'a;b\tc','"open']
    return rng.choice(['a dog','café'] if rng.random()<.8 else odd)

def table_of(rng, files, is_json):
    "The bytes of a table of these names, in some form."
    def name_of(f):
        odd = [f.upper(), 'nothing.png', '', '../x', '\0']
        return rng.choice([f, './'+f, f.replace('/','\\')] if rng.random()<.95 else odd)
    names = [name_of(f) for f in rng.sample(files, min(len(files), 6))]
    rows = [dict(file=n, caption=text(rng)) for n in names]
    for key,values in (('split',['train','test','val','',' train']), ('group',['1',2,None]), ('label',[0,'x'])):
        if rng.random()<.2: rows = [dict(r, **{key:rng.choice(values)}) for r in rows]
    if is_json:
        lines = [json.dumps(r, ensure_ascii=rng.random()<.5) for r in rows]
        content = '\n'.join(lines) if rng.random()<.7 else '['+','.join(lines)+']'
    else:
        separator = rng.choice(',;\t')
        odd = [['a','b'],['file'],['file','caption','split'],[]]
        header = rng.choice([['file','caption'],['file_name','text']] if rng.random()<.9 else odd)
        content = '\n'.join(separator.join(row) for row in (header,*([r['file'],r['caption']] for r in rows)))
    content = content if rng.random()<.05 else escape_text(content)
    return content.encode(rng.choice(['utf-8','utf-8-sig','utf-16','utf-8']), 'surrogatepass')


# ---- trees

def grow(rng, folder, depth=0):
    "Random files, folders and links in a folder."
    folder.mkdir(parents=True, exist_ok=True)
    for _ in range(rng.randrange(1, 6)):
        name = rng.choice(NAMES)
        kind = rng.random()
        f = folder/name
        if kind<.35 and depth<3: grow(rng, f, depth+1) if not f.exists() and not f.is_symlink() else None
        elif kind<.42: link(rng, folder, f)
        else: put(rng, folder/(name+rng.choice(SUFFIXES[:4] if kind<.9 else SUFFIXES)))

def link(rng, folder, f):
    target = rng.choice(['.','..','../..','nothing',f.name,'a','../b','a.png'])
    if not f.exists() and not f.is_symlink(): f.symlink_to(target)

def put(rng, f):
    "A file: a picture, a damaged one, a text, or no file but a folder."
    if f.exists() or f.is_symlink() or len(os.fsencode(f.name))>250: return
    if rng.random()<.02: return f.mkdir()
    if f.suffix in ('.txt','.csv','.json','.jsonl'): raw = text(rng).encode('utf-8', 'surrogatepass')
    else: raw,_ = picture(rng)
    if rng.random()<.06: raw = damage(rng, raw)
    f.write_bytes(raw)

def files_below(folder): return sorted(p.relative_to(folder).as_posix() for p in folder.rglob('*') if p.is_file())

def with_captions(rng, folder):
    "Tables or texts beside the pictures."
    files = files_below(folder) or ['nothing.png']
    for place in [folder, *(p for p in (folder/'train',folder/'test') if p.is_dir())]:
        if rng.random()<.4: continue
        name = rng.choice(['captions.csv','metadata.csv','captions.jsonl','captions.json','mine.csv','._a.csv','a.tsv'])
        is_json = rng.random()<.05 or '.json' in name
        if not (place/name).exists(): (place/name).write_bytes(table_of(rng, files, is_json))
    for f in files:
        if rng.random()<.3 and not (folder/f).with_suffix('.txt').exists():
            (folder/f).with_suffix('.txt').write_bytes(text(rng).encode('utf-8', 'surrogatepass'))

def pack(rng, folder, f):
    "The folder as a zip file, with what macOS adds, maybe damaged."
    with zipfile.ZipFile(f, 'w', rng.choice([zipfile.ZIP_STORED,zipfile.ZIP_DEFLATED])) as z:
        for name in files_below(folder):
            inside = name.encode('utf-8','replace').decode()
            z.writestr(inside if rng.random()<.9 else inside.replace('/','\\'), (folder/name).read_bytes())
            if rng.random()<.2: z.writestr(f'__MACOSX/._{inside}', b'junk')
    if rng.random()<.15: f.write_bytes(damage(rng, f.read_bytes()))
    return f


# ---- what must hold

def check(ds):
    "A set is right: it shows itself, its pictures are numbers, its labels have classes, and its texts can be saved."
    assert len(ds)>0 and str(len(ds)) in repr(ds)
    batch = ds.__getitems__(range(len(ds)))
    assert batch['image'].shape[0]==len(ds) and batch['image'].abs().max()<=1
    if 'label' in batch and len(ds.classes): assert 0<=batch['label'].min() and batch['label'].max()<len(ds.classes)
    words = [*ds.classes, *batch.get('caption',()), *batch.get('name',())]
    assert json.dumps(words, ensure_ascii=False).encode('utf-8')

def attempt(make, where):
    "A right set, or one clear error that is short and says where."
    try: ds = make()
    except CLEAR as e:
        assert len(str(e))<4000 and not isinstance(e, (UnicodeError,json.JSONDecodeError)), repr(e)
        elsewhere = 'rows are for','column split','one side only','pictures can be read','pictures are not in'
        assert str(where) in str(e) or any(words in str(e) for words in elsewhere), str(e)
        return str(e)
    check(ds)
    return type(ds).__name__

def run(seed, d, scenario):
    rng = random.Random(seed)
    return scenario(rng, d/str(seed))

def image_folder(rng, d):
    grow(rng, d)
    split = rng.choice(['train','train','val','test'])
    options = dict(split=split, size=4, channels=rng.choice([1,3]), cache=rng.choice([0,2.]))
    if rng.random()<.4: options['skip'] = 'warn'
    def make():
        ds = ImageFolder(d, **options)
        tried = find_damaged(ds.files) if options['cache']==0 else {}
        if tried: raise ValueError(next(iter(tried.values())))     # without a cache it is found when it is read
        for i,f in enumerate(ds.files):
            folders = [escape_text(name) for name in f.relative_to(d).parts[:2]]
            assert ds.label is None or ds.classes[ds.label[i]] in folders
            assert torch.equal(ds.pixels([i])[0], open_image(f, 4, options['channels']))
        return ds
    return attempt(make, d)

def captioned(rng, d):
    grow(rng, d)
    with_captions(rng, d)
    root = pack(rng, d, d.with_suffix('.zip')) if rng.random()<.4 else d
    skip = rng.choice([False,True])
    options = dict(split=rng.choice(['train','test']), size=4, test=rng.choice([0,.3]), pad=rng.random()<.2)
    return attempt(lambda: Captioned(root, skip=skip, **options), d)

def shards(rng, d):
    d.mkdir(parents=True)
    urls = []
    for n in range(rng.randrange(1, 3)):
        f = d/f'{n}.tar'
        with tarfile.open(f, rng.choice(['w','w','w:gz'])) as t:
            for i in range(rng.randrange(0, 5)): add_entry(rng, t, i)
        if rng.random()<.2: f.write_bytes(damage(rng, f.read_bytes()))
        urls.append(f)
    if rng.random()<.1: urls.append(d/'nothing.tar')
    indices = ['{"0.tar":2,"1.tar":1}','{}','[1]','"x"','{"0.tar":"x"}','']
    if rng.random()<.3: (d/'index.json').write_text(rng.choice(indices))
    def make():
        ds = Shards(urls, size=4)
        for i in range(len(urls)): ds.load_shard(i)                # with an index they are read when they are needed
        return ds
    return attempt(make, d)

def add_entry(rng, tar, i):
    folder = rng.choice(['','','','cat/','./','__MACOSX/'])
    label = rng.choice([b'0',b'1',b' 2\n']*9+[b'cat',b''])
    parts = {'.png':picture(rng)[0], '.cls':label, '.txt':text(rng).encode('utf-8', 'surrogatepass')}
    for suffix,raw in parts.items():
        if suffix!='.png' and rng.random()<.02: continue
        if rng.random()<.02: raw = damage(rng, raw) if raw else b''
        key = i if rng.random()<.99 else 0
        info = tarfile.TarInfo(f'{folder}{key}{suffix.upper() if rng.random()<.1 else suffix}')
        info.size = len(raw)
        tar.addfile(info, io.BytesIO(raw))

def faces(rng, d):
    n = 4
    table = rng.choice(['list_attr_celeba.csv','list_attr_celeba.txt','attributes.csv'])
    names = [f'{i+1:06d}.jpg' for i in range(n)]
    values = [[rng.choice(['1','-1']) for _ in ATTRIBUTES] for _ in names]
    if table.endswith('.csv'):
        header = rng.choice(['image_id','file','x'])+','+','.join(ATTRIBUTES)
        lines = [header,*(','.join([f,*v]) for f,v in zip(names,values))]
    else: lines = [str(n),' '.join(ATTRIBUTES),*(' '.join([f,*v]) for f,v in zip(names,values))]
    if rng.random()<.2: lines.append('')
    folder = d/rng.choice(['celeba','celeba-dataset',''])
    pictures = folder/rng.choice(['img_align_celeba','img_align_celeba/img_align_celeba'])
    pictures.mkdir(parents=True)
    for f in names: (pictures/f).write_bytes(picture(rng)[0])
    kind = rng.choice(['csv','txt'])
    rows = [f"{f}{',' if kind=='csv' else ' '}{rng.choice('012')}" for f in names]
    if kind=='csv': rows.insert(0, 'image_id,partition')
    (folder/f'list_eval_partition.{kind}').write_text('\n'.join(rows)+'\n')
    (folder/table).write_text('\n'.join(lines)+'\n')
    spoilt = [p for p in folder.rglob('*') if p.is_file() and rng.random()<.05]
    for p in spoilt: p.write_bytes(damage(rng, p.read_bytes())) if rng.random()<.7 else p.unlink()
    def make():
        ds = CelebA(d, rng.choice(['train','val','test']), size=4)
        assert not spoilt or all(p.exists() for p in ds.files)
        return ds
    return attempt(make, d)

@pytest.mark.parametrize('scenario', [image_folder,captioned,shards,faces], ids=lambda f: f.__name__)
def test_random_trees(tmp_path, monkeypatch, scenario):
    "Every failure is listed with its seed, once for each kind."
    monkeypatch.setattr('fastldm.data.faces.search_folders', lambda root=None: [Path(root)])
    bad,results = {},{}
    for seed in range(FIRST, FIRST+N):
        try: result = run(seed, tmp_path, scenario)
        except Exception as e:
            last = traceback.extract_tb(e.__traceback__)[-1]
            place = f'{type(e).__name__} at {Path(last.filename).name}:{last.lineno}'
            bad.setdefault(place, f'seed {seed}: {e!s:.300}')
        else: results[result[:12]] = results.get(result[:12], 0)+1
        shutil.rmtree(tmp_path/str(seed), ignore_errors=True)
    good = sum(n for name,n in results.items() if name in ('ImageFolder','Captioned','Shards','CelebA'))
    assert not bad, '\n'.join(f'{k}: {v}' for k,v in bad.items())
    assert good>N/20                                                # not all of it was refused
