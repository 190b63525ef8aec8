"Text to image by codes: VQ-VAE-2, codes in LMDB, PixelSNAIL, BLIP."

from .vqvae import *
from .store import *
from .pixelsnail import *
from .text_encoder import *
from .blip import *
from .text2image import *
