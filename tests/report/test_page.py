import re
from html.parser import HTMLParser

import numpy as np
import pytest

from testbed import simulate
from testbed.metrics.comparison import differences
from testbed.metrics.laws import Cause
from testbed.metrics.run import Run
from testbed.ports import Stage
from testbed.report import write_report
from testbed.report.figures import host_stages
from testbed.report.series import cause_shares, cumulative, held_mean, spread, time_bins
from testbed.scenario.errors import InputError

VOID = {"meta", "link", "br", "img", "input", "hr"}


class Checker(HTMLParser):
    """Every element that opens closes, in order."""

    def __init__(self):
        super().__init__()
        self.open, self.text, self.references = [], [], []

    def handle_starttag(self, tag, attrs):
        self.references += [value for name, value in attrs if name in ("src", "href", "xlink:href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.references += [value for name, value in attrs if name in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def read(page):
    checker = Checker()
    text = page.read_text(encoding="utf-8")
    checker.feed(text)
    assert checker.open == []
    return text, " ".join(" ".join(checker.text).split()), checker.references


@pytest.fixture(scope="module")
def page(run, tmp_path_factory):
    return write_report(run, tmp_path_factory.mktemp("report"))


def test_one_page_needs_nothing_else(run, page):
    text, words, references = read(page)
    assert all(reference.startswith("#") for reference in references) and len(references) > 5
    assert "<script" not in text and "@import" not in text and "url(http" not in text
    assert "a <run> & its name" in words and "The device profile is unmeasured." in words
    for part in (
        "testbed simulate scenario.yaml",
        run.decision_digest,
        "p99_ttft_ms",
        "Guessed or unmeasured",
        "h100-sxm",
    ):
        assert part in words
    figures = run.aggregates()
    assert f"{figures['p99_ttft_ms']:.2f}" in words and "✗ missed" in words


def test_every_figure_is_on_the_page_and_beside_it(page):
    text, _, _ = read(page)
    names = {"latency_cdf", "requests", "queue", "batch", "kv", "device", "host", "steps"}
    assert {path.name for path in (page.parent / "figures").iterdir()} == {
        f"{n}.{s}" for n in names for s in ("svg", "png")
    }
    assert text.count("<svg") == len(names)


def test_colours_on_the_page_follow_the_theme(page):
    text, _, _ = read(page)
    drawn = text[text.index("<svg") : text.rindex("</svg>")]
    assert "var(--blue)" in drawn and "#0072b2" not in drawn
    declared = set(re.findall(r"--(\w+):", text))
    assert set(re.findall(r"var\(--(\w+)\)", text)) <= declared


def test_ids_on_the_page_are_unique_or_equal(page):
    text, _, _ = read(page)
    for name in re.findall(r'xlink:href="#([^"]+)"|url\(#([^)]+)\)', text):
        assert f'id="{name[0] or name[1]}"' in text
    paths = re.findall(r'<(?:path|clipPath) id="([^"]+)"', text)
    assert len(paths) == len(set(paths))


def test_equal_runs_give_equal_pages(run, page, tmp_path):
    again = write_report(run, tmp_path)
    assert again.read_bytes() == page.read_bytes()
    for path in (page.parent / "figures").iterdir():
        assert path.read_bytes() == (tmp_path / "figures" / path.name).read_bytes(), path.name


def test_several_runs_become_a_comparison(make_run, tmp_path):
    runs = [make_run(100, host_us=us) for us in (400, 1500)]
    _, words, _ = read(write_report(runs, tmp_path))
    assert "host 400 us vs. host 1500 us" in words and "differences are paired" in words
    assert {"compare_bars.svg", "compare_cdf.svg", "device_2.png"} <= {p.name for p in (tmp_path / "figures").iterdir()}

    assert {"load_1.svg", "load_2.png"} <= {p.name for p in (tmp_path / "figures").iterdir()}


def test_a_difference_that_has_no_percentage_has_no_brackets(make_run, tmp_path):
    runs = [make_run(100, host_us=us) for us in (1, 1500)]
    figures = {figure.metric: figure for figure in differences(runs) if not figure.is_baseline}
    assert figures["bubble_host_percent"].ratio > 100
    assert "()" not in read(write_report(runs, tmp_path))[1]


def test_a_comparison_links_to_the_runs_own_reports(make_run, tmp_path):
    runs = [make_run(60, host_us=us) for us in (400, 1500)]
    for name, run in zip(("one", "the other"), runs, strict=True):
        run.save(tmp_path / name)
    write_report(runs[1], tmp_path / "the other")
    text, _, references = read(write_report(runs, tmp_path / "comparison", title="hosts"))
    assert [one for one in references if "report.html" in one] == ["../the%20other/report.html"]
    assert "<h1>hosts</h1>" in text


def test_many_runs_are_drawn_without_warnings_and_too_many_refused(make_run, tmp_path):
    runs = [make_run(20, host_us=100 * us, name=f"a run whose name is long, number {us}") for us in range(1, 13)]
    _, words, _ = read(write_report(runs, tmp_path))
    assert "12 runs compared" in words
    with pytest.raises(InputError, match="41 runs are too many"):
        write_report([runs[0]] * 41, tmp_path)


def test_the_header_names_what_scheduled(make_run, tmp_path):
    run = make_run(20, engine={"loop": "auto", "batching": "mixed_chunk", "policy": "lpm"})
    run.meta["loop"] = "overlap"
    _, words, _ = read(write_report(run, tmp_path))
    assert "loop overlap · batching mixed_chunk · policy lpm" in words


@pytest.mark.parametrize(
    ("fields", "header", "loops"),
    [
        ({"engine": {"parallel": {"dp": 2}}}, "2 loops · routing round_robin", "replica 0, replica 1"),
        ({"engine": {"parallel": {"pp": 2}}}, "policy fcfs · 2 loops", "replica 0 stage 0, replica 0 stage 1"),
        ({"disaggregation": {"decode": 2}}, "policy fcfs · 3 loops", "prefill 0, decode 0, decode 1"),
    ],
)
def test_the_header_counts_loops_and_the_facts_name_them(fields, header, loops, tmp_path):
    lengths = {"prompt_tokens": 10, "output_tokens": 2}
    workload = {"arrivals": {"kind": "all_at_once"}, "lengths": lengths, "count": 2}
    _, words, _ = read(write_report(simulate({"model": "llama-3.1-8b", "workload": workload, **fields}), tmp_path))
    assert header in words and loops in words
    assert ("routing" in words.partition("Summary")[0]) == ("routing" in header)


@pytest.mark.parametrize("requests", [1, 3])
def test_tiny_runs_have_a_page(make_run, tmp_path, requests):
    run = make_run(requests, output=1)
    run.meta.clear()
    run.records.spans = {name: column[:0] for name, column in run.records.spans.items()}
    read(write_report(run, tmp_path))


def test_a_run_without_requests_has_a_page(make_run, tmp_path):
    run = make_run(2)
    records = run.records
    records.requests = {name: column[:0] for name, column in records.requests.items()}
    records.steps = {name: column[:0] for name, column in records.steps.items()}
    records.spans = {name: column[:0] for name, column in records.spans.items()}
    records.token_offsets, records.token_times_ns = np.zeros(1, np.int64), np.zeros(0, np.int64)
    read(write_report(Run(run.scenario, records), tmp_path))


def test_no_run_is_refused(tmp_path):
    with pytest.raises(InputError, match="needs a run"):
        write_report([], tmp_path)


def test_held_mean_weighs_by_time(make_run):
    bins = time_bins(make_run(5).records, 7)
    middle = int(bins.edges_ns[3])
    mean = held_mean(bins, np.array([middle]), np.array([4.0]))
    assert mean.tolist() == [0, 0, 0, 4, 4, 4, 4]
    since, values = np.array([0, 10, 30]), np.array([1.0, 5.0, 2.0])
    ten = bins._replace(edges_ns=np.array([0, 20, 40]))
    assert held_mean(ten, since, values).tolist() == [3, 3.5]


def test_shares_fill_every_bin(make_run):
    run = make_run(100)
    shares = cause_shares(run, time_bins(run.records, 50))
    assert np.allclose(sum(shares.values()), 100)
    assert shares[Cause.HOST].sum() > 0


def test_every_stage_of_the_host_has_a_colour_of_its_own(make_run):
    run = make_run(100)
    stages = run.records.spans["name"]
    host = np.flatnonzero(run.records.spans["lane"] == 0)
    stages[host] = np.arange(len(host)) % len(Stage)
    (axes,) = host_stages(run).axes
    colours = {tuple(part.get_facecolor()[0]) for part in axes.collections}
    assert len(colours) == len(axes.collections) == len(Stage) - 1  # waiting for the device is left out


def test_a_thinned_distribution_keeps_its_ends_and_middle():
    values = np.random.Philox(key=1).random_raw(50_000).astype(np.float64)
    x, y = cumulative(values, 500)
    assert len(x) <= 500 and x[0] == values.min() and x[-1] == values.max() and y[-1] == 1
    assert np.interp(0.5, y, x) == pytest.approx(np.median(values), rel=0.01)
    assert spread(10, 4).tolist() == [0, 3, 6, 9] and spread(3, 4).tolist() == [0, 1, 2]
