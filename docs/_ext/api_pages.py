"""Pages of the API: for each public function and class its signature, its sentence and a table of its parameters."""

import ast
import inspect
import re
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module

from fastcore.docments import docments
from links import outside_code

EMPTY = inspect.Parameter.empty
STARS = {inspect.Parameter.VAR_POSITIONAL: '*', inspect.Parameter.VAR_KEYWORD: '**'}


@dataclass
class Entry:
    """One public name."""

    name: str
    kind: str  # a directive of Sphinx's Python domain: `function`, `class`, `method`, `property` or `data`
    doc: str = ''
    signature: str = ''
    rows: list = field(default_factory=list)  # (parameter, type, default, comment)
    returns: tuple = None  # (type, comment)
    members: list = field(default_factory=list)
    options: list = field(default_factory=list)


# ---- what the source says


def definition(function):
    """The syntax tree of a function or a class."""
    return ast.parse(inspect.cleandoc('\n' + inspect.getsource(function))).body[0]


def lines_of(node):
    """Line of each parameter of a function, and of what it returns; of each field of a dataclass."""
    if isinstance(node, ast.ClassDef):
        return {a.target.id: a.lineno for a in node.body if isinstance(a, ast.AnnAssign)}
    a = node.args
    every = [*a.posonlyargs, *a.args, *filter(None, [a.vararg]), *a.kwonlyargs, *filter(None, [a.kwarg])]
    lines = {p.arg: p.lineno for p in every}
    if node.returns:
        lines['return'] = node.returns.end_lineno
    return lines


def comments(function):
    """The comment of each parameter and of `return`; parameters on one line share the one at its end.

    Where that comment has as many parts between semicolons as there are parameters on the line, each gets its own.
    """
    said = {k: v or '' for k, v in docments(function, args_kwargs=True).items()}
    by_line = {}
    for name, line in lines_of(definition(function)).items():
        if name not in ('self', 'cls'):
            by_line.setdefault(line, []).append(name)
    for names in by_line.values():
        text = next((said[n] for n in reversed(names) if said.get(n)), '')
        parts = text.split('; ')
        parts = parts if len(parts) == len(names) else [text] * len(names)
        said.update({n: said.get(n) if said.get(n) and len(set(parts)) == 1 else p for n, p in zip(names, parts)})
    return said


def brief(value):
    """A default or an annotation in few letters."""
    if value is EMPTY:
        return ''
    if isinstance(value, partial):
        return f'partial({brief(value.func)})'
    if isinstance(value, str) and value.isidentifier():
        return repr(value)
    text = getattr(value, '__name__', None) or repr(value)
    return text if ' at 0x' not in text and len(text) < 80 else '...'


def type_of(annotation):
    """An annotation as text."""
    if annotation in (EMPTY, None):
        return ''
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    return text.replace('fastcore.', '').strip("'")


def parameters(function, said, drop_first=False):
    """Signature without annotations, rows of the table, and what is returned."""
    signature = inspect.signature(function)
    params = list(signature.parameters.values())[drop_first:]
    rows = []
    for p in params:
        rows.append((STARS.get(p.kind, '') + p.name, type_of(p.annotation), brief(p.default), said.get(p.name, '')))
    short = [p.replace(annotation=EMPTY, default=p.default if p.default is EMPTY else Shown(p.default)) for p in params]
    returns = type_of(signature.return_annotation), said.get('return', '')
    bare = signature.replace(parameters=short, return_annotation=EMPTY)
    return str(bare), rows, returns if any(returns) else None


class Shown:
    """A default that prints itself shortly."""

    def __init__(self, value):
        self.value = value

    def __repr__(self):
        return brief(self.value) if not isinstance(self.value, str) else repr(self.value)


# ---- entries


def function_entry(name, function, kind='function', drop_first=False):
    """A function or a method."""
    plain = inspect.unwrap(getattr(function, '__func__', function))
    signature, rows, returns = parameters(plain, comments(plain), drop_first)
    return Entry(name, kind, inspect.getdoc(plain) or '', signature, rows, returns)


def partial_entry(name, value):
    """A function with some arguments set."""
    said = comments(inspect.unwrap(value.func))
    given = ', '.join([*map(brief, value.args), *(f'{k}={brief(v)}' for k, v in value.keywords.items())])
    signature, rows, returns = parameters(value, said)
    return Entry(name, 'function', f'`{value.func.__name__}` with `{given}`.', signature, rows, returns)


def initialiser(cls, package):
    """The `__init__` of a class that this package wrote, or None."""
    init = inspect.unwrap(cls.__init__) if inspect.isfunction(cls.__init__) else None
    return init if init and init.__module__.startswith(package) else None


