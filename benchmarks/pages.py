"""Puts what a script has made between two comments of a Markdown page, so that one command renews a page."""

from pathlib import Path


def insert(text: str, name: str, page: Path) -> None:
    """
    Replace what stands between the lines ``<!-- name -->`` and ``<!-- /name -->``.

    :param text: what to put there
    :param name: of the place
    :param page: a Markdown file
    :raises SystemExit: if the page has no such place
    """
    begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->\n"
    before, found, rest = page.read_text(encoding="utf-8").partition(begin)
    _, also_found, after = rest.partition(end)
    if not found or not also_found:
        raise SystemExit(f"{page} needs the lines {begin.strip()!r} and {end.strip()!r}, between which the text goes")
    page.write_text(f"{before}{begin}{text}{end}{after}", encoding="utf-8")
