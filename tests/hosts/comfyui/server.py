"""The real server in a process of its own, and a real browser in front of it; both on loopback."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
import uuid
from pathlib import Path

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
START, JOB = 240, 300  # seconds that a busy machine may need


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Server:
    """``main.py --cpu`` on a base folder of its own."""

    def __init__(self, core: Path, base: Path):
        self.base, self.port = base, free_port()
        for name in ("custom_nodes", "models", "input", "output", "user", "temp"):
            (base / name).mkdir(parents=True, exist_ok=True)
        command = [sys.executable, str(core / "main.py"), "--cpu", "--base-directory", str(base), "--disable-api-nodes"]
        command += ["--listen", "127.0.0.1", "--port", str(self.port), "--preview-method", "latent2rgb"]
        self.command = [*command, "--database-url", f"sqlite:///{base}/user/comfyui.db"]
        self.url = f"http://127.0.0.1:{self.port}"

    def __enter__(self):
        self.log_file = open(self.base / "server.log", "w")  # noqa: SIM115 (closed in __exit__)
        self.process = subprocess.Popen(self.command, stdout=self.log_file, stderr=subprocess.STDOUT, cwd=self.base)
        until = time.monotonic() + START
        while time.monotonic() < until and self.process.poll() is None:
            try:
                self.get("/queue")
                return self
            except OSError:
                time.sleep(0.5)
        self.__exit__()
        raise AssertionError(f"the server did not start:\n{self.log()[-3000:]}")

    def __exit__(self, *exception):
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.log_file.close()

    def log(self) -> str:
        return (self.base / "server.log").read_text(errors="replace")

    def get(self, path: str):
        with urllib.request.urlopen(self.url + path, timeout=60) as answer:
            return json.loads(answer.read())

    def post(self, path: str, content: dict):
        request = urllib.request.Request(self.url + path, json.dumps(content).encode())
        request.add_header("Content-Type", "application/json")
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.loads(answer.read() or b"null")

    def queue(self, prompt: dict) -> str:
        return self.post("/prompt", {"prompt": prompt, "client_id": uuid.uuid4().hex})["prompt_id"]

    def wait(self, prompt_id: str) -> dict:
        """The job's history entry, once it is over."""
        until = time.monotonic() + JOB
        while time.monotonic() < until:
            if prompt_id in (history := self.get(f"/history/{prompt_id}")):
                return history[prompt_id]
            time.sleep(0.2)
        raise AssertionError(f"the job did not end:\n{self.log()[-3000:]}")


class Browser:
    """Headless Chromium, driven over its DevTools socket."""

    def __init__(self, profile: Path, width=1500, height=700):
        self.profile, self.size, self.count, self.errors = profile, (width, height), 0, []

    async def __aenter__(self):
        import aiohttp

        flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
        flags += "--disable-component-update --disable-sync --mute-audio --remote-debugging-port=0 --hide-scrollbars"
        command = [CHROMIUM, *flags.split(), f"--user-data-dir={self.profile}"]
        self.process = subprocess.Popen(
            [*command, f"--window-size={self.size[0]},{self.size[1]}", "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "HOME": str(self.profile)},
        )
        ports = self.profile / "DevToolsActivePort"
        until = time.monotonic() + 60
        while not (ports.exists() and "\n" in ports.read_text()):
            assert self.process.poll() is None and time.monotonic() < until, "the browser did not start"
            await asyncio.sleep(0.2)
        port = int(ports.read_text().splitlines()[0])
        self.session = aiohttp.ClientSession()
        async with self.session.get(f"http://127.0.0.1:{port}/json/list") as answer:
            (page,) = [target for target in await answer.json() if target["type"] == "page"]
        self.socket = await self.session.ws_connect(page["webSocketDebuggerUrl"], max_msg_size=0)
        for domain in ("Page", "Runtime"):
            await self.call(f"{domain}.enable")
        return self

    async def __aexit__(self, *exception):
        await self.session.close()
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    async def call(self, method: str, **parameters):
        """One DevTools command and its answer; errors of the page are noted on the way."""
        self.count += 1
        await self.socket.send_json({"id": self.count, "method": method, "params": parameters})
        while True:
            message = await asyncio.wait_for(self.socket.receive_json(), 120)
            if message.get("method") == "Runtime.exceptionThrown":
                details = message["params"]["exceptionDetails"]
                self.errors.append(details.get("exception", {}).get("description") or details["text"])
            if message.get("id") == self.count:
                assert "error" not in message, (method, message["error"])
                return message["result"]

    async def run(self, script: str):
        """The value of an expression, awaited where it is a promise."""
        options = {"awaitPromise": True, "returnByValue": True, "userGesture": True}
        answer = await self.call("Runtime.evaluate", expression=script, **options)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    async def until(self, script: str, seconds: float = 120):
        """The first truthy value of an expression."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            try:
                if value := await self.run(script):
                    return value
            except AssertionError:  # the page is still on its way
                pass
            await asyncio.sleep(0.5)
        raise AssertionError(f"never true in the page: {script}")

    async def open(self, url: str):
        await self.call("Page.navigate", url=url)

    async def picture(self, path: Path):
        answer = await self.call("Page.captureScreenshot", format="png")
        path.write_bytes(base64.b64decode(answer["data"]))
