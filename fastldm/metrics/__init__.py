"Scores of images, texts, control, faces and scenes; measurements of speed and memory."

from .images import *
from .text import *
from .control import *
from .faces import *
from .scenes import *
from .icons import *
from .bench import *
