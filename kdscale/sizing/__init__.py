"""How much memory and time a distillation takes on a cluster, from shapes alone. Imports neither torch nor deepspeed.

`model_shape`: what a model is made of; `flops`, `memory`, `speed`: what a step needs; `compare`: which setting to
choose.
"""
