"""Icon sets: files in good and bad order, drawing, words, the split, and the cache."""
import gzip, json, multiprocessing, os, sys, warnings
import numpy as np, pytest, torch
from PIL import Image

pytest.importorskip('resvg_py')

from fastldm.data import (EMOJI_GROUPS, ICON_KINDS, EmojiLabel, Icon, IconSet, draw_icon, find_label, get_dataset,
                          icon_captions, icon_split, kinds_of, label_keys, read_icons, read_labels, read_svg_folder,
                          thing_and_parts)
import fastldm.recipes.evaluate as evaluate_module
from fastldm.metrics import icon_classifier_loss, icon_scores
from fastldm.recipes import evaluate_icons, train_icon_classifier
from fastldm.recipes.stages import captioned_set

THINGS = [f'thing {chr(97+i)}' for i in range(26)]
TONES = ['','light skin tone','dark skin tone']

def square(colour, side=16, x=0, y=0): return f'<path fill="{colour}" d="M{x} {y}h{side}v{side}h-{side}z"/>'

def icons(style='a', n=26, **more):
    "A set of `n` things in three tones, each of another colour."
    shift = sum(map(ord, style))%50
    bodies = {}
    for i,thing in enumerate(THINGS[:n]):
        for k,tone in enumerate(TONES):
            name = f'{thing} {tone}'.strip().replace(' ', '-')
            bodies[name] = dict(body=square(f'rgb({9*i},{99*k},{shift})', 12, 2, 2))
    return dict(prefix=style, icons=bodies, width=16, height=16, **more)

def records(n=26):
    "Labels in emojibase's layout: groups by number, skin tones as records within a record."
    found = []
    for i,thing in enumerate(THINGS[:n]):
        skins = [dict(label=f'{thing}: {tone}', hexcode=f'F{i:03}-1F3FB') for tone in TONES if tone]
        group = dict(group=3+i%2, subgroup=i%5)
        found.append(dict(label=thing, hexcode=f'F{i:03}', tags=[f'word {i}','other'], skins=skins, **group))
    return found

def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    raw = (data if isinstance(data, str) else json.dumps(data)).encode()
    path.write_bytes(gzip.compress(raw) if path.suffix=='.gz' else raw)
    return path

@pytest.fixture
def folder(tmp_path, monkeypatch):
    "Two sets and labels, with a cache of their own."
    monkeypatch.setenv('FASTLDM_CACHE', str(tmp_path/'cache'))
    write(tmp_path/'sets'/'a.json', icons('a'))
    write(tmp_path/'sets'/'b.json.gz', icons('b'))
    write(tmp_path/'sets'/'labels.json.gz', records())
    return tmp_path/'sets'

def every_row(root, **how):
    "{name: row} of all parts."
    rows = {}
    for split in ('train','val','test'):
        try: ds = IconSet(root, split, captions='label', size=8, **how)
        except ValueError as e:
            assert 'icons are for' in str(e)
            continue
        rows |= {r['name']:dict(r, split=split, pixels=ds[i]['image']) for i,r in enumerate(ds.rows)}
    return rows


# ---- files

@pytest.mark.parametrize('name,data,error,says', [
    ('none.json', None, FileNotFoundError, 'none.json does not exist'),
    ('bad.json', '{"icons":', ValueError, 'bad.json is not JSON'),
    ('bad.json', '\ufeff', ValueError, 'bad.json is not JSON'),
    ('bad.json', '[1,2]', ValueError, 'bad.json is not an icon set of Iconify'),
    ('bad.json', '{"icons":[]}', ValueError, 'bad.json is not an icon set of Iconify'),
    ('bad.json', '{"prefix":"x"}', ValueError, 'bad.json is not an icon set of Iconify')])
def test_files_that_are_no_icon_sets(tmp_path, name, data, error, says):
    if data is not None: write(tmp_path/name, data)
    with pytest.raises(error, match=says): IconSet(tmp_path/name)

