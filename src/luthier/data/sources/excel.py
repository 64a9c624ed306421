"""Excel workbooks: the sheet is chosen, merged cells are filled, title rows above the header are passed over."""

from __future__ import annotations

import itertools
import statistics
import warnings
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from luthier.data.sources.cells import Shown
from luthier.data.sources.formats import (
    FORMATS,
    Options,
    beginning,
    check_size,
    clean_header,
    empty,
    raise_it,
    unreadable,
)
from luthier.data.sources.workbook import TooMany, require_cells
from luthier.data.table import Table
from luthier.errors import DataError, missing_extra

LOOKED_AT = 50  # rows in which the header is looked for
MOST_LABELS = 12  # rows of two cells and more (Author, Date) that may stand above a table
REPEATED = 5  # rows a value, from which on a column holds classes

Place = tuple[int, int]  # row and column


@dataclass
class Grid:
    """The cells of a sheet, merged ranges filled; which cells a range filled from the left, and which from above."""

    rows: list[list[Any]]
    errors: int = 0  # cells with an Excel error, which count as missing
    merged: int = 0  # ranges
    hidden: int = 0  # rows with a value that are not shown, as a filter leaves them
    shown: Shown = field(default_factory=Shown)  # what cells show otherwise than they hold it
    across: set[Place] = field(default_factory=set)
    down: set[Place] = field(default_factory=set)


@FORMATS.register(".xlsx", ".xlsm")
def read_excel(path: Path, name: str, options: Options) -> Table:
    """One sheet of a workbook. Numbers and dates keep their types, text cells stay text, errors are missing."""
    check_size(path, name, options)
    _check_unpacked(path, name, options.limits.unpacked_bytes)
    _check_parts(path, name, options.limits.cells)
    book = _open(path, name)
    try:
        sheet, notes = _choose(book, name, options.sheet)
        _check_cells(sheet, name, options.limits.cells)
        grid = _grid(sheet)
    finally:
        book.close()
    if grid.errors:
        notes.append(f"{grid.errors} cells hold an Excel error such as #N/A and count as missing")
    if grid.hidden:
        notes.append(f"{grid.hidden} hidden rows are read like the others: delete those that shall not be learned")
    if grid.merged:
        notes.append(f"{grid.merged} merged ranges were filled with their value")
    notes += grid.shown.notes()
    _check_formulas(path, name, sheet.title, grid.rows)
    return _table(grid, name, f"{name} sheet {sheet.title!r}", notes)


@FORMATS.register(".xls")
def read_old_excel(path: Path, name: str, options: Options) -> Table:
    """The format before 2007 is refused."""
    raise unreadable(
        name,
        "it is in Excel's format from before 2007",
        received=path.suffix,
        allowed=".xlsx or .xlsm",
        fix="save it as .xlsx",
    )


def _open(path: Path, name: str, *, formulas: bool = False) -> Any:
    try:
        import openpyxl
    except ImportError as error:
        raise missing_extra("openpyxl", "excel", "reading Excel workbooks") from error
    try:
        with warnings.catch_warnings():  # openpyxl warns of styles and validations, which do not concern the data
            warnings.simplefilter("ignore")
            return openpyxl.load_workbook(path, data_only=not formulas)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # the library trusts the file, and damage shows as whatever it then meets
        raise _no_workbook(path, name, f"it is not a whole workbook ({error})") from error


def _no_workbook(path: Path, name: str, why: str) -> DataError:
    fix = "open it in Excel or LibreOffice and save it again as .xlsx, or export the sheet as CSV"
    return unreadable(name, why, received=beginning(path), allowed="a whole .xlsx workbook (a zip file)", fix=fix)


def _check_cells(sheet: Any, name: str, limit: int) -> None:
    """One value in a far corner makes every cell before it."""
    cells = sheet.max_row * sheet.max_column
    if cells > limit:
        raise DataError(
            "data-limit",
            f"{name} sheet {sheet.title!r} has more cells than the limit",
            where=name,
            received=f"{sheet.max_row:,} rows of {sheet.max_column:,} cells",
            allowed=f"up to {limit:,} cells",
            fix=raise_it("cells", "delete what stands far from the table, or export the sheet as CSV"),
        )


