"""Checkpoints that the short names stand for."""

from __future__ import annotations

import re

from edge.bundle.library import CATALOGUE
from edge_make.published import PUBLISHED, REVISIONS


def test_what_is_known_of_hubs_is_of_models_with_short_names():
    assert PUBLISHED.keys() == REVISIONS.keys()
    assert REVISIONS.keys() < set(CATALOGUE.values())
    assert all(re.fullmatch("[0-9a-f]{40}", commit) for commit in REVISIONS.values())
    assert len(set(REVISIONS.values())) == len(REVISIONS)
