"""A notebook of nbdev as a page of the site: without what is there for nbdev only, with a way to run it."""

import re

import nbformat
from nbformat.v4 import new_markdown_cell

DIRECTIVE = re.compile(r'\s*#\s*\|\s*([^:\s]+)\s*:?\s*(.*)')
# Cells that serve the export or the notebook itself, not the reader.
PLUMBING = re.compile(r'nbdev_export\(|\bshow_doc\(|colab\.research\.google\.com')
LANGUAGE = dict(name='python', pygments_lexer='ipython3')


def split_directives(source):
    """The `#| name: value` lines that open a cell, as a dict, and the rest of it."""
    found, lines = {}, source.splitlines()
    while lines and (not lines[0].strip() or DIRECTIVE.match(lines[0])):
        if match := DIRECTIVE.match(lines.pop(0)):
            found[match[1]] = match[2].strip()
    return found, '\n'.join(lines).rstrip()


def exported_module(nb):
    """The module that a notebook writes, `diffusion.samplers`, or None."""
    found = (split_directives(c.source)[0].get('default_exp') for c in nb.cells if c.cell_type == 'code')
    return next(filter(None, found), None)


def heading(text, default=''):
    """Title and the one line `> ...` below it of Markdown that opens a page."""
    title = re.search(r'(?m)^#\s+(.+)$', text)
    line = re.search(r'(?m)^>\s+(.+(?:\n>\s*.+)*)$', text)
    summary = re.sub(r'\n>\s*', ' ', line[1]) if line else ''
    return (title[1].strip() if title else default), summary.strip()


def launcher(address, lines, more=''):
    """Badge, install lines and whatever else is said: what makes a notebook run elsewhere."""
    return f"""::::{{container}} launch
[![Open in Colab](/colab.svg)]({address}) and run this first. {more}

```ipython3
{lines}
```
::::"""


def shown(cell, section):
    """A code cell as the reader sees it, or None."""
    directives, cell.source = split_directives(cell.source)
    hidden = directives.keys() & {'hide', 'default_exp', 'include'} or PLUMBING.search(cell.source)
    if hidden or not cell.source.strip():
        return None
    tags = [t for d, t in (('hide_input', 'remove-input'), ('hide_output', 'remove-output')) if d in directives]
    cell.metadata = nbformat.from_dict(dict(tags=tags, mystnb=dict(image=dict(alt=f'Output: {section}'))))
    cell.outputs = [o for o in cell.outputs if o.get('name') != 'stderr']
    for output in cell.outputs:
        output.get('data', {}).pop('application/vnd.jupyter.widget-view+json', None)
    return cell


def stage(nb, rewrite, launch):
    """The notebook as a page; `rewrite` changes Markdown, `launch` comes below the title."""
    cells, section = [], ''
    for cell in nb.cells:
        if cell.cell_type == 'code':
            cells.append(shown(cell, section))
        elif cell.cell_type == 'markdown' and not PLUMBING.search(cell.source):
            if titles := re.findall(r'(?m)^#+\s+(.+)$', cell.source):
                section = titles[-1].replace('`', '')
            cell.source, cell.metadata = rewrite(cell.source), {}
            cells.append(cell)
    cells = [c for c in cells if c is not None]
    cells.insert(1, new_markdown_cell(launch, id='launch'))
    nb.cells, nb.metadata = cells, nbformat.from_dict(dict(language_info=LANGUAGE))
    return nb