def _check_parts(path: Path, name: str, limit: int) -> None:
    """What the library would build in memory, before it does."""
    try:
        require_cells(path, limit)
    except TooMany as error:
        raise DataError(
            "data-limit",
            f"{name} holds more cells, merged cells among them, or more markup than the limit",
            where=name,
            received=f"more than {limit:,}",
            allowed=f"up to {limit:,} cells",
            fix=raise_it("cells", "undo merged ranges, delete formats that nothing uses, or export the sheet as CSV"),
        ) from error
    except Exception as error:  # the zip trusts itself, and damage shows as whatever is then met
        raise _no_workbook(path, name, f"it is not a whole workbook ({error})") from error


def _check_unpacked(path: Path, name: str, limit: int) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(item.file_size for item in archive.infolist())
    except (zipfile.BadZipFile, NotImplementedError, ValueError) as error:
        raise _no_workbook(path, name, "it is not an .xlsx workbook") from error
    if size > limit:
        raise DataError(
            "data-limit",
            f"{name} unpacks to more than the limit",
            where=name,
            received=f"{size:,} bytes",
            allowed=f"up to {limit:,} bytes",
            fix=raise_it("unpacked_bytes", "export the sheet as CSV"),
        )


def _choose(book: Any, name: str, wanted: str | int | None) -> tuple[Any, list[str]]:
    """The sheet that was asked for, else the first visible one that looks like a table, else one with a value."""
    titles = [sheet.title for sheet in book.worksheets]
    if wanted is not None:
        by_number = {str(i): title for i, title in enumerate(titles)}
        title = wanted if wanted in titles else by_number.get(str(wanted))
        if title is None:
            raise DataError(
                "data-unreadable",
                f"{name} has no sheet {wanted!r}",
                where=name,
                received=wanted,
                allowed=titles,
                fix="name one of these in preprocessing.sheet (--set preprocessing.sheet=NAME)",
            )
        return book[title], []
    filled = [s for s in book.worksheets if s.sheet_state == "visible" and s.max_row and _has_values(s)]
    if not filled:
        raise empty(name, "no sheet that holds a value")
    chosen = next((sheet for sheet in filled if _is_table(sheet)), filled[0])
    others = [s.title for s in filled if s is not chosen]
    note = f"sheet {chosen.title!r} was read; there are also {others}: choose with preprocessing.sheet"
    return chosen, [note] if others else []


def _has_values(sheet: Any) -> bool:
    return any(value is not None for row in sheet.iter_rows(values_only=True) for value in row)


def _is_table(sheet: Any) -> bool:
    """Whether two rows fill two cells or more; a cover sheet or a remark does not."""
    wide = (row for row in sheet.iter_rows(values_only=True) if sum(value is not None for value in row) > 1)
    return sum(1 for _ in itertools.islice(wide, 2)) == 2


def _grid(sheet: Any) -> Grid:
    grid = Grid([], merged=len(sheet.merged_cells.ranges))
    for number, row in enumerate(sheet.iter_rows(), sheet.min_row):
        hidden = number in sheet.row_dimensions and sheet.row_dimensions[number].hidden
        grid.hidden += hidden and any(cell.value is not None for cell in row)
        grid.errors += sum(1 for cell in row if cell.data_type == "e")
        grid.rows.append(
            [None if cell.data_type == "e" or cell.value == "" else grid.shown.value_of(cell) for cell in row]
        )
    left, top = sheet.min_column, sheet.min_row
    for area in sheet.merged_cells.ranges:
        first_r, first_c = area.min_row - top, area.min_col - left
        value = grid.rows[first_r][first_c]
        for r in range(first_r, area.max_row - top + 1):
            for c in range(first_c, area.max_col - left + 1):
                if 0 <= r < len(grid.rows) and 0 <= c < len(grid.rows[r]):  # a range may reach beyond the cells
                    grid.rows[r][c] = value
                    if c > first_c:
                        grid.across.add((r, c))
                    if r > first_r:
                        grid.down.add((r, c))
    return grid


