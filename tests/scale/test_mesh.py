"""What on_mesh.py found on 8 simulated devices, in a process of its own.

pytest's main process has one device, and cannot get others once jax has started.
"""

import re
import xml.etree.ElementTree as xml
from pathlib import Path

import pytest

from tests.scale.child import run_all

FILE = Path(__file__).with_name("on_mesh.py")
# At the same time: most of it is compiling, with one thread.
CHILDREN = 2
TESTS = re.findall(r"^def (test_\w+)", FILE.read_text(), re.MULTILINE)


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """Outcomes by test: {name: [(parameters, what went wrong or None)]}."""
    folder = tmp_path_factory.mktemp("mesh")
    commands, paths = [], []
    for part in range(CHILDREN):
        paths.append(folder / f"report{part}.xml")
        options = ["-q", "-p", "no:cacheprovider", f"--rootdir={FILE.parents[2]}"]
        chosen = [f"{FILE}::{name}" for name in TESTS[part::CHILDREN]]
        commands.append(["-m", "pytest", *options, f"--junitxml={paths[-1]}", *chosen])
    done = run_all(commands, devices=8, seconds=800, together=False)
    found = {}
    for path, (status, output) in zip(paths, done, strict=True):
        assert path.exists(), f"exit status {status}\n{output[-4000:]}"
        for case in xml.parse(path).iter("testcase"):
            name, _, given = case.get("name").partition("[")
            wrong = next(
                (part.text or part.get("message") for part in case if part.tag in BAD), None
            )
            found.setdefault(name, []).append((given.rstrip("]"), wrong))
    return found


BAD = ("failure", "error", "skipped")


@pytest.mark.parametrize("name", TESTS)
def test_on_8_devices(name, reports):
    assert name in reports, f"{name} was not run"
    failed = [f"{given}: {wrong}" for given, wrong in reports[name] if wrong]
    assert not failed, "\n".join(failed)
