"""What goes on and on: events of runs and their logs, as streams."""
