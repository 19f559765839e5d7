"""Reports of made-up records: nothing unmeasured becomes a number, nothing of a record becomes markup."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Sequence
from html import unescape
from pathlib import Path
from xml.etree import ElementTree

import pytest

import browser
from finial.cli import invoke
from finial.lab.analysis import energy
from finial.lab.answer import answer
from finial.lab.open_loop import Load
from finial.lab.open_loop import cell as load_cell
from finial.lab.record import Cell, Data, Divergence, Energy, Reading, Record, Request, Row, Sample, Verdict
from finial.lab.report import csv_text, markdown_text
from finial.lab.report.charts import pictures
from finial.lab.report.html import page
from finial.lab.report.results import Study
from finial.lab.report.theme import LIGHT
from finial.lab.roofline import Floor
from finial.lab.workloads import Workload

READ = 40.0  # GB/s of every probe
MACHINE = {
    "system": {"name": "Linux", "kernel": "6"},
    "cpu": {"model": "CPU", "usable_cores": 2, "usable_threads": 2},
    "memory": {"total_bytes": 1 << 30},
    "native": {"isa": "avx512"},
}
EVIL = 'rival</text><script>alert("x")</script>'


def row(values: Sequence[float], *, cache: bool = True, joules: float | None = None) -> Row:
    probe = Reading(READ, 50.0, 1.0)
    return Row(
        samples=[
            Sample(
                round=index,
                value=value,
                before=probe,
                after=probe,
                others=0.0,
                wall_s=2.0,
            )
            for index, value in enumerate(values)
        ],
        energy=None if joules is None else Energy(2.0, {"nvml": joules}, 100),
        cache=cache,
        version="1.0",
        precision="bf16 weights",
    )


def cell(name: str, engines: dict[str, Row], kind: str = "decode", **facts: object) -> Cell:
    workload = Workload(name, kind, **facts)  # type: ignore[arg-type]
    floor = Floor(1_000_000_000, 10_000, workload.sequences, 900_000_000, 100_000_000)
    return Cell("model", "bf16", 2, workload, floor, None, engines)


def data(*cells: Cell, verdicts: dict[str, Verdict] | None = None, **more: object) -> Data:
    found = Data(
        schema=2, plan={}, started="2026-01-01", commit="abc", busy=0.0, machine=MACHINE,
        peaks={"2": {"f32": 100.0, "bf16": 200.0}}, verdicts={"model/bf16": verdicts or {}},
        cells={f"model/{c.format}/2/{c.workload.name}": c for c in cells},
    )  # fmt: skip
    for name, value in more.items():
        setattr(found, name, value)
    return found


def everything() -> Data:
    steady = [30.0, 31.0, 29.5, 30.5, 30.2]
    slower = [20.0, 20.5, 19.5, 20.1, 19.9]
    good = Verdict(
        positions=100, kl_mean=1e-4, kl_p99=2e-4, kl_max=3e-4, top1=0.98, perplexity=12.5, perplexity_error=0.4
    )
    cells = [
        cell("decode at depth 32", {"finial": row(steady, joules=90.0), EVIL: row(slower, joules=120.0)}),
        cell("peak memory", {"finial": row([1.2e9]), EVIL: row([2.4e9])}, kind="memory"),
        cell(
            "prompt of 512",
            {"finial": row([400.0, 410.0, 405.0]), EVIL: Row(status="failed", reason="it died: out of memory")},
            kind="prompt",
            depth=512,
        ),
    ]
    for depth in (1, 8, 64, 512):
        speeds = [s / (1 + depth / 512) for s in steady]
        uncached = row([30 / depth for _ in steady], cache=False)
        engines = {"finial": row(speeds), "finial, no cache": uncached}
        cells.append(cell(f"depth {depth}", engines, depth=depth, caches=(True, False), family="cache"))
    verdicts = {"finial": good, EVIL: Verdict(positions=100, kl_mean=2e-2, kl_p99=0.1, kl_max=0.2, top1=0.9)}
    return data(
        *cells, verdicts=verdicts, idle_w={"loaded model/bf16/2": {"nvml": 10.0}}, command=["finial", "bench", "<b>"]
    )


def test_a_failed_row_is_never_a_number():
    dead = Row(status="failed", reason="it hung", samples=row([99.0]).samples)
    made = data(cell("decode", {"finial": row([10.0, 11.0, 10.5]), "dead": dead}))
    html = page([made])
    assert "it hung" in html and "99.0" not in html
    found = {result.engine: result.value for result in Study.of([made]).results}
    assert found["dead"] is None and found["finial"] is not None


def test_overlapping_intervals_say_that_no_difference_was_shown():
    assert "no difference shown" in page(
        [data(cell("d", {"finial": row([10, 12, 9, 11, 10]), "other": row([11, 10, 11, 10, 11])}))]
    )


def test_every_verdict_is_put_in_words():
    one = cell("decode", {"finial": row([10.0, 10.0])})
    assert "without proof that the output is right" in page([data(one)])
    parted = Verdict(
        positions=9, kl_mean=1e-4, greedy_tokens=32, divergence=Divergence(7, 1, 2, 0.003), flaws=["its text"]
    )
    html = page([data(one, verdicts={"finial": parted})])
    assert "parts after 7 tokens" in html and "its text" in html
    assert "no verdict: it broke" in page([data(one, verdicts={"finial": Verdict(error="it broke")})])


def test_the_command_can_be_pasted_into_a_shell():
    made = data(cell("decode", {"finial": row([10.0])}), command=["finial", "bench", "--only", "OpenVINO GenAI"])
    for shown in (markdown_text([made]), unescape(page([made]))):
        assert "finial bench --only 'OpenVINO GenAI'" in shown


def test_energy_is_measured_or_said_to_be_unavailable():
    assert "energy: nvml" in page([data(cell("decode", {"finial": row([10.0], joules=170.0)}))])
    without = data(cell("decode", {"finial": row([10.0])}), energy="no RAPL, no NVML")
    assert "energy: unavailable (no RAPL, no NVML)" in page([without])
    assert csv_text([without]).splitlines()[1].endswith(",unavailable" * 5)
    assert "tokens per joule: unavailable" in markdown_text([without])
    assert answer(without).energy == "Energy: unavailable (no RAPL, no NVML)."


def test_energy_of_counters_is_gross_and_net_of_two_idles_everywhere():
    """200 J in 2 s for 100 tokens; the empty machine takes 10 W, the one with the engines loaded 25 W."""
    idle = {"empty": {"nvml": 10.0}, "loaded model/bf16/2": {"nvml": 25.0}}
    made = data(cell("decode", {"finial": row([10.0], joules=200.0), "other": row([9.0])}), idle_w=idle)
    cost = energy(made, made.cells["model/bf16/2/decode"], "finial")
    assert cost is not None
    figures = (cost.gross_j, cost.net_empty_j, cost.net_loaded_j, cost.tokens_per_j, cost.watts)
    assert figures == pytest.approx((2.0, 1.8, 1.5, 0.5, 100.0))
    assert csv_text([made]).splitlines()[1].endswith(",2.0,1.8,1.5,0.5,nvml")
    assert csv_text([made]).splitlines()[2].endswith(",unavailable" * 5)
    assert "| decode | finial | 2 | 1.8 | 1.5 | 0.5 | 100 | nvml |" in markdown_text([made])
    html = page([made])
    assert "<td>1.5</td>" in html and "2 J/token" in html
    picture = next(chart for chart in pictures(Study.of([made]), LIGHT) if chart.name.startswith("energy"))
    assert "0.5 tok/J" in picture.svg()
    assert [s.energy.gross_j if s.energy else None for s in answer(made).tables[0].standings] == [2.0, None]


def test_every_kind_of_picture_is_drawn_and_is_sound_svg():
    charts = pictures(Study.of([everything()]), LIGHT)
    kinds = {chart.name.split("-")[0] for chart in charts}
    assert kinds == {"speed", "depth", "ratio", "cache", "memory", "energy", "quality"}
    assert len({chart.name for chart in charts}) == len(charts)
    for chart in charts:
        ElementTree.fromstring(chart.svg())
        assert chart.png()[:4] == b"\x89PNG"
        assert re.fullmatch(r"[a-z0-9.-]+", chart.name)


def test_a_servers_load_is_drawn_and_tabled():
    def cell_of(rate: float, late: float) -> Cell:
        times = [[late + 0.1 * i + 0.01 * j for j in range(4)] for i in range(5)]
        requests = [Request(due=0.1 * i, sent=0.1 * i, times=t, tokens=4) for i, t in enumerate(times)]
        requests.append(Request(due=0.5, sent=0.5, error="status 429"))
        return load_cell(Load("http://server", rate, 1.0), requests, "model")

    made = data(cell_of(5, 0.02), cell_of(50, 2.0))
    charts = {chart.name: chart.svg() for chart in pictures(Study.of([made]), LIGHT)}
    assert {name.split("-")[1] for name in charts} == {"goodput", "first"}, "and no bars without meaning"
    html = page([made])
    assert "1 × status 429" in html and "20.0 / 20.0 / 20.0" in html and "Goodput" in html
    assert "http://server answered" not in html, "one failed at each load"
    assert "was late or failed at every load" in html


def test_pictures_of_equal_results_are_equal():
    first, again = (pictures(Study.of([everything()]), LIGHT)[0].svg() for _ in range(2))
    assert first == again


def test_nothing_of_a_record_becomes_markup():
    html = page([everything()])
    assert "<script" not in html
    assert "<b>" not in html
    assert "rival&lt;/text&gt;" in html
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert len(ids) == len(set(ids))
    assert not re.search(r'(?:src|href)="(?!#|data:)', html)  # nothing is fetched


def test_two_records_that_began_together_stand_apart():
    made = Study.of([everything(), everything()])
    assert len(made.records) == 2
    assert len(made.groups) == 2
    assert len({chart.name for chart in pictures(made, LIGHT)}) == len(pictures(made, LIGHT))


def test_the_command_writes_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    record = tmp_path / "run.json"
    Record(record, everything()).save()
    where = {kind: tmp_path / f"report.{kind}" for kind in ("html", "md", "csv")}
    options = [part for kind, path in where.items() for part in (f"--{kind}", str(path))]
    assert invoke(["report", str(record), *options, "--charts", str(tmp_path / "charts")]) == 0
    drawn = list((tmp_path / "charts").glob("*.svg"))
    assert where["html"].read_text().count("<figure") == len(drawn) == len(list((tmp_path / "charts").glob("*.png")))
    assert "decode at depth 32" in where["md"].read_text()
    assert "it died: out of memory" in where["csv"].read_text()


def test_without_matplotlib_the_message_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    record = tmp_path / "run.json"
    Record(record, everything()).save()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert invoke(["report", str(record), "--html", str(tmp_path / "x.html")]) == 2
    assert "finial[charts]" in capsys.readouterr().err
    assert not (tmp_path / "x.html").exists()
    assert invoke(["report", str(record), "--md", str(tmp_path / "x.md")]) == 0


def test_a_browser_shows_the_page_on_paper_of_any_colour_and_width(tmp_path: Path):
    path = tmp_path / "report.html"
    path.write_text(page([everything()]), encoding="utf-8")
    with browser.Browser() as chromium:
        seen = {}
        for scheme in ("light", "dark"):
            opened = chromium.open(path.as_uri(), ready="h1", width=390, height=844)
            opened.resize(390, 844, scheme=scheme)
            opened.wait("document.querySelectorAll('figure svg').length > 6")
            assert opened.problems == []
            assert [address for address in opened.requests if not address.startswith(("file:", "data:"))] == []
            # Nothing but the tables scrolls sideways.
            assert opened.run("document.documentElement.scrollWidth") <= 390
            ink, paper = (
                opened.run(f"getComputedStyle(document.{what}).{which}")
                for what, which in (("querySelector('figure svg text')", "fill"), ("body", "backgroundColor"))
            )
            seen[scheme] = paper
            assert contrast(ink, paper) > 4.5  # WCAG 2.2, 1.4.3
        assert seen["light"] != seen["dark"]


def contrast(one: str, other: str) -> float:
    """Contrast ratio of two CSS colours (WCAG 2.2, "contrast ratio")."""

    def luminance(colour: str) -> float:
        parts = [int(value) / 255 for value in re.findall(r"\d+", colour)[:3]]
        linear = [p / 12.92 if p <= 0.04045 else math.pow((p + 0.055) / 1.055, 2.4) for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)
