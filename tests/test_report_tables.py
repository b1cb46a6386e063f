"""What `gaugeblock report` says of a record is so, in tables, Markdown and a terminal."""

import copy
import json
import os
import re

import pytest
from gaugeblock.benchmarks import words
from gaugeblock.benchmarks.markdown import markdown, markdown_summary
from gaugeblock.benchmarks.page import page
from gaugeblock.benchmarks.report import newest, print_record, report
from gaugeblock.benchmarks.standings import groups, opponents, tally, verdict
from gaugeblock.benchmarks.tables import (
    best_table,
    ceilings_table,
    detail_table,
    doubts,
    facts,
    left_out_lines,
    summary_table,
    times_table,
)

from tests.invented_records import (
    CEILINGS,
    entry,
    full,
    hostile,
    left_out,
    page_of,
    peers_only,
    record,
)


def texts(table):
    return [[cell.text for cell in row] for row in table.rows]


@pytest.mark.parametrize(
    ("ours", "peer", "said"),
    [
        ({"p50": 1.0}, {"p50": 1.25}, (1.25, "faster")),
        ({"p50": 1.25}, {"p50": 1.0}, (0.8, "slower")),
        # 0.99 … 1.01 against 1.001 … 1.03
        ({"p50": 1.0}, {"p50": 1.02, "p20": 1.001}, (1.02, "even")),
        ({"p50": 1.02, "p20": 1.001}, {"p50": 1.0}, (1 / 1.02, "even")),
        # the quantiles are apart, the median's interval reaches over
        ({"p50": 1.0}, {"p50": 1.1, "interval": 0.09}, (1.1, "even")),
        ({"p50": 1.0}, {"p50": 1.1, "interval": None}, (1.1, "faster")),
    ],
)
def test_ahead_is_who_is_ahead_by_more_than_the_noise(ours, peer, said):
    def measured(p50, p20=None, interval=0.004):
        made = entry("x", p50, interval=interval)
        made["time_ms"]["p20"] = p20 or made["time_ms"]["p20"]
        return made

    ratio, look = verdict(measured(**ours), measured(**peer))
    assert (pytest.approx(ratio), look) == said


def test_the_best_peer_is_the_fastest_of_the_others():
    entries = {name: entry(name, t) for name, t in (("gaugeblock", 1), ("a", 3), ("b", 2))}
    assert [e["provider"] for e in opponents(entries, ours=True)] == ["gaugeblock", "b"]
    assert [e["provider"] for e in opponents(entries, ours=False)] == ["gaugeblock", "b"]
    del entries["gaugeblock"]
    assert opponents(entries, ours=True) == (None, entries["b"])
    assert [e["provider"] for e in opponents(entries, ours=False)] == ["b", "a"]
    assert opponents({"a": entries["a"]}, ours=False) == (entries["a"], None)


def test_the_summary_has_every_case_with_its_ratio():
    table = summary_table(full())
    assert table.head == [
        "op", "case", "ratio", "gaugeblock ms", "best peer", "its ms", "of roof",
    ]  # fmt: skip
    assert texts(table)[-1] == [
        "layer_norm fwd", "M=64 N=768", "▲ 1.11×", "0.900", "compiled", "1.00", "56% copy",
    ]  # fmt: skip
    assert len(table.rows) == 7
    assert texts(table)[0][:3] == ["attention fwd", "B=2 H=3 T=256 D=64 causal", "▼ 0.80×"]
    assert tally(full()) == {"slower": 6, "faster": 1}


def test_dtypes_are_told_apart_where_there_are_several():
    half = [entry(name, dtype="float16") for name in ("gaugeblock", "eager")]
    table = summary_table(record([entry("gaugeblock"), entry("eager"), *half]))
    assert table.head[:2] == ["op", "dtype"]
    assert [row[1] for row in texts(table)] == ["float32", "float16"]


def test_a_table_of_an_op_says_how_ours_did():
    group = groups(full())[-1]
    row = dict(zip(*[(t := best_table(full(), group)).head, texts(t)[0]]))
    assert row == {
        "case": "M=64 N=768", "ratio": "▲ 1.11×", "gaugeblock ms": "0.900",
        "best peer": "compiled", "its ms": "1.00", "p20–p80 ms": "0.891–0.909",
        "95% interval": "±0.4%", "of roof": "56% copy", "rate": "8.89 GB/s", "energy mJ": "18.0",
    }  # fmt: skip


def test_who_did_not_run_has_a_dash_and_the_reason():
    table = times_table(full(), groups(full())[0])
    assert table.head == ["case", "gaugeblock", "eager", "flash"]
    longest = table.rows[-1]
    assert longest[0].text == "B=2 H=3 T=1024 D=64 causal"
    assert (longest[2].text, longest[2].notes) == ("–", (1,))
    assert table.notes == ["its scores do not fit"]
    assert [cell.look for cell in longest] == ["", "", "", "best"]


