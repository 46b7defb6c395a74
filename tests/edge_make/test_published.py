"""Checkpoints that the short names stand for."""

from __future__ import annotations

import re

from edge.bundle.library import CATALOGUE
from edge_make.published import PUBLISHED, REVISIONS


def test_every_name_of_the_catalogue_has_its_commit():
    assert set(REVISIONS) == set(CATALOGUE.values())
    assert all(re.fullmatch("[0-9a-f]{40}", commit) for commit in REVISIONS.values())
    assert len(set(REVISIONS.values())) == len(REVISIONS)


def test_every_short_name_has_one_that_others_quantized():
    assert PUBLISHED.keys() == set(CATALOGUE.values())
