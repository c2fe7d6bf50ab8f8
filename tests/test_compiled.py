"""The cache of compiled kernels: as old as any file beside, and not needed."""

from __future__ import annotations

import os
import subprocess
import sys


def run(code: str, folder, **settings: str) -> list[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), *sys.path]), **settings}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return done.stdout.split()


HEADER = "from armorfact.arrays.compiled import compiled\n"
ASK = "import outer; print(outer.answer(1), sum(outer.answer.stats.cache_hits.values()))"


def test_a_kernel_is_compiled_again_after_a_change_in_a_file_beside(tmp_path):
    inner = tmp_path / "inner.py"
    inner.write_text(HEADER + "@compiled(inline='always')\ndef part(x):\n    return x + 1\n")
    outer = "from inner import part\n@compiled()\ndef answer(x):\n    return 10 * part(x)\n"
    (tmp_path / "outer.py").write_text(HEADER + outer)
    settings = {"NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    assert run(ASK, tmp_path, **settings) == ["20", "0"]
    assert run(ASK, tmp_path, **settings) == ["20", "1"]
    inner.write_text(inner.read_text().replace("x + 1", "x + 2"))
    assert run(ASK, tmp_path, **settings) == ["30", "0"]


def test_kernels_are_compiled_where_no_cache_can_be_written(tmp_path):
    code = "import numpy as np, armorfact; print(armorfact.factorize(np.eye(8), block=4, max_sweeps=1).loss)"
    assert run(code, tmp_path, NUMBA_CACHE_LOCATOR_CLASSES="ZipCacheLocator") == run(code, tmp_path)
