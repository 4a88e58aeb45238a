"""What each module of a spec buys: the spec trained with and without it from the same seeds and the same data.

    modules.py   which components a spec names, and the spec without some of them
    cells.py     one training of the table: its key, its folder, its result
    cell.py      the process that trains one cell
    runner.py    several of those beside each other, until every cell is finished
    cost.py      step time and peak memory, measured one after another
    report.py    the paired differences as a table, Markdown, JSON and a picture
    command.py   all of it, as `tryplicity ablate` does it

Loads no torch by itself.
"""
