"""Leaves out the files whose adapter is another than that of the installed SGLang.

They are no tests of this release; ``make test-releases`` runs each file with the releases it is for.
"""

from __future__ import annotations

from sglang_nsa_plugin.adapters import in_graph

OF_GRAPHS = ["test_in_graph.py", "test_declined.py", "test_runner.py", "test_shadow_check.py"]
OF_EAGER = ["test_eager.py"]

collect_ignore = OF_EAGER if in_graph.is_generation() else OF_GRAPHS
