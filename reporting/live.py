"""The report while runs are under way: served on this machine, and true as long as it is.

One thread reads the records and makes the page when they have changed; the others hand out the last one. Whoever looks
asks again every two seconds and is told in a line that nothing is new, or takes over the blocks that are.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import gzip
import hashlib
import html
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

from crucible.options import ConfigError
from crucible.run import RunDirectory
from reporting import files
from reporting.making import Made, made_of
from reporting.now import now_blocks
from reporting.page import Block, Heading, Page, Text
from reporting.progress import UNDER_WAY, progress_of, sweep_files
from reporting.records import LeftOut, Run, Sweep, find_runs, read_run, read_runs
from reporting.rendering import block_to_html, document
from reporting.request import SEE, Request, read_arguments

POLL_S = 2.0  # between two looks at the files
ALIVE_S = 10.0  # between two questions whether a run that is under way lives
AGAIN_S = 30.0  # between two estimates of when what is under way will end
SCAN_REST = 25.0  # times as long as looking at the files takes, where nothing has changed
REST = 3.0  # times as long as the last page took to make: the processors are the runs'
_OF_A_RUN = ("summary.json", "metrics.csv", "steps.csv", "config.yaml")


def watch(arguments: Sequence[str], request: Request, say: Callable[[str], None]) -> None:
    """Serve the page until Ctrl-C.

    Args:
        arguments: as typed; globs are followed anew, as folders come.
        request: what they ask for.
        say: is told where the page is.

    Raises:
        ConfigError: where the port is taken.
    """
    assert request.watching is not None
    watcher = Watcher(arguments)
    with contextlib.suppress(KeyboardInterrupt), serving(watcher, request.watching.port) as port:
        say(f"http://127.0.0.1:{port}/  follows {', '.join(map(str, request.folders))}; Ctrl-C ends it")
        say(
            f"from elsewhere: ssh -L {port}:127.0.0.1:{port} {socket.gethostname()}, then the same address there"
        )
        while True:
            began = time.monotonic()
            made = watcher.look()
            time.sleep(POLL_S if made else max(POLL_S, SCAN_REST * (time.monotonic() - began)))
    say("no longer served")


# What is shown


class Shown(NamedTuple):
    """A page as it is handed out; `tag` is another one wherever it differs."""

    content: bytes
    compressed: bytes
    tag: str


def shown(page: Page) -> Shown:
    """The page as one file that follows what it was made from."""
    blocks = "\n".join(_placed(page.blocks))
    body = f'<main>\n<h1>{html.escape(page.title)}</h1>\n{blocks}\n</main>\n<p id="ended" hidden></p>'
    content = document(page.title, body, _STYLE, _SCRIPT).encode()
    tag = f'"{hashlib.sha256(content).hexdigest()[:24]}"'
    return Shown(content, gzip.compress(content, 5, mtime=0), tag)


def _placed(blocks: Iterable[Block]) -> Iterator[str]:
    """Each block with a name of its place, by which its next state is found, and with a digest of what it shows."""
    heading, seen = {1: "", 2: "", 3: ""}, dict[str, int]()
    for block in blocks:
        if isinstance(block, Heading):
            heading |= {block.level: block.text} | {level: "" for level in heading if level > block.level}
        name = f"{heading[2]}/{heading[3]}/{type(block).__name__}"
        seen[name] = seen.get(name, 0) + 1
        text = block_to_html(block)
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        yield f'<div data-place="{html.escape(name)}{seen[name]}" data-digest="{digest}">\n{text}\n</div>'


class Watcher:
    """Makes the page anew when the records have changed. `look` is called by one thread.

    Args:
        arguments: of the report.
    """

    def __init__(self, arguments: Sequence[str]) -> None:
        self._arguments = arguments
        self._runs: dict[Path, tuple[Any, Run | LeftOut]] = {}
        self._stamps: dict[Path, Any] = {}
        self._sweeps: list[Sweep] = []
        self._made: tuple[list[Run], Made] | None = None
        self._written: Any = None  # what the files say
        self._seen: Any = None
        self._looked = self._took = self._asked = 0.0
        self._alive: list[str] = []  # the states of the runs under way
        self._trouble = ""
        self._blocks: list[Block] = [Text("Reading the records.")]
        self.shown = shown(Page("Comparison", self._blocks))

    def look(self) -> bool:
        """Make the page anew where there is reason to; whether it was."""
        began = time.monotonic()
        try:
            request = read_arguments(self._arguments)
            stamps = self._stamp(request)
        except (ConfigError, OSError) as error:  # the folder has gone, say
            self._seen = None  # when it is back, nothing in it need have changed
            return self._say(str(error))
        passed = began - self._looked
        if passed < REST * self._took or (
            stamps == self._seen and not (passed > AGAIN_S and self._under_way())
        ):
            return False
        self._seen = stamps
        try:
            page = self._page(request)
        except Exception as error:  # a record that is being written, or is not what it should be
            self._seen = None
            return self._say(
                f"{type(error).__name__}: {error}" if not isinstance(error, ConfigError) else str(error)
            )
        finally:
            self._looked, self._took = time.monotonic(), time.monotonic() - began
        self._trouble, self._blocks = "", page.blocks
        self.shown = shown(page)
        return True

    def _say(self, trouble: str) -> bool:
        """Show what stands in the way above the page as it was."""
        if trouble == self._trouble:
            return False
        self._trouble = trouble
        at = time.strftime("%H:%M:%S")
        note = Text(
            f"The records cannot be read as they are since {at}: {trouble}. Below is what they said before.",
            True,
        )
        self.shown = shown(Page("Comparison", [note, *self._blocks]))
        return True

    def _under_way(self) -> list[Path]:
        return [
            p for p, (_, one) in self._runs.items() if isinstance(one, LeftOut) and one.status == UNDER_WAY
        ]

    def _stamp(self, request: Request) -> Any:
        """What differs whenever a record does: a few calls a run, no file is opened."""
        self._stamps = {path: _stamp_of(path) for folder in request.folders for path in find_runs(folder)}
        bases = [*request.folders, *dict.fromkeys(path.parent.parent for path in self._stamps)]
        sweeps = {file: _status(file) for file in sweep_files(bases)}
        if time.monotonic() - self._asked > ALIVE_S:
            self._asked = time.monotonic()
            self._alive = [RunDirectory(path).state() for path in self._under_way()]
        return self._stamps, sweeps, self._alive

    def _read(self, path: Path, request: Request, sweeps: Sequence[Sweep]) -> Run | LeftOut:
        """`read_run`, of what has not changed as it was read before."""
        stamp, (before, known) = self._stamps.get(path), self._runs.get(path, (None, None))
        settled = isinstance(known, Run) or (known is not None and known.status in ("failed", "interrupted"))
        if known is None or stamp != before or not settled or self._sweeps != sweeps:
            known = read_run(path, request, sweeps)
        self._fresh[path] = stamp, known
        return known

    def _page(self, request: Request) -> Page:
        self._fresh: dict[Path, tuple[Any, Run | LeftOut]] = {}
        self._now: Sequence[Sweep] = self._sweeps

        def read(path: Path, request: Request, sweeps: Sequence[Sweep]) -> Run | LeftOut:
            self._now = sweeps
            return self._read(path, request, sweeps)

        trouble = ""
        try:
            runs, left_out = read_runs(request, read)
        except ConfigError as error:  # no run yet, or none with the metric
            runs, left_out, trouble = (
                [],
                [one for _, one in self._fresh.values() if isinstance(one, LeftOut)],
                str(error),
            )
        self._runs, self._sweeps = self._fresh, list(self._now)
        page = Page("Comparison", list(now_blocks(progress_of(runs, left_out, request.folders))))
        if not trouble and runs:
            try:
                made = self._made_of(runs, request)
                page.add(*made.page(left_out, request).blocks)
            except ConfigError as error:  # no baseline yet
                trouble = str(error)
        if trouble:
            page.add(Heading("The report", 2), Text(f"None yet: {trouble}.", notice=True))
        return page

    def _made_of(self, runs: list[Run], request: Request) -> Made:
        """The tables and plots; those from before where no run has changed. With `out=` they are written."""
        if (
            self._made is None
            or len(self._made[0]) != len(runs)
            or any(a is not b for a, b in zip(self._made[0], runs, strict=True))
        ):
            self._made, self._written = (runs, made_of(runs, request)), None
        made = self._made[1]
        left_out = [one for _, one in self._fresh.values() if isinstance(one, LeftOut)]
        if request.watching is not None and request.watching.writes and left_out != self._written:
            files.write(made.page(left_out, request), made.tables, made.plots, request.out, made.over_all)
            self._written = left_out
        return made


def _status(path: Path) -> tuple[int, ...]:
    """Of a file; empty where there is none."""
    try:
        found = path.stat()
    except OSError:
        return ()
    return found.st_mtime_ns, found.st_size, found.st_ino


def _stamp_of(path: Path) -> Any:
    """What differs whenever a file of the run has been written anew: folders know of renamings in them."""
    tests = path / "tests"
    folders = (path, tests, *(tests.iterdir() if tests.is_dir() else ()))
    return [_status(p) for p in (*folders, *(path / name for name in _OF_A_RUN))]


# The server

HOSTS = ("127.0.0.1", "localhost", "::1")
_HEADERS = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class _Handler(BaseHTTPRequestHandler):
    """One page, by GET, to this machine's own user."""

    protocol_version = "HTTP/1.1"
    server_version, sys_version = "Crucible", ""
    timeout = 60  # of a connection that says nothing
    server: _Server

    def do_GET(self) -> None:
        if not self.server.serves:  # a connection that a viewer has kept
            self.close_connection = True
            return
        if host_of(self.headers.get("Host", "")) not in HOSTS:
            # a name that somebody made to mean this machine would let their pages read ours
            self._answer(403, b"this page is for this machine: http://127.0.0.1\n")
            return
        if is_of_another_user(self.client_address[1], self.server.server_port):
            self._answer(403, b"this page is for the user who serves it\n")
            return
        if self.path.partition("?")[0] != "/":
            self._answer(404, b"there is one page here: /\n")
            return
        page = self.server.watcher.shown
        if self.headers.get("If-None-Match") == page.tag:
            self._answer(304, b"", ETag=page.tag)
            return
        packed = "gzip" in self.headers.get("Accept-Encoding", "")
        self._answer(
            200, page.compressed if packed else page.content, "text/html; charset=utf-8", ETag=page.tag,
            **({"Content-Encoding": "gzip"} if packed else {}),
            **{"Content-Security-Policy": self.server.policy},
        )  # fmt: skip

    def _refuse(self) -> None:
        self.close_connection = True  # what it brought is not read
        self._answer(405, b"GET only\n", Allow="GET")

    do_HEAD = do_POST = do_PUT = do_DELETE = do_OPTIONS = do_PATCH = do_TRACE = do_CONNECT = _refuse

    def _answer(self, status: int, content: bytes, kind: str = "text/plain", **headers: str) -> None:
        self.send_response(status)
        more = {} if status == 304 else {"Content-Type": kind, "Content-Length": str(len(content))}
        for name, value in {**_HEADERS, **more, **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Nobody reads it."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    serves = True

    def __init__(self, family: socket.AddressFamily, place: tuple[str, int], watcher: Watcher) -> None:
        self.address_family = family
        self.watcher = watcher
        scripts = re.findall(r"<script>(.*?)</script>", watcher.shown.content.decode(), re.DOTALL)
        digests = (base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in scripts)
        allowed = " ".join(f"'sha256-{digest}'" for digest in digests)
        self.policy = (
            f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data:; connect-src 'self'; "
            "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )
        super().__init__(place, _Handler)

    def server_bind(self) -> None:
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        # its name is not looked up
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A viewer that went away in the middle is no error."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


@contextlib.contextmanager
def serving(watcher: Watcher, port: int) -> Iterator[int]:
    """Hand out the watcher's page on this machine, by IPv4 and, where there is one, IPv6; the port.

    Args:
        watcher: whose `shown` is handed out.
        port: 0: a free one.

    Raises:
        ConfigError: where it is taken.
    """
    servers = _listen(watcher, port)
    for server in servers:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.2}, daemon=True).start()
    try:
        yield servers[0].server_port
    finally:
        for server in servers:
            server.serves = False
            server.shutdown()
            server.server_close()


