"""What the page does when something is pressed: asks the session, and says what to show.

Every handler takes the session's name first. What goes wrong is shown as one sentence, and the page
then shows the session as it is.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from expunge.model import ANCHORS
from expunge.problem import Concept
from expunge.studio import recipes, views, working
from expunge.studio.house import Studio
from expunge.studio.jobs import Job, sentence
from expunge.studio.session import PREVIEW, Session

AUTO, EMPTY = "Chosen for you", "Nothing (the empty prompt)"
"""What a concept becomes where nobody says, and where it is to be nothing."""

EXAMPLES: dict[str, tuple[str, ...]] = {
    "Airplane": ("airplane",),
    "Jorvek Ambrask": ("Jorvek Ambrask",),
    "Isolmo Lamberque": ("Isolmo Lamberque",),
    "Cat and dog": ("cat", "dog"),
}
"""Choices by one press, for who has just come."""

TICK, IDLE = 0.7, 2.5
"""Seconds between two looks at the work: while there is some, and while there is none."""

CHOICE = 11
"""How many components the left side has that a choice changes."""

CARDS = 12
"""Concepts that are shown one by one; of more, the list is there."""

ATTACKS = {
    "inversion": "Learn a new word that calls it back (textual inversion). Budget: training steps.",
    "embedding": "Move the prompt itself a little, within a radius. Budget: the radius in per cent.",
}
BUDGETS = {"inversion": (10, 600, 100, 10), "embedding": (1, 40, 10, 1)}
"""Least, most, first and step of an attack's budget."""


NONE_YET = "Choose at least one thing to forget; then it can be erased."
"""Why the button waits."""

AWAY = "This page is still coming, or was away for too long: reload it, and all goes on as it was."