def test_a_dash_without_a_reason_says_so():
    entries = [entry("gaugeblock"), entry("eager"), entry("gaugeblock", case="tall")]
    made = record(entries)
    table = times_table(made, groups(made)[0])
    assert [table.notes[n - 1] for n in table.rows[1][2].notes] == [
        "the record holds no time and no reason"
    ]
    assert texts(best_table(made, groups(made)[0]))[1][1] == "–"


def test_ours_missing_in_a_case_says_why():
    made = record(
        [entry("gaugeblock"), entry("eager"), entry("eager", case="tall")],
        left_out=[
            left_out("other", "is slow to start", case="tall"),
            left_out("gaugeblock", "was refused", case="tall"),
        ],
    )
    for table in (summary_table(made), best_table(made, groups(made)[0])):
        cell = table.rows[1][table.head.index("gaugeblock ms")]
        assert cell.text == "–"
        assert [table.notes[n - 1] for n in cell.notes] == ["was refused"]
    assert tally(made)["alone"] == 1


def test_without_ours_the_fastest_stands_against_the_next():
    table = summary_table(peers_only())
    assert table.head[2:] == ["next / fastest", "fastest", "ms", "next", "its ms", "of roof"]
    assert texts(table)[-1][2:7] == ["▲ 1.50×", "compiled", "1.00", "eager", "1.50"]
    # at 1024 there is one alone
    assert texts(table)[2][2:7] == ["–", "flash", "0.839", "–", "–"]
    assert "gaugeblock did not run" in markdown_summary(peers_only())


def test_marks_and_a_slowed_clock_are_footnotes():
    slowed = {"slowed_by": ["hw_slowdown"], "sm_mhz": [1000, 1500]}
    entries = [
        entry("gaugeblock", marks=["not settled"]),
        entry("eager", 2.0, marks=["not settled"], telemetry=slowed),
        entry("other", 3.0),
    ]
    made = record(entries)
    table = best_table(made, groups(made)[0])
    assert table.notes == ["not settled", "slowed by hw_slowdown"]
    assert [cell.notes for cell in table.rows[0] if cell.notes] == [(1,), (1, 2)]
    details = detail_table(made, groups(made)[0])
    assert texts(details)[1][details.head.index("clock MHz")] == "1000–1500"


def test_what_every_measurement_is_marked_with_is_said_once():
    made = record([entry(name, marks=["host clock"]) for name in ("gaugeblock", "eager")])
    assert not summary_table(made).notes
    assert doubts(made) == ["Every measurement is marked: host clock."]
    alone = record([entry("gaugeblock", marks=["host clock"])])
    assert summary_table(alone).notes == ["host clock"]


def test_cases_that_look_alike_are_told_by_name():
    made = record([entry("gaugeblock"), entry("gaugeblock", case="same_again")])
    assert [row[1] for row in texts(summary_table(made))] == [
        "M=64 N=768 (wide)", "M=64 N=768 (same_again)",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        ({"B": 2, "Tq": 8, "Tk": 8, "D": 4, "causal": True}, "B=2 T=8 D=4 causal"),
        ({"B": 2, "Tq": 1, "Tk": 8, "causal": False}, "B=2 Tq=1 Tk=8"),
        ({"H": 4, "Hkv": 4, "window": None, "p": 0.1}, "H=4 p=0.1"),
        ({"H": 4, "Hkv": 2, "lengths": [1, 2]}, "H=4 Hkv=2 lengths=1,2"),
        ({"lengths": list(range(9)), "activation": "relu"}, "lengths=9 values activation=relu"),
    ],
)
def test_shapes_in_words(shape, said):
    assert words.shape_words(shape) == said


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (words.figure(0.0377582), "0.0378"),
        (words.figure(9.996), "10.0"),
        (words.figure(1234.5), "1,230"),
        (words.figure(None), "–"),
        (words.figure(0), "0"),
        (words.plain(0.5), "0.5"),
        (words.plain(2000), "2,000"),
        (words.rate(4.3e12, "B/s"), "4.30 TB/s"),
        (words.rate(999e6, "FLOP/s"), "999 MFLOP/s"),
        (words.ratio_words(1.2345), "1.23×"),
        (words.ratio_words(0.0851), "0.085×"),
        (words.ratio_words(23.45), "23.4×"),
        (words.ratio_words(1.0012, rounded_to_one=False), "1.0012×"),
        (words.ratio_words(1.0012), "1.00×"),
        (words.percent(1.05), "105%"),
        (words.percent(0.004), "0.4%"),
        (words.bytes_words(1 << 24), "16 MiB"),
        (words.bytes_words(700), "700 B"),
        (words.duration(500), "8 min 20 s"),
        (words.duration(7.5), "7.50 s"),
    ],
)
def test_figures_in_words(said, expected):
    assert said == expected


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, None),
        ({"complete": False}, "cut short"),
        ({"dirty": True}, "differed from the commit"),
        ({"ceilings": None}, "No ceilings"),
        ({"ceilings": {"before": CEILINGS, "after": None, "drift": None}}, "is unknown"),
        ({"ceilings": {"before": CEILINGS, "after": CEILINGS, "drift": 0.02}}, None),
        ({"ceilings": {"before": CEILINGS, "after": CEILINGS, "drift": 0.031}}, "by 3.1%"),
    ],
)
def test_doubts_about_the_whole_run(changes, said):
    # without flops and roof there is nothing to draw
    bare = {"flops": 0, "percent_of_roof": None}
    made = record([entry("gaugeblock", **bare), entry("eager", **bare)], **changes)
    assert len(doubts(made)) == (said is not None)
    for text in (page([made]), markdown([made]), markdown_summary(made)):
        assert (said or "Doubt") in text or said is None
        assert not re.search(r'class="doubt"|Doubt:', text) or said
    assert said is None or said in doubts(made)[0]


