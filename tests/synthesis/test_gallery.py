# SPDX-License-Identifier: Apache-2.0
"""`k3jax gallery`: a page that opens from disk, in a real headless Chromium."""

import pytest
from PIL import Image

from data_sets import write_jsonl


DASH = "\u2013"
ROWS = [
    {"id": "a/b", "prompt": "a corgi in a house made of sushi", "width": 128, "height": 64},
    {"id": "html", "prompt": "</script><script>window.hacked=1</script><img src=x onerror=hack()>"},
    {"id": "<b>\"'&", "prompt": 'a "quoted" & <b>bold</b> {{data}} prompt\nof two lines'},
    {"id": "кот", "prompt": "рыжий кот на крыше", "negative_prompt": "скучный"},
    {"id": "wide", "prompt": "a very wide picture", "width": 256, "height": 64},
    {"id": "bad", "prompt": "this one is nan"},
    *({"id": f"n{k:03d}", "prompt": f"landscape number {k} at dusk"} for k in range(140)),
]


@pytest.fixture
def page(tmp_path, made, stubs, browser):
    """Makes a data set of ROWS and opens its gallery."""

    def make(kind="webdataset", rows=ROWS):
        prompts = write_jsonl(tmp_path / "prompts.jsonl", rows)
        out = tmp_path / "my pictures"
        words = ["--size", "64x64", "--samples-per-shard", "50", "--format", kind]
        made("synthesize", prompts, out, *words, "--seed", "3")
        assert made("gallery", out)[0] == [f"{out}/gallery.html"]
        browser.get((out / "gallery.html").as_uri())
        return out

    return make


def find(browser, selector):
    from selenium.webdriver.common.by import By

    return browser.find_elements(By.CSS_SELECTOR, selector)


def texts(browser, selector):
    return [element.text for element in find(browser, selector)]


def loaded(browser):
    """How many thumbnails show pixels, waited for."""
    from selenium.webdriver.support.ui import WebDriverWait

    script = """const all = [...document.querySelectorAll('main img')];
    return all.every(i => i.complete && i.src) && all.filter(i => i.naturalWidth > 0).length"""
    return WebDriverWait(browser, 30).until(lambda b: b.execute_script(script))


def no_errors(browser):
    """Nothing in the console, and nothing asked of any network."""
    assert [line for line in browser.get_log("browser") if line["level"] == "SEVERE"] == []
    script = "return performance.getEntriesByType('resource').map(e => e.name)"
    names = browser.execute_script(script)
    assert all(name.startswith(("data:", "file:")) for name in names)


def test_the_page(page, browser):
    page()
    assert browser.title == "my pictures" and texts(browser, "h1") == ["my pictures"]
    assert (
        "146 images" in texts(browser, "#facts")[0] and "run seed 3" in texts(browser, "#facts")[0]
    )
    assert len(find(browser, ".card")) == 60 and texts(browser, "#count") == [f"1{DASH}60 of 146"]
    assert loaded(browser) == 59
    card = texts(browser, ".card")[0]
    assert "a corgi in a house made of sushi" in card and "a/b" in card and "seed " in card
    assert "are not finite" in texts(browser, ".failed .frame")[0]
    assert [t for t in texts(browser, "nav button") if t.isdigit()] == ["1", "2", "3"]
    find(browser, "nav button")[-1].click()
    assert texts(browser, "#count") == [f"61{DASH}120 of 146"]
    assert loaded(browser) == 60
    no_errors(browser)


def test_html_in_prompts_is_text(page, browser):
    page()
    assert browser.execute_script("return window.hacked") is None
    assert len(find(browser, "main script")) == len(find(browser, "main b")) == 0
    shown = browser.execute_script(
        "return [...document.querySelectorAll('.prompt')].slice(1, 3).map(e => e.textContent)"
    )
    assert shown == [ROWS[1]["prompt"], ROWS[2]["prompt"]]
    find(browser, ".card")[1].click()
    assert texts(browser, "#full") == [ROWS[1]["prompt"]]
    assert len(find(browser, "dialog img[onerror]")) == 0
    no_errors(browser)


def test_search(page, browser):
    from selenium.webdriver.common.keys import Keys

    page()
    (box,) = find(browser, "#search")
    box.send_keys("DUSK 13")
    assert texts(browser, "#count") == [f"1{DASH}12 of 12"]  # 13, 113 and 130 to 139
    box.clear()
    box.send_keys("рыжий")
    assert texts(browser, ".prompt") == ["рыжий кот на крыше"]
    (seed,) = texts(browser, ".seed")
    box.clear()
    box.send_keys(seed.removeprefix("seed "))
    assert texts(browser, ".prompt") == ["рыжий кот на крыше"]
    box.clear()
    box.send_keys("nothing like it")
    assert texts(browser, ".empty") == ["Nothing matches."]
    box.clear()
    box.send_keys("x", Keys.BACKSPACE)
    find(browser, "#failed")[0].click()
    assert texts(browser, "#count") == [f"1{DASH}1 of 1"]
    no_errors(browser)


