"""Text that ships with the package; see README.md in this folder for where it comes from."""