def _listen(watcher: Watcher, port: int) -> list[_Server]:
    for left in reversed(range(10)):
        try:
            first = _Server(socket.AF_INET, ("127.0.0.1", port), watcher)
        except OSError as error:
            raise ConfigError(
                f"port={port}: {error.strerror}; without port= a free one is taken", see=SEE
            ) from error
        try:
            return [first, _Server(socket.AF_INET6, ("::1", first.server_port), watcher)]
        except OSError as error:
            if error.errno != errno.EADDRINUSE:  # no IPv6 here
                return [first]
            first.server_close()
            if port or not left:  # `localhost` may mean either: both are ours, or none
                raise ConfigError(
                    f"port={first.server_port}: {error.strerror} (::1); without port= a free one is taken",
                    see=SEE,
                ) from error
    raise AssertionError("the last turn returns or raises")


def host_of(header: str) -> str:
    """The host of a `Host` header, without its port: a tunnel has one of its own."""
    found = re.fullmatch(r"\[([0-9a-fA-F:.]+)\](?::\d+)?|([^:\[\]]*)(?::\d+)?", header.strip())
    return "" if found is None else (found[1] or found[2] or "").lower()


def is_of_another_user(port: int, served: int) -> bool:
    """Whether a connection on this machine was made by somebody else who is logged in here; root may.

    Linux says whose each connection is; where nothing does, nobody is refused.

    Args:
        port: the connection's at the other end.
        served: ours.
    """
    if not hasattr(os, "getuid"):
        return False
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            for line in Path(table).read_text(encoding="ascii").splitlines()[1:]:
                fields = line.split()
                ends = [int(end.rpartition(":")[2], 16) for end in fields[1:3]]
                if ends == [port, served]:
                    return int(fields[7]) not in (os.getuid(), 0)
    return False