def _check_formulas(path: Path, name: str, title: str, grid: list[list[Any]]) -> None:
    """A formula without a stored result would read as empty: refuse it. Only a sheet with empty cells is looked at."""
    if all(value is not None for row in grid for value in row):
        return
    book = _open(path, name, formulas=True)
    try:
        sheet = book[title]
        for r, row in enumerate(sheet.iter_rows()):
            for c, cell in enumerate(row):
                if cell.data_type == "f" and grid[r][c] is None:
                    raise unreadable(
                        name,
                        "a formula has no stored result",
                        f"{name} sheet {title!r} cell {cell.coordinate}",
                        received=str(cell.value),
                        allowed="formulas with their result, as Excel saves them",
                        fix="open the workbook in Excel or LibreOffice and save it, or export the sheet as CSV",
                    )
    finally:
        book.close()


def _table(grid: Grid, name: str, where: str, notes: list[str]) -> Table:
    start = _header_row(grid, where, name)
    used = [c for c in range(max(map(len, grid.rows), default=0)) if any(row[c] is not None for row in grid.rows)]
    rows = [[row[c] for c in used] for row in grid.rows]
    titles = [str(v) for row in rows[:start] for v in dict.fromkeys(row) if v is not None]
    if titles:
        notes = [*notes, f"the rows above the header are titles, not data: {titles}"]
    header, more = clean_header(["" if v is None else str(v) for v in rows[start]], name, f"{where} row {start + 1}")
    body = [row for row in rows[start + 1 :] if any(v is not None for v in row)]
    if not body:
        raise empty(name, "a sheet with a header and no rows")
    return Table.from_columns({t: [r[i] for r in body] for i, t in enumerate(header)}, name, [*notes, *more])


def _header_row(grid: Grid, where: str, name: str) -> int:
    """The first row with text that fills as many cells as the body does; a title, merged or not, fills fewer.

    A header may lack one heading, as pandas' index and a column of remarks do. Raises DataError ``data-unreadable``
    where what would stand above the header is no title.
    """
    rows = grid.rows
    widths = [sum(v is not None and (r, c) not in grid.across for c, v in enumerate(row)) for r, row in enumerate(rows)]
    filled = [width for width in widths if width]
    body = statistics.median_high(filled[len(filled) // 2 :])  # a stray remark makes one row wider, not the body
    wide = [i for i, row in enumerate(rows[:LOOKED_AT]) if widths[i] >= body and any(isinstance(v, str) for v in row)]
    start = wide[0] if wide else next(i for i, width in enumerate(widths) if width)
    first = next((i for i, width in enumerate(widths) if width > 1), start)
    texts = {v for v in rows[first] if isinstance(v, str)}
    if first < start and widths[first] == body - 1 and len(texts) > 1:
        following = widths[first + 1]
        if following == body and not _is_heading(grid, first + 1):
            return first
    numbers = [i for i in range(start) if widths[i] >= body > 1 and not any(isinstance(v, str) for v in rows[i])]
    _require_titles([i for i in range(start) if widths[i] > 1], widths, body, f"{where} row {start + 1}", name, numbers)
    return start


def _is_heading(grid: Grid, at: int) -> bool:
    """Whether a row is plainly no data: merged with the one above, text over numbers, no class in a column of them."""
    for c, value in enumerate(grid.rows[at]):
        below = [row[c] for row in grid.rows[at + 1 :] if row[c] is not None]
        over_numbers = isinstance(value, str) and below and not any(isinstance(v, str) for v in below)
        no_class = value is not None and len(set(below)) * REPEATED <= len(below) and value not in below
        if (at, c) in grid.down or over_numbers or no_class:
            return True
    return False


def _require_titles(above: list[int], widths: list[int], body: int, where: str, name: str, numbers: list[int]) -> None:
    """Several rows as wide as the body, one of ``numbers`` alone, or a long list of labels are data."""
    as_wide = sum(widths[i] >= body for i in above)
    if as_wide < 2 and len(above) <= MOST_LABELS and not numbers:
        return
    raise unreadable(
        name,
        "which row is the header cannot be told",
        where,
        received=f"{len(above)} rows of two cells and more above the first row that looks like a header",
        allowed="one row of headings, as wide as the rows under it, with nothing but titles above it",
        fix="give every column a heading, delete what stands above the headings, or export the table as CSV",
    )
