__version__ = "0.0.1"

import os

# How threads wait for each other: asleep. torch's default is to try again and again for a while, which is a tenth quicker
# on an idle machine, and several times slower where something else runs. It is read when torch is loaded; a choice
# of your own stays.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
