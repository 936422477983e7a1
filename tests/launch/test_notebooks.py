# SPDX-License-Identifier: Apache-2.0
"""The notebooks, run from top to bottom, with the small model instead of Kandinsky 3's weights, a
temporary folder instead of Drive, few steps, and simulated devices instead of chips.

A cell with these values is inserted after the cell of parameters, as papermill does; all cells run.
"""

import ast
import base64
import io
import json
import os
import re
import sys
import sysconfig
import time
import tomllib
from pathlib import Path
from types import ModuleType, SimpleNamespace

import jax
import nbformat
import numpy as np
import pytest
from IPython.core.inputtransformer2 import TransformerManager
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from PIL import Image

from k3jax.cli.main import COMMANDS
from k3jax.convert.to_torch import export

from manifests import ROOT


NOTEBOOKS = sorted((ROOT / "launch").glob("*.ipynb"))
SIZE = 128  # of the small model's images

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)


def read(path: Path):
    return nbformat.read(path, as_version=nbformat.NO_CONVERT)


def code_cells(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def parameters(notebook) -> dict[str, object]:
    """Name -> value, as the notebook has them."""
    (cell,) = (c for c in notebook.cells if "parameters" in c.metadata.get("tags", []))
    assignments = ast.parse(cell.source).body
    return {a.targets[0].id: ast.literal_eval(a.value) for a in assignments}


def test_there_are_notebooks():
    names = [path.name for path in NOTEBOOKS]
    assert names == ["colab_gpu.ipynb", "colab_tpu.ipynb", "kaggle_tpu.ipynb"]


@each_notebook
def test_form(path):
    notebook = read(path)
    nbformat.validate(notebook)
    assert notebook.nbformat == 4 and notebook.cells[0].cell_type == "markdown"
    cells = code_cells(notebook)
    assert cells[0].metadata["tags"] == ["parameters"] and parameters(notebook)
    for cell in cells:
        assert cell.outputs == [] and cell.execution_count is None
    source = re.sub(r"^#.*", "", "\n".join(cell.source for cell in cells), flags=re.M)
    commands = set(re.findall(r"k3jax ([a-z0-9]+) ", source))
    assert commands >= {"convert", "generate", "synthesize", "verify", "gallery"}
    assert commands <= set(COMMANDS)


@each_notebook
def test_extras(path):
    """They exist in pyproject.toml, and install everything that the notebook uses."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = set(parameters(read(path))["EXTRAS"].split(","))
    assert {"convert", "synth", "gcs"} < named <= set(project["optional-dependencies"])


@pytest.fixture
def install(monkeypatch, tmp_path):
    """(path of a notebook, INSTALL or None for its own) -> the commands of its cell `install`."""

    def call(path, place=None):
        values = parameters(read(path))
        cell = {cell.id: cell for cell in code_cells(read(path))}["install"]
        commands = []
        shell = SimpleNamespace(run_line_magic=lambda name, line: commands.append((name, line)))
        names = values | {"get_ipython": lambda: shell, "EXTRAS": "tpu,synth"}
        names["INSTALL"] = values["INSTALL"] if place is None else place
        # IPython fills {NAME} in the line of a magic with the variable's value.
        source = TransformerManager().transform_cell(cell.source)
        exec(compile(source, cell.id, "exec"), names)
        return [(name, line.format(**names)) for name, line in commands]

    monkeypatch.chdir(tmp_path)
    return call


@each_notebook
@pytest.mark.parametrize(
    "place, requirement",
    [
        ("k3jax-*.whl", "k3jax-0.2.0-py3-none-any.whl[tpu,synth]"),
        ("**/k3jax-0.1*.whl", "k3jax-0.1.0-py3-none-any.whl[tpu,synth]"),
        ("checkout", "checkout[tpu,synth]"),
        ("git+https://host/owner/k3jax", "k3jax[tpu,synth] @ git+https://host/owner/k3jax"),
    ],
)
def test_install(install, path, place, requirement):
    Path("checkout").mkdir()
    for version in ("0.1.0", "0.2.0"):
        Path(f"k3jax-{version}-py3-none-any.whl").touch()
    assert install(path, place) == [("pip", f'install --quiet "{requirement}"')]


@each_notebook
def test_install_without_a_wheel(install, path):
    assert parameters(read(path))["INSTALL"].endswith("k3jax-*.whl")
    with pytest.raises(FileNotFoundError, match=r"INSTALL = .*k3jax-\*.whl"):
        install(path)
    assert install(path, "") == []


@pytest.mark.parametrize("name", ["colab_gpu.ipynb", "colab_tpu.ipynb"])
@pytest.mark.parametrize(
    "out, called",
    [
        ("/content/drive/MyDrive/k3jax", ["mount /content/drive", "flush_and_unmount"]),
        ("gs://my-bucket/k3jax", ["authenticate_user"]),
        ("/content/pictures", []),
    ],
)
def test_a_place_that_lasts(name, out, called, monkeypatch):
    """The cells that speak to Colab, over a stand-in of its module, which no package brings."""
    calls = []
    drive, auth = ModuleType("google.colab.drive"), ModuleType("google.colab.auth")
    drive.mount = lambda mountpoint: calls.append(f"mount {mountpoint}")
    drive.flush_and_unmount = lambda: calls.append("flush_and_unmount")
    auth.authenticate_user = lambda: calls.append("authenticate_user")
    colab = ModuleType("google.colab")
    colab.drive, colab.auth = drive, auth
    monkeypatch.setitem(sys.modules, "google.colab", colab)
    monkeypatch.setitem(sys.modules, "google", ModuleType("google"))
    for variable in ("JAX_COMPILATION_CACHE_DIR", "XLA_PYTHON_CLIENT_MEM_FRACTION"):
        monkeypatch.setenv(variable, "before")
    cells = {cell.id: cell for cell in code_cells(read(ROOT / "launch" / name))}
    names = {"OUT": out, "CACHE": ""}
    for cell in ("storage", "flush"):
        exec(compile(cells[cell].source, cell, "exec"), names)
    assert calls == called
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == f"{out}/xla"


class ThisPython(AsyncKernelManager):
    """The kernel of this interpreter, whatever kernels are registered on the machine."""

    @property
    def kernel_spec(self):
        words = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        return KernelSpec(argv=words, display_name="Python 3", language="python")


@pytest.fixture
def execute(tmp_path):
    """(name of a notebook, devices, parameters) -> its cells with their outputs, by id."""

    def call(name, devices, environment=(), **given):
        notebook = read(ROOT / "launch" / name)
        usual = {
            "INSTALL": "",
            "PICTURES": str(tmp_path / "pictures of one run"),
            "OUT": str(tmp_path / "drive"),
            "CACHE": jax.config.jax_compilation_cache_dir,
            "SIZE": SIZE,
            "STEPS": 2,
        }
        own = parameters(notebook)
        given = usual | given
        assert given.keys() <= own.keys()
        source = "\n".join(f"{name} = {value!r}" for name, value in given.items())
        notebook.cells.insert(
            notebook.cells.index(code_cells(notebook)[0]) + 1,
            nbformat.v4.new_code_cell(source, id="injected-parameters"),
        )
        client = NotebookClient(
            notebook,
            kernel_manager_class=ThisPython,
            timeout=900,
            resources={"metadata": {"path": str(tmp_path)}},
        )
        variables = {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} "
            f"--xla_force_host_platform_device_count={devices}",
            "PATH": os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]]),
            "XDG_CACHE_HOME": str(tmp_path / "cache"),
            "IPYTHONDIR": str(tmp_path / "ipython"),
            **dict(environment),
        }
        # With pytest's variable, kernels do not show what programs print.
        inherited = {k: v for k, v in os.environ.items() if k != "PYTEST_CURRENT_TEST"}
        client.execute(env=inherited | variables)
        nbformat.validate(notebook)
        cells = {cell.id: cell for cell in code_cells(notebook)}
        for cell in cells.values():
            assert "k3jax: error" not in text(cell) and "Traceback" not in text(cell), text(cell)
            assert cell.execution_count is not None
        return own | given, cells

    return call


def text(cell) -> str:
    return "".join(o.text for o in cell.outputs if o.output_type == "stream")


def shown(cell, kind: str) -> list[str]:
    return [o.data[kind] for o in cell.outputs if kind in o.get("data", {})]


def pictures(cell) -> list[np.ndarray]:
    """The pictures that a reader sees under a cell."""
    found = [Image.open(io.BytesIO(base64.b64decode(png))) for png in shown(cell, "image/png")]
    return [np.asarray(picture.convert("RGB")) for picture in found]


def check_pictures(cell, count: int) -> list[np.ndarray]:
    found = pictures(cell)
    assert [picture.shape for picture in found] == [(SIZE, SIZE, 3)] * count
    assert len({picture.tobytes() for picture in found}) == count
    assert all(picture.std() > 2 for picture in found)
    return found


def check_repainted(cell, scene: np.ndarray) -> None:
    before, after = check_pictures(cell, 2)
    np.testing.assert_array_equal(before, scene)
    known = SIZE // 2 - 8  # up to the feather
    np.testing.assert_array_equal(after[:, :known], before[:, :known])
    assert (after[:, SIZE // 2 :] != before[:, SIZE // 2 :]).any()


@pytest.fixture
def check_data_set(browser, tmp_path):
    """(cells, parameters, number of images): all there, and all seen in the gallery."""

    def check(cells, given, images):
        assert f"{images} images, 0 failed samples, of {images}" in text(cells["verify"])
        assert "All checksums and images are as they should be." in text(cells["verify"])
        (output,) = shown(cells["gallery"], "text/html")
        page = tmp_path / "output.html"
        page.write_text(f"<!doctype html><meta charset=utf-8>{output}", encoding="utf-8")
        browser.get(page.as_uri())
        browser.switch_to.frame(browser.find_element("css selector", "iframe"))
        script = "return [...document.querySelectorAll('main img')].map(i => i.naturalWidth)"
        waiting = time.monotonic() + 60
        while (widths := browser.execute_script(script)) != [SIZE] * images:
            assert time.monotonic() < waiting, widths
            time.sleep(0.2)
        prompts = browser.execute_script(
            "return [...document.querySelectorAll('.prompt')].map(e => e.textContent)"
        )
        each = images // len(given["PROMPTS"])
        assert sorted(prompts) == sorted(each * given["PROMPTS"])

    return check


@pytest.mark.slow
def test_colab_tpu(execute, check_data_set, tmp_path):
    """With what the hub's client finds offline: the small model, in the files of diffusers."""
    repository = tmp_path / "hf" / "hub" / "models--kandinsky-community--kandinsky-3"
    export("tiny", repository / "snapshots" / ("0" * 40), progress=False)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)

    given, cells = execute(
        "colab_tpu.ipynb",
        1,
        {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"},
        WEIGHTS=str(tmp_path / "weights"),
        IMAGES_PER_PROMPT=2,
        IMAGES_PER_SHARD=2,
    )
    assert (tmp_path / "weights" / "config.json").exists()
    assert given["SOURCE"] in text(cells["convert"])
    scene, _ = check_pictures(cells["show"], 2)
    settings = json.loads(Image.open(next(Path(given["PICTURES"]).glob("0000*"))).text["k3jax"])
    assert settings["int8_text_encoder"] is True
    check_repainted(cells["inpaint"], scene)

    finished, shards = map(
        int, re.search(r"disconnected: (\d+) of (\d+) shards", text(cells["disconnect"])).groups()
    )
    assert 0 < finished < shards == 4
    resumed = text(cells["resume"])
    assert "8 images in 4 shards" in resumed
    assert f"finished: {8 - 2 * finished} images made" in resumed
    check_data_set(cells, given, 8)


@pytest.mark.slow
def test_colab_gpu(execute, check_data_set, tmp_path):
    """What must last goes to an address, as it would to a bucket."""
    given, cells = execute("colab_gpu.ipynb", 1, WEIGHTS="tiny", OUT=(tmp_path / "bucket").as_uri())
    scene, _ = check_pictures(cells["show"], 2)
    check_repainted(cells["inpaint"], scene)
    assert "finished: 8 images made" in text(cells["data-set"])
    check_data_set(cells, given, 8)


@pytest.mark.slow
def test_kaggle_tpu(execute, check_data_set):
    given, cells = execute("kaggle_tpu.ipynb", 8, WEIGHTS="tiny", DATA_SET_IMAGES_PER_PROMPT=4)
    assert "mesh {'data': 8, 'fsdp': 1, 'tensor': 1}" in text(cells["show"])
    assert "batch_size 8" in text(cells["show"])
    (sheet,) = pictures(cells["show"])
    assert min(sheet.shape[:2]) > 2 * SIZE and sheet.std() > 2
    assert len(list(Path(given["PICTURES"]).glob("*_seed*.png"))) == 8
    shares = text(cells["data-set"])
    assert shares.count("16 images in 2 shards, 1 of them here") == 2
    assert shares.count("finished: 8 images made") == 2
    check_data_set(cells, given, 16)
