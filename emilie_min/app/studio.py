"""`emilie studio`: a page on which to edit a picture: paint where, say what, undo, branch, save.

What a visitor does is `visitor`'s, how the page is laid out `page`'s (by gradio, an optional extra), and what reaches
it `door`'s. All visitors share the networks, which do one edit at a time. Nothing leaves this computer: no analytics,
no share link, no fonts from elsewhere.
"""

import contextlib
import errno
import importlib.util
import os
import secrets
import signal
import socket
import sys
import tempfile
import threading
import warnings
import webbrowser
from collections.abc import Iterator
from pathlib import Path

from ..emilie import Editor
from ..errors import EmilieError
from .inserting import Networks

NARROW = (
    "@media (max-width: 760px) { .gradio-container > .main { padding: 12px !important; } }"  # outside of css's reach
)


def serve(editor: Editor, local: bool = True, password: str = "", link: str = "", networks: Networks | None = None):
    """The page, and the uvicorn.Server for it: `run(sockets=[listen(...)])`, until its `should_exit`.

    local: for this computer only; password: USER:PASSWORD; link: opens the page, once, with ?token= that text;
    networks: of insertion, None = the small ones. Raises CheckpointError where weights cannot edit.
    """
    folder = tempfile.TemporaryDirectory(prefix="emilie-studio-")  # gradio's, empty; goes with the page
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": folder.name}
    os.environ["GRADIO_ANALYTICS_CACHE_FREQUENCY"] = str(2**62)  # at each event it would count all of them anew
    import fastapi
    import gradio as gr
    import uvicorn

    from . import door
    from .page import Pages, build

    here, parts, page = Path(__file__), ("studio", "layers"), build(editor, networks)
    page.folder = folder
    looks = gr.themes.Base(primary_hue="pink", font=["system-ui", "sans-serif"], font_mono=["monospace"])
    app = gr.mount_gradio_app(  # and not launch(), which may want a proxy or a share link to find its own page
        fastapi.FastAPI(routes=door.routes(page.visitors)),
        page,
        path="/",
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        show_error=False,
        theme=looks.set(block_info_text_color="*neutral_600", slider_color="*primary_500"),
        head="".join(f"<script>{here.with_name(f'{name}.js').read_text('utf-8')}</script>" for name in parts)
        + f"<style>{NARROW}</style>",
        css="\n".join(here.with_name(f"{name}.css").read_text("utf-8") for name in parts),
    )
    inputs = {number: [block.get_block_name() for block in fn.inputs] for number, fn in page.fns.items()}
    app = door.Door(app, inputs, Pages(page), local, door.Auth(password, link))
    quiet = dict(log_level="critical", ws="none", server_header=False, proxy_headers=False)
    return page, uvicorn.Server(uvicorn.Config(app, http=door.Connection, timeout_graceful_shutdown=1, **quiet))


def listen(host: str = "127.0.0.1", port: int = 7860, password: str | None = None) -> socket.socket:
    """Take a port for the page, 0 = any. Raises EmilieError: it is taken, gradio is missing, a password has no user."""
    if password is not None and not all(password.partition(":")):
        raise EmilieError("--auth is USER:PASSWORD")
    if not host:
        raise EmilieError("--host is empty: 127.0.0.1 is this computer only, 0.0.0.0 is any")
    if importlib.util.find_spec("gradio") is None:
        raise EmilieError("the page needs gradio: pip install 'emilie_min[studio]'")
    try:
        return socket.create_server((host, port))
    except OverflowError as error:
        raise EmilieError(f"--port is from 0 to 65535, not {port}") from error
    except (OSError, ValueError, TypeError) as error:  # the last two of a name that none can be
        why = str(getattr(error, "strerror", None) or error).partition(" (")[0]
        at_fault = "port" if getattr(error, "errno", 0) in (errno.EADDRINUSE, errno.EACCES) else "host"
        raise EmilieError(f"cannot serve on {host}:{port}: {why}; choose another --{at_fault}") from error


def studio(
    editor: Editor,
    host: str = "127.0.0.1",
    port: int = 7860,
    open_browser: bool = False,
    password: str | None = None,
    networks: Networks | None = None,
) -> None:
    """Serve the page until interrupted; password: USER:PASSWORD. Raises EmilieError, see `listen` and `serve`."""
    listener = listen(host, port, password)
    url = f"http://{host}:{listener.getsockname()[1]}/"
    local = host in ("127.0.0.1", "localhost")
    link = "" if local or password else secrets.token_urlsafe()
    _, server = serve(editor, local, password or "", link, networks)
    if not local:
        who = (
            "whoever has the password"
            if password
            else "whoever opens its link first; for several give --auth USER:PASSWORD"
        )
        warnings.warn(f"other computers can reach this page, unencrypted: it is for {who}", stacklevel=2)
    url += f"?token={link}" if link else ""
    print(f"the studio is at {url} (stop it with Ctrl-C)", flush=True)
    if open_browser:
        threading.Timer(1, webbrowser.open, [url]).start()
    with contextlib.suppress(KeyboardInterrupt), listener, terminable():
        server.run(sockets=[listener])


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """Meanwhile a termination signal ends the program as its last line would, and no temporary folder stays."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
