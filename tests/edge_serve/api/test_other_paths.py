"""Paths of other servers, and whether what is named instead is there."""

from __future__ import annotations

import re

from edge_serve.api.other_paths import OTHER_PATHS
from tests.edge_serve.scripted import Live


def test_paths_of_other_servers_say_what_is_here(live: Live):
    for path, instead in OTHER_PATHS.items():
        for body in (None, {"model": "tiny"}):
            answer = live.ask(path, body)
            assert answer.status == 404
            assert answer.json["error"]["message"] == f"{path} is not served; instead: {instead}"
        verb, there = re.findall(r"(GET|POST) (/[a-z0-9/_.]+)", instead)[0]
        assert live.ask(there, {} if verb == "POST" else None).status in (200, 400)
