"Many pictures: drawn into shards by one process or several, killed and continued, scored from the files."
import importlib.util, json, multiprocessing, shutil, signal, tarfile, time
from pathlib import Path
import pytest, torch
from types import SimpleNamespace
from fastldm.core import read_settings, spread_indices
from fastldm.data import Pictures, Shards
from fastldm.recipes import many
from fastldm.recipes import DrawnPictures, codes_cli, draw_shards, eval_cli, sample_cli

class GreyNet(torch.nn.Module):
    "Features of a picture: its pixels."
    def __init__(self):
        super().__init__()
        self.where = torch.nn.Parameter(torch.zeros(1))
    def features(self, x): return x.flatten(1).float()

SETTINGS = dict(n=64, steps=2, seed=3, per_shard=16)

@pytest.fixture
def here(tmp_path, monkeypatch):
    "A new folder to work in, without a device or a rank from outside."
    monkeypatch.chdir(tmp_path)
    for name in ('RANK','WORLD_SIZE','LOCAL_RANK'): monkeypatch.delenv(name, raising=False)
    return tmp_path

def contents(folder): return {file.name: file.read_bytes() for file in folder.glob('[!.]*')}

def test_the_command_draws_what_sample_draws(here, mnist):
    "Bit for bit, with labels by turns beside the pictures; the same command again draws nothing."
    sample_cli('mnist', out='drawn', **SETTINGS)
    drawn = DrawnPictures('drawn')
    whole = mnist.sample(64, label=[i%10 for i in range(64)], steps=2, seed=3, batch_size=16)
    assert torch.equal(drawn.pixels(range(64)), (whole.clamp(0, 1)*255).round().byte())
    assert drawn[:]['label'].tolist()==[i%10 for i in range(64)]
    with tarfile.open('drawn/000001.tar') as tar: (here/'one.png').write_bytes(tar.extractfile('00000017.png').read())
    assert read_settings('one.png').items()>=dict(model='mnist', first=17, n=1, seed=3, steps=2).items()
    before = contents(here/'drawn')
    sample_cli('mnist', out='drawn', **SETTINGS)
    assert contents(here/'drawn')==before

def test_a_shard_that_was_lost(here):
    "A drawing without one of its files is not scored; the command draws the file again."
    sample_cli('mnist', out='drawn', **SETTINGS)
    before = contents(here/'drawn')
    (here/'drawn/000002.tar').unlink()
    with pytest.raises(ValueError, match='has lost 000002.tar'): DrawnPictures('drawn')
    sample_cli('mnist', out='drawn', **SETTINGS)
    assert contents(here/'drawn').keys()==before.keys() and len(DrawnPictures('drawn'))==64

REFUSED = {
    'steps was 2, is 3': dict(SETTINGS, steps=3),
    'seed was 3, is 4': dict(SETTINGS, seed=4),
    'n was 64, is 80': dict(SETTINGS, n=80),
    'label': dict(SETTINGS, label='7'),
    'shards go into a folder': dict(SETTINGS, out='drawn.png'),
    'expected a whole number': dict(SETTINGS, per_shard=0),
}

@pytest.fixture(scope='module')
def drawing(tmp_path_factory):
    "A folder that was drawn into."
    folder = tmp_path_factory.mktemp('many')/'drawn'
    sample_cli('mnist', out=folder, **SETTINGS)
    return folder

@pytest.mark.parametrize('says', REFUSED)
def test_another_drawing_is_refused(here, drawing, says):
    "Two drawings in one folder would be one set, and a wrong one."
    before = contents(drawing)
    options = dict(out=drawing) | REFUSED[says]
    with pytest.raises(SystemExit, match=says): sample_cli('mnist', **options)
    assert contents(drawing)==before

def test_processes_share_the_shards(here, drawing, monkeypatch):
    "What `torchrun` tells the processes decides who draws what; the files are those of one process."
    monkeypatch.setenv('WORLD_SIZE', '3')
    with pytest.raises(SystemExit, match='give --per_shard'): sample_cli('mnist', n=4, steps=2, out='grid.png')
    with pytest.raises(SystemExit, match='codes are written by one process'): codes_cli('scenes', 'scenes', 'codes')
    for rank,shards in enumerate((['000000.tar','000003.tar'], ['000001.tar'], ['000002.tar'])):
        monkeypatch.setenv('RANK', str(rank))
        before = contents(here/'shared')
        sample_cli('mnist', out='shared', **SETTINGS)
        assert sorted(contents(here/'shared').keys()-before.keys()-{'index.json','drawing.json','classes.json'})==shards
    assert contents(here/'shared')==contents(drawing)

