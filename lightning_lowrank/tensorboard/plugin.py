"""The server side of the tab: routes of TensorBoard's own server."""

import json
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from tensorboard import plugin_util
from tensorboard.plugins.base_plugin import FrontendMetadata, TBPlugin
from werkzeug.wrappers import Request, Response

from lightning_lowrank.tensorboard import answers
from lightning_lowrank.tensorboard.event_files import EventFiles
from lightning_lowrank.tensorboard.series import PLUGIN, Reader

# TensorBoard warns of answers without it: what is said to be data is never to be run.
HEADERS = {"X-Content-Type-Options": "nosniff", "Cache-Control": "no-store"}

Application = Callable[[Any, Any], Iterable[bytes]]


class LowRankPlugin(TBPlugin):  # type: ignore[misc]
    """The tab "Low rank": there as soon as a log directory has what a monitor writes.

    Runs and tags are looked up among those that the data provider lists; no part of a request is ever a path.
    """

    plugin_name = PLUGIN

    def __init__(self, context: Any) -> None:
        super().__init__(context)
        self._provider = context.data_provider
        self._files = EventFiles(Path(context.logdir).expanduser() if context.logdir else None)
        kept = (getattr(context.flags, "samples_per_plugin", None) or {}).get(PLUGIN, 0)
        self._kept = int(kept) if kept > 0 else None

    def get_plugin_apps(self) -> dict[str, Application]:
        """Route -> WSGI application."""
        routes = {
            f"/{route}": self._application(partial(self._data, answer)) for route, answer in answers.ANSWERS.items()
        }
        modules = {f"/{module.name}": self._application(partial(_module, module)) for module in answers.MODULES}
        return {**routes, **modules, "/csv": self._application(self._sheet)}

    def is_active(self) -> bool:
        """TensorBoard finds out by itself, from the name."""
        return False

    def frontend_metadata(self) -> Any:
        """The place of the tab's code, and its name."""
        return FrontendMetadata(es_module_path="/index.js", tab_name="Low rank")

    def _application(self, answer: Callable[[Request], Response]) -> Application:
        """One that says what was wrong with a question, and never more than that."""

        def application(environ: Any, start: Any) -> Iterable[bytes]:
            request = Request(environ)
            try:
                response = answer(request) if request.method in ("GET", "HEAD") else _json({"error": "only GET"}, 405)
            except (KeyError, ValueError) as error:
                response = _json(
                    {"error": str(error.args[0] if error.args else error)}, 404 if isinstance(error, KeyError) else 400
                )
            return response(environ, start)

        return application

    def _reader(self, request: Request) -> Reader:
        context, experiment = plugin_util.context(request.environ), plugin_util.experiment_id(request.environ)
        return Reader(self._provider, context, experiment, self._files)

    def _data(self, answer: Callable[[Reader, answers.Arguments], dict[str, Any]], request: Request) -> Response:
        return _json(answer(self._reader(request), request.args.to_dict()) | {"kept": self._kept})

    def _sheet(self, request: Request) -> Response:
        text = answers.sheet(self._reader(request), request.args.to_dict())
        # A fixed name: one made of the run's could break out of the header.
        headers = HEADERS | {"Content-Disposition": 'attachment; filename="lowrank.csv"'}
        return Response(text, content_type="text/csv; charset=utf-8", headers=headers)


def _module(module: Path, request: Request) -> Response:
    return Response(module.read_bytes(), content_type="application/javascript; charset=utf-8", headers=HEADERS)


def _json(content: dict[str, Any], status: int = 200) -> Response:
    return Response(
        json.dumps(content, allow_nan=False), status=status, content_type="application/json", headers=HEADERS
    )
