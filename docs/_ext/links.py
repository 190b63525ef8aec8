"""Where each file of the repository is on the site, and links that are written accordingly."""

import os
import re
from pathlib import PurePosixPath

IMAGES = {'.png', '.jpg', '.jpeg', '.gif', '.svg', '.webp'}
# Fenced code, code spans and links; the first two are left alone.
CODE = re.compile(r'(^[ \t]*(`{3,}|~{3,}).*?^[ \t]*\2[^\n]*$|(?<!`)(`+)(?!`).+?(?<!`)\3(?!`))', re.M | re.S)
INLINE = re.compile(r'((?:!\[[^\[\]]*)?\]\()([^()\s]+)((?:\s+"[^"]*")?\))')
REFERENCE = re.compile(r'(?m)(^\[[^\]]+\]:\s+)(\S+)()')


def outside_code(text, change):
    """`text` with `change` applied to everything that is neither a fenced block nor a code span."""
    parts, end = [], 0
    for found in CODE.finditer(text):
        parts += [change(text[end : found.start()]), found[0]]
        end = found.end()
    return ''.join(parts + [change(text[end:])])


class Links:
    """Turns links between files of the repository into links between pages of the site."""

    def __init__(self, root, pages, web):
        self.root = root  # of the repository
        self.pages = pages  # path in the repository -> path of the staged page
        self.web = web  # address of the repository at the branch that the site is built from
        self.images = set()  # pictures that pages show
        self.broken = []  # what leads nowhere

    def rewrite(self, text, source):
        """The Markdown of the file `source` with its links rewritten."""

        def change(prose):
            for pattern in (INLINE, REFERENCE):
                prose = pattern.sub(lambda m: m[1] + self.target(m[2], source, m[1][0] == '!') + m[3], prose)
            return prose

        # A link whose text is a code span or a picture is cut in two by `outside_code`; its target is not.
        return outside_code(text, change)

    def target(self, link, source, shown=False):
        """Where one link of `source` leads on the site; `shown` for a picture that is part of the page."""
        if re.match(r'(?i)[a-z][a-z0-9+.-]*:|//|#', link):
            return link
        path, _, fragment = link.partition('#')
        anchor = '#' + fragment if fragment else ''
        path = os.path.normpath(PurePosixPath(source).parent / path).replace(os.sep, '/')
        if page := self.pages.get(path) or (not shown and self.pages.get(self.drawn_by(path))):
            return '/' + page + anchor
        if path.startswith('..') or not (self.root / path).exists():
            self.broken.append(f'{source}: the link {link} leads nowhere')
        elif shown:
            self.images.add(path)
            return '/' + path
        kind = 'tree' if (self.root / path).is_dir() else 'blob'
        return self.web.format(kind=kind, path=path) + anchor

    @staticmethod
    def drawn_by(path):
        """The notebook that makes the picture `figures/a1.png`."""
        return f'nbs/{PurePosixPath(path).with_suffix(".ipynb")}' if PurePosixPath(path).suffix in IMAGES else None
