"""`python tools/missing.py pytest numpy`: prints those of the modules that are not installed."""

import importlib.util
import sys

print(*(name for name in sys.argv[1:] if importlib.util.find_spec(name) is None))
