"Local control: adapters whose features count in a region, and the same over Stable Diffusion."

from .adapter import *
from .stable import *
