__version__ = "0.1.0"

from .diffusion.ldm import LatentDiffusion, available, load, save
from .core.help import show_parameters
from .core.show import images

show_parameters()
