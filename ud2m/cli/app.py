"""A page in the browser, to try pictures on: what ``ud2m app`` shows. Its jobs are those of ``ud2m sample``."""

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from omegaconf import DictConfig

from ud2m.cli.errors import correctable, message
from ud2m.cli.models import shipped_models
from ud2m.cli.sample import AUTO
from ud2m.cli.train import quiet_libraries
from ud2m.cli.visit import MASK, OPERATORS, Request, drawn_mask, outcome, shown_levels, without_places
from ud2m.images import SUFFIXES, most_pixels, read_image
from ud2m.precision import find_device

MOST_PIXELS = 2**20
"""Of a picture and of its samples, unless ``UD2M_MAX_PIXELS`` says otherwise."""
BYTES_PER_PIXEL = 8
"""Of a file; the readers refuse longer ones too."""
KEPT_SECONDS = 3600
"""How long uploads and results can be used; all are deleted when the page ends."""
DRAWINGS = 20
"""Drawings that are held in memory."""
INTRODUCTION = "Samples of the pictures x that could be behind y = A x + noise; where they differ, trust none of them."
NUMBER = "a number"


def main(config: DictConfig) -> None:
    """Show the page until it is interrupted."""
    quiet_libraries()
    device = find_device(config.device)
    pixels = most_pixels(MOST_PIXELS)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that files are deleted then, too
    with TemporaryDirectory(prefix="ud2m-app-") as folder:
        # read when Gradio is imported: where it keeps copies of files, and that it tells nobody
        os.environ |= {"GRADIO_TEMP_DIR": f"{folder}/shown", "GRADIO_ANALYTICS_ENABLED": "False"}
        page = build_page(config, device, Path(folder))
        import gradio as gr

        font = ["system-ui", "sans-serif"]  # of the browser's own machine; by default they come from elsewhere
        _, address, _ = page.launch(
            server_name=config.host,
            server_port=config.port,
            max_file_size=BYTES_PER_PIXEL * pixels,
            theme=gr.themes.Default(font=font, font_mono=["monospace"]),
            footer_links=[],
            prevent_thread_lock=True,
            quiet=True,
            share=False,
            ssr_mode=False,
        )
        print(f"the page is at {address} (Ctrl-C ends it)", flush=True)
        page.block_thread()