def test_a_gz_file_that_is_cut_off(tmp_path):
    whole = write(tmp_path/'a.json.gz', icons()).read_bytes()
    (tmp_path/'a.json.gz').write_bytes(whole[:len(whole)//2])
    with pytest.raises(ValueError, match='a.json.gz is cut off or damaged'): IconSet(tmp_path)

def test_folders_without_icons(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match='has no icons: neither'): IconSet(tmp_path)
    write(tmp_path/'package.json', dict(name='x'))
    with pytest.raises(FileNotFoundError, match='has no icons: neither'): IconSet(tmp_path)
    monkeypatch.setenv('FASTLDM_DATA', str(tmp_path))
    with pytest.raises(FileNotFoundError, match='npm install'): IconSet()

def test_packages_of_npm(folder, tmp_path):
    "Sets, their licences and labels are found where npm installs them; what else is in a package does not matter."
    place = tmp_path/'npm'/'node_modules'
    for style in 'ab':
        write(place/'@iconify-json'/style/'icons.json', icons(style))
        write(place/'@iconify-json'/style/'package.json', dict(name=style))
        info = dict(license=dict(title=f'Licence {style}'), author=dict(name='somebody'))
        write(place/'@iconify-json'/style/'info.json', info)
    write(place/'emojibase-data'/'en'/'data.json', records())
    groups = {str(i):f'subgroup-{i}' for i in range(5)}
    write(place/'emojibase-data'/'meta'/'groups.json', dict(subgroups=groups))
    ds = IconSet(tmp_path/'npm', size=8)
    assert ds.caption==IconSet(folder, size=8).caption
    assert ds.licence=='a: Licence a (somebody); b: Licence b (somebody)'
    assert ds.subgroups==[*groups.values()]
    assert IconSet(folder, size=8, licences=dict(a='mine')).licence=='a: mine; b: licence not stated'

def test_a_folder_of_icons_in_the_usual_place(folder, tmp_path, monkeypatch):
    monkeypatch.setenv('FASTLDM_DATA', str(tmp_path))
    folder.rename(tmp_path/'icons')
    ds = get_dataset('icons', size=8)
    assert ds.name==get_dataset('icons', root=tmp_path, size=8).name==captioned_set('icons', tmp_path, size=8).name

def test_one_style_twice(folder):
    with pytest.raises(ValueError, match="two icon sets 'a'"): IconSet([folder/'a.json',folder])

def test_two_files_of_labels(folder):
    write(folder/'more.json', records(3))
    with pytest.raises(ValueError, match='two|2 files of labels'): IconSet(folder)
    assert len(IconSet(folder, labels=folder/'labels.json.gz', size=8))

@pytest.mark.parametrize('data,says', [('{}','not a list of labels'), ('[]','not a list of labels'),
                                       ('[{"label":"a"},{"x":1}]','not a list of labels'), ('[','not JSON')])
def test_files_that_are_no_labels(tmp_path, data, says):
    with pytest.raises(ValueError, match=says): read_labels(write(tmp_path/'l.json', data))

@pytest.mark.parametrize('options,says', [
    (dict(split='all'), "split is 'all'; it can be 'train', 'val' or 'test'"),
    (dict(styles='c'), "styles has 'c': choose from a, b"), (dict(styles=['a','x']), "styles has 'x'"),
    (dict(kind='old', split='test'), "kind is 'old'"), (dict(kind='new'), "is for split='val' or 'test'"),
    (dict(groups='animals'), "groups has 'animals'; it can have activities, animals-nature"),
    (dict(captions=()), r'captions is \(\)'), (dict(captions=('label','names')), "'keywords'"),
    (dict(ground='no colour'), 'ground is'), (dict(ground=None), 'ground is'),
    (dict(held_out=.5), 'held_out=0.5: expected'),
    (dict(size=0), 'size is 0'), (dict(size=8.), 'size is 8.0'), (dict(channels=2), 'channels is 2'),
    (dict(skip='yes'), "skip is 'yes'")])
def test_options_that_cannot_be(folder, options, says):
    with pytest.raises(ValueError, match=says): IconSet(folder, **options)

def test_labels_that_fit_no_icon(folder):
    labels = write(folder.parent/'other.json', [dict(label='whale')])
    with pytest.raises(ValueError, match='no icon has a name that is among the labels'): IconSet(folder, labels=labels)

def test_a_part_without_icons(folder):
    with pytest.raises(ValueError, match="none of 156 icons are for 'test'"):
        IconSet(folder, 'test', held_out=0, size=8)


# ---- drawing

def drawn(**icon): return draw_icon(Icon(**icon), 16)

def svg(body, box='0 0 16 16'): return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{box}">{body}</svg>'

@pytest.mark.parametrize('text,says', [
    ('', 'empty'), ('<svg', 'root'), (svg('<g>'), 'expected'), (svg(''), 'draws nothing'),
    (svg('<path d="zzz"/>'), 'draws nothing'), (svg(square('red'), '0 0 0 0'), ''),
    (svg('<image width="9" height="9" href="a.png"/>'), 'picture of another file'),
    (svg('<path d="M0 0a1e40 5 0 0 1 9 9z"/>'), 'huge number'), (svg('<path d="M0-123456789z"/>'), 'huge number'),
    (svg('<path id="a123456789" d="M.123456789 1e-9h9v9z"/>'), ''),
    ('<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 9 9"><text y="9">words</text></svg>', 'draws nothing')])
def test_drawings_that_are_broken(text, says):
    if says:
        with pytest.raises(ValueError, match=says): drawn(svg=text)
    else: drawn(svg=text)

def test_left_top_and_sizes(tmp_path):
    "The canvas begins where the icon or the file says, and its longer side fills the picture."
    data = dict(prefix='a', left=-8, top=-8, width=16, height=16, icons={
        'file':dict(body=square('red', 8, -8, -8)), 'icon':dict(body=square('red', 8), left=0, top=0),
        'wide':dict(body='<path fill="red" d="M0 0h32v16H0z"/>', left=0, top=0, width=32),
        'tall':dict(body='<path fill="red" d="M0 0h16v32H0z"/>', left=0, top=0, height=32)})
    found = read_icons(write(tmp_path/'a.json', data)).icons
    red = {name:(draw_icon(icon, 16)[1]==0) for name,icon in found.items()}
    for name in ('file','icon'): assert red[name][:8,:8].all() and red[name].sum()==64
    assert red['wide'][4:12].all() and red['wide'].sum()==128
    assert red['tall'][:,4:12].all() and red['tall'].sum()==128

def test_a_size_that_is_not_stated_is_sixteen(tmp_path):
    found = read_icons(write(tmp_path/'a.json', dict(icons=dict(x=dict(body=square('red', 8)))))).icons
    assert (draw_icon(found['x'], 16)[1]==0).sum()==64

@pytest.mark.parametrize('change,expected', [
    (dict(hFlip=True), lambda x: x[:,::-1]), (dict(vFlip=True), lambda x: x[::-1]),
    (dict(hFlip=True, vFlip=True), lambda x: x[::-1,::-1]), (dict(rotate=1), lambda x: np.rot90(x, -1)),
    (dict(rotate=3), np.rot90), (dict(rotate=6), lambda x: x[::-1,::-1]),
    (dict(hFlip=True, rotate=1), lambda x: np.rot90(x[:,::-1], -1))])
def test_aliases_have_the_right_pixels(tmp_path, change, expected):
    "First mirrored, then turned clockwise, as Iconify does it; an alias of an alias adds to it."
    body = square('red', 8)+square('blue', 4, 8, 0)
    aliases = dict(y=dict(parent='x', **change), z=dict(parent='y', hFlip=True), same=dict(parent='y'))
    data = dict(icons=dict(x=dict(body=body)), aliases=aliases)
    found = read_icons(write(tmp_path/'a.json', data)).icons
    pixels = {name:draw_icon(icon, 16).permute(1, 2, 0).numpy() for name,icon in found.items()}
    assert sorted(pixels)==['x','y','z'] and found['y'].other_names==('same',)
    assert (pixels['y']==expected(pixels['x'])).all()
    flips = not change.get('hFlip'), bool(change.get('vFlip'))
    assert (found['z'].hflip,found['z'].vflip,found['z'].rotate)==(*flips,change.get('rotate', 0)%4)

def test_what_is_hidden_and_what_leads_nowhere(tmp_path):
    data = icons(n=1)
    data['icons']['old'] = dict(body=square('red'), hidden=True)
    data['aliases'] = dict(gone=dict(parent='old', hFlip=True), lost=dict(parent='nothing', hFlip=True),
                           loop=dict(parent='pool'), pool=dict(parent='loop'), late=dict(parent='thing-a', hidden=True))
    found = read_icons(write(tmp_path/'a.json', data)).icons
    assert sorted(found)==['lost','thing-a','thing-a-dark-skin-tone','thing-a-light-skin-tone']
    assert "alias of 'nothing'" in found['lost'].error and not found['thing-a'].other_names

@pytest.mark.parametrize('icon', [dict(), dict(body=3), dict(body=square('red'), width='x'),
                                  dict(body=square('red'), height=0),
                                  dict(body=square('red'), top=float('nan')), 7])
def test_one_broken_icon(folder, icon):
    "It is named and refused, or left out with a warning."
    data = icons('c')
    data['icons']['thing-b'] = icon
    path = write(folder.parent/'c.json', data)
    for _ in range(2):                                          # the second time from the cache
        with pytest.raises(ValueError, match='1 of 78 icons cannot be drawn (.*c/thing-b: )'): IconSet(path, size=8)
        with pytest.warns(UserWarning, match='leaves out 1 picture. c/thing-b: '):
            ds = IconSet(path, size=8, held_out=0, skip='warn')
        assert [*ds.failed]==['c/thing-b'] and len({*ds.name})==77 and 'c/thing-b' not in ds.name

def test_currentcolor_is_black():
    x = drawn(svg=svg('<path fill="currentColor" d="M0 0h16v8H0z"/>'))
    assert (x[:,:8]==0).all() and (x[:,8:]==255).all()

@pytest.mark.parametrize('ground,value', [('white',(255,255,255)), ('#102030',(16,32,48)), ('red',(255,0,0))])
def test_the_ground(folder, ground, value):
    x = IconSet(folder, ground=ground, size=8).pixels([0])[0]
    assert tuple(x[:,0,0].tolist())==value

def test_grey_and_other_sizes(folder):
    colour,grey = (IconSet(folder, size=16, channels=c, captions='label') for c in (3,1))
    assert grey[0]['image'].shape==(1,16,16)
    as_grey = np.asarray(Image.fromarray(colour.pixels([5])[0].permute(1, 2, 0).numpy()).convert('L'))
    assert abs(as_grey.astype(int)-grey.pixels([5])[0,0].numpy()).max()<=1

def test_svg_files(tmp_path):
    "The first folder is the style; a file that is not text is named."
    for style in 'ab':
        for i,colour in enumerate(('red','blue')): write(tmp_path/style/'more'/f'{i}.svg', svg(square(colour, 8)))
    write(tmp_path/'.hidden'/'c.svg', svg(square('red')))
    assert [(s.style,[*s.icons]) for s in read_svg_folder(tmp_path)]==[(style,['more/0','more/1']) for style in 'ab']
    assert [s.style for s in read_svg_folder(tmp_path/'a'/'more')]==['more']
    ds = IconSet(tmp_path, captions='label', held_out=0, size=16)
    assert ds.name==['a/more/0','a/more/1','b/more/0','b/more/1'] and ds.classes==['a','b'] and not ds.groups
    assert torch.equal(ds.pixels([1])[0], drawn(svg=svg(square('blue', 8))))
    (tmp_path/'a'/'more'/'2.svg').write_bytes(b'<svg>\xff')
    with pytest.raises(ValueError, match='2.svg cannot be read'): IconSet(tmp_path, size=16)


# ---- words

def test_code_points_as_names():
    keys = label_keys([EmojiLabel('man cook','1F468-200D-1F373'), EmojiLabel('victory hand','270C-FE0F')])
    for name in ('1f468-200d-1f373','emoji_u1f468_200d_1f373','x/1F468-200D-1F373'):
        assert find_label(name, keys).label=='man cook'
    for name in ('270c','emoji_u270c_fe0f','victory-hand'): assert find_label(name, keys).label=='victory hand'
    assert find_label('face', keys) is None and find_label('cafe', keys) is None and find_label('', keys) is None

def test_an_alias_finds_the_label_that_the_name_does_not(tmp_path):
    data = dict(icons={'bear-animal':dict(body=square('red')), 'frog':dict(body=square('blue'))},
                aliases=dict(bear=dict(parent='bear-animal')))
    path = write(tmp_path/'a.json', data)
    labels = write(tmp_path/'l.json', [dict(label='bear', tags=['grizzly']),dict(label='frog')])
    ds = IconSet(path, labels=labels, captions=('label','keywords'), groups=None, held_out=0, size=8)
    assert ds.caption==['bear','grizzly','frog','frog'] and ds.name[0]=='a/bear-animal'

def test_one_picture_a_label(tmp_path):
    "Of two icons of one label, the one that has its name."
    data = dict(icons={'angry':dict(body=square('red')), 'angry-face':dict(body=square('blue'))})
    path,labels = write(tmp_path/'a.json', data), write(tmp_path/'l.json', [dict(label='angry face')])
    ds = IconSet(path, labels=labels, groups=None, captions='label', held_out=0, size=8)
    assert ds.name==['a/angry-face']

def test_without_labels_each_icon_is_kept(folder):
    ds = IconSet(folder, labels=False, captions='label', held_out=0, size=8)
    assert len(ds)==2*78 and ds.caption[:2]==['thing a','thing a dark skin tone'] and not ds.groups
    assert {*ds[0]}=={'image','caption','name','label','style'}
    batch = ds.__getitems__([0,100])
    assert batch['style'].tolist()==batch['label'].tolist()==[0,1]

def test_groups(folder):
    labels = write(folder.parent/'l.json', [dict(r, group=i%10) for i,r in enumerate(records())])
    ds = IconSet(folder, labels=labels, held_out=0, size=8)
    assert {*ds.groups}=={*EMOJI_GROUPS}-{'component','symbols','flags'}
    assert {*IconSet(folder, labels=labels, groups=None, held_out=0, size=8).groups}=={*EMOJI_GROUPS}
    flags = IconSet(folder, 'train', labels, groups=['flags'], captions='label', held_out=0, size=8)
    assert {r['thing'] for r in flags.rows}=={'thing j','thing t'}
    batch = ds.__getitems__([0,5])
    assert ds.groups[batch['group'][0]]==ds.rows[0]['group']
    assert ds.subgroups[batch['subgroup'][1]]==ds.rows[5]['subgroup']

def test_one_row_each(folder):
    "Its label, in one of the pictures of a thing; the same for a seed."
    ds = IconSet(folder, held_out=0, size=8)
    rows = ds.one_each()
    assert [ds.rows[i]['thing'] for i in rows]==THINGS and {*rows}<={*ds.firsts}
    assert rows==ds.one_each(0)!=ds.one_each(1)

def test_captions():
    row = dict(name='a/b', label='cook: dark skin tone', style='fluent-emoji_flat', keywords=['chef','food'],
               parts=('dark skin tone',))
    texts = icon_captions(row, ('label','label+style','keywords','keywords','keywords+style'))
    assert texts[:2]==['cook: dark skin tone','cook: dark skin tone in fluent emoji flat style']
    for text in texts[2:4]:
        words,_,tone = text.partition(': ')
        assert tone=='dark skin tone' and {*words.split(', ')}<={'chef','food'}
    assert texts[4].endswith(': dark skin tone in fluent emoji flat style')
    assert icon_captions(dict(row, keywords=[]), ['keywords'])==['cook: dark skin tone']

def test_each_picture_has_equally_many_captions(folder):
    ds = IconSet(folder, size=8)
    assert len(ds)==4*len(ds.firsts)==4*len({*ds.name})
    assert ds.references(4)==ds.caption[4:8] and torch.equal(ds[4]['image'], ds[7]['image'])
    assert ds.caption[ds.firsts[1]]==ds.rows[4]['label'] and ds[4]['label']==0 and ds.classes==['a','b']


# ---- the split

def test_known_sides():
    "They depend on words only, so that no version of the library moves a picture."
    assert {icon_split(f'thing {i}', 'a', .1) for i in range(100)}=={'train','val','test'}
    assert icon_split('Dog', 'a', .3)==icon_split('dog', 'a', .3)
    sides = ''.join(icon_split(f'thing {i}', 'a', .2)[:2] for i in range(12))
    assert sides=='vatetrvavatrtrtevatrtetr'

@pytest.mark.parametrize('label,thing,parts', [
    ('woman cook: medium-light skin tone','cook',('medium-light skin tone','woman')), ('man','person',('man',)),
    ('kiss: woman, man, light skin tone, dark skin tone','kiss',('dark skin tone','light skin tone','man','woman')),
    ('woman cook dark skin tone','cook',('dark skin tone','woman')), ('flag: Norway','flag: norway',()),
    ('keycap: 1','keycap: 1',()), ('princess','prince',('woman',)), ('person in bed','bed',('person',)),
    ('woman’s hat','woman’s hat',()), ('face','face',()), ('old woman','old',('woman',)),
    ('older person','old',('person',)), ('boy: dark skin tone','child',('boy','dark skin tone'))])
def test_things_and_parts(label, thing, parts): assert thing_and_parts(label)==(thing,parts)

def test_held_out_things_and_combinations(folder):
    "No held-out thing is in training under any style, and the parts of each combination are."
    rows = every_row(folder, held_out=.2)
    train = [r for r in rows.values() if r['split']=='train']
    things = {r['thing'] for r in train}
    seen = {part for r in train for part in (r['style'],*r['parts'])}
    held = [r for r in rows.values() if r['split']!='train']
    assert {(r['split'],r['kind']) for r in held}=={(s,k) for s in ('val','test') for k in ICON_KINDS}
    for r in held:
        assert (r['thing'] in things)==(r['kind']=='combination')
        assert r['kind']=='new' or {r['style'],*r['parts']}<=seen
    for kind in ICON_KINDS:
        chosen = IconSet(folder, 'test', kind=kind, held_out=.2, captions='label', size=8)
        assert chosen.name==[n for n in chosen.name if rows[n]['kind']==kind and rows[n]['split']=='test']
        assert len(chosen)==sum(r['kind']==kind and r['split']=='test' for r in held)

def test_the_split_and_the_pictures_depend_on_the_icon_only(folder):
    "Of one set, both, or both in another order; with more styles or fewer shown."
    both = every_row(folder, held_out=.2)
    labels = folder/'labels.json.gz'
    for files in ([folder/'b.json.gz'], [folder/'b.json.gz',folder/'a.json'], [folder/'a.json']):
        rows = every_row(files, held_out=.2, labels=labels)
        for name,r in rows.items():
            if name in both: assert both[name]['split']==r['split'] and torch.equal(both[name]['pixels'], r['pixels'])
    shown = every_row(folder, held_out=.2, styles='b')
    assert {*shown}=={n for n in both if n.startswith('b/')}
    assert all(shown[n]['kind']==both[n]['kind'] for n in shown)

def test_a_copy_of_a_training_picture_is_not_held_out():
    def row(thing, split, digest, style='a'):
        return dict(thing=thing, parts=(), style=style, split=split, digest=digest)
    rows = [row('x','train',1), row('y','train',2), row('y','test',1), row('z','test',2), row('y','test',3),
            row('z','val',4)]
    assert kinds_of(rows)==[None,None,None,None,'combination','new']
    assert kinds_of([row('x','train',1), row('x','test',5,'b')])==[None,None]         # a style that training lacks


# ---- cache and processes

def files_of(cache): return sorted((cache/'drawn').glob('*.safetensors'))

def test_drawn_once(folder, tmp_path, monkeypatch):
    ds = IconSet(folder, size=8)
    kept = files_of(tmp_path/'cache')
    assert len(kept)==2
    def refuse(*args): raise AssertionError('drawn again')
    monkeypatch.setattr(sys.modules['fastldm.data.icons'], '_drawn', refuse)
    for how in (dict(), dict(split='test', held_out=.2), dict(labels=False), dict(styles='a')):
        IconSet(folder, size=8, **how)
    assert torch.equal(ds[:9]['image'], IconSet(folder, size=8)[:9]['image'])
    for how in (dict(size=9), dict(size=8, ground='red'), dict(size=8, channels=1)):
        with pytest.raises(AssertionError, match='drawn again'): IconSet(folder, **how)
    write(folder/'a.json', icons('a', 25))
    with pytest.raises(AssertionError, match='drawn again'): IconSet(folder, size=8)

@pytest.mark.filterwarnings('ignore:.*is damaged')
def test_an_interrupted_cache(folder, tmp_path, monkeypatch):
    "After an interruption there is no file; one that is cut off is made again, with a warning."
    module = sys.modules['fastldm.data.icons']
    with monkeypatch.context() as m:
        def interrupt(*args): raise KeyboardInterrupt
        m.setattr(module, 'draw_icon', interrupt)
        with pytest.raises(KeyboardInterrupt): IconSet(folder, size=8)
    assert not files_of(tmp_path/'cache')
    image = IconSet(folder, size=8)[:]['image']
    for file in files_of(tmp_path/'cache'): file.write_bytes(file.read_bytes()[:999])
    with pytest.warns(UserWarning, match='is damaged'): assert torch.equal(IconSet(folder, size=8)[:]['image'], image)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert torch.equal(IconSet(folder, size=8)[:]['image'], image)

@pytest.mark.skipif(os.getuid()==0, reason='root may write anywhere')
def test_a_cache_that_cannot_be_written(folder, tmp_path):
    (tmp_path/'cache').mkdir(mode=0o500)
    with pytest.warns(UserWarning, match='nothing can be kept'): assert len(IconSet(folder, size=8))

def same(items): return items

@pytest.mark.filterwarnings('ignore:.*fork')
@pytest.mark.parametrize('method', ['fork',pytest.param('spawn', marks=pytest.mark.slow)])
def test_loader_processes(folder, method):
    ds = IconSet(folder, size=8)
    here = ds.__getitems__(range(16))
    workers = dict(num_workers=1+(method=='fork'), multiprocessing_context=multiprocessing.get_context(method))
    there = [*torch.utils.data.DataLoader(ds, 8, collate_fn=same, **workers)][:2]
    for key,value in here.items():
        if torch.is_tensor(value): assert torch.equal(value, torch.cat([b[key] for b in there]))
        else: assert value==there[0][key]+there[1][key]

def test_a_set_shows_itself_and_its_digest(folder):
    ds = IconSet(folder, size=8)
    assert repr(ds)==f'IconSet(train: {len(ds)} captions of {len(ds)//4} pictures of 3×8×8)'
    assert ds.digest()==IconSet(folder, size=8).digest()!=IconSet(folder, size=9).digest()

def test_without_resvg(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, 'resvg_py', None)
    with pytest.raises(ImportError, match=r'pip install "fastldm\[icons\]"'): IconSet(folder)


# ---- the classifier

class Copyist(torch.nn.Module):
    "Draws the real picture of a caption and style, or that of another caption."
    size, device, kinds = 16, 'cpu', ['codes','diffusion']
    def __init__(self, icons, wrong=False, conditions=('style',)):
        super().__init__()
        rows = [*range(len(icons))]
        pictures = icons.__getitems__(rows[1:]+rows[:1] if wrong else rows)['image']
        keys = [(row['label'], icons.classes.index(row['style'])) for row in icons.rows]
        self.pictures = dict(zip(keys, (pictures+1)/2))
        self.styles = icons.classes
        self.other_conditions = list(conditions)

    def prior_for(self, names): return 'diffusion' if 'style' in self.other_conditions else 'codes'

    def sample(self, prompt, prior=None, style=None, seed=0, first=0, progress=False):
        if prior=='codes':
            prompt, words = zip(*(text.removesuffix(' style').split(' in ') for text in prompt))
            style = words
        return torch.stack([self.pictures[text, self.styles.index(name)] for text, name in zip(prompt, style)])

@pytest.fixture
def trained_classifier(folder, tmp_path):
    "A classifier that was trained for a few steps, and what was held out."
    classifier = train_icon_classifier(folder=tmp_path/'classifier', root=folder, size=16, steps=30, progress=False)
    return classifier, IconSet(folder, 'test', captions='label', size=16)

def test_what_draws_real_pictures_has_their_scores(trained_classifier, folder):
    "With the style as a condition and as words; and not where the pictures are those of other captions."
    classifier, held_out = trained_classifier
    options = dict(root=folder, classifier=classifier, net=classifier, progress=False)
    scores = evaluate_icons(Copyist(held_out), **options)
    by_words = evaluate_icons(Copyist(held_out, conditions=()), **options)
    wrong = evaluate_icons(Copyist(held_out, wrong=True), **options)
    kinds = [kind for kind in ICON_KINDS if kind in scores]
    assert kinds and sum(scores[kind]['n'] for kind in kinds)==len(held_out)
    for kind in kinds:
        for name in ('style','group','retrieval'):
            assert scores[kind][name]==scores[kind][f'real_{name}']==by_words[kind][name]
        assert not np.isnan(scores[kind]['retrieval'])
    assert scores['prior']=='diffusion' and by_words['prior']=='codes'
    name = next(name for name in scores if name.startswith('memorisation_pixels'))
    assert scores[name]==pytest.approx(1, abs=1e-4)
    assert any(wrong[kind][name]!=scores[kind][name] for kind in kinds for name in ('style','group','tone'))

def test_a_classifier_of_other_styles_is_refused(trained_classifier, folder):
    "With one set fewer, the numbers of the styles mean others."
    classifier, held_out = trained_classifier
    (folder/'a.json').unlink()
    fewer = Copyist(held_out)
    with pytest.raises(ValueError, match='other classes of style than icons here: train one'):
        evaluate_icons(fewer, root=folder, classifier=classifier, net=classifier, progress=False)

def test_pictures_without_a_tone_do_not_count(trained_classifier):
    "Neither in the loss, which would be nan, nor in the score."
    classifier, held_out = trained_classifier
    batch = held_out.__getitems__([0,1])
    batch['tone'] = torch.tensor([-100,-100])
    assert icon_classifier_loss(classifier, batch)['loss'].isfinite()
    assert 'tone' not in icon_scores(classifier, batch) and 'style' in icon_scores(classifier, batch)

def test_tones_are_labels(folder):
    "A couple of two tones has none that counts."
    icons = IconSet(folder, size=8, captions='label')
    icons.rows[0]['label'] = 'kiss: dark skin tone, light skin tone'
    icons._hold_rows()
    names = [icons.label_names['tone'][k] if k>=0 else None for k in icons.__getitems__([0,1,2])['tone'].tolist()]
    expected = [{'':'none'}.get(row['label'].partition(': ')[2], row['label'].partition(': ')[2].split(' ')[0])
                for row in icons.rows[1:3]]
    assert names==[None,*expected]

def test_label_names_without_labels(folder):
    "The style is known of every set; group and tone with labels of emoji only."
    assert [*IconSet(folder, size=8).label_names]==['style','group','tone']
    without = IconSet(folder, size=8, labels=False)
    assert without.label_names==dict(style=without.classes) and 'tone' not in without.__getitems__([0])

@pytest.mark.parametrize('labels,message', [
    (dict(stlye=[0,1]), "no label 'stlye': this classifier has style, group, tone"),
    (dict(style=[0,1], caption=['a','b']), "no label 'caption'"),
    (dict(style=[0]), '2 pictures and 1 classes of style'),
])
def test_labels_that_there_are_not(trained_classifier, labels, message):
    classifier, held_out = trained_classifier
    pictures = held_out.__getitems__([0,1])['image']
    with pytest.raises(ValueError, match=message): classifier.score(pictures, labels)

def test_means_over_things(trained_classifier, folder):
    "A thing with many pictures counts as one with few."
    classifier, held_out = trained_classifier
    scores = evaluate_icons(Copyist(held_out), root=folder, classifier=classifier, net=classifier, progress=False)
    for kind in ICON_KINDS:
        rows = [i for i,row in enumerate(held_out.rows) if row['kind']==kind]
        if not rows: continue
        batch = held_out.__getitems__(rows)
        right = classifier.score(batch['image'], dict(style=batch['style']))['style']
        of_thing = {}
        for i,value in zip(rows, right.tolist()): of_thing.setdefault(held_out.rows[i]['thing'], []).append(value)
        found = scores[f'{kind}_by_thing']
        assert found['n']==len(of_thing) and scores[kind]['n']==len(rows)
        assert found['style']==pytest.approx(np.mean([np.mean(values) for values in of_thing.values()]), abs=1e-5)
        assert scores[kind]['style']==pytest.approx(right.mean().item(), abs=1e-5)
        assert 'real_retrieval_chance' not in scores[kind] and 'real_retrieval' in found

def test_few_pictures_are_compared_with_those_they_stand_for(trained_classifier, folder, monkeypatch):
    "And not with all held-out pictures, of which other shares are new."
    classifier, held_out = trained_classifier
    compared = []
    monkeypatch.setattr(evaluate_module, '_own_distances',
                        lambda drawn, train, test, net: compared.append((drawn, test)) or {})
    evaluate_icons(Copyist(held_out), n=1, root=folder, classifier=classifier, net=classifier, progress=False)
    (drawn, test), = compared
    assert len(test)==len(drawn)<len(held_out)
    real = (torch.stack([test[i]['image'] for i in range(len(test))])+1)/2
    assert torch.equal(drawn, real)                                     # the copyist draws what it stands for

def test_a_classifier_needs_labels(folder):
    "It says so before work starts."
    (folder/'labels.json.gz').unlink()
    with pytest.raises(ValueError, match='groups'):
        train_icon_classifier(folder=folder.parent/'classifier', root=folder)
    assert not (folder.parent/'classifier').exists()
