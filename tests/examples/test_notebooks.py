"""The notebooks run from the first cell to the last, as a process without the Hub."""

import ast
import os
import sys
from pathlib import Path

import pytest

from tests.examples.local import EXAMPLES

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
run_sync = pytest.importorskip("jupyter_core.utils").run_sync
manager = pytest.importorskip("jupyter_client.manager")
kernelspec = pytest.importorskip("jupyter_client.kernelspec")
pytest.importorskip("ipykernel")

NOTEBOOKS = sorted((EXAMPLES / "notebooks").glob("*.ipynb"))


class CurrentPython(kernelspec.KernelSpecManager):
    """The kernel of the Python that runs the tests, whether or not one is registered."""

    def get_kernel_spec(self, kernel_name: str) -> "kernelspec.KernelSpec":
        """Return the one kernel that there is."""
        argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        return kernelspec.KernelSpec(argv=argv, display_name=kernel_name, language="python")


def code_of(path: Path) -> list[str]:
    notebook = nbformat.read(path, as_version=4)
    return [cell.source for cell in notebook.cells if cell.cell_type == "code"]


def test_there_are_two_notebooks():
    assert [path.stem for path in NOTEBOOKS] == ["distill_a_classifier", "make_a_student"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_saved_without_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None
            ast.parse(cell.source)


@pytest.mark.extended
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path, tmp_path, monkeypatch):
    for name, value in {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(EXAMPLES.parent)}.items():
        monkeypatch.setenv(name, value)
    notebook = nbformat.read(path, as_version=4)
    kernels = manager.AsyncKernelManager(kernel_name="python3", kernel_spec_manager=CurrentPython())
    client = nbclient.NotebookClient(
        notebook, timeout=300, km=kernels, resources={"metadata": {"path": str(tmp_path)}}
    )
    try:
        client.execute(env=dict(os.environ), cwd=str(tmp_path))
    finally:  # the client leaves alone a kernel that it was given
        run_sync(kernels.shutdown_kernel)(now=True)
    assert (tmp_path / "student" / "config.json").is_file()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    printed = "".join(output.text for output in outputs if output.output_type == "stream")
    assert "is deprecated; use" not in printed  # a name of an earlier release
