"""Reads the JSON of requests.

Takes a request, returns its checked body; ApiError for another Content-Type, for what is no JSON,
and for more lists and objects than a request has. Large bodies are read in a thread of their own,
so that other clients are answered meanwhile.
"""

import asyncio
import json
import re
from typing import Annotated

from fastapi import Depends, FastAPI, Request
from pydantic import BaseModel, ValidationError, model_validator
from pydantic.json_schema import models_json_schema

from runtime.serve.errors import ApiError

from .refusals import refused_field

INLINE_BYTES = 1 << 16  # bodies up to here are read at once
MAX_NESTED = 50_000  # lists and objects in a body
MAX_VALUES = 1_200_000  # commas: a million token ids, and room
STRING = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*(?:"|\\?\Z)', re.DOTALL)
SCHEMA_PLACE = "#/components/schemas/{model}"
JSON_TYPE = re.compile(r"application/([\w.+-]+\+)?json")


class Body(BaseModel):
    """An object of a request. null is as good as a field that is left out."""

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, given):
        if not isinstance(given, dict):
            return given
        fields = cls.model_fields
        return {
            name: value
            for name, value in given.items()
            if value is not None or (name in fields and fields[name].is_required())
        }


def json_body(model: type[BaseModel]):
    """The type of a route's argument: the request's body as a `model`."""

    async def read(request: Request):
        check_content_type(request.headers.get("content-type"))
        check_encoding(request.headers.get("content-encoding"))
        body = await request.body()
        if len(body) <= INLINE_BYTES:
            return parse(model, body)
        return await asyncio.to_thread(parse, model, body)

    return Annotated[model, Depends(read)]


def openapi_of(model: type[BaseModel]) -> dict:
    """What the OpenAPI document says about a route with that body."""
    schema = {"$ref": SCHEMA_PLACE.format(model=model.__name__)}
    return {"requestBody": {"content": {"application/json": {"schema": schema}}, "required": True}}


def describe_bodies(app: FastAPI, models: list[type[BaseModel]]):
    """Puts the schemas that `openapi_of` names into the OpenAPI document."""
    plain = app.openapi

    def openapi() -> dict:
        document = plain()
        wanted = [(model, "validation") for model in models]
        _, schemas = models_json_schema(wanted, ref_template=SCHEMA_PLACE)
        document.setdefault("components", {}).setdefault("schemas", {}).update(schemas["$defs"])
        return document

    app.openapi = openapi


def check_content_type(given: str | None):
    """A page of another site may send any other type to a server on this machine unasked."""
    kind = (given or "").partition(";")[0].strip().lower()
    if not JSON_TYPE.fullmatch(kind):
        found = f"is {kind[:80]!r}" if kind else "is missing"
        raise ApiError(f"the header Content-Type {found}; send Content-Type: application/json")


def check_encoding(given: str | None):
    if given and given.strip().lower() != "identity":
        raise ApiError(
            f"the body is compressed (Content-Encoding: {given[:40]}), which this server does not "
            "take; send plain JSON",
            415,
        )


def parse(model: type[BaseModel], body: bytes) -> BaseModel:
    given = load(body)
    try:
        return model.model_validate(given)
    except ValidationError as error:
        problems = error.errors(include_url=False, include_input=False)
        raise refused_field(problems, given) from None


def load(body: bytes) -> dict:
    check_structure(body)
    try:
        given = json.loads(body)
    except RecursionError:
        raise ApiError("the body nests too deeply") from None
    except UnicodeDecodeError:
        raise ApiError("the body is not JSON: it is not UTF-8 text") from None
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise ApiError(f"the body is not JSON: {error.msg} at {place}") from None
    except ValueError:  # a number of thousands of digits
        raise ApiError("the body is not JSON: a number in it has too many digits") from None
    if not isinstance(given, dict):
        raise ApiError("the body is JSON, but no object; send {...}")
    return given


def check_structure(body: bytes):
    """Counts lists, objects and values before anything is built from them."""
    if len(body) <= INLINE_BYTES:
        return
    outside = STRING.sub(b"", body)
    nested = outside.count(b"[") + outside.count(b"{")
    if nested > MAX_NESTED:
        raise ApiError(f"the body has {nested:,} lists and objects; the limit is {MAX_NESTED:,}")
    values = outside.count(b",")
    if values > MAX_VALUES:
        raise ApiError(f"the body has {values:,} values; the limit is {MAX_VALUES:,}")
