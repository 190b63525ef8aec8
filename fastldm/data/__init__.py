"Pictures, captioned sets, icons in several styles, scenes drawn from a grammar, and faces with attributes and masks."

from .images import *
from .public import *
from .augment import *
from .shards import *
from .captioned import *
from .sources import *
from .synthetic import *
from .faces import *
from .drawn_faces import *
from .icons import *
from .table import *
from .arrow import *
