"""Every process of the suite computes with one thread: several run at once, and threads that wait for others spin."""

import os

# Read when torch and NumPy are imported, and inherited by what a test starts.
os.environ.setdefault("OMP_NUM_THREADS", "1")