def test_scored_from_the_files(here, drawing, capsys):
    "The folder takes the place of the model; a drawing that is not finished is refused."
    eval_cli(str(drawing), out='scores.json')
    scores = json.loads((here/'scores.json').read_text())
    assert scores['n']==64 and scores['real_n']==10_000 and 0<scores['fid']<3
    assert scores['label_accuracy']>.7
    assert 'fid' in capsys.readouterr().out
    draw_shards(lambda n, first: torch.zeros(n,1,28,28), 8, 'half', {}, per_shard=4, share=(0,2), progress=False)
    with pytest.raises(SystemExit, match='is not finished'): eval_cli('half')

def greys(n, first):
    time.sleep(.01)
    return (torch.arange(first, first+n)%256/255)[:,None,None,None].expand(n,1,8,8)

def draw_greys(folder): draw_shards(greys, 600, folder, dict(seed=0), per_shard=64, part=8, progress=False)

def test_killed_at_any_moment(here):
    "Nothing that is half written is taken for a shard; the next run draws the rest, and clears what is left."
    def shards(): return sorted((here/'killed').glob('[0-9]*.tar'))
    for delay in (0, .03, .06):
        child = multiprocessing.get_context('fork').Process(target=draw_greys, args=('killed',))
        n_before = len(shards())
        child.start()
        while len(shards())==n_before and child.is_alive(): time.sleep(.005)
        time.sleep(delay)
        child.kill()
        child.join()
        assert child.exitcode==-signal.SIGKILL
    for folder in ('killed','whole'): draw_greys(folder)
    assert contents(here/'killed')==contents(here/'whole')
    assert [file.name for file in (here/'killed').glob('.*')]==['.lock']
    assert Shards(shards(), size=8, channels=1).pixels(range(600))[:,0,0,0].tolist()==[i%256 for i in range(600)]

def test_the_table_of_memory_is_drawn_anew(here, monkeypatch):
    "One command measures what training on rows on disk takes, and puts the table into the notebook."
    root = Path(__file__).parents[1]
    spec = importlib.util.spec_from_file_location('measure_rows', root/'scripts/measure_rows.py')
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    monkeypatch.setattr(script, 'in_a_process', script.child)          # in this process, which is quicker
    shutil.copy(root/'nbs/core/07_rows.ipynb', 'rows.ipynb')
    options = ['--rows','100','200', '--steps','2', '--folder',str(here), '--notebook','rows.ipynb']
    monkeypatch.setattr('sys.argv', ['measure_rows.py', *options])
    script.main()
    cells = [''.join(cell['source']) for cell in json.loads((here/'rows.ipynb').read_text())['cells']]
    text, = (source for source in cells if '| data | items |' in source)
    assert text.count('\n|')==2+4 and '| latents and text | 100 |' in text
    assert '\n\nMeasured on 20' in text and '1,000,000' not in text
    numbers = json.loads((here/'measured.json').read_text())['rows on disk']
    assert numbers['settings']==dict(rows=[100,200], steps=2)

def test_real_pictures_of_another_size(here):
    "A set of one size is compared in that size, or refused before anything is computed."
    with pytest.raises(ValueError, match='pictures of digits are 16×16, and cannot be compared with 8×8'):
        many._real('digits', None, 8, None, 10)
    features, split = many._real('Digits', None, 16, GreyNet(), 33)
    assert (len(features),split)==(33,'test')
    assert type(many._scorer('Digits')[0]).__name__=='Evaluator'

def test_real_pictures_are_of_all_classes():
    "They are spread over a set that is sorted by class, and drawn ones are the first."
    label = torch.arange(100)//10
    ds = Pictures(label.byte()[:,None,None,None].expand(-1,3,8,8), label, [*'0123456789'])
    seen = []
    def pixels(rows):
        seen.extend(rows)
        return ds.image[rows]
    many._features(SimpleNamespace(pixels=pixels), GreyNet(), spread_indices(len(ds), 20), 8)
    assert {int(ds.label[i]) for i in seen}=={*range(10)} and len(seen)==20

def test_processes_that_start_together(here, monkeypatch):
    "Another one writes drawing.json, and then a shard, between two looks into the folder."
    folder = here/'drawn'
    folder.mkdir()
    glob = Path.glob
    def later(self, pattern):
        found = list(glob(self, pattern))
        (self/'drawing.json').write_text('{"n": 4}')
        (self/'000000.tar').touch()
        return found
    monkeypatch.setattr(Path, 'glob', later)
    many._check_same_drawing(folder, dict(n=4))
    monkeypatch.undo()
    with pytest.raises(ValueError, match='n was 4, is 5'): many._check_same_drawing(folder, dict(n=5))
    (folder/'drawing.json').unlink()
    with pytest.raises(FileExistsError, match='no drawing to resume'): many._check_same_drawing(folder, dict(n=4))
