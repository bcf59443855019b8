"""Names of the files that the importance stage leaves; apart from importance.py, which needs torch to import."""

SCORES_FILE, SUMMARY_FILE = "scores.safetensors", "scores.json"
