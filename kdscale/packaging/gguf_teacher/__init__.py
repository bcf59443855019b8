"""GGUF files as teachers: read back into the standard format, safetensors, config.json and tokenizer.json."""
