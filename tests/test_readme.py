"""The README's Python runs as written."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), re.M | re.S)


@pytest.mark.parametrize("code", BLOCKS, ids=range(len(BLOCKS)))
def test_python_block_runs(code, capsys):
    exec(compile(code, str(README), "exec"), {})
    assert "Austin" in capsys.readouterr().out


def test_blocks_were_found():
    assert BLOCKS
