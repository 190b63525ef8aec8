"What an installed package has, and how it gets the weights that it has not: from a server, checked, continued, once."
import json, os, re, runpy, shutil, subprocess, sys, tarfile, time, zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import pytest
from fastldm import available, load
from fastldm.core import cache_folder, fetch_published, published
from range_server import same, serve

ROOT = Path(__file__).parents[1]
WEIGHTS = ROOT/'fastldm'/'weights'
MODEL = 'flowers5_evaluator'                           # 1.1 MB, for research only: not in the wheel
FIRST_PROGRAM = re.search(r'```python\n(.*?)```', (ROOT/'README.md').read_text(encoding='utf-8'), re.S)[1]
LARGEST = 46_000_000                                   # bytes of the wheel, as CONTRIBUTING.md says

def in_manifest(): return re.findall(r'^graft fastldm/weights/(\w+)$', (ROOT/'MANIFEST.in').read_text(), re.M)


# ---- what ships

def test_manifest_is_of_these_weights():
    "Sizes and digests are those of the files; `python scripts/write_manifest.py` writes them again."
    manifest = runpy.run_path(str(ROOT/'scripts'/'write_manifest.py'))['manifest']()
    written = json.loads((WEIGHTS/'manifest.json').read_text(encoding='utf-8'))
    assert written==manifest, 'run python scripts/write_manifest.py'

def test_the_wheel_is_free():
    "No weights in it are for research only, and each is there."
    licences = {name: published()[name]['licence'] for name in in_manifest()}
    assert {'mnist','fashion','avatars','scenes'} <= set(licences)
    assert not [name for name,licence in licences.items() if re.search('research|non-commercial', licence)]
    assert [name for name,entry in published().items() if 'research' in entry['licence']]      # there are others

