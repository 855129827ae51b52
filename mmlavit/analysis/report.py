"""Tables as Markdown and CSV: what the tools print is what the docs hold."""
import csv
from pathlib import Path
from typing import List, Mapping, Optional, Sequence


def number(value: Optional[float], digits: int = 1) -> str:
    """A cell's text; empty for None."""
    return '' if value is None else f'{value:.{digits}f}'


def markdown_table(rows: Sequence[Mapping[str, object]]) -> str:
    """A Markdown table, which a terminal shows in columns too.

    Args:
        rows (Sequence[Mapping[str, object]]): Cells by column's title, at least
            one row. The columns are those of the first row, in its order.

    Example:
        >>> print(markdown_table([dict(model='LaViT-S', ms=number(503.21))]))
        | model   | ms    |
        | ------- | ----- |
        | LaViT-S | 503.2 |
    """
    columns = list(rows[0])
    cells = [[as_cell(cell) for cell in line]
             for line in (columns, *([row[c] for c in columns] for row in rows))]
    widths = [max(3, *map(len, column)) for column in zip(*cells)]
    cells.insert(1, ['-' * width for width in widths])
    return '\n'.join(
        f'| {" | ".join(map(str.ljust, line, widths))} |' for line in cells)


def as_cell(value: object) -> str:
    """Text that neither ends its cell nor its line."""
    return '' if value is None else ' '.join(str(value).split()).replace(
        '|', '\\|')


def without_empty_columns(rows: Sequence[Mapping]) -> List[dict]:
    """The rows without the columns in which nothing stands in any of them."""
    columns = [key for key in rows[0]
               if any(row[key] not in (None, '') for row in rows)]
    return [{key: row[key] for key in columns} for row in rows]


def write_csv(rows: Sequence[Mapping], path: Path) -> None:
    """Writes rows that have the same columns; the folder is made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, 'w', newline='') as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
