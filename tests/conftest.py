"""Settings of all tests."""

from hypothesis import settings

# A shared machine stalls for longer than any deadline; how fast code is, benchmarks say.
settings.register_profile("vitq", deadline=None)
settings.load_profile("vitq")
