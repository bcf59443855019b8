"""Models of several modalities: the language model inside, as transformers builds and loads it."""
