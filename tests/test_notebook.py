"""docs/notebook.ipynb, executed by a kernel of this environment in an empty folder."""

import re
import sys
from pathlib import Path

import nbformat
import pytest
import transformers
from jupyter_client import KernelManager
from jupyter_client.kernelspec import KernelSpec
from nbclient import NotebookClient

REPOSITORY = Path(__file__).parent.parent
NOTEBOOK = REPOSITORY / "docs" / "notebook.ipynb"


class OfThisEnvironment(KernelManager):
    """Whatever kernels are installed for the user, this one runs the Python of the tests."""

    @property
    def kernel_spec(self) -> KernelSpec:
        return KernelSpec(argv=[sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"])


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """The notebook with its outputs, and the folder in which it ran."""
    folder = tmp_path_factory.mktemp("notebook")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("PYTHONPATH", str(REPOSITORY))
        patched.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
        patched.delenv("XLA_FLAGS", raising=False)
        notebook = nbformat.read(NOTEBOOK, as_version=4)
        resources = {"metadata": {"path": str(folder)}}
        NotebookClient(notebook, timeout=600, resources=resources, kernel_manager_class=OfThisEnvironment).execute()
    return notebook, folder


def words(notebook) -> str:
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    return "".join(output.text for output in outputs if output.output_type == "stream")


def test_the_notebook_trains_and_names_birds(executed):
    notebook, folder = executed
    text = words(notebook)
    accuracy = float(re.search(r"test accuracy: ([\d.]+) on 40 photographs", text)[1])
    assert accuracy > 0.5  # 0.25 by chance
    assert "4 evaluations" in text and "VisionTransformer" in text and "on 2 cpu device(s)" in text
    assert (folder / "runs" / "notebook" / "run" / "results.json").exists()
    assert "main.py evaluate --workdir=runs/notebook/run" in text  # what to type next, outside of the notebook


def test_it_shows_curves_birds_and_the_model(executed):
    shown = [
        output.data
        for cell in executed[0].cells if cell.cell_type == "code"
        for output in cell.outputs if output.output_type == "display_data"
    ]  # fmt: skip
    assert sum("image/png" in data for data in shown) == 2
    assert any("treescope" in data.get("text/html", "") for data in shown)


def test_the_weights_of_transformers_compute_the_same(executed):
    text = words(executed[0])
    if hasattr(transformers, "FlaxViTForImageClassification"):
        assert float(re.search(r"largest difference of 16 logits: (\S+)", text)[1]) < 1e-4
    else:
        assert "has no Flax classes: the comparison is left out" in text


def test_it_is_committed_without_outputs():
    for cell in nbformat.read(NOTEBOOK, as_version=4).cells:
        assert cell.cell_type != "code" or not cell.outputs and cell.execution_count is None
