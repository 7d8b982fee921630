"""Settings for all tests."""

from hypothesis import settings

# Time limits per example would fail on a machine that does other work.
settings.register_profile("unhurried", deadline=None)
settings.load_profile("unhurried")