def test_an_image_in_large(page, browser):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    out = page()
    find(browser, ".card")[2].click()
    values = dict(zip(texts(browser, "dt"), texts(browser, "dd"), strict=True))
    assert values["id"] == "<b>\"'&" and values["size"] == "64 \u00d7 64"
    assert values["shard"] == "data/000000.tar" and values["seed"].isdigit()
    assert texts(browser, "#command") == [f"""k3jax regenerate '{out}' '<b>"'\\''&'"""]
    ActionChains(browser).send_keys(Keys.ARROW_RIGHT).perform()
    assert texts(browser, "#full") == ["рыжий кот на крыше"] and "скучный" in texts(browser, "dd")
    ActionChains(browser).send_keys(Keys.ESCAPE).perform()
    assert not find(browser, "dialog[open]")
    no_errors(browser)


def test_files_are_shown_as_they_are(page, browser):
    """A data set of files: the large image is the file itself."""
    from selenium.webdriver.support.ui import WebDriverWait

    page("files")
    find(browser, ".card")[0].click()
    size = "const i = document.querySelector('#large img'); return i && i.src + i.naturalWidth"
    WebDriverWait(browser, 10).until(lambda b: b.execute_script(size).endswith("a%252Fb.jpg128"))
    no_errors(browser)


def test_a_large_set(page, browser, made, monkeypatch):
    """Thumbnails in scripts beside the page, loaded as they are shown."""
    monkeypatch.setattr("k3jax.synthesis.gallery.INLINE_IMAGES", 100)
    out = page("parquet")
    assert sorted(p.name for p in (out / "gallery").iterdir()) == ["0.js", "1.js", "2.js"]
    assert loaded(browser) == 59
    find(browser, "#search")[0].send_keys("number 139")
    assert loaded(browser) == 1
    no_errors(browser)
    made("gallery", out, "--max-images", "50")  # every third
    assert not (out / "gallery").exists()
    browser.get((out / "gallery.html").as_uri())
    assert texts(browser, "#count") == [f"1{DASH}49 of 49"] and loaded(browser) == 49
    assert "49 of 146 images" in texts(browser, "#facts")[0]


def test_it_can_be_looked_at(page, browser, tmp_path):
    """A screenshot has pictures in it, on a screen and on a telephone."""
    page()
    loaded(browser)
    for width in (1280, 400):
        browser.set_window_size(width, 1000)
        browser.save_screenshot(str(tmp_path / f"{width}.png"))
        with Image.open(tmp_path / f"{width}.png") as image:
            colours = image.convert("RGB").resize((64, 64)).getcolors(4096)
        assert len(colours) > 500
    browser.set_window_size(1280, 1000)


def test_refusals(tmp_path, made, refuses, stubs):
    (tmp_path / "p.txt").write_text("a\n")
    out = tmp_path / "out"
    made("synthesize", tmp_path / "p.txt", out, "--size", "64x64")
    assert "--max-images is 0" in refuses("gallery", out, "--max-images", "0")
    (out / "data" / "000000.tar").write_bytes(b"")
    assert "`k3jax verify --repair` mends it" in refuses("gallery", out)
    (out / "metadata" / "000000.parquet").unlink()
    assert "has no finished shard yet" in refuses("gallery", out)
    assert "is not a data set of k3jax" in refuses("gallery", tmp_path)


def test_another_folder(tmp_path, made, stubs):
    """The page is there, the data set is as before, and no address leads to its files."""
    prompts = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": "a"}])
    out, page = tmp_path / "out", tmp_path / "pages" / "gallery.html"
    made("synthesize", prompts, out, "--size", "64x64", "--format", "files")
    (page.parent / "gallery").mkdir(parents=True)
    assert made("gallery", out, "--output", page.parent)[0] == [str(page)]
    assert not (out / "gallery.html").exists() and (page.parent / "gallery").is_dir()
    text = page.read_text()
    assert "data:image/webp" in text and ".jpg" not in text


def test_a_damaged_image_is_named(tmp_path, made, refuses, stubs):
    prompts = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": "a"}])
    words = ["--size", "64x64", "--format", "files", "--image-format", "png"]
    made("synthesize", prompts, tmp_path / "out", *words)
    (image,) = (tmp_path / "out" / "data").rglob("*.png")
    image.write_bytes(image.read_bytes()[:100])
    message = refuses("gallery", tmp_path / "out")
    assert f"image {image.stem} cannot be decoded: `k3jax verify --repair` makes it" in message
