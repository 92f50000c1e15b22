"""How the fill is hooked into SGLang: one adapter for each generation of its code."""
