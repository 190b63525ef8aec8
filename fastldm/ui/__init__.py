"A mask painted with the mouse, and a page to draw with."

from .paint import *
from .app import *
