"""Pieces of the page as HTML. Everything that somebody typed is escaped."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence

from PIL import Image

from expunge.checkpoints.pace import format_duration
from expunge.evaluation.forecast import Forecast
from expunge.studio.choosing import Foresight
from expunge.studio.jobs import CANCELLED, DONE, FAILED, WAITING, Job
from expunge.studio.looking import Pair
from expunge.studio.session import PREVIEW, Session
from expunge.studio.working import Rung, Verdict


def escape(text: object) -> str:
    """A text as HTML shows it."""
    return html.escape(str(text), quote=True)


HEADER = """
<header class="x-head">
  <svg viewBox="0 0 32 32" width="34" height="34" aria-hidden="true">
    <rect x="2" y="2" width="28" height="28" rx="8" fill="none" stroke="currentColor" stroke-width="2"
          stroke-dasharray="3.6 3.4" opacity=".55"/>
    <path d="M16 2h6a8 8 0 0 1 8 8v12a8 8 0 0 1-8 8h-6z" fill="var(--x-accent)"/>
  </svg>
  <div><h1>expunge studio</h1><p>Make an image model forget something, and see that it has.</p></div>
</header>
"""

WELCOME = """
<section class="x-welcome">
  <h2>Nothing is erased yet</h2>
  <ol>
    <li><b>Choose</b> what the model should forget: an object, a flag, a style.</li>
    <li><b>Erase</b> it: seconds, for the model that ships.</li>
    <li><b>Look</b> at the same images before and after, judge the edit, try to get the concept back,
        and take the result with you.</li>
  </ol>
  <p>Everything happens on this machine. Nothing is sent anywhere.</p>
</section>
"""


LEFT = ("Erasing", "Loading")
"""The work whose progress stands beside the choice; of other work it stands beside its results."""


def progress(session: Session, side: str = "left") -> str:
    """How far the work is: a bar, what is being done, the time left, the place in the queue."""
    job = session.job
    if job is None or (job.label in LEFT) != (side == "left"):
        return ""
    if job.label == PREVIEW and not job.active:
        return ""
    if job.state == WAITING:
        ahead = session.place()
        others = "next" if ahead == 0 else f"{ahead} piece{'s' * (ahead > 1)} of work before yours"
        return _bar(0.0, f"{job.label}: waiting, {others}", "waiting")
    if job.state == FAILED:
        said = escape(_capital(session.hide_folder(job.error)))
        return f'<p class="x-say x-bad" role="alert">{said}</p>'
    if job.state == CANCELLED:
        kept = (
            " What was finished is kept: press the button again to go on." if session.unfinished else ""
        )
        return f'<p class="x-say" role="status">{escape(job.label)} was cancelled.{kept}</p>'
    if job.state == DONE:
        return "".join(
            f'<p class="x-say" role="status">{escape(_capital(n))}</p>' for n in job.notes[:4]
        )
    left = f", about {format_duration(job.left)} left" if job.left is not None else ""
    doing = f": {job.step}" if job.step else ""
    return _bar(job.share, f"{job.label}{doing}{left}", "working")


def _bar(share: float, text: str, state: str) -> str:
    percent = round(100 * min(max(share, 0.0), 1.0))
    return (
        f'<div class="x-bar x-{state}" role="progressbar" aria-valuemin="0" aria-valuemax="100"'
        f' aria-valuenow="{percent}" aria-label="{escape(text)}"><i style="width:{percent}%"></i></div>'
        f'<p class="x-doing" role="status">{escape(text)}</p>'
    )


def capitalize(text: str) -> str:
    """Return a sentence as it begins on a page; the name of a file is left as it is spelled.

    >>> capitalize("no such thing"), capitalize("list.txt is empty")
    ('No such thing', 'list.txt is empty')
    """
    first = text.partition(" ")[0].rstrip(",:;.")
    return text if {".", "/"} & set(first) else text[:1].upper() + text[1:]


def _capital(text: str) -> str:
    text = capitalize(text.strip())
    return text + ("" if text.endswith((".", "!", "?")) else ".")


def foresight(found: Foresight, busy: bool = False) -> str:
    """What the work will take and what may move with it, before it is done."""
    if found.problem:
        return f'<p class="x-say">{escape(_capital(found.problem))}</p>'
    facts = [f for f in (found.time, found.memory) if f] or ["the model is being loaded …"]
    chips = "".join(f'<span class="x-chip">{escape(fact)}</span>' for fact in facts)
    notes = "".join(f"<li>{escape(_capital(note))}</li>" for note in found.notes)
    said = f'<ul class="x-notes">{notes}</ul>' if notes else ""
    return f'<div class="x-chips">{chips}</div>{said}{moves(found.forecast)}'


MOVES, MORE = 5, 24
"""Names of a forecast that are shown at once, and with those that one press shows."""


def moves(found: Forecast | None) -> str:
    """The names that are expected to move most, then what must stay; each with a bar."""
    if found is None or not found.moves:
        return ""
    # Whoever asks for a name to stay wants to see that it does, however little it moves.
    shown = [move for k, move in enumerate(found.moves) if k < MORE or move.role == "retained"]
    rows = [_move(move.name, round(100 * move.share)) for move in shown]
    more = "".join(rows[MOVES:])
    rest = f"<details><summary>More</summary><ul>{more}</ul></details>" if more else ""
    how = "" if found.exact else f" This method trains: the forecast is that of {escape(found.method)}."
    return (
        '<section class="x-moves"><h4>What else will move</h4>'
        f"<ul>{''.join(rows[:MOVES])}</ul>{rest}"
        "<p>How far the model's reading of a name will move; the erased names move by 100 %."
        f"{how}</p></section>"
    )


def _move(name: str, share: int) -> str:
    bar = f'<i><b style="width:{min(share, 100)}%"></b></i>'
    return f"<li><span>{escape(name)}</span>{bar}<em>{share} %</em></li>"


def heading(name: str, session: Session) -> str:
    """A concept's name over its card; one that is almost a known name is asked about there and then."""
    known = session.knowledge
    near = "" if known.find(name) else known.near(name)
    asked = sentence(f"did you mean “{near}”?") if near else ""
    return f"<h3>{escape(name)}</h3>{asked}"


