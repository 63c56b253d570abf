"""Two workers share two processor cores: each keeps to one thread, and so do the processes they start."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported, which reads it once
