"Models that know how they were built, the Learner that trains them, and perceptual distances."

from .models import *
from .train import *
from .perceptual import *