_STYLE = """
html{overflow-anchor:none}
#ended{position:fixed;left:0;right:0;bottom:0;margin:0;max-width:none;padding:.5rem 1rem;background:var(--ink);
color:var(--page)}
td[data-share]{background:linear-gradient(to right,color-mix(in srgb,var(--link) 28%,transparent) var(--share),
transparent 0)}
"""

_SCRIPT = """
(() => {
  const main = document.querySelector("main"), ended = document.getElementById("ended");
  let tag = "", missed = 0, busy = false;
  const bars = root => { for (const table of root.querySelectorAll("table")) {
    const column = [...table.tHead.rows[0].cells].findIndex(cell => cell.textContent === "progress");
    if (column < 0) continue;
    for (const row of table.tBodies[0].rows) {
      const cell = row.cells[column];
      cell.dataset.share = "";
      cell.style.setProperty("--share", 100 * Number(cell.dataset.key) + "%");
    }
  } };
  const each = (before, after, what, act) => {
    const others = after.querySelectorAll(what);
    before.querySelectorAll(what).forEach((one, number) => others[number] && act(one, others[number]));
  };
  // what a reader has opened, sorted and moved to stays so in the block that comes after it
  const carry = (before, after) => {
    each(before, after, "details", (one, other) => { other.open = one.open; });
    each(before, after, "table", (one, other) => {
      const sorted = [...one.tHead.rows[0].cells].find(cell => cell.ariaSort !== "none");
      if (!sorted) return;
      const button = other.tHead.rows[0].cells[sorted.cellIndex]?.querySelector("button");
      for (let i = 0; button && i < (sorted.ariaSort === "descending" ? 2 : 1); i++) button.click();
    });
    const focused = [...before.querySelectorAll("summary,button,[tabindex]")].indexOf(document.activeElement);
    const moved = [...before.querySelectorAll(".scroll")].map(one => one.scrollLeft);
    before.replaceWith(after);
    after.querySelectorAll(".scroll").forEach((one, number) => { one.scrollLeft = moved[number] ?? 0; });
    if (focused >= 0) after.querySelectorAll("summary,button,[tabindex]")[focused]?.focus({preventScroll: true});
  };
  const replace = next => {
    const anchor = [...main.children].find(node => node.getBoundingClientRect().bottom > 0);
    const place = anchor?.dataset.place, top = anchor?.getBoundingClientRect().top;
    const fresh = [...next.querySelector("main").children].filter(node => node.dataset.place);
    const wanted = new Set(fresh.map(node => node.dataset.place)), old = new Map();
    for (const node of [...main.children]) {
      if (!node.dataset.place) continue;
      if (wanted.has(node.dataset.place)) old.set(node.dataset.place, node); else node.remove();
    }
    let at = main.querySelector("h1").nextElementSibling;
    for (const node of fresh) {
      let kept = old.get(node.dataset.place);
      if (!kept || kept.dataset.digest !== node.dataset.digest) {
        sortable(node);
        bars(node);
        if (kept) { if (kept === at) at = node; carry(kept, node); }
        kept = node;
      }
      if (kept === at) at = at.nextElementSibling; else main.insertBefore(kept, at);
    }
    const now = [...main.children].find(node => node.dataset.place === place);
    if (now && scrollY > 0) scrollBy(0, now.getBoundingClientRect().top - top);
  };
  const follow = async () => {
    if (document.hidden || busy || !getSelection().isCollapsed) return;
    busy = true;
    try {
      const answer = await fetch(location.pathname, {headers: tag ? {"If-None-Match": tag} : {}, cache: "no-store"});
      if (answer.ok) {
        replace(new DOMParser().parseFromString(await answer.text(), "text/html"));
        tag = answer.headers.get("ETag");
      } else if (answer.status !== 304) throw new Error(answer.statusText);
      missed = 0;
      ended.hidden = true;
    } catch (error) {
      if (++missed === 2) {
        ended.textContent = "Not served any more; this is what it was at " + new Date().toLocaleTimeString() + ".";
        ended.hidden = false;
      }
    }
    busy = false;
  };
  bars(document);
  setInterval(follow, 2000);
  document.addEventListener("visibilitychange", follow);
})();
"""
