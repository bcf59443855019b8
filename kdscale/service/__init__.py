"""The service: keeps a queue of runs, starts them, watches them and answers for them."""
