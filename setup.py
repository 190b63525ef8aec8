"Everything is set in settings.ini; this file only hands it to setuptools."
import re
from configparser import ConfigParser
from pathlib import Path
import setuptools

config = ConfigParser(delimiters=['='])
config.read('settings.ini', encoding='utf-8')
cfg = config['DEFAULT']
lib = cfg['lib_path']
minor = int(cfg['min_python'].split('.')[1])

def weights_of_the_wheel():
    "Names of the models that MANIFEST.in puts into the source distribution; the wheel has the same."
    return re.findall(r'^graft fastldm/weights/(\w+)$', Path('MANIFEST.in').read_text(encoding='utf-8'), re.M)

def package_files():
    "Patterns of what the wheel holds beside Python."
    weights = [f'weights/{name}/{files}' for name in weights_of_the_wheel() for files in ('*', 'student/*')]
    return ['weights/manifest.json', *weights, 'assets/*.npz', 'assets/README.md', 'py.typed']

def absolute_links(markdown):
    "The README with links that also work on the package index: pages of the repository, and its pictures as they are."
    page, raw = cfg['git_url']+'/blob/'+cfg['branch'], cfg['git_url']+'/raw/'+cfg['branch']
    markdown = re.sub(r'(!\[[^\]]*\]\()(?!\w+:|#)', rf'\1{raw}/', markdown)
    return re.sub(r'((?<!!)\[[^\]!]*\]\()(?!\w+:|#)', rf'\1{page}/', markdown)

setuptools.setup(
    name=cfg['lib_name'],
    version=cfg['version'],
    description=cfg['description'],
    keywords=cfg['keywords'],
    author=cfg['author'],
    author_email=cfg['author_email'],
    url=cfg['git_url'],
    license='Apache-2.0',
    classifiers=[
        'Development Status :: 3 - Alpha',
        'Intended Audience :: Science/Research',
        'Natural Language :: English',
        'Typing :: Typed',
        *(f'Programming Language :: Python :: 3.{i}' for i in range(minor, 14)),
    ],
    packages=setuptools.find_packages(include=[lib, lib+'.*']),
    package_data={lib: package_files()},
    include_package_data=False,
    zip_safe=False,
    python_requires='>='+cfg['min_python'],
    install_requires=cfg['requirements'].split(),
    extras_require={k.removesuffix('_requirements'): v.split() for k,v in cfg.items() if k.endswith('_requirements')},
    long_description=absolute_links(Path('README.md').read_text(encoding='utf-8')),
    long_description_content_type='text/markdown',
    entry_points={'console_scripts': cfg['console_scripts'].split(), 'nbdev': [f'{lib}={lib}._modidx:d']},
)
