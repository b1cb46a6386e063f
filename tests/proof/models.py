"""The models beside other people's: the largest error that tests/test_models.py comes upon."""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path
from unittest import mock

import numpy as np
import torch

from tests import test_models

_SCALES, _TIED = (0.02, 0.2), (True, False)


def _heads():
    """(peer, test, its arguments) of transformers' models, and torch's encoder-decoder."""
    for (kind, (_, name)), scale in itertools.product(test_models.KINDS.items(), _SCALES):
        given = {"kind": kind, "scale": scale}
        for tied in _TIED:
            more = given | {"tied": tied}
            language = test_models.test_language_models_agree_with_transformers
            choice = test_models.test_multiple_choice_agrees_with_transformers
            yield f"{name}LMHeadModel", language, more
            yield f"{name}DoubleHeadsModel", choice, more
        for lm_coef in (0, 0.5):
            classes = test_models.test_classification_agrees_with_transformers
            yield f"{name}ForSequenceClassification", classes, given | {"lm_coef": lm_coef}
    for scale, tied in itertools.product(_SCALES, _TIED):
        test = test_models.test_the_encoder_decoder_agrees_with_torch
        yield "torch, encoder-decoder", test, {"scale": scale, "tied": tied}


def measured():
    """{peer: {"error", "tensors"}}: the worst error of a tensor, over its largest element."""
    found = {}
    for peer, test, given in _heads():
        entry = found.setdefault(peer, {"error": 0.0, "tensors": 0})

        def close(mine, theirs, rtol=1e-10, floor=0.0, entry=entry):
            theirs = torch.as_tensor(theirs).detach().numpy()
            error = max(np.abs(mine - theirs).max() - floor, 0.0) / np.abs(theirs).max()
            entry["error"] = max(entry["error"], float(error))
            entry["tensors"] += 1

        with (
            mock.patch.object(test_models, "close", close),
            tempfile.TemporaryDirectory() as folder,
        ):
            if "kind" in given:
                given = given | {"tmp_path": Path(folder)}
            test(**given)
    return found
