"Models that know how they were built, pictures and figures, the Learner that trains, and perceptual distances."

from .models import *
from .show import *
from .train import *
from .watch import *
from .perceptual import *
from .help import *
from .download import *
from .rows import *
from .processes import *
from .shard import *
