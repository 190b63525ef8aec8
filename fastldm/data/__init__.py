"Pictures, captioned sets, scenes drawn from a grammar, and faces with attributes and masks."

from .images import *
from .captioned import *
from .synthetic import *
from .faces import *
