"""What the whole suite shares: how hypothesis chooses its examples."""

import os

from hypothesis import settings

# The suite tries the same examples every time, so that it fails because of a change and never
# by chance; HYPOTHESIS_PROFILE=explore looks for new ones.
settings.register_profile("suite", derandomize=True, deadline=None)
settings.register_profile("explore", derandomize=False, deadline=None, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "suite"))
