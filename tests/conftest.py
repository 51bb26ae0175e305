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

#: Files that take more than a minute and a half, by `pytest --durations=10`: workers that start with them end together.
LONGEST = (
    "test_cuda_emulated.py",
    "test_triton.py",
    "test_triton_models.py",
    "test_native.py",
    "test_triton_attention.py",
)


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))
