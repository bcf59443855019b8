"""kdscale: prune a language model to a budget, distil the teacher back into it, and show the result."""

__version__ = "0.1.0"
