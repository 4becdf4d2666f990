import warnings

__version__ = "0.0.1"

# From 2.14 on torch says this, as a FutureWarning, to everyone who imports fastai, which scripts
# two activation functions. Only fastai can change that. It is kept back here, because every import
# of this package passes here before it imports fastai.
warnings.filterwarnings("ignore", r"`torch\.jit\.script` is (deprecated|not supported)",
                        FutureWarning, r"torch\.jit\._script")
