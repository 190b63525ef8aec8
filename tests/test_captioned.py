"Captioned sets: faults of tables, pictures and servers; every source of the clip art; sides that share no picture."
import csv, io, json, multiprocessing, os, re, shutil, signal, threading, time, zipfile
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
import numpy as np, pytest, torch
from PIL import Image
from fastcore.test import test_eq as eq
from fastldm.data.captioned import *
from fastldm.data.sources import *
from fastldm.data import DATASETS, get_dataset, group_rows, sources
from fastldm.recipes import captioned_set, own_pictures, picture_set, reading_options, training_set

def photo(f, seed=0, mode='RGB', size=(40,40), kind='png'):
    "A picture of coloured noise, written (or its bytes)."
    im = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (5,5,3),
                                                              np.uint8)).resize(size, Image.NEAREST).convert(mode)
    out = io.BytesIO()
    im.save(out, kind)
    if f is None: return out.getvalue()
    f.parent.mkdir(parents=True, exist_ok=True)
    f.write_bytes(out.getvalue())
    return f

def folder(d, n=12, rows=None, name='captions.csv'):
    for i in range(n): photo(d/f'{i}.png', i)
    rows = [('file','caption')]+[(f'{i}.png',f'picture {i}') for i in range(n)] if rows is None else rows
    with open(d/name, 'w', newline='', encoding='utf-8') as f: csv.writer(f).writerows(rows)
    return d

@pytest.fixture(autouse=True)
def nowhere(monkeypatch, tmp_path):
    "No set of this computer is found by chance."
    monkeypatch.delenv('FASTLDM_DATA', raising=False)
    def folders(root=None): return [Path(p) for p in (root, tmp_path/'system') if p]
    for module in ('public','sources'): monkeypatch.setattr(f'fastldm.data.{module}.search_folders', folders)


# tables

@pytest.mark.parametrize('sep', ',;\t')
@pytest.mark.parametrize('enc', ['utf-8','utf-8-sig','utf-16'])
@pytest.mark.parametrize('end', ['\n','\r\n'])
def test_spreadsheets(tmp_path, sep, enc, end):
    folder(tmp_path, 2)
    said = 'a "wain", with; hay\tand', 'une fête\nà Noël'
    quoted = ['"'+s.replace('"','""')+'"' for s in said]
    text = f'File{sep} Caption {end}0.png{sep}{quoted[0]}{end}{end}1.png{sep}{quoted[1]}'
    (tmp_path/'captions.csv').write_bytes(text.encode(enc))
    eq(Captioned(tmp_path, test=0).caption, [' '.join(s.split()) for s in said])

@pytest.mark.parametrize('head,says', [
    (('picture file','caption'),'no column for the image: it has picture file, caption'),
    (('file','words'),'no column for the caption: it has file, words'),
    (('a','b'),"say image='its name'")])
def test_missing_columns(tmp_path, head, says):
    with pytest.raises(ValueError, match=says): Captioned(folder(tmp_path, rows=[head,('0.png','x')]))
    eq(Captioned(tmp_path, test=0, image=head[0].upper(), caption=head[1]).caption, ['x'])

@pytest.mark.parametrize('text,says', [
    ('file,caption\n0.png,a, b\n',r'line 2 has 3 fields and the header 2'),
    ('file,caption\n0.png\n','line 2 has 1 fields'), ('file,caption\n0.png,"open\n1.png,b\n','line 3'),
    ('file,caption\n0.png,"a" b\n','line 2.*double the quotes'), ('','no rows'), ('file,caption\n','no rows'),
    ('file,caption\n,a\n','row 1 has no file'), ('\0\0\0','no rows|no column|line')])
def test_broken_csv(tmp_path, text, says):
    folder(tmp_path, 2)
    (tmp_path/'captions.csv').write_text(text)
    with pytest.raises(ValueError, match=f'captions.csv.*({says})'): Captioned(tmp_path)

@pytest.mark.parametrize('text,says', [
    ('{"file":"0.png","caption":"x"}\n{"file":','not JSON lines'),
    ('{"file":"0.png"}\n','no column for the caption'),
    ('{"file":"0.png","caption":"x"}\n{"caption":"y"}','row 2 has no file'),
    ('[1,2]','not a list of records|see entry'), ('{"file":"0.png","caption":null}','row 1 has no caption'),
    ('{"file":3,"caption":"x"}','row 1 has no')])
def test_broken_json_lines(tmp_path, text, says):
    photo(tmp_path/'0.png')
    (tmp_path/'captions.jsonl').write_text(text)
    with pytest.raises(ValueError, match=says): Captioned(tmp_path)

def test_several_captions_and_their_references(tmp_path):
    for i in range(2): photo(tmp_path/f'{i}.png', i)
    lines = '{"file_name":"0.png","text":["a","b"]}', '{"file_name":"1.png","text":["c","d","e"]}'
    (tmp_path/'metadata.jsonl').write_text('\n'.join(lines)+'\n')
    ds = Captioned(tmp_path, test=0)
    eq((ds.caption,ds.firsts,ds.references(3)), (list('abcde'),[0,2],list('cde')))
    eq(ds.image[1], ds.image[0])
    eq(len(ds.image), 5)