class Handlers:
    """The page's handlers, over one studio."""

    def __init__(self, studio: Studio) -> None:
        self.studio = studio

    def session(self, who: str | None) -> Session:
        """The session of a page.

        Raises:
            gr.Error: the page has not come to one yet, or was away for so long that it lost it.
        """
        if who is None:
            raise gr.Error(AWAY, title="Not done", print_exception=False)
        return self.studio.session(who)

    def attempt(
        self,
        who: str | None,
        act: Callable[[Session], Any],
        failed: Callable[[Exception], None] = lambda _: None,
    ) -> Session:
        """Do something with a session; what is against it becomes a sentence on the page.

        Args:
            who: the session's name.
            act: what to do.
            failed: told what is against it.
        """
        session = self.session(who)
        try:
            act(session)
        except Exception as error:
            failed(error)
            said = views.capitalize(session.hide_folder(sentence(error)))
            gr.Warning(views.escape(said), duration=12, title="Not done")
        return session

    # What the page shows.

    def choice(self, session: Session, *, anew: bool = True) -> list[Any]:
        """The left side: `_Page.choice` in its order; `anew`, with other cards."""
        chosen = session.choice
        kind = recipes.kind_of(chosen.concepts)
        names = [concept.name for concept in chosen.concepts]
        known = session.knowledge.names
        presets = recipes.presets(chosen.method, chosen.model, kind)
        return [
            gr.update(value=chosen.model),
            gr.update(value=chosen.config),
            gr.update(value=names, choices=list(dict.fromkeys([*known, *names])), interactive=True),
            time.monotonic_ns() if anew else gr.skip(),
            gr.update(value=list(chosen.retain), choices=list(dict.fromkeys([*known, *chosen.retain]))),
            gr.update(value=chosen.method),
            gr.update(value=chosen.preset, choices=[option.name for option in presets]),
            views.sentence(
                next(o.about for o in recipes.methods() if o.name == chosen.method),
                next((o.about for o in presets if o.name == chosen.preset), ""),
            ),
            chosen.seed,
            *self.foresight(session),
        ]

    def foresight(self, session: Session) -> list[Any]:
        """What can be said before the work, and the button that starts it."""
        job = session.job
        busy = job is not None and job.active and job.label != PREVIEW
        found = session.foresee()
        empty = not session.choice.concepts
        shown = views.sentence(NONE_YET) if empty else views.foresight(found)
        label = views.button(job if busy else None, session.unfinished)
        return [shown, gr.update(value=label, interactive=not busy and not empty)]

    def live(self, session: Session) -> list[Any]:
        """Progress and the button that calls work off, beside the choice and beside the results."""
        job = session.job
        busy = job is not None and job.active
        left = busy and job is not None and job.label in views.LEFT
        return [
            views.progress(session, "left"),
            gr.update(visible=left),
            views.progress(session, "right"),
            gr.update(visible=busy and not left),
        ]

    def groups(self, session: Session) -> dict[str, tuple[Any, Callable[[], list[Any]]]]:
        """The right side, part by part: what its state is, and how to show it (`_Page.groups`)."""
        job, marks = session.job, session.marks
        state = (marks["job"], job.state if job else "", len(self._live_results(job)))
        made = marks["made"]
        return {
            "stage": ((made, state if session.made is None else ""), lambda: self._stage(session)),
            "look": (marks["pairs"], lambda: self._look(session)),
            "form": (made, lambda: self._form(session)),
            "judged": (marks["verdict"], lambda: self._judged(session)),
            "attacked": ((marks["rungs"], state), lambda: [views.rungs(self._rungs(session))]),
            "taken": (marks["taken"], lambda: self._taken(session)),
            "code": ((made, marks["choice"]), lambda: self._code(session)),
        }

    def _live_results(self, job: Job | None) -> list[Any]:
        """What a job has come to so far, where it tells it piece by piece."""
        return job.result if job is not None and isinstance(job.result, list) else []

    def _stage(self, session: Session) -> list[Any]:
        made = session.made is not None
        return [
            gr.update(value=views.now(session), visible=not made),
            gr.update(visible=made),
            views.title(session),
        ]

    def _look(self, session: Session) -> list[Any]:
        pairs = session.pairs
        first = (pairs[0].before, pairs[0].after) if pairs else None
        return [
            gr.update(value=first, visible=bool(pairs)),
            views.sides(pairs[0] if pairs else None),
            views.pairs(pairs),
        ]

    def _form(self, session: Session) -> list[Any]:
        view, suites = session.choice.view, session.suites
        prompts = list(view.prompts) or (session.prompts if session.made else [])
        return [
            "\n".join(prompts),
            view.number,
            view.seed,
            view.strength,
            gr.update(choices=suites, value=suites[0] if suites else None),
            prompts[0] if prompts else "",
        ]

    def _judged(self, session: Session) -> list[Any]:
        return [views.verdict(session.verdict), views.report(session.verdict)]

    def _rungs(self, session: Session) -> Sequence[working.Rung]:
        job = session.job
        live = job is not None and job.label == "Attacking" and isinstance(job.result, list)
        return job.result if live and job is not None else session.rungs

    def _taken(self, session: Session) -> list[Any]:
        """The files that were written last, and what was lost on the way."""
        done = session.taken
        if done is None:
            return [gr.update(value=None, visible=False), ""]
        return [gr.update(value=[str(f) for f in done.files], visible=True), views.notes(done.notes)]

    def _code(self, session: Session) -> list[Any]:
        if session.made is None:
            return ["", ""]
        try:
            return [session.command(), session.python()]
        except ValueError:  # what is chosen now is not whole
            return ["", ""]

    # Coming, and waiting.

    def arrive(self, kept: str | None, n: int) -> list[Any]:
        """A browser comes, for the first time or again: it finds its session as it was left.

        Args:
            kept: the session's name, as the browser has kept it.
            n: how many buttons wait for this.
        """
        session = self.studio.session(kept)
        ready = [gr.update(interactive=True) for _ in range(n)]
        return [
            session.name,
            session.name,
            *ready,
            *self.choice(session),
            {},
            gr.Timer(TICK, active=True),
        ]

    def tick(self, who: str | None, shown: dict[str, Any], widths: dict[str, int]) -> list[Any]:
        """How far the work is, and what has changed since the last time.

        Args:
            who: the session.
            shown: for each group of the page the state that it was last shown in.
            widths: for each group how many components it has.
        """
        session = self.session(who)
        ready = self.studio.models.ready(session.choice.model) is not None
        if ready:
            session.preview()  # what was chosen before the model was there
        job, now = session.job, dict(shown)
        busy = job is not None and job.active
        marks = [session.marks[one] for one in ("choice", "job", "forecast")]
        left = (*marks, job.state if job else "", ready)
        outputs = self.foresight(session) if shown.get("left") != left else [gr.skip(), gr.skip()]
        now["left"] = left
        for name, (state, show) in self.groups(session).items():
            changed = shown.get(name) != state
            outputs += show() if changed else [gr.skip() for _ in range(widths[name])]
            now[name] = state
        timer = gr.Timer(TICK if busy or not ready else IDLE)
        return [*self.live(session), now, timer, *outputs]

    # Choosing.

    def choosing(self, act: Callable[..., Any]) -> Callable[..., list[Any]]:
        """A handler of the left side: who, then what `act` takes beside the session."""

        def handle(who: str | None, *values: Any) -> list[Any]:
            before = self.session(who).choice
            session = self.attempt(who, lambda session: act(session, *values))
            self.attempt(who, lambda session: session.preview())
            return [
                *self.choice(session, anew=session.choice.concepts != before.concepts),
                gr.Timer(TICK),
            ]

        return handle

    def typing(
        self, handle: Callable[..., list[Any]], told: Callable[[Session], Sequence[str]], n: int
    ) -> Callable[..., list[Any]]:
        """A handler of the keys in a choice of several, for written names, which no other event tells.

        What a key tells may be older than what was picked meanwhile: so it can add names, and none but
        the key that deletes can take one away.

        Args:
            handle: what is done with the names: who, then they.
            told: the names that the session has.
            n: how many components `handle` answers for.
        """

        def typed(who: str | None, names: list[str] | None, event: gr.KeyUpData) -> list[Any]:
            have = list(told(self.session(who)))
            kept = set(have) <= set(names or [])
            # A letter of a name that is still being written: an answer that comes late, with the names
            # as they are, would take the written one away.
            if have == list(names or []) or (event.key != "Backspace" and not kept):
                return [gr.skip() for _ in range(n)]
            return handle(who, names)

        return typed

    def synonyms(self, name: str) -> Callable[[Session], Sequence[str]]:
        """Says what else a chosen concept is called."""
        return lambda session: next((c.synonyms for c in session.choice.concepts if c.name == name), ())

    def working(self, act: Callable[..., Any]) -> Callable[..., list[Any]]:
        """A handler that starts work: who, then what `act` takes; the timer shows the rest."""

        def handle(who: str | None, *values: Any) -> list[Any]:
            session = self.attempt(who, lambda session: act(session, *values))
            return [*self.live(session), gr.Timer(TICK)]

        return handle

    def change(self, name: str, field: str) -> Callable[..., list[Any]]:
        """A handler of one field of one concept's card."""

        def handle(who: str | None, value: Any) -> list[Any]:
            session = self.attempt(who, lambda s: s.change(name, **{field: _value(field, value)}))
            return self.foresight(session)

        return handle

    def open(self, session: Session, path: str | None) -> None:
        """Go on from an uploaded session or edit."""
        if path:
            session.open(path)

    def share(self, who: str | None) -> Any:
        """Write the session's file, for the browser to save."""
        written: list[Path] = []
        self.attempt(who, lambda session: written.append(session.save(carry=True)))
        return gr.update(value=str(written[0]) if written else None)

    def select(self, who: str | None, event: gr.EventData) -> list[Any]:
        """Another pair on the slider."""
        session = self.session(who)
        place = getattr(event, "place", 0)
        if not isinstance(place, int) or not 0 <= place < len(session.pairs):
            return [gr.skip(), gr.skip()]
        pair = session.pairs[place]
        return [gr.update(value=(pair.before, pair.after)), views.sides(pair)]

    def budget(self, attack: str) -> list[Any]:
        """The budget's range for an attack."""
        least, most, first, step = BUDGETS[attack]
        return [
            gr.update(minimum=least, maximum=most, value=first, step=step),
            views.sentence(ATTACKS[attack]),
        ]


def anchors(session: Session, concept: Concept) -> tuple[list[str], str]:
    """What a concept could become, and what is chosen."""
    loaded = session.models.ready(session.choice.model)
    known = loaded.model.anchors if loaded else ANCHORS
    names = {concept.name, *concept.synonyms}
    found = [a for a in dict.fromkeys([known[concept.kind], "sky", *known.values()]) if a not in names]
    chosen = AUTO if concept.anchor is None else concept.anchor or EMPTY
    return [AUTO, EMPTY, *found, *([] if chosen in (AUTO, EMPTY, *found) else [chosen])], chosen


def _value(field: str, value: Any) -> Any:
    """A card's value as the concept's field."""
    if field == "anchor":
        return {AUTO: None, EMPTY: "", None: None}.get(value, value)
    if field == "synonyms":
        return tuple(value or ())
    return value


def attack(session: Session, name: str, budget: float, prompt: str) -> Any:
    """Start an attack; the page's budget for a radius is in per cent.

    Args:
        session: the user's.
        name: the attack's.
        budget: as the page shows it.
        prompt: what the attacker asks for.
    """
    return session.attack(name, budget / 100 if name == "embedding" else budget, prompt)
