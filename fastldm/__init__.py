__version__ = "0.1.0"

from .ldm import LatentDiffusion, available, load, save