def test_the_head_says_where_and_with_what():
    found = dict(facts(full() | {"dirty": True}))
    assert found["commit"] == "abcdef012345, with changes"
    assert found["started"] == "2026-01-02 03:04 UTC"
    assert found["run time"] == "1 min 15 s"
    assert found["machine"] == "cores 2, l2 1 MiB"
    for text in (page_of("full"), markdown([full()])):
        for known in ("Invented", "2.11.0", "3.6.0", "abcdef012345", "is not installed"):
            assert known in text


def test_a_ceiling_that_moved_is_marked():
    after = copy.deepcopy(CEILINGS)
    after["matrix_tflop_s"]["float32"] *= 0.95
    made = record([], ceilings={"before": CEILINGS, "after": after, "drift": 0.05})
    table = ceilings_table(made)
    assert texts(table)[0] == ["copy of 16 MiB", "90.0 GB/s", "90.0 GB/s", "+0.0%"]
    moved = [row for row in table.rows if row[-1].notes]
    assert [(row[0].text, row[3].text) for row in moved] == [("matrix product, float32", "-5.0%")]
    assert table.notes == ["over 2%"]


def test_what_was_left_out_is_listed_by_reason():
    assert left_out_lines(full()) == [
        ("eager: its scores do not fit", "attention causal_1024 float32 fwd bwd"),
        ("every provider: no time was left", "layer_norm huge float32 fwd"),
    ]
    for text in (page_of("full"), markdown([full()])):
        assert "no time was left" in text


def rows_of(text):
    return [line for line in text.splitlines() if line.startswith("|")]


def test_markdown_shows_every_case_and_folds_the_rest():
    text = markdown([full(), peers_only()])
    assert text.count("<details>") == text.count("</details>") == 8
    assert text.index("Ratio") < text.index("<details>")
    assert text.count("## Invented, 2026") == 2
    for T in (256, 512, 1024):
        assert f"| attention bwd | B=2 H=3 T={T} D=64 causal | ▼ 0.80× |" in text


def test_markdown_cells_cannot_break_out():
    made = hostile()
    for text in (markdown([made]), markdown_summary(made)):
        assert "<script" not in text
        assert "`" not in text
        widths = [line.count("|") for line in rows_of(text)]
        heads = [n for n, line in zip(widths, rows_of(text)) if "---" in line]
        assert set(widths) == set(heads)


def test_markdown_links_the_plots_beside_it(tmp_path):
    (tmp_path / "record.json").write_text(json.dumps(full()))
    written = report(
        [tmp_path],
        markdown=tmp_path / "docs" / "r.md",
        png=tmp_path / "png",
        html=tmp_path / "r.html",
    )
    assert all(path.exists() for path in written)
    linked = re.findall(r"!\[.+\]\(<(.+)>\)", (tmp_path / "docs" / "r.md").read_text())
    assert len(linked) == len(list((tmp_path / "png").iterdir())) == 4
    assert all((tmp_path / "docs" / path).exists() for path in linked)


def test_several_records_get_a_section_and_plots_each(tmp_path):
    for name, made in (("a", full()), ("b", peers_only())):
        (tmp_path / name).mkdir()
        (tmp_path / name / "record.json").write_text(json.dumps(made))
    report([tmp_path / "a", tmp_path / "b"], png=tmp_path / "png")
    names = sorted(path.name for path in (tmp_path / "png").iterdir())
    assert [name[0] for name in names] == ["1"] * 4 + ["2"] * 4
    assert page_of("full", "peers_only").count("<h2") == 3


def test_the_newest_record_is_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="runs must hold a record, it holds none; run gauge"):
        report([])
    for age, name in enumerate(("new", "old")):
        path = tmp_path / "runs" / name / "record.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(full()))
        os.utime(path, (1e9 - age, 1e9 - age))
    assert newest() == (tmp_path / "runs" / "new" / "record.json").relative_to(tmp_path)
    assert [path.name for path in report([], markdown="r.md")] == ["r.md"]


def test_the_terminal_shows_the_summary(capsys, tmp_path):
    (tmp_path / "record.json").write_text(json.dumps(full() | {"dirty": True}))
    assert report([tmp_path]) == []
    said = capsys.readouterr().out
    for expected in ("▲ 1.11×", "compiled", "doubt", "3 not measured", "faster in 1 (▲)"):
        assert expected in said
    print_record(hostile())
    assert "document.title" in capsys.readouterr().out
