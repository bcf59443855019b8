"""The directions of the residual stream that a student keeps, as rows that stay near the teacher's own channels.

The importance stage orders the directions; the student's channels may be any basis of the ones that it keeps. Norms
scale channel by channel, so of all these bases the one nearest to plain channels does least harm. numpy only.

D teacher's hidden · H student's hidden
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def kept_directions(rotation_DD: NDArray[np.float32], count: int) -> Floats:
    """[H, D] with orthonormal rows that span the first `count` rows of an orthogonal matrix.

    With J the `count` channels that the span holds most of, the rows are turned so that their columns J are symmetric
    and positive: as near to the unit vectors of J as any orthonormal basis of the span (orthogonal Procrustes).
    """
    rows_HD = np.linalg.qr(np.asarray(rotation_DD[:count], dtype=np.float64).T)[0].T
    share_D = np.square(rows_HD).sum(0)
    channels = np.sort(np.argsort(-share_D, kind="stable")[:count])
    left_HH, _, right_HH = np.linalg.svd(rows_HD[:, channels])
    turned: Floats = (left_HH @ right_HH).T @ rows_HD
    return turned
