"""Upload to the Hugging Face hub, and back: `push_to_hub`, `load('user/name')` and `FASTLDM_HUB=user/` through
`huggingface_hub` itself, against a server of this process that speaks the hub's protocol."""
import os, subprocess, sys
from pathlib import Path
import pytest
import torch
from huggingface_hub import ModelCard, constants
from fastldm import load, save
from fastldm.core import fetch_published, published
from fastldm.diffusion import push_to_hub
from fastldm.metrics import Reference
from fastldm.recipes.stages import write_card
from hub_server import hub_server

WEIGHTS = Path(__file__).parents[1]/'fastldm'/'weights'
TOKENS = dict(me='hf_mine', other='hf_other')

@pytest.fixture
def hub(tmp_path, monkeypatch):
    "A hub with two users, an empty cache, and the first user logged in."
    with hub_server(**TOKENS) as server:
        settings = dict(ENDPOINT=server.address, HF_HUB_CACHE=str(tmp_path/'cache'), HF_HUB_OFFLINE=False,
                        HF_HUB_DISABLE_XET=True,
                        HUGGINGFACE_CO_URL_TEMPLATE=server.address+'/{repo_id}/resolve/{revision}/{filename}')
        for name,value in settings.items(): monkeypatch.setattr(constants, name, value)
        monkeypatch.setenv('HF_TOKEN', TOKENS['me'])
        monkeypatch.chdir(tmp_path)
        yield server

@pytest.fixture
def small(tmp_path):
    "A folder as `save` writes it, of a model that is quickly uploaded."
    return save(load('digits_evaluator', 'cpu'), tmp_path/'small', licence='weights Apache-2.0; data CC BY 4.0')

def test_up_and_back(hub, small):
    "What comes back is what went up; the weights are a large file there, the record a plain one."
    address = push_to_hub(small, 'me/small')
    assert address.startswith(f'{hub.address}/me/small')
    files = hub.repos['me/small'].files
    assert files.keys()=={'config.json','model.safetensors'}
    assert {name: file.large for name,file in files.items()}=={'config.json':False, 'model.safetensors':True}
    assert all(file.raw==(small/name).read_bytes() for name,file in files.items())
    back = load('me/small', 'cpu')
    for name,weight in load(small, 'cpu').state_dict().items(): assert torch.equal(weight, back.state_dict()[name])

def test_no_path_of_this_computer_is_published(hub, tmp_path):
    "The folder of one's pictures is named without what leads there, and the card says how to load the model."
    folder = save(load('digits_evaluator', 'cpu'), tmp_path/'mine', data=str(tmp_path/'my pictures'),
                  stages=dict(distil=dict(teacher=str(tmp_path/'teacher'))))
    write_card(folder)
    push_to_hub(folder, 'me/mine')
    files = hub.repos['me/mine'].files
    for file in (files['config.json'], files['README.md']): assert str(tmp_path) not in file.raw.decode()
    assert "fastldm.load('me/mine')" in files['README.md'].raw.decode()
    assert load('me/mine', 'cpu').meta['data']=='my pictures'
    assert load(folder, 'cpu').meta['data']==str(tmp_path/'my pictures')

def test_a_shipped_folder(hub):
    "With its card, whose licence the hub reads, the student, and the reference of an evaluator; and nothing else."
    push_to_hub(WEIGHTS/'fashion', 'me/fashion')
    files = hub.repos['me/fashion'].files
    assert files.keys()==published()['fashion']['files'].keys()
    assert ModelCard(files['README.md'].raw.decode()).data.license=='apache-2.0'
    assert load('me/fashion', 'cpu').sample(1, label=3, calls=1, seed=0).shape==(1,1,28,28)
    push_to_hub(WEIGHTS/'digits_evaluator', 'me/evaluator')
    assert 'reference.safetensors' in hub.repos['me/evaluator'].files

def test_an_upload_changes_what_changed(hub, small):
    "A second upload of the same weights sends them not again."
    push_to_hub(small, 'me/small')
    n = sum(method=='PUT' for method,_,_ in hub.requests)
    (small/'README.md').write_text('# a card\n', encoding='utf-8')
    push_to_hub(small, 'me/small')
    assert sum(method=='PUT' for method,_,_ in hub.requests)==n==1
    assert hub.repos['me/small'].files['README.md'].raw==b'# a card\n'

def test_private(hub, small, monkeypatch):
    "Its owner loads it; another user, and nobody, is told what the hub tells."
    push_to_hub(small, 'me/secret', private=True)
    assert hub.repos['me/secret'].private
    for token in (TOKENS['other'], None):
        if token: monkeypatch.setenv('HF_TOKEN', token)
        else: monkeypatch.delenv('HF_TOKEN')
        with pytest.raises(FileNotFoundError, match="(?s)'me/secret' is not a local folder.*Repository Not Found"):
            load('me/secret', 'cpu')
    monkeypatch.setenv('HF_TOKEN', TOKENS['me'])
    assert load('me/secret', 'cpu').meta==load(small, 'cpu').meta

