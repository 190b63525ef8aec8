"Every shipped model as a recipe of stages; training, sampling, evaluation and figures as commands."

from .stages import *
from .labels import *
from .faces import *
from .text import *
from .control import *
from .distil import *
from .evaluate import *
from .commands import *
from .draw import *
from .score import *
from .figures import *
from .probes import *
from .face_probes import *
from .control_probes import *
from .text_probes import *
from .pictures import *
from .finetune import *
from .conditions import *
from .own import *
from .many import *
