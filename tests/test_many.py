"Many pictures: drawn into shards by one process or several, killed and continued, scored from the files."
import importlib.util, json, multiprocessing, shutil, signal, tarfile, time
from pathlib import Path
import pytest, torch
from fastldm.core import read_settings
from fastldm.data import Shards
from fastldm.recipes import DrawnPictures, codes_cli, draw_shards, eval_cli, sample_cli

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
        assert sorted(contents(here/'shared').keys()-before.keys()-{'index.json','drawing.json'})==shards
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