@pytest.fixture(scope='module')
def built(tmp_path_factory):
    "The source distribution of what git knows or would add here, and the wheel that is built from it."
    folder = tmp_path_factory.mktemp('built')
    listed = subprocess.run(['git','ls-files','-co','--exclude-standard'], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode: pytest.skip('not a git checkout')
    for name in listed.stdout.splitlines():
        if name.startswith('figures/') or not (ROOT/name).is_file(): continue
        (folder/'tree'/name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT/name, folder/'tree'/name)
    def build(what, cwd):
        program = f'from setuptools import build_meta; build_meta.build_{what}({str(folder)!r})'
        done = subprocess.run([sys.executable,'-c',program], cwd=cwd, capture_output=True, text=True)
        assert done.returncode==0, done.stderr
    build('sdist', folder/'tree')
    with tarfile.open(next(folder.glob('*.tar.gz'))) as archive: archive.extractall(folder/'unpacked', filter='data')
    build('wheel', next((folder/'unpacked').iterdir()))
    return folder

@pytest.fixture(scope='module')
def installed(built):
    "A folder with the package as the wheel installs it."
    with zipfile.ZipFile(next(built.glob('*.whl'))) as wheel: wheel.extractall(built/'site')
    return built/'site'

@pytest.mark.slow
def test_wheel(built, installed):
    "Its size, its weights, and that nothing of the tests and notebooks is in it."
    assert next(built.glob('*.whl')).stat().st_size <= LARGEST
    names = {folder.name for folder in (installed/'fastldm'/'weights').iterdir() if folder.is_dir()}
    assert names=={*in_manifest()}
    for name in names:
        for file,expected in published()[name]['files'].items():
            assert (installed/'fastldm'/'weights'/name/file).stat().st_size==expected['size']
    assert {path.name.split('-')[0] for path in installed.iterdir()}=={'fastldm'}

@pytest.mark.slow
def test_source_distribution(built):
    "It has the notebooks, the tests, and the weights of the wheel and no others."
    source = next((built/'unpacked').iterdir())
    notebooks = {file.relative_to(built/'tree') for file in (built/'tree'/'nbs').rglob('*.ipynb')}
    assert notebooks and notebooks=={file.relative_to(source) for file in (source/'nbs').rglob('*.ipynb')}
    assert (source/'tests'/'test_install.py').exists()
    assert {folder.name for folder in (source/'fastldm'/'weights').iterdir() if folder.is_dir()}=={*in_manifest()}

def run(program, installed, tmp_path, **env):
    "A program in a process of its own, with the installed package."
    env = {**os.environ, 'PYTHONPATH':str(installed), 'FASTLDM_CACHE':str(tmp_path/'cache'), **env}
    env.pop('FASTLDM_WEIGHTS', None)
    return subprocess.Popen([sys.executable,'-c',program], cwd=tmp_path, env=env, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)

@pytest.mark.slow
def test_ten_lines_run_when_installed(installed, tmp_path):
    "README's first program, outside of the repository, with what is in the wheel."
    process = run(FIRST_PROGRAM+'\nimport fastldm\nprint(fastldm.__file__)', installed, tmp_path)
    out,err = process.communicate()
    assert process.returncode==0, err
    assert Path(out.strip()).is_relative_to(installed)
    assert (tmp_path/'dresses.png').stat().st_size>1000

WHAT_IS_THERE = f'''
from fastldm import available, load
print(available())
print(available(details=True))
try: load({MODEL!r})
except FileNotFoundError as error: print(error)
try: load('flowers5_evaluatr')
except FileNotFoundError as error: print(error)
'''

@pytest.mark.slow
def test_what_is_elsewhere_is_said(installed, tmp_path):
    "Names and licences of all models; an address is what it takes to load one that is not here."
    process = run(WHAT_IS_THERE, installed, tmp_path)
    out,err = process.communicate()
    assert process.returncode==0, err
    names,*table,no_address,misspelt = out.splitlines()
    assert names==str([n for n in available() if n in in_manifest()])
    assert len(table)==len(published())
    assert [line for line in table if re.match('faces .*LatentDiffusion .*not here: set FASTLDM_HUB.*research', line)]
    assert [line for line in table if re.match('local_scenes .*ControlAdapter', line)]
    assert 'does not ship in the installed package' in no_address and 'set FASTLDM_HUB' in no_address
    assert "did you mean 'flowers5_evaluator'" in misspelt

@pytest.mark.slow
def test_a_download_that_was_killed_continues(installed, tmp_path):
    "The process is killed in the middle; the next one asks for the rest, and loads the model."
    program = f'from fastldm import load\nprint(load({MODEL!r}).meta["fingerprint"])'
    with serve(WEIGHTS) as server:
        server.pause = .3
        process = run(program, installed, tmp_path, FASTLDM_HUB=server.address)
        arrived = []
        while process.poll() is None and not arrived:
            time.sleep(.05)
            arrived = [f for f in (tmp_path/'cache').rglob('reference.safetensors.partial') if f.stat().st_size>10**5]
        process.kill()
        process.communicate()
        assert arrived, 'the download ended before it could be killed'
        kept = arrived[0].stat().st_size
        server.pause = 0.
        process = run(program, installed, tmp_path, FASTLDM_HUB=server.address)
        out,err = process.communicate()
        assert out.strip()==load(MODEL).meta['fingerprint'], err
        assert [start for path,start,_ in server.served if path.endswith('reference.safetensors')]==[0,kept]


# ---- what can go wrong, in this process

@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv('FASTLDM_CACHE', str(tmp_path/'cache'))
    return tmp_path/'cache'

def test_without_ranges(cache, monkeypatch):
    "A server that knows none sends all again after an interruption."
    with serve(WEIGHTS, ranges=False) as server:
        monkeypatch.setenv('FASTLDM_HUB', server.address)
        server.limits = [10**6, 10**5]                       # the card passes, the second file ends early
        folder = fetch_published(MODEL, progress=False)
        assert not [start for _,start,_ in server.served if start]
    assert load(str(folder)).meta==load(MODEL).meta

def damaged(raw): return raw[:-1]+bytes([raw[-1]^1])
def longer(raw): return raw+b'more'

def test_a_damaged_file_is_refused(cache, monkeypatch):
    "A changed byte: the error says so, nothing is kept, and the right file is taken afterwards."
    with serve(WEIGHTS) as server:
        monkeypatch.setenv('FASTLDM_HUB', server.address)
        server.change = damaged
        with pytest.raises(ValueError, match='is not the file that was published'): fetch_published(MODEL, False)
        assert not [f for f in cache.rglob('*') if f.is_file() and f.suffix!='.lock']
        server.change = longer
        with pytest.raises(ValueError, match='is not the file that was published'): fetch_published(MODEL, False)
        server.change = same
        assert fetch_published(MODEL, False).is_dir()

def test_what_the_address_lacks(cache, monkeypatch, tmp_path):
    "A server and a folder without the model, a server that is not there, and no address."
    (tmp_path/'empty').mkdir()
    with serve(tmp_path/'empty') as server: addresses = [server.address, str(tmp_path/'empty')]
    with serve(tmp_path/'empty') as server:
        for address in (server.address, *addresses):
            monkeypatch.setenv('FASTLDM_HUB', address)
            with pytest.raises(FileNotFoundError) as error: fetch_published('faces', False)
            message = str(error.value)
            assert "'faces' does not ship" in message and address in message
            assert 'fastldm/weights/faces of the repository (6 MB' in message and 'set FASTLDM_HUB' in message
    monkeypatch.setenv('FASTLDM_HUB', 'no/such/folder')
    with pytest.raises(ValueError, match='expected a namespace'): fetch_published('faces', False)

def test_a_folder_is_checked_too(cache, monkeypatch, tmp_path):
    "The weights of another version, in a folder."
    shutil.copytree(WEIGHTS/MODEL, tmp_path/'disk'/MODEL)
    monkeypatch.setenv('FASTLDM_HUB', str(tmp_path/'disk'))
    config = tmp_path/'disk'/MODEL/'config.json'
    raw = config.read_bytes()
    config.write_bytes(raw+b'\n')
    with pytest.raises(ValueError, match='config.json of .*disk is not the file'): fetch_published(MODEL, False)
    config.write_bytes(raw)
    folder = fetch_published(MODEL, False)
    assert folder==cache_folder(published()[MODEL])/MODEL
    assert sorted(f.name for f in folder.iterdir())==sorted(published()[MODEL]['files'])

def test_two_at_once(cache, monkeypatch):
    "Each file is sent once."
    with serve(WEIGHTS) as server:
        monkeypatch.setenv('FASTLDM_HUB', server.address)
        server.pause = .02
        with ThreadPoolExecutor(2) as pool: folders = [*pool.map(fetch_published, [MODEL]*2, [False]*2)]
        assert folders[0]==folders[1]
        assert len(server.served)==len(published()[MODEL]['files'])

def test_available_with_an_address(cache, monkeypatch):
    "Where `FASTLDM_HUB` is set, what can be downloaded is listed, too; what was downloaded is found without it."
    from fastldm.diffusion import ldm
    here = ldm.weights_folders
    monkeypatch.setattr(ldm, 'weights_folders', lambda: here()[1:])          # as if nothing were in the package
    assert available('')==[]
    monkeypatch.setenv('FASTLDM_HUB', str(WEIGHTS))
    assert available('')==sorted(published())
    assert available('PhotoEvaluator', details=True)[0]['where']==f'FASTLDM_HUB={WEIGHTS}'
    fetch_published(MODEL, False)
    monkeypatch.delenv('FASTLDM_HUB')
    assert available('')==[MODEL]
    assert load(MODEL).meta['licence']==published()[MODEL]['licence']
