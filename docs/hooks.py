"""The documents at the top of the repository become pages of the site, their links with them."""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "NOTES.md": "notes.md",
    "CHANGELOG.md": "changelog.md",
}


def on_files(files: Files, config: Any) -> None:
    """Add a page for each document; `docs/` is the root of the site."""
    root = Path(config.config_file_path).parent
    for document, page in PAGES.items():
        text = (root / document).read_text(encoding="utf-8")
        for name, place in PAGES.items():
            text = text.replace(f"]({name})", f"]({place})")
        text = re.sub(r"(\]\(|src=\")docs/", r"\1", text)
        files.append(File.generated(config, page, content=text))
