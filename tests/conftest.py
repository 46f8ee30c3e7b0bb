"""Settings every test shares: no network, one thread a worker, and property tests that do not depend on the day."""

from __future__ import annotations

import os

from hypothesis import settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Whatever the shell says: in float32 the last bits of a product depend on how many threads share it.
os.environ["OMP_NUM_THREADS"] = "1"

settings.register_profile("suite", deadline=None, derandomize=True)
settings.load_profile("suite")
