"""A pytest plugin: the tests load the library that NSA_MUTANT_LIBRARY names, not the installed one."""

from __future__ import annotations

import os
from pathlib import Path

from sglang_nsa_plugin.kernels import library

library.LIBRARY = Path(os.environ["NSA_MUTANT_LIBRARY"])
