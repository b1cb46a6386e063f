"""What `gaugeblock report --history` says of many records is so."""

import copy
import json
import re

import pytest
from gaugeblock.benchmarks.history import (
    History,
    histories,
    label,
    records_table,
    signs,
    sparkline,
    summary_table,
    times_table,
)
from gaugeblock.benchmarks.history_report import history_markdown, history_page, report_history
from gaugeblock.benchmarks.plot_history import figures
from gaugeblock.benchmarks.plots import history_plots
from matplotlib.colors import to_rgba

from tests.helpers import gaugeblock
from tests.invented_history import commits
from tests.invented_records import entry, hostile, record
from tests.test_report_pages import Seen


def texts(table):
    return [[cell.text for cell in row] for row in table.rows]


def written(folder, records):
    for i, made in enumerate(records):
        path = folder / str(i) / "record.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(made))
    return folder


def test_records_are_found_below_folders_and_told_apart_by_device(tmp_path):
    written(tmp_path / "a", reversed(commits(3)))
    written(tmp_path / "b", commits(2, "Another"))
    (tmp_path / "a" / "kept.json").write_text(json.dumps(commits(4)[3]))
    (tmp_path / "a" / "parity.json").write_text('{"failures": 0}')
    found = histories([tmp_path, tmp_path / "a"])
    assert [(h.device, len(h.records)) for h in found] == [("Another", 2), ("Invented", 4)]
    started = [r["started"] for r in found[1].records]
    assert started == sorted(started)


def test_what_is_called_a_record_has_to_be_one(tmp_path):
    with pytest.raises(ValueError, match="must hold a record, it holds none"):
        histories([tmp_path])
    (tmp_path / "record.json").write_text("{}")
    with pytest.raises(ValueError, match="must have schema 1"):
        histories([tmp_path])


def test_only_the_ops_and_cases_that_were_asked_for(tmp_path):
    written(tmp_path, commits(2))
    (found,) = histories([tmp_path], ["attention"], ["causal_512"])
    assert {(p.op, p.case) for p in found.panels} == {("attention", "causal_512")}
    with pytest.raises(ValueError, match="case must be in a record, got none_such"):
        histories([tmp_path], cases=["none_such"])


def test_a_line_has_a_place_for_each_record():
    history = History("Invented", commits(8))
    panel = history.panels[0]
    assert (panel.op, panel.case, panel.direction) == ("attention", "causal_512", "fwd")
    assert next(iter(panel.lines)) == "gaugeblock"
    assert [e is None for e in panel.lines["flash_attn"]] == [True] * 2 + [False] * 6
    assert history.changes() == [4]


def test_the_change_is_from_the_record_before_and_from_the_first():
    def at(p50):
        return record([entry("gaugeblock", p50)])

    history = History("Invented", [at(2.0), at(1.0), at(1.1)])
    assert texts(summary_table(history))[0][-4:] == ["█▁▂", "1.10", "+10.0%", "-45.0%"]
    looks = [cell.look for cell in summary_table(history).rows[0][-2:]]
    assert looks == ["slower", "faster"]
    # 1.00 ± 1% and 1.01 ± 1% overlap
    near = History("Invented", [at(1.0), at(1.01)])
    assert summary_table(near).rows[0][-2].look == "even"


def test_a_case_that_the_newest_record_lacks_says_so():
    records = [record([entry("gaugeblock"), entry("gaugeblock", case="tall")])]
    records.append(record([entry("gaugeblock", case="tall")]))
    table = summary_table(History("Invented", records))
    noted = [row[1].text for row in table.rows if any(cell.notes for cell in row)]
    assert noted == ["wide"]
    assert "not in the newest record" in table.notes[0]


def test_where_ours_never_ran_the_fastest_is_shown():
    made = record([entry("slow", 2.0), entry("fast", 1.0)])
    assert texts(summary_table(History("Invented", [made])))[0][3] == "fast"


