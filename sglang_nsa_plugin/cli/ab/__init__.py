"""``sglang-nsa-plugin ab``: a running server with the plugin switched on and off, in turn."""
