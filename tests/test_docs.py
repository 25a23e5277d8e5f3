"""The pages: links resolve, commands and settings exist, each page is found from both READMEs."""

import re

import pytest
from conftest import ROOT

from train_bert_rerank import read_settings

PAGES = sorted([*ROOT.glob("README*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "benchmarks" / "README.md"])
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]


def text_of(page):
    return page.read_text(encoding="utf-8")


def anchors(page):
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text_of(page), flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def commands(page):
    """The lines of a page's bash blocks that call python on a file: (file, its arguments)."""
    blocks = "".join(re.findall(r"^```bash\n(.*?)^```", text_of(page), re.M | re.S))
    return re.findall(r"python (?:-m torch\S* )?(\S+\.py)(.*)", blocks)


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_every_link_to_a_file_or_heading_of_the_repository_resolves(page):
    links = re.findall(r"\]\(([^)\s]+)\)", text_of(page))
    for link in links:
        if not link.startswith("http"):
            name, _, anchor = link.partition("#")
            target = (page.parent / name).resolve() if name else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), (link, sorted(anchors(target)))


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_every_command_names_a_script_and_options_that_exist(page):
    for script, arguments in commands(page):
        assert (ROOT / script).exists(), script
        options = set(re.findall(r"(?<!\S)--(\w+)", arguments))
        if script == "train_bert_rerank.py":
            assert options <= read_settings().keys(), (script, arguments)
        elif options:
            source = text_of(ROOT / script)
            assert all(f'"--{option}"' in source for option in options), (script, arguments)


def test_each_page_is_linked_from_both_readmes():
    for readme in ("README.md", "README_zh.md"):
        linked = set(re.findall(r"\]\((docs/\w+\.md)", text_of(ROOT / readme)))
        pages = {f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")}
        other_language = {"docs/faq.md" if readme == "README_zh.md" else "docs/faq_zh.md"}
        assert pages - other_language <= linked, readme


def test_the_questions_are_the_same_number_in_both_languages():
    counts = [[len(re.findall(f"^{level} ", text_of(ROOT / "docs" / name), re.M)) for level in ("##", "###")]
              for name in ("faq.md", "faq_zh.md")]  # fmt: skip
    assert counts[0] == counts[1] and counts[0][1] >= 20
