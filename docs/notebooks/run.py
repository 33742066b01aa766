"""Runs the notebooks of this folder, and writes into them what they print and draw: `make notebooks`.

python docs/notebooks/run.py [FOLDER] [NAME …] runs them in FOLDER, where models that were trained before are found again.
"""

import base64
import io
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from PIL import Image

NAMES = "use", "fine_tune", "look_inside"
"""In this order, as the first trains a model that the others find in the folder where all are run."""


def main() -> None:
    folder, *names = sys.argv[1:] or [tempfile.mkdtemp()]
    for name in names or NAMES:
        path = Path(__file__).with_name(f"{name}.ipynb")
        notebook = nbformat.read(path, as_version=4)
        NotebookClient(notebook, timeout=3600, coalesce_streams=True, resources={"metadata": {"path": folder}}).execute()
        for cell in notebook.cells:
            cell.metadata.pop("execution", None)  # when it ran
            for data in (output.get("data", {}) for output in cell.get("outputs", ())):
                data.pop("image/jpeg", None)  # Pillow offers both, and PNG keeps the pixels
                if "image/png" in data:
                    data["image/png"] = light(data["image/png"])
        nbformat.write(notebook, path)
        print(f"wrote {path}, {path.stat().st_size / 1000:.0f} kB")


def light(png: str) -> str:
    """The picture in base64 with 160 colours, which is less than half as large."""
    file = io.BytesIO()
    picture = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    picture.quantize(160, dither=Image.Dither.NONE).save(file, "PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


if __name__ == "__main__":
    main()
