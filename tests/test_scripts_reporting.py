"""Tables and pages of measurements."""

import json

from scripts.reporting import interval95, replace_section, write_page


def test_interval_is_students():
    assert interval95([1.0, 2.0, 3.0]) == "95 % interval -0.4841 to +4.4841"
    assert interval95([1.0]) == ""


def test_a_section_is_replaced_in_place(tmp_path):
    path = tmp_path / "benchmarks.md"
    path.write_text("# Title\n")
    for name, body in (("one", "old"), ("two", "other"), ("one", r"new \1")):
        replace_section(path, name, body)
    text = path.read_text()
    assert text.startswith("# Title\n")
    assert text.index(r"new \1") < text.index("other")
    assert "old" not in text


def test_a_page_says_how_it_came_about_and_keeps_its_figures(tmp_path):
    facts = {"command": "make it", "device": "a machine"}
    write_page(tmp_path / "docs/speed.md", "Speed", facts, "| a |", {"reports": [1]})
    assert (tmp_path / "docs/speed.md").read_text() == "# Speed\n\n`make it`. device: a machine\n\n| a |\n"
    assert json.loads((tmp_path / "docs/speed.json").read_text()) == facts | {"reports": [1]}
