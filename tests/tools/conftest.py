"""The scaffold of the serving tests imports what SGLang brings: requests, psutil, safetensors."""

from importlib.util import find_spec

collect_ignore = [] if find_spec("sglang") else ["test_programmatic_noop.py", "test_serving_parts.py"]