def sentence(*texts: str) -> str:
    """A line of explanation under a choice."""
    return f'<p class="x-hint">{" ".join(escape(_capital(text)) for text in texts if text)}</p>'


def title(session: Session) -> str:
    """What was erased, how, and in what time."""
    if session.made is None:
        return ""
    record = session.made.edit.record
    parts = []
    for concept in record.problem.erase[:6]:
        becomes = f" → {concept.anchor}" if concept.anchor and record.reads_anchor else ""
        parts.append(f'<span class="x-chip x-strong">{escape(concept.name)}{escape(becomes)}</span>')
    more = len(record.problem.erase) - 6
    if more > 0:
        parts.append(f'<span class="x-chip">and {more} more</span>')
    base = f" from the model {escape(session.made.model)}" if len(session.made.model) <= 40 else ""
    how = f"erased{base} with {escape(record.method)} in {record.seconds:.1f} s"
    return f'<div class="x-chips x-title">{"".join(parts)}<span class="x-how">{how}</span></div>'


COLUMNS = {
    "efficacy": "the erased is gone",
    "specificity": "what must stay is still drawn",
    "generality": "it is gone under its other names, too",
    "content": "what else the prompt names is still drawn",
}
"""What the columns of a suite say; H is the mean of them that the lowest weighs down most."""


def verdict(found: Verdict | None) -> str:
    """The figures of a suite, as a table."""
    if found is None:
        return ""
    head = "".join(f"<th scope='col'>{escape(column)}</th>" for column in ("", *found.columns))
    rows = "".join(
        "<tr>"
        + f"<th scope='row'>{escape(row[0])}</th>"
        + "".join(f"<td>{escape(c)}</td>" for c in row[1:])
        + "</tr>"
        for row in found.rows
    )
    notes = "".join(f'<p class="x-say">{escape(note)}</p>' for note in found.notes)
    known = [f"{column}: {COLUMNS[column]}" for column in found.columns if column in COLUMNS]
    if any(column.startswith("H_") for column in found.columns):
        known.append("H: all of these in one number (their harmonic mean)")
    notes = (sentence("; ".join(known)) if known else "") + notes
    return (
        f'<div class="x-scroll"><table class="x-table"><caption>Suite {escape(found.suite)}: per cent,'
        f" with 95 % intervals; higher is better</caption><tr>{head}</tr>{rows}</table></div>{notes}"
    )


def report(found: Verdict | None) -> str:
    """The whole report, in a frame of its own that may do nothing but run its own script."""
    if found is None:
        return ""
    text = (found.folder / "index.html").read_text(encoding="utf-8")
    return (
        '<iframe class="x-report" title="The report" sandbox="allow-scripts"'
        f' srcdoc="{escape(text)}"></iframe>'
    )


def rungs(found: Sequence[Rung]) -> str:
    """An attack's images, a row a budget, each with whether the concept is seen again."""
    return "".join(_rung(rung) for rung in list(found))


