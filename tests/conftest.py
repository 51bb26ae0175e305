"""Settings of all tests."""

import os

from hypothesis import Phase, settings

# On a GPU every example may compile a kernel: a failure is reported as it was found, not after minutes of shrinking.
PHASES = [Phase.explicit, Phase.reuse, Phase.generate] if os.environ.get("VITQ_TEST_DEVICE") else list(Phase)
# A shared machine stalls for longer than any deadline; how fast code is, benchmarks say.
settings.register_profile("vitq", deadline=None, phases=PHASES)
settings.load_profile("vitq")
