"The start of every command: help at once, the rest when it is needed."

from .start import *