def members(cls):
    """The documented public methods and properties that a class has of its own."""
    for name, value in vars(cls).items():
        function = getattr(value, 'fget', None) or getattr(value, '__func__', value)
        if name.startswith('_') and name != '__call__' or not inspect.isfunction(function) or not function.__doc__:
            continue
        if isinstance(value, property):
            yield Entry(name, 'property', inspect.getdoc(function))
            continue
        entry = function_entry(name, function, 'method', not isinstance(value, staticmethod))
        kinds = {classmethod: ':classmethod:', staticmethod: ':staticmethod:'}
        entry.options = [kinds[type(value)]] if type(value) in kinds else []
        yield entry


def class_entry(name, cls, package):
    """A class, with what it takes to make one."""
    entry = Entry(name, 'class', cls.__doc__ or '', members=list(members(cls)))
    if '__dataclass_fields__' in vars(cls):
        entry.signature, entry.rows, _ = parameters(cls, comments(cls))
        if entry.doc.startswith(f'{cls.__name__}('):  # written by `dataclass`
            entry.doc = ''
    elif init := initialiser(cls, package):
        entry.signature, entry.rows, _ = parameters(init, comments(init), True)
    return entry


def data_entry(name, value):
    """A constant: its value, or the names in it where that is long."""
    text = repr(value)
    if len(text) < 100 and ' at 0x' not in text:
        return Entry(name, 'data', options=[f':value: {text}'])
    named = hasattr(value, '__iter__') and all(isinstance(v, str) for v in value)
    items = ': ' + ', '.join(f'`{v}`' for v in value) if named else ''
    return Entry(name, 'data', f'A `{type(value).__name__}` of {len(value)}{items}.')


def entry_of(name, value, package):
    """What there is to say about one public name."""
    if inspect.isclass(value):
        return class_entry(name, value, package)
    if isinstance(value, partial):
        return partial_entry(name, value)
    if callable(value) and inspect.isfunction(inspect.unwrap(value)):
        return function_entry(name, value)
    return data_entry(name, value)


def positions(module):
    """The line on which each name of a module is defined."""
    lines = {}
    for node in ast.parse(inspect.getsource(module)).body:
        names = [node.name] if hasattr(node, 'name') else []
        for target in getattr(node, 'targets', []):
            names += [n.id for n in ast.walk(target) if isinstance(n, ast.Name)]
        lines.update(dict.fromkeys(names, node.lineno))
    return lines


def entries(module):
    """The public names that a module defines, in the order of its source."""
    package, lines = module.__name__.split('.')[0], positions(module)
    for name in sorted(module.__all__, key=lambda n: lines.get(n, 0)):
        value = getattr(module, name)
        home = getattr(value, '__module__', module.__name__)
        if isinstance(value, partial) or not callable(value) or home == module.__name__:
            yield entry_of(name, value, package)


# ---- Markdown


def prose(text):
    """A comment or a docstring as Markdown: what is not code is shown as it is written."""
    return outside_code(text, lambda words: re.sub(r'([\\*_<>$\[\]])', r'\\\1', words))


def cell_text(text):
    """Prose for a cell of a table."""
    return prose(' '.join(text.split())).replace('|', r'\|')


def code_text(text):
    """Code for a cell of a table."""
    return f'`{text}`'.replace('|', r'\|') if text else ''


def table(entry):
    """The parameters and what is returned."""
    rows = [(f'`{n}`', code_text(t), code_text(d), cell_text(c)) for n, t, d, c in entry.rows]
    if entry.returns:
        rows.append(('*returns*', code_text(entry.returns[0]), '', cell_text(entry.returns[1])))
    if not rows:
        return ''
    head = ['| | type | default | |', '|---|---|---|---|']
    return '\n'.join(head + ['| ' + ' | '.join(r) + ' |' for r in rows]) + '\n'


def directive(entry, rewrite, depth=6):
    """An entry in MyST, its members inside it."""
    fence = ':' * depth
    doc = rewrite(prose(entry.doc))
    inner = [directive(m, rewrite, depth - 1) for m in entry.members]
    body = '\n'.join([*entry.options, '', doc, '', table(entry), *inner])
    return f'{fence}{{py:{entry.kind}}} {entry.name}{entry.signature}\n{body}\n{fence}\n'


def module_page(module, found, title, intro, rewrite):
    """The page of one module."""
    parts = [f'# {title}', intro, f'```{{py:module}} {module.__name__}\n```']
    return '\n\n'.join(parts + [directive(e, rewrite) for e in found]) + '\n'


def load(name):
    """A module with its entries."""
    module = import_module(name)
    return module, list(entries(module))
