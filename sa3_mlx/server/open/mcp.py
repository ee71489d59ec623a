"""Let assistants make sounds: an MCP server whose tools queue jobs and return at once.

Schemas are flat: text, numbers and lists of numbers, no references and no null; what may be left out has a default.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from mcp.server import MCPServer
from mcp.server.mcpserver.exceptions import ToolError  # an assistant reads its words
from pydantic import Field

from sa3_mlx.common.files.atomic import write_bytes
from sa3_mlx.common.generation.loop import BPM_MAX, BPM_MIN, loop_seconds
from sa3_mlx.common.measures.tempo import named_bpm
from sa3_mlx.common.schema import quoted
from sa3_mlx.common.version import version

from .client import Client

_KEPT = ("id", "kind", "name", "prompt", "seed", "seconds", "parent", "regions", "peak_db", "starred")

Prompt = Annotated[str, Field(description="What to make, such as 'piano note A4'.")]
Seconds = Annotated[float, Field(description="Length; 0 takes the usual one, or that of the source.")]
Seed = Annotated[int, Field(description="Equal seeds give equal sounds; -1 takes a random one.")]
Source = Annotated[str, Field(description="Id of a sound, or the name of an audio file in the folder.")]
Model = Annotated[str, Field(description="An installed model; empty takes the server's own.")]
Steps = Annotated[int, Field(description="Sampling steps; 0 takes the usual number.")]


class Tools:
    """Hold the tools. Files are read from and written to one folder, and no other."""

    def __init__(self, client: Client, folder: Path) -> None:
        self._client, self._folder = client, folder

    def make(
        self,
        prompt: Prompt,
        seconds: Seconds = 0,
        seed: Seed = -1,
        count: Annotated[int, Field(description="Sounds, with seeds that go on.", ge=1, le=16)] = 1,
        steps: Steps = 0,
        model: Model = "",
    ) -> dict[str, Any]:
        """Make sounds from a prompt. Returns a job at once; ask status until it is done, then fetch its sounds."""
        return self._submit("generate", _request(prompt, seconds, seed, steps), model=model, variations=count)

    def loop(
        self,
        prompt: Prompt,
        bpm: Annotated[float, Field(description="Tempo; it is put into the prompt.", ge=BPM_MIN, le=BPM_MAX)],
        bars: Annotated[int, Field(description="Of four beats.", ge=1, le=64)] = 1,
        seed: Seed = -1,
        steps: Steps = 0,
        model: Model = "",
    ) -> dict[str, Any]:
        """Make bars at a tempo, exactly as long, whose end leads into their beginning. Returns a job at once."""
        models = {found["name"]: found for found in self._client.json("GET", "/api/models")}
        if model and model not in models:
            raise ToolError(f"model is {quoted(model)}: there are {', '.join(models)}")
        chosen = models[model] if model else next(iter(models.values()))
        if (said := named_bpm(prompt)) not in (None, bpm):
            raise ToolError(f"the prompt says {said:g} bpm, bpm says {bpm:g}: leave one of them out")
        rate, known = chosen["sample_rate"], "bpm" in chosen["words"] or not chosen["words"]
        named = f"{prompt}, {bpm:g} bpm" if known and "bpm" not in prompt.lower() else prompt
        request = _request(named, loop_seconds(bpm, 4 * bars, rate), seed, steps) | {
            "loop": {"bpm": bpm, "beats": 4 * bars}
        }
        return self._submit("generate", request, model=model)

    def vary(
        self,
        source: Source,
        prompt: Prompt = "",
        noise_level: Annotated[float, Field(description="Above 0 to 1: how far from the source.", gt=0, le=1)] = 0.6,
        seed: Seed = -1,
        steps: Steps = 0,
        model: Model = "",
    ) -> dict[str, Any]:
        """Make a variation of a sound. Returns a job at once."""
        request = {**_request(prompt, 0, seed, steps), "init": {"noise_level": noise_level}}
        return self._submit("vary", request, model=model, source=self._source(source))

    def inpaint(
        self,
        source: Source,
        starts: Annotated[list[float], Field(description="Seconds where the regions begin.")],
        ends: Annotated[list[float], Field(description="Seconds where they end, one for each start.")],
        prompt: Prompt = "",
        prompts: Annotated[list[str], Field(description="One for each region; none: prompt for all.")] = [],  # noqa: B006 (the schema shows it, and nothing changes it)
        seed: Seed = -1,
        steps: Steps = 0,
        model: Model = "",
    ) -> dict[str, Any]:
        """Make regions of a sound again and keep all other samples exactly. Returns a job at once."""
        if len(starts) != len(ends):
            raise ToolError(f"there are {len(starts)} starts and {len(ends)} ends: give one end for each start")
        if prompts and len(prompts) != len(starts):
            raise ToolError(f"there are {len(starts)} regions and {len(prompts)} prompts: give one for each, or none")
        spans = zip(starts, ends, prompts or [""] * len(starts), strict=True)
        regions = [{"start": start, "end": end, "prompt": own} if own else [start, end] for start, end, own in spans]
        request = {**_request(prompt, 0, seed, steps), "inpaint": {"regions": regions}}
        return self._submit("inpaint", request, model=model, source=self._source(source))

    def extend(
        self,
        source: Source,
        seconds: Annotated[float, Field(description="Length of the whole, the source included.", gt=0)],
        prompt: Prompt = "",
        seed: Seed = -1,
        steps: Steps = 0,
        model: Model = "",
    ) -> dict[str, Any]:
        """Continue a sound, which stays exactly as it is. Returns a job at once."""
        request = _request(prompt, seconds, seed, steps)
        return self._submit("extend", request, model=model, source=self._source(source))

    def status(self, job: Annotated[str, Field(description="Id of a job.")]) -> dict[str, Any]:
        """Tell how far a job is: its state, place or step, the seconds that remain, and its sounds when it is done."""
        return _job(self._client.json("GET", f"/api/jobs/{_plain(job)}"))

    def fetch(
        self,
        sound: Annotated[str, Field(description="Id of a sound.")],
        format: Annotated[Literal["wav", "flac", "mp3"], Field(description="Of the file.")] = "wav",
    ) -> dict[str, Any]:
        """Write a sound as a file into the folder and return its path; a file of that name is replaced."""
        found = self._client.json("GET", f"/api/sounds/{_plain(sound)}")
        path = self._folder / f"{found['name']} {found['id'][:6]}.{format}"
        write_bytes(path, self._client.ask("GET", f"/api/sounds/{found['id']}/audio", query={"format": format}))
        return {"path": str(path), **_sound(found)}

    def list(
        self,
        text: Annotated[str, Field(description="Only sounds with this text in their prompt.")] = "",
        limit: Annotated[int, Field(description="At most so many.", ge=1, le=100)] = 20,
    ) -> dict[str, Any]:
        """List sounds, newest first, and prompts that the model knows."""
        sounds = self._client.json("GET", "/api/sounds", query={"text": text, "limit": limit})
        models = self._client.json("GET", "/api/models")
        return {
            "sounds": [_sound(sound) for sound in sounds],
            "models": [{"name": model["name"], "max_seconds": model["max_seconds"]} for model in models],
            "prompts": models[0]["prompts"],
        }

    def _submit(
        self, kind: str, request: dict[str, Any], *, model: str, source: str = "", variations: int = 1
    ) -> dict[str, Any]:
        body: dict[str, Any] = {"kind": kind, "request": request, "variations": variations}
        body |= ({"model": model} if model else {}) | ({"source": source} if source else {})
        return _job(self._client.json("POST", "/api/jobs", body))

    def _source(self, text: str) -> str:
        """Return the id of a sound; a file of the folder is uploaded. Raises ToolError for any other file."""
        folder = self._folder.resolve()
        try:
            path = (folder / text).resolve()
            inside = path.is_relative_to(folder) and path.is_file()
        except (OSError, ValueError):  # no name that a file can have
            inside = False
        if inside:
            return self._client.upload(path)
        if not text.isalnum():
            raise ToolError(f"source is {quoted(text)}: there is no such file in the folder {folder.name}")
        return text


def make_mcp(address: str, token: str | None, folder: Path) -> MCPServer[Any]:
    """Return the MCP server in front of a server of sa3."""
    tools = Tools(Client(address, token, refused=ToolError), folder)
    server: MCPServer[Any] = MCPServer(
        "sa3",
        version=version(),
        instructions="Make and edit sounds. make, loop, vary, inpaint and extend return a job at once; ask status "
        "every second until its state is done, then fetch its sounds.",
        log_level="ERROR",
    )
    for tool in (
        tools.make,
        tools.loop,
        tools.vary,
        tools.inpaint,
        tools.extend,
        tools.status,
        tools.fetch,
        tools.list,
    ):
        server.tool()(tool)
    return server


def _request(prompt: str, seconds: float, seed: int, steps: int) -> dict[str, Any]:
    """Return a request in which defaults are left out."""
    given = {"prompt": (prompt, ""), "seconds": (seconds, 0), "seed": (seed, -1)}
    item = {name: value for name, (value, default) in given.items() if value != default}
    return {"items": [item]} | ({"sampling": {"steps": steps}} if steps else {})


def _job(job: dict[str, Any]) -> dict[str, Any]:
    """Return of a job what matters, without null."""
    progress = {name: value for name, value in (job["progress"] or {}).items() if value is not None}
    found = {"job": job["id"], "state": job["state"], **progress, "sounds": [_sound(sound) for sound in job["sounds"]]}
    return found | ({"error": job["error"]} if job["error"] else {})


def _sound(sound: dict[str, Any]) -> dict[str, Any]:
    return {name: sound[name] for name in _KEPT if sound[name] not in (None, [])}


def _plain(text: str) -> str:
    """Return an id as it can stand in an address. Raises ToolError for what is none."""
    if not text.isalnum():
        raise ToolError(f"id is {quoted(text)}: ids are letters and digits, as list and make return them")
    return text
