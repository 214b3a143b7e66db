"""The Markdown that `tables` writes, as HTML: sections, tables that sort, lists and paragraphs, every word escaped."""

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape

_NUMERIC = re.compile(r"(?:< )?(?:[±+−-] ?)?\.?\d[\d.,]*(?:%| s| min)?(?: ± .+| … .+| \(n = .+)?|one seed")
_LONG_NAME = re.compile(r"(?=\w{13})\w+_\w+")  # of a model, which may break behind its underscores
_SENTENCE = 32  # a cell with more letters is one
_INLINE = (
    (r"\*\*(.+?)\*\*", r"<strong>\1</strong>"),
    (r"(?<!\*)\*([^*]+)\*", r"<em>\1</em>"),
    (r"`(.+?)`", r"<code>\1</code>"),
    (r"\[([^\[\]]+)\]\((#[\w-]+)\)", r'<a href="\2">\1</a>'),  # to a place on the page, nowhere else
)


def sections(lines: Sequence[str], level: str, prefix: str, pictures: Mapping[str, str]) -> str:
    """A <section> for every heading; `pictures` is what stands for a line ![name], `prefix` keeps ids apart."""
    made, begins = [], [n for n, line in enumerate(lines) if line.startswith("#")]
    for begin, end in zip(begins, [*begins[1:], len(lines)]):
        words = lines[begin].lstrip("# ")
        name, body = prefix + slug(words), blocks(lines[begin + 1 : end], words, pictures)
        head = f'<{level} id="{name}">{inline(words)}</{level}>'
        made.append(f'<section aria-labelledby="{name}">{head}{body}</section>\n')
    return "".join(made)


def blocks(lines: Iterable[str], caption: str, pictures: Mapping[str, str] | None = None) -> str:
    """Tables, lists, pictures, and paragraphs with an empty line between them."""
    made = []
    for kind, group in itertools.groupby(lines, _block_kind):
        block = list(group)
        if kind == "|":
            head, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in block)
            made.append(table(caption, head, rows))
        elif kind == "*":
            made.append(f"<ul>{''.join(f'<li>{inline(line[2:])}</li>' for line in block)}</ul>")
        elif kind == "!":
            made += [(pictures or {}).get(line[2:].split("]")[0], "") for line in block]
        elif kind:
            made.append(f"<p>{inline(' '.join(block))}</p>")
    return "".join(made)


def table(caption: str, head: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "models") -> str:
    """A table that sorts, in a box of its own that scrolls; rows named in *asterisks* are no models and stay below."""
    rows = list(rows)
    kinds = [_column_kind([row[n] for row in rows]) if n else "" for n in range(len(head))]

    def lines(*, below: bool) -> str:
        made = []
        for name, *cells in (row for row in rows if (row[0][:1] == "*") == below):
            data = "".join(f"<td{kinds[n]}>{_cell(cell)}</td>" for n, cell in enumerate(cells, 1))
            named = _breakable(name) if kind == "wrapped" else _cell(name)
            made.append(f'<tr><th scope="row">{named}</th>{data}</tr>')
        return "".join(made)

    heads = "".join(
        f'<th scope="col"{kinds[n]}>{inline(words).replace("/", "/<wbr>")}</th>' for n, words in enumerate(head)
    )
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(caption)}"><table class="sorts {kind}">'
        f"<caption>{escape(caption)}</caption><thead><tr>{heads}</tr></thead><tbody>{lines(below=False)}</tbody>"
        f"<tfoot>{lines(below=True)}</tfoot></table></div>"
    )


def _block_kind(line: str) -> str:
    return line[:1] if line[:2] in ("| ", "|-", "* ", "![", "") else "text"


def _column_kind(cells: Sequence[str]) -> str:
    """The class of a column: numbers stand to the right and sort by size, sentences may break."""
    filled = [cell.replace("*", "") for cell in cells if cell]
    if filled and all(map(_NUMERIC.fullmatch, filled)):
        return ' class="number"'
    return ' class="words"' if any(len(cell) > _SENTENCE for cell in filled) else ""


def _cell(text: str) -> str:
    return _breakable(text) if _LONG_NAME.fullmatch(text) else inline(text)


def _breakable(name: str) -> str:
    """The name of a setting, which may break behind its dots, slashes and underscores."""
    return re.sub(r"([./_])", r"\1<wbr>", escape(name))


def inline(text: str) -> str:
    text = escape(text)
    for mark, made in _INLINE:
        text = re.sub(mark, made, text)
    return text


def slug(words: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")
