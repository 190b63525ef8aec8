"""A Sphinx extension that writes formulas as MathML, which every current browser draws without a script."""

import re
from html import escape

from docutils.nodes import SkipNode
from latex2mathml.converter import convert
from sphinx.util import logging

logger = logging.getLogger(__name__)

# What latex2mathml does not know, in terms of what it does.
REPLACED = {r'\arg': r'\operatorname{arg}'}

# Spaces as TeX sets them, which latex2mathml leaves to the browser.
SCRIPTS = r'(?<!<msub>)(?<!<msup>)(?<!<munder>)(?<!<msubsup>)(?<!<munderover>)'
RELATION = r'(<mo[^>]*>(?:&#x0003D;|&#x02248;|&#x02190;|&#x00028;|\(|,)</mo>)'
SPACE = '<mspace width="0.167em" />'
POLISHED = [
    (r'<mover>(<mi>[^<]*</mi>)<mo stretchy="true">&#x000AF;', r'<mover accent="true">\1<mo stretchy="false">&#x000AF;'),
    (r'<(msub|msup|msubsup)>(<mo minsize[^>]*>.</mo>)', r'\2<\1><mspace height="1em" width="0" />'),
    (r'<mo>(&#x0002F;|&#x02207;|&#x02202;)</mo>', r'<mo lspace="0" rspace="0">\1</mo>'),
    (r'<mo>(&#x02016;|&#x0007C;)</mo>', r'<mo fence="false" stretchy="false" lspace="0" rspace="0">\1</mo>'),
    (RELATION + r'<mo>&#x02212;</mo>', r'\1<mo form="prefix" rspace="0">&#x02212;</mo>'),
    (SCRIPTS + r'<m[io]>([a-zA-Z]{2,})</m[io]>', r'<mi>\1</mi>'),
    (r'(</m(?:i|n|sub|sup|frac|row)>)(<mi>[a-z]{2,}</mi>)', rf'\1{SPACE}\2'),
    (SCRIPTS + r'(<mi>[a-z]{2,}</mi>)(?=<m(?:i|n|sub|sup|frac|sqrt|over|o lspace)\b)', rf'\1{SPACE}'),
]


def to_mathml(latex, display='inline'):
    """MathML of a formula; `ValueError` for a command that would be shown as it is written."""
    known = latex
    for command, other in REPLACED.items():
        known = re.sub(re.escape(command) + r'(?![a-zA-Z])', lambda _: other, known)
    mathml = convert(known.strip(), display=display)
    if left := re.findall(r'(?:\\|&#x0005C;)[a-zA-Z]+', mathml):
        raise ValueError(f'no MathML for {", ".join(left)}')
    for pattern, better in POLISHED:
        mathml = re.sub(pattern, better, mathml)
    label = escape(' '.join(latex.split()), quote=True)
    return mathml.replace('<math ', f'<math alttext="{label}" ', 1)


def write(translator, node, display):
    """Write the formula of a docutils node; a formula that cannot be converted is a warning."""
    try:
        translator.body.append(to_mathml(node.astext(), display))
    except Exception as error:
        logger.warning('formula %r: %s', node.astext(), error, location=node)
        translator.body.append(escape(node.astext()))


def inline(translator, node):
    """A formula in a sentence."""
    write(translator, node, 'inline')
    raise SkipNode


def block(translator, node):
    """A formula on lines of its own, which can be scrolled where the page is narrow."""
    translator.body.append(translator.starttag(node, 'div', CLASS='math'))
    write(translator, node, 'block')
    translator.body.append('</div>\n')
    raise SkipNode


def setup(app):
    """Register the renderer."""
    app.add_html_math_renderer('mathml', (inline, None), (block, None))
    return {'parallel_read_safe': True, 'parallel_write_safe': True}
