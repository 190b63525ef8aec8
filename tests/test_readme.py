"The front door: the README is short, its links work, and its programs run after the plain install."
import re, runpy, subprocess, sys
from pathlib import Path
import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT/'README.md').read_text(encoding='utf-8')
PROGRAMS = re.findall(r'```python\n(.*?)```', README, re.S)

def test_it_is_short():
    assert len(README.split())<=900

def test_links_are_absolute_on_the_package_index(monkeypatch):
    "What setuptools shows there has no relative link, and the same targets as the file."
    import setuptools
    shown = {}
    monkeypatch.setattr(setuptools, 'setup', shown.update)
    monkeypatch.chdir(ROOT)
    runpy.run_path('setup.py')
    links = re.findall(r'\]\(([^)]+)\)', shown['long_description'])
    assert links and all(link.startswith('https://') for link in links)
    relative = [re.sub(r'https://\S+?/(blob|raw)/main/', '', link) for link in links]
    assert relative==re.findall(r'\]\(([^)]+)\)', README)
    assert shown['package_data']['fastldm'][-1]=='py.typed' and (ROOT/'fastldm/py.typed').exists()

@pytest.mark.slow
def test_ten_lines_need_the_plain_install_only(tmp_path):
    "The first program runs where nothing is installed but what settings.ini requires, and leaves its picture."
    blocked = ['matplotlib','torchvision','transformers','diffusers','seaborn','pandas','sklearn','scipy','lmdb']
    program = f'import sys\nfor m in {blocked}: sys.modules[m] = None\n'+PROGRAMS[0]
    done = subprocess.run([sys.executable,'-c',program], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode==0, done.stderr
    assert (tmp_path/'dresses.png').stat().st_size>1000

@pytest.mark.slow
def test_the_programs_run_as_pasted(tmp_path):
    "One after the other, as they stand."
    pytest.importorskip('python_avatars')
    pytest.importorskip('transformers')
    program = '\n'.join(PROGRAMS)
    done = subprocess.run([sys.executable,'-c',program], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode==0, done.stderr
