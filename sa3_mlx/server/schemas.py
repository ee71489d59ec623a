"""Describe requests for OpenAPI: pydantic models made of the dataclasses that read them, so that no fact is twice."""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, create_model

from sa3_mlx.cli.options.choice import USUAL_SPREAD
from sa3_mlx.common.generation.request import ITEMS_MAX, Item, Request
from sa3_mlx.common.model.sampling import Guidance, Sampling
from sa3_mlx.common.schema import Config

from .orders import PRIORITIES, AdapterChoice, Kind

_STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
_FILLED_IN = {Item: ("prompt", "seconds", "seed"), Sampling: ("sampler", "steps"), Request: ("items",)}
_made: dict[type[Config], type[BaseModel]] = {}
_SHORT: dict[type[Config], Any] = {Sampling: str, Guidance: float}  # what may stand for one


def model_of(kind: type[Config]) -> type[BaseModel]:
    """Return the pydantic model of a dataclass: the same fields without its arrays; what the server fills in may be
    missing."""
    if kind not in _made:
        _made[kind] = _make_model(kind)
    return _made[kind]


def _make_model(kind: type[Config]) -> type[BaseModel]:
    hints = typing.get_type_hints(kind)
    shown: dict[str, Any] = {}
    for field in dataclasses.fields(kind):
        if not _is_array(hints[field.name]):
            optional = field.name in _FILLED_IN.get(kind, ())
            hint, required = _of(hints[field.name]), field.default is dataclasses.MISSING
            default = None if optional else ... if required else _plain(field.default)
            shown[field.name] = (hint | None if optional else hint, default)
    summary = (kind.__doc__ or "").splitlines()[0]
    return create_model(f"{kind.__name__}Body", __config__=_STRICT, __doc__=summary, **shown)


def _is_array(hint: Any) -> bool:
    return typing.get_origin(hint) is np.ndarray


def _plain(value: object) -> Any:
    return value.to_dict() if isinstance(value, Config) else list(value) if isinstance(value, tuple) else value


def _of(hint: Any) -> Any:
    """Return the type of a field as JSON has it: lists for tuples, models for dataclasses."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return typing.Union[tuple(_of(argument) for argument in arguments)]  # noqa: UP007 (made at run time)
    if origin is tuple:
        if arguments[-1] is Ellipsis:
            return list[_of(arguments[0])]  # type: ignore[misc]  # made at run time
        return Annotated[list[_of(arguments[0])], Field(min_length=len(arguments), max_length=len(arguments))]  # type: ignore[misc]
    if isinstance(hint, type) and issubclass(hint, Config):
        return typing.Union[model_of(hint), _SHORT[hint]] if hint in _SHORT else model_of(hint)  # noqa: UP007
    return hint


class JobBody(BaseModel):
    """Ask for a job. Nearly everything may be missing: the commands' own defaults are taken."""

    model_config = _STRICT

    kind: Kind | None = Field(None, description="Missing: what source and request mean.")
    model: str | None = Field(None, description="An installed model. Missing: the server's own.")
    request: model_of(Request) | None = None  # type: ignore[valid-type]  # made at run time
    source: str | None = Field(None, description="Id of the sound or upload to start from.")
    adapters: list[model_of(AdapterChoice)] = []  # type: ignore[valid-type]
    priority: int = Field(0, ge=PRIORITIES[0], le=PRIORITIES[1], description="Higher ones run first.")
    variations: int = Field(1, ge=1, le=ITEMS_MAX, description="Of every item, with seeds that go on.")
    strength: float | None = Field(
        None, gt=0, le=1, description="How far a variation goes, in place of a noise level: equal steps, equal change."
    )
    stream: bool = Field(False, description="Decode in short chunks: sound comes early.")
    exact: bool = Field(False, description="In no batch with other jobs: the bits of the command's file.")

    def plain(self) -> dict[str, Any]:
        """Return what was given, as JSON."""
        return self.model_dump(exclude_unset=True)


class NearBody(BaseModel):
    """Ask for variations near a sound."""

    model_config = _STRICT

    variations: int = Field(4, ge=1, le=ITEMS_MAX)
    spread: float = Field(
        USUAL_SPREAD, ge=0, le=1, description="How far: 0 is the sound itself, 1 that of another seed."
    )


class StarBody(BaseModel):
    """Change what is kept of a sound."""

    model_config = _STRICT

    starred: bool


class SessionBody(BaseModel):
    """Show the token once; a cookie stands for it from then on."""

    model_config = _STRICT

    token: str = Field(max_length=1000)


class ErrorBody(BaseModel):
    """Report what went wrong, in one line that says what to do."""

    error: str


class Answer(BaseModel):
    """Confirm."""

    ok: Literal[True] = True
