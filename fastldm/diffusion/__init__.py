"The frame: autoencoder, schedules, U-Net, conditions, denoiser, samplers, and `LatentDiffusion` that puts them together."

from .autoencoder import *
from .schedules import *
from .unet import *
from .cond import *
from .denoiser import *
from .samplers import *
from .ldm import *
from .constraints import *
from .edit import *
from .distill import *
from .lora import *
from .export import *