def test_sparklines():
    line = [entry("x", p50) for p50 in (1.0, 8.0, 4.5)]
    assert sparkline(line) == "▁█▅"
    assert sparkline([line[0], None, line[0]]) == "▁·▁"
    assert len(sparkline(line * 30)) == 40


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, ""),
        ({"dirty": True}, "*"),
        ({"drift": 0.05}, "†"),
        ({"drift": 0.02}, ""),
        ({"drift": None}, "†"),
        ({"dirty": True, "drift": 0.05}, "*†"),
    ],
)
def test_dirty_and_drifted_records_are_marked(changes, said):
    made = copy.deepcopy(commits(1)[0])
    made["dirty"] = changes.get("dirty", False)
    made["ceilings"]["drift"] = changes.get("drift", 0.0)
    assert signs(made) == said
    assert label(made) == f"{made['commit'][:7]} 2026-01-02{said}"
    assert texts(records_table(History("Invented", [made])))[0][0] == label(made)


def test_every_time_of_every_provider_is_in_a_table():
    history = History("Invented", commits(4))
    for panel in history.panels:
        table = times_table(history, panel)
        assert table.head == ["record", *panel.lines]
        assert len(table.rows) == 4
        assert texts(table)[0][0] == label(history.records[-1])
    assert texts(times_table(history, history.panels[0]))[-1][2] == "–"


def test_the_plots_of_a_history():
    history = History("Invented", commits(3))
    found = history_plots(history)
    assert [plot.name for plot in found] == [
        "history-invented-attention-float32", "history-invented-layer-norm-float32",
    ]  # fmt: skip
    assert history_plots(history) == found
    slower = copy.deepcopy(history.records)
    slower[1]["entries"][0]["time_ms"]["p50"] *= 1.1
    assert history_plots(History("Invented", slower))[0] != found[0]


def test_only_points_of_records_in_doubt_are_hollow():
    doubted = copy.deepcopy(commits(3))
    doubted[1]["dirty"] = True
    _, _, figure = next(figures(History("Invented", doubted)))
    markers = [line for line in figure.axes[0].lines if line.get_linestyle() == "None"]
    paper = figure.axes[0].get_facecolor()
    hollow = [line for line in markers if to_rgba(line.get_markerfacecolor()) == paper]
    assert {tuple(line.get_xdata()) for line in hollow} == {(1,)}
    assert {tuple(line.get_xdata()) for line in markers if line not in hollow} == {(0, 2)}


def test_many_panels_take_several_pages():
    made = record([entry("gaugeblock", case=f"case_{i}") for i in range(13)])
    names = [plot.name for plot in history_plots(History("Invented", [made]))]
    stem = "history-invented-layer-norm-float32"
    assert names == [f"{stem}-1", f"{stem}-2"]


def test_markdown_and_page_show_hostile_words_as_words():
    history = History(hostile()["device"], [hostile(), hostile() | {"dirty": True}])
    text = history_markdown([history])
    assert "<script" not in text
    assert text.count("<details>") == text.count("</details>") == 3
    seen = Seen(history_page([history]))
    assert not seen.open
    assert not {"script", "link", "iframe"} & {tag for tag, _ in seen.elements}
    ids = [attributes["id"] for _, attributes in seen.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {a["href"][1:] for a in seen.all("a")} <= set(ids)
    assert len(seen.all("img")) == len(seen.all("source")) == 2


def test_a_history_of_one_record_says_so_and_is_drawn(tmp_path):
    records = written(tmp_path / "runs", commits(1))
    paths = report_history(
        [records], markdown=tmp_path / "h.md", png=tmp_path / "png", html=tmp_path / "h.html"
    )
    assert all(path.exists() for path in paths)
    text = (tmp_path / "h.md").read_text()
    for said in (text, (tmp_path / "h.html").read_text()):
        assert "one record so far" in said
    linked = re.findall(r"!\[.+\]\(<(.+)>\)", text)
    assert linked == [f"png/{path.name}" for path in paths if path.suffix == ".png"]


def test_the_door_shows_a_history(tmp_path):
    written(tmp_path / "runs", commits(2))
    ran = gaugeblock("report", "--history", "runs", "--op", "layer_norm", cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert "layer_norm fwd" in ran.stdout and "attention" not in ran.stdout
    alone = gaugeblock("report", "runs", "--case", "wide", cwd=tmp_path)
    assert alone.returncode == 2
    assert alone.stderr.count("\n") == 1 and "--case goes with --history" in alone.stderr
