"""``sglang-nsa-plugin bench``: times one fill by SGLang and by the plugin, in one process."""
