"""The HTTP interface: what may be asked of the service, and how it answers."""
