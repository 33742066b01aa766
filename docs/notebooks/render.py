"""A hook of MkDocs, which makes a page of each notebook: code, what it printed, and its pictures, in the style of all pages."""

import json
from typing import Any

from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page


class Notebook(File):
    """A file that becomes a page, which MkDocs grants to Markdown alone."""

    def is_documentation_page(self) -> bool:
        return True


def on_files(files: Files, config: Any) -> Files:
    for file in [file for file in files if file.src_uri.endswith(".ipynb")]:
        files.remove(file)
        files.append(Notebook(file.src_uri, config.docs_dir, config.site_dir, config.use_directory_urls))
    return files


def on_page_read_source(page: Page, config: Any) -> str | None:
    if not page.file.src_uri.endswith(".ipynb"):
        return None
    return markdown(json.loads(page.file.content_string))


def markdown(notebook: dict[str, Any]) -> str:
    """The page of a notebook."""
    parts = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else _fenced("python", source))
        parts += [_shown(output) for output in cell.get("outputs", ())]
    return "\n\n".join(parts)


def _shown(output: dict[str, Any]) -> str:
    data = output.get("data", {"text/plain": output.get("text", "")})
    if "image/png" in data:
        return f"![what the code above draws](data:image/png;base64,{''.join(data['image/png'].split())})"
    return _fenced("text", "".join(data["text/plain"]).rstrip())


def _fenced(language: str, text: str) -> str:
    return f"```{language}\n{text}\n```"
