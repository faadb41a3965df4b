"""A pytest plugin that says which file a module was loaded from, so that nobody is fooled."""

import os
import sys


def pytest_sessionfinish() -> None:
    name = os.environ["MUTANT_MODULE"]
    module = sys.modules.get(name)
    where = getattr(module, "__file__", None) or "nowhere: no test imported it"
    sys.stdout.write(f"\nmutant-module {where}\n")
