"Scores of images, texts, control, faces and scenes."

from .images import *
from .text import *
from .control import *
from .faces import *
from .scenes import *
