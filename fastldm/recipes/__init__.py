"Every shipped model as a recipe; training, sampling, evaluation and figures as commands."

from .recipes import *