def test_text_files_beside_pictures(tmp_path):
    for i in range(3):
        photo(tmp_path/'sub'/f'{i}.jpg', i, kind='jpeg')
        (tmp_path/'sub'/f'{i}.txt').write_text(f'one {i}\n\ntwo {i}\n')
    photo(tmp_path/'sub'/'silent.jpg')
    eq(Captioned(tmp_path, test=0).caption[:3], ['one 0','two 0','one 1'])

def test_several_tables_or_none(tmp_path):
    with pytest.raises(FileNotFoundError, match='does not exist'): Captioned(tmp_path/'nowhere')
    with pytest.raises(FileNotFoundError, match='no table of captions'): Captioned(tmp_path)
    folder(tmp_path, 2, name='a.csv')
    folder(tmp_path, 2, name='b.csv')
    with pytest.raises(ValueError, match=r'2 tables \(a.csv, b.csv\)'): Captioned(tmp_path)
    eq(len(Captioned(tmp_path/'b.csv', test=0)), 2)


# pictures

def test_missing_pictures_are_named(tmp_path):
    folder(tmp_path, 3, [('file','caption')]+[(f'{i}.png','x') for i in range(9)])
    message = r'6 of the 9 pictures are not there \(3.png: the file is missing; .* and 1 more\).*skip=True'
    with pytest.raises(FileNotFoundError, match=message): Captioned(tmp_path)
    with pytest.warns(UserWarning, match='leaves out 6 pictures'): ds = Captioned(tmp_path, test=0, skip=True)
    eq((len(ds),len(ds.failed)), (3,6))

