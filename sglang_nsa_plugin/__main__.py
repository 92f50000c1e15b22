"""``python -m sglang_nsa_plugin`` is the command ``sglang-nsa-plugin``."""

from sglang_nsa_plugin.cli.main import main

raise SystemExit(main())
