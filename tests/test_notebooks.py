"""Every notebook runs from top to bottom, and is committed with the outputs of such a run."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
#: Where a machine's own folders begin; no output may show one.
MACHINE_PATHS = re.compile(r"/(?:home|root|tmp|Users|work|usr|opt|var)/|[A-Z]:\\")


def names(path):
    return path.name


def test_there_are_notebooks():
    assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=names)
def test_outputs_are_those_of_one_clean_run(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert outputs
    for output in outputs:
        assert output.output_type != "error"
        assert output.get("name") != "stderr", output.get("text")
        data = output.get("data", {})
        texts = [output.get("text", ""), *(data[kind] for kind in data if "image" not in kind)]
        assert not [shown for shown in texts if MACHINE_PATHS.search(str(shown))]
    assert any("image/png" in output.get("data", {}) for output in outputs)


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=names)
def test_it_runs_from_top_to_bottom_and_prints_what_is_committed(path, tmp_path, monkeypatch):
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")  # or jupyter_core warns about moving to it
    # A figure's bytes depend on the fonts at hand, the last digits on the processor.
    committed = nbformat.read(path, as_version=4)
    fresh = nbformat.read(path, as_version=4)
    NotebookClient(
        fresh, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    for before, after in zip(committed.cells, fresh.cells, strict=True):
        if before.cell_type == "code":
            assert words(before) == words(after), before.source
            assert numbers(after) == pytest.approx(numbers(before), rel=0.02, abs=0.02)


def text(cell):
    return "".join(output.get("text", "") for output in cell.outputs if output.get("name"))


def numbers(cell):
    return [float(number) for number in re.findall(r"-?\d+\.\d+", text(cell))]


def words(cell):
    return re.sub(r"-?\d+\.\d+", "#", text(cell)).split()
