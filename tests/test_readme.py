# SPDX-License-Identifier: Apache-2.0
"""READMEs: links, lists of files, and commands that the real parsers accept.

test_readme_commands.py runs the blocks.
"""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest

from k3jax.cli.main import parse

from readmes import READMES, ROOT, Block, blocks, name_of


each_readme = pytest.mark.parametrize("path", READMES, ids=name_of)
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


def test_the_first_page():
    text = (ROOT / "README.md").read_text()
    assert text.count("\n") <= 160
    assert text.index("k3jax convert") < text.index("```python")
    lines = [line for b in blocks(ROOT / "README.md") for line in b.text.splitlines()]
    assert sum(line.startswith("pip install -e . && k3jax generate") for line in lines) == 1
    tests = "pip install -e '.[test]' && pytest"
    assert lines.count(tests) == 1 and tests in (ROOT / ".ci" / "run").read_text()


@each_readme
def test_length_and_languages(path):
    assert path.read_text().count("\n") <= 210
    found = list(blocks(path))
    assert path.read_text().count("```") == 2 * len(found)
    assert {block.language for block in found} <= {"bash", "python", "text"}


@each_readme
def test_links(path):
    """Of other documents, their sections, and pictures."""
    text = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.S | re.M)
    for link in re.findall(r"\]\(([^)]+)\)", text):
        if link.startswith("https://"):
            continue
        file, _, section = link.partition("#")
        target = path.parent / file if file else path
        assert target.exists(), link
        if section:
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.M)
            anchors = {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}
            assert section in anchors, link


# --- lists of files -----------------------------------------------------------------------------

LISTED = [path for path in READMES if name_of(path).startswith(("k3jax/", "convert/", "configs/"))]


def test_every_folder_has_a_readme():
    packages = {path.parent for path in (ROOT / "k3jax").glob("*/__init__.py")}
    folders = {*packages, *(ROOT / name for name in ("k3jax", "convert", "configs"))}
    assert {path.parent for path in LISTED} >= folders


@pytest.mark.parametrize("path", LISTED, ids=name_of)
def test_list_of_files(path):
    """The table under "Files" names every file of the folder, and of subfolders without README."""
    section = re.search(r"^## Files.*?\n(.*?)(?=^## |\Z)", path.read_text(), re.S | re.M)
    assert section, "no section 'Files'"
    listed = re.findall(r"^\| `([\w/.]+)` \|", section[1], re.M)
    nested = [p.parent for p in path.parent.rglob("README.md") if p != path]
    there = {
        file.relative_to(path.parent).as_posix(): file
        for file in path.parent.rglob("*.py")
        if not set(nested) & set(file.parents) and file.name != "__init__.py"
    }
    missing = [f"| `{name}` | {_summary(there[name])} |" for name in there if name not in listed]
    gone = [name for name in listed if not (path.parent / name).exists()]
    doubled = {name for name in listed if listed.count(name) > 1}
    assert not missing and not gone and not doubled, "\n".join(
        [f"{name_of(path)}: add", *missing, f"remove {gone}, doubled {doubled}"]
    )


def test_the_list_of_tests():
    """tests/README.md names every folder of tests and every test file outside of folders."""
    tests = ROOT / "tests"
    named = set(re.findall(r"`([\w/]+(?:/|\.py))`", (tests / "README.md").read_text()))
    files = {path.name for path in tests.glob("test_*.py")}
    folders = {f"{path.parent.name}/" for path in tests.glob("*/*.py")}
    assert named >= files | folders
    assert all((tests / name).exists() for name in named)


def _summary(file: Path) -> str:
    """The first sentence of a module's docstring, as a proposal for its row."""
    text = re.search(r'"""(.*?)(?:\n\n|""")', file.read_text(), re.S)
    return " ".join(text[1].split()) if text else ""


# --- commands -----------------------------------------------------------------------------------


def check_k3jax(words):
    parse(words[1:])


def check_pytest(words):
    paths = [ROOT / word for word in words if word.startswith("tests/")]
    assert all(path.exists() for path in paths), paths
    if "-k" in words:
        names = words[words.index("-k") + 1]
        files = [
            file for path in paths for file in (path.glob("*.py") if path.is_dir() else [path])
        ]
        assert any(re.search(rf"def test_\w*{names}", file.read_text()) for file in files), names


def check_python(words):
    """A script of this repository that knows these options, or venv."""
    if words[1:3] == ["-m", "venv"]:
        return
    file = ROOT / (words[2].replace(".", "/") + ".py" if words[1] == "-m" else words[1])
    source = file.read_text()
    for option in (word for word in words[2:] if word.startswith("--")):
        assert option in source, f"{name_of(file)} has no {option}"


def check_pip(words):
    for named in re.findall(r"\[([\w,]+)\]", " ".join(words)):
        assert set(named.split(",")) <= EXTRAS.keys()


def check_tpu_vm(words):
    """Prints what it would run."""
    assert "--dry-run" in words
    done = subprocess.run(["bash", ROOT / words[0], *words[1:]], capture_output=True, text=True)
    assert done.returncode == 0 and "gcloud compute tpus" in done.stdout, done.stderr


def check_sbatch(words):
    script = words.index("launch/slurm.sbatch")
    parse(words[script + 1 :])


def check_files(words):
    for word in words[1:]:
        assert not word.startswith("launch/") or (ROOT / word).exists(), word


def check_ruff(words):
    assert words[1] in ("check", "format")


def check_ci(words):
    assert (ROOT / ".ci" / "run").exists()


CHECKS = {
    "k3jax": check_k3jax,
    "pytest": check_pytest,
    "python": check_python,
    "python3": check_python,
    "pip": check_pip,
    "launch/tpu_vm.sh": check_tpu_vm,
    "sbatch": check_sbatch,
    "docker": check_files,
    "sed": check_files,
    "ruff": check_ruff,
    ".ci/run": check_ci,
    # Programs of other people, without files of this repository.
    **dict.fromkeys(("kubectl", "gcloud", "tee", ".", "hf"), check_files),
    "xpk": check_files,  # tests/launch/test_manifests.py compares its command with jobset.yaml
}
SHELL = [block for path in READMES for block in blocks(path) if block.language == "bash"]


@pytest.mark.parametrize("block", SHELL, ids=lambda block: block.place)
def test_commands_are_understood(block: Block):
    assert block.commands()
    for words in block.commands():
        CHECKS[words[0]](words)
