"""Real SGLang servers, with the plugin and without it, side by side."""
