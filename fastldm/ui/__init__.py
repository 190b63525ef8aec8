"A mask painted with the mouse."

from .paint import *