def test_a_public_repository_stays_public(hub, small):
    "`private` cannot make it private, so nothing is uploaded."
    push_to_hub(small, 'me/open')
    commits = list(hub.repos['me/open'].commits)
    with pytest.raises(ValueError, match="'me/open' exists on the hub and is public"):
        push_to_hub(small, 'me/open', private=True)
    assert hub.repos['me/open'].commits==commits

def test_who_is_not_logged_in(hub, small, monkeypatch, tmp_path):
    "Without a token, or with another's name: an error before anything is sent. A folder without a model: likewise."
    with pytest.raises(Exception, match='403'): push_to_hub(small, 'other/small')
    monkeypatch.delenv('HF_TOKEN')
    with pytest.raises(Exception, match='401'): push_to_hub(small, 'me/small')
    assert 'hf auth login' in push_to_hub.__doc__
    n = len(hub.requests)
    with pytest.raises(FileNotFoundError): push_to_hub(tmp_path/'nothing', 'me/small')
    assert len(hub.requests)==n and not hub.repos

def test_unknown(hub):
    "A repository that is not there, and one without a model."
    with pytest.raises(FileNotFoundError, match="'me/nothing' is not a local folder.*404"): load('me/nothing', 'cpu')
    from huggingface_hub import HfApi
    HfApi().create_repo('me/empty')
    HfApi().upload_file(path_or_fileobj=b'hello', path_in_repo='notes.txt', repo_id='me/empty')
    with pytest.raises(FileNotFoundError): load('me/empty', 'cpu')

def test_an_interrupted_download_continues(hub, small, monkeypatch):
    "The connection ends in the middle of the weights: only the rest is asked for, from the last whole chunk on."
    monkeypatch.setattr(constants, 'DOWNLOAD_CHUNK_SIZE', 10_000)
    push_to_hub(small, 'me/small')
    hub.cuts = [55_000]
    load('me/small', 'cpu')
    assert [r for method,path,r in hub.requests if method=='GET' and path.startswith('/store')]==[None, 'bytes=50000-']

def test_the_second_time_from_the_cache(hub, small, monkeypatch):
    "Offline, and where the hub does not answer."
    push_to_hub(small, 'me/small')
    first = load('me/small', 'cpu').meta
    hub.requests.clear()
    load('me/small', 'cpu')
    assert not [path for method,path,_ in hub.requests if method=='GET' and path.startswith('/store')]
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    hub.requests.clear()
    assert load('me/small', 'cpu').meta==first
    assert not hub.requests
    with pytest.raises(FileNotFoundError, match='offline|OfflineMode|LocalEntryNotFound'): load('me/other', 'cpu')

def test_published_weights_from_a_namespace(hub, tmp_path, monkeypatch):
    "`FASTLDM_HUB=me/`: a model of the manifest, checked file by file; a repository of other weights is refused."
    monkeypatch.setenv('FASTLDM_CACHE', str(tmp_path/'weights'))
    monkeypatch.setenv('FASTLDM_HUB', 'me/')
    name = 'flowers5_evaluator'
    with pytest.raises(FileNotFoundError, match="'flowers5_evaluator' does not ship.*FASTLDM_HUB=me/"):
        fetch_published(name, False)
    push_to_hub(WEIGHTS/name, f'me/{name}')
    hub.cuts = [3000]
    folder = fetch_published(name, False)
    assert {f.relative_to(folder).as_posix() for f in folder.rglob('*')}==published()[name]['files'].keys()
    assert len(Reference.load(folder).features)
    push_to_hub(WEIGHTS/'digits_evaluator', 'me/celeba_classifier')
    with pytest.raises(ValueError, match='is not the file that was published'):
        fetch_published('celeba_classifier', False)

PROGRAM = '''
import sys
from fastldm import load
from fastldm.diffusion import push_to_hub
folder, action = sys.argv[1:]
if action=='push': print(push_to_hub(folder, 'me/small', private=True))
print(load('me/small', 'cpu').meta['fingerprint'])
'''

@pytest.mark.slow
def test_by_the_environment(hub, small, tmp_path):
    "In processes of their own, with HF_ENDPOINT as people set it: up, down, and offline from the cache."
    env = {**os.environ, 'HF_ENDPOINT':hub.address, 'HF_HOME':str(tmp_path/'home'), 'HF_HUB_DISABLE_XET':'1'}
    env['PYTHONPATH'] = str(WEIGHTS.parents[1])
    fingerprint = load(small, 'cpu').meta['fingerprint']
    for action,offline in (('push','0'), ('load','1')):
        done = subprocess.run([sys.executable,'-c',PROGRAM,str(small),action], env=env | {'HF_HUB_OFFLINE':offline},
                              cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode==0, done.stderr
        assert done.stdout.splitlines()[-1]==fingerprint
