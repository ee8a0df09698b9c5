"""The page: what stands where, and which handler answers what."""

from __future__ import annotations

from functools import partial
from typing import Any

import gradio as gr

from expunge.base.shipped import DEFAULT_MODEL
from expunge.problem import KINDS
from expunge.studio import recipes, theme, views, working
from expunge.studio.handlers import ATTACKS, BUDGETS, CARDS, EXAMPLES, TICK, Handlers, anchors, attack
from expunge.studio.house import Studio
from expunge.studio.strength import STRONGEST

HIDDEN: dict[str, Any] = {"show_progress": "hidden", "concurrency_limit": 32}


def build_page(studio: Studio) -> gr.Blocks:
    """Build the page of a studio: its components, wired to what answers them."""
    return _Page(studio).blocks


class _Page:
    """The components of the page and the wires between them."""

    def __init__(self, studio: Studio) -> None:
        self.do = Handlers(studio)
        with gr.Blocks(
            title="expunge studio", analytics_enabled=False, fill_width=True, delete_cache=(3600, 86400)
        ) as self.blocks:
            # The browser keeps the session's name; what is asked goes by the server's copy, which is
            # there before anything can be pressed.
            self.kept = gr.BrowserState(None, storage_key="expunge-studio", secret="expunge-studio")
            self.who = gr.State(None)
            self.version, self.shown = gr.State(0), gr.State({})
            self.timer = gr.Timer(TICK, active=False)
            self._top()
            with gr.Row(equal_height=False):
                with gr.Column(scale=4, min_width=340):
                    self._choose()
                    self._erase()
                with gr.Column(scale=7, min_width=340):
                    self._stage()
            self.live = [self.progress, self.cancel, self.doing, self.stop]
            self.choice = [self.model, self.config, self.names, self.version, self.stay]
            self.choice += [self.method, self.preset, self.about, self.seed, self.foresight, self.start]
            self.groups = {
                "stage": [self.welcome, self.tabs, self.title],
                "look": [self.slider, self.caption, self.gallery],
                "form": [
                    self.prompts,
                    self.number,
                    self.look_seed,
                    self.strength,
                    self.suite,
                    self.target,
                ],
                "judged": [self.verdict, self.report],
                "attacked": [self.rungs],
                "taken": [self.files, self.lost],
                "code": [self.command, self.python],
            }
            self._wire_choice()
            self._wire_work()

    # What stands where.

    def _top(self) -> None:
        with gr.Row(elem_id="x-top"):
            gr.HTML(views.HEADER)
            self.opened = gr.UploadButton(
                "Open …", size="sm", interactive=False, elem_id="x-open", scale=0, min_width=96
            )
            self.share = gr.Button(
                "Save …", size="sm", interactive=False, elem_id="x-save", scale=0, min_width=96
            )
            self.theme = gr.Button("Light / dark", size="sm", elem_id="x-theme", scale=0, min_width=110)
            self.shared = gr.DownloadButton("studio.json", elem_id="x-shared", visible="hidden")

    def _choose(self) -> None:
        with gr.Column(elem_classes="x-panel"):
            _step(1, "Choose what to forget")
            self.names = gr.Dropdown(
                [],
                multiselect=True,
                allow_custom_value=True,
                label="Forget",
                elem_id="x-names",
                interactive=False,
                info="Search, or write your own and press Enter.",
            )
            with gr.Row(elem_id="x-examples"):
                self.examples = {
                    label: gr.Button(label, size="sm", interactive=False) for label in EXAMPLES
                }
            gr.render(
                inputs=[self.who, self.version],
                triggers=[self.version.change],
                concurrency_limit=1,
                show_progress="hidden",
            )(self._cards)
            self.stay = gr.Dropdown(
                [],
                multiselect=True,
                allow_custom_value=True,
                label="Keep as it is",
                elem_id="x-stay",
                info="What must not change; its like is proposed.",
            )
            with gr.Accordion("A list, pasted or as a file", open=False):
                self.text = gr.Textbox(
                    label="One a line",
                    lines=3,
                    elem_id="x-text",
                    placeholder="airplane|jet=sky\nflag of Japan=a flag, identity",
                )
                self.take_text = gr.Button("Take this list", size="sm", interactive=False)
                self.list_file = gr.File(label=".txt, .csv or .toml", height=96, elem_id="x-list")
            with gr.Accordion("Another model", open=False):
                self.model = gr.Textbox(
                    label="Model",
                    elem_id="x-model",
                    info=f"{DEFAULT_MODEL}, a diffusers folder, a .safetensors file, or a hub id",
                )
                self.config = gr.Textbox(
                    label="Built like",
                    elem_id="x-config",
                    info="for a .safetensors file, where the hub is out of reach: a diffusers folder of"
                    " a model built like it",
                )
                self.take_model = gr.Button("Use this model", size="sm", interactive=False)

    def _cards(self, who: str | None, version: int) -> None:
        """A card a concept: its other names, what it becomes, its kind."""
        session = self.do.session(who)
        concepts = session.choice.concepts
        for concept in concepts[:CARDS]:
            name = concept.name
            choices, chosen = anchors(session, concept)
            proposed = [*session.knowledge.synonyms(name), *concept.synonyms]
            with gr.Column(elem_classes="x-card"):
                gr.HTML(views.heading(name, session))
                with gr.Row():
                    becomes = gr.Dropdown(
                        choices,
                        value=chosen,
                        allow_custom_value=True,
                        label="becomes",
                        interactive=True,
                        min_width=140,
                    )
                    kind = gr.Dropdown(
                        list(KINDS),
                        value=concept.kind,
                        label="is a kind of",
                        interactive=True,
                        min_width=110,
                    )
                also = gr.Dropdown(
                    list(dict.fromkeys(proposed)),
                    value=list(concept.synonyms),
                    multiselect=True,
                    allow_custom_value=True,
                    label="also called",
                    interactive=True,
                    min_width=140,
                )
            shown = [self.foresight, self.start]
            for part, field in ((becomes, "anchor"), (kind, "kind"), (also, "synonyms")):
                part.input(self.do.change(name, field), [self.who, part], shown, **HIDDEN)
            handle = self.do.change(name, "synonyms")
            also.blur(handle, [self.who, also], shown, **HIDDEN)
            typed = self.do.typing(handle, self.do.synonyms(name), len(shown))
            also.key_up(typed, [self.who, also], shown, trigger_mode="always_last", **HIDDEN)
        if len(concepts) > CARDS:
            gr.HTML(views.sentence(f"and {len(concepts) - CARDS} more, as they stand in the list"))

    def _erase(self) -> None:
        with gr.Column(elem_classes="x-panel"):
            _step(2, "Erase")
            with gr.Row():
                self.method = gr.Dropdown(
                    [option.name for option in recipes.methods()],
                    label="Method",
                    elem_id="x-method",
                    min_width=90,
                )
                self.preset = gr.Dropdown([], label="Preset", elem_id="x-preset", min_width=110)
                self.seed = gr.Number(
                    0, label="Seed", precision=0, minimum=0, elem_id="x-seed", min_width=64, scale=0
                )
            self.about = gr.HTML()
            self.foresight = gr.HTML(elem_id="x-foresight")
            with gr.Row(elem_id="x-go"):
                self.start = gr.Button("Erase", variant="primary", elem_id="x-erase", interactive=False)
                self.cancel = gr.Button(
                    "Cancel", elem_id="x-cancel", visible=False, scale=0, min_width=100
                )
                self.progress = gr.HTML(elem_id="x-progress")

    def _stage(self) -> None:
        with gr.Column(elem_classes="x-panel", elem_id="x-stage"):
            self.welcome = gr.HTML(views.WELCOME)
            self.title = gr.HTML(elem_id="x-title")
            with gr.Row():
                self.doing = gr.HTML(elem_id="x-doing")
                self.stop = gr.Button(
                    "Cancel", elem_id="x-stop", size="sm", visible=False, scale=0, min_width=90
                )
            with gr.Tabs(visible=False) as self.tabs:
                with gr.Tab("Look"):
                    self._look()
                with gr.Tab("Judge"):
                    self._judge()
                with gr.Tab("Attack"):
                    self._attack()
                with gr.Tab("Take away"):
                    self._take()

    def _look(self) -> None:
        with gr.Row(equal_height=False):
            with gr.Column(scale=5, min_width=280):
                self.slider = gr.ImageSlider(
                    type="pil",
                    label="Before and after",
                    show_label=False,
                    interactive=False,
                    max_height=400,
                    elem_id="x-slider",
                    buttons=["fullscreen"],
                    format="png",
                )
                self.caption = gr.HTML()
            with gr.Column(scale=4, min_width=240):
                self.prompts = gr.Textbox(label="Prompts, one a line", lines=4, elem_id="x-prompts")
                self.strength = gr.Slider(
                    0, STRONGEST, 1, step=0.1, label="Strength of the edit", elem_id="x-strength"
                )
                with gr.Row():
                    self.number = gr.Slider(1, 8, 2, step=1, label="Images each", min_width=120)
                    self.look_seed = gr.Number(
                        0, label="First seed", precision=0, minimum=0, min_width=100
                    )
                self.draw = gr.Button("Draw", variant="primary", elem_id="x-draw")
        self.gallery = gr.HTML(elem_id="x-gallery", js_on_load=views.PICK)

    def _judge(self) -> None:
        with gr.Row():
            self.suite = gr.Dropdown([], label="Suite", elem_id="x-suite", min_width=140)
            self.size = gr.Radio(
                list(working.SIZES), value="glance", label="How many images", elem_id="x-size"
            )
        self.size_about = gr.HTML(views.sentence(working.SIZES["glance"]))
        self.judge = gr.Button("Judge", variant="primary", elem_id="x-judge")
        self.verdict = gr.HTML(elem_id="x-verdict")
        self.report = gr.HTML(elem_id="x-report")

    def _attack(self) -> None:
        least, most, first, step = BUDGETS["inversion"]
        with gr.Row():
            self.attack = gr.Radio(
                list(ATTACKS), value="inversion", label="Attack", elem_id="x-attack-kind"
            )
            self.budget = gr.Slider(least, most, first, step=step, label="Budget", elem_id="x-budget")
        self.attack_about = gr.HTML(views.sentence(ATTACKS["inversion"]))
        self.target = gr.Textbox(label="A prompt that called for it", elem_id="x-target")
        self.strike = gr.Button("Try to get it back", variant="primary", elem_id="x-attack")
        self.rungs = gr.HTML(elem_id="x-rungs")

    def _take(self) -> None:
        self.form = gr.Radio(
            [(about, form) for form, about in working.FORMS.items()],
            value="edit",
            label="Form",
            elem_id="x-form",
        )
        self.write = gr.Button("Prepare", variant="primary", elem_id="x-take")
        self.files = gr.File(label="Ready to save", visible=False, interactive=False, elem_id="x-files")
        self.lost = gr.HTML()
        gr.HTML(views.sentence("The same on the command line, and in Python"))
        self.command = gr.Code(
            language="shell", wrap_lines=True, label="Command", interactive=False, elem_id="x-command"
        )
        self.python = gr.Code(
            language="python", wrap_lines=True, label="Python", interactive=False, elem_id="x-python"
        )

    # Which handler answers what.

    def _wire_choice(self) -> None:
        do = self.do
        waiting = [*self.examples.values(), self.take_text, self.take_model, self.opened, self.share]
        self.blocks.load(
            partial(do.arrive, n=len(waiting)),
            self.kept,
            [self.kept, self.who, *waiting, *self.choice, self.shown, self.timer],
            **HIDDEN,
        )

        def wire(event: Any, act: Any, *inputs: Any) -> Any:
            return event(do.choosing(act), [self.who, *inputs], [*self.choice, self.timer], **HIDDEN)

        def erased(session: Any) -> list[str]:
            return [concept.name for concept in session.choice.concepts]

        several = (
            (self.names, lambda session, names: session.choose(names or []), erased),
            (self.stay, lambda session, names: session.retain(names or []), lambda s: s.choice.retain),
        )
        for part, act, told in several:
            wire(part.input, act, part)
            wire(part.blur, act, part)
            typed = do.typing(do.choosing(act), told, len(self.choice) + 1)
            shown = [*self.choice, self.timer]
            part.key_up(typed, [self.who, part], shown, trigger_mode="always_last", **HIDDEN)
        wire(self.method.input, lambda session, name: session.choose_method(name), self.method)
        wire(
            self.preset.input,
            lambda session, name, preset: session.choose_method(name, preset),
            self.method,
            self.preset,
        )
        wire(self.seed.input, lambda session, seed: session.choose_seed(seed), self.seed)
        wire(self.take_text.click, lambda session, text: session.choose_text(text), self.text)
        given = wire(
            self.list_file.upload, lambda session, file: session.choose_list(file), self.list_file
        )
        # The box is emptied at once: the names stand above, and a mended list can follow a refused one.
        given.then(lambda: None, None, self.list_file, **HIDDEN)
        for label, names in EXAMPLES.items():
            wire(
                self.examples[label].click,
                partial(lambda session, names: session.choose(names), names=names),
            )
        wire(self.opened.upload, do.open, self.opened)
        for event in (self.take_model.click, self.model.submit, self.config.submit):
            begun = event(
                do.working(lambda session, name, config: session.choose_model(name, config)),
                [self.who, self.model, self.config],
                [*self.live, self.timer],
                **HIDDEN,
            )
            begun.then(
                lambda who: do.choice(do.session(who)),
                self.who,
                self.choice,
                **HIDDEN,
            )
        self.theme.click(None, None, None, js=theme.TOGGLE)
        self.share.click(do.share, self.who, self.shared, **HIDDEN).then(
            None,
            None,
            None,
            js="() => setTimeout(() => document.querySelector('#x-shared').click(), 300)",
        )

    def _wire_work(self) -> None:
        do, live = self.do, [*self.live, self.timer]

        def wire(event: Any, act: Any, *inputs: Any) -> None:
            event(do.working(act), [self.who, *inputs], live, **HIDDEN)

        def look(session: Any, prompts: str, seed: int, number: int, strength: float) -> None:
            session.look(
                prompts.splitlines(), seed=int(seed or 0), number=int(number), strength=strength
            )

        wire(self.start.click, lambda session: session.erase())
        wire(self.cancel.click, lambda session: session.cancel())
        wire(self.stop.click, lambda session: session.cancel())
        view = (self.prompts, self.look_seed, self.number, self.strength)
        wire(self.draw.click, look, *view)
        wire(self.strength.release, look, *view)
        wire(
            self.judge.click,
            lambda session, suite, size: session.judge(suite or "", size),
            self.suite,
            self.size,
        )
        wire(self.strike.click, attack, self.attack, self.budget, self.target)
        wire(self.write.click, lambda session, form: session.take(form), self.form)
        self.size.input(
            lambda size: views.sentence(working.SIZES[size]), self.size, self.size_about, **HIDDEN
        )
        self.attack.input(do.budget, self.attack, [self.budget, self.attack_about], **HIDDEN)
        self.gallery.click(do.select, self.who, [self.slider, self.caption], **HIDDEN)
        widths = {name: len(parts) for name, parts in self.groups.items()}
        parts = [part for group in self.groups.values() for part in group]
        self.timer.tick(
            partial(do.tick, widths=widths),
            [self.who, self.shown],
            [*self.live, self.shown, self.timer, self.foresight, self.start, *parts],
            **HIDDEN,
        )


def _step(number: int, title: str) -> None:
    gr.HTML(f'<h2 class="x-step"><b aria-hidden="true">{number}</b>{views.escape(title)}</h2>')
