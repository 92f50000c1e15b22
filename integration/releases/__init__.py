"""The SGLang releases: installing one, and testing the plugin against each."""
