"""report.html of runs built by hand: what it says, that nothing of a run is markup, and how a browser shows it."""

import html
import itertools
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
from made_run import MODELS, make_run

from bdlm_jax import compare
from bdlm_jax.report import __main__ as report
from bdlm_jax.report.drawings import Bar, Curve, draw_curves, draw_forest, nice_ticks
from bdlm_jax.report.finished_run import read_run
from bdlm_jax.report.item_map import NEIGHBOURS, item_map
from bdlm_jax.runtime.files import save_safetensors

EVIL = "</script><script>alert('x')</script> & <b>"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
HR = "hr@1/cand100"
VOID = {"meta", "link", "wbr", "path", "circle", "rect", "line"}


class Page(HTMLParser):
    """All elements with their attributes and the text in them; an element that is not closed is an error."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.open = [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append([tag, dict(attributes), ""])
        if tag not in VOID:
            self.open.append(self.elements[-1])

    def handle_startendtag(self, tag, attributes):
        self.elements.append([tag, dict(attributes), ""])

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        for element in self.open:
            element[2] += data

    def texts(self, tag):
        return [text for name, _, text in self.elements if name == tag]


def add_tables(folder, *, n=60, width=4, lm_width=6):
    """Item tables of both arms; the LM's last rows are the domain arm's, turned into the LM's width."""
    rng = np.random.default_rng(0)
    before, ids, after = (rng.normal(size=(n, width)) for _ in range(3))
    into = np.linalg.qr(rng.normal(size=(lm_width, width)))[0].T
    save_safetensors(folder / "lightgcn" / "best_domain.safetensors", {"shared": {"item": before}})
    save_safetensors(
        folder / "ids_lm" / "best_lm.safetensors", {"shared": {"item": ids}, "lm": {"bridge": {"into": into}}}
    )
    save_safetensors(folder / "refresh" / "best_domain.safetensors", {"shared": {"item": after}})
    save_safetensors(folder / "refresh" / "view.safetensors", {"rows_item": 3 * after @ into + 1})
    save_safetensors(folder / "serving" / "domain.safetensors", {"degree": np.arange(n)})
    titles = [EVIL, *(f"item {i}" for i in range(1, n))]
    (folder / "serving" / "catalogue.json").write_text(json.dumps({"titles": titles}))


def page_of(folder):
    report.write_report(folder)
    return (folder / "report.html").read_text(encoding="utf-8")


def head_of(text):
    page = Page(text)
    return dict(zip(page.texts("dt"), page.texts("dd")))


def test_the_head_says_in_five_lines_what_the_counts_say(tmp_path):
    head = head_of(page_of(make_run(tmp_path / "better", wins=40, select=HR)))
    assert list(head) == ["Compared", "Won", "By how much", "On what", "How sure"]
    assert head["Compared"].startswith("4 models by hr@1/cand100: ")
    assert "bdlm_domain (0.400), before bdlm_lm (0.400)" in head["Won"] and "at random has 0.010" in head["Won"]
    assert "100.0% above lightgcn" in head["By how much"]  # 40 users against 20
    assert "twins: 100 users, 120 items, 1,234 interactions" in head["On what"]
    assert head["On what"].endswith("100 held-out items, each among 99 others.")
    refit = make_run(tmp_path / "refit", wins=40, select=HR, **{"data.refit": "validation"})
    assert head_of(page_of(refit))["On what"].endswith(
        "others. Every model was trained once more, with the validation part, as long as that chose."
    )
    assert head["How sure"].startswith("One seed (0), one run: no claim, for another training may differ; over 100 ")
    worse = head_of(page_of(make_run(tmp_path / "worse", wins=10, select=HR)))
    assert worse["Won"].startswith("lightgcn (0.200)") or worse["Won"].startswith("text_lm (0.200)")
    assert "50.0% below" in worse["By how much"]
    alike = head_of(page_of(make_run(tmp_path / "alike", wins=21, select=HR)))
    assert "not told apart from" in alike["By how much"]
    nobody = dict.fromkeys(MODELS, (0, 0))
    chance = head_of(page_of(make_run(tmp_path / "chance", wins=0, select=HR, models=nobody)))
    assert chance["Won"].startswith("No model: ")
    assert chance["By how much"] == "No arm was held against a model that is better than chance."


