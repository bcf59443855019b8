"""Students as drafts of their teacher: speculative decoding, predicted and really done."""
