"""What needs a GPU host, real servers or several SGLang releases, and what it measured (``results/``)."""