def test_the_page_is_whole_by_itself_and_a_screen_reader_finds_its_way(tmp_path):
    folder = make_run(tmp_path / "run")
    add_tables(folder)
    page = Page(page_of(folder))
    for tag, attributes, _ in page.elements:
        outside = [attributes.get(name, "") for name in ("src", "href", "data", "srcset", "action")]
        assert all(at.startswith(("#", "data:")) for at in outside if at), (tag, outside)
        assert not any(name.startswith("on") for name in attributes)
    styles = "".join(page.texts("style"))
    assert "url(" not in styles and "@import" not in styles and "prefers-color-scheme" in styles
    assert not re.search(r"fetch\(|XMLHttpRequest|import\(", "".join(page.texts("script")))
    tags = [tag for tag, _, _ in page.elements]
    assert tags.count("caption") == tags.count("table") > 5
    assert tags.count("h1") == tags.count("main") == 1
    assert page.elements[0][:2] == ["html", {"lang": "en"}]
    levels = [int(tag[1]) for tag in tags if re.fullmatch(r"h\d", tag)]
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    scopes = [attributes.get("scope") for tag, attributes, _ in page.elements if tag == "th"]
    assert set(scopes) == {"row", "col"}
    pictures = [attributes for tag, attributes, _ in page.elements if tag == "svg"]
    assert all(a.get("aria-label") or "aria-hidden" in a or a["class"] == "bar" for a in pictures)
    links = {attributes["href"][1:] for tag, attributes, _ in page.elements if tag == "a"}
    assert links <= {attributes.get("id") for _, attributes, _ in page.elements} and "provenance" in links


def test_no_word_of_a_run_is_markup(tmp_path):
    folder = make_run(tmp_path / "run")
    add_tables(folder)
    for name, key in (("config", "name"), ("environment", "git")):
        content = json.loads((folder / f"{name}.json").read_text())
        (folder / f"{name}.json").write_text(json.dumps(content | {key: EVIL}))
    results = json.loads((folder / "results.json").read_text())
    for row in results["rows"]:
        row["model"] = EVIL if row["model"] == "text_lm" else row["model"]
    results["data"]["name"] = EVIL
    (folder / "results.json").write_text(json.dumps(results))
    text = page_of(folder)
    assert "alert" in text and "<b>" not in text
    page = Page(text)
    assert page.texts("title") == [f"Results: {EVIL}, seed 0"]
    data, program = page.texts("script")
    assert EVIL in json.loads(data)["titles"] and "alert" not in program


def test_provenance_names_what_a_reader_needs_to_run_it_again(tmp_path):
    foot = page_of(make_run(tmp_path / "run", **{"mutual.align": "cosine"})).split("<footer>")[1].replace("<wbr>", "")
    rows = re.findall(r'<tr><th scope="row">(.*?)</th>(.*?)</tr>', foot)
    found = {name: re.findall("<td.*?>(.*?)</td>", cells) for name, cells in rows}
    assert found["data"] == ["5a" * 32] and found["candidates test/cand100"] == ["c1" * 32]
    assert found["mutual.align"] == ["cosine", "mse"] and found["mutual.rounds"] == ["1", "3"]
    assert found.keys().isdisjoint({"domain.epochs", "seed"})  # as in the defaults
    assert found["git"] == ["abc"] and found["jax"] == ["1.2.3"]
    assert "Seeds: 0." in foot