def build_page(config: DictConfig, device: torch.device, folder: Path) -> Any:
    """Return the page.

    Args:
        config: of conf/app.yaml.
        device: where it computes.
        folder: for files.
    """
    import gradio as gr

    hook = gr.Progress()
    # Gradio's threads come and go, and each that computes leaves memory of its own behind, and threads of OpenMP
    jobs = ThreadPoolExecutor(max_workers=1)
    present: set[str] = set()  # visitors whose job is under way
    noises: dict[str, Any] = {"as the model was trained": None, "estimated": AUTO}
    kinds = {"clean: it is degraded first": False, "degraded already: it is y": True}

    def refused(error: Exception, *files: Any) -> Exception:
        if not correctable(error):
            return error
        return gr.Error(without_places(message(error), *files), duration=None, print_exception=False)

    def choose(name: str) -> tuple[Any, Any]:
        operator = OPERATORS[name]
        is_number = operator.default is not None
        return (
            gr.update(visible=is_number, label=operator.meaning, value=operator.default),
            gr.update(visible=bool(operator.key) and not is_number, label=operator.meaning, value=None),
        )

    def look(name: str, path: str | None) -> tuple[Any, Any]:
        for old in list(drawing.blob_storage)[:-DRAWINGS]:  # Gradio keeps those that were never sent off
            drawing.blob_storage.pop(old, None)
        try:
            shown, draws = None if path is None else shown_levels(read_image(path)), name == MASK
        except Exception as error:
            raise refused(error, Path(str(path))) from error
        return (
            gr.update(visible=shown is not None and not draws, value=shown),
            gr.update(visible=shown is not None and draws, value=shown if draws else None),
        )

    def sample(
        path: str | None,
        kind: str,
        model: str,
        name: str,
        number: float | None,
        file: str | None,
        drawn: dict[str, Any] | None,
        noise: str,
        level: float | None,
        num_samples: float,
        seed: float | None,
        request: gr.Request,
        progress: gr.Progress = hook,
    ) -> Iterator[tuple[Any, ...]]:
        visitor = str(request.session_hash)

        def tell(done: int, expected: int) -> None:
            if visitor not in present:
                raise gr.Error("stopped, since the page was closed", print_exception=False)
            progress((done, expected), unit="network evaluations")

        picture, given = Path(path or ""), file and Path(file)
        present.add(visitor)
        with TemporaryDirectory(dir=folder) as work:  # until the page has copied what it shows
            try:
                if path is None:
                    raise ValueError("there is no picture: drop one first")
                setting = drawn_mask(drawn, Path(work) / "mask.png") if name == MASK and not given else given or number
                sigma_y = noises.get(noise, level)
                asked = Request(model, picture, kinds[kind], name, setting, sigma_y, int(num_samples), int(seed or 0))
                # Gradio knows by the context whose bar moves
                found = jobs.submit(copy_context().run, outcome, asked, device, Path(work), tell).result()
            except Exception as error:
                raise refused(error, picture, given, Path(work) / "mask.png") from error
            finally:
                present.discard(visitor)
            yield (
                found.text,
                gr.update(value=found.before_after, visible=found.before_after is not None),
                gr.update(value=found.pictures, visible=True),
                gr.update(value=str(found.archive), visible=True),
            )

    def leave(request: gr.Request) -> None:
        present.discard(str(request.session_hash))

    models = list(dict.fromkeys([str(config.model), *shipped_models()]))
    with gr.Blocks(title="UD2M", analytics_enabled=False, delete_cache=(60, KEPT_SECONDS)) as page:
        gr.Markdown(f"# UD2M\n{INTRODUCTION}")
        with gr.Row():
            with gr.Column(scale=2, min_width=320):
                picture = gr.File(
                    label=f"picture of at most {most_pixels():,} pixels", file_types=list(SUFFIXES), height=140
                )
                preview = gr.Image(
                    label="picture", visible=False, interactive=False, height=280, format="png", buttons=["fullscreen"]
                )
                drawing = gr.ImageEditor(
                    label="paint over what is missing",
                    visible=False,
                    sources=(),
                    transforms=(),
                    layers=False,
                    brush=gr.Brush(colors=["#ff2d55"], color_mode="fixed"),
                )
                kind = gr.Radio(list(kinds), value=next(iter(kinds)), label="the picture is")
                model = gr.Dropdown(models, value=models[0], label="model")
                operator = gr.Dropdown(list(OPERATORS), value="Gaussian blur", label="operator A")
                number = gr.Number(OPERATORS["Gaussian blur"].default, label=OPERATORS["Gaussian blur"].meaning)
                file = gr.File(visible=False, file_types=list(SUFFIXES), height=140)
                noise = gr.Radio([*noises, NUMBER], value=next(iter(noises)), label="noise level of y")
                level = gr.Number(
                    0.01, label="standard deviation of the noise, where pictures lie in [0, 1]", visible=False
                )
                count = gr.Slider(1, config.max_samples, min(4, config.max_samples), step=1, label="samples")
                seed = gr.Number(0, label="seed", precision=0)
                start = gr.Button("Draw samples", variant="primary")
            with gr.Column(scale=3, min_width=320):
                text = gr.Markdown("The samples will be here.", min_height=100)
                slider = gr.ImageSlider(
                    label="y and the mean of the samples", interactive=False, format="png", visible=False
                )
                gallery = gr.Gallery(
                    label="pictures",
                    format="png",
                    object_fit="contain",
                    height="auto",
                    columns=3,
                    interactive=False,
                    visible=False,
                )
                download = gr.DownloadButton("Download everything (zip)", visible=False)
        private: dict[str, Any] = {"api_visibility": "private"}
        operator.change(choose, operator, [number, file], **private)
        gr.on([picture.change, operator.change], look, [operator, picture], [preview, drawing], **private)
        noise.change(lambda noise: gr.update(visible=noise == NUMBER), noise, level, **private)
        asked = [picture, kind, model, operator, number, file, drawing, noise, level, count, seed]
        start.click(
            sample,
            asked,
            [text, slider, gallery, download],
            concurrency_limit=1,  # visitors wait for one another: memory is that of one job
            show_progress_on=text,
            **private,
        )
        page.unload(leave)
    return page
