"""How much memory and time a distillation takes on a cluster, from shapes alone. Imports neither torch nor deepspeed.

`shape`: what a model is made of; `memory`: bytes a GPU by component; `speed`: seconds a step; `choose`: which setting.
"""