def test_groups_become_sections_with_a_head_each(tmp_path):
    runs = [make_run(tmp_path / f"{n}", seed=n, wins=w) for n, w in enumerate((30, 32))]
    runs.append(make_run(tmp_path / "other", **{"mutual.align": "cosine"}))
    out = tmp_path / "all.html"
    (tmp_path / "head.md").write_text("What it says,\nin *plain* words & few.\n")
    more = ["--title", "All", "--head", str(tmp_path / "head.md"), "--html", str(out)]
    assert report.main(["--collect", *map(str, runs), "--out", str(tmp_path / "all.md"), *more]) == 0
    page = Page(out.read_text(encoding="utf-8"))
    assert page.texts("p")[0] == "What it says, in plain words & few."
    assert page.texts("h2") == ["twins", "twins with mutual.align = cosine", "Provenance"]
    links = [a["href"] for tag, a, text in page.elements if tag == "a" and text.startswith("twins")]
    assert links == ["#twins", "#twins-with-mutual-align-cosine"] * 2  # beside the title, and in the first table
    assert [text for text in page.texts("th") if text.startswith("twins: bdlm_lm against")] == [
        "twins: bdlm_lm against lightgcn"
    ]
    sure = page.texts("dd")[4::5]
    assert sure[0].startswith("2 seeds (0, 1); ") and sure[1].startswith("One seed (0), one run: no claim")
    curves = [text for tag, a, text in page.elements if tag == "path" and a["class"] == "curve lm"]
    assert len(curves) == 2 + 1  # a line for each seed


def test_a_comparison_has_its_page(tmp_path):
    runs = [make_run(tmp_path / str(seed), seed=seed) for seed in (0, 1)]
    out = tmp_path / "compared.html"
    assert compare.main([*map(str, runs), "--metric", HR, "--html", str(out)]) == 0
    page = Page(out.read_text(encoding="utf-8"))
    assert page.texts("h1") == ["Comparison"] and "50.0% above lightgcn" in page.texts("dd")[2]


def test_the_map_turns_tables_onto_each_other_and_counts_common_neighbours(tmp_path):
    folder = make_run(tmp_path / "run")
    assert item_map(read_run(folder)) is None
    assert "there is no map of the items" in page_of(folder)
    add_tables(folder)
    made = item_map(read_run(folder))
    assert set(made.points) == {f"{arm} arm {time}" for arm in ("domain", "LM") for time in ("before", "after")}
    # The LM's last rows are a rotation of the domain arm's, scaled and moved: on the plane they are the same.
    np.testing.assert_allclose(made.points["LM arm after"], made.points["domain arm after"], atol=1e-9)
    assert made.agreement["after"] == NEIGHBOURS > made.agreement["before"] + 5
    assert made.titles[0] == "item 59" and made.popularity_S[0] == 59  # the most popular first
    (folder / "ids_lm" / "best_lm.safetensors").unlink()
    assert "LM arm before" not in item_map(read_run(folder)).points
    shutil.copytree(folder / "refresh", folder / "refit" / "refresh")  # with data.refit the tested tables lie there
    assert set(item_map(read_run(folder)).points) == {"domain arm after", "LM arm after"}


def test_ticks_are_round_and_cover_what_they_should():
    assert nice_ticks(0.21, 0.46) == [0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5]
    assert nice_ticks(-0.3, 1.1, 5) == [-0.5, 0, 0.5, 1, 1.5]
    assert nice_ticks(0.2, 0.2)[0] <= 0.2 <= nice_ticks(0.2, 0.2)[-1]


