"""Options in sections: ``--help`` shows what most people set, ``--help-all`` everything."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any, TypeVar, get_args

import click

from edge.settings_fields import Section

_AnyCommand = TypeVar("_AnyCommand", bound=Callable[..., Any])
_SHOW_ALL = f"{__name__}.show_all"


class SectionOption(click.Option):
    """An option that knows its section of the help."""

    def __init__(self, *arguments: Any, section: Section, **attributes: Any) -> None:
        super().__init__(*arguments, **attributes)
        self.section = section


def option(
    section: Section, *names: str, **attributes: Any
) -> Callable[[_AnyCommand], _AnyCommand]:
    """Add an option to a section of the help; the rest is as in `click.option`."""
    return click.option(*names, cls=SectionOption, section=section, **attributes)


class SectionCommand(click.Command):
    """A verb that shows its options in sections; an option without one goes to the last."""

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """Add ``--help-all`` to the verb's parameters."""
        return [*super().get_params(ctx), self._help_all]

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the sections, and how many more options there are."""
        sections: dict[Section, list[tuple[str, str]]] = {name: [] for name in get_args(Section)}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None and isinstance(parameter, click.Option):
                section = parameter.section if isinstance(parameter, SectionOption) else "Help"
                sections[section].append(record)
        hidden = 0 if _SHOW_ALL in ctx.meta else len(sections.pop("Expert"))
        for title, rows in sections.items():
            if rows:
                with formatter.section(title):
                    formatter.write_dl(rows)
        if hidden:
            formatter.write_paragraph()
            formatter.write_text(f"{hidden} more options: {ctx.command_path} --help-all")

    @cached_property
    def _help_all(self) -> click.Option:
        def show(ctx: click.Context, _: click.Parameter, value: bool) -> None:
            if value and not ctx.resilient_parsing:
                ctx.meta[_SHOW_ALL] = True
                click.echo(ctx.get_help(), color=ctx.color)
                ctx.exit()

        return click.Option(
            ["--help-all"],
            is_flag=True,
            is_eager=True,
            expose_value=False,
            callback=show,
            help="Show every option and exit.",
        )
