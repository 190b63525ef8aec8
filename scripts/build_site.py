"""Build the documentation site from the stored notebooks, offline: `python scripts/build_site.py [--out _site]`.

Pages are staged in a temporary folder, Sphinx turns them into HTML, and every link inside the site is followed.
A warning or a broken link is an error. No notebook is run; the library is imported for its signatures.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from configparser import ConfigParser
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / 'docs'
sys.path[:0] = [str(ROOT), str(DOCS / '_ext')]

import nbformat

import api_pages
import check_html
import notebooks
from links import Links

# The order in the navigation. A folder that is not named here comes last, so that nothing gets lost.
ORDER = ['core', 'data', 'diffusion', 'codes', 'control', 'metrics', 'recipes', 'ui', 'cli', 'howto', 'figures']
TITLES = dict(howto='How to', ui='User interface', cli='Commands', figures='Figures')
# Extras that are not for the reader of a notebook.
NOT_FOR_COLAB = {'dev', 'docs'}


def settings():
    """The section of `settings.ini`."""
    config = ConfigParser(delimiters=['='])
    config.read(ROOT / 'settings.ini', encoding='utf-8')
    return config['DEFAULT']


def natural(path):
    """A key that puts a2 before a10."""
    return [int(t) if t.isdigit() else t for t in re.split(r'(\d+)', path.name)]


def bare(stem):
    """The name of a notebook without its number."""
    return re.sub(r'^\d+[a-z]?_', '', stem)


class Notebook:
    """A notebook and its place on the site."""

    def __init__(self, path, part):
        self.path = path.relative_to(ROOT).as_posix()
        self.part = part
        self.nb = nbformat.read(path, 4)
        self.title, self.summary = notebooks.heading(self.nb.cells[0].source, bare(path.stem))
        self.module = notebooks.exported_module(self.nb)
        self.page = f'{part}/{bare(path.stem)}' if part else 'tour'


class Part:
    """A folder of notebooks."""

    def __init__(self, folder):
        self.name = folder.name
        self.notebooks = [Notebook(f, self.name) for f in sorted(folder.glob('*.ipynb'), key=natural)]
        own, gallery = folder / 'README.md', ROOT / self.name / 'README.md'
        readme = gallery if gallery.exists() and not own.exists() else own
        self.source = readme.relative_to(ROOT).as_posix()
        self.text = readme.read_text(encoding='utf-8') if readme.exists() else ''
        default = TITLES.get(self.name, self.name.capitalize())
        self.title, _ = notebooks.heading(self.text, default)
        self.text = self.text or f'# {self.title}\n'
        self.page = f'{self.name}/index'

    @property
    def modules(self):
        """Its notebooks that write a module."""
        return [n for n in self.notebooks if n.module]


def find_parts():
    """The folders of `nbs` that hold notebooks, in order."""
    folders = [d for d in (ROOT / 'nbs').iterdir() if d.is_dir() and d.name[0] not in '._' and any(d.glob('*.ipynb'))]
    rank = {name: i for i, name in enumerate(ORDER)}
    return [Part(d) for d in sorted(folders, key=lambda d: (rank.get(d.name, len(rank)), d.name))]


class Site:
    """Everything that becomes a page."""

    def __init__(self, stage):
        self.stage = stage
        self.cfg = settings()
        self.parts = find_parts()
        self.front = [Notebook(f, '') for f in [ROOT / 'nbs/index.ipynb'] if f.exists()]
        self.notes = sorted(f for f in ROOT.glob('*.md') if f.name != 'README.md')
        web = f'{self.cfg["git_url"]}/{{kind}}/{self.cfg["branch"]}/{{path}}'
        self.links = Links(ROOT, self.pages(), web)
        self.package = self.cfg['lib_path']
        self.api = {}
        for notebook in self.notebooks:
            if notebook.module:
                self.api[notebook.module] = api_pages.load(f'{self.package}.{notebook.module}')
        self.names = self.linkable()

    @property
    def notebooks(self):
        """All notebooks."""
        return self.front + [n for p in self.parts for n in p.notebooks]

    def pages(self):
        """Path in the repository -> path of the staged page."""
        pages = {'README.md': 'index.md', **{f.name: f.stem.lower() + '.md' for f in self.notes}}
        for notebook in self.notebooks:
            pages[notebook.path] = notebook.page + '.ipynb'
        for part in self.parts:
            paths = {f'nbs/{part.name}', part.source, Path(part.source).parent.as_posix()}
            pages.update(dict.fromkeys(paths, part.page + '.md'))
        return pages

    # ---- Markdown

    def linkable(self):
        """Public names that are no ordinary word, and what they lead to."""
        found = {}
        for module, entries in self.api.values():
            for entry in entries:
                if re.search(r'[A-Z_]', entry.name) and entry.kind != 'data':
                    found.setdefault(entry.name, []).append(f'{module.__name__}.{entry.name}')
        return {name: places[0] for name, places in found.items() if len(places) == 1}

    def rewrite(self, text, source):
        """The Markdown of a file, with links that lead somewhere on the site, and names of the API linked to it."""
        return self.link_names(self.links.rewrite(text, source))

    def link_names(self, text):
        """`name` becomes a link where it is a public name, except in headings and in the text of a link."""
        pattern = r'(?m)^#.*$|\[[^\]]*\]\([^)]*\)|(?<!`)`([A-Za-z_]\w*)(?:\(\))?`(?!`)'

        def link(found):
            place = self.names.get(found[1])
            return f'{{py:obj}}`{found[1]} <{place}>`' if place else found[0]

        blocks = re.split(r'(?ms)(^[ \t]*```.*?^[ \t]*```[^\n]*$)', text)
        return ''.join(b if i % 2 else re.sub(pattern, link, b) for i, b in enumerate(blocks))

    def write(self, page, text):
        """Write a staged page."""
        path = self.stage / page
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding='utf-8')

    # ---- pages

    def launch(self, notebook):
        """Badge and install lines of a notebook."""
        url, branch = self.cfg['git_url'], self.cfg['branch']
        colab = url.replace('https://github.com', 'https://colab.research.google.com/github')
        extras = [k.removesuffix('_requirements') for k in self.cfg if k.endswith('_requirements')]
        extras = ','.join(e for e in extras if e not in NOT_FOR_COLAB)
        repo = url.split('/')[-1]
        folder = f'{repo}/{Path(notebook.path).parent.as_posix()}'
        lines = [f'!git clone -q --depth 1 {url}', f'%pip install -q "./{repo}[{extras}]"', f'%cd {folder}']
        more = f'All parameters are in the [API](/api/{self.api_page(notebook)}.md).' if notebook.module else ''
        return notebooks.launcher(f'{colab}/blob/{branch}/{notebook.path}', '\n'.join(lines), more)

    def write_notebook(self, notebook):
        """The page of a notebook."""
        staged = notebooks.stage(notebook.nb, lambda t: self.rewrite(t, notebook.path), self.launch(notebook))
        path = self.stage / f'{notebook.page}.ipynb'
        path.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(staged, path)

    def write_part(self, part):
        """The page of a part: what its README says, then the notebooks that the README does not link to."""
        text = self.rewrite(part.text, part.source)
        rest = [n for n in part.notebooks if f'/{n.page}.ipynb' not in text]
        if rest:
            title = '## Notebooks' if len(rest) == len(part.notebooks) else '## More notebooks'
            items = [f'- [{n.title}](/{n.page}.ipynb): {self.link_names(n.summary)}' for n in rest]
            text = '\n'.join([text.rstrip(), '', title, '', *items])
        if part.modules:
            text += f'\n\nFunctions and classes: [{self.package}.{part.name}](/api/{part.name}/index.md).\n'
        self.write(part.page + '.md', text + '\n\n' + toctree([n.page for n in part.notebooks]))

    def api_page(self, notebook):
        """Where the module of a notebook is described."""
        return notebook.module.replace('.', '/')

    def write_module(self, notebook):
        """The page of a module."""
        module, entries = self.api[notebook.module]
        source = self.links.web.format(kind='blob', path=module.__name__.replace('.', '/') + '.py')
        intro = f'> {notebook.summary}\n\n' if notebook.summary else ''
        intro += f'Notebook: [{notebook.title}](/{notebook.page}.ipynb). [Source]({source}).'
        text = api_pages.module_page(module, entries, module.__name__, intro, self.link_names)
        self.write(f'api/{self.api_page(notebook)}.md', text)

    def write_api_part(self, part):
        """Every public name of a part in one sentence."""
        text = [f'# {self.package}.{part.name}', '']
        for notebook in part.modules:
            module, entries = self.api[notebook.module]
            text += [f'## [{notebook.title}](/api/{self.api_page(notebook)}.md)', '']
            for entry in entries:
                role = f'{{py:obj}}`{entry.name} <{module.__name__}.{entry.name}>`'
                doc = entry.doc.split(': `')[0] if entry.kind == 'data' else entry.doc
                text.append(f'- {role}: {api_pages.prose(doc)}')
            text.append('')
        text.append(toctree([f'{n.module.split(".")[-1]} </api/{self.api_page(n)}>' for n in part.modules]))
        self.write(f'api/{part.name}/index.md', '\n'.join(text))

    def write_api(self):
        """All pages of the API."""
        parts = [p for p in self.parts if p.modules]
        text = ['# API', '', 'Each public function and class, with a table of its parameters.', '']
        text += [self.top_level(), '']
        text += [f'- [{self.package}.{p.name}](/api/{p.name}/index.md): ' + self.modules_of(p) for p in parts]
        text += ['', toctree([f'{p.name} </api/{p.name}/index>' for p in parts])]
        self.write('api/index.md', '\n'.join(text))
        for part in parts:
            self.write_api_part(part)
            for notebook in part.modules:
                self.write_module(notebook)

    def top_level(self):
        """What the package itself gives."""
        found = []
        for name, value in vars(import_module(self.package)).items():
            module = getattr(value, '__module__', None)
            if callable(value) and name[0] != '_' and (module or '').startswith(self.package + '.'):
                found.append(f'{{py:obj}}`{name} <{module}.{name}>`')
        return f'`from {self.package} import ...`: ' + ', '.join(found) if found else ''

    def modules_of(self, part):
        """Links to the modules of a part."""
        return ', '.join(f'[{n.module.split(".")[-1]}](/api/{self.api_page(n)}.md)' for n in part.modules)

    def write_front(self):
        """The home page with the navigation, and the other texts of the repository."""
        text = self.rewrite((ROOT / 'README.md').read_text(encoding='utf-8'), 'README.md')
        library = [p.page for p in self.parts if p.modules]
        other = [p.page for p in self.parts if not p.modules]
        trees = [
            toctree([f'A tour <{n.page}>' for n in self.front] + other, 'Start'),
            toctree(library, 'Notebooks'),
            toctree(['API <api/index>'], 'Reference'),
            toctree([f.stem.lower() for f in self.notes], 'Project'),
        ]
        self.write('index.md', '\n\n'.join([text, *trees]))
        for note in self.notes:
            self.write(note.stem.lower() + '.md', self.rewrite(note.read_text(encoding='utf-8'), note.name))

    def write_all(self):
        """Stage every page, then the pictures that they show."""
        self.write_front()
        self.write_api()
        for part in self.parts:
            self.write_part(part)
        for notebook in self.notebooks:
            self.write_notebook(notebook)
        for image in self.links.images:
            (self.stage / image).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / image, self.stage / image)
        shutil.copy(DOCS / '_static/colab.svg', self.stage)


def toctree(pages, caption=''):
    """A hidden table of contents, which the navigation shows."""
    head = ['```{toctree}', ':hidden:'] + [f':caption: {caption}'] * bool(caption)
    pages = [p if p.startswith('/') or '<' in p else f'/{p}' for p in pages]
    return '\n'.join([*head, '', *pages, '```', ''])


def sphinx(stage, out, work):
    """Run Sphinx with warnings as errors; its exit status and its warnings."""
    warnings = work / 'warnings.txt'
    command = [sys.executable, '-m', 'sphinx', '-b', 'html', '-q', '-n', '-W', '--keep-going', '-c', DOCS]
    command += ['-d', work / 'doctrees', '-w', warnings, stage, out]
    code = subprocess.run(list(map(str, command)), env={**os.environ, 'PYTHONHASHSEED': '0'}).returncode
    text = warnings.read_text(encoding='utf-8') if warnings.exists() else ''
    return code, text.splitlines()


def build(out):
    """Build the site in the folder `out`; what is wrong with it, one line each."""
    out = Path(out).resolve()
    shutil.rmtree(out, ignore_errors=True)
    with tempfile.TemporaryDirectory() as work:
        work = Path(work)
        stage = work / 'stage'
        site = Site(stage)
        site.write_all()
        code, warnings = sphinx(stage, out, work)
    faults = site.links.broken + [w.replace(f'{stage}{os.sep}', '') for w in warnings]
    if code and not faults:
        faults.append(f'Sphinx ended with {code}')
    (out / '.nojekyll').touch()  # GitHub would leave out folders that begin with an underscore
    return faults + check_html.faults(out)


def main():
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--out', default='_site', help='folder of the site; what it holds is replaced')
    args = parser.parse_args()
    faults = build(args.out)
    print(*faults, sep='\n')
    print(f'{args.out}: {len(list(Path(args.out).rglob("*.html")))} pages, {len(faults)} faults')
    return 1 if faults else 0


if __name__ == '__main__':
    sys.exit(main())
