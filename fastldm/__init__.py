__version__ = "0.1.0"

import importlib, sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .core.help import show_parameters
    from .core.show import images
    from .diffusion.ldm import LatentDiffusion, available, load, save

_PARTS = ('cli','core','data','diffusion','codes','control','metrics','recipes','ui')
_HOMES = dict(LatentDiffusion='diffusion.ldm', available='diffusion.ldm', load='diffusion.ldm', save='diffusion.ldm',
              images='core.show', show_parameters='core.help') # name: its module, imported when it is first used
__all__ = [*_HOMES, '__version__']

def __getattr__(name):
    "A part of the library, or one of the names that stand for most of it."
    if name in _PARTS: return importlib.import_module(f'fastldm.{name}')
    if name not in _HOMES: raise AttributeError(f"module 'fastldm' has no attribute {name!r}")
    globals()[name] = found = getattr(importlib.import_module(f'fastldm.{_HOMES[name]}'), name)
    return found

def __dir__(): return [*globals(), *_PARTS, *_HOMES]

if 'IPython' in sys.modules:
    from .core.help import show_parameters
    show_parameters()
