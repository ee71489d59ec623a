"""The MCP server, through the SDK's own client."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
import soundfile

mcp = pytest.importorskip("mcp", reason="needs pip install 'sa3[mcp]'")

from sa3_mlx.common.files.audio import write_audio
from sa3_mlx.server.open.mcp import make_mcp
from tests.support.command import tone, write_tone
from tests.support.server import Live

Call = Callable[..., Coroutine[Any, Any, dict[str, Any]]]


def talk(server: Live, folder: Path, work: Callable[[Any, Call], Coroutine[Any, Any, None]]) -> None:
    """Connect a client to the tools, and do work with it."""

    async def run() -> None:
        async with mcp.Client(make_mcp(f"http://127.0.0.1:{server.port}", None, folder)) as client:

            async def call(name: str, **arguments: Any) -> dict[str, Any]:
                result = await client.call_tool(name, arguments)
                if result.is_error:
                    return {"refused": result.content[0].text}
                return json.loads(result.content[0].text)

            await work(client, call)

    asyncio.run(run())


async def finished(call: Call, job: dict[str, Any]) -> dict[str, Any]:
    while job.get("state") in ("queued", "running"):
        await asyncio.sleep(0.01)
        job = await call("status", job=job["job"])
    return job


def test_schemas_are_flat(server: Live, tmp_path: Path) -> None:
    async def work(client: Any, _: Call) -> None:
        tools = (await client.list_tools()).tools
        assert [tool.name for tool in tools] == ["make", "loop", "vary", "inpaint", "extend", "status", "fetch", "list"]
        for tool in tools:
            text = json.dumps(tool.input_schema)
            assert "$ref" not in text and "anyOf" not in text and '"null"' not in text, text
            assert tool.description and len(tool.description) < 200

    talk(server, tmp_path, work)


def test_an_assistant_makes_edits_and_fetches_sounds(server: Live, tmp_path: Path) -> None:
    write_tone(tmp_path / "take.wav", 0.5)
    write_audio(tmp_path / "take.opus", tone(0.5, rate=48000), 48000, "opus")

    async def work(_: Any, call: Call) -> None:
        made = await finished(call, await call("make", prompt="soft rain", seconds=0.6, seed=3, count=2))
        assert made["state"] == "done" and [sound["seed"] for sound in made["sounds"]] == [3, 4]
        source = made["sounds"][0]["id"]
        jobs = [
            await call("vary", source=source, noise_level=0.4),
            await call("inpaint", source="take.wav", starts=[0.1, 0.3], ends=[0.2, 0.4], prompt="bell", steps=3),
            await call("extend", source=source, seconds=0.9),
            await call("inpaint", source=source, starts=[0.1, 0.4], ends=[0.2, 0.5], prompts=["bell", ""], steps=2),
            await call("loop", prompt="kick", bpm=300, bars=1, steps=2),
            await call("vary", source="take.opus", steps=1),
        ]
        sounds = [(await finished(call, job))["sounds"][0] for job in jobs]
        assert [sound["kind"] for sound in sounds] == ["vary", "inpaint", "extend", "inpaint", "generate", "vary"]
        assert sounds[1]["regions"] == [[0.1, 0.2], [0.3, 0.4]] and sounds[2]["seconds"] == 0.9
        assert sounds[4]["prompt"] == "kick" and sounds[4]["seconds"] == 4 * 60 / 300
        for form in ("wav", "flac", "mp3"):
            file = await call("fetch", sound=sounds[2]["id"], format=form)
            assert Path(file["path"]).parent == tmp_path and soundfile.info(file["path"]).samplerate == 8000
        listed = await call("list", text="soft rain", limit=2)
        assert len(listed["sounds"]) == 2 and listed["models"][0]["name"] == "little"

    talk(server, tmp_path, work)


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("make", {"prompt": "x", "seconds": 99}, "makes above 0"),
        ("vary", {"source": "nothing"}, "no such sound"),
        ("vary", {"source": "../secret.wav"}, "no such file in the folder"),
        ("vary", {"source": "/etc/hosts.wav"}, "no such file in the folder"),
        ("vary", {"source": "x" * 999}, "no such sound"),
        ("vary", {"source": "a\0b.wav"}, "no such file in the folder"),
        ("inpaint", {"source": "x", "starts": [1], "ends": []}, "one end for each start"),
        ("inpaint", {"source": "x", "starts": [1], "ends": [2], "prompts": ["a", "b"]}, "1 regions and 2 prompts"),
        ("loop", {"prompt": "x", "bpm": 60, "bars": 64}, "makes above 0"),
        ("loop", {"prompt": "x", "bpm": 120, "model": "other"}, "there are little"),
        ("loop", {"prompt": "x, 90 bpm", "bpm": 120}, "the prompt says 90 bpm, bpm says 120"),
        ("status", {"job": "../jobs"}, "ids are letters and digits"),
        ("fetch", {"sound": "nothing"}, "there is no sound"),
        ("fetch", {"sound": "x", "format": "aac"}, "format"),
    ],
)
def test_refusals_are_the_server_s_lines(
    server: Live, tmp_path: Path, name: str, arguments: dict[str, Any], words: str
) -> None:
    (tmp_path / "inside").mkdir()
    write_tone(tmp_path / "secret.wav", 0.5)

    async def work(_: Any, call: Call) -> None:
        assert words in (await call(name, **arguments))["refused"]

    talk(server, tmp_path / "inside", work)


def test_the_command_speaks_on_standard_streams(shared_home: Path, tmp_path: Path) -> None:
    """With a server of its own, as none is given and none runs on the usual port of this home."""
    environment = os.environ | {"SA3_HOME": str(tmp_path / "home"), "PYTHONPATH": str(Path(__file__).parents[2])}
    words = ["-m", "sa3_mlx", "mcp", "--folder", str(tmp_path), "--model", str(shared_home / "models" / "little")]

    async def run() -> None:
        command = mcp.StdioServerParameters(command=sys.executable, args=[*words, "--backend", "mlx"], env=environment)
        async with mcp.Client(command) as client:
            made = json.loads((await client.call_tool("make", {"prompt": "bell", "seconds": 0.3})).content[0].text)
            while made["state"] in ("queued", "running"):
                await asyncio.sleep(0.05)
                made = json.loads((await client.call_tool("status", {"job": made["job"]})).content[0].text)
            assert made["state"] == "done", made

    asyncio.run(run())
