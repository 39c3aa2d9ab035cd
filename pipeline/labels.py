"""Facts on a terminal: a label, and beside it plain sentences that are wrapped to 80 columns."""

import textwrap

import click

WIDTH, LABEL = 80, 10


def entry(label: str, *lines: str) -> None:
    """A label with its lines; each line is wrapped, its rest indented."""
    for line in lines:
        lead = label.ljust(LABEL) + " "
        indent = " " * (len(lead) + (len(line) - len(line.lstrip())))
        wrapped = textwrap.wrap(
            line.lstrip(),
            WIDTH,
            initial_indent=lead + indent[len(lead) :],
            subsequent_indent=indent + "  " * (len(indent) > len(lead)),
            break_long_words=False,
            break_on_hyphens=False,
        )
        click.echo("\n".join(wrapped).rstrip())
        label = ""
