import os
import warnings

__version__ = "0.0.1"

# Every import of this package passes here, before it imports torch or fastai.

# How torch's threads wait for each other: asleep. Its own choice is to try again and again for a
# while, which is a tenth quicker on an idle machine, and can be several times slower where others
# compute too. A choice of yours stays.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# From 2.14 on torch says this, as a FutureWarning, to everyone who imports fastai, which scripts
# two activation functions. Only fastai can change that.
warnings.filterwarnings("ignore", r"`torch\.jit\.script` is (deprecated|not supported)",
                        FutureWarning, r"torch\.jit\._script")
