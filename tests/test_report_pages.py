"""Plots and pages of `gaugeblock report`: any record can be shown, and nothing else gets in."""

import base64
import html
import json
import os
import re
import shutil
import struct
import subprocess
from html.parser import HTMLParser
from importlib.metadata import version

import pytest
from gaugeblock.benchmarks import words
from gaugeblock.benchmarks.page import _STYLE
from gaugeblock.benchmarks.plot_parts import look
from gaugeblock.benchmarks.plot_roofline import richest_case
from gaugeblock.benchmarks.plots import plots
from gaugeblock.benchmarks.standings import groups

from tests.invented_records import HOSTILE, attention, entry, full, page_of, record


@pytest.mark.parametrize("form", ["png", "svg"])
def test_the_same_record_gives_the_same_plots(form):
    first, again = plots(full(), form), plots(full(), form)
    assert first == again
    assert plots(full(), form, dark=True) != first
    faster = full()
    faster["entries"][0]["tflop_s"] *= 2
    assert plots(faster, form) != first
    # nor does the version of what drew it take part
    assert version("matplotlib").encode() not in first[0].data


def test_the_plots_of_a_record():
    found = plots(full())
    assert [plot.name for plot in found] == [
        "roofline-float32", "rooflines_by_op-float32", "speed_against_length-float32",
        "percent_of_roof-float32",
    ]  # fmt: skip
    for plot in found:
        assert plot.alt.endswith("Invented, float32.")
        assert struct.unpack(">I", plot.data[16:20]) == (1600,)


def test_what_cannot_be_plotted_is_left_out():
    made = record([entry("gaugeblock", flops=0, tflop_s=0.0, percent_of_roof=None, roof=None)])
    assert plots(made) == []
    bare = record([entry("gaugeblock"), attention("gaugeblock", 1.0, 64)], ceilings=None)
    assert [plot.name for plot in plots(bare)][:2] == [
        "roofline-float32",
        "rooflines_by_op-float32",
    ]
    # one length makes no line
    assert not any("length" in plot.name for plot in plots(bare))
    assert plots(record([])) == []


def test_an_op_s_roofline_is_of_the_case_that_most_ran():
    shape, found = richest_case(groups(full()), "attention")
    # all three ran 256 and 512, two ran 1024
    assert shape == "B=2 H=3 T=512 D=64 causal"
    assert len(found) == 6


def test_of_two_batches_of_one_length_the_larger_is_plotted():
    def speed(entries):
        return [plot for plot in plots(record(entries)) if "length" in plot.name]

    entries = [attention("gaugeblock", T / 64, T) for T in (64, 128)]
    small = attention("gaugeblock", 0.5, 64) | {"case": "small", "flops": 1000, "tflop_s": 0.001}
    assert speed([*entries, small]) == speed(entries) == speed([small, *entries]) != []


def test_many_bars_take_several_pages():
    made = record([entry("gaugeblock", case=f"case_{i}") for i in range(41)])
    assert [p.name for p in plots(made) if "percent" in p.name] == [
        "percent_of_roof-1-float32", "percent_of_roof-2-float32",
    ]  # fmt: skip


def test_providers_look_different():
    found = [look(i) for i in range(13)]
    assert len({(x["color"], x["marker"]) for x in found}) == len(found)


