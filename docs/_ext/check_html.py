"""Follows every link inside a built site, and finds what a page would load from elsewhere."""

import re
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

# Attributes that make a browser load something as soon as it shows the page.
LOADED = {('script', 'src'), ('img', 'src'), ('iframe', 'src'), ('source', 'src'), ('video', 'src'), ('embed', 'src')}
LOADED_LINKS = {'stylesheet', 'icon', 'shortcut icon', 'preload', 'modulepreload', 'preconnect', 'dns-prefetch'}
CSS = re.compile(r'(?:url\(\s*|@import\s+)["\']?((?:https?:)?//[^"\')\s]+)')


class Page(HTMLParser):
    """The anchors of a page, where it leads, and what it loads."""

    def __init__(self, text):
        super().__init__()
        self.anchors, self.links, self.loads = set(), [], CSS.findall(text)
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.anchors |= {attrs[k] for k in ('id', 'name') if attrs.get(k)}
        loaded = [v for k, v in attrs.items() if (tag, k) in LOADED and v]
        if tag == 'link' and attrs.get('rel') in LOADED_LINKS:
            loaded.append(attrs.get('href', ''))
        self.loads += loaded
        self.links += loaded
        if tag == 'a' and attrs.get('href'):
            self.links.append(attrs['href'])


def is_elsewhere(address):
    """Whether an address leads out of the site."""
    parts = urlsplit(address)
    return bool(parts.netloc) or parts.scheme not in ('', 'data')


@cache  # every page has the navigation, which links to every other page
def resolve(folder, path):
    """The file that a path leads to from a folder; None where there is none."""
    target = (folder / unquote(path)).resolve()
    if target.is_dir():
        target /= 'index.html'
    return target if target.exists() else None


def broken(path, page, pages):
    """The links of a page that lead to no file or no anchor of the site."""
    for link in dict.fromkeys(page.links):
        if is_elsewhere(link) or link.startswith('data:') or link == '#':
            continue
        parts = urlsplit(link)
        target = resolve(path.parent, parts.path) if parts.path else path
        anchor = unquote(parts.fragment)
        if target is None or (anchor and target in pages and anchor not in pages[target].anchors):
            yield link


def faults(site):
    """What is wrong with a built site, one line each."""
    site = Path(site).resolve()
    resolve.cache_clear()
    files = [f for f in sorted(site.rglob('*.html')) if f.relative_to(site).parts[0] != '_static']  # templates
    pages = {f: Page(f.read_text(encoding='utf-8')) for f in files}
    found = []
    for path, page in pages.items():
        name = path.relative_to(site).as_posix()
        found += [f'{name}: the link {link} leads nowhere' for link in broken(path, page, pages)]
        found += [f'{name}: loads {address}' for address in page.loads if is_elsewhere(address)]
    for path in site.rglob('*.css'):
        loads = CSS.findall(path.read_text(encoding='utf-8', errors='replace'))
        found += [f'{path.relative_to(site).as_posix()}: loads {address}' for address in loads]
    return found
