"""The commands ``verify``, ``demo`` and ``bench``."""
