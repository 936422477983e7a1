# SPDX-License-Identifier: Apache-2.0
"""8 simulated devices, float32 matmuls of full precision, and a compilation cache for all runs.

Programs are compiled without LLVM's optimisations, in one part, and where XLA still can without its
MLIR emitters: that takes a third of the CPU time. XLA_FLAGS of the environment replace these flags
(.ci/run compares the same pixels as users compile them, too).
"""

import importlib.metadata
import os


os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
    + " --xla_cpu_use_fusion_emitters=false"  # newer ones have no other
    * importlib.metadata.version("jaxlib").startswith("0.10."),
)
os.environ["XLA_FLAGS"] += " --xla_force_host_platform_device_count=8"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # PyTorch's threads would wait for each other
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import gc
import importlib.util
import pathlib

import jax
import pytest

from tools import needs_tool


jax.config.update("jax_default_matmul_precision", "highest")
jax.config.update(
    "jax_compilation_cache_dir",
    os.environ.get("JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(__file__).parent / ".jax_cache")),
)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

# Every compiled program for 8 devices holds hundreds of memory maps, of which Linux gives a process
# 65,530; where they run out, XLA dies of a segmentation fault inside its compiler.
MAPS = pathlib.Path("/proc/self/maps")
MOST_MAPS = 20_000  # one file of tests adds up to 30,000


FOLDERS = ("training", "pipelines", "model")
LONGEST = (*FOLDERS, "test_readme_commands.py", "test_end_to_end.py")


def group_of(nodeid: str) -> str:
    """The tests that one worker runs: a file, or a folder whose files use the same programs."""
    path = pathlib.PurePosixPath(nodeid.split("::")[0].removeprefix("tests/"))
    return path.parts[0] if path.parts[0] in FOLDERS else str(path)


def pytest_collection_modifyitems(items):
    """What takes longest comes first, so that two workers end at about the same time."""
    items.sort(key=lambda item: (*LONGEST, group_of(item.nodeid)).index(group_of(item.nodeid)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """`--dist loadgroup` would do this, but xdist 3.8 cannot set groups with pytest 9.2."""
    from xdist.scheduler import LoadScopeScheduling

    scheduler = LoadScopeScheduling(config, log)
    scheduler._split_scope = group_of
    return scheduler


@pytest.fixture(autouse=True, scope="module")
def few_memory_maps():
    """Forgets the compiled programs behind a file of tests once they hold many maps."""
    yield
    if MAPS.exists() and MAPS.read_bytes().count(b"\n") > MOST_MAPS:
        jax.clear_caches()
        gc.collect()


@pytest.fixture
def one_device(monkeypatch):
    """As on most machines: programs for 8 devices take three times as long to compile."""
    one = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda *args, **kwargs: one)
    monkeypatch.setattr(jax, "local_devices", lambda *args, **kwargs: one)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """A headless Chromium."""
    packages = "apt-get install chromium chromium-driver"
    chromium = needs_tool("chromium", "chromium-browser", install=packages)
    driver = needs_tool("chromedriver", install=packages)
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--window-size=1280,1000",
        "--allow-file-access-from-files=false",
        f"--user-data-dir={tmp_path_factory.mktemp('profile')}",
    ):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(driver)
    with webdriver.Chrome(options=options, service=service) as opened:
        opened.set_page_load_timeout(60)
        yield opened


@pytest.fixture
def tpu_compiler():
    """Fails where libtpu is not installed: a test that was asked for and cannot run is no pass."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.fail("this test needs libtpu: pip install 'k3jax[tpu]'")
