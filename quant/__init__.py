"""Checkpoint -> quantised checkpoint, with the real msmodelslim, one decoder layer at a time."""

import os

# OpenBLAS, which numpy and scipy bring, may hang where msmodelslim calls it in loops that OpenMP runs
# ("Detect OpenMP Loop and this application may hang"), unless it has one thread. It reads this when
# numpy is imported; the arithmetic of the model is torch's, and keeps its threads.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
