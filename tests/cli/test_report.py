"""`countdown report`: a file from the folder of a comparison, and what a mistake looks like."""

from __future__ import annotations

import pytest

from cli.test_cli import run
from report.sample import sample


@pytest.fixture
def compared(tmp_path):
    """A folder that holds the sample."""
    sample().save(tmp_path / "compared")
    return tmp_path / "compared"


def test_it_writes_the_report_beside_the_comparison(compared, tmp_path):
    done = run("report", "compared", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "compared/report.html\n")
    assert "Take d-proxy at 0.5" in (compared / "report.html").read_text(encoding="utf-8")


def test_it_writes_where_it_is_told(compared, tmp_path):
    assert run("report", "compared", "-o", "elsewhere/page.html", cwd=tmp_path).returncode == 0
    assert (tmp_path / "elsewhere" / "page.html").is_file()
    assert not (compared / "report.html").exists()


def test_it_writes_over_a_file_only_when_told(compared, tmp_path):
    (compared / "report.html").write_text("mine")
    done = run("report", "compared", cwd=tmp_path)
    assert done.returncode == 2
    assert "compared/report.html exists already; give another --output or --overwrite." in done.stderr
    assert (compared / "report.html").read_text() == "mine"
    assert run("report", "compared", "--overwrite", cwd=tmp_path).returncode == 0
    assert (compared / "report.html").read_text(encoding="utf-8").startswith("<!doctype html>")


def test_it_refuses_to_write_where_a_folder_is(compared, tmp_path):
    done = run("report", "compared", "-o", ".", "--overwrite", cwd=tmp_path)
    assert done.returncode == 2
    assert "is a folder; give the name of a file." in done.stderr


def test_what_cannot_be_read_leaves_nothing_behind(compared, tmp_path):
    done = run("report", "elsewhere", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "elsewhere" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["compared"]
