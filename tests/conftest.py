"""Settings of all tests."""

import os

from hypothesis import Phase, settings

# Workers share the cores: threads of one that spin for a turn keep those of the other from theirs, which takes ten
# times as long as one thread each. Set before anything loads OpenMP.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# On a GPU every example may compile a kernel: a failure is reported as it was found, not after minutes of shrinking.
PHASES = [Phase.explicit, Phase.reuse, Phase.generate] if os.environ.get("VITQ_TEST_DEVICE") else list(Phase)
# A shared machine stalls for longer than any deadline; how fast code is, benchmarks say.
settings.register_profile("vitq", deadline=None, phases=PHASES)
settings.load_profile("vitq")