def test_pictures_put_values_where_they_belong():
    picture = draw_curves("said", [Curve("lm", [0.0, 1.0], 1)], ["a", "b"], {"domain": 0.5}, [0.0, 0.5, 1.0])
    (ring,) = re.findall(r'class="ring lm" cx="([\d.]+)" cy="([\d.]+)"', picture)
    assert f"L{ring[0]} {ring[1]}" in picture  # the last point of the curve
    grid = re.findall(r'class="grid" d="M46 ([\d.]+)H', picture)
    assert re.findall(r'class="level domain" d="M46 ([\d.]+)H', picture) == [grid[1]]
    forest = draw_forest([Bar("<a>", "lm", 0.5, 0.0, 1.0, ("+50%", "", ""))], "said")
    (line,) = re.findall(r'<line class="lm" x1="([\d.]+)%" x2="([\d.]+)%"', forest)
    (middle,) = re.findall(r'cx="([\d.]+)%"', forest)
    assert float(middle) == (float(line[0]) + float(line[1])) / 2
    assert "&lt;a&gt;" in forest


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """What a browser says of the page at two widths: {width: facts}."""
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine")
    folder = tmp_path_factory.mktemp("shown")
    names = {f"{'very_' * 9}long_name_{n}": (25, 0) for n in range(3)}
    run = make_run(folder / "run", models=MODELS | names, **{"mutual.rounds": 9})
    add_tables(run)
    text = page_of(run)
    frames = "".join(f'<iframe width="{w}" height="900" srcdoc="{html.escape(text)}"></iframe>' for w in (1280, 390))
    program = """
      const ask = (frame) => {
        const page = frame.contentDocument, [table] = page.querySelectorAll("table.sorts");
        const names = () => [...table.tBodies[0].rows].map((row) => row.cells[0].textContent);
        const press = (n) => { const head = table.tHead.rows[0].cells[n]; head.querySelector("button").click();
          return [head.getAttribute("aria-sort"), names()]; };
        const map = page.querySelector("svg.map"), box = map.getBoundingClientRect();
        const point = JSON.parse(page.querySelector(".itemmap script").textContent).points[0], scale = box.width / 300;
        const at = { clientX: box.left + point[0] * scale, clientY: box.top + point[1] * scale };
        map.dispatchEvent(new PointerEvent("pointermove", at));
        const out = [...page.querySelectorAll("body *")].filter((each) => !each.closest(".scroll, svg, caption") &&
          each.getBoundingClientRect().right > page.documentElement.clientWidth + 1);
        const marks = [...page.querySelectorAll("svg.curves text")].map((each) => each.getBoundingClientRect());
        const hides = (box) => box.scrollWidth > box.clientWidth + 1;
        return { wide: page.scrollingElement.scrollWidth, room: page.documentElement.clientWidth, start: names(),
          name: press(0), down: press(1), up: press(1), named: page.querySelector(".named").textContent,
          hidden: [...page.querySelectorAll(".scroll")].filter(hides).map((box) => box.ariaLabel),
          out: out.map((each) => each.outerHTML.slice(0, 80)), buttons: page.querySelectorAll("th button").length,
          touching: marks.flatMap((a, i) => marks.slice(i + 1).filter((b) => a.left < b.right && b.left < a.right &&
            a.top < b.bottom - 2 && b.top < a.bottom - 2)).length };
      };
      addEventListener("load", () => {
        document.body.textContent = JSON.stringify([...document.querySelectorAll("iframe")].map(ask)); });
    """
    (folder / "frames.html").write_text(f"<!doctype html><script>{program}</script><body>{frames}</body>")
    flags = (
        "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
        "--disable-component-update", "--disable-sync", "--window-size=1400,900", f"--user-data-dir={folder / 'user'}",
    )  # fmt: skip
    command = [CHROMIUM, *flags, "--dump-dom", (folder / "frames.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    facts = json.loads(html.unescape(re.search(r"<body>(.*?)</body>", done.stdout, re.S)[1]))
    return dict(zip((1280, 390), facts))


@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_shows_it_without_scrolling_sideways(shown, width):
    assert shown[width]["room"] > width - 30  # but for a scroll bar
    assert shown[width]["wide"] <= shown[width]["room"]
    assert shown[width]["out"] == []
    assert shown[width]["touching"] == 0


def test_at_the_width_of_a_desk_no_table_hides_its_last_columns(shown):
    assert shown[1280]["hidden"] == []


def test_in_a_browser_tables_sort_and_the_map_names_items(shown):
    facts = shown[1280]
    assert facts["buttons"] > 10
    (order, names), (down, falling), (up, rising) = facts["name"], facts["down"], facts["up"]
    assert order == "ascending" and names == sorted(facts["start"])
    assert down == "descending" and falling[0] in ("bdlm_domain", "bdlm_lm")
    assert up == "ascending" and rising[-1] in ("bdlm_domain", "bdlm_lm") and len(rising) == 7
    assert facts["named"] == "item 59"
