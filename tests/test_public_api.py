"""The public API: every name resolves, and importing the package loads nothing heavy."""

import subprocess
import sys

import tspipe


def test_every_public_name_resolves() -> None:
    for name in tspipe.__all__:
        assert getattr(tspipe, name).__name__ == name


def test_importing_the_package_loads_neither_torch_nor_h5py() -> None:
    program = "import sys, tspipe; print(sorted(sys.modules.keys() & {'h5py', 'numpy', 'torch'}))"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"