@pytest.mark.parametrize('harm', [
    lambda b: b[:len(b)//2], lambda b: b'', lambda b: b'<html></html>', lambda b: b[:30]+bytes(200)+b[230:]])
@pytest.mark.parametrize('zipped', [False,True])
def test_damaged_pictures_are_named(tmp_path, harm, zipped):
    folder(tmp_path, 4)
    f = tmp_path/'2.png'
    raw = photo(None, 2, size=(90,90))
    f.write_bytes(harm(raw))
    where = tmp_path
    if zipped:
        where = tmp_path/'all.zip'
        with zipfile.ZipFile(where, 'w') as z: [z.write(p, p.name) for p in tmp_path.glob('*.[pc]*')]
    with pytest.raises(ValueError, match='2.png cannot be read as a picture'): Captioned(where, test=0)
    with pytest.raises(ValueError, match='2.png cannot be read as a picture'): Captioned(where, test=0, cache=0)[2]
    with pytest.warns(UserWarning, match='2.png'):
        eq(Captioned(where, test=0, skip=True).name, ['0.png','1.png','3.png'])

def test_how_a_set_was_read_stays_with_the_model(tmp_path):
    "The column of captions and what was left out: a model of texts is scored on the set that it was trained on."
    folder(tmp_path, 12, [('file','notes')]+[(f'{i}.png',f'picture {i}') for i in range(13)])
    with pytest.raises(ValueError, match='no column for the caption.*in a command --caption'): captioned_set(tmp_path)
    with pytest.raises(FileNotFoundError, match='12.png: .*in a command --skip'):
        captioned_set(tmp_path, caption='notes')
    how = dict(caption='notes', skip=True)
    parts = {}
    for split in ('train','test'):
        with pytest.warns(UserWarning, match='leaves out 1 picture'):
            parts[split] = captioned_set(tmp_path, split=split, **how)
    eq(sorted(parts['train'].caption+parts['test'].caption), sorted(f'picture {i}' for i in range(12)))
    model = SimpleNamespace(meta=dict(data=str(tmp_path.resolve()), **how), text_encoder=None)
    eq(reading_options(model, tmp_path), how)
    eq(reading_options(model, 'scenes'), {})
    with pytest.warns(UserWarning, match='leaves out'): eq(training_set(model, 'test').caption, parts['test'].caption)

def test_what_cannot_be_chosen_or_left_out(tmp_path):
    "A set by name has captions of its own, and its pictures are whole."
    with pytest.raises(ValueError, match="no column of them .caption='notes'. can be chosen"):
        captioned_set('scenes', caption='notes')
    with pytest.raises(ValueError, match='no pictures of digits can be left out: leave out skip'):
        picture_set('digits', skip=True)

def test_pictures_of_a_folder_are_left_out(tmp_path):
    "In training and wherever the model's set is read again; without `skip` the damaged file is named."
    for i in range(6): photo(tmp_path/f'{i%2}'/f'{i}.png', i)
    (tmp_path/'0'/'bad.png').write_bytes(b'no picture')
    with pytest.raises(ValueError, match='bad.png cannot be read'): own_pictures(tmp_path, size=8)
    with pytest.warns(UserWarning, match='bad.png'): eq(len(own_pictures(tmp_path, size=8, skip=True).train), 6)
    model = SimpleNamespace(meta=dict(data=str(tmp_path.resolve()), skip=True))
    with pytest.warns(UserWarning, match='bad.png'): eq(len(training_set(model, size=8)), 6)

def test_a_damaged_zip_file(tmp_path):
    folder(tmp_path, 4)
    z = Path(shutil.make_archive(tmp_path/'a', 'zip', tmp_path))
    eq(len(Captioned(z, test=0)), 4)
    z.write_bytes(z.read_bytes()[:-40])
    with pytest.raises(ValueError, match='a.zip is not a whole zip file'): Captioned(z)

def test_modes_and_shapes(tmp_path):
    kinds = ('L',(40,40)), ('RGBA',(80,40)), ('1',(20,60)), ('P',(33,33))
    for i,(mode,size) in enumerate(kinds): photo(tmp_path/f'{i}.png', i, mode, size)
    folder(tmp_path, 0, [('file','caption')]+[(f'{i}.png','x') for i in range(4)])
    cut,padded = Captioned(tmp_path, test=0, size=32),Captioned(tmp_path, test=0, size=32, pad=True)
    assert (cut.image[0,0]==cut.image[0,2]).all()                       # grey has three equal channels
    above,inside = padded.image[1,:,:4],padded.image[1,:,10:22]         # the whole of a wide picture, on white
    assert (above==255).all() and (inside<250).any(0).float().mean()>.8
    assert (padded.image[2,:,:,:6]==255).all() and torch.equal(padded.image[0], cut.image[0])

@pytest.mark.filterwarnings('ignore:.*worker')
@pytest.mark.parametrize('mp', ['fork',pytest.param('spawn', marks=pytest.mark.slow)])
def test_zip_files_and_workers(tmp_path, mp):
    folder(tmp_path, 30)
    z = Path(shutil.make_archive(tmp_path.parent/f'w{mp}', 'zip', tmp_path))
    ds = Captioned(z, test=0, cache=0, size=8)
    want = ds[:]
    got = torch.utils.data.DataLoader(ds, 3, num_workers=1+(mp=='fork'), multiprocessing_context=mp, collate_fn=same)
    for i,b in enumerate(got):
        eq(b['image'], want['image'][3*i:3*i+3])
        eq(b['name'], want['name'][3*i:3*i+3])
def same(b): return b


# sides

def test_no_picture_is_on_bothsplit_rows(tmp_path):
    "Not by several captions, nor as a copy under another name, in another folder, in or out of a zip file."
    rows = [('file','caption'),*((f'{i}.png',f'{i} {k}') for i in range(40) for k in range(3))]
    rows += [(f'copies/{i}_copy.png','again') for i in range(40)]
    d = tmp_path/'d'
    folder(d, 40, rows)
    (d/'copies').mkdir()
    for i in range(40): shutil.copy(d/f'{i}.png', d/'copies'/f'{i}_copy.png')
    sides = {s:Captioned(d, s, test=.3) for s in ('train','test')}
    eq(sum(map(len, sides.values())), 160)
    whose = {s:{re.search(r'\d+', n)[0] for n in ds.name} for s,ds in sides.items()}
    eq(whose['train']&whose['test'], set())
    assert 4<len(whose['test'])<22
    z = Path(shutil.make_archive(tmp_path/'z', 'zip', d))
    eq(Captioned(z, 'test', test=.3).name, sides['test'].name)
    (d/'0.png').rename(d/'new.png')                                     # what is said of others does not move them
    folder(d, 0, [r if r[0]!='0.png' else ('new.png',r[1]) for r in rows])
    eq([n for n in Captioned(d, 'test', test=.3).name if not re.search(r'\b0_|new|\b0\.', n)],
       [n for n in sides['test'].name if not re.search(r'\b0_|\b0\.', n)])

def test_sides_that_the_table_says(tmp_path):
    rows = [('file','caption','split'),*((f'{i}.png','x','test' if i<3 else 'train') for i in range(10))]
    folder(tmp_path, 10, rows)
    eq(Captioned(tmp_path, 'test').name, ['0.png','1.png','2.png'])
    folder(tmp_path, 10, rows+[('0.png','y','train')])
    with pytest.raises(ValueError, match="0.png is for 'test' in one row and for 'train'"): Captioned(tmp_path)
    folder(tmp_path, 10, [(*r[:2],'val' if r[2]=='test' else r[2]) for r in rows])
    with pytest.raises(ValueError, match=r"split has \['val'\]"): Captioned(tmp_path)

def test_folders_train_and_test(tmp_path):
    folder(tmp_path/'train', 5)
    folder(tmp_path/'test', 2)
    eq([len(get_dataset('captioned', root=tmp_path, split=s)) for s in ('train','test')], [5,2])

def test_an_empty_side_is_told(tmp_path):
    folder(tmp_path, 4)
    with pytest.raises(ValueError, match="none of 4 rows are for 'test'"): Captioned(tmp_path, 'test', test=0)
    with pytest.raises(ValueError, match="split is 'valid'"): Captioned(tmp_path, 'valid')

def test_groups_are_closed():
    "a with b by a group, b with c by bytes, c with d by name."
    rows = [dict(name='a', group='g'),dict(name='b',
                                           group='g'),dict(name='b',
                                                           group='h'),dict(name='c', group='h'),dict(name='d')]
    g = group_rows(rows)
    eq(len(set(g[:4])), 1)
    assert g[4]!=g[0]
    eq(group_rows(rows[::-1])[::-1], g)
    eq(split_rows(rows, .5)[4], split_rows([dict(name='d')], .5)[0])

def test_paths_of_windows_and_spaces(tmp_path):
    photo(tmp_path/'a b'/'ä.png')
    folder(tmp_path, 0, [('file','caption'),('a b\\ä.png','x')])
    eq(len(Captioned(tmp_path, test=0)), 1)


# the web

class Server(BaseHTTPRequestHandler):
    asked,lock = Counter(),threading.Lock()
    free,gate = threading.Event(),threading.Event()
    protocol_version = 'HTTP/1.1'
    def log_message(self, *a): pass
    def say(self, body, kind='image/png', code=200, length=None, **head):
        self.send_response(code)
        length = str(len(body) if length is None else length)
        head = {'Content-Type':kind, 'Content-Length':length, 'Connection':'close', **head}
        for k,v in head.items(): self.send_header(k, v)
        self.end_headers()
        self.wfile.write(body)
    def do_GET(self):
        with self.lock:
            Server.asked[self.path] += 1
            nth = Server.asked[self.path]
        kind,n = re.match(r'/(\w+?)_(\d+)', self.path).groups()
        n = int(n)
        try: getattr(self, kind)(n, nth)
        except (BrokenPipeError,ConnectionError): pass
    def ok(self, n, nth): self.say(photo(None, n))
    def late(self, n, nth):
        if n>=12: self.gate.wait(600)
        self.ok(n, nth)
    def grey(self, n, nth): self.say(photo(None, n, 'L'))
    def jpeg(self, n, nth): self.say(photo(None, n, kind='jpeg'), 'image/jpeg')
    def lost(self, n, nth): self.say(b'no', 'text/plain', 404)
    def gone(self, n, nth): self.say(b'no', 'text/plain', 410)
    def page(self, n, nth): self.say(b'<html>The picture has moved</html>', 'text/html; charset=utf-8')
    def busy(self, n, nth): self.say(b'', 'text/plain', 503) if nth<3 else self.ok(n, nth)
    def broken(self, n, nth): self.say(b'', 'text/plain', 500)
    def moved(self, n, nth): self.say(b'', code=302, Location=f'/ok_{n}')
    def round(self, n, nth): self.say(b'', code=302, Location=f'/round_{n}')
    def local(self, n, nth): self.say(b'', code=302, Location='file:///etc/hostname')
    def cut(self, n, nth):
        raw = photo(None, n)
        self.say(raw[:50], length=len(raw))
        self.close_connection = True
    def hangs(self, n, nth):
        self.free.wait(600)
        self.close_connection = True
    def stalls(self, n, nth):
        raw = photo(None, n)
        self.say(raw[:50], length=len(raw))
        self.wfile.flush()
        self.free.wait(600)
    def drips(self, n, nth):
        raw = photo(None, n)
        self.say(b'', length=len(raw))
        for b in raw:
            if self.free.wait(.1): break
            self.wfile.write(bytes([b]))
            self.wfile.flush()
    def drops(self, n, nth):
        self.close_connection = True
        self.connection.shutdown(2)

@pytest.fixture
def web():
    Server.asked.clear()
    Server.free.clear()
    Server.gate.set()
    s = ThreadingHTTPServer(('127.0.0.1',0), Server)
    s.daemon_threads = True
    threading.Thread(target=s.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{s.server_port}'
    Server.free.set()
    Server.gate.set()
    s.shutdown()
    s.server_close()

@pytest.fixture
def impatient(monkeypatch):
    "What never answers is given up after 3 s; all else has its time, however busy the machine is."
    download = sources._download
    def three_seconds(url, timeout):
        never = any(f'/{kind}_' in url for kind in ('hangs','stalls','drips'))
        return download(url, 3. if never else timeout)
    monkeypatch.setattr(sources, '_download', three_seconds)

def get(web, d, *names, progress=False, timeout=300., retries=1, **kw):
    urls = [f'{web}/{n}' for n in names]
    return fetch_images(urls, d, progress=progress, timeout=timeout, retries=retries, **kw)

def test_pictures_are_fetched_once(web, tmp_path):
    names = [f'ok_{i}.png' for i in range(20)]
    files,failed = get(web, tmp_path, *names, *[n+' \t' for n in names])
    eq((len(files),failed,set(Server.asked.values())), (20,{},{1}))
    eq(get(web, tmp_path, *names)[0], files)
    eq(get(web, tmp_path, *names, download=False), (files,{}))
    eq(set(Server.asked.values()), {1})
    eq(sorted(tmp_path.iterdir()), sorted(files.values()))               # no failed.json, nothing half written

@pytest.mark.parametrize('kind,says,times', [
    ('lost','404',1), ('gone','410',1), ('page',r'not a picture that can be read \(text/html, 34 bytes\)',1),
    ('broken','500.*after 2 trials',2), ('hangs','no answer within 300 s, after 2 trials',2),
    ('stalls','no answer within 300 s',2), ('drips','no answer within 300 s',2),
    ('cut','50 of .* bytes arrived|no connection',2), ('drops','no connection',2), ('round','302',1),
    ('local','302',1)])
def test_what_servers_do(web, impatient, tmp_path, kind, says, times):
    files,failed = get(web, tmp_path, f'{kind}_7.png', 'ok_1.png')
    assert list(files)==[f'{web}/ok_1.png']
    (url,why), = failed.items()
    assert re.search(says, why), why
    eq(url, f'{web}/{kind}_7.png')
    if kind!='round': eq(Server.asked[f'/{kind}_7.png'], times)
    eq(json.loads((tmp_path/'failed.json').read_text()), failed)
    eq(len(list(tmp_path.iterdir())), 2)
    eq(get(web, tmp_path, 'ok_1.png', 'ok_2.png')[1], {})
    eq(json.loads((tmp_path/'failed.json').read_text()), {}) # the report is of the last time

def test_a_busy_server_and_a_moved_picture(web, tmp_path):
    files,failed = get(web, tmp_path, 'busy_1.png', 'moved_2.png', 'grey_3.png', 'jpeg_4', retries=2)
    eq((len(files),failed), (4,{}))

def test_one_hanging_server_does_not_hold_up_the_rest(web, impatient, tmp_path):
    files,failed = get(web, tmp_path, *[f'hangs_{i}.png' for i in range(8)], *[f'ok_{i}.png' for i in range(8)],
                       retries=0)
    eq((len(files),len(failed)), (8,8))

def test_no_server_and_no_address(tmp_path):
    urls = ['http://127.0.0.1:9/a.png','ftp://x/a.png','file:///etc/hostname','http:///a.png','http://exa mple/ä.png',
            '','a.png']
    files,failed = fetch_images(urls, tmp_path, retries=0, timeout=300, progress=False)
    eq((files,set(failed)), ({},set(urls)))
    assert 'no connection' in failed[urls[0]] and 'not an address' in failed[urls[2]]

@pytest.mark.filterwarnings('ignore:.*fork')
def test_killed_while_fetching(web, tmp_path):
    "What had arrived is whole and is not asked for again; the rest is fetched; the set is as if nothing had been."
    names = [f'late_{i}.png' for i in range(24)]
    def here(): return [*(tmp_path/'d').glob('late*.png')]
    p = multiprocessing.get_context('fork').Process(target=get, args=(web,tmp_path/'d',*names),
                                                    kwargs=dict(workers=2))
    Server.gate.clear()                                                  # the later half is held back
    p.start()
    while len(here())<5 and p.is_alive(): time.sleep(.005)
    os.kill(p.pid, signal.SIGKILL)
    p.join()
    Server.gate.set()
    there = {f.name:f.read_bytes() for f in here()}
    assert 0<len(there)<24 and not [n for n,b in there.items() if b!=photo(None, int(re.search(r'\d+', n)[0]))]
    files,failed = get(web, tmp_path/'d', *names, workers=8)
    eq((len(files),failed), (24,{}))
    eq([i for i,f in enumerate(files.values()) if f.read_bytes()!=photo(None, i)], [])
    again = [n for n,k in Server.asked.items() if k>1]
    assert len(again)<=3 and not [n for n in again if any(f.startswith(n[1:-4]+'-') for f in there)], again

def test_names_from_the_web_stay_in_their_folder(web, tmp_path):
    names = ['ok_1/../../x.png','ok_2.png?a=/../b','ok_3%2f..%2fy.png','ok_4.exe','ok_5'+'z'*300+'.png',
             'ok_6/…/ä.png']
    files,failed = get(web, tmp_path/'d', *names)
    eq((len(files),failed), (6,{}))
    eq({f.parent for f in files.values()}, {tmp_path/'d'})
    eq(len(list(tmp_path.iterdir())), 1)
    assert all(f.suffix in ('.png','.img') and len(f.name)<90 for f in files.values())


# MUSTI

def record(web, i, **kw):
    fields = dict(id=i, image=f'{web}/ok_{i//2}.png'+' '*(i%2), language=('en','fr','de','it')[i%4], title=f'Title {i}',
                  subtask1_label=('YES','NO')[i%3==0], subtask2_labels=['smoke'], text=f'A passage {i}.\n It goes on.')
    return dict(fields, **kw)

def musti(d, rs, **kw):
    f = d/'musti.json'
    f.write_text(json.dumps(rs), encoding='utf-8-sig')
    return f

@pytest.mark.filterwarnings('ignore:MUSTI leaves')
@pytest.mark.parametrize('wrap', [lambda r: r, lambda r: dict(pairs=r)])
def test_musti(web, tmp_path, wrap):
    grey = record(web, 60, image=f'{web}/grey_60.png', subtask1_label='', subtask2_labels=[])
    lost = record(web, 61, image=f'{web}/lost_61.png')
    f = musti(tmp_path, wrap([*(record(web, i) for i in range(60)),grey,lost]))
    kw = dict(folder=tmp_path/'kept', progress=False, test=.3, size=16)
    with pytest.warns(UserWarning, match='MUSTI leaves out 1 picture.*lost_61.png: 404'): train = MUSTI(f, **kw)
    with pytest.warns(UserWarning, match='leaves out'): test = get_dataset('musti', root=f, split='test', **kw)
    eq(len(train)+len(test), 61)
    eq(set(train.name)&set(test.name), set())
    eq(Counter(Counter(train.name+test.name).values()), {2:30,1:1})
    eq(set(train.failed), {f'{web}/lost_61.png'})
    eq(max(v for k,v in Server.asked.items() if 'ok_' in k), 1)
    for ds in (train,test):
        b = ds[:]
        eq(b['label'].tolist(), [{'YES':1,'NO':0,'':-1}[r['subtask1_label']] for r in ds.rows])
        eq(b['caption'][0], f"A passage {ds.rows[0]['id']}. It goes on.")
        eq((ds.classes,b['image'].shape[1:]), (['NO','YES'],(3,16,16)))
    grey = next(ds[ds.name.index(f'{web}/grey_60.png')] for ds in (train,test) if f'{web}/grey_60.png' in ds.name)
    assert grey['label']==-1 and (grey['image'][0]==grey['image'][2]).all()
    kw.update(test=0, retries=0, language='fr', label='YES')
    french = MUSTI(f, caption='title', **kw)
    eq([r['id'] for r in french.rows], [i for i in range(60) if i%4==1 and i%3])

def test_musti_whose_servers_fail(web, impatient, tmp_path):
    "One that hangs, one without the picture, one that sends a page: told by address, and the others are there."
    bad = dict(hangs='no answer within 300 s', lost='404 Not Found', page=r'not a picture that can be read \(text/html',
               drops='no connection')
    records = [record(web, i) for i in range(8)]
    records += [record(web, 90+i, image=f'{web}/{k}_1.png') for i,k in enumerate(bad)]
    f = musti(tmp_path, records)
    kw = dict(folder=tmp_path/'kept', progress=False, test=0, size=16, retries=0, timeout=300.)
    with pytest.warns(UserWarning, match='MUSTI leaves out 4 pictures'): ds = MUSTI(f, **kw)
    eq(([r['id'] for r in ds.rows],set(ds.failed)), ([*range(8)],{f'{web}/{k}_1.png' for k in bad}))
    for k,why in bad.items(): assert re.match(why, ds.failed[f'{web}/{k}_1.png']), ds.failed
    eq(json.loads((tmp_path/'kept'/'failed.json').read_text()), ds.failed)
    with pytest.warns(UserWarning, match='download=False'):
        eq(len(MUSTI(f, **kw, download=False)), 8)          # later, without a network

def test_musti_has_a_painting_on_one_side_only(web, tmp_path):
    "Also where the same file has two addresses, and however many texts there are."
    rs = [record(web, i, image=f'{web}/ok_{i%20}.{("png","PNG","png?size=large")[i//20]}') for i in range(60)]
    sides = [MUSTI(musti(tmp_path, rs), s, folder=tmp_path/'kept', progress=False, test=.4,
                   size=8) for s in ('train','test')]
    which = [{re.search(r'ok_(\d+)', n)[1] for n in ds.name} for ds in sides]
    eq((which[0]&which[1],sum(map(len, sides)),len(which[0]|which[1])), (set(),60,20))
    assert 2<len(which[1])<18

def test_musti_of_local_files_and_blank_labels(tmp_path):
    for i in range(4): photo(tmp_path/'pics'/f'{i}.jpg', i, kind='jpeg')
    rs = [dict(id=i, image=f'{i%4}.jpg', text=f't{i}', subtask1_label=None) for i in range(8)]
    ds = MUSTI(musti(tmp_path, rs), root=tmp_path/'pics', test=0)
    eq((len(ds),set(ds.label.tolist()),ds.rows[0]['id']), (8,{-1},0))
    rs.append(dict(id=9, image='9.jpg', text='x'))
    with pytest.warns(UserWarning, match='9.jpg: there is no such file'):
        eq(len(MUSTI(musti(tmp_path, rs), root=tmp_path/'pics', test=0)), 8)

@pytest.mark.parametrize('change,says', [
    (dict(image=''),r'record 1 \(id 1\) has no image'), (dict(text=None),r'has no text: it has id, image'),
    (dict(subtask1_label='MAYBE'),"subtask1_label is 'MAYBE'"), (dict(image=7),'record 1')])
def test_bad_musti_records(tmp_path, change, says):
    nowhere = 'http://127.0.0.1:9'
    with pytest.raises(ValueError, match=says):
        MUSTI(musti(tmp_path, [record(nowhere, 0),record(nowhere, 1, **change)]))

def test_bad_musti_files(web, tmp_path):
    with pytest.raises(FileNotFoundError, match='multimediaeval'): MUSTI(tmp_path/'none.json')
    with pytest.raises(FileNotFoundError, match='A MUSTI file was not found'): get_dataset('musti')
    with pytest.raises(ValueError, match='under `pairs`'): MUSTI(musti(tmp_path, dict(data=[])))
    with pytest.raises(ValueError, match="caption is 'words'"):
        MUSTI(musti(tmp_path, [record(web, 0)]), caption='words')
    with pytest.raises(FileNotFoundError, match='none of its 1 pictures could be had.*404'), pytest.warns(UserWarning):
        MUSTI(musti(tmp_path, [record(web, 0, image=f'{web}/lost_1')]), folder=tmp_path/'k', progress=False)
    with pytest.raises(FileNotFoundError, match='download=False'), pytest.warns(UserWarning):
        MUSTI(musti(tmp_path, [record(web, 0)]), folder=tmp_path/'k', download=False)


# clip art

def test_the_shipped_clip_art():
    ds = get_dataset('clipart', test=0)
    eq((len(ds),len(set(ds.name)),ds.image.shape[1:],len(ds.classes)), (512,512,(3,64,64),len(set(ds.label.tolist()))))
    assert all(re.fullmatch(r"[a-z][a-z0-9',\- ]{0,60}", c) for c in ds.caption) and len(set(ds.caption))>450
    assert ds.image.flatten(1).float().std(1).min()>10 and len({bytes(x) for x in ds.image.flatten(1).numpy()})==512
    sides = [ClipArt(split=s) for s in ('train','test')]
    eq(sum(map(len, sides)), 512)
    assert 25<len(sides[1])<80
    eq(set(sides[0].caption)&set(sides[1].caption), set())
    def title(ds): return {r['title'].lower() for r in ds.rows}
    eq(title(sides[0])&title(sides[1]), set())

def test_the_shipped_clip_art_says_its_licence():
    with zipfile.ZipFile(Path(__import__('fastldm').__file__).parent/'assets'/'clipart.zip') as z:
        assert 'public domain' in z.read('LICENSE.txt').decode() and z.testzip() is None

def fake_clipart(d, n=30):
    "The layout of the folder openclipart64, and of Debian's packages, with the same drawings."
    rows = [('file','category','title','description','keywords','source')]
    for i in range(n):
        where = f"{('animals/birds','food')[i%2]}/thing{i:02d}_jane_doe"
        title = f'Bird N{i//3}' if i%2 else f'Clipart by Jane - fish_{"abcdefghijklmno"[i//2]}'
        rows.append((f'{i:05d}.png',where.rpartition('/')[0],title.lower(),'','',where))
        photo(d/'openclipart64'/f'{i:05d}.png', i)
        photo(d/'openclipart'/'png'/f'{where}.png', i, 'RGBA', (80,40))
        svg(d/'openclipart'/'svg'/f'{where}.svg', title)
    folder(d/'openclipart64', 0, rows)
    return n

def svg(f, title, licence='http://web.resource.org/cc/PublicDomain'):
    f.parent.mkdir(parents=True, exist_ok=True)
    work = f'<dc:title>{title}</dc:title><cc:license rdf:resource="{licence}"/>'
    f.write_text(f'<svg><metadata><cc:Work rdf:about="">{work}</cc:Work></metadata></svg>')

def test_the_three_sources_agree(tmp_path):
    n = fake_clipart(tmp_path)
    gpl = 'http://creativecommons.org/licenses/GPL/2.0/'
    svg(tmp_path/'openclipart'/'svg'/'food'/'mine.svg', 'Mine &amp; yours', gpl)
    photo(tmp_path/'openclipart'/'png'/'food'/'mine.png')
    svg(tmp_path/'openclipart'/'svg'/'computer'/'icon.svg', 'Icon')
    photo(tmp_path/'openclipart'/'png'/'computer'/'icon.png')
    for s in ('train','test'):
        a,b = (ClipArt(tmp_path, s, source=o, test=.4) for o in ('folder','debian'))
        eq(sorted(zip(a.name,a.caption,a.label.tolist())), sorted(zip(b.name,b.caption,b.label.tolist())))
        eq(len(ClipArt(tmp_path, s, test=.4)), len(a))                       # found by itself
    ds = ClipArt(tmp_path, source='debian', test=0, size=32)
    eq((len(ds),ds.classes), (n,['animals','food']))
    assert 'fish a' in ds.caption and (ds.image[0,:,:4]==255).all()

def test_clip_art_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="openclipart64.*source='debian'"): ClipArt(tmp_path, source='folder')
    if not Path('/usr/share/openclipart').exists():
        with pytest.raises(FileNotFoundError, match='apt-get install openclipart-svg openclipart-png'):
            ClipArt(tmp_path, source='debian')
    with pytest.raises(ValueError, match="source is 'svg'"): ClipArt(source='svg')

@pytest.mark.slow
def test_debians_clip_art():
    if not Path('/usr/share/openclipart/svg').is_dir():
        pytest.skip('apt-get install openclipart-svg openclipart-png to read the whole of Open Clip Art')
    train,test = (ClipArt(split=s, source='debian', cache=0) for s in ('train','test'))
    assert 2500<len(train)<4000 and .05<len(test)/len(train)<.2 and len(set(train.caption+test.caption))>1500
    small = ClipArt(split='test')
    eq({n for n in small.name if n not in test.name and 'mateya' not in n},
       set())   # what is for testing of the shipped ones is for testing here
    at = {n:i for i,n in enumerate(test.name)}
    err = [(small[i]['image']-test[at[n]]['image']).abs().mean() for i,n in enumerate(small.name) if n in at]
    assert sum(e<.1 for e in err)>.8*len(err)                               # the same drawings


# emoji, paintings, photographs

def emoji(**kw):
    try: return Emoji(**kw)
    except FileNotFoundError as e: pytest.skip(str(e))

@pytest.mark.slow
def test_emoji():
    train,test = emoji(size=24),emoji(size=24, split='test')
    name = dict(zip(train.name+test.name, train.caption+test.caption))
    eq(name['U+1F407'], 'rabbit')
    eq(len(name), len(train)+len(test))
    def signs(ds): return {n.split('-')[0] for n in ds.name}
    eq(signs(train)&signs(test), set())
    assert .03<len(signs(test))/len(signs(train))<.2
    x = torch.cat([train.image,test.image]).float()
    assert x.shape[1:]==(3,24,24) and x.flatten(1).std(1).min()>3 and x[:,:,0,0].mean()>230
    if 'U+1F44B-1F3FF' in name:
        eq(name['U+1F44B-1F3FF'], 'waving hand sign, dark skin tone')
        eq(name['U+1F469-1F3FB-200D-1F9B0'], 'woman with red hair, light skin tone')
        assert len(Emoji(size=24, variants=False))<len(train)
    assert not any(re.search('regional|fitzpatrick|component', c) for c in name.values())

def test_emoji_without_a_font(tmp_path, monkeypatch):
    monkeypatch.setattr('fastldm.data.sources.FONT_FOLDERS', [str(tmp_path)])
    with pytest.raises(FileNotFoundError, match='apt-get install fonts-noto-color-emoji'): Emoji()
    (tmp_path/'Emoji.ttf').write_bytes(b'no font')
    with pytest.raises(FileNotFoundError, match='no colour emoji font'): Emoji()
    with pytest.raises(FileNotFoundError, match='no colour emoji font was found in .*nothing.ttf'):
        Emoji(font=tmp_path/'nothing.ttf')

def test_paintings_and_photos(tmp_path):
    for i in range(8):
        photo(tmp_path/'wikiart-titles'/f'{i}.png', i)
        photo(tmp_path/'flickr8k-1k'/f'{i}.png', i)
    paintings = [(f'{i}.png',('Rococo','Cubism')[i%2],'Anna B',f'boats {i//2}','') for i in range(8)]
    sentences = [(f'{i}.png',f'A dog , {k} .') for i in range(8) for k in range(5)]
    folder(tmp_path/'wikiart-titles', 0, [('file','style','artist','title','year'),*paintings])
    folder(tmp_path/'flickr8k-1k', 0, [('file','caption'),*sentences])
    art = get_dataset('paintings', root=tmp_path, test=0)
    eq((art.caption[2],art.classes,art.label[:2].tolist()),
       ('boats 1, rococo painting by anna b',['Cubism','Rococo'],[1,0]))
    both = [set(r['title'] for r in Paintings(tmp_path, s, test=.5).rows) for s in ('train','test')]
    eq(both[0]&both[1], set())
    photos = get_dataset('photos', root=tmp_path/'flickr8k-1k', test=0)
    eq((len(photos),len(photos.firsts),photos.caption[1]), (40,8,'A dog , 1'))
    for name in ('paintings','photos'):
        with pytest.raises(FileNotFoundError, match='To get it'): get_dataset(name, root=tmp_path/'none')
    with pytest.raises(ValueError, match=r'it can have \{file\}, \{style\}'): Paintings(tmp_path, form='{size}')

def test_all_have_their_names():
    eq([DATASETS[n] for n in 'captioned musti clipart emoji paintings photos'.split()],
       [Captioned,MUSTI,ClipArt,Emoji,Paintings,Photos])
