"""Settings of the documentation site. `scripts/build_site.py` prepares the pages and runs Sphinx with them."""

import sys
from configparser import ConfigParser
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / '_ext'))

settings = ConfigParser(delimiters=['='])
settings.read(HERE.parent / 'settings.ini', encoding='utf-8')
settings = settings['DEFAULT']

project = settings['lib_name']
author = settings['author']
project_copyright = settings['copyright']
version = release = settings['version']
language = 'en'

extensions = ['myst_nb', 'sphinx_copybutton', 'mathml']
exclude_patterns = ['_build']
add_module_names = False
python_maximum_signature_line_length = 90
toc_object_entries_show_parents = 'hide'

# Notebooks are shown with the outputs that are stored in them.
nb_execution_mode = 'off'
nb_merge_streams = True
nb_ipywidgets_js = {}  # widgets would be loaded from a CDN
nb_number_source_lines = False

myst_enable_extensions = ['dollarmath', 'amsmath', 'colon_fence', 'deflist']
myst_heading_anchors = 4
myst_dmath_double_inline = True
myst_links_external_new_tab = False

# Formulas become MathML when the site is built: no script and no font has to be loaded to read them.
html_math_renderer = 'mathml'

html_theme = 'sphinx_book_theme'
html_title = project
html_baseurl = settings['doc_host'] + settings['doc_baseurl'] + '/'
html_static_path = ['_static']
html_css_files = ['site.css']
html_favicon = '_static/favicon.svg'
html_context = {'default_mode': 'auto'}
html_show_sourcelink = False
html_copy_source = False
html_theme_options = {
    'repository_url': settings['git_url'],
    'use_repository_button': True,
    'use_download_button': False,
    'use_fullscreen_button': False,
    'show_toc_level': 2,
    'home_page_in_toc': False,
    'navbar_persistent': [],  # the search field is in the sidebar
    'pygments_light_style': 'a11y-high-contrast-light',
    'pygments_dark_style': 'a11y-high-contrast-dark',
}

# Only code is copied, not prompts or what was printed.
copybutton_selector = 'div.cell_input pre, div.highlight-sh pre, div.highlight-python pre, div.launch pre'
