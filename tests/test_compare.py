"""Many runs side by side: the averages, the sentences, the page in a real browser, and what is broken left out."""

import itertools
import json
import math
import os
import re
import shutil
import time

import numpy as np
import pytest
import yaml
from PIL import Image

from compare import main
from comparison.panels import Panels, what_to_show
from comparison.records import read_run
from comparison.statistics import Group, compare, group_runs, half_width, with_interval

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
COUNT = itertools.count()


@pytest.fixture
def make(tmp_path):
    """Write a run's folder as train.py leaves it; what is None is left out."""

    def call(experiment="mlp", seed=1, acc=0.9, receipt=True, rows=30, width=8, data="abcdef0123", root=None, **config):
        folder = (root or tmp_path / "runs") / experiment / f"20261122-000000-s{seed}-{next(COUNT):08d}"
        (folder / "pictures").mkdir(parents=True)
        text = {
            "experiment": experiment,
            "seed_everything": seed,
            "checkpoint": {"monitor": "val/acc", "mode": "max"},
            "model": {"class_path": "m.M", "init_args": {"width": width}},
            "trainer": {"max_epochs": 5, "accelerator": "auto"} | config,
        }
        (folder / "config.yaml").write_text(yaml.safe_dump(text))
        with open(folder / "metrics.csv", "w") as file:
            file.write("step,epoch,metric,value\n")
            for i in range(rows):
                file.write(
                    f"{i},{5 * i // rows},train/loss,{math.exp(-i / 10)}\n{i},{5 * i // rows},train/acc,{i / rows}\n"
                )
                if i % (rows // 5) == rows // 5 - 1:
                    file.write(f"{i},{5 * i // rows},val/loss,{math.exp(-i / 12)}\n{i},{5 * i // rows},val/acc,{acc}\n")
        Image.new("RGB", (900, 300), "white").save(folder / "pictures" / "curves.png")
        if receipt:
            said = {"experiment": experiment, "metrics": {"test/loss": 1 - acc, "test/acc": acc}, "parameters": 100 * width,
                    "seconds": {"fit": 3.25}, "data": {"source": "files in data", "fingerprint": data}}  # fmt: skip
            (folder / "receipt.json").write_text(json.dumps(said))
        return folder

    return call


def groups_of(*folders) -> list[Group]:
    return group_runs([read_run(folder) for folder in folders])


class TestStatistics:
    def test_the_interval_is_students(self):
        # t(0.975, 2 degrees of freedom) = 4.302653 from any table; the standard deviation of 1, 2, 3 is 1
        assert half_width(np.array([1.0, 2.0, 3.0])) == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
        assert math.isnan(half_width(np.array([1.0])))
        assert half_width(np.array([0.1 + 0.2, 0.3, 0.3])) == 0

    def test_it_holds_the_true_mean_in_95_of_100(self):
        rng = np.random.default_rng(0)
        hits = 0
        for _ in range(2000):
            values = rng.normal(5, 2, size=4)
            hits += abs(values.mean() - 5) <= half_width(values)
        assert 0.935 < hits / 2000 < 0.965

    def test_pairs_are_used_when_the_seeds_are_the_same(self, make):
        """The seeds move both alike, by more than the difference: only pairs can see it."""
        a = [make("a", seed, 0.90 + 0.02 * seed) for seed in (1, 2, 3, 4)]
        b = [make("b", seed, 0.91 + 0.02 * seed + 0.0001 * (seed % 2)) for seed in (1, 2, 3, 4)]
        sentence = compare(*groups_of(*a, *b), "test/acc")
        assert sentence.startswith("b has the better test/acc, 0.96")
        assert "more than seeds explain" in sentence
        assert "no more" not in sentence
        assert "paired t-test over 4 seeds" in sentence
        c = [make("c", seed + 10, 0.91 + 0.02 * seed) for seed in (1, 2, 3, 4)]
        sentence = compare(*groups_of(*a, *c), "test/acc")
        assert "no more than seeds explain" in sentence
        assert "Welch" in sentence

    def test_welchs_numbers(self, make):
        """Against the formula, written out: t = d / sqrt(s1^2/n1 + s2^2/n2), degrees of freedom by Satterthwaite."""
        from scipy.stats import t as student

        x, y = np.array([0.90, 0.91, 0.93]), np.array([0.94, 0.96])
        a = [make("a", i, v) for i, v in enumerate(x)]
        b = [make("b", i + 9, v) for i, v in enumerate(y)]
        u, v = x.var(ddof=1) / 3, y.var(ddof=1) / 2
        df = (u + v) ** 2 / (u**2 / 2 + v**2 / 1)
        p = 2 * student.sf((y.mean() - x.mean()) / math.sqrt(u + v), df)
        assert f"(p = {p:.2g}, Welch's t-test, n = 3 and 2)" in compare(*groups_of(*a, *b), "test/acc")

    @pytest.mark.parametrize(
        ("accs", "says"),
        [
            (([0.9], [0.8]), "whether seeds explain that cannot be said"),
            (([0.9, 0.8], [0.9, 0.8]), "have the same test/acc, 0.85"),
            (([0.9], [0.9]), "have the same test/acc, 0.9"),
            (([0.9, math.nan], [0.9, 0.8]), "a or b has no finite test/acc"),
            (([0.9, math.inf], [0.9, 0.8]), "a or b has no finite test/acc"),
            (([0.9, 0.9], [0.8, 0.8]), "there is nothing to test"),
        ],
    )
    def test_what_cannot_be_tested_is_said(self, make, accs, says):
        folders = [
            make(name, seed, acc) for name, values in zip("ab", accs, strict=True) for seed, acc in enumerate(values)
        ]
        assert says in compare(*groups_of(*folders), "test/acc")

    def test_less_loss_and_more_accuracy_is_better(self, make):
        groups = groups_of(make("a", acc=0.9), make("b", acc=0.8))
        assert compare(*groups, "test/acc").startswith("a has the better test/acc")
        assert compare(*groups, "test/loss").startswith("a has the better test/loss")
        lower = (
            "test/loss",
            "test/mse",
            "test/mae",
            "test/mse_on_train",
            "test/nll",
            "test/perplexity",
            "test/nelbo",
            "test/frechet",
        )
        assert all(map(groups[0].less_is_better, lower))
        higher = ("test/acc", "test/map_50", "test/dice", "test/iou", "test/miou", "test/exact")
        assert not any(map(groups[0].less_is_better, higher))
        groups[0].runs[0].monitor, groups[0].runs[0].mode = "val/distance", "min"
        assert groups[0].less_is_better("test/distance")  # as the experiment says of what it monitors

    @pytest.mark.parametrize(
        ("value", "half", "text"),
        [
            (0.98194, 0.00271, "0.9819 ± 0.0027"),
            (39.019, 0.209, "39.02 ± 0.21"),
            (17900.0, 24981.0, "18000 ± 25000"),
            (1.4445e-07, 2.1e-07, "(1.4 ± 2.1)e-07"),
            (0.5, 0.0, "0.5 ± 0"),
            (0.123456, math.nan, "0.1235"),
        ],
    )
    def test_numbers_are_cut_where_their_interval_ends(self, value, half, text):
        assert with_interval(value, half) == text

    def test_a_seed_that_was_run_twice_counts_once(self, make):
        groups = groups_of(make(seed=1, acc=0.5), make(seed=1, acc=0.7), make(seed=2, acc=0.9))
        assert len(groups) == 1
        assert groups[0].values("test/acc").tolist() == [0.7, 0.9]  # the newest of each
        assert groups[0].notes == ["mlp: 1 run(s) repeat a seed with the same settings; the newest counts"]

    def test_other_settings_are_another_group_named_by_what_differs(self, make):
        groups = groups_of(make(width=8), make(width=16), make("cnn"), make(seed=2, accelerator="cpu"))
        assert {g.name: len(g.runs) for g in groups} == {"cnn": 1, "mlp [width=16]": 1, "mlp [width=8]": 2}
        groups = groups_of(make(), make(seed=2, max_time="00:00:00:01"))  # a run that time cut short is another one
        assert len(groups) == 2

    def test_losses_of_other_kinds_do_not_compare(self, make, tmp_path, capsys):
        a, b = make("a", acc=0.9), make("b", acc=0.8)
        for folder, loss in ((a, "mse"), (b, "cross_entropy")):
            config = yaml.safe_load((folder / "config.yaml").read_text())
            config["model"]["init_args"]["loss"] = loss
            (folder / "config.yaml").write_text(yaml.safe_dump(config))
        assert "does not compare" in compare(*groups_of(a, b), "test/loss")
        assert compare(*groups_of(a, b), "test/acc").startswith("a has the better")
        assert main([str(tmp_path / "runs"), "--html", str(tmp_path / "c.html")]) == 0
        out = capsys.readouterr().out
        assert "0.9*" in out
        assert "0.1*" not in out

    def test_other_data_is_another_table(self, make, capsys):
        make("a"), make("b", data="ffffffffff", acc=0.95)
        assert main([str(find_runs_root(make)), "--html", str(find_runs_root(make) / "c.html")]) == 0
        assert capsys.readouterr().out.count("on files in data") == 2


def find_runs_root(make):
    """The folder that `make` writes into."""
    return make("z").parent.parent


class TestTable:
    def run(self, capsys, root, *argv) -> str:
        assert main([str(root), "--html", str(root / "compare.html"), *argv]) == 0
        return capsys.readouterr().out

    def test_one_row_an_experiment_the_best_marked(self, make, tmp_path, capsys):
        for seed, acc in ((1, 0.90), (2, 0.91), (3, 0.92)):
            make("mlp", seed, acc)
            make("cnn", seed, acc + 0.05, width=16)
        out = self.run(capsys, tmp_path / "runs")
        rows = [re.split(r"  +", line) for line in out.splitlines() if line.startswith(("cnn ", "mlp "))]
        assert rows[0][:3] == ["cnn", "3", "0.960 ± 0.025*"]
        assert rows[1] == ["mlp", "3", "0.910 ± 0.025", "0.090 ± 0.025", "800", "3.2"]
        assert "cnn has the better test/acc" in out

    def test_by_run(self, make, tmp_path, capsys):
        folder = make("mlp", 7, 0.9)
        make("mlp", 8, 0.8)
        out = self.run(capsys, tmp_path / "runs", "--by", "run")
        assert re.search(rf"mlp +7 +0\.9\* +0\.1\* +800 +3\.2 +{folder}", out)

    def test_broken_half_finished_foreign_and_empty_folders_are_listed(self, make, tmp_path, capsys):
        root = tmp_path / "runs"
        make("mlp", 1, 0.9)
        broken = {}

        def spoil(name, problem, **kwargs):
            broken[name] = make("mlp", 2, **kwargs), problem
            return broken[name][0]

        (spoil("receipt", "receipt.json is broken") / "receipt.json").write_text('{"metrics": ')
        (spoil("foreign receipt", "receipt.json is broken: it has no 'metrics'") / "receipt.json").write_text("{}")
        (spoil("list", "receipt.json is broken") / "receipt.json").write_text("[1]")
        (spoil("no metrics", "receipt.json has no metrics") / "receipt.json").write_text(json.dumps(
            {"metrics": {}, "parameters": 1, "seconds": {"fit": 1}, "data": {"source": "a", "fingerprint": "b"}}))  # fmt: skip
        (spoil("bytes", "receipt.json is broken") / "receipt.json").write_bytes(b"\xff\xfe\x00")
        (spoil("yaml", "config.yaml is broken") / "config.yaml").write_text("a: [")
        (spoil("text", "config.yaml is broken") / "config.yaml").write_text("hello")
        (spoil("loop", "cannot be read") / "config.yaml").write_text("a: &a {b: *a}\n")
        (spoil("infinite", "cannot be read") / "receipt.json").write_text(json.dumps(
            {"metrics": {"a": 1}, "parameters": math.inf, "seconds": {"fit": 1}, "data": {"source": "a", "fingerprint": "b"}}))  # fmt: skip
        (spoil("no config", "config.yaml is missing") / "config.yaml").unlink()
        spoil("half", "not finished: no receipt.json after 5 epoch(s)", receipt=False)
        (spoil("csv", "", receipt=True) / "metrics.csv").write_bytes(
            b"\x00\xff,,,\n1,2\n"
        )  # the run counts, without curves
        empty = root / "mlp" / "20261122-000000-s1-emptyyyy"
        empty.mkdir()
        broken["empty"] = empty, "empty"
        foreign = root / "holiday"
        foreign.mkdir()
        (foreign / "beach.jpg").write_bytes(b"")
        broken["foreign"] = foreign, "no run: it has none of"
        for other in ("wandb/run-1", "judges", "sweeps/mlp"):
            (root / other).mkdir(parents=True)

        out = self.run(capsys, root)
        for folder, problem in broken.values():
            if problem:
                (line,) = (line for line in out.splitlines() if line.strip().startswith(f"{folder}:"))
                assert problem in line
        assert re.search(r"^mlp +2 ", out, flags=re.M)
        assert not any(name in out for name in ("wandb", "judges", "sweeps"))

    def test_odd_values_stop_nothing(self, make, tmp_path, capsys):
        for i, (metric, value) in enumerate([("acc", math.nan), ("acc", 1e200), ("seconds", math.inf), ("acc", 0.5)]):
            folder = make("mlp", i)
            said = json.loads((folder / "receipt.json").read_text())
            (said["seconds"] if metric == "seconds" else said["metrics"])[
                "fit" if metric == "seconds" else "test/acc"
            ] = value
            (folder / "receipt.json").write_text(json.dumps(said))
        (folder / "metrics.csv").write_text(
            "step,epoch,metric,value\n-1,-1,val/acc,1\n5,0,val/acc,nan\n" + '"' + "x" * 200_000
        )
        config = (folder / "config.yaml").read_text()
        (folder / "config.yaml").write_text(config.replace("monitor: val/acc", "monitor: null"))
        for by in ("experiment", "run"):
            self.run(capsys, tmp_path / "runs", "--by", by)

    def test_nothing_to_compare(self, tmp_path, capsys):
        (tmp_path / "none").mkdir()
        assert "page" in self.run(capsys, tmp_path / "none")

    def test_no_such_folder_is_one_line(self, make, tmp_path, capsys):
        make("mnist_mlp")
        assert main([str(tmp_path / "runs" / "mnist_mpl")]) == 2
        err = capsys.readouterr().err
        assert "is not a folder of runs; did you mean 'mnist_mlp'?" in err
        assert err.count("\n") == 1

    @pytest.mark.parametrize("page", ["/proc/none/compare.html", ".", "", "/", "a" * 300])
    def test_a_page_that_cannot_be_written_is_one_line(self, make, tmp_path, capsys, page):
        make()
        assert main([str(tmp_path / "runs"), "--html", page]) == 2
        err = capsys.readouterr().err
        assert f"error: cannot write {page[:9]}" in err
        assert err.count("\n") == 1

    def test_real_runs(self, train, tmp_path, capsys):
        for seed in (1, 2):
            for experiment in ("descent_batch", "descent_momentum"):
                train(
                    f"--seed_everything={seed}",
                    "--trainer.max_epochs=2",
                    experiment=f"experiments/{experiment}.yaml",
                    tiny=(),
                )
        out = self.run(capsys, tmp_path / "runs")
        assert re.search(r"^descent_batch +2 +\d", out, flags=re.M)
        assert "has the better test/mse" in out


@pytest.fixture(scope="session")
def browser():
    """A real browser, without a window."""
    if not CHROMIUM:
        pytest.skip("there is no Chromium here: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def open_page(browser):
    """Open a page without a network; returns it and the seconds until its curves were drawn, asserting no console error."""
    said, contexts = [], []

    def call(path, scheme="light"):
        context = browser.new_context(offline=True, color_scheme=scheme, viewport={"width": 1300, "height": 900})
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: said.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: said.append(str(error)))
        began = time.perf_counter()
        page.goto(path.as_uri())
        page.wait_for_selector("html[data-ready=yes]", timeout=30_000)
        page.wait_for_function("document.querySelectorAll('.scatterlayer .trace').length > 0")
        return page, time.perf_counter() - began

    yield call
    for context in contexts:
        context.close()
    assert not said


def curves(page) -> int:
    """How many curves can be seen."""
    return page.locator(".scatterlayer .trace").count()


class TestPage:
    @pytest.mark.parametrize("runs", [10, 500])
    def test_it_opens_without_a_network_fast_and_small(self, make, tmp_path, open_page, runs):
        for i in range(runs):
            make(f"exp_{i % 10}", seed=i // 10, acc=0.9 + i / 10_000, rows=60, width=i % 10)
        path = tmp_path / "compare.html"
        assert main([str(tmp_path / "runs"), "--html", str(path)]) == 0
        assert path.stat().st_size < 20e6
        most = 12 if "PYTEST_XDIST_WORKER" in os.environ else 3  # seconds: on its own; other workers add to them
        for _ in range(3):  # what else the machine does can only add to the time
            page, seconds = open_page(path)
            if seconds < most:
                break
        assert seconds < most
        assert page.locator("#results tbody tr").count() == 10
        assert curves(page) == (2 * runs if runs == 10 else runs)  # of many, the training curves wait to be asked for

        page.locator("#results tbody tr").nth(3).locator("input").click()  # an experiment
        assert curves(page) == (18 if runs == 10 else 450)
        page.locator("#all").click()
        assert curves(page) in (0, 2 * runs, runs)

    def test_what_a_person_would_do_with_it(self, make, tmp_path, open_page):
        for seed in (1, 2, 3):
            make("mlp", seed, 0.90 + seed / 1000)
            make("cnn", seed, 0.95 + seed / 900, width=16)
        make("cnn", 4, receipt=False)
        path = tmp_path / "compare.html"
        assert main([str(tmp_path / "runs"), "--html", str(path)]) == 0
        page, _ = open_page(path)
        first = page.locator("#results tbody tr td:first-child")
        assert first.all_inner_texts() == ["cnn", "mlp"]
        page.locator("#results th", has_text="test/acc").click()  # sort
        assert first.all_inner_texts() == ["mlp", "cnn"]
        page.locator("#results th", has_text="test/acc").click()
        assert first.all_inner_texts() == ["cnn", "mlp"]
        assert page.locator("#results td.best").count() == 2
        assert "0.9522 ± 0.0028" in page.locator("#results").inner_text()

        assert curves(page) == 14  # 7 runs, the unfinished one with them, training and validation
        page.select_option("#by", "run")
        assert page.locator("#results tbody tr").count() == 7
        page.get_by_label("mlp s2").click()  # one run off: its two curves are gone
        assert curves(page) == 12
        names = page.evaluate("document.getElementById('plot').data.filter(t => t.visible).map(t => t.name)")
        assert not [name for name in names if name.startswith("mlp s2")]
        page.locator("#train").click()
        assert curves(page) == 6
        page.get_by_label("mlp s2").click()
        assert curves(page) == 7

        page.select_option("#metric", "acc")  # values can be read from the curves
        page.wait_for_function("document.getElementById('plot').layout.yaxis.title.text === 'acc'")
        page.locator("#plot").scroll_into_view_if_needed()
        point = page.evaluate("""() => { const p = document.getElementById('plot'), t = p.data.find(t => t.name === 'mlp s1, val');
            const box = p.querySelector('.nsewdrag').getBoundingClientRect(), l = p._fullLayout;
            return [box.x + l.xaxis.d2p(t.x[2]), box.y + l.yaxis.d2p(t.y[2])]; }""")  # fmt: skip
        page.mouse.move(*point)
        page.wait_for_selector(".hoverlayer .hovertext")
        assert "epoch 3: 0.90" in page.locator(".hoverlayer").text_content()

        assert "more than seeds explain" in page.locator("#verdict").inner_text()
        assert page.locator("#config tbody tr td:first-child").all_inner_texts() == ["model.init_args.width"]
        assert page.locator("#pictures img").count() == 2
        assert (
            page.locator("#pictures img").first.evaluate("image => image.decode().then(() => image.naturalWidth)")
            == 560
        )
        assert "not finished" in page.locator("#left_out").inner_text()
        link = page.locator("#pictures a").first.get_attribute("href")
        assert (path.parent / link).is_file()

    def test_it_can_be_read_in_light_and_dark(self, make, tmp_path, open_page):
        make()
        path = tmp_path / "compare.html"
        assert main([str(tmp_path / "runs"), "--html", str(path)]) == 0
        for scheme in ("light", "dark"):
            page, _ = open_page(path, scheme)
            ink, paper, plot = page.evaluate("""() => [getComputedStyle(document.body).color,
                getComputedStyle(document.body).backgroundColor, document.getElementById('plot').layout.paper_bgcolor]""")
            ink, paper = ([int(x) / 255 for x in re.findall(r"\d+", color)[:3]] for color in (ink, paper))
            plot = [int(plot[i : i + 2], 16) / 255 for i in (1, 3, 5)]
            assert (np.mean(paper) > 0.9) == (scheme == "light")
            for background in (paper, plot):
                lighter, darker = sorted((luminance(ink), luminance(background)), reverse=True)
                assert (lighter + 0.05) / (darker + 0.05) > 7  # WCAG AAA

    def test_names_stand_on_one_line_and_on_a_phone_leave_room_for_the_numbers(self, make, tmp_path, open_page):
        for i in range(3):
            make(f"curve_no_dropout_with_a_name_{i}", acc=0.9 + i / 100, **{f"a_setting_with_a_long_name_{i}": i})
        path = tmp_path / "compare.html"
        assert main([str(tmp_path / "runs"), "--html", str(path)]) == 0
        page, _ = open_page(path)
        for table in ("results", "config"):
            heights = page.evaluate(f"[...document.querySelectorAll('#{table} tbody tr')].map(row => row.offsetHeight)")
            assert max(heights) < 45
        page.set_viewport_size({"width": 420, "height": 800})
        name, box = (page.locator(f"#config {part}").first.bounding_box() for part in ("tbody td", "tbody"))
        assert name["width"] < 0.6 * 420 < box["width"]

    def test_names_are_text_not_markup(self, make, tmp_path, open_page):
        folder = make()
        config = yaml.safe_load((folder / "config.yaml").read_text())
        config["experiment"] = "</script><img src=x onerror=alert(1)>"
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        path = tmp_path / "compare.html"
        assert main([str(tmp_path / "runs"), "--html", str(path)]) == 0
        page, _ = open_page(path)
        assert page.locator("#results tbody td").first.inner_text() == config["experiment"]


def luminance(rgb: list[float]) -> float:
    """Relative luminance as the WCAG define it."""
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in rgb]
    return float(np.dot([0.2126, 0.7152, 0.0722], linear))


class TestPublish:
    def test_the_view_has_the_pages_panels(self, make):
        from comparison.publish import workspace

        panels = what_to_show([read_run(make())])
        assert panels == Panels(["test/loss", "test/acc"], ["loss", "acc"], ["curves"])
        sent = json.loads(workspace(panels, ["mlp"], "someone")._to_model().model_dump_json(by_alias=True))
        sections = {s["name"]: s["panels"] for s in sent["spec"]["section"]["panelBankConfig"]["sections"]}
        assert [p["config"]["metrics"] for p in sections["Results"]] == [["test/loss"], ["test/acc"]]
        assert [p["config"]["metrics"] for p in sections["Learning curves"]] == [
            ["train/loss", "val/loss"],
            ["train/acc", "val/acc"],
        ]
        assert [p["config"]["mediaKeys"] for p in sections["Pictures"]] == [["pictures/curves"]]
        assert '"mlp"' in json.dumps(sent["spec"]["section"]["runSets"])
        assert (sent["entity"], sent["project"]) == ("someone", "lightning-lectures")

    def test_with_an_account_it_is_sent_and_its_address_printed(self, make, tmp_path, monkeypatch, capsys):
        import wandb
        import wandb_workspaces.workspaces as ws

        sent = []

        def save(self):
            sent.append(self)
            self._internal_name = "nw-abc-v"
            return self

        monkeypatch.setenv("WANDB_MODE", "online")
        monkeypatch.setattr(wandb, "Api", lambda: type("Api", (), {"default_entity": "someone", "settings": {}})())
        monkeypatch.setattr(ws.Workspace, "save", save)
        monkeypatch.setattr(
            ws.Workspace, "url", property(lambda self: f"https://wandb.ai/{self.entity}/{self.project}")
        )
        make()
        assert main([str(tmp_path / "runs"), "--html", str(tmp_path / "c.html"), "--publish"]) == 0
        assert len(sent) == 1
        assert "view  https://wandb.ai/someone/lightning-lectures" in capsys.readouterr().out

    @pytest.mark.parametrize("mode", ["", "offline"])
    def test_without_an_account_it_says_what_it_needs(self, make, tmp_path, monkeypatch, capsys, mode):
        monkeypatch.setenv("NETRC", str(tmp_path / "none"))
        monkeypatch.setenv("WANDB_MODE", mode)
        make()
        assert main([str(tmp_path / "runs"), "--html", str(tmp_path / "c.html"), "--publish"]) == 2
        captured = capsys.readouterr()
        assert "needs an account" in captured.err
        assert f"wandb sync {tmp_path / 'runs' / 'wandb'}/offline-run-*" in captured.err
        assert captured.err.count("\n") == 1
        assert (tmp_path / "c.html").is_file()


def test_of_a_language_models_numbers_less_is_better_and_of_shares_more(make):
    (group,) = group_runs([read_run(make())])
    for name in ("loss", "perplexity", "bits", "mse_linear"):
        assert group.less_is_better(f"test/{name}"), name
    for name in ("acc", "exact", "skill", "acc_top5"):
        assert not group.less_is_better(f"test/{name}"), name
