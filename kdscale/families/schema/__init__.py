"""The schema of a family file (`kdscale/families/*.json`), checked strictly.

A family file describes the tensors of one transformers architecture as they are on disk: a name template and one
named axis per dimension. Nothing here imports torch, so that planning starts in a moment.
"""

from __future__ import annotations

from kdscale.families.schema.axes import (
    DIMS,
    SSM_DIMS,
    DimName,
    axis_blocks,
    axis_groups,
    axis_size,
    block_size,
    evaluate,
)
from kdscale.families.schema.config_fields import Constraint, DimField, LayerList, Narrowed, ProductField
from kdscale.families.schema.family_file import FamilyData
from kdscale.families.schema.gguf import Gguf
from kdscale.families.schema.layer_kinds import LayerCondition, LayerKinds
from kdscale.families.schema.tensors import COMPONENT_OF, EXPERT, LAYER, Component, Drop, Sites, TensorTemplate

__all__ = [
    "COMPONENT_OF",
    "DIMS",
    "EXPERT",
    "LAYER",
    "SSM_DIMS",
    "Component",
    "Constraint",
    "DimField",
    "DimName",
    "Drop",
    "FamilyData",
    "Gguf",
    "LayerCondition",
    "LayerKinds",
    "LayerList",
    "Narrowed",
    "ProductField",
    "Sites",
    "TensorTemplate",
    "axis_blocks",
    "axis_groups",
    "axis_size",
    "block_size",
    "evaluate",
]
