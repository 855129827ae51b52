"""Tables as Markdown and CSV."""
import csv

from mmlavit.analysis.report import (markdown_table, number,
                                     without_empty_columns, write_csv)


def test_markdown_is_aligned_and_no_cell_ends_its_line():
    rows = [dict(model='LaViT-S', ms=number(503.21)),
            {'model': 'a|b\nc', 'ms': number(None), 'other': 'left out'}]
    assert markdown_table(rows) == ('| model   | ms    |\n'
                                    '| ------- | ----- |\n'
                                    '| LaViT-S | 503.2 |\n'
                                    '| a\\|b c  |       |')


def test_columns_in_which_nothing_stands_are_left_out():
    rows = [dict(a='', b=None, c='', d=0), dict(a='', b=None, c='x', d=0)]
    assert without_empty_columns(rows) == [dict(c='', d=0), dict(c='x', d=0)]


def test_csv_is_read_again_as_it_was_written(tmp_path):
    rows = [dict(a='x, "y"', b=1.5), dict(a='|', b=None)]
    write_csv(rows, tmp_path / 'new/table.csv')
    assert list(csv.DictReader(open(tmp_path / 'new/table.csv'))) == [
        dict(a='x, "y"', b='1.5'), dict(a='|', b='')]
