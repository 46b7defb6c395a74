"""The manual page: all of the help, and without a fault of roff."""

from __future__ import annotations

import re
import shutil
import subprocess
from importlib.metadata import entry_points

import click
import pytest
from click.testing import CliRunner

from edge.cli import COMMAND_GROUP
from edge_serve.cli.man import _escaped, _paragraphs, man, man_page


def test_the_verb_prints_the_page():
    assert CliRunner().invoke(man, []).output == man_page()


def test_every_verb_and_option_is_in_it():
    page = man_page()
    for entry in entry_points(group=COMMAND_GROUP):
        command = entry.load()
        verbs = command.commands if isinstance(command, click.Group) else {"": command}
        for name, verb in verbs.items():
            title = _escaped(f"{entry.name} {name}".strip())
            section = page.partition(f".SS {title} [OPTION...]")[2].partition("\n.SS ")[0]
            assert section, title
            for parameter in verb.params:
                if isinstance(parameter, click.Option):
                    for option in (*parameter.opts, *parameter.secondary_opts):
                        pattern = rf"^\.B .*{re.escape(_escaped(option))}\b"
                        assert re.search(pattern, section, re.MULTILINE), option


def test_text_is_escaped_for_roff():
    assert list(_paragraphs(".x 'a' `b` c\\d e-f\n\nnext\nline")) == [
        "\\&.x \\(aqa\\(aq \\(gab\\(ga c\\ed e\\-f",
        ".PP",
        "next line",
    ]


@pytest.mark.live
def test_groff_finds_no_fault():
    if shutil.which("groff") is None:
        pytest.skip("needs groff")
    done = subprocess.run(
        ["groff", "-man", "-ww", "-Kutf8", "-Tutf8"],
        input=man_page(),
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""
    text = re.sub(r"\x1b\[[\d;]*m|.\x08", "", done.stdout)
    assert "EXIT STATUS" in text
    assert "--temperature FLOAT" in text