class Seen(HTMLParser):
    """What a page holds: elements with their attributes, and text outside of <style>."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.text, self.open = [], "", []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in ("meta", "source", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.text += data

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.mark.parametrize("name", ["full", "hostile", "empty"])
def test_the_page_asks_for_nothing_and_runs_nothing(name):
    seen = Seen(page_of(name, "peers_only"))
    assert not seen.open
    assert not {"script", "link", "iframe", "object", "base", "form"} & {
        t for t, _ in seen.elements
    }
    for _, attributes in seen.elements:
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "srcset", "href"):
            assert attributes.get(name, "#").startswith(("#", "data:image/svg+xml;base64,"))
    assert "url(" not in _STYLE and "@import" not in _STYLE
    policy = [a["content"] for a in seen.all("meta") if "http-equiv" in a]
    assert policy == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]


@pytest.mark.parametrize("name", ["full", "hostile", "empty"])
def test_the_page_can_be_found_through_and_read_aloud(name):
    seen = Seen(page_of(name, "peers_only"))
    ids = [attributes["id"] for _, attributes in seen.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    links = {a["href"][1:] for a in seen.all("a")}
    assert links and links <= set(ids)
    assert {a["scope"] for a in seen.all("th")} == {"row", "col"}
    assert all(len(a["alt"]) > 40 for a in seen.all("img"))
    assert len(seen.all("caption")) == len(seen.all("table"))
    assert seen.all("html") == [{"lang": "en"}]


def test_the_page_shows_hostile_words_as_words():
    text = Seen(page_of("hostile", "peers_only")).text
    # device, driver, torch, command, provider, reason, …
    assert text.count(HOSTILE) > 15


def test_every_plot_is_there_for_a_light_and_a_dark_page():
    seen, made = Seen(page_of("full")), full()
    for tag, name, dark in (("img", "src", False), ("source", "srcset", True)):
        found = [base64.b64decode(a[name].split(",")[1]) for a in seen.all(tag)]
        assert found == [plot.data for plot in plots(made, "svg", dark=dark)]
    assert {a["media"] for a in seen.all("source")} == {"(prefers-color-scheme: dark)"}


def test_the_page_holds_every_time():
    text = Seen(page_of("full")).text
    for e in full()["entries"]:
        assert words.figure(e["time_ms"]["p50"]) in text
        assert e["case"] in text


def luminance(colour):
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    r, g, b = (x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


@pytest.mark.parametrize("dark", [False, True])
def test_text_stands_out_from_its_ground(dark):
    blocks = re.findall(r":root \{(.*?)\}", _STYLE, re.DOTALL)
    colours = dict(re.findall(r"--([\w-]+): (#\w{6})", blocks[dark]))
    for ground in ("paper", "band"):
        for ink in ("ink", "soft", "link", "good", "bad"):
            pair = sorted(luminance(colours[name]) for name in (ink, ground))
            assert (pair[1] + 0.05) / (pair[0] + 0.05) >= 4.5, (ink, ground)
    pair = sorted(luminance(colours[name]) for name in ("ink", "warn"))
    assert (pair[1] + 0.05) / (pair[0] + 0.05) >= 4.5


NAMES = ("chromium", "chromium-browser", "google-chrome")


class Browser:
    """Headless Chromium on files of a folder."""

    def __init__(self, program, folder):
        self.program, self.folder = program, folder

    def run(self, text, *flags):
        """Open a page; what is printed."""
        path = self.folder / "page.html"
        path.write_text(text, encoding="utf-8")
        command = [
            self.program, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
            "--hide-scrollbars", f"--user-data-dir={self.folder / 'profile'}",
            "--virtual-time-budget=10000", *flags, path.as_uri(),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout


@pytest.fixture
def browser(tmp_path):
    program = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    if program is None:
        pytest.skip(f"needs {', '.join(NAMES)} on the path, or $CHROMIUM")
    return Browser(program, tmp_path)


# everything unfolded, then what reaches past the width outside of the boxes that scroll
MEASURE = """
const text = document.getElementById("page").content.textContent;
const said = [];
const frames = [...document.querySelectorAll("iframe")];
for (const frame of frames) {
  frame.onload = () => {
    const page = frame.contentDocument, width = frame.clientWidth;
    page.querySelectorAll("details").forEach(d => d.open = true);
    const reaches = e => e.getBoundingClientRect().right > width + 0.5;
    const past = [...page.body.querySelectorAll("*")].filter(
      e => reaches(e) && (!e.closest(".box") || e.matches(".box")));
    said.push({
      asked: width, width: page.documentElement.clientWidth,
      scrolls: page.documentElement.scrollWidth,
      past: past.map(e => e.outerHTML.slice(0, 200)),
      tables: page.querySelectorAll("table").length,
      images: [...page.images].filter(i => i.complete && i.naturalWidth > 0).length,
      headings: [...page.querySelectorAll("h2, h3")].map(h => h.textContent),
      title: page.title, scripts: page.scripts.length,
    });
    if (said.length === frames.length)
      document.getElementById("said").textContent = JSON.stringify(said);
  };
  frame.srcdoc = text;
}
"""


def measured(browser, text, widths):
    """What a page is like once it is laid out, for each of some widths."""
    frames = "".join(
        f'<iframe style="border:0;width:{width}px;height:900px"></iframe>' for width in widths
    )
    dom = browser.run(
        f'<!DOCTYPE html><meta charset="utf-8">{frames}<pre id="said"></pre>'
        f'<template id="page">{html.escape(text)}</template><script>{MEASURE}</script>',
        "--window-size=1400,1000", "--dump-dom",
    )  # fmt: skip
    return json.loads(html.unescape(re.search(r'<pre id="said">(.*?)</pre>', dom, re.DOTALL)[1]))


@pytest.mark.browser
@pytest.mark.parametrize("name", ["full", "hostile"])
def test_a_browser_lays_the_page_out_within_its_width(browser, name):
    text = page_of(name, "peers_only")
    parsed = Seen(text)
    found = measured(browser, text, (1280, 390))
    assert {seen["asked"] for seen in found} == {1280, 390}
    for seen in found:
        assert seen["scrolls"] == seen["width"] == seen["asked"], seen["past"]
        assert not seen["past"]
        assert seen["tables"] == len(parsed.all("table"))
        assert seen["images"] == len(parsed.all("img")) > 0
        assert seen["scripts"] == 0
        assert seen["title"] == html.unescape(re.search("<title>(.*)</title>", text)[1])
        if name == "full":
            section = ["The run", "Plots", "attention", "layer_norm", "Not measured"]
            title = "Invented, 2026-01-02 03:04 UTC"
            assert seen["headings"] == [*[title, *section] * 2, "How to read this"]


@pytest.mark.browser
def test_a_browser_asks_the_network_for_nothing(browser, tmp_path):
    log = tmp_path / "net.json"
    dom = browser.run(page_of("hostile", "peers_only"), "--dump-dom", f"--log-net-log={log}")
    assert "evil.invalid" in dom
    assert "<script" not in dom
    assert "page.html" in log.read_text()
    assert "evil.invalid" not in log.read_text()


@pytest.mark.browser
@pytest.mark.parametrize(("scheme", "bright"), [(1, True), (0, False)])
def test_a_browser_paints_it_light_or_dark(browser, tmp_path, scheme, bright):
    from matplotlib import image

    shot = tmp_path / "shot.png"
    browser.run(
        page_of("full"), "--window-size=1280,2000", f"--screenshot={shot}",
        f"--blink-settings=preferredColorScheme={scheme}",
    )  # fmt: skip
    painted = image.imread(shot)[..., :3]
    assert painted.shape == (2000, 1280, 3)
    assert (painted[2, 2].mean() > 0.9) == bright
    # words, lines and plots are on it
    assert 0.02 < (abs(painted - painted[2, 2]).max(-1) > 0.3).mean() < 0.5
