"""An edge of the reference on a case of the catalog; the proofs of all ops are in test_proof."""

import numpy as np
from gaugeblock.reference.catalog import CATALOG

from tests.proof.points import point

HIDDEN_NAN = "top_left_hidden_nan"


def test_the_output_of_a_hidden_nan_is_finite():
    case = next(c for c in CATALOG["attention"].cases if c.name == HIDDEN_NAN)
    p = point(CATALOG["attention"], case)
    assert np.isnan(p.inputs["k"]).any()
    assert all(np.isfinite(x).all() for x in (*p.at(), *p.gradients()))
