"""Tables drawn from records, and the guard over the committed ones."""

from pathlib import Path

import pytest

from atom.circumstances import CHECKOUT
from atom.record_tables import main, stale_files, update_text
from atom.records import write_record

ROWS = [
    {"model": m, "text": t, "step": s, "outliers": 0, "ppl": p, "windows": 8, "path": "reference"}
    for m, t, s, p in [
        ("small", "wikitext2", "fp", 9.504),
        ("small", "wikitext2", "rtn", 1234.5),
        ("small", "c4", "fp", 11.0),
        ("big", "wikitext2", "fp", 5.0),
    ]
]


@pytest.fixture
def results(tmp_path: Path) -> Path:
    write_record("quality-ladder", ROWS, command="make ladder", commit="abc", results=tmp_path)
    return tmp_path


def draw(options: str, results: Path) -> list[str]:
    text = f"before\n<!-- record:quality-ladder {options} -->\nold\n<!-- /record -->\nafter\n"
    lines = update_text(text, results).splitlines()
    assert lines[0] == "before" and lines[-1] == "after" and "old" not in lines
    return lines[2:-2]


def test_list(results: Path) -> None:
    lines = draw('columns="model,ppl=perplexity" where=text=wikitext2,step=fp', results)
    assert lines[:4] == ["| model | perplexity |", "| --- | --- |", "| small | 9.50 |", "| big | 5.00 |"]
    assert "commit abc: `make ladder`" in lines[5]


def test_cross(results: Path) -> None:
    lines = draw("rows=model columns=step value=ppl digits=1 where=text=wikitext2", results)
    expected = ["| model | fp | rtn |", "| --- | --- | --- |", "| small | 9.5 | 1234.5 |", "| big | 5.0 |  |"]
    assert lines[:4] == expected


def test_columns_that_are_numbers_stand_in_order(tmp_path: Path) -> None:
    rows = [{**ROWS[0], "windows": windows} for windows in (24, 8, 192)]
    write_record("quality-ladder", rows, command="x", commit="abc", results=tmp_path)
    assert draw("rows=model columns=windows value=ppl", tmp_path)[0] == "| model | 8 | 24 | 192 |"


def test_rows_that_are_not_of_a_value(results: Path) -> None:
    lines = draw("columns=model,text where=step=fp,text=!c4 digits=1", results)
    assert lines[2:4] == ["| small | wikitext2 |", "| big | wikitext2 |"]


def test_lines_named_by_two_keys(results: Path) -> None:
    lines = draw("rows=model+text columns=step value=ppl digits=1", results)
    assert lines[0] == "| model+text | fp | rtn |" and lines[2] == "| small wikitext2 | 9.5 | 1234.5 |"


def test_rows_by_how_a_key_begins(tmp_path: Path) -> None:
    row = {**ROWS[0], "ppl": 1.0}
    rows = [row | {"model": name} for name in ("trace:a", "trace:b", "tracer")]
    write_record("quality-ladder", rows, command="x", commit="abc", results=tmp_path)
    assert draw("columns=model where=model=trace:", tmp_path)[2:4] == ["| trace:a |", "| trace:b |"]
    assert draw("columns=model where=model=trace:a|tracer", tmp_path)[2:4] == ["| trace:a |", "| tracer |"]


def test_drawing_twice_changes_nothing(results: Path) -> None:
    text = "<!-- record:quality-ladder columns=model,ppl -->\n<!-- /record -->\n"
    once = update_text(text, results)
    assert once != text and update_text(once, results) == once


def test_stale_file_is_found_and_repaired(
    results: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = results / "page.md"
    page.write_text("<!-- record:quality-ladder columns=model,ppl -->\n<!-- /record -->\n")
    monkeypatch.setattr("atom.record_tables.stale_files.__defaults__", (results,))
    monkeypatch.setattr("atom.record_tables.update_text.__defaults__", (results,))
    assert main(["--check", str(page)]) == 1
    assert "disagrees with its record" in capsys.readouterr().out
    assert main([str(page)]) == 0 and main(["--check", str(page)]) == 0
    page.write_text(page.read_text().replace("9.50", "9.05"))
    assert main(["--check", str(page)]) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("colums=model", "cannot read 'colums=model'; the options are machine"),
        ("rows=model columns=step", "give columns=a,b,c for a list"),
        ("columns=model,kl", "no row has the key 'kl'"),
        ("columns=model where=text=none", "no row of cpu matches"),
        ("rows=model columns=step value=ppl", "two rows for model=small, step=fp; narrow where="),
    ],
)
def test_refusals(options: str, message: str, results: Path) -> None:
    with pytest.raises(ValueError, match=message):
        draw(options, results)


def test_committed_tables_agree_with_the_records() -> None:
    pages = [*CHECKOUT.glob("*.md"), *(CHECKOUT / "docs").rglob("*.md"), *(CHECKOUT / "benchmarks").rglob("*.md")]
    assert stale_files(pages) == []
