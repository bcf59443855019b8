"""Files of a run over HTTP: artifacts, whole folders and the report."""
