"""Anyone's CSV file: rows with their lines, and numbers or one line that says what is wrong."""

import pytest

from datamodules.csv_rows import finite_number, is_name, read_rows
from runner.errors import InputError


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("a,b\n1,2\n", [(1, ["a", "b"]), (2, ["1", "2"])]),
        ("\ufeffa;b\r\n\r\n 1 ; 2,5 \r\n", [(1, ["a", "b"]), (3, ["1", "2,5"])]),
        ("a;b,c\td\n1\t2\n", [(1, ["a;b,c", "d"]), (2, ["1", "2"])]),
        ('"a;b",c\n1,2\n', [(1, ["a;b", "c"]), (2, ["1", "2"])]),
        ('a,b\n"1\n2",3\n4,5\n', [(1, ["a", "b"]), (2, ["12", "3"]), (4, ["4", "5"])]),
        ("\n\n7\n,\n", [(3, ["7"])]),
        ("", []),
    ],
)
def test_rows_and_the_lines_they_begin_on(tmp_path, text, rows):
    (tmp_path / "a.csv").write_bytes(text.encode())
    assert read_rows(tmp_path / "a.csv") == rows


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b"\xff\xfe\x00", "a.csv is not text in UTF-8"),
        (b'y\n"1\n' + 20_000 * b"5,6,7,8\n", "a.csv:2: field larger than field limit"),
    ],
)
def test_what_is_no_table_is_one_line(tmp_path, content, line):
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(InputError) as error:
        read_rows(tmp_path / "a.csv")
    assert line in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_that_is_not_there_is_called_what_it_is(tmp_path):
    (tmp_path / "edge.csv").write_text("")
    with pytest.raises(InputError, match=r"edges .*edges.csv does not exist; did you mean 'edge.csv'\?"):
        read_rows(tmp_path / "edges.csv", "edges")


@pytest.mark.parametrize(
    ("cell", "hint"),
    [
        ("", ""),
        ("four", ""),
        ("1_000", ""),
        ("nan", ": drop the row, or fill it in"),
        ("-inf", ": drop the row, or fill it in"),
        ("2,5", ": write decimals behind a point"),
        ("-1,000", ": write decimals behind a point"),
        ("1,000,000", ""),
    ],
)
def test_what_is_no_number(cell, hint):
    with pytest.raises(InputError) as error:
        finite_number(cell, "a.csv:7", "height")
    assert str(error.value) == f"a.csv:7: expected a number in column 'height', got {cell!r}{hint}"


def test_numbers_are_no_names():
    assert [finite_number(cell, "", 1) for cell in ("1", "-2e1", ".5", "+3.")] == [1, -20, 0.5, 3]
    assert not any(map(is_name, ("1", "-2e1", "2020", "nan", "1,5")))
    assert all(map(is_name, ("x", "height, m", "1_0", "")))
