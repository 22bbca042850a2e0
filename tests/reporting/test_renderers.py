"""A table in each format: what a narrow terminal leaves out."""

import io

from rich.console import Console

from mad_efla.reporting import renderers
from mad_efla.reporting.table import Column, Table


def test_a_narrow_terminal_spares_columns_whole_and_says_which():
    columns = [Column("mixer"), Column("accuracy"), Column("seconds", spare=2), Column("parameters", spare=1)]
    table = Table(columns, [["efla", "92.4 [90.1, 94.7]", "12", "440,112"]], best={(0, 3)})

    def lines(width):
        console = Console(width=width, file=io.StringIO())
        console.print(renderers.terminal(table, width))
        return console.file.getvalue()

    assert "seconds" in lines(60)
    assert "no room" not in lines(60)
    assert "no room for seconds" in lines(46)
    assert "440,112" in lines(46)
    assert "no room for seconds, parameters" in " ".join(lines(28).split())
    assert "92.4 [90.1, 94.7]" in lines(28)