def _rung(rung: Rung) -> str:
    known = [seen for seen in rung.seen if seen is not None]
    told = f"seen in {sum(known)} of {len(known)}" if known else ""
    label = escape(rung.label)
    cells = "".join(
        f'<figure class="{_mark(seen)}"><img alt="{label}, image {i}" src="{inline(one)}">'
        f"<figcaption>{_said(seen)}</figcaption></figure>"
        for i, (one, seen) in enumerate(zip(rung.images, rung.seen, strict=True), 1)
    )
    return (
        f'<section class="x-rung"><h4>{escape(rung.label)} <span>{told}</span></h4>'
        f'<div class="x-strip">{cells}</div></section>'
    )


def _mark(seen: bool | None) -> str:
    return {True: "x-seen", False: "x-gone", None: ""}[seen]


def _said(seen: bool | None) -> str:
    return {True: "seen", False: "not seen", None: ""}[seen]


def inline(picture: Image.Image, width: int = 160) -> str:
    """An image as part of the page itself."""
    if picture.width > width:
        height = picture.height * width // picture.width
        picture = picture.resize((width, height), Image.Resampling.LANCZOS)
    written = io.BytesIO()
    picture.save(written, "WEBP", quality=92)
    return "data:image/webp;base64," + base64.b64encode(written.getvalue()).decode("ascii")


PICK = """
element.addEventListener('click', event => {
  const chosen = event.target.closest('[data-place]');
  if (!chosen) return;
  for (const one of element.querySelectorAll('[data-place]'))
    one.setAttribute('aria-pressed', one === chosen);
  trigger('click', {place: Number(chosen.dataset.place)});
});
"""
"""Tells Python which pair was pressed."""


PRESS = "Press Erase to see the same prompts and seeds without it."
"""What comes after a preview."""


def now(session: Session) -> str:
    """What the model draws of the choice as it is; before there is one, how to begin."""
    job = session.job
    if session.made is not None or job is None:
        return WELCOME
    # Other work takes the preview's place; what was drawn stays until there are pairs to show.
    foreseen = job.label == PREVIEW
    drawn = job.result if foreseen else session.drawn
    if not drawn:
        return WELCOME
    erasing = job.active and not foreseen
    then = "The same prompts and seeds without it come here." if erasing else PRESS
    cells = "".join(
        f'<figure><img alt="{escape(prompt)}" src="{inline(one, 200)}">'
        f"<figcaption>{escape(prompt)}</figcaption></figure>"
        for prompt, one in drawn
    )
    return (
        '<section class="x-welcome"><h2>What the model draws now</h2>'
        f"<p>{then}</p>"
        f'<div class="x-now">{cells}</div></section>'
    )


PAIRED = "In each pair, before is on the left and after on the right; press one to compare it above."
"""How pairs are read."""


def pairs(found: Sequence[Pair]) -> str:
    """The pairs, a row a prompt; each can be pressed to be looked at closely."""
    rows: dict[str, list[str]] = {}
    for place, pair in enumerate(found):
        label = f"{escape(pair.prompt)}, seed {pair.seed}: look closely"
        pressed = "false" if place else "true"
        rows.setdefault(pair.prompt, []).append(
            f'<button type="button" data-place="{place}" aria-label="{label}" aria-pressed="{pressed}">'
            f'<img alt="before" src="{inline(pair.before)}">'
            f'<img alt="after" src="{inline(pair.after)}"></button>'
        )
    sections = (
        f'<section><h4>{escape(prompt)}</h4><div class="x-pairs">{"".join(cells)}</div></section>'
        for prompt, cells in rows.items()
    )
    return f'{sentence(PAIRED)}<div class="x-look">{"".join(sections)}</div>' if rows else ""


def sides(pair: Pair | None) -> str:
    """What stands below the slider; where nothing is drawn yet, that it comes."""
    if pair is None:
        return sentence("The images before and after come here as soon as they are drawn")
    what = f"{escape(pair.prompt)} · seed {pair.seed}"
    return f'<p class="x-sides"><span>before</span><b>{what}</b><span>after</span></p>'


def notes(lines: Sequence[str]) -> str:
    """Some sentences, one below the other."""
    return "".join(f'<p class="x-say">{escape(line)}</p>' for line in lines)


def button(job: Job | None, unfinished: bool) -> str:
    """What the button says that starts the erasure."""
    if job is not None and job.active:
        return f"{job.label} …"
    return "Go on erasing" if unfinished else "Erase"
