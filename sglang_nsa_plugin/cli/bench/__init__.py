"""``sglang-nsa-plugin bench``: times of one fill, SGLang's and the plugin's, in one process."""
