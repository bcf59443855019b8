"""What a checkpoint is, what of it can be cut, and how large the outcome would be, from headers and config alone."""

from kdscale.jobs.inspection.inspect import inspect_path

__all__ = ["inspect_path"]
