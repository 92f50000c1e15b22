"""What needs a GPU host, servers or several SGLang releases; ``results/`` holds what was measured."""
