"""What models can do: tasks with right answers, by lm-evaluation-harness, compared item by item."""
